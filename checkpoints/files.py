"""Files and folders of a run: atomic writes, a lock against a second run, and provenance."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib.metadata
import json
import os
import shutil
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

TEMPORARY_SUFFIX = ".esvit.tmp"  # of `atomic_write`; leftovers are removed by the next run
NEW_FILE_SUFFIX = ".esvit.part"  # of `write_new`

_held: dict[Path, SoftFileLease] = {}  # locks of this process by folder


# --------------------------------------------------------------------------- files and folders


@contextlib.contextmanager
def atomic_write(path: Path, before_replacing: Callable[[], None] | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path`; after the block, sync that file to disk and let it replace `path`.

    Args:
        before_replacing: Called when the new file is on disk and the old one still in place.

    Raises:
        UsageError: Another run has taken over the folder.
    """
    check_lock(path.parent)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{TEMPORARY_SUFFIX}")
    try:
        yield temporary
        _sync(temporary)
        if before_replacing is not None:
            before_replacing()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_new(names: Iterable[Path], write: Callable[[Path], object]) -> Path:
    """Write a file atomically under the first of `names` that does not exist, and return that name.

    Args:
        names: Candidate paths in one folder.
        write: Writes the file to the path that it is given.

    Raises:
        FileExistsError: All names exist.
        OSError: The file cannot be written; nothing is left behind.
    """
    temporary: Path | None = None
    try:
        for path in names:
            if os.path.lexists(path):
                continue
            if temporary is None:
                temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{NEW_FILE_SUFFIX}")
                write(temporary)
                _sync(temporary)
            with contextlib.suppress(FileExistsError):  # created meanwhile
                _rename_new(temporary, path)
                return path
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


def write_with_backup(path: Path, content: bytes) -> None:
    """Write a file atomically, and keep a previous one with other content as `<name>.bak`."""
    if path.exists() and path.read_bytes() == content:
        logger.info("%s is unchanged", path)
        return
    with atomic_write(path, lambda: move_to_backup(path) if path.exists() else None) as temporary:
        temporary.write_bytes(content)
    logger.info("wrote %s", path)


def move_to_backup(path: Path) -> None:
    """Rename a file to `<name>.bak`."""
    os.replace(path, path.with_name(f"{path.name}.bak"))


