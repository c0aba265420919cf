"""Batches of frozen features for training classifiers: computed in every epoch, or once and kept in memory."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

import data
from checkpoints import serialization
from data.loader import set_epoch
from distributed import collectives
from evaluation.features import FeatureFunction, LabeledFeatures, extract_splits, readable_batches
from training.checkpointing import StopRequest
from training.run_log import EpochMeter
from utils import UsageError, logger

SIGNAL_CHECK_STEPS = 50  # cached features have no other exchange between processes within an epoch
CACHE = "cached_features.pth"  # in --output_dir until the run is finished


class FeatureLoader(ABC):
    """Batches of training and validation features.

    Attributes:
        steps: batches of an epoch, equal on all processes.
        batch_size: of a process; in the last step the processes share the remaining images, and some may get none.
        training_images, validation_images: over all processes.
    """

    steps: int
    batch_size: int
    training_images: int
    validation_images: int

    def images_in_step(self, step: int) -> int:
        """Return the number of training images of a step over all processes."""
        batch = self.batch_size * collectives.get_world_size()
        return min(batch, self.training_images - step * batch)

    def without_padding(self, step: int, batch: LabeledFeatures) -> LabeledFeatures:
        """Drop the images that the sampler repeats in the last step so that all processes have equally many."""
        own = len(range(collectives.get_rank(), self.images_in_step(step), collectives.get_world_size()))
        return LabeledFeatures(*(part[:own] for part in batch))

    @abstractmethod
    def training(self, epoch: int, meter: EpochMeter, ending: StopRequest, done: int = 0) -> Iterator[LabeledFeatures]:
        """Yield this process's batches of a shuffled epoch; over all processes each image occurs exactly once.

        Args:
            meter: measures the time spent waiting for data.
            ending: ends the run after a signal.
            done: steps to skip.

        Raises:
            Stopped: a process received a signal.
        """

    @abstractmethod
    def validation(self) -> Iterator[LabeledFeatures]:
        """Yield this process's batches of the validation set; over all processes each image occurs exactly once."""


class OnlineFeatureLoader(FeatureLoader):
    """Features of new random crops in every epoch.

    Args:
        function: maps images to features, without gradients.
        val_set: None if it is evaluated otherwise.
        batch_size, num_workers: of each process.
        device: where features are computed.
    """

    def __init__(
        self,
        function: FeatureFunction,
        train_set: data.ImageDataset,
        val_set: data.ImageDataset | None,
        batch_size: int,
        num_workers: int,
        device: torch.device,
    ) -> None:
        sizes = batch_size, num_workers, device.type == "cuda"
        self.function, self.device = function, device
        self.train_loader = data.build_train_loader(train_set, *sizes, drop_last=False)
        self.val_loader = None if val_set is None else data.build_eval_loader(val_set, *sizes)
        self.steps, self.batch_size = len(self.train_loader), batch_size
        self.training_images, self.validation_images = len(train_set), 0 if val_set is None else len(val_set)
        self.train_tally = data.FailureTally(self.training_images)
        self.val_tally = data.FailureTally(self.validation_images)

    def _features(self, batch: data.Batch) -> LabeledFeatures:
        images, labels = (t.to(self.device, non_blocking=True) for t in (batch.views[0], batch.labels_B))
        return LabeledFeatures(self.function(images), labels)

    def training(self, epoch: int, meter: EpochMeter, ending: StopRequest, done: int = 0) -> Iterator[LabeledFeatures]:
        """Yield the batches of an epoch."""
        set_epoch(self.train_loader, epoch, skipped_batches=done)
        self.train_tally.start_pass()
        for step, batch in enumerate(meter.timed(self.train_loader), done):
            (votes,) = self.train_tally.exchange(batch.failures, self.device, not batch.views, ending.votes())
            ending.stop_if(votes, epoch, step)
            yield self.without_padding(step, self._features(batch))

    def validation(self) -> Iterator[LabeledFeatures]:
        """Yield the batches of the validation set."""
        assert self.val_loader is not None
        self.val_tally.start_pass()
        for batch in readable_batches(self.val_loader, self.val_tally, self.device):
            yield self._features(batch)


