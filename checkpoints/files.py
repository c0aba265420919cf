"""What a run leaves on the disk: files that are whole or not there, folders that one run at a time writes to, and what made them.

Origin: this project's own.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from filelock import SoftFileLease

from checkpoints import locks
from distributed.collectives import failing_together, get_world_size, is_main_process
from utils import UsageError, logger

TEMPORARY = ".esvit.tmp"  # how names end of files that are not whole yet and take the place of others; the next run removes them
UNBORN = ".esvit.part"  # of those that take no file's place

_held: dict[Path, SoftFileLease] = {}  # this process's locks, by their folders


# --------------------------------------------------------------------------- files and folders


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name of its own beside `path` to write to; after the block it is on the disk and moved to `path`, else removed.

    Raises:
        UsageError: another run has taken over the folder from this one, see `sole_run`.
    """
    check_held(path.parent)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{TEMPORARY}")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_new(names: Iterable[Path], write: Callable[[Path], object]) -> Path:
    """Let `write` write a file, which then appears whole, under the first of `names` that no file has; return that name.

    Raises:
        FileExistsError: all are taken.
        OSError: the disk refuses; nothing is left there.
    """
    temporary: Path | None = None
    try:
        for path in names:
            if os.path.lexists(path):
                continue
            if temporary is None:
                temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{UNBORN}")
                write(temporary)
                _sync(temporary)
            with contextlib.suppress(FileExistsError):  # it came meanwhile
                _name_new(temporary, path)
                return path
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


def _name_new(temporary: Path, path: Path) -> None:
    """Give a file its name, unless that is taken."""
    try:
        os.link(temporary, path)  # unlike a renaming it overwrites nothing
    except FileExistsError:
        raise
    except OSError:  # a disk without links
        path.open("x").close()
        os.replace(temporary, path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def is_there(path: Path) -> bool:
    """Whether anything has this name, be it a link to nothing.

    Raises:
        OSError: the disk does not tell.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


class DiskError(UsageError):
    """A folder or file that the disk refuses to write or read."""


def read_text(path: Path, remedy: str = "repair it", errors: str = "strict") -> str:
    """The text of a file from outside: UTF-8, with or without a byte-order mark, with any kind of line ends.

    Args:
        remedy: what such a file holds, or what to do.
        errors: see `bytes.decode`; `surrogateescape` keeps names of files that are no UTF-8.

    Raises:
        UsageError: it cannot be read, or is no such text.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for, a device may never end
        raise UsageError(f"{path} is a folder, pipe, socket or device; {remedy}")
    try:
        text = path.read_text(encoding="utf-8-sig", errors=errors)
    except UnicodeDecodeError:
        text = "\0"
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}); {remedy}") from None
    if "\0" in text and errors != "replace":
        raise UsageError(f"{path} is not text in UTF-8; {remedy}")
    return text


@contextlib.contextmanager
def usable(folder: str | Path, flag: str = "--output_dir") -> Iterator[None]:
    """A block that reads and writes files of a folder, which `flag` names.

    Raises:
        DiskError: the disk refuses: it is full, read-only, damaged or no longer mounted, or there is no permission.
    """
    try:
        yield
    except OSError as error:
        raise DiskError(
            f"{flag} {folder} cannot be used ({error.strerror or error}); see that its disk is there, writable and not full, "
            "or choose another"
        ) from error


def make_output_dir(folder: str | Path, flag: str = "--output_dir") -> Path:
    """Create the folder of a run, or another one that `flag` names, and see that the main process can write there.

    Raises:
        UsageError: it cannot be created or written to, or its name is not UTF-8.
    """
    try:
        str(folder).encode()  # TensorBoard takes no other names
        Path(folder).mkdir(parents=True, exist_ok=True)
    except UnicodeEncodeError:
        raise UsageError(f"{flag} {str(folder)!a} is no text in UTF-8; choose another") from None
    except OSError as error:
        raise UsageError(f"{flag} {folder} cannot be created ({error.strerror}); choose another") from None
    if is_main_process():
        with usable(folder, flag), tempfile.TemporaryFile(dir=folder):
            pass
    return Path(folder)


