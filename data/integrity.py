"""What is wrong with an image file that its decoder passes over in silence, and what is right that it refuses.

A decoder fills what is missing with gray or black and says nothing. Where the file itself tells, it is an error here:

    PNG     a chunk of pixels that differs from its checksum; a file without an end
    JPEG    data that end before the last row, or go on in zeros after it; scans that are announced and never come
    WebP    data that end in zeros

The other way round, remarks in a PNG (texts, color profiles) may be large or damaged: they are no pixels and left out.
What no file tells: BMP, PPM and plain TIFF whose rows are zeros; a JPEG that lacks less than its last 16 rows or its finest scan.

Origin: this project's own, after ISO 10918-1 (JPEG), ISO 15948 (PNG) and RFC 9649 (WebP).
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

PNG = b"\x89PNG\r\n\x1a\n"
REMARK_BYTES = 2**20  # of a remark of a PNG that is read, unpacked: Pillow refuses more
TURNED_BY = (b"XML:com.adobe.xmp", b"Raw profile type exif")  # texts of a PNG that may tell its orientation
END = b"\xff\xd9"  # of a JPEG
SCAN, FINISH = 0xDA, 0xD9
SEGMENT = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # what begins one, also after the data of a scan
NOISE = np.random.default_rng(0).integers(1, 255, 256, dtype=np.uint8).tobytes()
FILLER = NOISE + b"".join(b"\xff" + bytes([restart]) + NOISE for restart in range(0xD0, 0xD8))  # data of a scan
ZEROS = 64  # bytes at the end, below which they may be anything


def strip_png(content: bytes) -> bytes:
    """A PNG of the pixels, transparency and orientation of another one; checksums of all else do not count.

    Raises:
        ValueError: it is cut, or what it is made of differs from its checksum.
    """
    kept, place, kind = [PNG], len(PNG), b""
    while kind != b"IEND":
        size, kind = int.from_bytes(content[place : place + 4], "big"), content[place + 4 : place + 8]
        end = place + 12 + size
        if len(content) < end:
            raise ValueError("the PNG is cut")
        whole = zlib.crc32(content[place + 4 : end - 4]) == int.from_bytes(content[end - 4 : end], "big")
        needed = kind[:1].isupper() or kind == b"tRNS"
        if needed and not whole:
            raise ValueError(f"the {kind.decode('ascii', 'replace')} of the PNG differs from its checksum")
        if needed or (whole and _tells_orientation(kind, content[place + 8 : end - 4])):
            kept.append(content[place:end])
        place = end
    return b"".join(kept)


def _tells_orientation(kind: bytes, remark: bytes) -> bool:
    """Whether a chunk is one of those that may, and of a size that can be read."""
    if kind == b"eXIf":
        return True
    keyword, _, rest = remark.partition(b"\0")
    if kind not in (b"tEXt", b"zTXt", b"iTXt") or keyword not in TURNED_BY:
        return False
    packed = kind == b"zTXt" or (kind == b"iTXt" and rest[:1] == b"\1")
    if not packed:
        return len(rest) < REMARK_BYTES
    text = rest[1:] if kind == b"zTXt" else rest[2:].split(b"\0", 2)[-1]
    try:
        return len(zlib.decompressobj().decompress(text, REMARK_BYTES)) < REMARK_BYTES
    except zlib.error:
        return False


def check_jpeg(content: bytes, image: Image.Image) -> None:
    """Stop on a JPEG that was decoded to `image` and lacks some of it; others cost next to nothing unless they end evenly.

    Raises:
        ValueError: it does.
    """
    if "progressive" in image.info:
        if _has_unfinished_scans(content):
            raise ValueError("the JPEG lacks its last scans; it was cut and closed")
        return
    pixels, bottom = image.load(), image.height - 1
    assert pixels is not None
    right_end = {pixels[x, bottom] for x in range(max(image.width - 8, 0), image.width)}
    last = content.rfind(END) % (len(content) + 1)  # without one, the end of the file
    if len(right_end) > 1 and content[last - ZEROS : last] != bytes(ZEROS):
        return  # what is missing would be even, and what is wrong with zeros ends in zeros
    end = next((place for kind, place in _segments(content) if kind == FINISH), len(content))
    if not _shows(content[:end] + FILLER + END, image):
        raise ValueError("the data of the JPEG end before its last row")
    _check_zeros(content[:end] + END, end, image)


def check_webp(content: bytes, image: Image.Image) -> None:
    """`check_jpeg` of a WebP, whose decoder itself sees that it was cut.

    Raises:
        ValueError: it lacks some of `image`.
    """
    place = 12
    while place + 8 <= len(content):
        kind, size = content[place : place + 4], int.from_bytes(content[place + 4 : place + 8], "little")
        if kind in (b"VP8 ", b"VP8L"):
            _check_zeros(content, place + 8 + size, image)
        place += 8 + size + size % 2


def _check_zeros(content: bytes, end: int, image: Image.Image) -> None:
    """Stop where data that end at `end` go on in zeros after the last pixel.

    An even image may end in zeros too: there all of them count, or, where nothing but zeros means anything, none.

    Raises:
        ValueError: they do.
    """
    zeros = end - len(content[:end].rstrip(b"\0"))
    if zeros < max(ZEROS, end // 16):
        return
    noise = NOISE * (zeros // len(NOISE) + 1)
    all_count, last_count = (
        not _shows(content[: end - many] + noise[:many] + content[end:], image) for many in (zeros, ZEROS // 2)
    )
    if all_count and not last_count:
        raise ValueError(f"the {image.format} ends in zeros, the last of which hold no pixels")


def _shows(content: bytes, image: Image.Image) -> bool:
    """Whether a file is decoded to the same pixels."""
    try:
        with Image.open(io.BytesIO(content), formats=["JPEG", "WEBP"]) as other:
            return np.array_equal(np.asarray(other), np.asarray(image))
    except Exception:  # of any kind: its bytes are no more those of an encoder
        return False


def _segments(content: bytes) -> Iterator[tuple[int, int]]:
    """Kind and place of each segment of a JPEG, up to its end; a second image in the file does not count."""
    place = 2
    while (found := SEGMENT.search(content, place)) is not None:
        kind, place = content[found.start() + 1], found.start()
        yield kind, place
        if kind == FINISH:
            return
        place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")


def _has_unfinished_scans(content: bytes) -> bool:
    """Whether a progressive JPEG has coefficients whose last bits never come."""
    lacking: dict[tuple[int, int], int] = {}  # bits, by component and coefficient
    for kind, place in _segments(content):
        if kind == SCAN:
            count = content[place + 4]
            components = content[place + 5 : place + 5 + 2 * count : 2]
            first, last, bits = content[place + 5 + 2 * count : place + 8 + 2 * count]
            lacking |= {(c, k): bits & 15 for c in components for k in range(first, last + 1)}
    return any(lacking.values())
