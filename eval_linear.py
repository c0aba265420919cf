"""Score frozen features with linear classifiers.

    python eval_linear.py --arch swin_tiny --data_path IMAGENET --pretrained_weights OUT/checkpoint.pth --output_dir OUT/linear
    torchrun --nproc_per_node=8 eval_linear.py ...                               # 128 images on each process
    python eval_linear.py ... --lr 0.0001 0.001 0.01 --n_last_blocks 1 4 --cache_features

--data_path holds train/<class>/ and val/<class>/. A classifier is trained for every pair of --lr and --n_last_blocks, all of them
in one pass over the same features. One value each is the published protocol: the pooled tokens of the last n blocks concatenated,
random crops and flips, SGD with momentum 0.9 and no weight decay, lr * batch / 256, half a cosine to --lr_min in steps of an epoch
(to 0, epoch e of E has lr / 2 * (1 + cos(pi e / E))), accuracy on the center crop, the best epoch reported. --cache_features is
another protocol: features of center crops, computed once and kept in --output_dir until the run is finished. A killed run goes on
from `checkpoint.pth.tar` when its command is repeated; a signal or Ctrl-C saves it within the epoch at hand. Epochs count from 0.

--train_aug strong is the augmentation with which UDI's networks were scored; `results.json` tells which one was used.

--evaluate trains nothing: it scores the classifier of `checkpoint.pth.tar` in --output_dir, or of --linear_weights FILE (such as
DINO's `*_linearweights.pth`), on val alone, and writes no file.

Origin: EsViT (Li et al., ICLR 2022) section 4.1 after DINO (Caron et al., ICCV 2021); flags and file names follow microsoft/esvit.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from yacs.config import CfgNode

import data
import utils
from checkpoints import files, layouts, serialization
from config import arguments
from config.arguments import add_token_flag
from config.ranges import BATCH, BLOCKS, COUNT, EPOCHS, SEED, WORKERS, integer, number
from data.transforms import augment
from distributed import collectives, launch
from evaluation.features import (
    CachedFeatures,
    FeatureFunction,
    FeatureSource,
    ImageFeatures,
    block_features,
    data_identity,
    evaluation_size,
    extract_features,
    frozen_backbone,
    labeled_datasets,
    load_cached,
    network_config,
    tell_avgpool,
)
from evaluation.linear import Probe, Setting, json_number, load_classifier, probe_width, train_epoch, validate
from evaluation.results import has_other_results, write_results
from models import Backbone
from training import checkpointing, restore, stopping
from training.run_log import EpochMeter, RunLog
from utils import UsageError, logger


class Inferred(int):
    """A default that gives way to what the data has; equal numbers of the command line are plain ones and do not."""


DEFAULT_LABELS = Inferred(1000)
FEATURES = "cached_features.pth"  # of --cache_features, until the run is finished
EVALUATION = "linear probe"  # how results.json tells whose it is
TRAIN_VIEWS = {"standard": augment.train_view, "strong": augment.strong_view}
PROTOCOLS = {
    "standard": "published protocol (random resized crops)",
    "strong": "strong augmentation (RandAugment and erasing, as UDI was scored; NOT comparable with random resized crops alone)",
    "cached": "cached features of un-augmented images (NOT the published protocol)",
}


def get_args_parser() -> argparse.ArgumentParser:
    """The command line: names and defaults of the published script, and this project's additions."""
    parser = arguments.Parser("eval_linear.py", description="linear classifiers on frozen features")
    add = parser.add_argument
    switch = partial(arguments.add_switch, parser)
    arguments.add_network_flags(parser)
    arguments.add_weights_flags(parser)
    add_token_flag(parser)
    add(
        "--n_last_blocks", type=BLOCKS, nargs="+", default=[4], help="blocks whose tokens are the features, one or more"
    )
    switch(
        "--avgpool_patchtokens", "append the mean region of the last block; nothing for networks without class tokens"
    )
    add("--train_aug", choices=list(TRAIN_VIEWS), default="standard", help="strong: RandAugment and erasing, too")
    add("--epochs", type=EPOCHS, default=100, help="passes over the training images")
    add(
        "--lr",
        type=number(0, 1000, above_low=True),
        nargs="+",
        default=[0.001],
        help="for 256 images a step, scaled with them; one or more",
    )
    add("--lr_min", type=number(0, 1000), default=0.0, help="learning rate at the end of the cosine, not scaled")
    add("--batch_size_per_gpu", type=BATCH, default=128, help="images per process and step")
    add("--val_freq", type=COUNT, default=1, help="epochs between two validations")
    add(
        "--num_labels",
        type=integer(1, 10_000_000),
        default=DEFAULT_LABELS,
        help="outputs; if not given: as many as the data has classes",
    )
    switch("--evaluate", "score a trained classifier on val; nothing is trained or written")
    add("--linear_weights", default="", help="file of --evaluate; default: checkpoint.pth.tar in --output_dir")
    words = "how its inputs lie with --avgpool_patchtokens: token, then mean region (esvit), or alternating (dino)"
    add("--linear_order", choices=("esvit", "dino"), default="esvit", help=words)
    switch("--cache_features", "another protocol: train on features of center crops, computed once; takes minutes")
    add("--precision", choices=utils.PRECISIONS, default="fp32", help="of the network; classifiers are always float32")
    arguments.add_crop_flags(parser)
    add("--seed", type=SEED, default=0, help="of classifiers, order and crops, and of random weights")
    add("--log_freq", type=COUNT, default=20, help="steps between two lines")
    add("--output_dir", default=".", help="folder for checkpoint.pth.tar, log.txt and results.json")
    add("--num_workers", type=WORKERS, default=10, help="loader processes, at most one a core")
    add("--data_path", default="", help="folder with train/<class>/ and val/<class>/")
    arguments.add_layout_flags(parser)
    arguments.add_launch_flags(parser)
    add("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    return parser


def protocol_of(args: argparse.Namespace) -> str:
    """What is trained on, in words for results."""
    return PROTOCOLS["cached" if args.cache_features else args.train_aug]


# --------------------------------------------------------------------------- features


def feature_source(
    args: argparse.Namespace,
    function: FeatureFunction,
    datasets: tuple[data.ImageDataset, data.ImageDataset],
    device: torch.device,
    run: dict[str, Any],
) -> FeatureSource:
    """The features of both data sets by `function`; `run` is what makes a run the same (see `identity`)."""
    if not args.cache_features:
        return ImageFeatures(function, *datasets, args.batch_size_per_gpu, args.num_workers, device)
    path = Path(args.output_dir) / FEATURES
    cached = load_cached(path, run)
    if cached is None:
        cached = []
        for label, dataset in zip(("train", "val"), datasets):
            loader = data.build_eval_loader(dataset, args.batch_size_per_gpu, args.num_workers, device.type == "cuda")
            found = extract_features(loader, {"network": function}, device, torch.device("cpu"), label, normalize=False)
            cached.append(found["network"])
        if collectives.is_main_process():
            try:
                serialization.save_file({"run": run, "features": [list(part) for part in cached]}, path)
            except OSError as error:
                logger.warning("cannot keep the features in %s (%s): they are computed again at a resume", path, error)
    size = sum(part.features_NC.nbytes for part in cached) / 2**30
    logger.info("cached %.2f GiB of features on each process; %s", size, PROTOCOLS["cached"])
    return CachedFeatures(cached[0], cached[1], args.batch_size_per_gpu, device, args.seed)


# --------------------------------------------------------------------------- training


def train(
    probe: Probe,
    source: FeatureSource,
    start: checkpointing.RunPosition,
    sums: Sequence[float],
    args: argparse.Namespace,
    log: RunLog,
    ending: checkpointing.StopRequest,
    run: dict[str, Any],
    classes: Sequence[str],
) -> None:
    """Train from `start` on; log and save each epoch, validate every `--val_freq` epochs and after the last one.

    `sums` are of the losses of the epoch's steps that are done. `run` is what makes a run the same, saved beside the
    classifiers, as the names of the classes are.
    """
    batch = args.batch_size_per_gpu * collectives.get_world_size()
    about_run = {"run": run, "args": args, "classes": list(classes)}

    def save(meter: EpochMeter, steps: int, sums: list[float]) -> str:
        state = probe.state(meter.epoch - 1) | about_run
        state["in_epoch"] = checkpointing.in_epoch(steps, meter.state(), args) | {"losses": sums}
        return checkpointing.write(state, checkpoint_path(args)) if collectives.is_main_process() else ""

    for epoch in range(start.epoch, args.epochs):
        meter = EpochMeter(epoch, source.steps, images_per_step=batch)
        done = start.steps if epoch == start.epoch else 0
        if done:
            meter.go_on_from(start.meter, done)
        lrs = probe.lrs
        losses = train_epoch(probe, source, epoch, meter, log, ending, partial(save, meter), done, sums)
        probe.scheduler.step()
        rows = [{"train_loss": json_number(loss), "train_lr": lr} for loss, lr in zip(losses, lrs)]
        if epoch % args.val_freq == 0 or epoch == args.epochs - 1:
            scores = validate(probe, source)
            probe.record(epoch, scores)
            for row, score in zip(rows, scores):
                row |= {"test_loss": json_number(score.loss), "test_acc1": score.top1, "test_acc5": score.top5}
        every = {"classifiers": {s.name: row for s, row in zip(probe.settings, rows)}} if len(rows) > 1 else {}
        about = {} if protocol_of(args) == PROTOCOLS["standard"] else {"protocol": protocol_of(args)}
        if args.num_labels < 5:
            about["acc5_is"] = f"top{args.num_labels}"
        log.finish_epoch(meter, **rows[probe.best], **every, **about)
        state = probe.state(epoch) | about_run
        if collectives.is_main_process():
            ending.failure = checkpointing.write(state, checkpoint_path(args))


# --------------------------------------------------------------------------- one run, one folder


def identity(
    args: argparse.Namespace,
    config: CfgNode,
    backbone: Backbone,
    datasets: tuple[data.ImageDataset, data.ImageDataset],
    precision: str,
) -> dict[str, Any]:
    """What must be the same for a run to go on: everything that changes its numbers, by the name of the flag."""
    digest = hashlib.sha256(backbone.settled(config).dump().encode())
    weights = {name: t for name, t in backbone.state_dict().items() if not name.endswith(layouts.DERIVED)}
    for name, tensor in weights.items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    flags = ["arch", "token", "train_aug", "lr", "lr_min", "n_last_blocks", "avgpool_patchtokens", "epochs"]
    flags += ["cache_features", "image_size", "crop_ratio", "seed", "num_labels"]
    return {f"--{name}": getattr(args, name) for name in flags} | {
        "--batch_size_per_gpu times processes": args.batch_size_per_gpu * collectives.get_world_size(),
        "--precision": precision,
        **data_identity(*datasets),
        "digest of weights and config": digest.hexdigest()[:16],
    }


def checkpoint_path(args: argparse.Namespace) -> Path:
    """The published name."""
    return Path(args.output_dir) / "checkpoint.pth.tar"


def resume_run(
    probe: Probe, args: argparse.Namespace, run: dict[str, Any]
) -> tuple[checkpointing.RunPosition, list[float]]:
    """Continue from the newest whole `checkpoint.pth.tar` if there is any; returns where, and the epoch's sums of losses there.

    Raises:
        UsageError: all files are damaged or of another run, on all processes at once.
    """
    place, sums = checkpointing.RunPosition(), [0.0] * len(probe.settings)
    with collectives.failing_together(), files.disk_errors(args.output_dir):
        found = checkpointing.newest_whole(checkpoint_path(args))
        if found is not None:
            path, content, damaged = found
            with restore.reading("run", path):
                checkpointing.check_same_run(content.get("run"), run, f"checkpoint '{path}'")
            probe.load_state(content, path)
            place = checkpointing.position_of(content, path, args)._replace(damaged=damaged)
            if place.steps:
                with restore.reading("in_epoch", path):
                    sums = [float(loss) for _, loss in zip(sums, content["in_epoch"]["losses"], strict=True)]
            if place.epoch < args.epochs:
                logger.info("resuming %s at epoch %d of %d", path, place.epoch, args.epochs)
    collectives.must_agree("checkpoints", (place.epoch, place.steps))
    return place, sums


def report(probe: Probe, args: argparse.Namespace, run: dict[str, Any]) -> None:
    """Print the scores and write them to `results.json`."""
    train_images, val_images, classes = run["numbers of images and classes"]
    best, ranked = probe.table[probe.best], f"Top{min(5, args.num_labels)}"
    print(
        f"linear probe, {protocol_of(args)}: {val_images} validation and {utils.counted(train_images, 'training image')}, "
        f"{utils.counted(classes, 'class', 'classes')}, {utils.counted(args.epochs, 'epoch')}"
    )
    for row in probe.table:
        print(f"lr {row['lr']}, last {utils.counted(row['n_last_blocks'], 'block')}: {_describe(row, ranked)}")
    print(f"Top-1 test accuracy: {best['best_acc1']:.2f}")
    record = {
        "protocol": protocol_of(args),
        "train_aug": None if args.cache_features else args.train_aug,
        "token": args.token,
        "pretrained_weights": args.pretrained_weights,
        "best": best,
        "table": probe.table,
        "acc5_is": ranked.lower(),
        "finished_epochs": args.epochs,
        "run": run,
    }
    logger.info("%s", write_results(Path(args.output_dir), EVALUATION, record))


def _describe(row: dict[str, Any], ranked: str) -> str:
    if row.get("last_acc1") is None:
        return f"best Top1: {row['best_acc1']:.2f}"
    if row["best_acc5"] is None:  # a published file knows no more of its best epoch
        return (
            f"best Top1: {row['best_acc1']:.2f} (before this run went on); "
            f"last Top1: {row['last_acc1']:.2f}, {ranked}: {row['last_acc5']:.2f}"
        )
    return (
        f"best Top1: {row['best_acc1']:.2f}, {ranked}: {row['best_acc5']:.2f} (epoch {row['best_epoch']}); "
        f"last Top1: {row['last_acc1']:.2f}, {ranked}: {row['last_acc5']:.2f}"
    )


# --------------------------------------------------------------------------- the script


def check_args(args: argparse.Namespace) -> None:
    """Stop on values that no part of the program would refuse by itself.

    Raises:
        UsageError: naming the flag.
    """
    if args.evaluate and len(args.n_last_blocks) > 1:
        raise UsageError(f"--evaluate scores one classifier; pass one --n_last_blocks, not {args.n_last_blocks}")
    if not args.evaluate and (args.linear_weights or args.linear_order != "esvit"):
        raise UsageError("--linear_weights and --linear_order are for --evaluate; pass that too, or leave them out")
    if args.linear_order == "dino" and not (args.avgpool_patchtokens and args.n_last_blocks == [1]):
        raise UsageError(
            "--linear_order dino needs --n_last_blocks 1 --avgpool_patchtokens, which such files are made with"
        )
    if args.cache_features and args.train_aug != "standard":
        raise UsageError(
            f"--cache_features has no augmentation, --train_aug {args.train_aug} has; leave one of them out"
        )
    for name in ("lr", "n_last_blocks"):
        if len(set(getattr(args, name))) < len(getattr(args, name)):
            raise UsageError(f"--{name} {getattr(args, name)} names a value twice; give each once")


def claim_folder(args: argparse.Namespace) -> Path:
    """Create --output_dir.

    Raises:
        UsageError: it cannot be created, or holds what this run would overwrite or mix with its own.
    """
    folder = files.make_output_dir(args.output_dir)
    with files.disk_errors(folder):
        begun = bool(checkpointing.saved(checkpoint_path(args)))
    strangers = {
        "a pre-training run (checkpoint.pth)": (folder / "checkpoint.pth").exists() and not begun,
        "other results (results.json)": (folder / "results.json").exists()
        and not (begun and not has_other_results(folder, EVALUATION)),
    }
    for what, found in strangers.items():
        if found:
            raise UsageError(f"--output_dir {folder} holds {what}; choose another, e.g. {folder / 'linear'}")
    return folder


def build_datasets(args: argparse.Namespace, config: CfgNode) -> tuple[data.ImageDataset, data.ImageDataset]:
    """Training images in random crops (center crops where features are cached), validation images in center crops.

    Sets `num_labels` of the arguments to the number of classes unless it is given.

    Raises:
        UsageError: no such data, more classes than --num_labels, or --train_aug strong for what is no color image.
    """
    if args.train_aug == "strong" and config.MODEL.SPEC.IN_CHANS != 3:
        raise UsageError(
            f"--train_aug strong is for color images, not for {config.MODEL.SPEC.IN_CHANS} channels; use --train_aug standard"
        )
    size, mean, std = evaluation_size(args, config), config.INPUT.MEAN, config.INPUT.STD
    val_transform = augment.eval_view(size, args.crop_ratio, mean, std)
    train_transform = val_transform if args.cache_features else TRAIN_VIEWS[args.train_aug](size, mean, std)
    datasets = labeled_datasets(args, config, train_transform, val_transform)
    classes = len(datasets[0].classes)
    if isinstance(args.num_labels, Inferred):
        if args.num_labels != classes:
            logger.info(
                "the data has %d classes: classifiers have as many, not the default of %d", classes, DEFAULT_LABELS
            )
        args.num_labels = classes
    check_labels(args, classes)
    return datasets


def check_labels(args: argparse.Namespace, classes: int) -> None:
    """Stop on more classes than outputs.

    Raises:
        UsageError: naming both.
    """
    if args.num_labels < classes:
        raise UsageError(
            f"--num_labels {args.num_labels} is less than the {classes} classes of {args.data_path}; raise it, or leave it out"
        )


def build_probe(args: argparse.Namespace, backbone: Backbone, num_labels: int, device: torch.device) -> Probe:
    """A classifier for every pair of --lr and --n_last_blocks.

    Raises:
        UsageError: a number of blocks that the network does not have.
    """
    blocks = sum(backbone.stage_depths)
    wrong = [n for n in args.n_last_blocks if not 1 <= n <= blocks]
    if wrong:
        raise UsageError(f"--n_last_blocks {wrong[0]} must lie in 1..{blocks}, the blocks of {args.arch}")
    settings = [Setting(lr, n) for n in args.n_last_blocks for lr in args.lr]
    widths = [probe_width(backbone, setting.n_last_blocks, args.avgpool_patchtokens) for setting in settings]
    batch = args.batch_size_per_gpu * collectives.get_world_size()
    return Probe(settings, widths, num_labels, batch, args.epochs, device, args.seed, args.lr_min)


# --------------------------------------------------------------------------- a trained classifier


def load_trained(args: argparse.Namespace, backbone: Backbone, device: torch.device) -> tuple[Probe, Sequence[str]]:
    """The classifier of --linear_weights or of --output_dir, and the names of its classes where the file has them.

    Sets `num_labels` of the arguments to the number of its outputs.

    Raises:
        UsageError: no such file, or one of another number of features or outputs.
    """
    path = Path(args.linear_weights) if args.linear_weights else checkpoint_path(args)
    if not args.linear_weights and not path.exists():
        raise UsageError(f"--evaluate finds no {path}; train a classifier first, or pass --linear_weights FILE")
    found = load_classifier(path, backbone.num_features if args.linear_order == "dino" else 0)
    outputs, width = found.weight_KC.shape
    if args.num_labels != outputs and not isinstance(args.num_labels, Inferred):
        raise UsageError(f"--num_labels {args.num_labels} differs from the {outputs} outputs of '{path}'; leave it out")
    args.num_labels = outputs
    probe = build_probe(args, backbone, outputs, device)
    wanted = probe_width(backbone, args.n_last_blocks[0], args.avgpool_patchtokens)
    if width != wanted:
        raise UsageError(
            f"the classifier of '{path}' takes {width} features, --arch {args.arch} --n_last_blocks {args.n_last_blocks[0]} "
            f"gives {wanted}; pass the flags that it was trained with"
        )
    probe.classifiers.each[0].load_state_dict({"linear.weight": found.weight_KC, "linear.bias": found.bias_K})
    return probe, found.classes


def build_val(args: argparse.Namespace, config: CfgNode, classes: Sequence[str]) -> data.ImageDataset:
    """Validation images in center crops, numbered by `classes`, or in the order of their own where there are none.

    Raises:
        UsageError: no such data, more classes than outputs, or other ones.
    """
    mean, std, in_chans = config.INPUT.MEAN, config.INPUT.STD, config.MODEL.SPEC.IN_CHANS
    augment.check_normalization(mean, std, in_chans)
    view = augment.eval_view(evaluation_size(args, config), args.crop_ratio, mean, std)
    layout = data.layout_of(args)
    val = data.build_dataset(args.data_path, "val", view, in_chans, args.seed, need_labels=True, layout=layout)
    if not classes:
        logger.info("the classifier's file names no classes: its outputs are those of val in the order of their names")
        check_labels(args, len(val.classes))
        return val
    unknown = sorted(set(val.classes) - set(classes))
    if unknown:
        raise UsageError(f"val of {args.data_path} has classes that the classifier has not: {', '.join(unknown[:5])}")
    val.use_classes(classes)
    return val


def evaluate(args: argparse.Namespace, device: torch.device) -> None:
    """Score a trained classifier on the validation images and print what the published script prints."""
    with collectives.failing_together():
        precision = utils.resolve_precision(args.precision, device)
        config = network_config(args)
        backbone = frozen_backbone(args, config, args.pretrained_weights, device)
        tell_avgpool(args.avgpool_patchtokens, backbone)
        probe, classes = load_trained(args, backbone, device)
        val = build_val(args, config, classes)
    collectives.must_agree("numbers of images", len(val))
    function = block_features(backbone, args.n_last_blocks, args.avgpool_patchtokens, device, precision)
    source = ImageFeatures(function, val, val, args.batch_size_per_gpu, args.num_workers, device)  # nothing trains
    (score,) = validate(probe, source)
    if collectives.is_main_process():
        print(f"* Acc@1 {score.top1:.3f} Acc@{min(5, args.num_labels)} {score.top5:.3f} loss {score.loss:.3f}")
        print(f"Accuracy of the network on the {len(val)} test images: {score.top1:.1f}%")


def main(args: argparse.Namespace) -> None:
    """Build everything, resume, train, report; or evaluate."""
    device = launch.init_processes(args)
    collectives.setup_logging()
    with checkpointing.training_run(checkpoint_path(args)):
        _probe(args, device)


def _probe(args: argparse.Namespace, device: torch.device) -> None:
    with collectives.failing_together():
        check_args(args)
        arguments.check_weights(args)
    if args.evaluate:
        evaluate(args, device)
        return
    with collectives.failing_together():
        precision = utils.resolve_precision(args.precision, device)
        folder = claim_folder(args)
        config = network_config(args)
        datasets = build_datasets(args, config)
        backbone = frozen_backbone(args, config, args.pretrained_weights, device)
    collectives.must_agree("numbers of images", [len(dataset) for dataset in datasets])
    if not args.pretrained_weights:
        logger.warning("--random_weights: the scores are those of a network with random weights")
    tell_avgpool(args.avgpool_patchtokens, backbone)
    probe = build_probe(args, backbone, args.num_labels, device)
    run = identity(args, config, backbone, datasets, precision)
    start, sums = resume_run(probe, args, run)
    if start.epoch < args.epochs:
        with collectives.failing_together(), files.disk_errors(folder):
            if collectives.is_main_process():
                checkpointing.clean_up(folder, start)
                files.save_provenance(folder, args, config)
        function = block_features(backbone, args.n_last_blocks, args.avgpool_patchtokens, device, precision)
        source = feature_source(args, function, datasets, device, run)
        images = source.training_images
        seen = start.epoch * images + start.steps * args.batch_size_per_gpu * collectives.get_world_size()
        with collectives.failing_together(), files.disk_errors(folder):
            normalization = config.INPUT.MEAN, config.INPUT.STD
            log = RunLog(folder, args.epochs, args.log_freq, *normalization, device, images, seen)
    with stopping.StopSignals():  # a signal after the last step takes no result away
        if start.epoch < args.epochs:
            with closing(log), checkpointing.StopRequest(checkpoint_path(args)) as ending:
                train(probe, source, start, sums, args, log, ending, run, datasets[0].classes)
        if collectives.is_main_process():
            with files.disk_errors(folder):
                report(probe, args, run)
                (folder / FEATURES).unlink(missing_ok=True)


if __name__ == "__main__":
    launch.run_script(lambda: main(get_args_parser().parse_args()))
