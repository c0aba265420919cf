"""Random access to the images of local tar files (WebDataset shards), for evaluation and conversion.

    DIR/train-000000.tar ...       or a pattern 'DIR/train-{000000..000146}.tar', or a folder train/ of tar files

Members with the same name before the first dot form one sample: an image and, optionally, `NAME.cls` with an integer label.
Nothing is unpacked to the disk. Links are reported as unreadable images, since a shard need not contain their targets.
Pre-training reads the same files sequentially (data/layouts/shards.py). The index of large shards is cached
(data/layouts/index_cache.py).

Origin: the conventions of WebDataset.
"""

from __future__ import annotations

import math
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import braceexpand
import numpy as np

from checkpoints.files import parse_json
from config.ranges import integer
from data.layouts.folder_scan import EXTENSIONS, unread_extension, warn_skipped
from data.layouts.index_cache import index_arrays, progress_bar
from data.layouts.remote import PIPE, is_remote, open_stream
from data.layouts.sources import UNLABELED, ArchiveMembers, Listing, PackedStrings, checked_size, parse_label
from utils import UsageError, counted, logger

SUFFIXES = tuple(name.lstrip(".") for name in EXTENSIONS)
LABEL_SUFFIX = "cls"
MAX_LABEL_BYTES = 64
EXTENDED_HEADERS = {
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
}
MAX_EXTENDED_HEADER_BYTES = 2**20
SIZES = "sizes.json"  # number of images in each shard of its folder, by file name
MEMBER = np.dtype([("archive", "<u4"), ("offset", "<u8"), ("size", "<u4")])
SHARD_SIZES = integer(0, 10**8)  # allowed number of images of a shard
MAX_SHARDS = 10**6
MIN_CACHED_BYTES = 2**28  # size of all shards from which on their index is cached
LINK = "it is a link, and a shard must contain each image itself; create it with tar --dereference --hard-dereference"

T = TypeVar("T")


class Member(NamedTuple):
    """An image in a tar file."""

    name: str
    offset: int  # of its content; 0 for a link
    size: int
    label: str | None


class BoundedHeader(tarfile.TarInfo):
    """A tar header whose extended headers, which `tarfile` reads into memory, are limited in size."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> BoundedHeader:
        """Parse a header block; raise `tarfile.ReadError` if it announces a larger extended header."""
        info = super().frombuf(buf, encoding, errors)
        if info.type in EXTENDED_HEADERS and info.size > MAX_EXTENDED_HEADER_BYTES:
            raise tarfile.ReadError(f"a header has {info.size} bytes")
        return info


class TarMembers(ArchiveMembers):
    """Images in uncompressed tar files; rows of `members` are of type `MEMBER`."""

    def read(self, index: int) -> bytes:
        member = self.members[index]
        if not member["offset"]:
            raise ValueError(LINK)
        return self.archives[member["archive"]].read(int(member["offset"]), int(member["size"]))


def list_tars(root: Path, split: str, need_labels: bool) -> Listing:
    """List the images of local shards, with labels if every image has one.

    Raises:
        UsageError: no shards, a damaged one, or no labels where they are needed.
    """
    paths = [Path(shard) for shard in find_shards(str(root), split, need_labels)]
    arrays = _index_shards(paths, ".tar-members.npz", partial(_list_members, paths))
    source = TarMembers(paths, arrays["members"], PackedStrings.from_arrays(arrays["text"], arrays["ends"]))
    if not len(source):
        raise UsageError(
            f"{root} has no image in {counted(len(paths), 'tar file')}; names of images end in {' '.join(SUFFIXES)}"
        )
    labels = arrays["labels"]
    if UNLABELED in labels:
        if need_labels:
            name = source.name(int((labels == UNLABELED).argmax()))
            raise UsageError(f"{name} has no label; evaluation needs a member NAME.{LABEL_SUFFIX} for each image")
        return Listing.unlabeled(source)
    return Listing.from_numbers(source, labels)


def _list_members(shards: Sequence[Path]) -> dict[str, np.ndarray]:
    """Return the `MEMBER`, the label and the packed name of each image."""
    rows, names, labels = [], [], []
    for number, path in enumerate(progress_bar(shards, desc="shards")):
        for member in tar_members(path):
            rows.append((number, member.offset, member.size))
            names.append(member.name)
            where = f"{path}@/{member.name}"
            labels.append(UNLABELED if member.label is None else parse_label(member.label, where))
    packed = PackedStrings(names)
    members, label_N = np.array(rows, dtype=MEMBER), np.array(labels, dtype=np.int64)
    return {"members": members, "labels": label_N, "text": packed.text, "ends": packed.ends}


def _index_shards(
    shards: Sequence[Path], suffix: str, build: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Return the arrays that `build` extracts from shards, from the cache if the shards are large."""
    try:
        large = sum(shard.stat().st_size for shard in shards) >= MIN_CACHED_BYTES
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be read ({error.strerror}); copy or create it again") from None
    return index_arrays(shards, suffix, build, large=large)


