"""Features of frozen networks, extracted in parallel over processes: what every evaluation starts from.

Shapes: N images, B images of a batch, C channels.
Origin: the evaluation protocols of DINO (Caron et al., ICCV 2021) section 4.1 and of EsViT (Li et al., ICLR 2022) section 4.1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset
from yacs.config import CfgNode

import data
import utils
from checkpoints.loading import load_backbone
from checkpoints.serialization import load_file, saved_config
from config.loading import load_config
from data.datasets import Transform
from data.layouts.lists import keep_listed
from data.loader import set_epoch
from data.transforms import augment
from distributed import collectives
from models import Backbone, build_model, load_arch_config
from training.checkpointing import StopRequest
from training.run_log import EpochMeter, one_pass
from utils import UsageError, logger

FeatureFunction = Callable[[Tensor], Tensor]
ASKED_EVERY = 50  # steps of cached features, which exchange no count of failures that a wish to end could travel with


class LabeledFeatures(NamedTuple):
    """Features of images, with their labels."""

    features_NC: Tensor
    labels_N: Tensor


# --------------------------------------------------------------------------- network and images


def network_config(args: argparse.Namespace, drop_path: float | None = None) -> CfgNode:
    """The config of `--arch`: --cfg, or what the checkpoint itself holds, or the published one; KEY VALUE pairs go on top.

    Reads `arch`, `cfg`, `opts` and `pretrained_weights` of the arguments; `drop_path`: see `load_arch_config`.

    Raises:
        UsageError: see `load_arch_config`, `load_config` and `checkpoint.load_file`.
    """
    source = args.cfg
    if source is None and args.pretrained_weights:
        source = saved_config(args.pretrained_weights)
        if source is not None:
            logger.info("the network is built by %s; --cfg takes another", source)
            try:
                load_config(source)  # alone: what is wrong with it no KEY VALUE pair mends
            except UsageError as error:
                raise UsageError(f"{error}; name a yaml with --cfg") from None
    return load_arch_config(args.arch, source, args.opts, drop_path)


def frozen_backbone(args: argparse.Namespace, config: CfgNode, weights: str | Path, device: torch.device) -> Backbone:
    """The backbone of `--arch` in evaluation mode, with the weights of a file, or with random ones (of `--seed`) if it is empty.

    Reads `arch`, `patch_size`, `seed`, `checkpoint_key`, `allow_partial` and `token` of the arguments.

    Raises:
        UsageError: see `checkpoint.load_backbone` and `Backbone.choose_token`.
    """
    torch.manual_seed(args.seed)
    backbone = build_model(args.arch, config, is_teacher=True, patch_size=args.patch_size)
    backbone.choose_token(args.token)
    if weights:
        report = load_backbone(backbone, weights, args.checkpoint_key, allow_partial=args.allow_partial)
        logger.info("%s: %s", weights, report)
    return backbone.to(device).eval().requires_grad_(False)


def tell_avgpool(wanted: bool, backbone: Backbone) -> None:
    """Say so where mean patches are wanted beside class tokens and the network has none."""
    if wanted and not backbone.num_cls_tokens:
        logger.info("--avgpool_patchtokens appends nothing: %s has no class tokens", type(backbone).__name__)


def evaluation_size(args: argparse.Namespace, config: CfgNode) -> int:
    """Pixels of a side of the images that an evaluation shows: --image_size, or the side of MODEL.IMAGE_SIZE.

    Raises:
        UsageError: that has two different sides.
    """
    height, width = config.MODEL.IMAGE_SIZE
    if args.image_size is None and height != width:
        raise UsageError(
            f"MODEL.IMAGE_SIZE [{height}, {width}] is not square, evaluation shows squares; pass --image_size PIXELS"
        )
    return args.image_size or height


def labeled_datasets(
    args: argparse.Namespace,
    config: CfgNode,
    train_transform: Transform,
    val_transform: Transform,
    train_list: str | None = None,
) -> tuple[data.ImageDataset, data.ImageDataset]:
    """Training and validation images with labels, which both count in the training set's classes.

    Reads `data_path`, `seed` and the layout of the arguments. Of the training images those of the text file `train_list` count,
    if it is given.

    Raises:
        UsageError: no such images, the same ones for both, classes in val that train has not, or a list that does not fit.
    """
    in_chans = config.MODEL.SPEC.IN_CHANS
    augment.check_normalization(config.INPUT.MEAN, config.INPUT.STD, in_chans)
    train, val = (
        data.build_dataset(
            args.data_path,
            part,
            transform,
            in_chans,
            args.seed,
            need_labels=True,
            layout=data.layout_of(args),
            value_range=config.INPUT.RANGE,
        )
        for part, transform in (("train", train_transform), ("val", val_transform))
    )
    if _same_images(train, val):
        raise UsageError(
            f"{args.data_path} gives the same {len(train)} images for training and validation, which would score them by "
            "themselves; put them in DIR/{train,val}, or judge each by all others with eval_knn.py --leave_one_out"
        )
    unknown = sorted(set(val.classes) - set(train.classes))
    if unknown:
        first = int(np.argmax(val.labels == val.classes.index(unknown[0])))
        raise UsageError(
            f"val under {args.data_path} has classes that train has not: {', '.join(unknown[:5])}; "
            f"{val.source.name(first)} is of class {unknown[0]}"
        )
    val.use_classes(train.classes)
    if train_list:
        keep_listed(train, train_list)
    return train, val


def _same_images(train: data.ImageDataset, val: data.ImageDataset) -> bool:
    """Whether both sets are the same images in the same order, by the names of up to a hundred of them."""
    if len(train) != len(val):
        return False
    some = np.linspace(0, len(train) - 1, min(len(train), 100)).astype(int).tolist()
    return all(os.path.realpath(train.source.name(i)) == os.path.realpath(val.source.name(i)) for i in some)


def data_identity(train: data.ImageDataset, val: data.ImageDataset) -> dict[str, Any]:
    """What tells whether a run that goes on sees the data it began with, wherever that lies."""
    digest = hashlib.sha256(json.dumps(train.classes).encode())
    for part in (train, val):
        digest.update(part.labels.tobytes())
    return {
        "numbers of images and classes": [len(train), len(val), len(train.classes)],
        "digest of classes and labels": digest.hexdigest()[:16],
    }


# --------------------------------------------------------------------------- extraction


@torch.no_grad()
def extract_features(
    loader: DataLoader[data.Batch],
    functions: Mapping[str, FeatureFunction],
    device: torch.device,
    keep_on: torch.device,
    label: str,
    normalize: bool = True,
    dtype: torch.dtype = torch.float32,
) -> dict[str, LabeledFeatures]:
    """One pass over the images for all `functions`; every process returns all images in the data set's order.

    Features are scaled to length 1 if they are to be normalized, and kept as `dtype` on `keep_on`: never are more than a
    batch of each process on another device.

    Raises:
        UsageError: more than 1 % of the images cannot be read.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in functions}
    labels: list[Tensor] = []
    indices: list[Tensor] = []
    failures: list[str] = []
    incomplete = False
    with one_pass(loader, label) as batches:
        for batch in batches:
            failures += batch.failures
            incomplete = incomplete or not batch.views
            if incomplete:
                break
            images = batch.views[0].to(device, non_blocking=True)
            for name, function in functions.items():
                features_BC = function(images).float()
                parts[name].append((F.normalize(features_BC, dim=-1) if normalize else features_BC).to(keep_on, dtype))
            labels.append(batch.labels_B)
            indices.append(batch.indices_B)
    data.FailureTally(len(loader.dataset)).exchange(failures, device, incomplete)  # type: ignore[arg-type]
    order_N = torch.cat(list(_exchange(indices, device, keep_on))).argsort(stable=True)
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(len(order_N), device=keep_on)  # of what all processes give, in the data set's order
    labels_N = _put(_exchange(labels, device, keep_on), place_N)
    return {
        name: LabeledFeatures(_put(_exchange(rows, device, keep_on), place_N), labels_N) for name, rows in parts.items()
    }