def parse_json(text: str | bytes) -> Any:
    """The value that a JSON text holds.

    Raises:
        ValueError: it is not JSON, or nested deeper than Python reads.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


# --------------------------------------------------------------------------- one run in a folder


@contextlib.contextmanager
def sole_run(folder: str | Path, kind: str, flag: str = "--output_dir") -> Iterator[None]:
    """Hold a folder, which is made, against other runs that write the same files there. All processes enter; the main one holds it.

    A folder that was made for it and holds nothing in the end is removed again. `kind` is one word that tells which files.

    Raises:
        UsageError: another run holds it, or the folder cannot be made or written to, on all processes at once.
    """
    folder = Path(folder)
    made: list[Path] = []
    with failing_together():
        if is_main_process():
            made = [place for place in (folder, *folder.parents) if not os.path.lexists(place)]
            make_output_dir(folder, flag)
            try:
                _take(folder, kind, flag)
            except BaseException:
                _let_go(folder, kind, made)
                raise
    try:
        yield
    finally:
        _let_go(folder, kind, made)


def _take(folder: Path, kind: str, flag: str) -> None:
    """Take the lock of a folder, or wait until its owner turns out to be dead.

    Raises:
        UsageError: it lives, or the disk refuses.
    """
    lock = locks.lease(folder / f".{kind}.lock")
    waiting = False

    def refuse_if_alive(beaten: bool) -> None:
        nonlocal waiting
        if beaten or (not waiting and locks.runs_here(lock)):
            since = _since(folder, kind).read_text().strip() if _since(folder, kind).exists() else ""
            raise UsageError(
                f"{flag} {folder} is being written to by another run ({locks.name_of_owner(lock)}"
                f"{since and f', since {since}'}); let it end or stop it, or choose another {flag}"
            )
        if not waiting:
            waiting = True
            logger.warning(
                "%s was written to by %s; waiting for up to %.0f seconds to see whether it lives",
                *(folder, locks.name_of_owner(lock), locks.ABANDONED_AFTER),
            )

    with usable(folder, flag):
        before = locks.name_of_owner(lock) if lock.owner is not None else ""
        locks.take(lock, refuse_if_alive)
        if before:
            logger.warning("%s, which wrote to %s, has ended without saying so; this run takes over", before, folder)
        _held[folder.resolve()] = lock
        _since(folder, kind).write_text(time.strftime("%Y-%m-%d %H:%M:%S\n"))


def _let_go(folder: Path, kind: str, made: Sequence[Path]) -> None:
    """Release the lock of a folder, if this process has it, and remove the folders that were `made` for it and are empty."""
    lock = _held.pop(folder.resolve(), None)
    if lock is not None:
        with contextlib.suppress(OSError):  # the disk may be gone
            _since(folder, kind).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            lock.release(force=True)
    with contextlib.suppress(OSError):
        for place in made:
            place.rmdir()


def _since(folder: Path, kind: str) -> Path:
    """The file that says when the owner of a folder's lock took it."""
    return folder / f".{kind}.since"


def check_held(folder: Path) -> None:
    """Stop if this process had a folder for itself, and another run has it now, because this one seemed dead.

    Raises:
        UsageError: so it is.
        OSError: the disk does not tell.
    """
    lock = _held.get(folder.resolve())
    if lock is not None and not locks.hold_on(lock):
        raise UsageError(
            f"{folder} was taken over by another run ({locks.name_of_owner(lock)}) while this one gave no sign of life for "
            f"{locks.ABANDONED_AFTER:.0f} seconds; this one ends and writes nothing more there"
        )


# --------------------------------------------------------------------------- provenance


def save_provenance(output_dir: Path, args: argparse.Namespace, config: Any) -> None:
    """Write what made this run: `config.yaml` (resolved) and `run.json` (arguments, git revision, versions, seed).

    A resumed run adds a numbered pair beside the first, nothing is overwritten.
    """
    suffix, number = "", 1
    while any((output_dir / name).exists() for name in (f"run{suffix}.json", f"config{suffix}.yaml")):
        number += 1
        suffix = f"_{number}"
    if config is not None:
        with whole_file(output_dir / f"config{suffix}.yaml") as temporary:
            temporary.write_text(config.dump())
    record = {
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": sys.argv,
        "args": vars(args),
        "seed": getattr(args, "seed", None),
        "world_size": get_world_size(),
        "git": git_revision(),
        "python": sys.version.split()[0],
        "packages": package_versions(),
    }
    with whole_file(output_dir / f"run{suffix}.json") as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n")


def git_revision() -> str:
    """The checkout's commit, with `-dirty` when files differ from it; `unknown` outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def package_versions() -> dict[str, str]:
    """Versions of the packages named in requirements.txt that are installed."""
    versions = {}
    for line in (Path(__file__).parent.parent / "requirements.txt").read_text().splitlines():
        name = line.split(">")[0].split("<")[0].split("=")[0].strip()
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


# --------------------------------------------------------------------------- numbered files


def numbered_names(path: Path) -> Iterator[Path]:
    """The path itself, then with _2, _3, ... before its ending, without end."""
    yield path
    yield from (path.with_name(f"{path.stem}_{number}{path.suffix}") for number in count(2))


def unused(path: Path) -> Path:
    """The first of a path's names that does not exist."""
    return next(candidate for candidate in numbered_names(path) if not candidate.exists())


def numbered(path: Path) -> list[Path]:
    """The names that `unused` gave out for a path, as far as they exist without a gap, in their order."""
    return list(takewhile(Path.exists, numbered_names(path)))
