"""Integrity checks: damage that decoders ignore is detected, and intact images are accepted."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
from helpers.image_files import encoded
from PIL import Image, PngImagePlugin

from data.decode import decode_image

PHOTOGRAPHS = ("astronaut.png", "coffee.png", "page.png", "retina.jpg", "rocket.jpg")


def photograph(name: str, size: int = 300) -> Image.Image:
    image = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")
    image.thumbnail((size, size))
    return image


def pixels_of(content: bytes) -> np.ndarray:
    return np.asarray(decode_image(content, 3))


# --------------------------------------------------------------------------- JPEG, WebP

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "baseline": ("JPEG", {}),
    "best": ("JPEG", {"quality": 95, "subsampling": 0}),
    "optimized": ("JPEG", {"optimize": True}),
    "restarts": ("JPEG", {"restart_marker_rows": 1}),
    "progressive": ("JPEG", {"progressive": True}),
    "webp": ("WEBP", {}),
    "lossless": ("WEBP", {"lossless": True}),
}


def save(image: Image.Image, kind: str) -> bytes:
    file_kind, options = KINDS[kind]
    return encoded(lambda buffer: image.save(buffer, file_kind, **options))


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_truncated_files_are_detected(name: str, kind: str, reduction: int) -> None:
    """Truncated; truncated and closed; overwritten by zeros and closed; at each size at which JPEG files are decoded."""
    whole = save(photograph(name), kind)
    half, end = len(whole) // 2, b"\xff\xd9"
    zeros = whole[:half] + bytes(len(whole) - half)
    closed = [] if KINDS[kind][0] == "WEBP" else [whole[:half] + end, zeros[:-2] + end]
    for damaged in (whole[:half], zeros, *closed):
        with pytest.raises((ValueError, OSError)):
            decode_image(damaged, 3, (), reduction)


@pytest.mark.parametrize("share", [0.9, 0.97, 0.99, 0.995])
@pytest.mark.parametrize("kind", ["baseline", "best", "restarts"])
def test_reduced_images_are_checked_as_whole_ones(kind: str, share: float) -> None:
    """JPEG files that lack a little are detected at 1/2, 1/4 and 1/8 of their size where they are when decoded whole."""
    detected = 0
    for name in PHOTOGRAPHS:
        content = save(photograph(name), kind)
        damaged = content[: int(share * len(content))] + b"\xff\xd9"
        refused = []
        for reduction in (1, 2, 4, 8):
            try:
                decode_image(damaged, 3, (), reduction)
                refused.append(False)
            except ValueError:
                refused.append(True)
        assert set(refused[1:]) == {refused[0]}, name
        detected += refused[0]
    assert detected


@pytest.mark.parametrize("kind", KINDS)
def test_evenly_colored_images_are_accepted(kind: str) -> None:
    """Their data may end in zeros, and their last rows have one color."""
    for color in ((255, 255, 255), (0, 0, 0), (128, 128, 128), (200, 30, 40)):
        framed = Image.new("RGB", (330, 500), color)
        framed.paste(photograph("astronaut.png"), (15, 20))
        for image in (Image.new("RGB", (500, 500), color), Image.new("L", (1600, 30)), framed, framed.convert("L")):
            content = save(image, kind)
            assert (pixels_of(content) == np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))).all()
            for reduction in (2, 4, 8):
                decode_image(content, 3, (), reduction)


def test_data_after_the_end_of_a_jpeg_are_ignored() -> None:
    """Cameras append previews, which may end in zeros."""
    for name in PHOTOGRAPHS:
        content = save(photograph(name), "baseline")
        for more in (bytes(5000), save(Image.new("RGB", (64, 64)), "optimized") + bytes(500), b"note" + bytes(99)):
            assert (pixels_of(content + more) == pixels_of(content)).all()


# --------------------------------------------------------------------------- PNG


def chunks(*parts: tuple[bytes, bytes]) -> bytes:
    return b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    )


def with_metadata(remark: bytes) -> bytes:
    """Return the photograph as a PNG with further chunks before its pixels."""
    content = encoded(lambda buffer: photograph("astronaut.png", 60).save(buffer, "PNG"))
    return content[:33] + remark + content[33:]


REMARKS = {
    "long text": chunks((b"zTXt", b"Comment\0\0" + zlib.compress(bytes(3 * 2**20)))),
    "long international text": chunks((b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(bytes(3 * 2**20)))),
    "many texts": chunks(*[(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(2**20 - 1)))] * 70),
    "long profile": chunks((b"iCCP", b"icc\0\0" + zlib.compress(bytes(3 * 2**20)))),
    "long orientation": chunks((b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(3 * 2**20)))),
    "wrong checksum": chunks((b"tEXt", b"Comment\0x"))[:-4] + b"oops",
    "no zlib": chunks((b"zTXt", b"Raw profile type exif\0\0oops")),
}


@pytest.mark.parametrize("remark", REMARKS)
def test_png_metadata_are_ignored(remark: str) -> None:
    assert (pixels_of(with_metadata(REMARKS[remark])) == np.asarray(photograph("astronaut.png", 60))).all()


def test_png_orientation_is_applied(tmp_path: Path) -> None:
    upright = photograph("astronaut.png", 60)
    exif = Image.Exif()
    exif[274] = 6
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta><rdf:RDF tiff:Orientation="6"/></x:xmpmeta>')
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    contents = [
        encoded(lambda buffer: stored.save(buffer, "PNG", exif=exif)),
        encoded(lambda buffer: stored.save(buffer, "PNG", pnginfo=text)),
    ]
    for content in contents:
        assert (pixels_of(content) == np.asarray(upright)).all()


@pytest.mark.parametrize("place", [20, -30, -4])
def test_damaged_png_chunks_are_detected(place: int) -> None:
    content = bytearray(with_metadata(b""))
    content[place] ^= 1
    with pytest.raises(ValueError, match="does not match its checksum"):
        decode_image(bytes(content), 3)
