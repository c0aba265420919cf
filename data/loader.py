"""From a dataset to batches: samplers for one or many processes, workers, and the count of unreadable files.

Training shows each process its share of a shuffled epoch; evaluation shows each image to exactly one process.

Origin: this project's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from data.datasets import ImageDataset, Refusal, Sample
from data.layouts.shards import ShardLoader, ShardStream
from data.samplers import ChunkSampler, processes_per_node
from data.workers import SteadyLoader, usable_workers
from distributed.collectives import all_gather_objects, all_reduce_sum, get_rank, get_world_size
from utils import UsageError, counted, logger

MAX_FAILED_SHARE = 0.01
LISTED_FAILURES = 10


DeviceTransform = Callable[[Sequence[Tensor], torch.device], list[Tensor]]


class Batch(NamedTuple):
    """Samples of one step on one process."""

    views: list[Tensor]  # V tensors (B, C, H, W); with `finish` what that makes the views of
    labels_B: Tensor  # (B, classes) where an image may have several
    indices_B: Tensor
    failures: list[str]
    finish: DeviceTransform | None = None  # what is left to do on the device

    def views_on(self, device: torch.device) -> list[Tensor]:
        """The finished views on `device`, which is not waited for."""
        if self.finish is not None:
            return self.finish(self.views, device)
        return [view.to(device, non_blocking=True) for view in self.views]


def collate(samples: Sequence[Sample], finish: DeviceTransform | None = None, finish_here: bool = False) -> Batch:
    """Stack samples view by view; without any view if one of them could not be read at all.

    `finish` makes the views of what the transform gave: in this process, or later where the batch is used.
    """
    complete = all(sample.views for sample in samples)
    views = [torch.stack(view) for view in zip(*(sample.views for sample in samples))] if complete else []
    labels = _stack_labels([sample.label for sample in samples])
    indices = torch.tensor([sample.image_index for sample in samples])
    failures = [failure for sample in samples for failure in sample.failures]
    if finish is None or not complete:
        return Batch(views, labels, indices, failures)
    if finish_here:
        return Batch(finish(views, torch.device("cpu")), labels, indices, failures)
    return Batch(views, labels, indices, failures, finish)


def _stack_labels(labels: Sequence[int | Tensor]) -> Tensor:
    several = next((label for label in labels if isinstance(label, Tensor)), None)
    if several is None:
        return torch.tensor(labels)
    return torch.stack([label if isinstance(label, Tensor) else torch.zeros_like(several) for label in labels])


def build_train_loader(
    dataset: ImageDataset | ShardStream,
    batch_size: int,
    num_workers: int,
    pin_memory: bool,
    drop_last: bool = True,
    finish: DeviceTransform | None = None,
    sampler: str = "distributed",
) -> DataLoader[Batch]:
    """Shuffled batches; the last incomplete one of an epoch is left out.

    `sampler`: `distributed` mixes all images, `chunk` those that lie beside each other (data/samplers.py). A stream of shards
    brings its own order, and takes no `chunk`.

    Without `drop_last` every image comes in every epoch; first ones come again where the processes' shares would differ.
    Batches are pinned for a CUDA device, on which they are then finished (`Batch.views_on`); elsewhere the workers do it.

    Raises:
        UsageError: less data than one batch on every process, with `drop_last`; or chunks of a stream.
    """
    world = get_world_size()
    if drop_last and len(dataset) < batch_size * world:
        few = counted(len(dataset), "image does", "images do")
        raise UsageError(
            f"{few} not fill one batch of {batch_size} x {counted(world, 'process', 'processes')}; lower --batch_size_per_gpu"
        )
    workers = usable_workers(num_workers)
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "num_workers": workers,
        "collate_fn": partial(collate, finish=finish, finish_here=not pin_memory),
        "pin_memory": pin_memory,
        "drop_last": drop_last,
        "persistent_workers": workers > 0,
        # Its own: starting workers draws a number, and a resumed run starts them once more than one that went through.
        "generator": torch.Generator(),
    }
    if isinstance(dataset, ShardStream):
        assert drop_last
        if sampler == "chunk":
            raise UsageError("--sampler chunk is for images at any place; shards are read in their order, leave it out")
        dataset.batch_size, dataset.rank, dataset.world = batch_size, get_rank(), world
        return ShardLoader(dataset, **options)
    order = LaterPart(_train_sampler(dataset, sampler, drop_last))
    return SteadyLoader(dataset, sampler=order, **options)


class LaterPart(Sampler[int]):
    """The order of a sampler without its first `skipped` indices, whose images are then neither read nor decoded.

    Its length stays that of the whole epoch.
    """

    def __init__(self, whole: DistributedSampler[Any] | ChunkSampler) -> None:
        self.whole = whole
        self.skipped = 0

    def __len__(self) -> int:
        return len(self.whole)

    def __iter__(self) -> Iterator[int]:
        return islice(iter(self.whole), self.skipped, None)


def _train_sampler(dataset: ImageDataset, name: str, drop_last: bool) -> DistributedSampler[Any] | ChunkSampler:
    rank, world = get_rank(), get_world_size()
    if name == "chunk":
        assert drop_last
        return ChunkSampler(len(dataset), rank, world, processes_per_node(), dataset.seed)
    return DistributedSampler(
        dataset, num_replicas=world, rank=rank, shuffle=True, seed=dataset.seed, drop_last=drop_last
    )


def set_epoch(loader: DataLoader[Batch], epoch: int, skipped_batches: int = 0) -> None:
    """Choose the order and the randomness of the next pass over a training loader, also in workers that run already.

    The first `skipped_batches` of the pass are left out; all others are as they would be after them.
    """
    assert isinstance(loader.dataset, ImageDataset | ShardStream)
    loader.dataset.epoch = epoch
    if isinstance(loader.dataset, ShardStream):
        loader.dataset.skipped_batches = skipped_batches
    else:
        assert isinstance(loader.sampler, LaterPart)
        assert loader.batch_size is not None
        loader.sampler.whole.set_epoch(epoch)
        loader.sampler.skipped = skipped_batches * loader.batch_size


def in_groups(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """Consecutive groups of `size`, micro-batches of one step; an incomplete last one is left out."""
    while len(group := list(islice(batches, size))) == size:
        yield group


class EveryNth(Sampler[int]):
    """This process's images in order: rank, rank + world, ... Nothing is padded, so the counts may differ by one."""

    def __init__(self, length: int) -> None:
        self.indices = range(get_rank(), length, get_world_size())

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def build_eval_loader(dataset: ImageDataset, batch_size: int, num_workers: int, pin_memory: bool) -> DataLoader[Batch]:
    """Batches of this process's share; over all processes each image comes exactly once."""
    return SteadyLoader(
        dataset,
        batch_size=batch_size,
        sampler=EveryNth(len(dataset)),
        num_workers=usable_workers(num_workers),
        collate_fn=collate,
        pin_memory=pin_memory,
    )


