"""Cost of the views of an image: the PIL pipeline against the split one (data/transforms/crops.py and
data/transforms/photometric.py), both on this CPU.

    python benchmarks/augment.py                    # under a minute
    python benchmarks/augment.py --rounds 20        # on a machine that others use

Compared is the published multi-crop, 2 x 224 and 8 x 96 pixels with DINO's colors, from the bytes of a JPEG of 500 x 375 to
normalized float views. The PIL pipeline does all of it in a loader worker. Of the split one the worker decodes, crops, resizes and
flips; the rest happens in batches on the device that trains, which is this CPU here: the worst case.

The JPEGs are the photographs of scikit-image and scikit-learn. The sides alternate, each round takes every photograph once, and the
median round counts, in CPU time of this process on one thread, with wall time beside it.

Origin: this project's own; the PIL side is the recipe of DINO (Caron et al., ICCV 2021) on torchvision.
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

from config.ranges import COUNT, integer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from data.decode import decode_image, open_image
from data.demo import photographs
from data.transforms.augment import dino_views
from data.transforms.crops import split_views
from data.transforms.recipe import Crops
from distributed import launch

SIZE = (500, 375)  # the average of ImageNet
CROPS = Crops(224, (0.4, 1.0), (8,), (96,), (0.05, 0.4))
MEAN, STD, STRENGTH = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0.4
TARGETS = {"worker": 0.2, "worker and device part": 0.7}  # shares of the PIL pipeline's cost

Seconds = tuple[float, float]  # of the CPU, and on the wall


def get_args_parser() -> argparse.ArgumentParser:
    """How often, and how strongly the JPEGs are compressed."""
    parser = argparse.ArgumentParser(
        "benchmarks/augment.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=COUNT, default=7)
    parser.add_argument("--images", type=COUNT, default=None, help="photographs of a round; default: all")
    parser.add_argument("--quality", type=integer(1, 100), default=95, help="of the JPEGs")
    return parser


def make_jpegs(quality: int, count: int | None) -> list[bytes]:
    """The photographs, encoded."""
    jpegs = []
    for path in list(photographs().values())[:count]:
        with open_image(path) as file, io.BytesIO() as jpeg:
            file.convert("RGB").resize(SIZE, Image.Resampling.BICUBIC).save(jpeg, "JPEG", quality=quality)
            jpegs.append(jpeg.getvalue())
    return jpegs


def timed(work: Callable[[], object]) -> Seconds:
    """What one call takes."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def measure(jpegs: list[bytes], rounds: int) -> dict[str, list[Seconds]]:
    """Seconds a round of every part; the first round, which warms up, is left out."""
    pil = dino_views(CROPS, 3, MEAN, STD, STRENGTH)
    crops, device_transform = split_views(CROPS, MEAN, STD, STRENGTH)
    samples: list[list[Tensor]] = []

    def with_pil() -> None:
        for jpeg in jpegs:
            pil(decode_image(jpeg, 3))

    def worker() -> None:
        samples[:] = [crops(decode_image(jpeg, 3)) for jpeg in jpegs]

    def device_part() -> None:
        device_transform([torch.stack(part) for part in zip(*samples)], torch.device("cpu"))

    parts = {"PIL": with_pil, "worker": worker, "device part": device_part}
    found: dict[str, list[Seconds]] = {name: [] for name in parts}
    for _ in range(rounds + 1):
        for name, work in parts.items():
            found[name].append(timed(work))
    return {name: seconds[1:] for name, seconds in found.items()}


def main(args: argparse.Namespace) -> None:
    """Measure and print milliseconds an image and ratios."""
    torch.set_num_threads(1)
    utils.seed_everything(0)
    jpegs = make_jpegs(args.quality, args.images)
    found = measure(jpegs, args.rounds)
    found["worker and device part"] = [
        (a[0] + b[0], a[1] + b[1]) for a, b in zip(found["worker"], found["device part"])
    ]
    kilobytes = sum(map(len, jpegs)) / len(jpegs) / 1000
    print(
        f"{len(jpegs)} JPEGs of {SIZE[0]} x {SIZE[1]} pixels, {kilobytes:.0f} kB on average, to 2 x 224 and 8 x 96 pixels; "
        f"one thread, median of {args.rounds} rounds"
    )
    median = {
        name: [statistics.median(column) / len(jpegs) * 1000 for column in zip(*seconds)]
        for name, seconds in found.items()
    }
    for name, (cpu, wall) in median.items():
        print(f"{name:23} {cpu:7.2f} ms of the CPU an image, {wall:7.2f} ms on the wall")
    for name, target in TARGETS.items():
        print(f"{name}: {median[name][0] / median['PIL'][0]:.3f} of the PIL pipeline (target: at most {target})")


if __name__ == "__main__":
    launch.run_script(lambda: main(get_args_parser().parse_args()))
