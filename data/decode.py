"""Decode image files of any mode, bit depth and number of channels.

The values of black and white are declared, never estimated from an image, so that all images of a dataset have the same scale in
training and evaluation: they are the limits of the file's value type where it implies them (`declared_range`), and INPUT.RANGE of
the config otherwise.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import tifffile
import torch
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from data.integrity import PNG, check_jpeg, check_webp, strip_png
from data.layouts.sources import read_file
from utils import UsageError

ImageLike = Image.Image | Tensor


# First bytes of files: those that Pillow does not read, or not all of, and those that it reads at a fraction of their size.
NPY = b"\x93NUMPY"
JPEG = b"\xff\xd8\xff"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Formats that Pillow may open: none of them runs or fetches anything. Some builds of Pillow lack the last two.
RASTER = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "PPM", "GIF", "JPEG2000", "AVIF")
DEEP_MODES = {"I", "F"}  # Pillow modes of more than 8 bits, in addition to those that start with I;16
TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")
WHITE = (255, 255, 255, 255)
REDUCTIONS = (8, 4, 2)  # of JPEG files, in the decoder: less to transform and to write
TOLERANCE = 1e-3  # of floats beyond 0..1
WHITE_IS_ZERO = 0  # value of the TIFF tag PhotometricInterpretation
QUARTER_TURNS = (5, 6, 7, 8)  # EXIF orientations that swap height and width
TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BITS, PHOTOMETRIC, ORIENTATION, SAMPLE_FORMAT = 258, 262, 274, 339  # TIFF tags


class UndeclaredRange(UsageError):
    """The values of black and white are not declared."""


class RawImage(NamedTuple):
    """Pixels as stored in a file."""

    pixels: np.ndarray  # (H, W), (H, W, C) or (C, H, W)
    bits: int = 0  # used bits of a value; 0: all bits of its type
    orientation: int = 1  # EXIF orientation
    inverted: bool = False  # whether 0 is white


def read_image(path: str, in_chans: int, value_range: Sequence[float] = ()) -> ImageLike:
    """Read and decode a file, see `decode_image`.

    Raises:
        UndeclaredRange: see `decode_image`; the message starts with the path.
        Exception: of any kind, on damaged files.
    """
    try:
        return decode_image(read_file(path), in_chans, value_range)
    except UndeclaredRange as error:
        raise UndeclaredRange(f"{path} {error}") from None


def open_image(file: str | Path | BinaryIO) -> Image.Image:
    """Open a file with Pillow, by its content and only in the formats `RASTER`.

    Raises:
        PIL.UnidentifiedImageError: it is in no such format.
    """
    Image.init()
    return Image.open(file, formats=[kind for kind in RASTER if kind in Image.OPEN])


def open_content(content: bytes) -> Image.Image:
    """Open the content of a file with Pillow, as `open_image` and without the metadata of a PNG.

    Raises:
        ValueError: it is in no such format, or a damaged PNG.
    """
    try:
        return open_image(io.BytesIO(strip_png(content) if content.startswith(PNG) else content))
    except UnidentifiedImageError:
        raise ValueError("the file is not in a known image format") from None


def jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Return height and width of a JPEG after its EXIF orientation is applied; None for other and for unreadable files."""
    if not content.startswith(JPEG):
        return None
    try:
        with open_image(io.BytesIO(content)) as image:
            return image.size if _orientation(image) in QUARTER_TURNS else image.size[::-1]
    except Exception:  # decoders raise anything on damaged bytes, which `decode_image` reports
        return None


