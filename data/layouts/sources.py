"""Random access to encoded images: the `Source` interface and what its implementations share.

A source numbers its images and returns the bytes and the name of each; `ImageDataset` decodes them. Loader workers get a copy by
fork or pickle, so per-image data are kept in arrays, whose memory forked workers share, and each process opens files for itself
(`ForkSafeFile`). To add a data layout, write a `Source` and a function that returns a `Listing`, and register it in
`data.datasets.LAYOUTS`.
"""

from __future__ import annotations

import contextlib
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from utils import UsageError

UNLABELED = -1
MAX_LABEL = 2**31 - 1
MAX_IMAGE_BYTES = 2**30  # of an encoded image; a few larger compressed ones could fill the memory


class Source(ABC):
    """Encoded images by index."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the name of an image in messages: its path, if it is a file of its own."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """Return the encoded image.

        Raises:
            Exception: of any kind, if it cannot be read.
        """


class MultiLabels:
    """Multi-label targets, stored in two arrays.

    Args:
        classes_per_image: class indices of each image.
        num_classes: number of all classes.
    """

    def __init__(self, classes_per_image: Sequence[Sequence[int]], num_classes: int) -> None:
        self.ends = np.cumsum([len(row) for row in classes_per_image], dtype=np.int64)
        self.flat = np.array([number for row in classes_per_image for number in row], dtype=np.int32)
        self.num_classes = num_classes

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return a multi-hot vector (num_classes,)."""
        index = range(len(self))[index]
        multi_hot = np.zeros(self.num_classes, dtype=np.uint8)
        multi_hot[self.flat[self.ends[index - 1] if index else 0 : self.ends[index]]] = 1
        return multi_hot


class Listing(NamedTuple):
    """The images and labels found under a data path."""

    source: Source
    labels: Sequence[int] | np.ndarray | MultiLabels  # of each image: an index into `classes`, or UNLABELED
    classes: Sequence[str]  # empty without labels

    @classmethod
    def unlabeled(cls, source: Source) -> Listing:
        """Return a listing without labels."""
        return cls(source, np.full(len(source), UNLABELED), ())

    @classmethod
    def from_numbers(cls, source: Source, numbers: Sequence[int] | np.ndarray) -> Listing:
        """Return a listing whose classes are the distinct numbers, in ascending order."""
        found, label_N = np.unique(np.asarray(numbers), return_inverse=True)
        return cls(source, label_N, [str(number) for number in found])


class PackedStrings:
    """A sequence of strings, stored in two arrays: the concatenated bytes, and the end of each string."""

    def __init__(self, strings: Sequence[str]) -> None:
        encoded = [os.fsencode(string) for string in strings]
        self.ends = np.cumsum([len(string) for string in encoded], dtype=np.int64)
        self.text = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    @classmethod
    def from_arrays(cls, text: np.ndarray, ends: np.ndarray) -> PackedStrings:
        """Wrap the two arrays.

        Raises:
            ValueError: they are inconsistent.
        """
        strings = cls([])
        strings.text, strings.ends = text.astype(np.uint8, copy=False), ends.astype(np.int64, copy=False)
        steps = np.diff(ends, prepend=0, append=len(text))
        if (steps < 0).any() or steps[-1]:
            raise ValueError("the ends of the strings are inconsistent with their text")
        return strings

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[str]:
        text, begin = self.text.tobytes(), 0
        for end in self.ends.tolist():
            yield os.fsdecode(text[begin:end])
            begin = end

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]
        return os.fsdecode(self.text[self.ends[index - 1] if index else 0 : self.ends[index]].tobytes())


