"""Images in local tar files: WebDataset shards at any place of them, for evaluation and conversion.

    DIR/train-000000.tar ...       or a pattern 'DIR/train-{000000..000146}.tar', or a folder train/ of tars

Members of one name before the first dot are one sample: an image, and where labels are known `NAME.cls` with a number. Nothing is
ever unpacked to the disk. A link is no image: what it leads to need not be there, so it is reported as one that cannot be read.
Training reads the same files from their beginning to their end: data/layouts/shards.py.

Looking through a million headers takes a while: what was found in large shards is kept in the cache folder
(data/layouts/index_cache.py) until
one of them changes.

Origin: the conventions of WebDataset; the index is this project's own, on Python's tarfile.
"""

from __future__ import annotations

import math
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import braceexpand
import numpy as np
from tqdm import tqdm

from checkpoints.files import parse_json
from config.ranges import integer
from data.layouts.index_cache import arrays_once, cache_file, state_of
from data.layouts.remote import is_remote
from data.layouts.sources import UNLABELED, Listing, Names, OwnFile, Source, checked_size, parse_label
from data.layouts.tree import EXTENSIONS, kind_passed_over, tell_passed_over
from distributed.collectives import is_main_process
from utils import UsageError, counted

SUFFIXES = tuple(name.lstrip(".") for name in EXTENSIONS)
LABEL_SUFFIX = "cls"
LABEL_BYTES = 64  # of a label's member, at most
DESCRIBING = {
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
}
DESCRIBING_BYTES = 2**20  # of a header that describes the next one, at most
SIZES = "sizes.json"  # beside shards: the number of images in each, by its name
MEMBER = np.dtype([("shard", "<u4"), ("offset", "<u8"), ("size", "<u4")])
IMAGES = integer(0, 10**8)  # of a shard
MOST_SHARDS = 10**6
KEPT_FROM = 2**28  # bytes of all shards; smaller ones are looked through each time
LINK = "it is a link, and a shard must hold each image itself; make it with tar --dereference --hard-dereference"

T = TypeVar("T")


class Member(NamedTuple):
    """An image in a tar file."""

    name: str
    offset: int  # of its bytes; 0 of a link
    size: int
    label: str | None


