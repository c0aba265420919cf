"""From the bytes of an image file to pixels: any mode, bit depth and number of channels.

Origin: this project's own, on Pillow and tifffile.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import tifffile
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

ImageLike = Image.Image | Tensor


NPY, TIFF = (
    b"\x93NUMPY",
    (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
)  # what such files begin with, whatever their names say
PNG = b"\x89PNG\r\n\x1a\n"
TRANSPARENT = ("RGBA", "LA", "PA", "RGBa", "La")
WHITE = (255, 255, 255, 255)


def read_image(path: str, in_chans: int) -> ImageLike:
    """`decode_image` of a file.

    Raises:
        Exception: of any kind, on damaged files.
    """
    return decode_image(Path(path).read_bytes(), in_chans)


def decode_image(content: bytes, in_chans: int) -> ImageLike:
    """Decode one file, of the kind that its bytes say.

    Images are turned as their camera noted (EXIF); what is transparent is white.

    Returns:
        for 1 or 3 channels a PIL image of mode L or RGB; otherwise a float tensor (in_chans, H, W), with 0..1 standing for
        the full range of integer files.

    Raises:
        Exception: of any kind, on damaged bytes; and on images of more than twice Pillow's MAX_IMAGE_PIXELS.
    """
    if not content:
        raise ValueError("the file is empty")
    file = io.BytesIO(content)
    if content.startswith(NPY):
        pixels_CHW = _to_tensor(np.load(file, allow_pickle=False), in_chans)
        return _to_pil(pixels_CHW) if in_chans in (1, 3) else pixels_CHW
    if in_chans not in (1, 3) and content.startswith(TIFF):
        return _to_tensor(tifffile.imread(file), in_chans)
    try:
        if content.startswith(PNG):
            Image.open(io.BytesIO(content)).verify()  # checksums; else some damage would decode to black rows
        opened = Image.open(file)
    except UnidentifiedImageError:
        raise ValueError("the bytes are no image of a known kind") from None
    with opened as image:
        if in_chans not in (1, 3):
            return _to_tensor(np.asarray(image), in_chans)
        upright = _upright(image)
        return _opaque(_eight_bit(upright)).convert("RGB" if in_chans == 3 else "L")


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF data say; damaged EXIF data say nothing."""
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken note is no reason to lose a whole image; parsers raise whatever they stumble over
        return image


def _opaque(image: Image.Image) -> Image.Image:
    """On white where it is transparent; the colour stored there is mostly black and never meant to be seen."""
    if image.mode not in TRANSPARENT and "transparency" not in image.info:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image)


def _to_pil(pixels_CHW: Tensor) -> Image.Image:
    """One or three channels in 0..1 as an 8-bit image."""
    pixels = (pixels_CHW.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey images, and floats in 0..1, scaled to 8 bits; Pillow's own conversion would clip them."""
    if image.mode == "F":
        if not np.isfinite(np.asarray(image)).all():
            raise ValueError("the image holds values that are not finite")
        return Image.fromarray((np.asarray(image).clip(0, 1) * 255).round().astype(np.uint8))
    if image.mode.startswith("I;16") or image.mode == "I":
        pixels = np.asarray(image).astype(np.float64) / 65535 * 255
        return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    return image


def _to_tensor(pixels: np.ndarray, in_chans: int) -> Tensor:
    """(H, W), (H, W, C) or (C, H, W) pixels to a float tensor (C, H, W)."""
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim == 3 and pixels.shape[2] != in_chans and pixels.shape[0] == in_chans:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim != 3 or pixels.shape[2] != in_chans or pixels.size == 0:
        raise ValueError(f"the array has shape {pixels.shape}, {in_chans} channels are wanted")
    if np.issubdtype(pixels.dtype, np.floating) and not np.isfinite(pixels).all():
        raise ValueError("the array holds values that are not finite")
    scale = float(np.iinfo(pixels.dtype).max) if np.issubdtype(pixels.dtype, np.integer) else 1.0
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32) / np.float32(scale))