def _exchange(rows: list[Tensor], device: torch.device, keep_on: torch.device) -> Iterator[Tensor]:
    """All processes' rows on `keep_on`, batch by batch; empties the list on the way, so that rows are not held twice.

    Backends exchange tensors of `device` only if that is a GPU (nccl), else those of the CPU (gloo).
    """
    exchange_on = device if collectives.is_distributed() else keep_on
    rows.reverse()
    for _ in range(max(collectives.all_gather_objects(len(rows)))):
        own = rows.pop() if rows else torch.zeros(0)
        for part in collectives.all_gather_rows(own.to(exchange_on)):
            yield part.to(keep_on)


def _put(batches: Iterator[Tensor], place_N: Tensor) -> Tensor:
    """The rows of all batches in one tensor, each in its place."""
    placed_N, done = place_N, 0
    for batch in batches:
        if done == 0:
            placed_N = batch.new_empty(len(place_N), *batch.shape[1:])
        placed_N[place_N[done : done + len(batch)]] = batch
        done += len(batch)
    return placed_N


def load_cached(path: Path, run: dict[str, Any]) -> list[LabeledFeatures] | None:
    """The features that an interrupted run left in a file, if all processes find them whole and of this `run`."""
    content: dict[str, Any] = {}
    if path.exists():
        try:
            content = load_file(path)
        except UsageError as error:
            logger.warning("%s; the features are computed again", error)
        if content and content.get("run") != run:
            logger.info("%s is of other flags, weights or images; the features are computed again", path)
            content = {}
    if not all(collectives.all_gather_objects(bool(content))):
        return None
    logger.info("features are those of %s", path)
    return [LabeledFeatures(*part) for part in content["features"]]


