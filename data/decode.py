"""From the bytes of an image file to pixels: any mode, bit depth and number of channels.

What the values of a file stand for is declared, never guessed: black and white are the ends of its type where that says so
(`declared_range`), and INPUT.RANGE of the config for everything else. So images of one data set are on one scale, the same one
in training and in evaluation.

Origin: this project's own, on Pillow and tifffile.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import tifffile
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from data.integrity import PNG, check_jpeg, check_webp, strip_png
from data.layouts.sources import read_file
from utils import UsageError

ImageLike = Image.Image | Tensor


NPY, TIFF = (
    b"\x93NUMPY",
    (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
)  # what such files begin with, whatever their names say
# Kinds of files that Pillow may open: pixels, and nothing that is run or fetched. Some builds of it lack the last two.
RASTER = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "PPM", "GIF", "JPEG2000", "AVIF")
DEEP_MODES = {"I", "F"}  # of Pillow, beside those that begin with I;16
TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")
WHITE = (255, 255, 255, 255)
ROUNDING = 1e-3  # beyond 0..1, which floats may be
WHITE_IS_ZERO = 0  # PhotometricInterpretation of a TIFF
BITS, PHOTOMETRIC, ORIENTATION, SAMPLE_FORMAT = 258, 262, 274, 339  # tags of a TIFF


class UndeclaredRange(UsageError):
    """Nothing says which values are black and white."""


class Stored(NamedTuple):
    """Pixels as a file holds them."""

    pixels: np.ndarray  # (H, W), (H, W, C) or (C, H, W)
    bits: int = 0  # of a value, where they are fewer than its type has
    orientation: int = 1  # as EXIF counts
    inverted: bool = False  # 0 is white


def read_image(path: str, in_chans: int, value_range: Sequence[float] = ()) -> ImageLike:
    """`decode_image` of a file.

    Raises:
        UndeclaredRange: see `decode_image`; it names the file.
        Exception: of any kind, on damaged files.
    """
    try:
        return decode_image(read_file(path), in_chans, value_range)
    except UndeclaredRange as error:
        raise UndeclaredRange(f"{path} {error}") from None


def open_image(file: str | Path | BinaryIO) -> Image.Image:
    """Pillow's image of a file, of the kind that its bytes say; only of `RASTER`.

    Raises:
        PIL.UnidentifiedImageError: it is of no such kind.
    """
    Image.init()
    return Image.open(file, formats=[kind for kind in RASTER if kind in Image.OPEN])


def decode_image(content: bytes, in_chans: int, value_range: Sequence[float] = ()) -> ImageLike:
    """Decode one file, of the kind that its bytes say.

    Images are turned as their camera noted (EXIF); what is transparent is white.

    Args:
        value_range: the values of black and white in files that are not of 8 bits; empty: as their type declares.

    Returns:
        for 1 or 3 channels a PIL image of mode L or RGB; otherwise a float tensor (in_chans, H, W), with 0..1 standing for
        black and white.

    Raises:
        UndeclaredRange: values of a type that declares no range, or floats beyond 0..1, without `value_range`.
        Exception: of any other kind, on damaged bytes; and on images of more than twice Pillow's MAX_IMAGE_PIXELS.
    """
    if not content:
        raise ValueError("the file is empty")
    if content.startswith(NPY):
        found: Image.Image | Stored = Stored(np.load(io.BytesIO(content), allow_pickle=False))
    elif content.startswith(TIFF):
        found = _read_tiff(content, in_chans)
    else:
        found = _read_with_pillow(content)
    if in_chans in (1, 3):
        image = found if isinstance(found, Image.Image) else _to_pil(found, in_chans, value_range)
        return _opaque(image).convert("RGB" if in_chans == 3 else "L")
    return _to_tensor(found if isinstance(found, Stored) else Stored(np.asarray(found)), (in_chans,), value_range)


# --------------------------------------------------------------------------- reading


def _read_with_pillow(content: bytes) -> Image.Image | Stored:
    """An upright image of 8 bits, or what is stored in another."""
    try:
        opened = open_image(io.BytesIO(strip_png(content) if content.startswith(PNG) else content))
    except UnidentifiedImageError:
        raise ValueError("the bytes are no image of a known kind") from None
    with opened as image:
        image.load()
        if image.format in ("JPEG", "MPO"):
            check_jpeg(content, image)
        elif image.format == "WEBP":
            check_webp(content, image)
        upright = _upright(image)
        if not _is_deep(upright):
            return upright
        pixels = np.asarray(upright)
        return Stored(pixels if image.mode == "F" else pixels.astype(np.uint16))  # PNG, PPM: Pillow may widen them


def _is_deep(image: Image.Image) -> bool:
    return image.mode in DEEP_MODES or image.mode.startswith("I;16")


def _read_tiff(content: bytes, in_chans: int) -> Image.Image | Stored:
    """By Pillow what is of 8 bits and has colors, by tifffile everything else that it can unpack."""
    try:
        image = open_image(io.BytesIO(content))
    except (UnidentifiedImageError, OSError, SyntaxError):
        image = None
    if image is not None and in_chans in (1, 3) and _has_bytes(image):
        image.load()
        return _upright(image)
    try:
        with tifffile.TiffFile(io.BytesIO(content)) as file:
            page = file.pages.first
            _check_size(page.imagewidth * page.imagelength)
            pixels = page.asarray() if in_chans in (1, 3) else file.asarray()
            tags = {code: page.tags[code].value for code in (ORIENTATION, PHOTOMETRIC) if code in page.tags}
            bits = page.bitspersample
    except ValueError as error:
        if image is None or "imagecodecs" not in str(error):
            raise
        image.load()
        return _as_pillow_unpacks_it(image)
    return Stored(pixels, int(bits), int(tags.get(ORIENTATION, 1)), tags.get(PHOTOMETRIC) == WHITE_IS_ZERO)


def _as_pillow_unpacks_it(image: Image.Image) -> Stored:
    """What is stored in a TIFF that tifffile cannot unpack without a further package, LZW for one.

    Raises:
        ValueError: Pillow would take its values for others.
    """
    tags = image.tag_v2  # type: ignore[attr-defined]
    if not _is_deep(image) and set(tags.get(SAMPLE_FORMAT, (1,))) != {1}:
        raise ValueError("the TIFF is compressed in a way for which package imagecodecs is needed; install it")
    pixels = np.asarray(_upright(image))
    bits = tags.get(BITS, (1,))[0]
    return Stored(pixels, bits if image.mode.startswith("I;16") else 0)


def _has_bytes(image: Image.Image) -> bool:
    """Whether a TIFF holds whole numbers from 0 of at most 8 bits."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    return max(tags.get(BITS, (1,))) <= 8 and set(tags.get(SAMPLE_FORMAT, (1,))) == {1}


