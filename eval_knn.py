"""Score frozen features with a weighted k-nearest-neighbour vote.

    python eval_knn.py --arch swin_tiny --data_path IMAGENET --pretrained_weights OUT/checkpoint.pth
    torchrun --nproc_per_node=8 eval_knn.py ...

--data_path holds train/<class>/ and val/<class>/. With --baselines the same vote is also taken on raw pixels, on the mean and
deviation of the colours, and on the untrained network.

Origin: the protocol of DINO (Caron et al., ICCV 2021) section 4.1 after Wu et al. (CVPR 2018); flags follow microsoft/esvit.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from yacs.config import CfgNode

import data
import utils
from checkpoint import load_tensor, save_file
from data import augment
from features import FeatureFunction, LabelledFeatures, extract_features, frozen_backbone, labelled_datasets
from models import load_arch_config
from utils import UsageError, bool_flag, logger

CHUNK = 512  # validation images whose similarities are held at once
DUMPED = {"features": "{}feat.pth", "labels": "{}labels.pth"}  # with train or test before it, as published


def get_args_parser() -> argparse.ArgumentParser:
    """The command line: names and defaults of the published script, and this project's additions."""
    parser = argparse.ArgumentParser(
        "eval_knn.py", description="k-NN on frozen features", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    utils.add_network_flags(parser)
    add("--batch_size_per_gpu", type=int, default=128)
    add(
        "--nb_knn", type=int, nargs="+", default=[10, 20, 100, 200], help="numbers of neighbours; 20 usually works best"
    )
    add("--temperature", type=float, default=0.07, help="of the vote's weights")
    add("--pretrained_weights", default="", help="checkpoint; empty: random weights")
    add("--checkpoint_key", default="teacher", help="network of a full checkpoint: teacher or student")
    add(
        "--allow_partial", type=bool_flag, nargs="?", const=True, default=False, help="take what fits of the checkpoint"
    )
    add("--use_cuda", type=bool_flag, default=True, help="keep the features on the GPU, if there is one")
    add("--dump_features", default=None, help="folder to save features and labels to")
    add("--load_features", default=None, help="folder of saved features; nothing is extracted then")
    add("--image_size", type=int, default=None, help="pixels of the centre crop; default: MODEL.IMAGE_SIZE of the yaml")
    add("--crop_ratio", type=float, default=0.875, help="centre crop as a share of the resized image (224 / 256)")
    add("--baselines", type=bool_flag, nargs="?", const=True, default=False, help="score simple features too")
    add("--output_dir", default=None, help="folder for knn.json")
    add("--seed", type=int, default=0, help="of random weights")
    add("--num_workers", type=int, default=10, help="loader processes, at most one a core")
    add("--data_path", default="", help="folder with train/<class>/ and val/<class>/")
    add(
        "--zip_mode",
        type=bool_flag,
        nargs="?",
        const=True,
        default=False,
        help="images in zip files (not supported yet)",
    )
    utils.add_launch_flags(parser)
    add("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    return parser


class Split(NamedTuple):
    """The same kind of features of both halves of the protocol."""

    train: LabelledFeatures
    val: LabelledFeatures


class KnnScore(NamedTuple):
    """Accuracies in percent of the vote of `k` neighbours; `top5` is top-C where there are only C < 5 classes."""

    k: int
    top1: float
    top5: float


# --------------------------------------------------------------------------- the vote


def knn_scores(split: Split, ks: Sequence[int], temperature: float) -> list[KnnScore]:
    """Top-1 and top-5 of the vote weighted by exp(cosine / temperature), for each number of neighbours.

    A `k` beyond the training set is clamped to it, with a warning.

    Raises:
        UsageError: an empty set, or a `k` or temperature that is not positive.
    """
    train, val = split
    if not len(train.labels_N) or not len(val.labels_N):
        raise UsageError("k-NN needs at least one training and one validation image")
    if min(ks) < 1 or temperature <= 0:
        raise UsageError(f"--nb_knn {list(ks)} and --temperature {temperature} must be positive")
    largest = min(max(ks), len(train.labels_N))
    for k in (k for k in ks if k > largest):
        logger.warning("k = %d is more than the %d training images; all of them vote", k, largest)
    classes = 1 + int(max(train.labels_N.max(), val.labels_N.max()).item())
    ranked = min(5, classes)
    hits = torch.zeros(len(ks), 2)
    for features_nC, labels_n in zip(val.features_NC.split(CHUNK), val.labels_N.split(CHUNK)):
        similarity_nk, neighbour_nk = (features_nC @ train.features_NC.T).topk(largest)
        weight_nk = ((similarity_nk - 1) / temperature).exp()  # exp(cos / T) up to a factor that no rank depends on
        label_nk = train.labels_N[neighbour_nk]
        for row, k in enumerate(ks):
            votes = features_nC.new_zeros(len(labels_n), classes).scatter_add_(1, label_nk[:, :k], weight_nk[:, :k])
            ranking = votes.sort(dim=1, descending=True, stable=True).indices[:, :ranked]  # ties go to the lower label
            correct = ranking == labels_n[:, None]
            hits[row, 0] += correct[:, 0].sum().item()
            hits[row, 1] += correct.sum().item()
    percent = (100 * hits / len(val.labels_N)).tolist()
    return [KnnScore(k, top1, top5) for k, (top1, top5) in zip(ks, percent)]


# --------------------------------------------------------------------------- features


def pixel_features(images_BCHW: Tensor) -> Tensor:
    """The normalised pixels themselves."""
    return images_BCHW.flatten(1)


def colour_features(images_BCHW: Tensor) -> Tensor:
    """Mean and standard deviation of each channel."""
    return torch.cat([images_BCHW.mean(dim=(2, 3)), images_BCHW.std(dim=(2, 3))], dim=1)


def feature_functions(args: argparse.Namespace, config: CfgNode, device: torch.device) -> dict[str, FeatureFunction]:
    """What is scored, the network first."""
    functions: dict[str, FeatureFunction] = {"network": frozen_backbone(args, config, args.pretrained_weights, device)}
    if not args.pretrained_weights:
        logger.warning(
            "no --pretrained_weights: the network has random weights, the scores are those of an untrained one"
        )
    if args.baselines:
        functions["raw pixels"] = pixel_features
        functions["mean and deviation of colour"] = colour_features
        if args.pretrained_weights:
            functions["untrained network"] = frozen_backbone(args, config, "", device)
    return functions


# --------------------------------------------------------------------------- saved features


def dump_features(folder: Path, split: Split) -> None:
    """Save features and labels of both sets under their published names."""
    for part, labelled in zip(("train", "test"), split):
        for kind, tensor in zip(DUMPED.values(), labelled):
            save_file(tensor.cpu(), folder / kind.format(part))


def load_features(folder: Path, keep_on: torch.device) -> Split:
    """Load what `dump_features` saved.

    Raises:
        UsageError: a file is missing or damaged, or features and labels differ in number.
    """
    parts = []
    for part in ("train", "test"):
        tensors = [load_tensor(folder / kind.format(part)).to(keep_on) for kind in DUMPED.values()]
        if len(tensors[0]) != len(tensors[1]):
            raise UsageError(
                f"{folder} has {len(tensors[0])} {part} features but {len(tensors[1])} labels; dump them again"
            )
        parts.append(LabelledFeatures(*tensors))
    widths = [part.features_NC.shape[1] for part in parts]
    if widths[0] != widths[1]:
        raise UsageError(
            f"{folder} has training features of width {widths[0]}, test features of {widths[1]}; dump them again"
        )
    return Split(*parts)


# --------------------------------------------------------------------------- the script


def extract_splits(args: argparse.Namespace, device: torch.device, keep_on: torch.device) -> dict[str, Split]:
    """Extract all kinds of features of both sets."""
    config = load_arch_config(args.arch, args.cfg, args.opts)
    transform = augment.eval_view(
        args.image_size or config.MODEL.IMAGE_SIZE[0], args.crop_ratio, config.INPUT.MEAN, config.INPUT.STD
    )
    datasets = labelled_datasets(args.data_path, config, transform, transform)
    functions = feature_functions(args, config, device)
    extracted = []
    for part, dataset in zip(("train", "val"), datasets):
        loader = data.build_eval_loader(
            dataset, args.batch_size_per_gpu, args.num_workers, pin_memory=device.type == "cuda"
        )
        extracted.append(extract_features(loader, functions, device, keep_on, part))
    return {name: Split(extracted[0][name], extracted[1][name]) for name in functions}


def report(scores: dict[str, list[KnnScore]], split: Split, args: argparse.Namespace) -> None:
    """Print the scores and write them to `knn.json`."""
    classes = len(split.train.labels_N.unique())
    print(
        f"k-NN of {len(split.val.labels_N)} validation among {len(split.train.labels_N)} training images, {classes} classes:"
    )
    for name, rows in scores.items():
        for score in rows:
            top5 = "Top5" if classes >= 5 else f"Top{classes}"
            print(f"{name}: {score.k}-NN classifier result: Top1: {score.top1:.2f}, {top5}: {score.top5:.2f}")
    if args.output_dir:
        record = {
            name: {str(score.k): {"top1": score.top1, "top5": score.top5} for score in rows}
            for name, rows in scores.items()
        }
        (Path(args.output_dir) / "knn.json").write_text(json.dumps(record, indent=2) + "\n")


def check_args(args: argparse.Namespace) -> None:
    """Stop on values that would end the script only after the features are extracted.

    Raises:
        UsageError: naming the flag.
    """
    if args.zip_mode:
        raise UsageError("--zip_mode is not supported yet; unpack the images to DIR/{train,val}/<class>/")
    if min(args.nb_knn) < 1 or args.temperature <= 0:
        raise UsageError(f"--nb_knn {args.nb_knn} and --temperature {args.temperature} must be positive")
    if args.batch_size_per_gpu < 1:
        raise UsageError(f"--batch_size_per_gpu {args.batch_size_per_gpu} must be 1 or more")
    if args.num_workers < 0:
        raise UsageError(f"--num_workers {args.num_workers} must be 0 or more")
    if not 0 < args.crop_ratio <= 1 or (args.image_size is not None and args.image_size < 1):
        raise UsageError(
            f"--crop_ratio {args.crop_ratio} must lie in 0..1 and --image_size {args.image_size} be positive"
        )


def main(args: argparse.Namespace) -> None:
    """Extract (or load) features, vote, report."""
    device = utils.init_processes(args)
    utils.setup_logging()
    check_args(args)
    for folder in (args.output_dir, args.dump_features):
        if folder:
            utils.make_output_dir(folder)
    keep_on = device if args.use_cuda else torch.device("cpu")
    if args.load_features:
        splits = {"network": load_features(Path(args.load_features), keep_on)}
    else:
        splits = extract_splits(args, device, keep_on)
    if utils.is_main_process():
        if args.dump_features:
            dump_features(Path(args.dump_features), splits["network"])
        scores = {name: knn_scores(split, args.nb_knn, args.temperature) for name, split in splits.items()}
        report(scores, splits["network"], args)


if __name__ == "__main__":
    utils.run_script(lambda: main(get_args_parser().parse_args()))