def block_features(
    backbone: Backbone, n_last_blocks: Sequence[int], avgpool_patchtokens: bool, device: torch.device, precision: str
) -> FeatureFunction:
    """Images to the features of the largest of `n_last_blocks`, of which every classifier takes the last entries."""

    @torch.no_grad()
    def function(images_BCHW: Tensor) -> Tensor:
        with utils.autocast(device, precision):
            features = backbone.forward_return_n_last_blocks(images_BCHW, max(n_last_blocks), avgpool_patchtokens)
        return features.float()

    return function


# --------------------------------------------------------------------------- epochs


class FeatureSource(ABC):
    """Where batches of features come from.

    Attributes:
        steps: batches of an epoch, on each process alike.
        batch_size: of a process; those of the last step share what is left, and may get none of it.
        training_images, validation_images: over all processes.
    """

    steps: int
    batch_size: int
    training_images: int
    validation_images: int

    def images_of(self, step: int) -> int:
        """How many training images all processes see in a step of an epoch."""
        batch = self.batch_size * collectives.get_world_size()
        return min(batch, self.training_images - step * batch)

    def once(self, step: int, batch: LabeledFeatures) -> LabeledFeatures:
        """This process's batch without what a sampler repeats at the end of an epoch to give all processes equally many."""
        own = len(range(collectives.get_rank(), self.images_of(step), collectives.get_world_size()))
        return LabeledFeatures(*(part[:own] for part in batch))

    @abstractmethod
    def training(self, epoch: int, meter: EpochMeter, ending: StopRequest, done: int = 0) -> Iterator[LabeledFeatures]:
        """This process's share of a shuffled epoch, in which over all processes each image comes exactly once.

        The first `done` steps are left out. `meter` counts the time spent waiting for the others.

        Raises:
            Stopped: somebody asked for it, see `StopRequest.stop_if`.
        """

    @abstractmethod
    def validation(self) -> Iterator[LabeledFeatures]:
        """This process's share of the validation set; over all processes each image comes exactly once."""


