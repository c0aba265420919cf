"""Opening shards wherever they lie, and saying in words why what came was not whole.

    shards/train-000000.tar                          a file
    https://HOST/train-000000.tar                    fetched by curl; ftps, sftp and scp too, gs by gsutil
    pipe:aws s3 cp s3://BUCKET/train-000000.tar -    whatever a shell command prints
    s3://BUCKET/train-000000.tar                     every other address by fsspec, with the package that it names (s3fs, ...)

A command's own last words on its standard error are the reason that is told.

Origin: this project's own; addresses and the commands that fetch are those of WebDataset (webdataset.gopen).
"""

from __future__ import annotations

import contextlib
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from typing import IO

import fsspec

from utils import UsageError

PIPE = "pipe:"
# In seconds; a server that sends a byte a second is alive.
CURL = ("curl", "-fsSL", "--connect-timeout", "20", "--speed-limit", "1", "--speed-time", "60")
COMMANDS = {**dict.fromkeys(("http", "https", "ftps", "sftp", "scp"), CURL), "gs": ("gsutil", "cat")}
LAST_WORDS = 300  # characters


def is_remote(path: str) -> bool:
    """Whether it is no path of a file. Pipes are run by a shell: only ever what the user typed."""
    return path.startswith(PIPE) or "://" in path


def check_here(path: str) -> None:
    """Stop on an address where files are looked into at any place.

    Raises:
        UsageError: it is one.
    """
    if is_remote(path):
        raise UsageError(f"{path} is not on this disk; only pre-training reads shards from elsewhere, copy them here")


@contextlib.contextmanager
def open_stream(path: str) -> Iterator[IO[bytes]]:
    """The bytes at a path or an address, once from the beginning to the end.

    Raises:
        OSError: they ended too early; in words.
        Exception: of any kind, where fsspec cannot open the address.
    """
    scheme = path.partition(":")[0]
    if not is_remote(path):
        with open(path, "rb") as file:
            yield file
    elif path.startswith(PIPE):
        with _output_of(path.removeprefix(PIPE)) as output:
            yield output
    elif scheme in COMMANDS:
        with _output_of([*COMMANDS[scheme], path]) as output:
            yield output
    else:
        with fsspec.open(path, "rb") as file:
            yield file


@contextlib.contextmanager
def _output_of(command: str | list[str]) -> Iterator[IO[bytes]]:
    """What a command prints.

    Raises:
        OSError: it failed; instead of the error that a reader of its tar met for that reason.
    """
    with tempfile.TemporaryFile() as words:
        with subprocess.Popen(
            command, shell=isinstance(command, str), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=words
        ) as process:
            assert process.stdout is not None
            damage = None
            try:
                yield process.stdout
            except tarfile.TarError as error:
                damage = error
            whole = not process.stdout.read(1)  # else its reader had enough, and it may well complain of that
        if process.returncode and whole:
            words.seek(0)
            said = words.read().decode("utf-8", "replace").strip().splitlines() or [f"exit code {process.returncode}"]
            raise OSError(said[-1][:LAST_WORDS]) from damage
    if damage is not None:
        raise damage
