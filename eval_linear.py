"""Train linear classifiers on frozen features.

    python eval_linear.py --data_path IMAGENET --pretrained_weights OUT/checkpoint.pth --output_dir OUT/linear
    torchrun --nproc_per_node=8 eval_linear.py ...                               # 128 images on each process
    python eval_linear.py ... --lr 0.0001 0.001 0.01 --n_last_blocks 1 4 --cache_features

--data_path holds train/<class>/ and val/<class>/. A classifier is trained for every pair of --lr and --n_last_blocks, all of them
in parallel on the same features. With one value each this is the published protocol: concatenated pooled tokens of the last n
blocks, random crops and flips, SGD with momentum 0.9 and no weight decay, learning rate lr * batch / 256 with a cosine schedule by
epoch down to --lr_min, accuracy on center crops, the best epoch reported. --cache_features is another protocol: features of center
crops, computed once. A run that was killed is resumed from `checkpoint.pth.tar` by the same command. Epochs are counted from 0.

--evaluate only scores a trained classifier on val: that of `checkpoint.pth.tar` in --output_dir, or of --linear_weights FILE (such
as DINO's `*_linearweights.pth`). It writes no file.

Results: `results/linear.json` in --output_dir. docs/evaluation.md has the details.
Origin: EsViT (Li et al., ICLR 2022) section 4.1 after DINO (Caron et al., ICCV 2021); flags and file names follow microsoft/esvit.
"""

from __future__ import annotations

from config.arguments.eval_linear import DEFAULT_LABELS
from config.arguments.eval_linear import get_args_parser as get_args_parser

if __name__ == "__main__":  # --help and usage errors are answered before torch is imported
    ARGS = get_args_parser().parse_command_line()

import argparse
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from yacs.config import CfgNode

import data
import utils
from checkpoints import files
from config import arguments
from config.arguments import small_runs
from data.transforms import augment
from distributed import collectives, launch
from evaluation import linear
from evaluation.feature_loaders import CACHE, OnlineFeatureLoader, build_feature_loader
from evaluation.features import block_features, evaluation_size, frozen_backbone, labeled_datasets, network_config
from evaluation.linear import (
    Probe,
    build_probe,
    describe_protocol,
    load_classifier,
    probe_width,
    run_identity,
    validate,
)
from evaluation.results import Results, describe_data, describe_network, save_results, topk_name
from evaluation.run_dir import make_run_dir
from models import Backbone
from training import checkpointing, setup, stopping
from utils import UsageError, logger

TRAIN_VIEWS = {"standard": augment.train_view, "strong": augment.strong_view}
ROW_NAMES = {  # of result files, by the names in checkpoints
    "best_acc1": "top1",
    "best_acc5": "top5",
    "best_epoch": "epoch",
    "last_acc1": "last_top1",
    "last_acc5": "last_top5",
}


def check_args(args: argparse.Namespace) -> None:
    """Raise UsageError for flags that cannot be combined."""
    arguments.check_weights(args)
    arguments.check_wandb(args)
    if args.evaluate and len(args.n_last_blocks) > 1:
        raise UsageError(f"--evaluate scores one classifier; pass one --n_last_blocks, not {args.n_last_blocks}")
    if not args.evaluate and (args.linear_weights or args.linear_order != "esvit"):
        raise UsageError("--linear_weights and --linear_order need --evaluate; add it, or leave them out")
    if args.linear_order == "dino" and not (args.avgpool_patchtokens and args.n_last_blocks == [1]):
        raise UsageError("--linear_order dino needs --n_last_blocks 1 --avgpool_patchtokens, as in DINO; add them")
    if args.cache_features and args.train_aug != "standard":
        raise UsageError(
            f"--cache_features uses no augmentation and excludes --train_aug {args.train_aug}; leave out one of them"
        )
    for name in ("lr", "n_last_blocks"):
        if len(set(getattr(args, name))) < len(getattr(args, name)):
            raise UsageError(f"--{name} {getattr(args, name)} has a value twice; give each value once")


# --------------------------------------------------------------------------- training


def build_datasets(args: argparse.Namespace, config: CfgNode) -> tuple[data.ImageDataset, data.ImageDataset]:
    """Open the training images as random crops (center crops for --cache_features) and the validation images as center crops.

    Sets `args.num_labels` to the number of classes unless it is given.

    Raises:
        UsageError: no such data, more classes than --num_labels, or --train_aug strong for images that are not RGB.
    """
    if args.train_aug == "strong" and config.MODEL.SPEC.IN_CHANS != 3:
        raise UsageError(
            f"--train_aug strong needs 3 channels, these images have {config.MODEL.SPEC.IN_CHANS}; use --train_aug standard"
        )
    size, mean, std = evaluation_size(args, config), config.INPUT.MEAN, config.INPUT.STD
    val_transform = augment.eval_view(size, args.crop_ratio, mean, std)
    train_transform = val_transform if args.cache_features else TRAIN_VIEWS[args.train_aug](size, mean, std)
    layout = data.layout_of(args)
    datasets = labeled_datasets(args.data_path, config, train_transform, val_transform, seed=args.seed, layout=layout)
    classes = len(datasets[0].classes)
    if isinstance(args.num_labels, small_runs.DefaultInt):
        if args.num_labels != classes:
            logger.info("--num_labels is %d, the number of classes of the data (default: %d)", classes, DEFAULT_LABELS)
        args.num_labels = classes
    check_labels(args, classes)
    small_runs.warn_of_small_rate(args.lr, args.epochs, len(datasets[0]))
    return datasets