def write_new_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Write a folder of files that appears under its name when it is complete.

    Args:
        write: Writes the files to the folder that it is given.

    Raises:
        FileExistsError: The path exists.
        OSError: A file cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{NEW_FILE_SUFFIX}")
    try:
        temporary.mkdir()
        write(temporary)
        for file in temporary.iterdir():
            _sync(file)
        if lexists(path):  # os.rename would replace an empty folder
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename_new(temporary: Path, path: Path) -> None:
    """Rename a file, or raise a FileExistsError instead of replacing another one."""
    try:
        os.link(temporary, path)  # unlike os.rename, never overwrites
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        path.open("x").close()
        os.replace(temporary, path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def lexists(path: Path) -> bool:
    """Return whether `path` exists, be it a dangling link; unlike `os.path.lexists`, let errors of the disk through."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


class DiskError(UsageError):
    """A folder or file cannot be read or written."""


def read_text(path: Path, remedy: str = "repair it", errors: str = "strict") -> str:
    """Return the text of a UTF-8 file, with or without a byte-order mark.

    Args:
        remedy: End of the error message: what to do, or what the file should hold.
        errors: As in `bytes.decode`; `surrogateescape` keeps file names that are not UTF-8.

    Raises:
        UsageError: The file cannot be read or is not UTF-8.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # reading a pipe or device may never end
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
def disk_errors(folder: str | Path, flag: str = "--output_dir") -> Iterator[None]:
    """Turn an OSError of a block that uses `folder` into a `DiskError` that names it and its flag."""
    try:
        yield
    except OSError as error:
        raise DiskError(
            f"{flag} {folder} cannot be used ({error.strerror or error}); check that its disk is mounted, writable and not full, "
            "or choose another"
        ) from error


def make_output_dir(folder: str | Path, flag: str = "--output_dir") -> Path:
    """Create the folder that `flag` names, and check that the main process can write there.

    Raises:
        UsageError: It cannot be created or written to, or its name is not UTF-8.
    """
    try:
        str(folder).encode()  # TensorBoard accepts UTF-8 only
        Path(folder).mkdir(parents=True, exist_ok=True)
    except UnicodeEncodeError:
        raise UsageError(f"{flag} {str(folder)!a} is not UTF-8; choose another") from None
    except OSError as error:
        raise UsageError(f"{flag} {folder} cannot be created ({error.strerror}); choose another") from None
    if is_main_process():
        with disk_errors(folder, flag), tempfile.TemporaryFile(dir=folder):
            pass
    return Path(folder)


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text; also raise a ValueError if it is nested too deeply for Python."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


# --------------------------------------------------------------------------- locked folders


@contextlib.contextmanager
def lock_folder(folder: str | Path, kind: str, flag: str = "--output_dir") -> Iterator[None]:
    """Create a folder and lock it against other runs that write the same files; a collective operation.

    Folders that were created here and are empty at the end are removed.

    Args:
        kind: Name of the files that are written, part of the name of the lock.
        flag: Flag that names the folder, for messages.

    Raises:
        UsageError: Another run holds the lock, or the folder cannot be written; raised on all processes.
    """
    folder = Path(folder)
    created: list[Path] = []
    with failing_together():
        if is_main_process():
            created = [parent for parent in (folder, *folder.parents) if not os.path.lexists(parent)]
            make_output_dir(folder, flag)
            try:
                _acquire(folder, kind, flag)
            except BaseException:
                _release(folder, kind, created)
                raise
    try:
        yield
    finally:
        _release(folder, kind, created)


def _acquire(folder: Path, kind: str, flag: str) -> None:
    """Acquire the lock of a folder, if necessary after waiting to see whether its owner is dead.

    Raises:
        UsageError: The owner is alive, or the folder cannot be written.
    """
    lock, since_file = locks.lease(folder / f".{kind}.lock"), _since_file(folder, kind)
    waiting = False

    def raise_if_alive(heartbeat: bool) -> None:
        nonlocal waiting
        if heartbeat or (not waiting and locks.has_live_local_owner(lock)):
            since = since_file.read_text().strip() if since_file.exists() else ""
            raise UsageError(
                f"{flag} {folder} is in use by another run ({locks.describe_owner(lock)}{since and f', since {since}'}); "
                f"stop it or wait for its end, or choose another {flag}"
            )
        if not waiting:
            waiting = True
            logger.warning(
                "%s is locked by %s; waiting up to %.0f seconds for a heartbeat",
                *(folder, locks.describe_owner(lock), locks.LEASE_DURATION),
            )

    with disk_errors(folder, flag):
        previous = locks.describe_owner(lock) if lock.owner is not None else ""
        locks.acquire(lock, raise_if_alive)
        if previous:
            logger.warning("%s has ended without unlocking %s; this run takes over", previous, folder)
        _held[folder.resolve()] = lock
        since_file.write_text(time.strftime("%Y-%m-%d %H:%M:%S\n"))


def _release(folder: Path, kind: str, created: Sequence[Path]) -> None:
    """Release the lock of a folder if this process holds it, and remove the `created` folders that are empty."""
    lock = _held.pop(folder.resolve(), None)
    if lock is not None:
        with contextlib.suppress(OSError):  # the disk may be unmounted
            _since_file(folder, kind).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            lock.release(force=True)
    with contextlib.suppress(OSError):
        for parent in created:
            parent.rmdir()


def _since_file(folder: Path, kind: str) -> Path:
    """Return the file with the time at which the folder was locked."""
    return folder / f".{kind}.since"


def check_lock(folder: Path) -> None:
    """Check that no other run has taken over a folder that this process has locked.

    Raises:
        UsageError: Another run has.
        OSError: The lock cannot be read.
    """
    lock = _held.get(folder.resolve())
    if lock is not None and not locks.renew(lock):
        raise UsageError(
            f"{folder} was taken over by another run ({locks.describe_owner(lock)}) because this one had no heartbeat for "
            f"{locks.LEASE_DURATION:.0f} seconds; this run stops and writes nothing more there"
        )


# --------------------------------------------------------------------------- provenance


def save_provenance(output_dir: Path, args: argparse.Namespace, config: Any, epochs_done: float = 0.0) -> None:
    """Write `config.yaml` (resolved) and `run.json` (arguments, git revision, versions); a resumed run adds a numbered pair."""
    suffix, number = "", 1
    while any((output_dir / name).exists() for name in (f"run{suffix}.json", f"config{suffix}.yaml")):
        number += 1
        suffix = f"_{number}"
    if config is not None:
        with atomic_write(output_dir / f"config{suffix}.yaml") as temporary:
            temporary.write_text(config.dump())
    record = {
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": sys.argv,
        "epochs_done": round(epochs_done, 4),  # before this start
        "args": vars(args),
        "seed": getattr(args, "seed", None),
        "world_size": get_world_size(),
        "git": git_revision(),
        "python": sys.version.split()[0],
        "packages": package_versions(),
    }
    with atomic_write(output_dir / f"run{suffix}.json") as temporary:
        temporary.write_text(json.dumps(record, indent=2) + "\n")


def git_revision() -> str:
    """Return the commit of the checkout, with `-dirty` if files differ from it; `unknown` outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def package_versions() -> dict[str, str]:
    """Return the versions of the installed packages of requirements.txt."""
    versions = {}
    for line in (Path(__file__).parent.parent / "requirements.txt").read_text().splitlines():
        name = line.split(">")[0].split("<")[0].split("=")[0].strip()
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


# --------------------------------------------------------------------------- numbered files


def numbered_names(path: Path) -> Iterator[Path]:
    """Yield the path itself, then the path with _2, _3, ... before its suffix, without end."""
    yield path
    yield from (path.with_name(f"{path.stem}_{number}{path.suffix}") for number in count(2))


def unused(path: Path) -> Path:
    """Return the first of a path's numbered names that does not exist."""
    return next(candidate for candidate in numbered_names(path) if not candidate.exists())


def numbered(path: Path) -> list[Path]:
    """Return the existing numbered names of a path, in order, up to the first gap."""
    return list(takewhile(Path.exists, numbered_names(path)))
