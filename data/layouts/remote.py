"""Open shards on this disk, on a server or from a command.

    shards/train-000000.tar                          a local file
    https://HOST/train-000000.tar                    fsspec; http(s) needs package aiohttp, s3 s3fs, gs gcsfs, ...
    pipe:aws s3 cp s3://BUCKET/train-000000.tar -    the standard output of a shell command

Origin: the `pipe:` scheme is WebDataset's.
"""

from __future__ import annotations

import contextlib
import io
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from typing import IO

import fsspec

from utils import UsageError

PIPE = "pipe:"
CONNECT_SECONDS, READ_SECONDS = 20, 60  # timeouts of http: for a connection, and between two pieces of data
HTTP_BUFFER = 2**18  # bytes
MAX_ERROR_LENGTH = 300  # characters


def is_remote(path: str) -> bool:
    """Return whether `path` is a URL or a `pipe:` command, which is run by a shell."""
    return path.startswith(PIPE) or "://" in path


def require_local(path: str) -> None:
    """Raise UsageError if `path` is remote: images at random positions are read from local files only."""
    if is_remote(path):
        raise UsageError(
            f"{path} is not a local path; only pre-training reads remote shards, copy them to this machine"
        )


@contextlib.contextmanager
def open_stream(path: str) -> Iterator[IO[bytes]]:
    """Open a path, URL or command for one sequential read.

    Raises:
        OSError: the data ended too early, with the reason.
        ImportError: the package that fsspec needs for the URL is not installed.
        Exception: of any kind that fsspec raises.
    """
    if path.startswith(PIPE):
        with _run_command(path.removeprefix(PIPE)) as output:
            yield output
    elif path.startswith(("http://", "https://")):
        with _open_http(path) as file:
            yield file
    elif is_remote(path):
        with fsspec.open(path, "rb") as file:
            yield file
    else:
        with open(path, "rb") as file:
            yield file


@contextlib.contextmanager
def _open_http(url: str) -> Iterator[IO[bytes]]:
    try:
        import aiohttp
    except ImportError:
        raise ImportError("package aiohttp is not installed, which http and https need; pip install aiohttp") from None
    # aiohttp's own limit is 5 minutes for a whole response, and a shard is read as fast as training uses it.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
    filesystem = fsspec.filesystem("http", client_kwargs={"timeout": timeout, "trust_env": True})
    try:
        # block_size=0 streams one response, and any given size saves the request for it. Without a buffer each of tarfile's
        # reads of 10 kB would wait for fsspec's thread.
        with io.BufferedReader(filesystem.open(url, "rb", block_size=0, size=1), HTTP_BUFFER) as stream:
            yield stream
    except aiohttp.ClientResponseError as error:
        raise OSError(f"HTTP error {error.status} {error.message}") from None
    except FileNotFoundError:
        raise OSError("HTTP error 404 Not Found") from None
    except aiohttp.ClientPayloadError:
        raise OSError("the connection was lost before the end of the file") from None


@contextlib.contextmanager
def _run_command(command: str) -> Iterator[IO[bytes]]:
    """Run a shell command and yield its standard output.

    Raises:
        OSError: the command failed, with the last line of its standard error; this replaces a `TarError` in the block.
    """
    with tempfile.TemporaryFile() as stderr:
        with subprocess.Popen(
            command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr
        ) as process:
            assert process.stdout is not None
            tar_error = None
            try:
                yield process.stdout
            except tarfile.TarError as error:
                tar_error = error
            # Else the reader stopped early, and the command fails only because of the closed pipe.
            finished = not process.stdout.read(1)
        if process.returncode and finished:
            stderr.seek(0)
            lines = stderr.read().decode("utf-8", "replace").strip().splitlines() or [f"exit code {process.returncode}"]
            raise OSError(lines[-1][:MAX_ERROR_LENGTH]) from tar_error
    if tar_error is not None:
        raise tar_error
