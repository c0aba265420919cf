"""Recursive scan of a folder for image files, cached for large trees.

Listing a million files takes minutes on a shared disk. The cache keeps the modification time of every folder, so a later start
only checks the folders. One process scans while the others wait.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from data.layouts.index_cache import cache_path, cached_arrays, file_state, load_arrays, progress_bar
from data.layouts.sources import PackedStrings
from utils import UsageError, logger

EXTENSIONS = (*IMG_EXTENSIONS, ".npy")
UNREAD_EXTENSIONS = (".gif", ".avif", ".heic", ".jp2", ".jxl", ".tar.gz", ".tgz")  # images that are counted and skipped
SPECIAL_FILES = "pipes, sockets or devices"
MIN_CACHED_IMAGES = 50_000  # smaller trees are scanned at each start
# A folder modified less than this before the scan may change again without a new modification time.
SETTLE_NS = 2 * 10**9

_warned: set[tuple[object, ...]] = set()


def find_images(root: Path) -> PackedStrings:
    """Return the image files below `root`, relative to it and sorted; links to folders are followed unless they form a cycle.

    Raises:
        UsageError: a folder cannot be read.
    """
    path = cache_path(root, ".files")
    arrays = load_arrays(path)
    if arrays is None or not _is_current(arrays, root):
        scan = _Scan(root)
        scan.advance(MIN_CACHED_IMAGES)
        arrays = scan.finish() if scan.done else cached_arrays(path, scan.finish, partial(_is_current, root=root))
    warn_skipped(root, dict(zip(arrays["kinds"].tolist(), arrays["numbers"].tolist())))
    return PackedStrings.from_arrays(arrays["text"], arrays["ends"])


def _is_current(arrays: Mapping[str, np.ndarray], root: Path) -> bool:
    """Return whether a cached scan is complete, and no folder has changed since."""
    try:
        PackedStrings.from_arrays(arrays["text"], arrays["ends"])
        folders = PackedStrings.from_arrays(arrays["folders"], arrays["folder_ends"])
        states = arrays["state"].tolist()
        complete = len(arrays["kinds"]) == len(arrays["numbers"]) and len(folders) == len(states) > 0
    except (KeyError, ValueError):
        return False
    return complete and all(
        file_state(os.path.join(root, name)) == tuple(state) for name, state in zip(folders, states)
    )


def is_image_name(name: str) -> bool:
    """Return whether a file name has the extension of an image and is not hidden (as `._photo.jpg` of macOS)."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def is_image_file(path: str | Path) -> bool:
    """Return whether `path` is named like an image and is a regular file or missing; missing files are reported when read."""
    return is_image_name(os.path.basename(path)) and (os.path.isfile(path) or not os.path.exists(path))


def unread_extension(name: str) -> str:
    """Return which of `UNREAD_EXTENSIONS` a file name has, or an empty string."""
    return "" if name.startswith(".") else next((kind for kind in UNREAD_EXTENSIONS if name.lower().endswith(kind)), "")


def warn_skipped(root: Path, kinds: Mapping[str, int]) -> None:
    """Warn, once a run, of files in `root` that may be meant as images and are not read."""
    if kinds and (root, *kinds.items()) not in _warned:
        _warned.add((root, *kinds.items()))
        counts = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
        logger.warning("%s has files that are not read: %s; convert those that you want to use", root, counts)


class _Scan:
    """A recursive scan in steps.

    Attributes:
        done: whether it is complete.
    """

    def __init__(self, root: Path) -> None:
        self.done = False
        self._root = root
        self._started = time.time_ns()
        self._found: list[str] = []
        self._skipped = Counter[str]()
        self._folders: list[tuple[str, int, int]] = []  # relative path, modification time, inode
        self._images = self._walk()
        self._bar = progress_bar(desc=f"images below {root}", unit=" files", delay=1)

    def advance(self, count: int | None) -> None:
        """Find `count` more images, or all with None."""
        before = len(self._found)
        self._found += self._images if count is None else islice(self._images, count)
        if count is None or len(self._found) - before < count:
            self.done = True
            self._bar.close()

    def finish(self) -> dict[str, np.ndarray]:
        """Complete the scan; return names of images, number of skipped files by kind, and states of folders."""
        self.advance(None)
        names = PackedStrings(sorted(self._found))
        folders = PackedStrings([name for name, _, _ in self._folders])
        return {
            "text": names.text,
            "ends": names.ends,
            "kinds": np.array(list(self._skipped), dtype=np.str_),
            "numbers": np.array(list(self._skipped.values()), dtype=np.int64),
            "folders": folders.text,
            "folder_ends": folders.ends,
            "state": np.array([state for _, *state in self._folders], dtype=np.int64),
        }

    def _walk(self) -> Iterator[str]:
        pending = [str(self._root)]
        while pending:
            folder = pending.pop()
            parents = {os.path.realpath(folder)} | {os.path.realpath(p) for p in Path(folder).parents}
            subfolders, files = self._list_folder(folder)
            paths = [os.path.join(folder, name) for name in sorted(subfolders, reverse=True)]
            pending += [path for path in paths if os.path.realpath(path) not in parents]
            relative = os.path.relpath(folder, self._root)
            modified, inode = file_state(folder)
            self._folders.append((relative, modified if modified < self._started - SETTLE_NS else -1, inode))
            prefix = "" if relative == "." else relative + os.sep
            self._bar.update(len(files))
            yield from (prefix + name for name in files)

    def _list_folder(self, folder: str) -> tuple[list[str], list[str]]:
        """Return the names of the sub-folders and of the images."""
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
                            self._skipped[SPECIAL_FILES] += 1
                    elif kind := unread_extension(entry.name):
                        self._skipped[kind] += 1
        except OSError as error:
            raise UsageError(f"{folder} cannot be read ({error.strerror}); permit reading, or move it away") from None
        return subfolders, images