class FailureTally:
    """Counts the unreadable files of an epoch over all processes; the run stops if they exceed 1 % of the data.

    Args:
        images: Number of images of the dataset.
        seen: Unreadable files of this epoch so far, with the reason.
    """

    def __init__(self, images: int, seen: Mapping[str, str] | None = None) -> None:
        self.images = images
        self.seen = dict(seen or {})
        self._told = set(self.seen)

    def start_pass(self) -> None:
        """Forget the files of the previous epoch, which are read again."""
        self.seen = {}

    def exchange(
        self, failures: list[str], device: torch.device, incomplete: bool = False, votes: Sequence[float] = ()
    ) -> list[float]:
        """Exchange unreadable files and votes between processes, with one all-reduce; called by all processes before each step.

        Args:
            failures: Unreadable files of this process's batches, `path: reason`.
            device: Device of the all-reduce; the CPU avoids a synchronization with the GPU.
            incomplete: Whether a batch has no views because no readable image could replace a damaged one.
            votes: Votes of this process, such as to stop or to save.

        Returns:
            The sums of the votes over all processes.

        Raises:
            UsageError: More than 1 % of the files failed, a batch is incomplete, or a file is refused; on all processes.
        """
        counts = all_reduce_sum(torch.tensor([float(len(failures)), float(incomplete), *votes], device=device))
        failed, incomplete_batches, *sums = counts.tolist()
        if failed == 0:
            return sums
        everywhere = [failure for part in all_gather_objects(failures) for failure in part]
        refusal = next((failure for failure in everywhere if isinstance(failure, Refusal)), None)
        if refusal is not None:
            raise UsageError(str(refusal))
        for failure in everywhere:
            path, _, reason = failure.rpartition(": ")
            self.seen.setdefault(path, reason)
            if path not in self._told:
                self._told.add(path)
                logger.warning("cannot read %s (%s); another image takes its place", path, reason)
        if incomplete_batches or len(self.seen) > MAX_FAILED_SHARE * self.images:
            listed = "; ".join(f"{path} ({reason})" for path, reason in list(self.seen.items())[:LISTED_FAILURES])
            more = len(self.seen) - LISTED_FAILURES
            why = "and nothing readable took their place" if incomplete_batches else "more than 1 %"
            raise UsageError(
                f"{len(self.seen)} of {self.images} images cannot be read, {why}; remove or repair them: {listed}"
                + (f"; and {more} more" if more > 0 else "")
            )
        return sums
