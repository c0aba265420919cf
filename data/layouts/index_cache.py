"""Build the index of a large data set once, and cache it on disk for all processes.

One process builds while the others wait on a lock file (see checkpoints/locks.py), on one machine or on several. A cache file is
written completely or not at all. Where no file can be written, each process builds its own index in memory. The cache folder may
be emptied at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from checkpoints import files, locks
from distributed.collectives import is_main_process

CACHE_VARIABLE = "ESVIT_CACHE"


def create_once(path: Path, write: Callable[[BinaryIO], None]) -> bool:
    """Let one process `write` the file `path` unless it exists; other processes wait for it.

    Returns:
        whether the file exists now; False where it cannot be written (a read-only or full disk).
    """
    try:
        if path.exists():
            return True
        path.parent.mkdir(parents=True, exist_ok=True)
        with locks.acquire(locks.lease(path.with_name(f".{path.name}.lock"))):
            if not path.exists():
                with files.atomic_write(path) as temporary, temporary.open("xb") as file:
                    write(file)
    except OSError:
        return path.exists()
    return True


def load_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """Return the arrays of a cache file; None if it is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def cached_arrays(
    path: Path,
    build: Callable[[], dict[str, np.ndarray]],
    is_valid: Callable[[dict[str, np.ndarray]], bool] = lambda arrays: True,
) -> dict[str, np.ndarray]:
    """Return the arrays cached in `path`; build and cache them if the file is missing, damaged or not valid."""
    built: list[dict[str, np.ndarray]] = []

    def write(file: BinaryIO) -> None:
        built.append(build())
        np.savez(file, **built[0])  # type: ignore[arg-type]

    for _ in range(2):
        state = file_state(path)
        if not create_once(path, write) or built:
            break
        arrays = load_arrays(path)
        if arrays is not None and is_valid(arrays):
            return arrays
        with contextlib.suppress(OSError):
            if file_state(path) == state:  # no other process has replaced it
                path.unlink()
    return built[0] if built else build()


def file_state(path: str | Path) -> tuple[int, int]:
    """Return modification time and inode of a file or folder; (-1, -1) if it is missing."""
    try:
        state = os.stat(path)
    except OSError:
        return -1, -1
    return state.st_mtime_ns, state.st_ino


def index_arrays(
    paths: Sequence[Path], suffix: str, build: Callable[[], dict[str, np.ndarray]], *, large: bool
) -> dict[str, np.ndarray]:
    """Return the arrays that `build` extracts from some files; cache them, if `large`, until a file changes.

    Raises:
        OSError: a file is missing.
    """
    return cached_arrays(cache_path(paths[0], f".{fingerprint(paths)}{suffix}"), build) if large else build()


def fingerprint(paths: Sequence[Path]) -> str:
    """Return a digest of the paths, sizes and modification times of some files, which changes when one of them does."""
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return hashlib.sha256(repr(states).encode("utf-8", "surrogateescape")).hexdigest()[:24]


def cache_path(target: Path, suffix: str) -> Path:
    """Return the cache file for the file or folder `target`, below $ESVIT_CACHE or else the user's cache folder.

    A user without a home directory, as in some containers, gets a path that cannot be written.
    """
    folder = os.environ.get(CACHE_VARIABLE) or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "esvit")
    name = hashlib.sha256(os.fsencode(target.resolve())).hexdigest()[:24]
    try:
        return Path(folder).expanduser() / f"{name}{suffix}"
    except RuntimeError:  # no home directory
        return Path(os.devnull, name)


def progress_bar(items: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """Return a `tqdm` bar that is shown on the main process's terminal only."""
    return tqdm(items, disable=not (is_main_process() and sys.stderr.isatty()), leave=False, **options)