class ImageFeatures(FeatureSource):
    """Features computed anew in every epoch, of new random crops.

    Args:
        function: images to features, without gradients.
        train_set, val_set: images.
        batch_size, num_workers: of each process.
        device: where features are computed.
    """

    def __init__(
        self,
        function: FeatureFunction,
        train_set: data.ImageDataset,
        val_set: data.ImageDataset,
        batch_size: int,
        num_workers: int,
        device: torch.device,
    ) -> None:
        sizes = batch_size, num_workers, device.type == "cuda"
        self.function, self.device = function, device
        self.train_loader = data.build_train_loader(train_set, *sizes, drop_last=False)
        self.val_loader = data.build_eval_loader(val_set, *sizes)
        self.steps, self.batch_size = len(self.train_loader), batch_size
        self.training_images, self.validation_images = len(train_set), len(val_set)
        self.train_tally, self.val_tally = data.FailureTally(len(train_set)), data.FailureTally(len(val_set))

    def _features(self, batch: data.Batch) -> LabeledFeatures:
        images, labels = (t.to(self.device, non_blocking=True) for t in (batch.views[0], batch.labels_B))
        return LabeledFeatures(self.function(images), labels)

    def training(self, epoch: int, meter: EpochMeter, ending: StopRequest, done: int = 0) -> Iterator[LabeledFeatures]:
        """See `FeatureSource.training`."""
        set_epoch(self.train_loader, epoch, skipped_batches=done)
        self.train_tally.start_pass()
        for step, batch in enumerate(meter.timed(self.train_loader), done):
            (stop_votes,) = self.train_tally.exchange(batch.failures, self.device, not batch.views, ending.votes())
            ending.stop_if(stop_votes, epoch, step)
            yield self.once(step, self._features(batch))

    def validation(self) -> Iterator[LabeledFeatures]:
        """See `FeatureSource.validation`."""
        failures: list[str] = []
        incomplete = False
        self.val_tally.start_pass()
        for batch in self.val_loader:
            failures += batch.failures
            incomplete = not batch.views
            if incomplete:
                break
            yield self._features(batch)
        self.val_tally.exchange(failures, self.device, incomplete)


class CachedFeatures(FeatureSource):
    """Features that were computed once; every process holds all of them in main memory.

    Args:
        train_set, val_set: features.
        batch_size: of each process.
        device: where batches are wanted.
        seed: of the order of the epochs.
    """

    def __init__(
        self, train_set: LabeledFeatures, val_set: LabeledFeatures, batch_size: int, device: torch.device, seed: int
    ) -> None:
        dataset = TensorDataset(*train_set)
        self.order: DistributedSampler[Any] = DistributedSampler(
            dataset, num_replicas=collectives.get_world_size(), rank=collectives.get_rank(), shuffle=True, seed=seed
        )
        self.loader = DataLoader(
            dataset, sampler=BatchSampler(self.order, batch_size, drop_last=False), batch_size=None
        )
        self.val_set, self.batch_size, self.device = val_set, batch_size, device
        self.steps = len(self.loader)
        self.training_images, self.validation_images = len(train_set.labels_N), len(val_set.labels_N)

    def training(self, epoch: int, meter: EpochMeter, ending: StopRequest, done: int = 0) -> Iterator[LabeledFeatures]:
        """See `FeatureSource.training`; asked every `ASKED_EVERY` steps."""
        self.order.set_epoch(epoch)
        for step, (features, labels) in islice(enumerate(meter.timed(self.loader)), done, None):
            if step % ASKED_EVERY == 0:
                ending.stop_if(collectives.all_reduce_sum(torch.tensor(ending.votes())).item(), epoch, step)
            yield self.once(step, LabeledFeatures(features.to(self.device), labels.to(self.device)))

    def validation(self) -> Iterator[LabeledFeatures]:
        """See `FeatureSource.validation`."""
        own = [tensor[collectives.get_rank() :: collectives.get_world_size()] for tensor in self.val_set]
        for features, labels in zip(*(tensor.split(self.batch_size) for tensor in own)):
            if len(labels):  # an empty share is split into one empty part
                yield LabeledFeatures(features.to(self.device), labels.to(self.device))
