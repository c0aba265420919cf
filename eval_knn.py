"""Evaluate frozen features with a weighted k-nearest-neighbor classifier.

    python eval_knn.py --data_path IMAGENET --pretrained_weights OUT/checkpoint.pth
    torchrun --nproc_per_node=8 eval_knn.py ...

--data_path holds train/<class>/ and val/<class>/; with --leave_one_out it may be a single folder of class folders, and each image
is compared with all others. --baselines also scores raw pixels, mean and standard deviation of the colors, and the untrained
network.

Memory: every process holds all features, 21 GB for 14 million images of width 384, half of that with --half. --use_cuda False keeps
them in main memory. See evaluation/knn.py.

Results: `results/knn.json` in --output_dir. docs/evaluation.md has the details.
Origin: the protocol of DINO (Caron et al., ICCV 2021) section 4.1 after Wu et al. (CVPR 2018); flags follow microsoft/esvit.
"""

from __future__ import annotations

from config.arguments.eval_knn import get_args_parser as get_args_parser

if __name__ == "__main__":  # --help and usage errors are answered before torch is imported
    ARGS = get_args_parser().parse_command_line()

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from yacs.config import CfgNode

import data
import utils
from checkpoints import files
from checkpoints.serialization import load_tensor, save_file
from config import arguments
from config.arguments import small_runs
from data.transforms import augment
from distributed import collectives, launch
from evaluation.features import (
    NETWORK,
    PIXELS,
    UNTRAINED,
    FeatureFunction,
    LabeledFeatures,
    evaluation_size,
    extract_splits,
    frozen_backbone,
    labeled_datasets,
    network_config,
)
from evaluation.knn import KnnScore, Split, check_faiss, knn_scores
from evaluation.results import Results, describe_data, describe_network, save_results, topk_name
from utils import UsageError

FILES = {"features": "{}feat.pth", "labels": "{}labels.pth"}  # of --dump_features, with `train` or `test`, as published


def check_args(args: argparse.Namespace) -> None:
    """Raise UsageError for flags that cannot be combined, before any features are extracted."""
    if args.backend == "faiss":
        check_faiss(args.half)
    if not args.load_features:
        arguments.check_weights(args)


# --------------------------------------------------------------------------- features


class FeatureSets(NamedTuple):
    """Features by the name of the network or baseline, with what is known about them."""

    splits: dict[str, Split]
    classes: Sequence[str] = ()  # names; empty for loaded features
    image_size: int | None = None


def pixel_features(images_BCHW: Tensor) -> Tensor:
    """Return the normalized pixels."""
    return images_BCHW.flatten(1)


def color_features(images_BCHW: Tensor) -> Tensor:
    """Return mean and standard deviation of each channel."""
    return torch.cat([images_BCHW.mean(dim=(2, 3)), images_BCHW.std(dim=(2, 3))], dim=1)


def feature_functions(args: argparse.Namespace, config: CfgNode, device: torch.device) -> dict[str, FeatureFunction]:
    """Return the network, and the baselines of --baselines, as functions of images."""
    functions: dict[str, FeatureFunction] = {NETWORK: frozen_backbone(args, config, args.pretrained_weights, device)}
    if args.baselines:
        functions[PIXELS] = pixel_features
        functions["mean and deviation of color"] = color_features
        if args.pretrained_weights:
            functions[UNTRAINED] = frozen_backbone(args, config, "", device)
    return functions


def build_datasets(args: argparse.Namespace, config: CfgNode) -> list[data.ImageDataset]:
    """Open the training and validation images, or the single set of --leave_one_out."""
    mean, std, in_chans = config.INPUT.MEAN, config.INPUT.STD, config.MODEL.SPEC.IN_CHANS
    transform = augment.eval_view(evaluation_size(args, config), args.crop_ratio, mean, std)
    layout, value_range = data.layout_of(args), config.INPUT.RANGE
    if not args.leave_one_out:
        return list(labeled_datasets(args.data_path, config, transform, transform, seed=args.seed, layout=layout))
    augment.check_normalization(mean, std, in_chans)
    images = data.build_dataset(
        args.data_path, "train", transform, in_chans, need_labels=True, layout=layout, value_range=value_range
    )
    return [images]


def extract(args: argparse.Namespace, device: torch.device, keep_on: torch.device, dtype: torch.dtype) -> FeatureSets:
    """Extract the features of the network and the baselines."""
    with collectives.failing_together():
        config = network_config(args)
        datasets = build_datasets(args, config)
        smallest_class = int(np.unique(datasets[0].labels, return_counts=True)[1].min())
        small_runs.warn_large_k(args.nb_knn, smallest_class - args.leave_one_out)
        functions = feature_functions(args, config, device)
    collectives.must_agree("numbers of images", [len(dataset) for dataset in datasets])
    parts = extract_splits(datasets, functions, args, device, keep_on, dtype=dtype)
    splits = {name: Split(parts[0][name], parts[-1][name]) for name in functions}
    return FeatureSets(splits, datasets[0].classes, evaluation_size(args, config))