def decode_image(content: bytes, in_chans: int, value_range: Sequence[float] = (), reduction: int = 1) -> ImageLike:
    """Decode the content of an image file; its format is recognized by the first bytes.

    The EXIF orientation is applied, and transparency is replaced by white.

    Args:
        value_range: values of black and white in files of more than 8 bits; empty: those that the type implies.
        reduction: one of `REDUCTIONS`, for JPEG files only: decode at a fraction of the size, rounded up.

    Returns:
        for 1 or 3 channels a PIL image of mode L or RGB, otherwise a float tensor (in_chans, H, W) from 0 (black) to 1 (white).

    Raises:
        UndeclaredRange: without `value_range`, values of a type that implies no range, or floats beyond 0..1.
        Exception: of any other kind, on damaged bytes, or more than twice Pillow's MAX_IMAGE_PIXELS.
    """
    if not content:
        raise ValueError("the file is empty")
    if content.startswith(NPY):
        decoded: Image.Image | RawImage = RawImage(np.load(io.BytesIO(content), allow_pickle=False))
    elif content.startswith(TIFF):
        decoded = _read_tiff(content, in_chans)
    else:
        decoded = read_upright(content, reduction)
    if in_chans in (1, 3):
        image = decoded if isinstance(decoded, Image.Image) else _to_pil(decoded, in_chans, value_range)
        opaque, mode = _on_white(image), "RGB" if in_chans == 3 else "L"
        return opaque if opaque.mode == mode else opaque.convert(mode)  # which would copy
    raw = decoded if isinstance(decoded, RawImage) else RawImage(np.asarray(decoded))
    return _to_tensor(raw, (in_chans,), value_range)


# --------------------------------------------------------------------------- reading