# --------------------------------------------------------------------------- names of shards


def find_shards(path: str, split: str, need_split: bool = False) -> list[str]:
    """Return the shards of a data path: a pattern, a file or a folder.

    In a folder these are the tar files of its sub-folder `split`, else those whose name begins with `split`, else all of them,
    unless some begin with the name of a split.

    Raises:
        UsageError: no shard, or a missing one.
    """
    if is_remote(path) or "{" in path:
        return _expand_pattern(path)
    root = Path(path)
    if root.is_file():
        return [path]
    folder = root / split if (root / split).is_dir() else root
    tars = sorted(folder.glob("*.tar"))
    chosen = [tar for tar in tars if folder != root or tar.name.startswith(split)]
    if not chosen and any(tar.name.startswith(("train", "val")) for tar in tars):
        tars = []
    if not tars:
        raise UsageError(f"{root} has no tar files of '{split}'; name them {split}-000000.tar, or pass a pattern")
    compressed = Counter(kind for path in folder.iterdir() if (kind := unread_extension(path.name)).endswith("gz"))
    warn_skipped(folder, compressed)
    return [str(tar) for tar in chosen or tars]


def _expand_pattern(pattern: str) -> list[str]:
    count = count_expansions(pattern)
    if count > MAX_SHARDS:
        raise UsageError(
            f"--data_path {pattern} names {count:.3g} shards, at most {MAX_SHARDS} are allowed; correct it"
        )
    try:
        shards = list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise UsageError(
            f"--data_path {pattern} is not a valid pattern ({error}); write DIR/train-{{000..146}}.tar"
        ) from None
    missing = [shard for shard in shards if not is_remote(shard) and not Path(shard).is_file()]
    if missing:
        raise UsageError(
            f"--data_path {pattern} names {counted(len(shards), 'shard')}, {len(missing)} of them missing, "
            f"first {missing[0]}; correct the pattern"
        )
    return shards


def count_expansions(pattern: str) -> float:
    """Return an upper bound, possibly infinite, of the number of names a brace pattern expands to, without expanding it."""
    count = 1.0
    for group in re.findall(r"\{([^{}]*)\}", pattern):
        bounds = re.fullmatch(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?", group)
        if bounds:
            first, last, step = (float(number or 1) for number in bounds.groups())
            count *= abs(last - first) // (step or 1) + 1 if math.isfinite(last - first) else math.inf
        else:
            count *= group.count(",") + 1
    return count


def contains_shards(path: str) -> bool:
    """Return whether a data path is a shard, a pattern or URL of shards, or a folder of them."""
    if is_remote(path) or path.endswith(".tar"):
        return True
    root = Path(path)
    folders = [folder for folder in (root, root / "train", root / "val") if folder.is_dir()]
    return any(next(folder.glob("*.tar"), None) is not None for folder in folders)


# --------------------------------------------------------------------------- members of shards


def split_name(member: str) -> tuple[str, str]:
    """Split a member name into the key of its sample and its lower-case suffix: `a/b.c.JPG` into `a/b` and `c.jpg`."""
    folder, slash, name = member.rpartition("/")
    stem, _, suffix = name.partition(".")
    return folder + slash + stem, suffix.lower()


def is_image(suffix: str) -> bool:
    """Return whether a member suffix is that of an image, such as `png` or `seg.png`."""
    return suffix.rpartition(".")[2] in SUFFIXES


def samples_of(members: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T, T | None]]:
    """Group named members by sample; yield name and content of each sample's first image, and the content of its label."""
    key, image, label = "", None, None
    for member, content in members:
        sample, suffix = split_name(member)
        if sample != key:
            if image is not None:
                yield *image, label
            key, image, label = sample, None, None
        if image is None and is_image(suffix):
            image = member, content
        elif suffix == LABEL_SUFFIX:
            label = content
    if image is not None:
        yield *image, label


