"""Data loaders for training and evaluation, on one or many processes, and the count of unreadable images.

In training each process gets its share of a shuffled epoch; in evaluation each image goes to exactly one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, Sampler

from data.datasets import FatalFailure, ImageDataset, Sample
from data.layouts.shards import ShardLoader, ShardStream
from data.samplers import ChunkSampler, processes_per_node
from data.workers import SignalSafeLoader, usable_workers
from distributed.collectives import all_gather_objects, all_reduce_sum, get_rank, get_world_size
from utils import UsageError, counted, logger

MAX_FAILED_SHARE = 0.01
LISTED_FAILURES = 10

# The part of a transform that runs on a whole batch, on the training device: stacked samples to views.
DeviceTransform = Callable[[Sequence[Tensor], torch.device], list[Tensor]]


class Batch(NamedTuple):
    """The samples of one step on one process."""

    views: list[Tensor]  # V tensors (B, C, H, W); with a `device_transform`, its input
    labels_B: Tensor  # multi-hot (B, classes) for multi-label data
    indices_B: Tensor
    failures: list[str]
    device_transform: DeviceTransform | None = None  # still to be applied

    def views_on(self, device: torch.device) -> list[Tensor]:
        """Return the views on `device`, without waiting for the copy."""
        if self.device_transform is not None:
            return self.device_transform(self.views, device)
        return [view.to(device, non_blocking=True) for view in self.views]


def collate(
    samples: Sequence[Sample], device_transform: DeviceTransform | None = None, apply_now: bool = False
) -> Batch:
    """Stack samples view by view; if one has no views, the batch has none.

    Args:
        device_transform: applied to the stacked views: here, on the CPU, if `apply_now`, else by `Batch.views_on`.
    """
    complete = all(sample.views for sample in samples)
    views = [torch.stack(view) for view in zip(*(sample.views for sample in samples))] if complete else []
    if apply_now and complete and device_transform is not None:
        views = device_transform(views, torch.device("cpu"))
    return Batch(
        views,
        _stack_labels([sample.label for sample in samples]),
        torch.tensor([sample.image_index for sample in samples]),
        [failure for sample in samples for failure in sample.failures],
        None if apply_now or not complete else device_transform,
    )


def _stack_labels(labels: Sequence[int | Tensor]) -> Tensor:
    multi_hot = next((label for label in labels if isinstance(label, Tensor)), None)
    if multi_hot is None:
        return torch.tensor(labels)
    return torch.stack([label if isinstance(label, Tensor) else torch.zeros_like(multi_hot) for label in labels])


def build_train_loader(
    dataset: ImageDataset | ShardStream,
    batch_size: int,
    num_workers: int,
    pin_memory: bool,
    drop_last: bool = True,
    device_transform: DeviceTransform | None = None,
    sampler: str = "distributed",
) -> DataLoader[Batch]:
    """Build a loader of shuffled batches.

    Args:
        drop_last: leave out the last incomplete batch of an epoch; else every image occurs in every epoch, and the first ones
            are repeated to give all processes the same number.
        pin_memory: pin batches for a CUDA device, where `device_transform` is applied; without it the workers apply it.
        sampler: `distributed` shuffles all images, `chunk` nearby ones (data/samplers.py); a `ShardStream` has its own order.

    Raises:
        UsageError: fewer images than one batch on every process, with `drop_last`; or `chunk` with a `ShardStream`.
    """
    world = get_world_size()
    if drop_last and len(dataset) < batch_size * world:
        remedy = f"lower it to {len(dataset) // world} or less" if len(dataset) >= world else "use fewer processes"
        raise UsageError(
            f"--batch_size_per_gpu {batch_size} on {counted(world, 'process', 'processes')} needs more than the "
            f"{counted(len(dataset), 'image')} of the dataset for one batch; {remedy}"
        )
    workers = usable_workers(num_workers)
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "num_workers": workers,
        "collate_fn": partial(collate, device_transform=device_transform, apply_now=not pin_memory),
        "pin_memory": pin_memory,
        "drop_last": drop_last,
        "persistent_workers": workers > 0,
        # Starting workers draws a number; from the global generator, resumed and uninterrupted runs would then differ.
        "generator": torch.Generator(),
    }
    if isinstance(dataset, ShardStream):
        assert drop_last
        if sampler == "chunk":
            raise UsageError("--sampler chunk does not apply to shards, which are read sequentially; leave it out")
        dataset.batch_size, dataset.rank, dataset.world = batch_size, get_rank(), world
        return ShardLoader(dataset, **options)
    return SignalSafeLoader(dataset, sampler=ResumableSampler(_train_sampler(dataset, sampler, drop_last)), **options)


class ResumableSampler(Sampler[int]):
    """Another sampler without its first `skipped` indices; the length remains that of the whole epoch."""

    def __init__(self, sampler: DistributedSampler[Any] | ChunkSampler) -> None:
        self.sampler = sampler
        self.skipped = 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        return islice(iter(self.sampler), self.skipped, None)


def _train_sampler(dataset: ImageDataset, name: str, drop_last: bool) -> DistributedSampler[Any] | ChunkSampler:
    rank, world = get_rank(), get_world_size()
    if name == "chunk":
        assert drop_last
        return ChunkSampler(len(dataset), rank, world, processes_per_node(), dataset.seed)
    return DistributedSampler(
        dataset, num_replicas=world, rank=rank, shuffle=True, seed=dataset.seed, drop_last=drop_last
    )


def set_epoch(loader: DataLoader[Batch], epoch: int, skipped_batches: int = 0) -> None:
    """Set the epoch of the next pass over a training loader, which determines its order and randomness.

    The first `skipped_batches` of the pass are left out and do not change the others. Running workers are updated too.
    """
    assert isinstance(loader.dataset, ImageDataset | ShardStream)
    loader.dataset.epoch = epoch
    if isinstance(loader.dataset, ShardStream):
        loader.dataset.skipped_batches = skipped_batches
    else:
        assert isinstance(loader.sampler, ResumableSampler)
        assert loader.batch_size is not None
        loader.sampler.sampler.set_epoch(epoch)
        loader.sampler.skipped = skipped_batches * loader.batch_size


def in_groups(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """Group consecutive batches into the micro-batches of one step; an incomplete last group is left out."""
    while len(group := list(islice(batches, size))) == size:
        yield group


class StridedSampler(Sampler[int]):
    """Every world-size-th index from the rank on, in order; without padding, so that counts may differ by one."""

    def __init__(self, length: int) -> None:
        self.indices = range(get_rank(), length, get_world_size())

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def build_eval_loader(dataset: ImageDataset, batch_size: int, num_workers: int, pin_memory: bool) -> DataLoader[Batch]:
    """Build a loader in which each image occurs exactly once over all processes."""
    return SignalSafeLoader(
        dataset,
        batch_size=batch_size,
        sampler=StridedSampler(len(dataset)),
        num_workers=usable_workers(num_workers),
        collate_fn=collate,
        pin_memory=pin_memory,
    )


class FailureTally:
    """Counts the unreadable files of an epoch over all processes; the run stops if they exceed 1 % of the data.

    Args:
        images: Number of images of the dataset.
        seen: Unreadable files of this epoch so far, with the reason.
        consequence: What becomes of an unreadable file, for the log.
    """

    def __init__(
        self, images: int, seen: Mapping[str, str] | None = None, consequence: str = "another image takes its place"
    ) -> None:
        self.images = images
        self.consequence = consequence
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
        refusal = next((failure for failure in everywhere if isinstance(failure, FatalFailure)), None)
        if refusal is not None:
            raise UsageError(str(refusal))
        for failure in everywhere:
            path, _, reason = failure.rpartition(": ")
            self.seen.setdefault(path, reason)
            if path not in self._told:
                self._told.add(path)
                logger.warning("cannot read %s (%s); %s", path, reason, self.consequence)
        if incomplete_batches or len(self.seen) > MAX_FAILED_SHARE * self.images:
            listed = "; ".join(f"{path} ({reason})" for path, reason in list(self.seen.items())[:LISTED_FAILURES])
            more = len(self.seen) - LISTED_FAILURES
            why = "and nothing readable took their place" if incomplete_batches else "more than 1 %"
            raise UsageError(
                f"{len(self.seen)} of {self.images} images cannot be read, {why}; remove or repair them: {listed}"
                + (f"; and {more} more" if more > 0 else "")
            )
        return sums
