"""Images in zip files (`--zip_mode`).

    DIR/train.zip  DIR/train_map.txt  DIR/val.zip  DIR/val_map.txt

A line of a map is `NAME.zip@/path/in/zip<TAB>label`, or `path/in/zip<TAB>label` for an image in the zip file of the split. Labels
are integers; the distinct ones, in ascending order, are the classes. The directory of a zip file is read once in the main process
and becomes an array of 27 bytes an image with the offset of each member. Directories of large zip files are cached
(data/layouts/index_cache.py).

Origin: the layout of microsoft/esvit and microsoft/Swin-Transformer.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from checkpoints.files import read_text
from data.layouts.index_cache import index_arrays
from data.layouts.sources import ArchiveMembers, Listing, PackedStrings, check_inside, checked_size, parse_label
from utils import UsageError, counted

FIELDS = {"archive": "H", "method": "B", "crc": "I", "offset": "Q", "packed": "Q", "size": "I"}  # struct codes
PACKED = struct.Struct("<" + "".join(FIELDS.values()))
MEMBER = np.dtype([(name, f"<{code}") for name, code in FIELDS.items()])
SIGNATURE = b"PK\x03\x04"  # first bytes of a member
LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of the name and of the extra field that follow
MIN_CACHED_BYTES = 2**20  # size of a map from which on the index is cached
ENCRYPTED = 1  # bit of a member's flags
MAP_LINE = "NAME.zip@/path/in/zip<TAB>label"


class MapLine(NamedTuple):
    """One line of a map."""

    number: int  # from 1
    archive: str  # name of the zip file, in the folder of the map
    member: str
    label: int


class ZipMembers(ArchiveMembers):
    """Images in zip files; rows of `members` are of type `MEMBER`."""

    def read(self, index: int) -> bytes:
        member = self.members[index]
        archive, offset, size = self.archives[member["archive"]], int(member["offset"]), int(member["size"])
        signature, name_length, extra_length = LOCAL_HEADER.unpack(archive.read(offset, LOCAL_HEADER.size))
        if signature != SIGNATURE:
            raise ValueError(f"{archive.path.name} has no member at byte {offset}; it was changed or is damaged")
        content = archive.read(offset + LOCAL_HEADER.size + name_length + extra_length, int(member["packed"]))
        if member["method"] == zipfile.ZIP_DEFLATED:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size)
        if len(content) != size or zlib.crc32(content) != member["crc"]:
            raise ValueError("the member does not match its checksum")
        return content


def list_zip(root: Path, split: str, need_labels: bool) -> Listing:
    """List the images in `split`_map.txt of the folder `root`, which always have labels.

    Raises:
        UsageError: a file is missing or damaged, or a line of the map is invalid.
    """
    map_file = root / f"{split}_map.txt"
    for path in (root / f"{split}.zip", map_file):
        if not path.is_file():
            raise UsageError(f"--zip_mode needs {split}.zip and {map_file.name} in --data_path; {path} is missing")
    arrays = index_arrays(
        [map_file, *sorted(root.glob("*.zip"))],
        ".zip-members.npz",
        partial(_read_directories, root, map_file, f"{split}.zip"),
        large=map_file.stat().st_size >= MIN_CACHED_BYTES,
    )
    archives = [root / name for name in arrays["archives"].tolist()]
    names = PackedStrings.from_arrays(arrays["text"], arrays["ends"])
    return Listing.from_numbers(ZipMembers(archives, arrays["members"], names), arrays["labels"])


def _read_directories(root: Path, map_file: Path, default_archive: str) -> dict[str, np.ndarray]:
    """Return the names of the archives, and for each image its `MEMBER`, label and packed name."""
    archives: dict[str, zipfile.ZipFile] = {}
    rows, names, labels, missing = bytearray(), [], [], []
    try:
        for line in read_map(map_file, default_archive):
            where = f"{map_file} line {line.number}"
            if line.archive not in archives:
                archives[line.archive] = open_zip(root / line.archive, where)
            try:
                info = archives[line.archive].getinfo(line.member)
            except KeyError:
                missing.append(f"{line.archive}@/{line.member} in line {line.number}")
                continue
            check_readable(info, where)
            number = list(archives).index(line.archive)
            rows += PACKED.pack(
                number, info.compress_type, info.CRC, info.header_offset, info.compress_size, info.file_size
            )
            names.append(line.member)
            labels.append(line.label)
    finally:
        for archive in archives.values():
            archive.close()
    if missing:
        raise UsageError(
            f"{map_file} lists {counted(len(missing), 'image')} missing from the zip file, first {missing[0]}; "
            "correct the map or the zip file"
        )
    if not rows:
        raise UsageError(f"{map_file} lists no image; a line is {MAP_LINE}")
    packed = PackedStrings(names)
    return {
        "archives": np.array(list(archives)),
        "members": np.frombuffer(rows, dtype=MEMBER),
        "labels": np.array(labels, dtype=np.int64),
        "text": packed.text,
        "ends": packed.ends,
    }


def read_map(map_file: Path, default_archive: str) -> Iterator[MapLine]:
    """Yield the lines of a map, except empty ones.

    Raises:
        UsageError: a line has no label, or no image in a zip file of the same folder.
    """
    text = read_text(map_file, f"a line is {MAP_LINE}")
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{map_file} line {number}"
        path, tab, label_text = line.rpartition("\t")
        if not tab:
            raise UsageError(f"{where} has no label: '{line.strip()}'; write {MAP_LINE}")
        label = parse_label(label_text, where)
        archive, at, member = path.partition("@/")
        archive, member = (archive, member) if at else (default_archive, path)
        if "/" in archive or "\\" in archive or not archive.lower().endswith(".zip"):
            raise UsageError(f"{where}: '{archive}' is not a zip file in the folder of the map; write {MAP_LINE}")
        check_inside(member, where, archive)
        yield MapLine(number, archive, member, label)


def open_zip(path: Path, where: str) -> zipfile.ZipFile:
    """Open a zip file and read its directory.

    Raises:
        UsageError: it is missing or not a complete zip file; `where` is the line that names it.
    """
    try:
        return zipfile.ZipFile(path)
    except FileNotFoundError:
        raise UsageError(f"{where} names {path.name}, which is missing from {path.parent}") from None
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise UsageError(f"{path} is not a complete zip file ({error}); copy or create it again") from None


def check_readable(info: zipfile.ZipInfo, where: str) -> None:
    """Raise UsageError if a member is encrypted, not stored or deflated, or too large for an image."""
    if info.flag_bits & ENCRYPTED or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        how = "encrypted" if info.flag_bits & ENCRYPTED else f"compressed by method {info.compress_type}"
        raise UsageError(f"{where}: {info.filename} is {how}; create the zip file again, stored (zip -0) or deflated")
    try:
        checked_size(info.file_size)
    except ValueError as error:
        raise UsageError(f"{where}: {info.filename} cannot be read ({error}); remove it from the map") from None