def tar_members(path: Path) -> Iterator[Member]:
    """Yield the image of each sample of a tar file, in file order.

    Raises:
        UsageError: the file is compressed, or not a complete tar file.
    """
    try:
        with tarfile.open(path, "r:", tarinfo=BoundedHeader) as tar:
            for name, image, label in samples_of(sample_members(tar)):
                content = tar.extractfile(label) if label and is_file(label) else None
                text = content.read(MAX_LABEL_BYTES).decode("ascii", "replace") if content else None
                try:
                    checked_size(image.size)
                except ValueError as error:
                    raise UsageError(f"{path}@/{name} cannot be read ({error}); remove it") from None
                yield Member(name, image.offset_data if is_file(image) else 0, image.size, text)
    except (tarfile.TarError, OSError) as error:
        raise UsageError(
            f"{path} is not a complete, uncompressed tar file ({error}); copy or create it again"
        ) from None


def sample_members(tar: tarfile.TarFile) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """Yield name and header of each image and label, links included, hidden files excluded."""
    for info in tar:
        tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
        _, suffix = split_name(info.name)
        hidden = info.name.rpartition("/")[2].startswith(".")
        if (is_image(suffix) or suffix == LABEL_SUFFIX) and not hidden and not info.isdir():
            yield info.name, info


def is_file(info: tarfile.TarInfo) -> bool:
    """Return whether the tar file contains the content of a member, which it does not for a link."""
    return info.isreg() and not info.issparse()


# --------------------------------------------------------------------------- sizes of shards


def count_images(shards: Sequence[str]) -> list[int]:
    """Return the number of images of each local shard: as listed in `sizes.json`, else counted.

    Raises:
        UsageError: a damaged shard or `sizes.json`.
    """
    listed = listed_sizes(shards)
    unlisted = [Path(shard) for shard, count in zip(shards, listed) if count is None]
    if not unlisted:
        return [count for count in listed if count is not None]
    counts = iter(_index_shards(unlisted, ".counts.npz", partial(_count_members, unlisted))["counts"].tolist())
    return [next(counts) if count is None else count for count in listed]


def _count_members(shards: Sequence[Path]) -> dict[str, np.ndarray]:
    bar = progress_bar(shards, desc="counting images of shards")
    return {"counts": np.array([sum(1 for _ in tar_members(path)) for path in bar])}


def listed_sizes(shards: Sequence[str]) -> list[int | None]:
    """Return the number of images of each shard as listed in `sizes.json` of its folder, None if it is not.

    Raises:
        UsageError: a local `sizes.json` is damaged; a remote one is ignored with a warning.
    """
    folders = [os.path.dirname(shard) for shard in shards]
    sizes = {folder: _read_sizes(folder) for folder in set(folders)}
    return [sizes[folder].get(os.path.basename(shard)) for folder, shard in zip(folders, shards)]


def _read_sizes(folder: str) -> dict[str, int]:
    if folder.startswith(PIPE):
        return {}
    path, remote = os.path.join(folder, SIZES), is_remote(folder)
    try:
        with open_stream(path) as stream:
            content = stream.read()
    except Exception as error:  # fsspec may raise anything
        if remote or isinstance(error, FileNotFoundError):
            return {}
        raise UsageError(f"{path} cannot be read ({error}); move it away to have the images counted") from None
    try:
        return parse_sizes(content)
    except ValueError as error:
        if not remote:
            raise UsageError(f"{path} is invalid ({error}); move it away to have the images counted") from None
        logger.warning("%s is ignored: %s", path, error)
        return {}


def parse_sizes(content: bytes) -> dict[str, int]:
    """Parse `sizes.json`; raise ValueError if it is not an object of image counts."""
    sizes = parse_json(content)
    if not isinstance(sizes, dict) or not all(type(count) is int and count in SHARD_SIZES for count in sizes.values()):
        raise ValueError(f"it must map each tar file to {SHARD_SIZES}")
    return sizes