def _check_size(pixels: int) -> None:
    """The limit that Pillow has for all other files."""
    limit = 2 * (Image.MAX_IMAGE_PIXELS or pixels)
    if pixels > limit:
        raise ValueError(f"the image has {pixels} pixels, more than {limit}")


# --------------------------------------------------------------------------- orientation and transparency


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF data say; damaged EXIF data say nothing."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken note is no reason to lose a whole image; parsers raise whatever they stumble over
        return image


def _turned(pixels_HWC: np.ndarray, orientation: int) -> np.ndarray:
    """`_upright` of an array."""
    if orientation in (5, 6, 7, 8):
        pixels_HWC = pixels_HWC.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels_HWC = pixels_HWC[::-1]
    return pixels_HWC[:, ::-1] if orientation in (2, 3, 6, 7) else pixels_HWC


def _opaque(image: Image.Image) -> Image.Image:
    """On white where it is transparent; the color stored there is mostly black and never meant to be seen."""
    if image.mode not in TRANSPARENT and "transparency" not in image.info:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image)


# --------------------------------------------------------------------------- values


def declared_range(pixels: np.ndarray, bits: int, value_range: Sequence[float]) -> tuple[float, float]:
    """The values of black and white.

    | values | black and white |
    | --- | --- |
    | yes and no, 8 bits | the ends of the type |
    | 16 bits from 0 | `value_range`, else the ends of the type (of 12 bits in a TIFF: 0 and 4095) |
    | floats | `value_range`, else 0 and 1 if all lie there |
    | others: signed, 32 and 64 bits | `value_range` |

    Raises:
        UndeclaredRange: nothing says.
        ValueError: they are no numbers, or not finite.
    """
    kind, size = pixels.dtype.kind, pixels.dtype.itemsize
    if kind not in "buif":
        raise ValueError(f"the array holds {pixels.dtype}, no real numbers")
    if not np.isfinite(pixels).all():
        raise ValueError("the image holds values that are not finite")
    if kind in "bu" and size <= 2:
        whole = 1.0 if kind == "b" else float(2 ** (bits or 8 * size) - 1)
        return (value_range[0], value_range[1]) if value_range and size == 2 else (0.0, whole)
    if value_range:
        return value_range[0], value_range[1]
    low, high = float(pixels.min()), float(pixels.max())
    if kind == "f" and low >= -ROUNDING and high <= 1 + ROUNDING:
        return 0.0, 1.0
    raise UndeclaredRange(
        f"has {pixels.dtype} values from {low:g} to {high:g}, and nothing says which of them are black and white; "
        "set INPUT.RANGE [BLACK, WHITE] in the config, e.g. INPUT.RANGE '[0, 255]'"
    )


def _to_tensor(stored: Stored, channels: Sequence[int], value_range: Sequence[float]) -> Tensor:
    """To a float tensor (C, H, W) in 0..1, with as many channels as the first of `channels` that fits."""
    pixels: np.ndarray = stored.pixels[:, :, None] if stored.pixels.ndim == 2 else stored.pixels
    axis = next(
        (axis for count in channels for axis in (2, 0) if pixels.ndim == 3 and pixels.shape[axis] == count), None
    )
    if axis is None or pixels.size == 0:
        raise ValueError(f"the array has shape {pixels.shape}, {channels[0]} channels are wanted")
    pixels_HWC = _turned(pixels if axis == 2 else pixels.transpose(1, 2, 0), stored.orientation)
    low, high = declared_range(pixels_HWC, stored.bits, value_range)
    scaled = ((pixels_HWC.astype(np.float64) - low) / (high - low)).clip(0, 1)
    scaled = 1 - scaled if stored.inverted else scaled
    return torch.from_numpy(np.ascontiguousarray(scaled.transpose(2, 0, 1), dtype=np.float32))


def _to_pil(stored: Stored, in_chans: int, value_range: Sequence[float]) -> Image.Image:
    """To an 8-bit image, gray or of three colors as it is stored."""
    pixels_CHW = _to_tensor(stored, (in_chans, 4 - in_chans), value_range)
    pixels: np.ndarray = (pixels_CHW * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
