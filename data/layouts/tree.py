"""The image files below a folder, found once: a large tree is remembered in the cache folder until one of its folders changes.

A folder of a million files takes minutes to list on a shared disk, and each start of each process would do it again. What was
found is kept with the time each folder last changed; a later start looks at the folders only. While one process lists, the others
wait.

Origin: this project's own.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from data.layouts.index_cache import cache_file, make_once
from data.layouts.sources import Names
from distributed.collectives import is_main_process
from utils import UsageError, logger

EXTENSIONS = (*IMG_EXTENSIONS, ".npy")
PASSED_OVER = (
    ".gif",
    ".avif",
    ".heic",
    ".jp2",
    ".jxl",
    ".tar.gz",
    ".tgz",
)  # images, but not read here: told with a number
KEPT_FROM = 50_000  # images; smaller trees are listed each time
SPECIAL = "pipes, sockets or devices"
UNSETTLED = 2 * 10**9  # nanoseconds; a folder changed so shortly before may change again within one tick of its clock

_told: set[tuple[object, ...]] = set()


class Found(NamedTuple):
    """What lies below a folder."""

    names: Names  # of image files, sorted
    passed_over: dict[str, int]  # by kind, what may be meant as images and is not read


def find_images(root: Path) -> Names:
    """Image files below `root`, relative to it, sorted; links to folders are followed, but not in a circle.

    Raises:
        UsageError: a folder cannot be read.
    """
    found = _find(root)
    tell_passed_over(root, found.passed_over)
    return found.names


def _find(root: Path) -> Found:
    place = cache_file(root, ".files")
    before = _state(str(place))
    kept = _load(place, root)
    if kept is not None:
        return kept
    scan = _Scan(root)
    scan.advance(KEPT_FROM)
    if scan.done:
        return scan.found()
    made: list[Found] = []

    def write(file: BinaryIO) -> None:
        scan.advance(None)
        made.append(scan.found())
        scan.save(file, made[0])

    with contextlib.suppress(OSError):
        if _state(str(place)) == before:  # and no other process has renewed it by now
            place.unlink(missing_ok=True)
    if make_once(place, write) and not made:
        kept = _load(place, root)
        if kept is not None:
            return kept
    if not made:
        scan.advance(None)
        made.append(scan.found())
    return made[0]


def is_image_name(name: str) -> bool:
    """By ending; hidden files (`._photo.jpg` of macOS) are no images."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def is_image_file(path: str | Path) -> bool:
    """By name, and no folder, pipe, socket or device, nor a link to one; a file that is missing is named when it is read."""
    return is_image_name(os.path.basename(path)) and (os.path.isfile(path) or not os.path.exists(path))


def kind_passed_over(name: str) -> str:
    """The ending among `PASSED_OVER` that a name has, if any."""
    return "" if name.startswith(".") else next((kind for kind in PASSED_OVER if name.lower().endswith(kind)), "")


def tell_passed_over(root: Path, kinds: Mapping[str, int]) -> None:
    """Warn, once a run, of what lies in `root` and may be meant as images."""
    if kinds and (root, *kinds.items()) not in _told:
        _told.add((root, *kinds.items()))
        counts = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
        logger.warning("%s holds what is not read and passed over: %s; convert what you want to be read", root, counts)


class _Scan:
    """A listing that can be interrupted.

    Attributes:
        done: it is complete.
    """

    def __init__(self, root: Path) -> None:
        self.done = False
        self._root = root
        self._started = time.time_ns()
        self._found: list[str] = []
        self._passed_over = Counter[str]()
        self._folders: list[tuple[str, int, int]] = []  # relative, its time and number
        self._walk = self._images()
        hidden = not (is_main_process() and sys.stderr.isatty())
        self._bar = tqdm(desc=f"images below {root}", unit=" files", disable=hidden, leave=False, delay=1)

    def advance(self, count: int | None) -> None:
        """Find so many more images, or all."""
        before = len(self._found)
        self._found += self._walk if count is None else islice(self._walk, count)
        if count is None or len(self._found) - before < count:
            self.done = True
            self._bar.close()

    def found(self) -> Found:
        """All of it."""
        self._found.sort()
        return Found(Names(self._found), dict(self._passed_over))

    def save(self, file: BinaryIO, found: Found) -> None:
        """For `_load`."""
        folders = Names([name for name, _, _ in self._folders])
        arrays = {
            "text": found.names.text,
            "ends": found.names.ends,
            "kinds": np.array(list(found.passed_over), dtype=np.str_),
            "numbers": np.array(list(found.passed_over.values()), dtype=np.int64),
            "folders": folders.text,
            "folder_ends": folders.ends,
            "state": np.array([state for _, *state in self._folders], dtype=np.int64),
        }
        np.savez(file, **arrays)  # type: ignore[arg-type]

    def _images(self) -> Iterator[str]:
        pending = [str(self._root)]
        while pending:
            folder = pending.pop()
            parents = {os.path.realpath(folder)} | {os.path.realpath(p) for p in Path(folder).parents}
            subfolders, files = self._look_into(folder)
            paths = [os.path.join(folder, name) for name in sorted(subfolders, reverse=True)]
            pending += [path for path in paths if os.path.realpath(path) not in parents]
            relative = os.path.relpath(folder, self._root)
            changed, number = _state(folder)
            self._folders.append((relative, changed if changed < self._started - UNSETTLED else -1, number))
            prefix = "" if relative == "." else relative + os.sep
            images = [prefix + name for name in files]
            self._bar.update(len(images))
            yield from images

    def _look_into(self, folder: str) -> tuple[list[str], list[str]]:
        """Names of the sub-folders and of the images; the folder itself tells the kind of most of them."""
        subfolders, images = [], []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir():
                        subfolders += [] if entry.name.startswith(".") else [entry.name]
                    elif is_image_name(entry.name):
                        if entry.is_file() or is_image_file(entry.path):
                            images.append(entry.name)
                        else:
                            self._passed_over[SPECIAL] += 1
                    elif kind := kind_passed_over(entry.name):
                        self._passed_over[kind] += 1
        except OSError as error:
            raise UsageError(
                f"{folder} cannot be read ({error.strerror}); give permission to read it, or move it away"
            ) from None
        return subfolders, images


def _state(folder: str) -> tuple[int, int]:
    """What tells a changed folder: when entries last came or went, and which folder it is."""
    try:
        state = os.stat(folder)
    except OSError:
        return -1, -1
    return state.st_mtime_ns, state.st_ino


def _load(place: Path, root: Path) -> Found | None:
    """What was kept, unless a folder changed since."""
    try:
        with np.load(place, allow_pickle=False) as kept:
            names = Names.of(kept["text"], kept["ends"])
            passed_over = dict(zip(kept["kinds"].tolist(), kept["numbers"].tolist(), strict=True))
            folders, states = Names.of(kept["folders"], kept["folder_ends"]), kept["state"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    whole = len(states) == len(folders) > 0 and states.shape[1:] == (2,)
    if not whole or any(
        _state(os.path.join(root, name)) != tuple(state) for name, state in zip(folders, states.tolist())
    ):
        return None
    return Found(names, passed_over)