class BoundedHeader(tarfile.TarInfo):
    """A header whose long names and further fields, which are read at once, are of a size that such have."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> BoundedHeader:
        """See `tarfile.TarInfo.frombuf`.

        Raises:
            tarfile.ReadError: they are not.
        """
        info = super().frombuf(buf, encoding, errors)
        if info.type in DESCRIBING and info.size > DESCRIBING_BYTES:
            raise tarfile.ReadError(f"a header has {info.size} bytes")
        return info


class TarMembers(Source):
    """Images in tar files that are not compressed.

    Args:
        shards: the tar files.
        members: a `MEMBER` each image: which tar, and where in it.
        names: of the members.
    """

    def __init__(self, shards: Sequence[Path], members: np.ndarray, names: Names) -> None:
        self.shards = [OwnFile(path) for path in shards]
        self.members = members
        self.names = names

    def __len__(self) -> int:
        return len(self.members)

    def name(self, index: int) -> str:
        """See `Source.name`."""
        return f"{self.shards[self.members[index]['shard']].path}@/{self.names[index]}"

    def read(self, index: int) -> bytes:
        """See `Source.read`."""
        member = self.members[index]
        if not member["offset"]:
            raise ValueError(LINK)
        return self.shards[member["shard"]].read(int(member["offset"]), int(member["size"]))


def list_tars(root: Path, split: str, need_labels: bool) -> Listing:
    """The images of local shards, with labels where all of them have one.

    Raises:
        UsageError: no such shards, a damaged one, or no labels where they are needed.
    """
    paths = [Path(shard) for shard in find_shards(str(root), split, need_labels)]
    kept = _kept(root, paths, ".members.npz", partial(_list_members, paths))
    source = TarMembers(paths, kept["members"], Names.of(kept["text"], kept["ends"]))
    if not len(source):
        raise UsageError(
            f"{root} holds no image; looked in {counted(len(paths), 'tar file')} for names ending in {' '.join(SUFFIXES)}"
        )
    labels = kept["labels"]
    if UNLABELED in labels:
        if need_labels:
            without = source.name(int((labels == UNLABELED).argmax()))
            raise UsageError(f"{without} has no label; evaluation needs a member NAME.{LABEL_SUFFIX} for each image")
        return Listing(source, np.full(len(labels), UNLABELED), ())
    found, label_N = np.unique(labels, return_inverse=True)
    return Listing(source, label_N, [str(label) for label in found])


def _list_members(shards: Sequence[Path]) -> dict[str, np.ndarray]:
    """A `MEMBER` and a label for each image, and the names as the arrays of `Names`."""
    rows, names, labels = [], [], []
    for number, path in enumerate(tqdm(shards, desc="shards", disable=_quiet(), leave=False)):
        for member in tar_members(path):
            rows.append((number, member.offset, member.size))
            names.append(member.name)
            where = f"{path}@/{member.name}"
            labels.append(UNLABELED if member.label is None else parse_label(member.label, where))
    in_arrays = Names(names)
    members, label_N = np.array(rows, dtype=MEMBER), np.array(labels, dtype=np.int64)
    return {"members": members, "labels": label_N, "text": in_arrays.text, "ends": in_arrays.ends}


def _kept(
    about: Path, shards: Sequence[Path], suffix: str, make: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """What `make` finds out about shards, from the cache where they are large."""
    try:
        large = sum(shard.stat().st_size for shard in shards) >= KEPT_FROM
        place = cache_file(about, f".{state_of(shards)}{suffix}")
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be read ({error.strerror}); copy or make it again") from None
    return arrays_once(place, make) if large else make()


def find_shards(path: str, split: str, need_split: bool = False) -> list[str]:
    """The shards that a data path names: a pattern, one file, or a folder.

    Of a folder: those in its sub-folder `split`, else those whose name begins with it, else (unless the split is needed and the
    other one is there) all.

    Raises:
        UsageError: none, or one that is missing.
    """
    if is_remote(path) or "{" in path:
        if (named := names_in(path)) > MOST_SHARDS:
            raise UsageError(
                f"--data_path {path} names {named:.3g} shards; correct the pattern, {MOST_SHARDS} are the most"
            )
        try:
            shards = list(braceexpand.braceexpand(path))
        except ValueError as error:
            raise UsageError(
                f"--data_path {path} is no pattern of shards ({error}); write DIR/train-{{000..146}}.tar"
            ) from None
        missing = [shard for shard in shards if not is_remote(shard) and not Path(shard).is_file()]
        if missing:
            absent = counted(len(missing), "is", "are")
            raise UsageError(
                f"--data_path names {counted(len(shards), 'shard')} of which {absent} missing, first {missing[0]}; "
                "correct the pattern"
            )
        return shards
    root = Path(path)
    if root.is_file():
        return [path]
    folder = root / split if (root / split).is_dir() else root
    tars = sorted(folder.glob("*.tar"))
    chosen = [tar for tar in tars if folder != root or tar.name.startswith(split)]
    if not chosen and any(tar.name.startswith(("train", "val")) for tar in tars):
        tars = []
    if not tars:
        raise UsageError(f"{root} holds no tar files of '{split}'; name them {split}-000000.tar, or pass a pattern")
    packed = Counter(kind for path in folder.iterdir() if (kind := kind_passed_over(path.name)).endswith("gz"))
    tell_passed_over(folder, packed)
    return [str(tar) for tar in chosen or tars]


def names_in(pattern: str) -> float:
    """At most how many names a pattern of braces stands for, as a number that may be infinite: nothing is written out."""
    named = 1.0
    for group in re.findall(r"\{([^{}]*)\}", pattern):
        bounds = re.fullmatch(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?", group)
        if bounds:
            first, last, step = (float(number or 1) for number in bounds.groups())
            named *= abs(last - first) // (step or 1) + 1 if math.isfinite(last - first) else math.inf
        else:
            named *= group.count(",") + 1
    return named


def holds_shards(path: str) -> bool:
    """Whether a data path names tar files, by itself or as a folder."""
    if is_remote(path) or path.endswith(".tar"):
        return True
    root = Path(path)
    folders = [folder for folder in (root, root / "train", root / "val") if folder.is_dir()]
    return any(next(folder.glob("*.tar"), None) is not None for folder in folders)


def split_name(member: str) -> tuple[str, str]:
    """The sample that a member belongs to, and what it is of it: `a/b.c.JPG` is the `c.jpg` of `a/b`."""
    folder, slash, name = member.rpartition("/")
    stem, _, suffix = name.partition(".")
    return folder + slash + stem, suffix.lower()


def is_image(suffix: str) -> bool:
    """Of a member; `seg.png` is an image as `png` is."""
    return suffix.rpartition(".")[2] in SUFFIXES


def samples_of(members: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T, T | None]]:
    """Name and content of the image, and content of the label, of each sample that has an image; of several the first."""
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
    """The images of a tar file in its order: one of each sample that has any.

    Raises:
        UsageError: it is compressed or no whole tar file.
    """
    try:
        with tarfile.open(path, "r:", tarinfo=BoundedHeader) as tar:
            for name, image, label in samples_of(parts_of(tar)):
                content = tar.extractfile(label) if label and is_file(label) else None
                text = content.read(LABEL_BYTES).decode("ascii", "replace") if content else None
                try:
                    checked_size(image.size)
                except ValueError as error:
                    raise UsageError(f"{path}@/{name} cannot be read ({error}); remove it") from None
                yield Member(name, image.offset_data if is_file(image) else 0, image.size, text)
    except (tarfile.TarError, OSError) as error:
        raise UsageError(f"{path} is no whole tar file without compression ({error}); copy or make it again") from None


def parts_of(tar: tarfile.TarFile) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """Name and header of the images and labels of a tar, hidden files apart; links are among them (see `is_file`)."""
    for info in tar:
        tar.members = []  # type: ignore[attr-defined]  # which would hold every header
        _, suffix = split_name(info.name)
        hidden = info.name.rpartition("/")[2].startswith(".")
        if (is_image(suffix) or suffix == LABEL_SUFFIX) and not hidden and not info.isdir():
            yield info.name, info


def is_file(info: tarfile.TarInfo) -> bool:
    """Whether the tar holds its content; not of links."""
    return info.isreg() and not info.issparse()


def count_images(shards: Sequence[str]) -> list[int]:
    """Images of each local shard, as `sizes.json` beside it says, else counted.

    Raises:
        UsageError: a damaged shard or list.
    """
    paths = [Path(shard) for shard in shards]
    sizes = {folder: _read_sizes(folder / SIZES) for folder in {path.parent for path in paths}}
    told = [sizes[path.parent].get(path.name) for path in paths]
    unknown = [path for path, count in zip(paths, told) if count is None]
    if not unknown:
        return [count for count in told if count is not None]
    counted = iter(_kept(unknown[0], unknown, ".counts.npz", partial(_count_members, unknown))["counts"].tolist())
    return [next(counted) if count is None else count for count in told]


def _count_members(shards: Sequence[Path]) -> dict[str, np.ndarray]:
    bar = tqdm(shards, desc="counting images of shards", disable=_quiet(), leave=False)
    return {"counts": np.array([sum(1 for _ in tar_members(path)) for path in bar])}


def _read_sizes(path: Path) -> dict[str, int]:
    try:
        return parse_sizes(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be used ({error}); move it away, images are counted then") from None


def parse_sizes(content: bytes) -> dict[str, int]:
    """`sizes.json`.

    Raises:
        ValueError: it is something else.
    """
    sizes = parse_json(content)
    if not isinstance(sizes, dict) or not all(type(count) is int and count in IMAGES for count in sizes.values()):
        raise ValueError(f"it does not give {IMAGES} for each tar")
    return sizes


def _quiet() -> bool:
    return not (is_main_process() and sys.stderr.isatty())
