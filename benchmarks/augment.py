"""Time per image of the augmentation backends `pil` (data/transforms/augment.py) and `split` (crops.py, photometric.py).

    python benchmarks/augment.py                    # under a minute
    python benchmarks/augment.py --rounds 20        # on a shared machine

Both backends turn a JPEG of 500 x 375 pixels into the views of the published multi-crop, 2 x 224 and 8 x 96 pixels with DINO's
colors. `pil` does this in a loader worker; in `split` the worker decodes, crops, resizes and flips, and the rest runs in batches on
the training device, here the same CPU, which is the worst case.

The images are the photographs of scikit-image and scikit-learn. In each round both backends process every photograph once, on one
thread; reported is the median round.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from config.ranges import COUNT, integer
from data.decode import decode_image, open_image
from data.demo import photographs
from data.transforms.augment import dino_views
from data.transforms.crops import split_views
from data.transforms.recipe import Crops, dino_recipe
from distributed import launch

SIZE = (500, 375)  # average of ImageNet
CROPS = Crops(224, (0.4, 1.0), (8,), (96,), (0.05, 0.4))
MEAN, STD, STRENGTH = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0.4
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


def make_jpegs(quality: int, count: int | None) -> list[bytes]:
    """Return the photographs as JPEG files."""
    jpegs = []
    for path in list(photographs().values())[:count]:
        with open_image(path) as file, io.BytesIO() as jpeg:
            file.convert("RGB").resize(SIZE, Image.Resampling.BICUBIC).save(jpeg, "JPEG", quality=quality)
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


if __name__ == "__main__":
    launch.run_script(lambda: main(get_args_parser().parse_args()))