# --------------------------------------------------------------------------- saved features


@contextlib.contextmanager
def dump_folder(folder: str | None) -> Iterator[None]:
    """Create the folder of --dump_features and lock it against other runs.

    Raises:
        UsageError: it cannot be created, or holds saved features, which are never overwritten.
    """
    if not folder:
        yield
        return
    with files.lock_folder(folder, "features", "--dump_features"):
        with collectives.failing_together():
            names = [kind.format(part) for part in ("train", "test") for kind in FILES.values()]
            found = [name for name in names if (Path(folder) / name).exists()]
            if found:
                raise UsageError(f"--dump_features {folder} already holds {', '.join(found)}; choose another folder")
        yield


def dump_features(folder: str, split: Split) -> None:
    """Save the features and labels of both sets, or of the single set of leave-one-out, under their published names."""
    with files.disk_errors(folder, "--dump_features"):
        for part, labeled in zip(("train", "test"), split if split.train is not split.val else split[:1]):
            for kind, tensor in zip(FILES.values(), labeled):
                save_file(tensor.cpu(), Path(folder) / kind.format(part))


def load_features(folder: Path, keep_on: torch.device, dtype: torch.dtype, leave_one_out: bool) -> Split:
    """Load what `dump_features` saved.

    Raises:
        UsageError: a file is missing or damaged, or shapes do not match.
    """
    parts = []
    for part in ("train",) if leave_one_out else ("train", "test"):
        features_NC, labels_N = (load_tensor(folder / kind.format(part)) for kind in FILES.values())
        if len(features_NC) != len(labels_N):
            raise UsageError(
                f"{folder} has {len(features_NC)} {part} features but {len(labels_N)} labels; save them again"
            )
        parts.append(LabeledFeatures(features_NC.to(keep_on, dtype), labels_N.to(keep_on)))
    widths = [part.features_NC.shape[1] for part in parts]
    if widths[0] != widths[-1]:
        raise UsageError(
            f"{folder} has training features of width {widths[0]}, test features of {widths[1]}; save them again"
        )
    return Split(parts[0], parts[-1])


# --------------------------------------------------------------------------- the script


def report(scores: dict[str, list[KnnScore]], found: FeatureSets, args: argparse.Namespace) -> None:
    """Print the scores, and save them with the confusion matrix of each."""
    split = found.splits["network"]
    train_images, val_images = len(split.train.labels_N), len(split.val.labels_N)
    classes = len(split.train.labels_N.unique())
    compared = f"{val_images} validation among {utils.counted(train_images, 'training image')}"
    if args.leave_one_out:
        compared = f"{train_images} images, each among the {train_images - 1} others"
    top5 = topk_name(classes)
    print(f"k-NN of {compared}, {utils.counted(classes, 'class', 'classes')}:")
    rows: dict[str, dict[str, Any]] = {}
    confusions: dict[str, Tensor] = {}
    for name, scores_of_name in scores.items():
        for score in scores_of_name:
            print(f"{name}: {score.k}-NN classifier result: Top1: {score.top1:.2f}, {top5}: {score.top5:.2f}")
            rows[f"{name}, {score.k}-NN"] = {"top1": score.top1, "top5": score.top5}
            confusions[f"{name}, {score.k}-NN"] = score.confusion_P3
    if args.output_dir:
        results = Results(
            "knn",
            {"features": args.load_features} if args.load_features else describe_network(args),
            describe_data("" if args.load_features else args.data_path, train_images, val_images, classes),
            {
                "image_size": found.image_size,
                "crop_ratio": None if args.load_features else args.crop_ratio,
                "temperature": args.temperature,
                "leave_one_out": args.leave_one_out,
                "half": args.half,
                "top5_is": top5.lower(),
            },
            rows,
        )
        save_results(args.output_dir, results, confusions, found.classes)


def main(args: argparse.Namespace) -> None:
    """Extract or load features, classify, report."""
    device = launch.init_processes(args)
    utils.setup_logging(collectives.is_main_process())
    with collectives.failing_together():
        check_args(args)
        if args.output_dir:
            files.make_output_dir(args.output_dir)
    keep_on = device if args.use_cuda else torch.device("cpu")
    dtype = torch.float16 if args.half else torch.float32

    with dump_folder(args.dump_features):
        if args.load_features:
            with collectives.failing_together():
                split = load_features(Path(args.load_features), keep_on, dtype, args.leave_one_out)
            found = FeatureSets({"network": split})
        else:
            found = extract(args, device, keep_on, dtype)
        failure: UsageError | None = None
        if args.dump_features and collectives.is_main_process():
            try:
                dump_features(args.dump_features, found.splits["network"])
            except UsageError as error:
                failure = error  # raised after the report
        scores = {
            name: knn_scores(split, args.nb_knn, args.temperature, args.leave_one_out, args.backend)
            for name, split in found.splits.items()
        }
        if collectives.is_main_process():
            report(scores, found, args)
        if failure is not None:
            raise failure


if __name__ == "__main__":
    launch.run_script(partial(main, ARGS))
