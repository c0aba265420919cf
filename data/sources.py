"""Where the bytes of images lie, apart from what is made of them.

A source numbers its images and gives each one's bytes and name; `ImageDataset` decodes them and does all the rest. Loader workers
get a copy of it by fork or by pickle: what it holds for every image lies in arrays, whose pages forked workers share, and a file
it reads from is opened by each process for itself (`OwnFile`). A further format is a further `Source` and a function that lists it.

Origin: this project's own.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

UNLABELLED = -1


class Source(ABC):
    """Encoded images by index."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """What messages call the image; its ending tells the kind of file. The path, where it is a file of its own."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The encoded image.

        Raises:
            Exception: of any kind, where it cannot be read.
        """


class Listing(NamedTuple):
    """What a data path holds."""

    source: Source
    labels: Sequence[int] | np.ndarray  # one an image: the index of its class, or UNLABELLED
    classes: Sequence[str]  # empty without labels


class Names:
    """Strings in two arrays, one long text and where each of them ends."""

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self.ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self.text = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.ends)

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
        if self._handle is None or self._process != os.getpid():
            self._handle, self._process = self.path.open("rb"), os.getpid()
        self._handle.seek(offset)
        content = self._handle.read(count)
        if len(content) < count:
            raise EOFError(f"{self.path.name} ends {count - len(content)} bytes too early")
        return content


class Files(Source):
    """Images that are files of their own."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = Names(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return self.paths[index]

    def read(self, index: int) -> bytes:
        return Path(self.paths[index]).read_bytes()
