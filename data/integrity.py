"""Integrity checks of PNG, JPEG and WebP files beyond those of their decoders.

Decoders fill missing data with gray or black and report nothing. These checks raise an error where the file shows the damage:

    PNG     a chunk that does not match its checksum; a missing end
    JPEG    data that end before the last row, or continue with zeros after it; announced scans that are missing
    WebP    data that end in zeros

Conversely, metadata of a PNG (texts, color profiles) may be large or damaged; they are removed before decoding. Not detectable are
BMP, PPM and uncompressed TIFF files with rows of zeros, and JPEG files that lack less than their last 16 rows or their finest scan.

Origin: ISO 10918-1 (JPEG), ISO 15948 (PNG) and RFC 9649 (WebP).
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

PNG = b"\x89PNG\r\n\x1a\n"
MAX_METADATA_BYTES = 2**20  # of a PNG metadata chunk after decompression; Pillow rejects larger ones
ORIENTATION_KEYWORDS = (b"XML:com.adobe.xmp", b"Raw profile type exif")  # PNG texts that may contain the orientation
END = b"\xff\xd9"  # last bytes of a JPEG
START_OF_SCAN, END_OF_IMAGE = 0xDA, 0xD9  # JPEG markers
MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # start of a JPEG segment, also after the data of a scan
NOISE = np.random.default_rng(0).integers(1, 255, 256, dtype=np.uint8).tobytes()
FILLER = NOISE + b"".join(b"\xff" + bytes([restart]) + NOISE for restart in range(0xD0, 0xD8))  # valid scan data
BLOCK = 8  # pixels on a side of a block of a JPEG
MIN_ZEROS = 64  # fewer zero bytes at the end of the data are not suspicious


def strip_png(content: bytes) -> bytes:
    """Return a PNG without metadata chunks except those with the orientation.

    Raises:
        ValueError: it is truncated, or a chunk of pixels or transparency does not match its checksum.
    """
    kept, position, kind = [PNG], len(PNG), b""
    while kind != b"IEND":
        size, kind = int.from_bytes(content[position : position + 4], "big"), content[position + 4 : position + 8]
        end = position + 12 + size
        if len(content) < end:
            raise ValueError("the PNG is truncated")
        whole = zlib.crc32(content[position + 4 : end - 4]) == int.from_bytes(content[end - 4 : end], "big")
        needed = kind[:1].isupper() or kind == b"tRNS"
        if needed and not whole:
            raise ValueError(f"the {kind.decode('ascii', 'replace')} chunk of the PNG does not match its checksum")
        if needed or (whole and _has_orientation(kind, content[position + 8 : end - 4])):
            kept.append(content[position:end])
        position = end
    return b"".join(kept)


def _has_orientation(kind: bytes, content: bytes) -> bool:
    """Return whether a metadata chunk may contain the orientation and is small enough to be read."""
    if kind == b"eXIf":
        return True
    keyword, _, rest = content.partition(b"\0")
    if kind not in (b"tEXt", b"zTXt", b"iTXt") or keyword not in ORIENTATION_KEYWORDS:
        return False
    compressed = kind == b"zTXt" or (kind == b"iTXt" and rest[:1] == b"\1")
    if not compressed:
        return len(rest) < MAX_METADATA_BYTES
    text = rest[1:] if kind == b"zTXt" else rest[2:].split(b"\0", 2)[-1]
    try:
        return len(zlib.decompressobj().decompress(text, MAX_METADATA_BYTES)) < MAX_METADATA_BYTES
    except zlib.error:
        return False


def check_jpeg(content: bytes, image: Image.Image, reduction: int = 1) -> None:
    """Check a JPEG that was decoded to `image`; it is decoded again only if its last row or its data end evenly.

    Args:
        reduction: the image is decoded at 1 / `reduction` of its size.

    Raises:
        ValueError: some of its data are missing.
    """
    if "progressive" in image.info:
        if _has_unfinished_scans(content):
            raise ValueError("the JPEG lacks its last scans")
        return
    pixels, bottom = image.load(), image.height - 1
    assert pixels is not None
    evenly = max(BLOCK // reduction, 2)  # pixels; at 1 / 8 a missing block has the color of the one before
    right_end = {pixels[x, bottom] for x in range(max(image.width - evenly, 0), image.width)}
    last = content.rfind(END) % (len(content) + 1)  # END, or the end of the file without it
    if len(right_end) > 1 and content[last - MIN_ZEROS : last] != bytes(MIN_ZEROS):
        return  # missing data decode to an even color, and overwritten data end in zeros
    end = next((position for kind, position in _segments(content) if kind == END_OF_IMAGE), len(content))
    if not _decodes_to(content[:end] + FILLER + END, image, reduction):
        if reduction == 1:
            raise ValueError("the data of the JPEG end before its last row")
        with Image.open(io.BytesIO(content), formats=["JPEG"]) as whole:  # the same files are refused at all sizes
            check_jpeg(content, whole)
    _check_zeros(content[:end] + END, end, image, reduction)


def check_webp(content: bytes, image: Image.Image) -> None:
    """Check a WebP that was decoded to `image`; its decoder itself detects truncation.

    Raises:
        ValueError: its data end in zeros.
    """
    position = 12
    while position + 8 <= len(content):
        kind, size = content[position : position + 4], int.from_bytes(content[position + 4 : position + 8], "little")
        if kind in (b"VP8 ", b"VP8L"):
            _check_zeros(content, position + 8 + size, image)
        position += 8 + size + size % 2


def _check_zeros(content: bytes, end: int, image: Image.Image, reduction: int = 1) -> None:
    """Check that the data before `end` do not continue with zeros after the last pixel.

    An even image may end in zeros too: then replacing the last few changes the pixels, or replacing all does not.

    Raises:
        ValueError: they do.
    """
    zeros = end - len(content[:end].rstrip(b"\0"))
    if zeros < max(MIN_ZEROS, end // 16):
        return
    noise = NOISE * (zeros // len(NOISE) + 1)
    all_used, last_used = (
        not _decodes_to(content[: end - count] + noise[:count] + content[end:], image, reduction)
        for count in (zeros, MIN_ZEROS // 2)
    )
    if all_used and not last_used:
        raise ValueError(f"the data of the {image.format} end in zeros that belong to no pixel")


def _decodes_to(content: bytes, image: Image.Image, reduction: int) -> bool:
    """Return whether the bytes decode to the same pixels, at 1 / `reduction` of their size."""
    try:
        with Image.open(io.BytesIO(content), formats=["JPEG", "WEBP"]) as other:
            other.draft(None, (other.width // reduction, other.height // reduction))
            return np.array_equal(np.asarray(other), np.asarray(image))
    except Exception:  # decoders raise anything on invalid bytes
        return False


def _segments(content: bytes) -> Iterator[tuple[int, int]]:
    """Yield marker and position of each segment of the first image in a JPEG file."""
    position = 2
    while (found := MARKER.search(content, position)) is not None:
        kind, position = content[found.start() + 1], found.start()
        yield kind, position
        if kind == END_OF_IMAGE:
            return
        position += 2 + int.from_bytes(content[position + 2 : position + 4], "big")


def _has_unfinished_scans(content: bytes) -> bool:
    """Return whether a progressive JPEG lacks the last bits of any coefficient."""
    missing_bits: dict[tuple[int, int], int] = {}  # by component and coefficient
    for kind, position in _segments(content):
        if kind == START_OF_SCAN:
            count = content[position + 4]
            components = content[position + 5 : position + 5 + 2 * count : 2]
            first, last, bits = content[position + 5 + 2 * count : position + 8 + 2 * count]
            missing_bits |= {(c, k): bits & 15 for c in components for k in range(first, last + 1)}
    return any(missing_bits.values())
