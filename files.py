"""What a run leaves on the disk: files that are whole or not there, folders that can be written to, and what made them.

Origin: this project's own.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils import UsageError, get_world_size, is_main_process

TEMPORARY = ".esvit.tmp"  # how names end of files that are not whole yet


# --------------------------------------------------------------------------- files and folders


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; after the block it is on the disk and moved to `path`, or removed if that failed."""
    temporary = path.with_name(f".{path.name}{TEMPORARY}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_text(path: Path, remedy: str = "repair it", errors: str = "strict") -> str:
    """The text of a file from outside: UTF-8, with or without a byte-order mark, with any kind of line ends.

    Args:
        remedy: what such a file holds, or what to do.
        errors: see `bytes.decode`; `surrogateescape` keeps names of files that are no UTF-8.

    Raises:
        OSError: it cannot be read.
        UsageError: it is no such text.
    """
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is no file, which would be waited for or never end; {remedy}")
    try:
        text = path.read_text(encoding="utf-8-sig", errors=errors)
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text and errors != "replace":
        raise UsageError(f"{path} is not text in UTF-8; {remedy}")
    return text


@contextlib.contextmanager
def usable(folder: str | Path, flag: str = "--output_dir") -> Iterator[None]:
    """A block that reads and writes files of a folder, which `flag` names.

    Raises:
        UsageError: the disk refuses: it is full, read-only, damaged or no longer mounted, or there is no permission.
    """
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"{flag} {folder} cannot be used ({error.strerror or error}); see that its disk is there, writable and not full, "
            "or choose another"
        ) from error


def make_output_dir(folder: str | Path, flag: str = "--output_dir") -> Path:
    """Create the folder of a run, or another one that `flag` names, and see that the main process can write there.

    Raises:
        UsageError: it cannot be created or written to.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{flag} {folder} cannot be created ({error.strerror}); choose another") from None
    if is_main_process():
        with usable(folder, flag), tempfile.TemporaryFile(dir=folder):
            pass
    return Path(folder)


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
    for line in (Path(__file__).parent / "requirements.txt").read_text().splitlines():
        name = line.split(">")[0].split("<")[0].split("=")[0].strip()
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
