"""Score frozen features with a weighted k-nearest-neighbor vote.

    python eval_knn.py --arch swin_tiny --data_path IMAGENET --pretrained_weights OUT/checkpoint.pth
    torchrun --nproc_per_node=8 eval_knn.py ...

--data_path holds train/<class>/ and val/<class>/; with --leave_one_out it may be one folder of class folders, each image of which
is judged by all others. With --baselines the same vote is also taken on raw pixels, on the mean and deviation of the colors,
and on the untrained network. `results.json` in --output_dir keeps the accuracies, also those of each class.

Memory: every process holds all features, 21 GB for 14 million images of width 384; --half stores and compares them in float16,
in half of that. With --use_cuda False they stay in the CPU's memory. See evaluation/knn.py for the search.

Origin: the protocol of DINO (Caron et al., ICCV 2021) section 4.1 after Wu et al. (CVPR 2018); flags follow microsoft/esvit.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from yacs.config import CfgNode

import data
import utils
from checkpoints import files
from checkpoints.serialization import load_tensor, save_file
from config import arguments
from config.arguments import add_token_flag, bool_flag
from config.ranges import BATCH, COUNT, SEED, TEMPERATURE, WORKERS
from data.transforms import augment
from distributed import collectives, launch
from evaluation.features import (
    FeatureFunction,
    LabeledFeatures,
    evaluation_size,
    extract_features,
    frozen_backbone,
    labeled_datasets,
    network_config,
)
from evaluation.knn import BACKENDS, RANKED, KnnScore, Split, knn_scores, load_faiss
from evaluation.results import add_results, claim_folder
from utils import UsageError, logger

EVALUATION = "k-NN"  # how results.json tells whose it is
DUMPED = {"features": "{}feat.pth", "labels": "{}labels.pth"}  # with train or test before it, as published


def get_args_parser() -> argparse.ArgumentParser:
    """The command line: names and defaults of the published script, and this project's additions."""
    parser = arguments.Parser("eval_knn.py", description="k-NN on frozen features")
    add = parser.add_argument
    arguments.add_network_flags(parser)
    add("--batch_size_per_gpu", type=BATCH, default=128, help="images per process")
    add(
        "--nb_knn",
        type=COUNT,
        nargs="+",
        default=[10, 20, 100, 200],
        help="numbers of neighbors; 20 usually works best",
    )
    add("--temperature", type=TEMPERATURE, default=0.07, help="of the vote's weights")
    arguments.add_weights_flags(parser)
    add_token_flag(parser)
    add("--use_cuda", type=bool_flag, default=True, help="keep the features on the GPU, if there is one")
    arguments.add_switch(parser, "--half", "store and compare features in float16")
    add("--backend", default="torch", choices=BACKENDS, help="of the search; faiss has to be installed")
    arguments.add_switch(parser, "--leave_one_out", "one labeled set: each image is judged by all others")
    add("--dump_features", default=None, help="folder without such files, to save features and labels to")
    add("--load_features", default=None, help="folder of saved features; nothing is extracted then")
    arguments.add_crop_flags(parser)
    arguments.add_switch(parser, "--baselines", "score simple features too")
    add("--output_dir", default=None, help="folder for results.json")
    add("--seed", type=SEED, default=0, help="of random weights")
    add("--num_workers", type=WORKERS, default=10, help="loader processes, at most one a core")
    add("--data_path", default="", help="folder with train/<class>/ and val/<class>/, or see --leave_one_out")
    arguments.add_layout_flags(parser)
    arguments.add_launch_flags(parser)
    add("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    return parser


# --------------------------------------------------------------------------- features


def pixel_features(images_BCHW: Tensor) -> Tensor:
    """The normalized pixels themselves."""
    return images_BCHW.flatten(1)


def color_features(images_BCHW: Tensor) -> Tensor:
    """Mean and standard deviation of each channel."""
    return torch.cat([images_BCHW.mean(dim=(2, 3)), images_BCHW.std(dim=(2, 3))], dim=1)


def feature_functions(args: argparse.Namespace, config: CfgNode, device: torch.device) -> dict[str, FeatureFunction]:
    """What is scored, the network first."""
    functions: dict[str, FeatureFunction] = {"network": frozen_backbone(args, config, args.pretrained_weights, device)}
    if not args.pretrained_weights:
        logger.warning("--random_weights: the network has random weights, the scores are those of an untrained one")
    if args.baselines:
        functions["raw pixels"] = pixel_features
        functions["mean and deviation of color"] = color_features
        if args.pretrained_weights:
            functions["untrained network"] = frozen_backbone(args, config, "", device)
    return functions


# --------------------------------------------------------------------------- saved features


def check_dump_folder(folder: str) -> None:
    """Create the folder of --dump_features.

    Raises:
        UsageError: it cannot be created, or holds saved features, which would be overwritten or mixed with others.
    """
    place = files.make_output_dir(folder, "--dump_features")
    names = [kind.format(part) for part in ("train", "test") for kind in DUMPED.values()]
    found = [name for name in names if (place / name).exists()]
    if found:
        raise UsageError(f"--dump_features {folder} holds {', '.join(found)} already; choose another folder")


def dump_features(folder: Path, split: Split) -> None:
    """Save features and labels of both sets under their published names; a set that is left out of in turn is saved once."""
    for part, labeled in zip(("train", "test"), split if split.train is not split.val else split[:1]):
        for kind, tensor in zip(DUMPED.values(), labeled):
            save_file(tensor.cpu(), folder / kind.format(part))


def load_features(folder: Path, keep_on: torch.device, dtype: torch.dtype, leave_one_out: bool) -> Split:
    """Load what `dump_features` saved: both sets, or the one of `leave_one_out` twice.

    Raises:
        UsageError: a file is missing or damaged, or features and labels differ in number.
    """
    parts = []
    for part in ("train",) if leave_one_out else ("train", "test"):
        features_NC, labels_N = (load_tensor(folder / kind.format(part)) for kind in DUMPED.values())
        if len(features_NC) != len(labels_N):
            raise UsageError(
                f"{folder} has {len(features_NC)} {part} features but {len(labels_N)} labels; dump them again"
            )
        parts.append(LabeledFeatures(features_NC.to(keep_on, dtype), labels_N.to(keep_on)))
    widths = [part.features_NC.shape[1] for part in parts]
    if widths[0] != widths[-1]:
        raise UsageError(
            f"{folder} has training features of width {widths[0]}, test features of {widths[1]}; dump them again"
        )
    return Split(parts[0], parts[-1])


# --------------------------------------------------------------------------- the script


def build_datasets(args: argparse.Namespace, config: CfgNode) -> list[data.ImageDataset]:
    """Training and validation images, or the one set of --leave_one_out."""
    mean, std = config.INPUT.MEAN, config.INPUT.STD
    transform = augment.eval_view(evaluation_size(args, config), args.crop_ratio, mean, std)
    if not args.leave_one_out:
        return list(labeled_datasets(args, config, transform, transform))
    augment.check_normalization(mean, std, config.MODEL.SPEC.IN_CHANS)
    in_chans = config.MODEL.SPEC.IN_CHANS
    layout = data.layout_of(args)
    images = data.build_dataset(
        args.data_path, "train", transform, in_chans, need_labels=True, layout=layout, value_range=config.INPUT.RANGE
    )
    return [images]


def extract_splits(
    args: argparse.Namespace, device: torch.device, keep_on: torch.device, dtype: torch.dtype
) -> tuple[dict[str, Split], Sequence[str], dict[str, object]]:
    """Extract all kinds of features of both sets; also returns the names of the classes, and what the features are of."""
    with collectives.failing_together():
        config = network_config(args)
        datasets = build_datasets(args, config)
        functions = feature_functions(args, config, device)
    collectives.must_agree("numbers of images", [len(dataset) for dataset in datasets])
    extracted = []
    for part, dataset in zip(("train", "val"), datasets):
        loader = data.build_eval_loader(
            dataset, args.batch_size_per_gpu, args.num_workers, pin_memory=device.type == "cuda"
        )
        extracted.append(extract_features(loader, functions, device, keep_on, part, dtype=dtype))
    splits = {name: Split(extracted[0][name], extracted[-1][name]) for name in functions}
    about: dict[str, object] = {
        "arch": args.arch,
        "checkpoint_key": args.checkpoint_key,
        "token": args.token,
        "data_path": args.data_path,
        "image_size": evaluation_size(args, config),
        "crop_ratio": args.crop_ratio,
    }
    return splits, datasets[0].classes, about


def report(
    scores: dict[str, list[KnnScore]],
    split: Split,
    classes: Sequence[str],
    about: dict[str, object],
    args: argparse.Namespace,
) -> None:
    """Print the scores and write them to `results.json`, with those of each class.

    `classes` and `about`, what features are of, are empty where features were loaded, which do not tell.
    """
    voters, count = len(split.train.labels_N), len(split.train.labels_N.unique())
    compared = f"{len(split.val.labels_N)} validation among {utils.counted(voters, 'training image')}"
    if args.leave_one_out:
        compared = f"{voters} images, each among the {voters - 1} others"
    ranked = f"Top{min(count, RANKED)}"
    print(f"k-NN of {compared}, {utils.counted(count, 'class', 'classes')}:")
    for name, rows in scores.items():
        for score in rows:
            print(f"{name}: {score.k}-NN classifier result: Top1: {score.top1:.2f}, {ranked}: {score.top5:.2f}")
    if args.output_dir:
        record = {
            "pretrained_weights": args.load_features or args.pretrained_weights,
            **about,
            "compared": compared,
            "half": args.half,
            "temperature": args.temperature,
            "top5_is": ranked.lower(),
            "scores": {
                name: {str(score.k): _as_json(score, classes) for score in rows} for name, rows in scores.items()
            },
        }
        logger.info("%s", add_results(Path(args.output_dir), EVALUATION, record))


def _as_json(score: KnnScore, classes: Sequence[str]) -> dict[str, object]:
    per_class = {classes[label] if classes else str(label): top1 for label, top1 in score.per_class.items()}
    return {"top1": score.top1, "top5": score.top5, "per_class": per_class}


def check_args(args: argparse.Namespace) -> None:
    """Stop on values that would end the script only after the features are extracted.

    Raises:
        UsageError: naming the flag.
    """
    if args.backend == "faiss":
        load_faiss()
    if args.backend == "faiss" and args.half:
        raise UsageError("--backend faiss takes float32 only; leave --half out, or use --backend torch")
    if not args.load_features:
        arguments.check_weights(args)


def main(args: argparse.Namespace) -> None:
    """Extract (or load) features, vote, report."""
    device = launch.init_processes(args)
    collectives.setup_logging()
    with collectives.failing_together():
        check_args(args)
        if args.output_dir:
            claim_folder(args.output_dir, EVALUATION)
    if not args.dump_features:
        score_features(args, device)
        return
    with files.lock_folder(args.dump_features, "features", "--dump_features"):
        with collectives.failing_together():
            check_dump_folder(args.dump_features)
        score_features(args, device)


def score_features(args: argparse.Namespace, device: torch.device) -> None:
    """See `main`; a disk that refuses the features takes no scores away."""
    keep_on = device if args.use_cuda else torch.device("cpu")
    dtype = torch.float16 if args.half else torch.float32
    classes: Sequence[str] = ()
    about: dict[str, object] = {}
    if args.load_features:
        with collectives.failing_together():
            splits = {"network": load_features(Path(args.load_features), keep_on, dtype, args.leave_one_out)}
    else:
        splits, classes, about = extract_splits(args, device, keep_on, dtype)
    dumping: UsageError | None = None
    if args.dump_features and collectives.is_main_process():
        try:
            with files.disk_errors(args.dump_features, "--dump_features"):
                dump_features(Path(args.dump_features), splits["network"])
        except UsageError as error:  # told when the scores are
            dumping = error
    scores = {
        name: knn_scores(split, args.nb_knn, args.temperature, args.leave_one_out, args.backend)
        for name, split in splits.items()
    }
    if collectives.is_main_process():
        report(scores, splits["network"], classes, about, args)
    if dumping is not None:
        raise dumping


if __name__ == "__main__":
    launch.run_script(lambda: main(get_args_parser().parse_args()))
