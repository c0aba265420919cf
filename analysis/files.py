"""Pictures as results: nothing is overwritten, a second one gets a number. Names and JSON files are those of results.py.

Origin: this project's own.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from results import newest, numbered, read_json, save_json, unused

__all__ = ["newest", "numbered", "read_json", "save_image", "save_json", "unused"]


def save_image(image: Image.Image, path: Path) -> Path:
    """Write a PNG under an unused name, and return that."""
    path = unused(path)
    image.save(path)
    return path
