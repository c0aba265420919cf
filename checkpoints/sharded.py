"""Write a state whose tensors are sharded over the processes as one ordinary checkpoint file.

No process holds the whole state: torch writes a file with empty space for the tensors, which are then gathered one at a time and
written to their places. It loads like the file of a single process.
"""

from __future__ import annotations

import contextlib
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from checkpoints.serialization import write_file
from distributed import fsdp

DESCRIPTOR = b"PK\x07\x08"  # of the checksum and size that may follow the content of a record


@contextlib.contextmanager
def gathered(state: Any) -> Iterator[Iterator[Tensor] | None]:
    """Yield an iterator over the tensors of a sharded `state`, each whole; None if no tensor is sharded.

    A collective operation: tensors that the block has not consumed are gathered at its end, because the other processes take part.
    An error of a gather ends the iterator.
    """
    tensors = [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]
    if not fsdp.is_sharded(tensors):
        yield None
        return
    gathers = (fsdp.full_tensor(tensor) for tensor in tensors)
    try:
        yield gathers
    finally:
        for _ in gathers:
            pass


def write(state: Any, tensors: Iterator[Tensor], path: Path) -> None:
    """Write `state` to `path` with the values of `tensors`, which are those of `state` in their order, but whole.

    Raises:
        OSError: The write fails.
    """
    with FakeTensorMode():  # tensors without memory
        skeleton = tree_map_only(Tensor, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype), state)
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        write_file(skeleton, path)
    with zipfile.ZipFile(path) as archive:
        directory, records = archive.start_dir, archive.infolist()
    storages = [record for record in records if record.filename.split("/")[1] == "data"]
    storages.sort(key=lambda record: int(record.filename.split("/")[2]))  # numbered in the order of the tensors
    with path.open("r+b") as file:
        for record, tensor in zip(storages, tensors, strict=True):
            content = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            assert content.nbytes == record.file_size, f"{record.filename} is the place of another tensor"
            file.seek(_start(file, record))
            file.write(content)
            record.CRC = zlib.crc32(content)
            if file.read(4) == DESCRIPTOR:
                file.write(struct.pack("<I", record.CRC))
        _write_checksums(file, directory, records)


def _start(file: BinaryIO, record: zipfile.ZipInfo) -> int:
    """Return the position of a record's content, which follows a header, a name and a field of varying length."""
    file.seek(record.header_offset + 26)
    return record.header_offset + 30 + sum(struct.unpack("<2H", file.read(4)))


def _write_checksums(file: BinaryIO, directory: int, records: list[zipfile.ZipInfo]) -> None:
    """Write the CRC-32 of all records to the zip file's directory, whose entries have their order."""
    for record in records:
        file.seek(directory + 16)
        file.write(struct.pack("<I", record.CRC))
        file.seek(directory + 28)
        directory += 46 + sum(struct.unpack("<3H", file.read(6)))
