"""Where the bytes of images lie, apart from what is made of them.

A source numbers its images and gives each one's bytes and name; `ImageDataset` decodes them and does all the rest. Loader workers
get a copy of it by fork or by pickle: what it holds for every image lies in arrays, whose pages forked workers share, and a file
it reads from is opened by each process for itself (`OwnFile`). A further format is a further `Source` and a function that lists it.

Origin: this project's own.
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
LARGEST_LABEL = 2**31 - 1
LARGEST_FILE = 2**30  # bytes of an encoded image; of more, a few packed ones could fill the memory


class Source(ABC):
    """Encoded images by index."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """What messages call the image. The path, where it is a file of its own."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The encoded image.

        Raises:
            Exception: of any kind, where it cannot be read.
        """


def read_file(path: str | Path) -> bytes:
    """The content of a regular file: a pipe would be waited for, and a device may never end.

    Raises:
        OSError: it cannot be opened or read.
        ValueError: it is something else than a file, or too large for an image.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        state = os.fstat(file.fileno())
        if not stat.S_ISREG(state.st_mode):
            raise ValueError("it is no regular file but a pipe, socket or device")
        return file.read(checked_size(state.st_size))


def checked_size(size: int) -> int:
    """`size` itself.

    Raises:
        ValueError: it is beyond `LARGEST_FILE`.
    """
    if size > LARGEST_FILE:
        raise ValueError(f"it has {size} bytes, more than {LARGEST_FILE}, the most that an image may have")
    return size


class MultiLabels:
    """Any number of classes for each image, in two arrays.

    Args:
        numbers: the classes of each image.
        classes: how many there are.
    """

    def __init__(self, numbers: Sequence[Sequence[int]], classes: int) -> None:
        self.ends = np.cumsum([len(row) for row in numbers], dtype=np.int64)
        self.numbers = np.array([number for row in numbers for number in row], dtype=np.int32)
        self.classes = classes

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> np.ndarray:
        """(classes,) 1 for each class of the image, else 0."""
        index = range(len(self))[index]
        vector = np.zeros(self.classes, dtype=np.uint8)
        vector[self.numbers[self.ends[index - 1] if index else 0 : self.ends[index]]] = 1
        return vector


class Listing(NamedTuple):
    """What a data path holds."""

    source: Source
    labels: Sequence[int] | np.ndarray | MultiLabels  # one an image: the index of its class, or UNLABELED
    classes: Sequence[str]  # empty without labels


class Names:
    """Strings in two arrays, one long text and where each of them ends."""

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self.ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self.text = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    @classmethod
    def of(cls, text: np.ndarray, ends: np.ndarray) -> Names:
        """From the two arrays.

        Raises:
            ValueError: they do not fit together.
        """
        names = cls([])
        names.text, names.ends = text.astype(np.uint8, copy=False), ends.astype(np.int64, copy=False)
        steps = np.diff(ends, prepend=0, append=len(text))
        if (steps < 0).any() or steps[-1]:
            raise ValueError("the ends of names do not fit their text")
        return names

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


class OwnFile:
    """A file to read from, opened by each process on its first use: processes that share a handle would move its position."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: BinaryIO | None = None
        self._process = -1

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handle": None, "_process": -1}

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset` on.

        Raises:
            OSError: the file cannot be opened or read.
            EOFError: it ends before.
        """
        with self._anew_after_errors():
            content = self._at(offset).read(checked_size(count))
        if len(content) < count:
            raise EOFError(f"{self.path.name} ends {count - len(content)} bytes too early")
        return content

    def read_line(self, offset: int, block: int = 2**17, fields: int | None = None) -> bytes:
        """The line that begins at `offset`, without its end; of only so many tab-separated `fields` if given.

        Raises:
            OSError: the file cannot be opened or read.
            EOFError: it ends before.
        """
        line = b""
        with self._anew_after_errors():
            handle = self._at(offset)
            while chunk := handle.read(block):
                line += chunk
                checked_size(len(line) * 3 // 4)  # of what base64 holds
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

    def _at(self, offset: int) -> BinaryIO:
        if self._handle is None or self._process != os.getpid():
            self._handle, self._process = self.path.open("rb"), os.getpid()
        self._handle.seek(offset)
        return self._handle

    @contextlib.contextmanager
    def _anew_after_errors(self) -> Iterator[None]:
        """What the handle of a network disk met once it may meet for ever."""
        try:
            yield
        except OSError:
            self._handle = None
            raise


class Files(Source):
    """Images that are files of their own.

    Args:
        paths: of the files.
        root: what the paths are relative to, if anything.
    """

    def __init__(self, paths: Sequence[str] | Names, root: str = "") -> None:
        self.paths = paths if isinstance(paths, Names) else Names(paths)
        self.root = root

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """See `Source.name`."""
        return os.path.join(self.root, self.paths[index])

    def read(self, index: int) -> bytes:
        """See `Source.read`."""
        return read_file(self.name(index))


class Chosen(Source):
    """Some images of another source.

    Args:
        source: all images.
        indices: those that are chosen, in their order.
    """

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.source = source
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        """See `Source.name`."""
        return self.source.name(int(self.indices[index]))

    def read(self, index: int) -> bytes:
        """See `Source.read`."""
        return self.source.read(int(self.indices[index]))


def parse_label(text: str, where: str) -> int:
    """A class that a text file gives as a number.

    Raises:
        UsageError: it is none; `where` says in which line.
    """
    text = text.strip()
    if not text.isdecimal() or len(text) > 10 or int(text) > LARGEST_LABEL:
        raise UsageError(f"{where}: the label '{text}' is not a whole number from 0 to {LARGEST_LABEL}; repair it")
    return int(text)


def check_inside(path: str, where: str, of: str) -> None:
    """Stop on a name that would lead out of the place it belongs to.

    Raises:
        UsageError: an empty, absolute or climbing path.
    """
    if any(part in ("", ".", "..") for part in path.split("/")):
        raise UsageError(f"{where}: '{path}' is no path of an image inside {of}; write it relative to that")