def check_labels(args: argparse.Namespace, classes: int) -> None:
    """Raise UsageError if the data has more classes than a classifier has outputs."""
    if args.num_labels < classes:
        raise UsageError(
            f"--num_labels {args.num_labels} is less than the {classes} classes of {args.data_path}; raise it, or leave it out"
        )


def checkpoint_path(args: argparse.Namespace) -> Path:
    """Return the path of the checkpoint."""
    return Path(args.output_dir) / linear.CHECKPOINT


def report(probe: Probe, args: argparse.Namespace, size: int, run: dict[str, Any], classes: Sequence[str]) -> None:
    """Print the scores and save them; `size` is the side of the images, `run` the identity of the run."""
    train_images, val_images, _ = run["numbers of images and classes"]
    top5 = topk_name(args.num_labels)
    print(
        f"linear probe, {describe_protocol(args)}: {val_images} validation and {utils.counted(train_images, 'training image')}, "
        f"{utils.counted(len(classes), 'class', 'classes')}, {utils.counted(args.epochs, 'epoch')}"
    )
    for row in probe.table:
        print(f"lr {row['lr']}, last {utils.counted(row['n_last_blocks'], 'block')}: {describe_scores(row, top5)}")
    print(f"Top-1 test accuracy: {probe.table[probe.best]['best_acc1']:.2f}")
    protocol = {"name": describe_protocol(args), "train_aug": None if args.cache_features else args.train_aug}
    flags = ("epochs", "lr_min", "avgpool_patchtokens", "crop_ratio", "seed")
    protocol |= {name: getattr(args, name) for name in flags} | {"image_size": size}
    protocol |= {"batch_size": run["--batch_size_per_gpu times processes"], "precision": run["--precision"]}
    results = Results(
        "linear",
        describe_network(args) | {"digest": run["digest of weights and config"]},
        describe_data(args.data_path, train_images, val_images, len(classes)),
        protocol | {"top5_is": top5.lower()},
        {
            setting.name: {ROW_NAMES.get(name, name): value for name, value in row.items()}
            for setting, row in zip(probe.settings, probe.table)
        },
    )
    save_results(args.output_dir, results, dict(zip(results.scores, probe.confusions)), classes)


def describe_scores(row: dict[str, Any], top5: str) -> str:
    """Return a row of the table as text."""
    text = f"best Top1: {row['best_acc1']:.2f}"
    if row["best_acc5"] is not None:
        text += f", {top5}: {row['best_acc5']:.2f} (epoch {row['best_epoch']})"
    elif row.get("last_acc1") is not None:  # resumed from a published checkpoint, which holds the best top-1 only
        text += " (before this run was resumed)"
    if row.get("last_acc1") is not None:
        text += f"; last Top1: {row['last_acc1']:.2f}, {top5}: {row['last_acc5']:.2f}"
    return text


def train_classifiers(args: argparse.Namespace, device: torch.device) -> None:
    """Train the classifiers, or resume their training, and report the scores."""
    with collectives.failing_together():
        precision = utils.resolve_precision(args.precision, device)
        output_dir = make_run_dir(args.output_dir, linear.CHECKPOINT, checkpointing.CHECKPOINT)
        config = network_config(args)
        datasets = build_datasets(args, config)
        backbone = frozen_backbone(args, config, args.pretrained_weights, device)
    collectives.must_agree("numbers of images", [len(dataset) for dataset in datasets])

    probe = build_probe(args, backbone, args.num_labels, device)
    run = run_identity(args, config, backbone, datasets, precision)
    with collectives.failing_together(), files.disk_errors(output_dir):
        start = checkpointing.resume_run(checkpoint_path(args), partial(probe.load_state_dict, run=run), args)
    collectives.must_agree("checkpoints", (start.epoch, start.steps))
    unfinished = start.epoch < args.epochs
    if unfinished:
        function = block_features(backbone, args.n_last_blocks, args.avgpool_patchtokens, device, precision)
        loader = build_feature_loader(args, function, datasets, device, run)
        epoch_freq = 10 if args.cache_features else 1
        log = setup.open_log(args, config, loader.training_images, start, device, epoch_freq)
    with stopping.StopSignals():  # a signal after the last step does not prevent the report
        if unfinished:
            about_run = {"run": run, "args": args, "classes": list(datasets[0].classes)}
            with closing(log), checkpointing.StopRequest(checkpoint_path(args)) as ending:
                linear.train(probe, loader, start, args, log, ending, about_run)
        if collectives.is_main_process():
            with files.disk_errors(output_dir):
                report(probe, args, evaluation_size(args, config), run, datasets[0].classes)
                (output_dir / CACHE).unlink(missing_ok=True)