class CachedFeatureLoader(FeatureLoader):
    """Features that were computed once; every process holds all of them in main memory.

    Args:
        val_set: None if it is evaluated otherwise.
        batch_size: of each process.
        device: of the batches.
        seed: of the order of the epochs.
    """

    def __init__(
        self,
        train_set: LabeledFeatures,
        val_set: LabeledFeatures | None,
        batch_size: int,
        device: torch.device,
        seed: int,
    ) -> None:
        dataset = TensorDataset(*train_set)
        self.sampler: DistributedSampler[Any] = DistributedSampler(
            dataset, num_replicas=collectives.get_world_size(), rank=collectives.get_rank(), shuffle=True, seed=seed
        )
        self.loader = DataLoader(
            dataset, sampler=BatchSampler(self.sampler, batch_size, drop_last=False), batch_size=None
        )
        self.val_set, self.batch_size, self.device = val_set, batch_size, device
        self.steps = len(self.loader)
        self.training_images = len(train_set.labels_N)
        self.validation_images = 0 if val_set is None else len(val_set.labels_N)

    def training(self, epoch: int, meter: EpochMeter, ending: StopRequest, done: int = 0) -> Iterator[LabeledFeatures]:
        """Yield the batches of an epoch; processes agree on signals every `SIGNAL_CHECK_STEPS` steps."""
        self.sampler.set_epoch(epoch)
        for step, (features, labels) in islice(enumerate(meter.timed(self.loader)), done, None):
            if step % SIGNAL_CHECK_STEPS == 0:
                ending.stop_if(collectives.all_reduce_sum(torch.tensor(ending.votes())).item(), epoch, step)
            yield self.without_padding(step, LabeledFeatures(features.to(self.device), labels.to(self.device)))

    def validation(self) -> Iterator[LabeledFeatures]:
        """Yield the batches of the validation set."""
        assert self.val_set is not None
        own = [tensor[collectives.get_rank() :: collectives.get_world_size()] for tensor in self.val_set]
        for features, labels in zip(*(tensor.split(self.batch_size) for tensor in own)):
            if len(labels):  # an empty tensor is split into one empty part
                yield LabeledFeatures(features.to(self.device), labels.to(self.device))


# --------------------------------------------------------------------------- cached features


def build_feature_loader(
    args: argparse.Namespace,
    function: FeatureFunction,
    datasets: Sequence[data.ImageDataset],
    device: torch.device,
    run: dict[str, Any],
) -> FeatureLoader:
    """Build the loader of both data sets; with --cache_features, features are read from --output_dir or computed now.

    Args:
        datasets: training and validation images; the latter are left out if they are evaluated otherwise.
        run: identity of the run; features saved by another run are not used.
    """
    if not args.cache_features:
        train_set, val_set = datasets[0], datasets[1] if len(datasets) > 1 else None
        return OnlineFeatureLoader(function, train_set, val_set, args.batch_size_per_gpu, args.num_workers, device)
    path = Path(args.output_dir) / CACHE
    cached = load_cached(path, run)
    if cached is None:
        splits = extract_splits(datasets, {"network": function}, args, device, torch.device("cpu"), normalize=False)
        cached = [split["network"] for split in splits]
        if collectives.is_main_process():
            try:
                serialization.save_file({"run": run, "features": [list(part) for part in cached]}, path)
            except OSError as error:
                logger.warning("cannot write %s (%s); a resumed run will compute the features again", path, error)
    size = sum(part.features_NC.nbytes for part in cached) / 2**30
    logger.info("cached %.2f GiB of features on each process", size)
    train, val = cached[0], cached[1] if len(cached) > 1 else None
    return CachedFeatureLoader(train, val, args.batch_size_per_gpu, device, args.seed)


def load_cached(path: Path, run: dict[str, Any]) -> list[LabeledFeatures] | None:
    """Load the features that an interrupted run saved; None unless all processes can read them and they are of this `run`."""
    content: dict[str, Any] = {}
    if path.exists():
        try:
            content = serialization.load_file(path)
        except UsageError as error:
            logger.warning("%s; computing the features again", error)
        if content and content.get("run") != run:
            logger.info("%s was made with other flags, weights or images; computing the features again", path)
            content = {}
    if not all(collectives.all_gather_objects(bool(content))):
        return None
    logger.info("using the features in %s", path)
    return [LabeledFeatures(*part) for part in content["features"]]
