"""Write a state whose tensors are sharded over the processes as one ordinary checkpoint file.

No process holds the whole state: torch writes a file with empty space for the tensors, which are then gathered one at a time and
written to their places. The file is the one that a single process would write.
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
from torch.utils._pytree import tree_leaves, tree_map_only

from distributed import fsdp


@contextlib.contextmanager
def gathered(state: Any) -> Iterator[Iterator[Tensor] | None]:
    """Yield an iterator over the tensors of a sharded `state`, each whole; None if no tensor is sharded.

    A collective operation: tensors that the block leaves are gathered at its end, because the other processes take part.
    """
    tensors = [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]
    if not fsdp.is_sharded(tensors):
        yield None
        return
    whole = map(fsdp.whole, tensors)
    try:
        yield whole
    finally:
        for _ in whole:
            pass


def write(state: Any, tensors: Iterator[Tensor], path: Path) -> None:
    """Write `state` to `path` with the values of `tensors`, which are those of `state` in their order, but whole.

    Raises:
        OSError: The write fails.
    """
    # The memory of these tensors is never touched, so the system provides none.
    skeleton = tree_map_only(Tensor, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype), state)
    with torch.serialization.skip_data(), path.open("wb") as file:
        torch.save(skeleton, file)
    with zipfile.ZipFile(path) as archive:
        directory, records = archive.start_dir, archive.infolist()
    storages = [record for record in records if record.filename.split("/")[1] == "data"]
    storages.sort(key=lambda record: int(record.filename.split("/")[2]))  # numbered in the order of the tensors
    with path.open("r+b") as file:
        for record, tensor in zip(storages, tensors, strict=True):
            content = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            if content.nbytes != record.file_size:
                raise RuntimeError(f"{record.filename} has {record.file_size} bytes, its tensor {content.nbytes}")
            file.seek(_start(file, record))
            file.write(content)
            record.CRC = zlib.crc32(content)
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
