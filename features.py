"""Features of frozen networks, extracted in parallel over processes: what every evaluation starts from.

Shapes: N images, B images of a batch, C channels.
Origin: the evaluation protocols of DINO (Caron et al., ICCV 2021) section 4.1 and of EsViT (Li et al., ICLR 2022) section 4.1.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from yacs.config import CfgNode

import data
import utils
from checkpoint import load_backbone
from data import augment
from models import Backbone, build_model
from utils import UsageError, logger

FeatureFunction = Callable[[Tensor], Tensor]


class LabelledFeatures(NamedTuple):
    """Features of a labelled set, normalised to length 1."""

    features_NC: Tensor
    labels_N: Tensor


# --------------------------------------------------------------------------- network and images


def frozen_backbone(args: argparse.Namespace, config: CfgNode, weights: str | Path, device: torch.device) -> Backbone:
    """The backbone of `--arch` in evaluation mode, with the weights of a file, or with random ones (of `--seed`) if it is empty.

    Reads `arch`, `patch_size`, `seed`, `checkpoint_key` and `allow_partial` of the arguments.

    Raises:
        UsageError: see `checkpoint.load_backbone`.
    """
    torch.manual_seed(args.seed)
    backbone = build_model(args.arch, config, is_teacher=True, patch_size=args.patch_size)
    if weights:
        report = load_backbone(backbone, weights, args.checkpoint_key, allow_partial=args.allow_partial)
        logger.info("%s: %s", weights, report)
    return backbone.to(device).eval().requires_grad_(False)


def labelled_datasets(
    data_path: str | Path, config: CfgNode, train_transform: Any, val_transform: Any, seed: int = 0
) -> tuple[data.ImageDataset, data.ImageDataset]:
    """Training and validation images with labels, which both count in the training set's classes.

    Raises:
        UsageError: no such folders, or classes in val that train has not.
    """
    in_chans = config.MODEL.SPEC.IN_CHANS
    augment.check_normalisation(config.INPUT.MEAN, config.INPUT.STD, in_chans)
    train, val = (
        data.build_dataset(data_path, part, transform, in_chans, seed, need_labels=True)
        for part, transform in (("train", train_transform), ("val", val_transform))
    )
    unknown = sorted(set(val.classes) - set(train.classes))
    if unknown:
        raise UsageError(f"val under {data_path} has classes that train has not: {', '.join(unknown[:5])}")
    val.use_classes(train.classes)
    return train, val


# --------------------------------------------------------------------------- extraction


@torch.no_grad()
def extract_features(
    loader: DataLoader[data.Batch],
    functions: Mapping[str, FeatureFunction],
    device: torch.device,
    keep_on: torch.device,
    label: str,
) -> dict[str, LabelledFeatures]:
    """One pass over the images for all `functions`; every process returns all images in the data set's order.

    Raises:
        UsageError: more than 1 % of the images cannot be read.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in functions}
    labels: list[Tensor] = []
    indices: list[Tensor] = []
    failures: list[str] = []
    incomplete = False
    for batch in tqdm(loader, desc=label, disable=None if utils.is_main_process() else True, leave=False):
        failures += batch.failures
        incomplete = incomplete or not batch.views
        if incomplete:
            break
        images = batch.views[0].to(device, non_blocking=True)
        for name, function in functions.items():
            parts[name].append(F.normalize(function(images).float(), dim=-1).to(keep_on))
        labels.append(batch.labels_B)
        indices.append(batch.indices_B)
    data.FailureTally(len(loader.dataset)).add(failures, device, incomplete)  # type: ignore[arg-type]
    order = _gather(indices, device).argsort()
    all_labels = _gather(labels, device)[order].to(keep_on)
    return {
        name: LabelledFeatures(_gather(rows, device)[order].to(keep_on), all_labels) for name, rows in parts.items()
    }


def _gather(rows: list[Tensor], device: torch.device) -> Tensor:
    """All processes' rows; exchanged on `device`."""
    own = torch.cat(rows).to(device) if rows else torch.zeros(0, device=device)
    return torch.cat(utils.all_gather_rows(own))
