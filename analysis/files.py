"""Names of results: nothing is overwritten, a second result gets a number.

Origin: this project's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image


def unused(path: Path) -> Path:
    """The path itself, or with _2, _3, ... before its ending: the first that does not exist."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.stem}_{number}{path.suffix}")
    return candidate


def newest(path: Path) -> Path | None:
    """Of the names that `unused` gave out for a path the last one that exists."""
    found, number = None, 1
    candidate = path
    while candidate.exists():
        found, number = candidate, number + 1
        candidate = path.with_name(f"{path.stem}_{number}{path.suffix}")
    return found


def save_image(image: Image.Image, path: Path) -> Path:
    """Write a PNG under an unused name, and return that."""
    path = unused(path)
    image.save(path)
    return path


def save_json(record: Mapping[str, Any], path: Path) -> Path:
    """Write JSON under an unused name, and return that."""
    path = unused(path)
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def read_json(path: Path | None) -> Any:
    """The content of a JSON file; None without a file or where it is damaged."""
    try:
        return None if path is None else json.loads(path.read_text())
    except (OSError, ValueError):
        return None
