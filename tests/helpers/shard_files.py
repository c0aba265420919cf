"""Tiny tar shards and what a loader reads from them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from PIL import Image
from torch.utils.data import DataLoader

from data.layouts.shards import ShardStream
from data.loader import Batch, build_train_loader, set_epoch
from helpers.image_files import encoded

COUNTS = (5, 1, 7, 4, 6)  # images of the shards
IMAGES = sum(COUNTS)


def gray(value: int, size: int = 4) -> bytes:
    return encoded(lambda buffer: Image.new("L", (size, size), value).save(buffer, "PNG"))


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def loader_of(stream: ShardStream, batch_size: int = 2, workers: int = 0) -> DataLoader[Batch]:
    return build_train_loader(stream, batch_size, workers, pin_memory=False)


def one_epoch(loader: DataLoader[Batch], epoch: int) -> list[Batch]:
    set_epoch(loader, epoch)
    batches = list(loader)
    assert len(batches) == len(loader)
    return batches


def indices(batches: list[Batch]) -> list[int]:
    return [int(index) for batch in batches for index in batch.indices_B]
