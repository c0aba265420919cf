"""Files that are made once and read by every process: whole or not at all, by one process while the others wait.

Processes need not know of each other, nor run on one machine: a lock beside the wanted file (see checkpoints/locks.py) tells
them apart, and
that of a dead owner is taken over. Where nothing can be written, callers keep what they made in memory.

The cache folder may be emptied at any time: what it held is made anew.

Origin: this project's own.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from checkpoints import locks

CACHE_VARIABLE = "ESVIT_CACHE"


def make_once(path: Path, write: Callable[[BinaryIO], None]) -> bool:
    """Let one process `write` the file `path`, unless it is there; the others wait until it is.

    Returns:
        whether it is there now; False where it cannot be written (a read-only or full disk), which says nothing of its content.
    """
    try:
        if path.exists():
            return True
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = locks.lease(path.with_name(f".{path.name}.lock"))
        locks.acquire(lock)
        try:
            if not path.exists():
                _write_whole(path, write)
        finally:
            lock.release()
    except OSError:
        return path.exists()
    return True


def arrays_once(place: Path, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays that the file `place` keeps, made and kept by one of all processes where it is not there or damaged."""
    made: list[dict[str, np.ndarray]] = []

    def write(file: BinaryIO) -> None:
        made.append(make())
        np.savez(file, **made[0])  # type: ignore[arg-type]

    if make_once(place, write) and not made:
        try:
            with np.load(place, allow_pickle=False) as kept:
                return dict(kept)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            with contextlib.suppress(OSError):
                place.unlink()
    return made[0] if made else make()


def state_of(files: Sequence[Path]) -> str:
    """What tells whether any of these files was changed: a digest of their places, sizes and times."""
    states = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(states).encode("utf-8", "surrogateescape")).hexdigest()[:24]


def cache_file(about: Path, suffix: str) -> Path:
    """Where to keep what was found out about the file or folder `about`: in $ESVIT_CACHE, else in the user's cache folder.

    A user without a home, as containers have them, has no cache either: nothing can be kept there.
    """
    folder = os.environ.get(CACHE_VARIABLE) or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "esvit")
    name = hashlib.sha256(os.fsencode(about.resolve())).hexdigest()[:24]
    try:
        return Path(folder).expanduser() / f"{name}{suffix}"
    except RuntimeError:  # an unknown user
        return Path(os.devnull, name)


def _write_whole(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Under a name of its own first, so that two owners of a lock that both believe the other dead do no harm."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with part.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
