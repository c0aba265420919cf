"""Images in zip files, as `--zip_mode` takes them: millions of images in one file, which shared disks serve better.

    DIR/train.zip  DIR/train_map.txt  DIR/val.zip  DIR/val_map.txt

A line of a map is `NAME.zip@/path/in/zip<TAB>label`, or `path/in/zip<TAB>label` for an image in the zip of the split. Labels are
numbers; those that occur are the classes, in their order. The directory of a zip is read by the process that starts the loader
workers and becomes an array of 27 bytes an image; workers read the members at the offsets it says. What was read of large zips is
kept in the cache folder (data/layouts/index_cache.py) until a file changes.

Origin: the layout of microsoft/esvit and microsoft/Swin-Transformer; reading is this project's own, on Python's zipfile.
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
from data.layouts.index_cache import arrays_once, cache_file, state_of
from data.layouts.sources import Listing, Names, OwnFile, Source, check_inside, checked_size, parse_label
from utils import UsageError, counted

FIELDS = {
    "archive": "H",
    "method": "B",
    "crc": "I",
    "offset": "Q",
    "packed": "Q",
    "size": "I",
}  # of a member, as in `struct`
PACKED = struct.Struct("<" + "".join(FIELDS.values()))
MEMBER = np.dtype([(name, f"<{kind}") for name, kind in FIELDS.items()])
SIGNATURE = b"PK\x03\x04"  # what a member begins with
LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of the name and of the extra field that follow
KEPT_FROM = 2**20  # bytes of a map; the directories that smaller ones name are read each time
ENCRYPTED = 1  # bit of a member's flags


class MapLine(NamedTuple):
    """One line of a map."""

    number: int  # from 1
    archive: str  # name of the zip, beside the map
    member: str
    label: int


class ZipMembers(Source):
    """Images in zip files.

    Args:
        archives: the zip files.
        members: a `MEMBER` each image: which archive, and where in it.
        names: `NAME.zip@/path/in/zip` of each image.
        folder: of the archives, for messages.
    """

    def __init__(self, archives: list[Path], members: np.ndarray, names: Names, folder: Path) -> None:
        self.archives = [OwnFile(path) for path in archives]
        self.members = members
        self.names = names
        self.folder = folder

    def __len__(self) -> int:
        return len(self.members)

    def name(self, index: int) -> str:
        """See `Source.name`."""
        return f"{self.folder}/{self.names[index]}"

    def read(self, index: int) -> bytes:
        """See `Source.read`; what differs from its checksum is an error."""
        member = self.members[index]
        archive, offset, size = self.archives[member["archive"]], int(member["offset"]), int(member["size"])
        signature, name_length, extra_length = LOCAL_HEADER.unpack(archive.read(offset, LOCAL_HEADER.size))
        if signature != SIGNATURE:
            raise ValueError(
                f"{archive.path.name} has no member where its directory says; it was changed or is damaged"
            )
        content = archive.read(offset + LOCAL_HEADER.size + name_length + extra_length, int(member["packed"]))
        if member["method"] == zipfile.ZIP_DEFLATED:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size)
        if len(content) != size or zlib.crc32(content) != member["crc"]:
            raise ValueError("the member differs from its checksum")
        return content


def list_zip(root: Path, split: str, need_labels: bool) -> Listing:
    """The images that `split`_map.txt of the folder `root` names; they always have labels.

    Raises:
        UsageError: a file is missing or damaged, or a line of the map is wrong, which is named by its number.
    """
    map_file = root / f"{split}_map.txt"
    for path in (root / f"{split}.zip", map_file):
        if not path.is_file():
            raise UsageError(f"--zip_mode needs {split}.zip and {map_file.name} in --data_path; {path} is missing")
    make = partial(_read_directories, root, map_file, f"{split}.zip")
    if map_file.stat().st_size < KEPT_FROM:
        kept = make()
    else:
        state = state_of([map_file, *sorted(root.glob("*.zip"))])
        kept = arrays_once(cache_file(map_file, f".{state}.zip.npz"), make)
    archives = [root / name for name in kept["archives"].tolist()]
    source = ZipMembers(archives, kept["members"], Names.of(kept["text"], kept["ends"]), root)
    found, label_N = np.unique(kept["labels"], return_inverse=True)
    return Listing(source, label_N, [str(label) for label in found])


def _read_directories(root: Path, map_file: Path, default_archive: str) -> dict[str, np.ndarray]:
    """The names of the archives; a `MEMBER` and a label for each image, and the names as the arrays of `Names`."""
    archives: dict[str, zipfile.ZipFile] = {}
    rows, names, labels, missing = bytearray(), [], [], []
    try:
        for line in read_map(map_file, default_archive):
            if line.archive not in archives:
                archives[line.archive] = open_zip(root / line.archive, f"{map_file} line {line.number}")
            try:
                info = archives[line.archive].getinfo(line.member)
            except KeyError:
                missing.append(f"{line.archive}@/{line.member} in line {line.number}")
                continue
            check_readable(info, f"{map_file} line {line.number}")
            which = list(archives).index(line.archive)
            rows += PACKED.pack(
                which, info.compress_type, info.CRC, info.header_offset, info.compress_size, info.file_size
            )
            names.append(f"{line.archive}@/{line.member}")
            labels.append(line.label)
    finally:
        for archive in archives.values():
            archive.close()
    if missing:
        raise UsageError(
            f"{map_file} names {counted(len(missing), 'image')} that its zip does not hold, the first is {missing[0]}; "
            "repair the map or the zip"
        )
    if not rows:
        raise UsageError(f"{map_file} names no image; a line is NAME.zip@/path/in/zip<TAB>label")
    in_arrays = Names(names)
    return {
        "archives": np.array(list(archives)),
        "members": np.frombuffer(rows, dtype=MEMBER),
        "labels": np.array(labels, dtype=np.int64),
        "text": in_arrays.text,
        "ends": in_arrays.ends,
    }


def read_map(map_file: Path, default_archive: str) -> Iterator[MapLine]:
    """The lines of a map; empty ones are skipped.

    Raises:
        UsageError: a line that names no image in a zip beside the map, or no label.
    """
    text = read_text(map_file, "a line is NAME.zip@/path/in/zip<TAB>label")
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{map_file} line {number}"
        place, tab, label = line.rpartition("\t")
        if not tab:
            raise UsageError(f"{where} has no label: '{line.strip()}'; write NAME.zip@/path/in/zip<TAB>label")
        number_of_class = parse_label(label, where)
        archive, at, member = place.partition("@/")
        archive, member = (archive, member) if at else (default_archive, place)
        if "/" in archive or "\\" in archive or not archive.lower().endswith(".zip"):
            raise UsageError(
                f"{where}: '{archive}' is no zip file beside the map; write NAME.zip@/path/in/zip<TAB>label"
            )
        check_inside(member, where, archive)
        yield MapLine(number, archive, member, number_of_class)


def open_zip(path: Path, where: str) -> zipfile.ZipFile:
    """A zip file with its directory.

    Raises:
        UsageError: it is missing or no whole zip file; `where` says who names it.
    """
    try:
        return zipfile.ZipFile(path)
    except FileNotFoundError:
        raise UsageError(f"{where} names {path.name}, which is not in {path.parent}") from None
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise UsageError(f"{path} is no whole zip file ({error}); copy or make it again") from None


def check_readable(info: zipfile.ZipInfo, where: str) -> None:
    """Stop on a member that cannot be read whatever its bytes are.

    Raises:
        UsageError: it is encrypted, compressed in another way than deflate, or too large for an image.
    """
    if info.flag_bits & ENCRYPTED or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        how = "encrypted" if info.flag_bits & ENCRYPTED else f"compressed by method {info.compress_type}"
        raise UsageError(f"{where}: {info.filename} is {how}; make the zip again, stored (zip -0) or deflated")
    try:
        checked_size(info.file_size)
    except ValueError as error:
        raise UsageError(f"{where}: {info.filename} cannot be read ({error}); take it out of the map") from None
