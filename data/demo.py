"""Create the demo dataset from photographs that scikit-image and scikit-learn ship, without a download.

    python -m data.demo .demo/data        # writes .demo/data/{train,val}/<photograph>/<number>.png

The label is the photograph. Training crops come from the left 60 % of each photograph and validation crops from the right 40 %,
so that they share no pixel. Crops are squares of random scale, resized to 64 pixels. The result is deterministic.
"""

from __future__ import annotations

from config.arguments.demo import get_args_parser as get_args_parser

if __name__ == "__main__":  # --help and usage errors are answered before torch is imported
    ARGS = get_args_parser().parse_command_line()

import argparse
import importlib.util
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from data.decode import open_image
from distributed.launch import run_script
from utils import UsageError

# class -> file in the package
SKIMAGE = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "camera": "camera.png",
    "cat": "chelsea.png",
    "cell": "cell.png",
    "clock": "clock_motion.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "hubble": "hubble_deep_field.jpg",
    "moon": "moon.png",
    "motorcycle": "motorcycle_left.png",
    "page": "page.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
    "text": "text.png",
    "tissue": "ihc.png",
}
SKLEARN = {"china": "china.jpg", "flower": "flower.jpg"}

TRAIN_SHARE = 0.6  # of the width of a photograph
CROPS = {"train": 125, "val": 30}  # per photograph
SIZE = 64
SCALE = (0.2, 0.3)  # side of a crop as a share of the photograph's shorter side
SEED = 0


def photographs() -> dict[str, Path]:
    """Return the file of each photograph by class name.

    Raises:
        UsageError: a package is missing, or lacks a file.
    """
    found = {}
    for package, folder, files in (("skimage", "data", SKIMAGE), ("sklearn", "datasets/images", SKLEARN)):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise UsageError(
                f"package {package} is not installed; run pip install -r requirements.txt -r requirements-demo.txt"
            )
        for name, file in files.items():
            path = Path(spec.origin).parent / folder / file
            if not path.is_file():
                raise UsageError(
                    f"this release of {package} does not ship {file}; run pip install -r requirements-demo.txt"
                )
            found[name] = path
    return found


def split_columns(width: int) -> dict[str, tuple[int, int]]:
    """Return the columns [start, end) of a photograph for each split."""
    border = round(width * TRAIN_SHARE)
    return {"train": (0, border), "val": (border, width)}


def random_square(
    rng: np.random.Generator, columns: tuple[int, int], size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of a random square inside some columns of a photograph of `size`."""
    (start, end), (width, height) = columns, size
    side = min(max(1, round(rng.uniform(*SCALE) * min(width, height))), end - start)
    left = int(rng.integers(start, end - side + 1))
    top = int(rng.integers(0, height - side + 1))
    return left, top, left + side, top + side


def write_demo_data(root: Path) -> None:
    """Write the dataset to `root` unless it is complete.

    `demo.json` records the settings and completeness, so that an incomplete or outdated dataset is written again.

    Raises:
        UsageError: `root` has other files.
    """
    settings = {
        "made_by": "data.demo",
        "crops": CROPS,
        "size": SIZE,
        "scale": SCALE,
        "train_share": TRAIN_SHARE,
        "seed": SEED,
    }
    record_file = root / "demo.json"
    complete = json.dumps(settings | {"complete": True}) + "\n"
    if record_file.is_file() and record_file.read_text() == complete:
        return
    created_here = record_file.is_file() and '"made_by": "data.demo"' in record_file.read_text()
    if not created_here and root.is_dir() and any(root.iterdir()):
        raise UsageError(f"{root} has files that are not demo data; choose an empty or new folder")
    root.mkdir(parents=True, exist_ok=True)
    record_file.write_text(json.dumps(settings | {"complete": False}) + "\n")
    for photograph, (name, path) in enumerate(photographs().items()):
        with open_image(path) as file:
            image = file.convert("RGB")
        for part, columns in split_columns(image.width).items():
            folder = root / part / name
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob("[0-9][0-9][0-9].png"):
                old.unlink()
            rng = np.random.default_rng([SEED, photograph, list(CROPS).index(part)])
            for number in range(CROPS[part]):
                crop = image.crop(random_square(rng, columns, image.size))
                crop.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(folder / f"{number:03}.png")
    record_file.write_text(complete)


def main(args: argparse.Namespace) -> None:
    """Write the dataset."""
    write_demo_data(args.root)
    counts = {part: len(list((args.root / part).glob("*/*.png"))) for part in CROPS}
    print(f"demo data in {args.root}: {counts['train']} training and {counts['val']} validation crops", file=sys.stderr)


if __name__ == "__main__":
    run_script(partial(main, ARGS))