# --------------------------------------------------------------------------- evaluation of a trained classifier


def load_trained(args: argparse.Namespace, backbone: Backbone, device: torch.device) -> tuple[Probe, Sequence[str]]:
    """Load the classifier of --linear_weights or --output_dir, and the names of its classes if the file has them.

    Sets `args.num_labels` to the number of its outputs.

    Raises:
        UsageError: no such file, or another number of features or outputs.
    """
    path = Path(args.linear_weights) if args.linear_weights else checkpoint_path(args)
    if not args.linear_weights and not path.exists():
        raise UsageError(
            f"--evaluate needs {path}, which does not exist; train a classifier, or pass --linear_weights FILE"
        )
    found = load_classifier(path, backbone.num_features if args.linear_order == "dino" else 0)
    outputs, width = found.weight_KC.shape
    if args.num_labels != outputs and not isinstance(args.num_labels, small_runs.DefaultInt):
        raise UsageError(f"--num_labels {args.num_labels} differs from the {outputs} outputs of '{path}'; leave it out")
    args.num_labels = outputs
    probe = build_probe(args, backbone, outputs, device)
    expected = probe_width(backbone, args.n_last_blocks[0], args.avgpool_patchtokens)
    if width != expected:
        raise UsageError(
            f"the classifier in '{path}' takes {width} features, --arch {args.arch} --n_last_blocks {args.n_last_blocks[0]} "
            f"gives {expected}; pass the flags of its training"
        )
    probe.classifiers.each[0].load_state_dict({"linear.weight": found.weight_KC, "linear.bias": found.bias_K})
    return probe, found.classes


def build_val(args: argparse.Namespace, config: CfgNode, classes: Sequence[str]) -> data.ImageDataset:
    """Open the validation images as center crops, with labels that are indices into `classes`, or into their own classes.

    Raises:
        UsageError: no such data, unknown classes, or more classes than outputs.
    """
    mean, std, in_chans = config.INPUT.MEAN, config.INPUT.STD, config.MODEL.SPEC.IN_CHANS
    augment.check_normalization(mean, std, in_chans)
    view = augment.eval_view(evaluation_size(args, config), args.crop_ratio, mean, std)
    layout = data.layout_of(args)
    value_range = config.INPUT.RANGE
    val = data.build_dataset(
        args.data_path, "val", view, in_chans, args.seed, need_labels=True, layout=layout, value_range=value_range
    )
    if not classes:
        logger.info("the file of the classifier has no class names; assuming the sorted class names of val")
        check_labels(args, len(val.classes))
        return val
    unknown = sorted(set(val.classes) - set(classes))
    if unknown:
        raise UsageError(
            f"val of {args.data_path} has classes that the classifier was not trained with: {', '.join(unknown[:5])}; "
            "name other images"
        )
    val.use_classes(classes)
    return val


def evaluate(args: argparse.Namespace, device: torch.device) -> None:
    """Score a trained classifier on the validation images, with the output of the published script."""
    with collectives.failing_together():
        precision = utils.resolve_precision(args.precision, device)
        config = network_config(args)
        backbone = frozen_backbone(args, config, args.pretrained_weights, device)
        probe, classes = load_trained(args, backbone, device)
        val = build_val(args, config, classes)
    collectives.must_agree("numbers of images", len(val))
    function = block_features(backbone, args.n_last_blocks, args.avgpool_patchtokens, device, precision)
    sizes = args.batch_size_per_gpu, args.num_workers
    (score,) = validate(probe, OnlineFeatureLoader(function, val, val, *sizes, device))
    if collectives.is_main_process():
        print(f"* Acc@1 {score.top1:.3f} Acc@{min(5, args.num_labels)} {score.top5:.3f} loss {score.loss:.3f}")
        print(f"Accuracy of the network on the {len(val)} test images: {score.top1:.1f}%")


def main(args: argparse.Namespace) -> None:
    """Train linear classifiers, or evaluate a trained one."""
    device = launch.init_processes(args)
    utils.setup_logging(collectives.is_main_process())
    with checkpointing.training_run(checkpoint_path(args)):
        with collectives.failing_together():
            check_args(args)
        if args.evaluate:
            evaluate(args, device)
        else:
            train_classifiers(args, device)


if __name__ == "__main__":
    launch.run_script(partial(main, ARGS))
