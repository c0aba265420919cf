"""Shrink images once, for `python -m data.convert --max_side N`.

The format stays the same: JPEG files are written with quality 95 and colors at half the size (4:2:0), WebP files with quality 95,
even lossless ones, all others without loss. The filter is Pillow's antialiased bicubic, as for the crops. Images become upright,
and keep their color profile but no other metadata.
"""

from __future__ import annotations

import io
from collections import Counter
from typing import Any

from PIL import Image

from data.decode import NPY, REDUCTIONS, TIFF, RawImage, open_content, read_upright
from utils import counted, logger

QUALITY = {"quality": 95}
FORMATS: dict[str, dict[str, Any]] = {
    "JPEG": QUALITY,
    "WEBP": QUALITY,
    "PNG": {},
    "BMP": {},
    "PPM": {},
}  # options of `save`
# Modes that cannot be interpolated: palettes, and black and white.
INTERPOLATED = {"P": "RGB", "PA": "RGBA", "1": "L"}


class Unsupported(ValueError):
    """An intact image that cannot be shrunk."""


class Shrinker:
    """Shrinks images to a side, and counts those that it leaves as they are although they are larger.

    Args:
        max_side: pixels of the longer side of an image.
    """

    def __init__(self, max_side: int) -> None:
        self.max_side = max_side
        self.shrunk = 0
        self.kept = Counter[str]()  # by reason

    def __call__(self, content: bytes) -> bytes:
        """Return a shrunk image; the same bytes if it is small enough, or cannot be shrunk."""
        try:
            small = shrink(content, self.max_side)
        except Unsupported as error:
            self.kept[str(error)] += 1
        except Exception:  # decoders raise anything on damaged bytes
            self.kept["damaged"] += 1
        else:
            self.shrunk += small is not content
            return small
        return content

    def report(self) -> None:
        """Log how many images were shrunk, and why others were not."""
        logger.info("%s shrunk to %d pixels on the longer side", counted(self.shrunk, "image"), self.max_side)
        for reason, number in self.kept.items():
            logger.warning("%s copied unchanged: %s", counted(number, "image"), reason)


def shrink(content: bytes, max_side: int) -> bytes:
    """Return an image with at most `max_side` pixels on its longer side; the same bytes if it is small enough.

    Raises:
        Unsupported: its format or depth would lose more than pixels.
        Exception: of any other kind, on damaged bytes.
    """
    if content.startswith(NPY):
        raise Unsupported("arrays are not shrunk")
    with open_content(content) as file:
        longer, kind = max(file.size), str(file.format).replace("MPO", "JPEG")
    if longer <= max_side:
        return content
    if content.startswith(TIFF) or kind not in FORMATS:
        raise Unsupported(f"{kind} files are not shrunk")
    # A JPEG is decoded at a fraction of its size that leaves at least twice the pixels, which the filter then averages.
    fits = [reduction for reduction in REDUCTIONS if kind == "JPEG" and longer >= 2 * reduction * max_side]
    image = read_upright(content, max(fits, default=1))
    if isinstance(image, RawImage):
        raise Unsupported("images of more than 8 bits are not shrunk")
    if "transparency" in image.info:
        image = image.convert("RGBA")
    elif image.mode in INTERPOLATED:
        image = image.convert(INTERPOLATED[image.mode])
    scale = max_side / max(image.size)
    width, height = (max(round(side * scale), 1) for side in image.size)
    small = image.resize((width, height), Image.Resampling.BICUBIC)
    with io.BytesIO() as buffer:
        small.save(buffer, kind, icc_profile=image.info.get("icc_profile"), **FORMATS[kind])
        return buffer.getvalue()
