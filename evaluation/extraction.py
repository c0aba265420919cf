"""Extract the features of all images of a data set into a folder, on several processes; an interrupted extraction can be resumed.

The images are divided into batches of consecutive ones, which the processes take in turn. So the features depend neither on the
number of processes nor on interruptions (for one batch size), and each batch is one write to each file.

Shapes: N images, B images of a batch, T regions, C channels.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from torch.utils.data import Sampler
from tqdm import tqdm
from yacs.config import CfgNode

import data
from checkpoints import files
from data.datasets import Sample
from data.layouts.sources import UNLABELED, Files
from data.transforms import augment
from data.workers import SignalSafeLoader, usable_workers
from distributed import collectives
from distributed.launch import stop_on_interrupt
from evaluation.feature_folder import FEATURES, REGIONS, FeatureFolder, FeatureWriter
from evaluation.features import evaluation_size
from evaluation.results import describe_network
from models import Backbone
from utils import UsageError, counted, logger

CHUNK = 2**20  # bytes
BATCHES_A_VOTE = 20  # of a process, between two exchanges with the others


# --------------------------------------------------------------------------- images


def open_images(args: argparse.Namespace, config: CfgNode) -> data.ImageDataset:
    """Open the images of --data_path in any layout, labeled or not.

    Raises:
        UsageError: no images, --output_dir among them, or a config that does not fit evaluation images.
    """
    mean, std, in_chans = config.INPUT.MEAN, config.INPUT.STD, config.MODEL.SPEC.IN_CHANS
    augment.check_normalization(mean, std, in_chans)
    transform = augment.eval_view(evaluation_size(args, config), args.crop_ratio, mean, std)
    layout, path = data.layout_of(args), absolute(data_path_of(args))
    dataset = open_dataset(path, args.split, layout, transform, in_chans, config.INPUT.RANGE)
    dataset.replaces_unreadable = False
    root = dataset.source.root if isinstance(dataset.source, Files) else ""
    if root and Path(args.output_dir).resolve().is_relative_to(Path(root).resolve()):
        raise UsageError(
            f"--output_dir {args.output_dir} is inside the images of {root}, so its arrays and pictures would be read as images; "
            "choose another"
        )
    labeled = f"of {counted(len(dataset.classes), 'class', 'classes')}" if dataset.classes else "without labels"
    logger.info("%s: %s %s", path, counted(len(dataset), "image"), labeled)
    others = [part for part in ("train", "val") if part != args.split and (Path(path) / part).is_dir()]
    if others and (Path(path) / args.split).is_dir():
        logger.info("these are the images of %s/; pass --split %s for the others", args.split, others[0])
    return dataset


def data_path_of(args: argparse.Namespace) -> str:
    """Return --data_path, or its sub-folder that --dataset names."""
    path = Path(args.data_path) / args.dataset
    return args.data_path if args.dataset in data.COLLECTIONS else str(path)


def absolute(path: str) -> str:
    """Return an absolute path; an address or a command is returned unchanged."""
    return path if "://" in path or path.startswith("pipe:") else os.path.abspath(path)


def open_dataset(
    path: str, split: str, layout: str, transform: data.Transform, in_chans: int, value_range: Sequence[float]
) -> data.ImageDataset:
    """Open a data set with labels where it has them; those of tsv files are read only on request."""

    def build(need_labels: bool) -> data.ImageDataset:
        return data.build_dataset(
            path, split, transform, in_chans, need_labels=need_labels, layout=layout, value_range=value_range
        )

    if layout != "tsv":
        return build(need_labels=False)
    try:
        return build(need_labels=True)
    except UsageError as error:
        dataset = build(need_labels=False)
        logger.info("labels are left out: %s", error)
        return dataset


class Names(Sequence[str]):
    """The names of a data set's images, read when needed."""

    def __init__(self, dataset: data.ImageDataset) -> None:
        self._source = dataset.source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: Any) -> Any:
        return self._source.name(index)


def label_names(dataset: data.ImageDataset) -> Iterator[str] | None:
    """Return the class of each image, tab-separated for several and empty without one; None without labels."""
    if not dataset.classes:
        return None
    classes = dataset.classes
    if dataset.multi_labels is not None:
        multi_labels = dataset.multi_labels
        return ("\t".join(classes[i] for i in multi_labels[row].nonzero()[0]) for row in range(len(dataset)))
    return (classes[label] if label != UNLABELED else "" for label in dataset.labels.tolist())


class ReadImages(NamedTuple):
    """Consecutive images, some of which may be unreadable."""

    images_BCHW: Tensor  # the readable ones
    readable_B: Tensor  # of all images of the batch
    first: int
    failures: list[str]


def collate(samples: Sequence[Sample]) -> ReadImages:
    """Stack the readable samples."""
    images = [sample.views[0] for sample in samples if sample.views]
    return ReadImages(
        torch.stack(images) if images else torch.zeros(0),
        torch.tensor([bool(sample.views) for sample in samples]),
        samples[0].image_index,
        [failure for sample in samples for failure in sample.failures],
    )


class ConsecutiveBatches(Sampler[range]):
    """Batches of consecutive indices below `length`, by their numbers."""

    def __init__(self, numbers: np.ndarray, batch_size: int, length: int) -> None:
        self.numbers, self.batch_size, self.length = numbers, batch_size, length

    def __iter__(self) -> Iterator[range]:
        for number in self.numbers.tolist():
            yield range(self.length)[number * self.batch_size : (number + 1) * self.batch_size]

    def __len__(self) -> int:
        return len(self.numbers)