class ForkSafeFile:
    """A file for random reads, opened by each process on first use: a handle shared by processes would share its position."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: BinaryIO | None = None
        self._process = -1

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handle": None, "_process": -1}

    def read(self, offset: int, count: int) -> bytes:
        """Return `count` bytes from `offset` on.

        Raises:
            OSError: the file cannot be opened or read.
            EOFError: it is too short.
        """
        with self._reopen_after_error():
            content = self._seek(offset).read(checked_size(count))
        if len(content) < count:
            raise EOFError(f"{self.path.name} ends {count - len(content)} bytes too early")
        return content

    def read_line(self, offset: int, block: int = 2**17, fields: int | None = None) -> bytes:
        """Return the line at `offset` without its line end, or only its first tab-separated `fields`.

        Raises:
            OSError: the file cannot be opened or read.
            EOFError: it ends before `offset`.
        """
        line = b""
        with self._reopen_after_error():
            handle = self._seek(offset)
            while chunk := handle.read(block):
                line += chunk
                checked_size(len(line) * 3 // 4)  # size of the image after base64 decoding
                end = line.find(b"\n")
                if end >= 0:
                    line = line[:end]
                if fields is not None and line.count(b"\t") >= fields:
                    return b"\t".join(line.split(b"\t", fields)[:fields])
                if end >= 0:
                    break
        if not line and not chunk:
            raise EOFError(f"{self.path.name} ends before byte {offset}")
        return line.removesuffix(b"\r")

    def _seek(self, offset: int) -> BinaryIO:
        if self._handle is None or self._process != os.getpid():
            self._handle, self._process = self.path.open("rb"), os.getpid()
        self._handle.seek(offset)
        return self._handle

    @contextlib.contextmanager
    def _reopen_after_error(self) -> Iterator[None]:
        """Drop the handle on an OSError, since a stale handle of a network disk keeps failing."""
        try:
            yield
        except OSError:
            self._handle = None
            raise


class Files(Source):
    """Images that are files of their own.

    Args:
        paths: absolute, or relative to `root`.
        root: folder.
    """

    def __init__(self, paths: Sequence[str] | PackedStrings, root: str = "") -> None:
        self.paths = paths if isinstance(paths, PackedStrings) else PackedStrings(paths)
        self.root = root

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return os.path.join(self.root, self.paths[index])

    def read(self, index: int) -> bytes:
        return read_file(self.name(index))


class ArchiveMembers(Source):
    """Images at known offsets of archive files.

    Args:
        archives: paths.
        members: structured array with one row an image; field `archive` is the index of its archive.
        names: name of each image inside its archive.
    """

    def __init__(self, archives: Sequence[Path], members: np.ndarray, names: PackedStrings) -> None:
        self.archives = [ForkSafeFile(path) for path in archives]
        self.members = members
        self.names = names

    def __len__(self) -> int:
        return len(self.members)

    def name(self, index: int) -> str:
        return f"{self.archives[self.members[index]['archive']].path}@/{self.names[index]}"


class Subset(Source):
    """Some images of another source.

    Args:
        source: all images.
        indices: those to keep, in this order.
    """

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.source = source
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def read(self, index: int) -> bytes:
        return self.source.read(int(self.indices[index]))


def read_file(path: str | Path) -> bytes:
    """Return the content of a regular file; reading a pipe or a device might never return.

    Raises:
        OSError: it cannot be opened or read.
        ValueError: it is not a regular file, or larger than `MAX_IMAGE_BYTES`.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        state = os.fstat(file.fileno())
        if not stat.S_ISREG(state.st_mode):
            raise ValueError("it is a pipe, socket or device, not a regular file")
        return file.read(checked_size(state.st_size))


def checked_size(size: int) -> int:
    """Return `size`; raise ValueError if it exceeds `MAX_IMAGE_BYTES`."""
    if size > MAX_IMAGE_BYTES:
        raise ValueError(f"it has {size} bytes, an image may have at most {MAX_IMAGE_BYTES}")
    return size


def parse_label(text: str, where: str) -> int:
    """Parse the number of a class.

    Raises:
        UsageError: it is not a number in 0..MAX_LABEL; the message starts with `where`.
    """
    text = text.strip()
    if not text.isdecimal() or len(text) > 10 or int(text) > MAX_LABEL:
        raise UsageError(f"{where}: label '{text}' must be an integer from 0 to {MAX_LABEL}; correct it")
    return int(text)


def check_inside(path: str, where: str, container: str) -> None:
    """Raise UsageError if `path` is empty or absolute, or contains `..`, and so could leave `container`."""
    if any(part in ("", ".", "..") for part in path.split("/")):
        raise UsageError(f"{where}: '{path}' is not the path of an image inside {container}; write it relative to that")
