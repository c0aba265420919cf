"""Frozen networks, labeled images, and features extracted from them on several processes.

Shapes: N images, B images of a batch, C channels.
Origin: the evaluation protocols of DINO (Caron et al., ICCV 2021) section 4.1 and of EsViT (Li et al., ICLR 2022) section 4.1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from yacs.config import CfgNode

import data
import utils
from checkpoints.loading import load_backbone
from checkpoints.network import SavedNetwork, is_network, saved_network
from config.choices import PATCH_SIZE
from config.loading import load_config
from data.datasets import Transform
from data.layouts.image_list import select_listed
from data.transforms import augment
from distributed import collectives
from models import Backbone, build_model, list_models, load_arch_config
from training.run_log import tracked
from utils import UsageError, logger

FeatureFunction = Callable[[Tensor], Tensor]
NETWORK, PIXELS, UNTRAINED = "network", "raw pixels", "untrained network"  # names of features in results


class LabeledFeatures(NamedTuple):
    """Features of images and the labels of these images."""

    features_NC: Tensor
    labels_N: Tensor


# --------------------------------------------------------------------------- network and images


def network_config(args: argparse.Namespace, drop_path: float | None = None, patch_size: int = PATCH_SIZE) -> CfgNode:
    """Return the config of the evaluated network, and set --arch and --patch_size from the checkpoint where they are not given.

    The config is that of --cfg, else of the checkpoint, else the published one of --arch; KEY VALUE pairs override its entries.
    Reads `arch`, `cfg`, `patch_size`, `opts`, `pretrained_weights` and `allow_partial` of `args`.

    Args:
        drop_path: overrides MODEL.SPEC.DROP_PATH_RATE.
        patch_size: default where the checkpoint has none.

    Raises:
        UsageError: invalid config or checkpoint, no --arch, or one that is not the checkpoint's.
    """
    weights = args.pretrained_weights
    saved = saved_network(weights) if weights else SavedNetwork()
    if args.arch is None and saved.arch is None:
        found = f"checkpoint '{weights}' does not name its architecture" if weights else "--random_weights needs --arch"
        raise UsageError(
            f"{found}; pass --arch, one of {', '.join(list_models())}, and --cfg for a network of another size"
        )
    if args.arch and saved.arch and not is_network(args.arch, saved.arch):
        if not args.allow_partial:
            raise UsageError(
                f"--arch {args.arch}: checkpoint '{weights}' was trained with --arch {saved.arch}; leave --arch out, or pass "
                "--allow_partial to load the tensors that fit"
            )
        saved = SavedNetwork()  # the config and patch size are not those of --arch
    args.arch = args.arch or saved.arch
    args.patch_size = args.patch_size or saved.patch_size or patch_size
    source, overrides = args.cfg, args.opts
    if source is None and saved.config is not None:
        source, overrides = saved.config, [*saved.overrides, *args.opts]
        logger.info("the network is %s of %s; --cfg overrides it", args.arch, source)
        try:
            load_config(source, saved.overrides)  # without the KEY VALUE pairs, which cannot repair it
        except UsageError as error:
            raise UsageError(f"{error}; name a yaml with --cfg") from None
    return load_arch_config(args.arch, source, overrides, drop_path)


def frozen_backbone(args: argparse.Namespace, config: CfgNode, weights: str | Path, device: torch.device) -> Backbone:
    """Build the backbone of --arch in evaluation mode, with the weights of a file, or with random ones if `weights` is empty.

    Reads `arch`, `patch_size`, `pretrained_weights`, `seed`, `checkpoint_key`, `allow_partial` and `token` of `args`.

    Raises:
        UsageError: invalid weights or --token.
    """
    torch.manual_seed(args.seed)
    backbone = build_model(args.arch, config, is_teacher=True, patch_size=args.patch_size)
    backbone.choose_token(args.token)
    if weights:
        report = load_backbone(backbone, weights, args.checkpoint_key, allow_partial=args.allow_partial)
        logger.info("%s: %s", weights, report)
    elif not args.pretrained_weights:
        logger.warning("--random_weights: the network is untrained, it has random weights")
    return backbone.to(device).eval().requires_grad_(False)


def check_blocks(backbone: Backbone, n_last_blocks: Sequence[int], avgpool_patchtokens: bool) -> None:
    """Raise UsageError if the backbone has fewer than --n_last_blocks blocks; log if --avgpool_patchtokens has no effect."""
    blocks = sum(backbone.stage_depths)
    for number in n_last_blocks:
        if not 1 <= number <= blocks:
            raise UsageError(f"--n_last_blocks {number} must be in 1..{blocks}, the number of blocks of this network")
    if avgpool_patchtokens and not backbone.num_cls_tokens:
        logger.info("--avgpool_patchtokens has no effect: %s has no class tokens", type(backbone).__name__)


def evaluation_size(args: argparse.Namespace, config: CfgNode) -> int:
    """Return the side of evaluation images in pixels: --image_size, or the side of MODEL.IMAGE_SIZE.

    Raises:
        UsageError: MODEL.IMAGE_SIZE is not square and --image_size is not given.
    """
    height, width = config.MODEL.IMAGE_SIZE
    if args.image_size is None and height != width:
        raise UsageError(
            f"MODEL.IMAGE_SIZE [{height}, {width}] is not square, as evaluation images are; pass --image_size PIXELS"
        )
    return args.image_size or height


def labeled_datasets(
    data_path: str,
    config: CfgNode,
    train_transform: Transform,
    val_transform: Transform,
    *,
    seed: int,
    layout: str = "files",
    train_list: str | None = None,
) -> tuple[data.ImageDataset, data.ImageDataset]:
    """Open the labeled training and validation images; labels of both are indices into the training classes.

    Args:
        train_list: text file with the names of the training images to use; None uses all.

    Raises:
        UsageError: no such images, identical sets, validation classes that are not training classes, or an invalid list.
    """
    in_chans = config.MODEL.SPEC.IN_CHANS
    augment.check_normalization(config.INPUT.MEAN, config.INPUT.STD, in_chans)
    train, val = (
        data.build_dataset(
            data_path, split, transform, in_chans, seed, need_labels=True, layout=layout, value_range=config.INPUT.RANGE
        )
        for split, transform in (("train", train_transform), ("val", val_transform))
    )
    if _same_images(train, val):
        raise UsageError(
            f"{data_path} gives the same {len(train)} images for training and validation; put them in DIR/{{train,val}}, "
            "or use eval_knn.py --leave_one_out, which compares each image with all others"
        )
    unknown = sorted(set(val.classes) - set(train.classes))
    if unknown:
        first = int(np.argmax(val.labels == val.classes.index(unknown[0])))
        raise UsageError(
            f"val of {data_path} has classes that are not in train: {', '.join(unknown[:5])} "
            f"({val.source.name(first)} is of class {unknown[0]}); add training images, or remove them from val"
        )
    val.use_classes(train.classes)
    if train_list:
        select_listed(train, train_list)
    return train, val


def _same_images(train: data.ImageDataset, val: data.ImageDataset) -> bool:
    """Return whether both sets hold the same files in the same order, comparing at most 100 names."""
    if len(train) != len(val):
        return False
    some = np.linspace(0, len(train) - 1, min(len(train), 100)).astype(int).tolist()
    return all(os.path.realpath(train.source.name(i)) == os.path.realpath(val.source.name(i)) for i in some)


def data_identity(train: data.ImageDataset, val: data.ImageDataset) -> dict[str, Any]:
    """Return values that are equal for equal classes and labels, wherever the images are stored."""
    digest = hashlib.sha256(json.dumps(train.classes).encode())
    for part in (train, val):
        digest.update(part.labels.tobytes())
    return {
        "numbers of images and classes": [len(train), len(val), len(train.classes)],
        "digest of classes and labels": digest.hexdigest()[:16],
    }


# --------------------------------------------------------------------------- extraction


def readable_batches(
    batches: Iterable[data.Batch], tally: data.FailureTally, device: torch.device
) -> Iterator[data.Batch]:
    """Yield the batches of a pass, and count the images that cannot be read at its end; every process calls this.

    Raises:
        UsageError: more than 1 % of the images cannot be read.
    """
    failures: list[str] = []
    incomplete = False
    for batch in batches:
        failures += batch.failures
        incomplete = not batch.views
        if incomplete:
            break
        yield batch
    tally.exchange(failures, device, incomplete)


def extract_splits(
    datasets: Sequence[data.ImageDataset],
    functions: Mapping[str, FeatureFunction],
    args: argparse.Namespace,
    device: torch.device,
    keep_on: torch.device,
    normalize: bool = True,
    dtype: torch.dtype = torch.float32,
) -> list[dict[str, LabeledFeatures]]:
    """Extract features of the training and the validation images, or of one set; see `extract_features`.

    Reads `batch_size_per_gpu` and `num_workers` of `args`.
    """
    loaders = [
        data.build_eval_loader(dataset, args.batch_size_per_gpu, args.num_workers, pin_memory=device.type == "cuda")
        for dataset in datasets
    ]
    return [
        extract_features(loader, functions, device, keep_on, split, normalize, dtype)
        for split, loader in zip(("train", "val"), loaders)
    ]


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
    """Apply all `functions` in one pass over the images; every process returns all images in the order of the data set.

    Args:
        device: where features are computed.
        keep_on: where they are stored, as `dtype`.
        label: of the progress bar.
        normalize: scale each feature to length 1.

    Raises:
        UsageError: more than 1 % of the images cannot be read.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in functions}
    labels: list[Tensor] = []
    indices: list[Tensor] = []
    tally = data.FailureTally(len(loader.dataset))  # type: ignore[arg-type]
    with tracked(loader, label) as batches:
        for batch in readable_batches(batches, tally, device):
            images = batch.views[0].to(device, non_blocking=True)
            for name, function in functions.items():
                features_BC = function(images).float()
                parts[name].append((F.normalize(features_BC, dim=-1) if normalize else features_BC).to(keep_on, dtype))
            labels.append(batch.labels_B)
            indices.append(batch.indices_B)
    order_N = torch.cat(list(_gather_batches(indices, device, keep_on))).argsort(stable=True)
    position_N = torch.empty_like(order_N)
    position_N[order_N] = torch.arange(len(order_N), device=keep_on)
    labels_N = _reorder(_gather_batches(labels, device, keep_on), position_N)
    return {
        name: LabeledFeatures(_reorder(_gather_batches(rows, device, keep_on), position_N), labels_N)
        for name, rows in parts.items()
    }


