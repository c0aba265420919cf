"""Small images with segmentation masks for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

VOID = 255
COLORS = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200]])


def write_pair(folder: Path, name: str, size: tuple[int, int], seed: int, void: int = VOID) -> None:
    """Write `images/NAME.png` and `masks/NAME.png`: rectangles of three classes, each of a color, and a void border."""
    rng = np.random.default_rng(seed)
    height, width = size
    mask = np.zeros(size, dtype=np.uint8)
    for label in (1, 2):
        top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
        mask[top : top + height // 2, left : left + width // 2] = label
    pixels = COLORS[mask] + rng.normal(0, 20, (*size, 3))
    mask[:1] = void
    for kind, content in (("images", pixels.clip(0, 255).astype(np.uint8)), ("masks", mask)):
        path = folder / kind / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(content).save(path)


def write_masks(root: Path, train: int = 5, val: int = 3, void: int = VOID) -> Path:
    """Write `train` and `val` with images of different sizes, some larger than 32 pixels."""
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            size = (30 + 4 * number, 44 - 3 * number)
            write_pair(root / split, f"{number:03}", size, seed=number + 100 * (split == "val"), void=void)
    return root
