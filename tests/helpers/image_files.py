"""Image files for tests, and transforms that show what was read."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as TF

from data.decode import ImageLike

NOISE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)


def whole(image: ImageLike) -> list[Tensor]:
    """One view: the image itself."""
    return [image if isinstance(image, Tensor) else TF.to_tensor(image)]


def write_gray(path: Path, value: int, size: tuple[int, int] = (4, 6)) -> Path:
    """An image filled with one value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(size, value, dtype=np.uint8)).save(path)
    return path


def encoded(save: Callable[[io.BytesIO], Any]) -> bytes:
    """What `save` writes."""
    buffer = io.BytesIO()
    save(buffer)
    return buffer.getvalue()


def write_tsv(path: Path, rows: Iterable[tuple[str, str, bytes]]) -> Path:
    """A tsv file of rows (key, label, encoded image)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{key}\t{label}\t{base64.b64encode(image).decode()}\n" for key, label, image in rows))
    return path