def _gather_batches(rows: list[Tensor], device: torch.device, keep_on: torch.device) -> Iterator[Tensor]:
    """Yield the batches of all processes on `keep_on`, and empty the list meanwhile so that no row is held twice.

    Backends gather tensors of `device` only if that is a GPU (nccl), else those of the CPU (gloo).
    """
    gather_on = device if collectives.is_distributed() else keep_on
    rows.reverse()
    for _ in range(max(collectives.all_gather_objects(len(rows)))):
        own = rows.pop() if rows else torch.zeros(0)
        for part in collectives.all_gather_rows(own.to(gather_on)):
            yield part.to(keep_on)


def _reorder(batches: Iterator[Tensor], position_N: Tensor) -> Tensor:
    """Concatenate batches; row i of the input becomes row `position_N[i]` of the output."""
    ordered_N, done = position_N, 0
    for batch in batches:
        if done == 0:
            ordered_N = batch.new_empty(len(position_N), *batch.shape[1:])
        ordered_N[position_N[done : done + len(batch)]] = batch
        done += len(batch)
    return ordered_N


def block_features(
    backbone: Backbone, n_last_blocks: Sequence[int], avgpool_patchtokens: bool, device: torch.device, precision: str
) -> FeatureFunction:
    """Return a function that computes the features of the largest of `n_last_blocks`; smaller ones are their last entries."""

    @torch.no_grad()
    def function(images_BCHW: Tensor) -> Tensor:
        with utils.autocast(device, precision):
            features = backbone.forward_return_n_last_blocks(images_BCHW, max(n_last_blocks), avgpool_patchtokens)
        return features.float()

    return function
