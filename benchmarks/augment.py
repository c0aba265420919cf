"""Time per image of the augmentation backends `pil` (data/transforms/augment.py) and `split` (crops.py, photometric.py), and of
the worker part of `split` with --decode full and scaled.

    python benchmarks/augment.py                    # two minutes
    python benchmarks/augment.py --rounds 20        # on a shared machine

Both backends turn a JPEG of 500 x 375 pixels into the views of the published multi-crop, 2 x 224 and 8 x 96 pixels with DINO's
colors. `pil` does this in a loader worker; in `split` the worker decodes, crops, resizes and flips, and the rest runs in batches on
the training device, here the same CPU, which is the worst case.

The images are the photographs of scikit-image and scikit-learn. In each round both backends process every photograph once, on one
thread; reported is the median round.

For --decode the photographs also have larger sizes. Both sides start each photograph with the same seed and so draw the same crops,
whose values 0..1 are then compared: the mean over all crops, the standard deviation within a crop, the mean squared difference of
neighboring pixels (high frequencies), and the difference between the crops pixel by pixel.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from config.ranges import COUNT, integer
from data.decode import decode_image, open_image
from data.demo import photographs
from data.transforms.augment import dino_views
from data.transforms.crops import ByteCrops, ScaledCrops, split_views
from data.transforms.recipe import Crops, dino_recipe
from distributed import launch

SIZE = (500, 375)  # average of ImageNet
CROPS = Crops(224, (0.4, 1.0), (8,), (96,), (0.05, 0.4))
MEAN, STD, STRENGTH = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0.4
DECODED_SIZES = (SIZE, (1000, 750), (2000, 1500), (4000, 3000))
TARGETS = {"split, worker": 0.2, "split": 0.7}  # maximum ratio to the time of `pil`

Seconds = tuple[float, float]  # CPU time, wall time


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of this benchmark."""
    parser = argparse.ArgumentParser(
        "benchmarks/augment.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=COUNT, default=7)
    parser.add_argument("--images", type=COUNT, default=None, help="photographs per round; default: all")
    parser.add_argument("--quality", type=integer(1, 100), default=95, help="JPEG quality")
    return parser


def make_jpegs(quality: int, count: int | None, size: tuple[int, int] = SIZE) -> list[bytes]:
    """Return the photographs as JPEG files of `size` (width, height)."""
    jpegs = []
    for path in list(photographs().values())[:count]:
        with open_image(path) as file, io.BytesIO() as jpeg:
            file.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(jpeg, "JPEG", quality=quality)
            jpegs.append(jpeg.getvalue())
    return jpegs


def timed(work: Callable[[], object]) -> Seconds:
    """Return the time of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def measure(jpegs: list[bytes], rounds: int) -> dict[str, list[Seconds]]:
    """Return the times of each part by round, without a warm-up round."""
    pil = dino_views(dino_recipe(CROPS, STRENGTH), 3, MEAN, STD)
    crops, device_transform = split_views(dino_recipe(CROPS, STRENGTH), MEAN, STD)
    samples: list[list[Tensor]] = []

    def run_pil() -> None:
        for jpeg in jpegs:
            pil(decode_image(jpeg, 3))

    def run_worker() -> None:
        samples[:] = [crops(decode_image(jpeg, 3)) for jpeg in jpegs]

    def run_device() -> None:
        device_transform([torch.stack(part) for part in zip(*samples)], torch.device("cpu"))

    parts = {"pil": run_pil, "split, worker": run_worker, "split, device": run_device}
    times: dict[str, list[Seconds]] = {name: [] for name in parts}
    for _ in range(rounds + 1):
        for name, work in parts.items():
            times[name].append(timed(work))
    return {name: seconds[1:] for name, seconds in times.items()}


class CropStatistics(NamedTuple):
    """Statistics of crops, as in the first screen."""

    mean: float
    std: float
    roughness: float


def crop_statistics(crops: Sequence[Tensor]) -> CropStatistics:
    """Return the statistics of uint8 crops (3, S, S), averaged over the crops."""
    rows = []
    for crop in crops:
        values = crop.double() / 255
        steps = [values.diff(dim=dim).square().mean() for dim in (1, 2)]
        rows.append(torch.stack([values.mean(), values.std(), (steps[0] + steps[1]) / 2]))
    return CropStatistics(*torch.stack(rows).mean(dim=0).tolist())


def pixel_difference(crops: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Return the mean absolute difference of uint8 crops, for values 0..1."""
    differences = [(a.double() - b.double()).abs().mean() / 255 for a, b in zip(crops, others, strict=True)]
    return float(torch.stack(differences).mean())


def seeded_crops(transform: ByteCrops | ScaledCrops, jpegs: Sequence[bytes]) -> tuple[list[Tensor], Counter[int]]:
    """Return the crops of all images, of each with its own seed, and how often each reduction occurred."""
    crops, reductions = [], Counter[int]()
    for seed, jpeg in enumerate(jpegs):
        torch.manual_seed(seed)
        if isinstance(transform, ScaledCrops):
            decoded = transform.decode(jpeg, ())
            reductions[decoded.reduction] += 1
            crops += transform(decoded)[:-1]
        else:
            crops += transform(decode_image(jpeg, 3))[:-1]
    return crops, reductions


def report_decode(size: tuple[int, int], quality: int, count: int | None, rounds: int) -> None:
    """Print worker time and crops of --decode full and scaled for images of one size."""
    jpegs, views = make_jpegs(quality, count, size), dino_recipe(CROPS, STRENGTH).views
    sides: dict[str, ByteCrops | ScaledCrops] = {"full": ByteCrops(views), "scaled": ScaledCrops(ByteCrops(views))}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, transform in sides.items():
            times[name].append(timed(partial(seeded_crops, transform, jpegs))[0])
    full, scaled = (statistics.median(seconds[1:]) / len(jpegs) for seconds in times.values())
    (whole, _), (reduced, reductions) = (seeded_crops(transform, jpegs) for transform in sides.values())
    shares = ", ".join(f"1/{k} {100 * n / len(jpegs):.0f} %" for k, n in sorted(reductions.items()))
    print(
        f"--decode, {size[0]} x {size[1]} pixels: worker CPU seconds per 1000 images {1000 * full:.1f} full, "
        f"{1000 * scaled:.1f} scaled, ratio {full / scaled:.2f}; decoded at {shares}"
    )
    before, after = crop_statistics(whole), crop_statistics(reduced)
    print(
        f"    crops: mean {before.mean:.4f} full, {after.mean:.4f} scaled; standard deviation {before.std:.4f}, {after.std:.4f}; "
        f"high frequencies {1e4 * before.roughness:.1f}e-4, {1e4 * after.roughness:.1f}e-4; "
        f"difference of a pixel {pixel_difference(whole, reduced):.4f}",
        flush=True,
    )


def main(args: argparse.Namespace) -> None:
    """Measure and print milliseconds per image and ratios."""
    torch.set_num_threads(1)
    utils.seed_everything(0)
    jpegs = make_jpegs(args.quality, args.images)
    times = measure(jpegs, args.rounds)
    times["split"] = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(times["split, worker"], times["split, device"])]
    kilobytes = sum(map(len, jpegs)) / len(jpegs) / 1000
    print(
        f"{len(jpegs)} JPEGs of {SIZE[0]} x {SIZE[1]} pixels, {kilobytes:.0f} kB on average, to 2 x 224 and 8 x 96 pixels; "
        f"one thread, median of {args.rounds} rounds"
    )
    median = {
        name: [statistics.median(column) / len(jpegs) * 1000 for column in zip(*seconds)]
        for name, seconds in times.items()
    }
    for name, (cpu, wall) in median.items():
        print(f"{name:13} {cpu:7.2f} ms CPU time per image, {wall:7.2f} ms wall time")
    for name, target in TARGETS.items():
        print(f"{name}: {median[name][0] / median['pil'][0]:.3f} of the time of pil (target: at most {target})")
    for size in DECODED_SIZES:
        # One round at larger sizes takes as long as several at the usual one.
        report_decode(size, args.quality, args.images, max(1, args.rounds * SIZE[0] // size[0]))


if __name__ == "__main__":
    launch.run_script(lambda: main(get_args_parser().parse_args()))
