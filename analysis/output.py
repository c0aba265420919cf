"""Numbered output files: nothing in --output_dir is overwritten."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from checkpoints import files
from utils import logger


def write_new(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file by `write`, under the first name of `path`, `path` with _2, _3, ... that does not exist.

    Raises:
        DiskError: the file cannot be written.
    """
    with files.disk_errors(path.parent):
        written = files.write_new(files.numbered_names(path), write)
    logger.info("wrote %s", written)


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG under a new name."""
    write_new(path, lambda temporary: image.save(temporary, format="png"))


def save_json(record: Mapping[str, Any], path: Path) -> None:
    """Write JSON under a new name."""
    write_new(path, lambda temporary: temporary.write_text(json.dumps(record, indent=2) + "\n"))