def read_upright(content: bytes, reduction: int = 1) -> Image.Image | RawImage:
    """Return an upright 8-bit image in its own mode, or the raw pixels of a deeper one.

    Args:
        reduction: see `decode_image`.

    Raises:
        Exception: of any kind, on damaged bytes.
    """
    with open_content(content) as image:
        if isinstance(image, JpegImageFile) and reduction > 1:
            image.draft(None, (image.width // reduction, image.height // reduction))
        image.load()
        if isinstance(image, JpegImageFile):
            check_jpeg(content, image, reduction)
        elif image.format == "WEBP":
            check_webp(content, image)
        upright = _apply_orientation(image)
        if not _is_deep(upright):
            return upright
        pixels = np.asarray(upright)
        return RawImage(pixels if image.mode == "F" else pixels.astype(np.uint16))  # Pillow may widen PNG and PPM


def _is_deep(image: Image.Image) -> bool:
    return image.mode in DEEP_MODES or image.mode.startswith("I;16")


def _read_tiff(content: bytes, in_chans: int) -> Image.Image | RawImage:
    """Read 8-bit TIFF files with Pillow, and all others that tifffile can decompress with tifffile."""
    try:
        image = open_image(io.BytesIO(content))
    except (UnidentifiedImageError, OSError, SyntaxError):
        image = None
    if image is not None and in_chans in (1, 3) and _is_8_bit(image):
        image.load()
        return _apply_orientation(image)
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
        return _raw_from_pillow(image)
    return RawImage(pixels, int(bits), int(tags.get(ORIENTATION, 1)), tags.get(PHOTOMETRIC) == WHITE_IS_ZERO)


def _raw_from_pillow(image: Image.Image) -> RawImage:
    """Return the raw pixels of a TIFF that tifffile cannot decompress without package imagecodecs, such as LZW.

    Raises:
        ValueError: Pillow would misread its values.
    """
    tags = image.tag_v2  # type: ignore[attr-defined]
    if not _is_deep(image) and set(tags.get(SAMPLE_FORMAT, (1,))) != {1}:
        raise ValueError("the compression of the TIFF needs package imagecodecs; install it")
    pixels = np.asarray(_apply_orientation(image))
    bits = tags.get(BITS, (1,))[0]
    return RawImage(pixels, bits if image.mode.startswith("I;16") else 0)


def _is_8_bit(image: Image.Image) -> bool:
    """Return whether a TIFF has unsigned integers of at most 8 bits."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    return max(tags.get(BITS, (1,))) <= 8 and set(tags.get(SAMPLE_FORMAT, (1,))) == {1}


def _check_size(pixels: int) -> None:
    """Raise ValueError above the limit that Pillow applies to all other formats."""
    limit = 2 * (Image.MAX_IMAGE_PIXELS or pixels)
    if pixels > limit:
        raise ValueError(f"the image has {pixels} pixels, at most {limit} are allowed")


# --------------------------------------------------------------------------- orientation and transparency


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image; 1, upright, if its EXIF data are damaged."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # EXIF parsers raise anything on damaged data
        return 1


def _apply_orientation(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation of an image.

    `ImageOps.exif_transpose` would also write the EXIF data anew, and fail where they are damaged.
    """
    turn = TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orient(pixels_HWC: np.ndarray, orientation: int) -> np.ndarray:
    """Apply an EXIF orientation to an array."""
    if orientation in QUARTER_TURNS:
        pixels_HWC = pixels_HWC.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels_HWC = pixels_HWC[::-1]
    return pixels_HWC[:, ::-1] if orientation in (2, 3, 6, 7) else pixels_HWC


def _on_white(image: Image.Image) -> Image.Image:
    """Replace transparency by white; the colors stored there are mostly black and not meant to be seen."""
    if image.mode not in TRANSPARENT and "transparency" not in image.info:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image)


# --------------------------------------------------------------------------- values


def declared_range(pixels: np.ndarray, bits: int, value_range: Sequence[float]) -> tuple[float, float]:
    """Return the values of black and white.

    | values | black and white |
    | --- | --- |
    | bool, unsigned 8 bits | the limits of the type |
    | unsigned 16 bits | `value_range`, else the limits of the type (0 and 4095 for a 12-bit TIFF) |
    | floats | `value_range`, else 0 and 1 if all values lie there |
    | others: signed, 32 and 64 bits | `value_range` |

    Raises:
        UndeclaredRange: neither the type nor `value_range` declares them.
        ValueError: the values are not real numbers, or not finite.
    """
    kind, size = pixels.dtype.kind, pixels.dtype.itemsize
    if kind not in "buif":
        raise ValueError(f"the array has type {pixels.dtype}, not real numbers")
    if not np.isfinite(pixels).all():
        raise ValueError("the image has values that are not finite")
    if kind in "bu" and size <= 2:
        white = 1.0 if kind == "b" else float(2 ** (bits or 8 * size) - 1)
        return (value_range[0], value_range[1]) if value_range and size == 2 else (0.0, white)
    if value_range:
        return value_range[0], value_range[1]
    low, high = float(pixels.min()), float(pixels.max())
    if kind == "f" and low >= -TOLERANCE and high <= 1 + TOLERANCE:
        return 0.0, 1.0
    raise UndeclaredRange(
        f"has {pixels.dtype} values from {low:g} to {high:g}, which do not imply the values of black and white; "
        "set INPUT.RANGE [BLACK, WHITE] in the config, e.g. INPUT.RANGE '[0, 255]'"
    )


def _to_tensor(raw: RawImage, channels: Sequence[int], value_range: Sequence[float]) -> Tensor:
    """Return a float tensor (C, H, W) in 0..1, where C is the first of `channels` that matches the array."""
    pixels: np.ndarray = raw.pixels[:, :, None] if raw.pixels.ndim == 2 else raw.pixels
    axis = next(
        (axis for count in channels for axis in (2, 0) if pixels.ndim == 3 and pixels.shape[axis] == count), None
    )
    if axis is None or pixels.size == 0:
        raise ValueError(f"the array has shape {pixels.shape}, {channels[0]} channels are needed")
    pixels_HWC = _orient(pixels if axis == 2 else pixels.transpose(1, 2, 0), raw.orientation)
    low, high = declared_range(pixels_HWC, raw.bits, value_range)
    scaled = ((pixels_HWC.astype(np.float64) - low) / (high - low)).clip(0, 1)
    scaled = 1 - scaled if raw.inverted else scaled
    return torch.from_numpy(np.ascontiguousarray(scaled.transpose(2, 0, 1), dtype=np.float32))


def _to_pil(raw: RawImage, in_chans: int, value_range: Sequence[float]) -> Image.Image:
    """Return an 8-bit image, gray or RGB as it is raw."""
    pixels_CHW = _to_tensor(raw, (in_chans, 4 - in_chans), value_range)
    pixels: np.ndarray = (pixels_CHW * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
