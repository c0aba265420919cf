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
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from data.once import cache_file, make_once
from data.sources import Names
from utils import is_main_process

EXTENSIONS = (*IMG_EXTENSIONS, ".npy")
KEPT_FROM = 50_000  # images; smaller trees are listed each time
UNSETTLED = 2 * 10**9  # nanoseconds; a folder changed so shortly before may change again within one tick of its clock


def find_images(root: Path) -> Names:
    """Image files below `root`, relative to it, sorted; links to folders are followed, but not in a circle."""
    place = cache_file(root, ".files")
    before = _state(str(place))
    kept = _load(place, root)
    if kept is not None:
        return kept
    scan = _Scan(root)
    scan.advance(KEPT_FROM)
    if scan.done:
        return scan.names()
    made: list[Names] = []

    def write(file: BinaryIO) -> None:
        scan.advance(None)
        made.append(scan.names())
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
        made.append(scan.names())
    return made[0]


def is_image_name(name: str) -> bool:
    """By ending; hidden files (`._photo.jpg` of macOS) are no images."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


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

    def names(self) -> Names:
        """What was found."""
        self._found.sort()
        return Names(self._found)

    def save(self, file: BinaryIO, names: Names) -> None:
        """For `_load`."""
        folders = Names([name for name, _, _ in self._folders])
        state = np.array([state for _, *state in self._folders], dtype=np.int64)
        np.savez(file, text=names.text, ends=names.ends, folders=folders.text, folder_ends=folders.ends, state=state)

    def _images(self) -> Iterator[str]:
        for folder, subfolders, files in os.walk(self._root, followlinks=True):
            parents = {os.path.realpath(folder)} | {os.path.realpath(p) for p in Path(folder).parents}
            visible = sorted(name for name in subfolders if not name.startswith("."))
            subfolders[:] = [name for name in visible if os.path.realpath(os.path.join(folder, name)) not in parents]
            relative = os.path.relpath(folder, self._root)
            changed, number = _state(folder)
            self._folders.append((relative, changed if changed < self._started - UNSETTLED else -1, number))
            prefix = "" if relative == "." else relative + os.sep
            images = [prefix + name for name in files if is_image_name(name)]
            self._bar.update(len(images))
            yield from images


def _state(folder: str) -> tuple[int, int]:
    """What tells a changed folder: when entries last came or went, and which folder it is."""
    try:
        state = os.stat(folder)
    except OSError:
        return -1, -1
    return state.st_mtime_ns, state.st_ino


def _load(place: Path, root: Path) -> Names | None:
    """What was kept, unless a folder changed since."""
    try:
        with np.load(place, allow_pickle=False) as kept:
            names = Names.of(kept["text"], kept["ends"])
            folders, states = Names.of(kept["folders"], kept["folder_ends"]), kept["state"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    whole = len(states) == len(folders) > 0 and states.shape[1:] == (2,)
    if not whole or any(
        _state(os.path.join(root, name)) != tuple(state) for name, state in zip(folders, states.tolist())
    ):
        return None
    return names