# --------------------------------------------------------------------------- what is extracted


def describe(
    args: argparse.Namespace, config: CfgNode, dataset: data.ImageDataset, backbone: Backbone, device: torch.device
) -> dict[str, Any]:
    """Return the content of meta.json: all that the features depend on."""
    size, in_chans = evaluation_size(args, config), config.MODEL.SPEC.IN_CHANS
    grid = backbone.region_grid(torch.zeros(1, in_chans, size, size, device=device))
    weights = args.pretrained_weights
    saved = {"dtype": "float16" if args.half else "float32", "unit_length": args.normalize}
    rows = len(dataset)
    regions = {"shape": [rows, grid[0] * grid[1], backbone.num_features], "grid": list(grid), **saved}
    return {
        "network": {
            **describe_network(args),
            "sha256": file_digest(weights) if weights else None,
            "patch_size": backbone.patch_size,
            "allow_partial": args.allow_partial,
            "seed": None if weights else args.seed,
            "config": yaml.safe_load(config.dump()),
        },
        "data": {
            "data_path": absolute(data_path_of(args)),
            "layout": data.layout_of(args),
            "split": args.split,
            "images": rows,
            "classes": list(dataset.classes),
        },
        "preprocessing": {
            "image_size": size,
            "crop_ratio": args.crop_ratio,
            "interpolation": "bicubic",
            "mean": list(config.INPUT.MEAN),
            "std": list(config.INPUT.STD),
        },
        "features": {"shape": [rows, backbone.view_width], **saved},
        **({"regions": regions} if args.regions else {}),
    }


def file_digest(path: str | Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


# --------------------------------------------------------------------------- the extraction


def extract(
    args: argparse.Namespace,
    dataset: data.ImageDataset,
    backbone: Backbone,
    folder: FeatureFolder,
    device: torch.device,
) -> None:
    """Extract the features that a prepared folder lacks, and finish it; a collective operation.

    Reads `batch_size_per_gpu`, `num_workers`, `half` and `normalize` of `args`.

    Raises:
        UsageError: more than 1 % of the images cannot be read, features that are not finite, or a failing disk.
        Stopped: on Ctrl-C.
    """
    with collectives.failing_together(), files.disk_errors(folder.path):
        pending = folder.pending_batches(args.batch_size_per_gpu)
        total = -(-len(dataset) // args.batch_size_per_gpu)
        if len(pending) < total:
            logger.info("resuming: %d of %d batches remain", len(pending), total)
    reasons = _extract_batches(args, dataset, pending, backbone, folder, device) if len(pending) else {}
    with collectives.failing_together(), files.disk_errors(folder.path):
        if collectives.is_main_process():
            folder.finish(Names(dataset), reasons)


@torch.no_grad()
def _extract_batches(
    args: argparse.Namespace,
    dataset: data.ImageDataset,
    numbers: np.ndarray,
    backbone: Backbone,
    folder: FeatureFolder,
    device: torch.device,
) -> dict[str, str]:
    """Extract some batches, which the processes take in turn; return why images cannot be read, by name.

    The processes tell each other every few batches whether they go on, so that none works for hours beside one that has failed.
    """
    world = collectives.get_world_size()
    loader = SignalSafeLoader(
        dataset,
        batch_sampler=ConsecutiveBatches(
            numbers[collectives.get_rank() :: world], args.batch_size_per_gpu, len(dataset)
        ),
        num_workers=usable_workers(args.num_workers),
        collate_fn=collate,
        pin_memory=device.type == "cuda",
    )
    batches = iter(tqdm(loader, desc="extract", disable=None if collectives.is_main_process() else True, leave=False))
    tally = data.FailureTally(len(dataset), consequence="its features are NaN")
    done = 0
    interrupts = stop_on_interrupt(
        lambda: f"after {done} of {len(loader)} batches; run the same command again to resume"
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(interrupts)
        with collectives.failing_together(), files.disk_errors(folder.path):
            writer = stack.enter_context(folder.writer())
        for _ in range(0, -(-len(numbers) // world), BATCHES_A_VOTE):  # as often on a process with fewer batches
            failures: list[str] = []
            with collectives.failing_together(), files.disk_errors(folder.path):
                for batch in islice(batches, BATCHES_A_VOTE):
                    _extract_batch(args, batch, backbone, writer, device)
                    failures += batch.failures
                    done += 1
            tally.exchange(failures, device)
        with collectives.failing_together(), files.disk_errors(folder.path):
            writer.sync()
    return tally.seen


def _extract_batch(
    args: argparse.Namespace, batch: ReadImages, backbone: Backbone, writer: FeatureWriter, device: torch.device
) -> None:
    rows = {name: np.full((len(batch.readable_B), *file.shape[1:]), np.nan, file.dtype)
            for name, file in writer.files.items()}  # fmt: skip
    if len(batch.images_BCHW):
        features = backbone.forward_features(batch.images_BCHW.to(device, non_blocking=True))
        for name, output in ((FEATURES, features.view_BC), (REGIONS, features.regions_BTC)):
            if name in rows:
                rows[name][batch.readable_B.numpy()] = _as_rows(output, args.normalize, args.half)
    writer.write(batch.first, rows, batch.readable_B.numpy().astype(np.uint8))


def _as_rows(features: Tensor, normalize: bool, half: bool) -> np.ndarray:
    features = F.normalize(features.float(), dim=-1) if normalize else features.float()
    features = features.half() if half else features
    if not features.isfinite().all():
        raise UsageError(
            "the features are not finite; " + ("leave --half out" if half else "check the weights of the network")
        )
    return features.cpu().numpy()
