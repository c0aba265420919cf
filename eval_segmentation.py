"""Segment images by frozen region features, with a linear classifier or the vote of the nearest regions.

    python eval_segmentation.py --data_path ADE20K --reduce_zero_label --stages 1 2 3 4 \\
        --pretrained_weights OUT/checkpoint.pth --output_dir OUT/segmentation
    python eval_segmentation.py ... --lr 0.0003 0.001 0.003 --baselines         # a classifier for each, on the same features
    python eval_segmentation.py ... --knn --nb_knn 5 20                         # no training
    torchrun --nproc_per_node=8 eval_segmentation.py ...                        # 16 images on each process

--data_path holds images and masks, one-channel PNG files with class numbers: DIR/{train,val}/{images,masks},
DIR/{images,masks}/{train,val}, ADE20K or Pascal VOC (data/layouts/masks.py). The regions of --stages are resized to the finest
grid and concatenated. Linear: BatchNorm and a 1x1 convolution, trained on random scales, crops and flips, or on features of center
crops that are computed once (--cache_features). Validation images larger than --window are segmented in overlapping windows, and
every mask is scored at its own resolution. A run that was killed is resumed from `segmentation.pth` by the same command. Epochs
are counted from 0.

Results: `results/segmentation.json` (`segmentation_knn.json`) with mean IoU, pixel accuracy, mean class accuracy and the IoU of
each class, the confusion matrices of pixels in `segmentation_confusion.csv` beside it, and `predictions.png`
(`predictions_knn.png`) in --output_dir. docs/evaluation.md has the details.
Origin: the linear setup of DINOv2 (Oquab et al., 2023) section 7.4, extended to several stages.
"""

from __future__ import annotations

from config.arguments.eval_segmentation import get_args_parser as get_args_parser

if __name__ == "__main__":  # --help and usage errors are answered before torch is imported
    ARGS = get_args_parser().parse_command_line()

import argparse
import hashlib
import io
import platform
import textwrap
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from yacs.config import CfgNode

import data
import utils
from analysis.images import printable, to_rgb
from analysis.segments import Segmented, prediction_page
from checkpoints import files
from config import arguments
from data.layouts.masks import Pair, find_pairs
from data.segmentation import (
    MAX_CLASSES,
    CropPair,
    MaskCoding,
    MaskFacts,
    PairTransform,
    SegmentationDataset,
    Size,
    WholeImage,
    crop_size,
    inspect_pairs,
    resized,
)
from data.transforms import augment
from data.workers import usable_workers
from distributed import collectives, launch
from evaluation import linear, segmentation
from evaluation.dense_features import DenseFeatures, build_dense_features
from evaluation.feature_loaders import CACHE, build_feature_loader
from evaluation.features import NETWORK, frozen_backbone, network_config
from evaluation.linear import network_digest
from evaluation.region_knn import RegionVote, training_regions
from evaluation.results import Results, describe_data, describe_network, save_results
from evaluation.run_dir import make_run_dir
from evaluation.segmentation import Classifiers, Predictor, Probe, SegmentationScore, Setting, Windows
from training import checkpointing, setup, stopping
from utils import UsageError, logger

LARGEST_DEFAULT_WINDOW = 512  # as in mmsegmentation's ADE20K configs


class Task(NamedTuple):
    """Everything that linear and k-NN segmentation have in common."""

    config: CfgNode
    features: DenseFeatures
    train_set: SegmentationDataset
    val_set: SegmentationDataset
    crop: Size
    windows: Windows
    identity: dict[str, Any]  # of network and data
    device: torch.device

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes."""
        return self.val_set.classes


def check_args(args: argparse.Namespace) -> None:
    """Raise UsageError for flags that cannot be combined."""
    arguments.check_weights(args)
    arguments.check_wandb(args)
    if args.knn and args.cache_features:
        raise UsageError("--cache_features is for training, and --knn trains nothing; leave out one of them")
    for name in ("lr", "stages", "nb_knn"):
        values = getattr(args, name) or []
        if len(set(values)) < len(values):
            raise UsageError(f"--{name} {values} has a value twice; give each value once")


# --------------------------------------------------------------------------- classes and windows


def read_classes(args: argparse.Namespace) -> list[str] | None:
    """Return the names of --classes, numbers if only their count is given; None if it is left out.

    Raises:
        UsageError: no such file, or too few or too many classes.
    """
    if args.classes is None:
        return None
    if args.classes.isdecimal():
        names = numbered_classes(int(args.classes), args)
    else:
        remedy = "--classes takes a number, or a text file with the name of a class on each line"
        names = [line.strip() for line in files.read_text(Path(args.classes), remedy).splitlines() if line.strip()]
    if not 2 <= len(names) <= MAX_CLASSES:
        count = utils.counted(len(names), "class", "classes")
        raise UsageError(f"--classes {args.classes} gives {count}; choose from 2 to {MAX_CLASSES}")
    if len(set(names)) < len(names):
        raise UsageError(f"--classes {args.classes} has a name twice; give each class a name of its own")
    return names


def numbered_classes(count: int, args: argparse.Namespace) -> list[str]:
    """Return the numbers of classes in masks."""
    first = int(args.reduce_zero_label)
    return [str(number) for number in range(first, first + min(count, MAX_CLASSES + 1))]


def choose_classes(
    args: argparse.Namespace, pairs: Sequence[Sequence[Pair]], facts: Sequence[Sequence[MaskFacts]]
) -> tuple[list[str], MaskCoding]:
    """Return the names of the classes, and how masks code them; check the values of the masks of both splits.

    Raises:
        UsageError: a value is neither a class nor void, a split has no pixel with a class, or the masks have too few or too many
            classes.
    """
    void = {args.ignore_index, 0} if args.reduce_zero_label else {args.ignore_index}
    present = [{value for fact in part for value in fact.values} - void for part in facts]
    for split, values in zip(("train", "val"), present):
        if not values:
            raise UsageError(
                f"the {split} masks of {args.data_path} are void everywhere; check --ignore_index and masks"
            )
    occurring = set.union(*present)
    if len(occurring) < 2:
        found = ", ".join(map(str, sorted({value for part in facts for fact in part for value in fact.values})))
        raise UsageError(
            f"the masks of {args.data_path} have the values {found}, of which only {max(occurring)} is a class, and segmentation "
            f"needs two; {args.ignore_index} is void (--ignore_index), so recode masks of 0 and 255 to 0 and 1"
        )
    names = read_classes(args)
    if names is None:
        names = numbered_classes(max(occurring) + 1 - int(args.reduce_zero_label), args)
        if len(names) > MAX_CLASSES:
            raise UsageError(
                f"the masks of {args.data_path} have the value {max(occurring)}, but there can be {MAX_CLASSES} classes at most; "
                f"pass --ignore_index {max(occurring)} if it is void, else --classes and masks without it"
            )
        logger.info("--classes is %d, by the largest value in the masks", len(names))
        if 2 * len(occurring) < len(names):
            logger.warning(
                "only %d of these classes occur in the masks; pass --classes if the largest is wrong", len(occurring)
            )
    coding = MaskCoding(len(names), args.ignore_index, args.reduce_zero_label)
    for pair, fact in zip([*pairs[0], *pairs[1]], [*facts[0], *facts[1]]):
        coding.decode(np.array([fact.values], dtype=np.uint8), pair.mask)
    if unseen := sorted(present[1] - present[0]):
        logger.warning("classes %s of val are in no training mask", ", ".join(map(str, unseen)))
    return names, coding


def choose_windows(args: argparse.Namespace, multiple: int) -> Windows:
    """Return the windows of --window and --stride.

    Raises:
        UsageError: --window is not a multiple of the size of a region, or less than --stride.
    """
    side = args.window or max(multiple, LARGEST_DEFAULT_WINDOW // multiple * multiple)
    if side % multiple:
        lower = side // multiple * multiple
        raise UsageError(
            f"--window {side} must be a multiple of {multiple}, the size of a region of {args.arch} in pixels; "
            f"choose {max(lower, multiple)} or {lower + multiple}"
        )
    stride = args.stride or max(1, 2 * side // 3)
    if stride > side:
        raise UsageError(f"--stride {stride} is more than --window {side} and would leave gaps; lower it")
    return Windows(side, stride, multiple)


# --------------------------------------------------------------------------- network and data


def prepare(args: argparse.Namespace, device: torch.device) -> Task:
    """Load the network, find and check the images and masks, and build the datasets."""
    with collectives.failing_together():
        check_args(args)
        precision = utils.resolve_precision(args.precision, device)
        make_run_dir(args.output_dir, segmentation.CHECKPOINT, checkpointing.CHECKPOINT, linear.CHECKPOINT)
        config = network_config(args)
        mean, std, in_chans = config.INPUT.MEAN, config.INPUT.STD, config.MODEL.SPEC.IN_CHANS
        augment.check_normalization(mean, std, in_chans)
        pairs = [find_pairs(args.data_path, split) for split in ("train", "val")]
        backbone = frozen_backbone(args, config, args.pretrained_weights, device)
        features = build_dense_features(args, config, backbone, device, precision)
        windows = choose_windows(args, features.multiple)
    collectives.must_agree("numbers of images", [len(part) for part in pairs])
    threads = usable_workers(args.num_workers)
    facts = [inspect_pairs(part, threads, f"masks of {split}") for part, split in zip(pairs, ("train", "val"))]
    with collectives.failing_together():
        names, coding = choose_classes(args, pairs, facts)
    crop = crop_size([resized(fact.size, args.image_size) for fact in facts[0]], windows.side, windows.multiple)
    if args.cache_features:
        check_cache_size(len(pairs[0]), features, crop)
    views: tuple[PairTransform, PairTransform] = (
        CropPair(crop, args.image_size, mean, std, augment=not (args.knn or args.cache_features)),
        WholeImage(args.image_size, mean, std),
    )
    train_set, val_set = (
        SegmentationDataset(part, coding, names, view, in_chans, args.seed, config.INPUT.RANGE)
        for part, view in zip(pairs, views)
    )
    masks = hashlib.sha256("".join(fact.digest for part in facts for fact in part).encode()).hexdigest()[:16]
    identity = {
        "--precision": precision,
        "numbers of images and classes": [len(train_set), len(val_set), len(names)],
        "digest of masks": masks,
        "digest of weights and config": network_digest(backbone, config),
    }
    return Task(config, features, train_set, val_set, crop, windows, identity, device)


def check_cache_size(images: int, features: DenseFeatures, crop: Size) -> None:
    """Check that the features of --cache_features fit into main memory; a collective operation.

    Raises:
        UsageError: they do not.
    """
    machine = platform.node()
    processes = collectives.all_gather_objects(machine).count(machine)
    regions = crop[0] // features.stride * (crop[1] // features.stride)
    size = processes * images * regions * features.channels * torch.float32.itemsize
    with collectives.failing_together():
        if size > utils.main_memory():
            raise UsageError(
                f"--cache_features needs {size / 2**30:.1f} GiB for {utils.counted(images, 'image')} on "
                f"{utils.counted(processes, 'process', 'processes')}, {machine} has {utils.main_memory() / 2**30:.1f} GiB; "
                "leave out --cache_features, or choose fewer --stages, a smaller --window or a smaller --image_size"
            )


def score(
    args: argparse.Namespace, task: Task, predict: Predictor, rows: Sequence[str]
) -> dict[str, SegmentationScore]:
    """Score each of `rows` on the validation images; a collective operation."""
    loader = data.build_eval_loader(task.val_set, 1, args.num_workers, pin_memory=task.device.type == "cuda")
    classes, batch_size = len(task.classes), args.batch_size_per_gpu
    return segmentation.evaluate(task.features, predict, rows, loader, classes, task.windows, batch_size, task.device)


# --------------------------------------------------------------------------- linear and k-NN


def checkpoint_path(args: argparse.Namespace) -> Path:
    """Return the path of the checkpoint."""
    return Path(args.output_dir) / segmentation.CHECKPOINT


def run_identity(args: argparse.Namespace, task: Task) -> dict[str, Any]:
    """Return everything that affects the classifiers of a run, by flag; a checkpoint with another identity is not resumed."""
    flags = ["arch", "stages", "baselines", "cache_features", "image_size", "epochs", "lr", "weight_decay", "seed"]
    flags += ["ignore_index", "reduce_zero_label"]
    return {f"--{name}": getattr(args, name) for name in flags} | {
        "size of crops": list(task.crop),
        "--batch_size_per_gpu times processes": checkpointing.images_per_step(args),
        **task.identity,
    }


def train_classifiers(args: argparse.Namespace, task: Task) -> tuple[Predictor, list[str]]:
    """Train the classifiers, or resume their training; return what predicts with them, and their names."""
    settings = [Setting(name, lr) for name in task.features.columns for lr in args.lr]
    names = [setting.name for setting in settings]
    classifiers = Classifiers(settings, task.features, len(task.classes), args.seed).to(task.device)
    probe = Probe(settings, classifiers, args.weight_decay)
    run = run_identity(args, task)
    with collectives.failing_together(), files.disk_errors(args.output_dir):
        start = checkpointing.resume_run(checkpoint_path(args), partial(probe.load_state_dict, run=run), args)
    collectives.must_agree("checkpoints", (start.epoch, start.steps))
    if start.epoch < args.epochs:
        loader = build_feature_loader(args, task.features, [task.train_set], task.device, run)
        epoch_freq = 10 if args.cache_features else 1
        log = setup.open_log(args, task.config, loader.training_images, start, task.device, epoch_freq)
        about_run = {"run": run, "args": args, "classes": list(task.classes)}
        validate = partial(score, args, task, probe.predict, names)
        with closing(log), checkpointing.StopRequest(checkpoint_path(args)) as ending:
            segmentation.train(probe, loader, start, args, log, ending, about_run, validate)
    return probe.predict, names


def collect_regions(args: argparse.Namespace, task: Task) -> tuple[Predictor, list[str]]:
    """Collect training regions; return what predicts by their vote, and the names of its rows."""
    pin_memory = task.device.type == "cuda"
    loader = data.build_eval_loader(task.train_set, args.batch_size_per_gpu, args.num_workers, pin_memory)
    each = task.crop[0] // task.features.stride * (task.crop[1] // task.features.stride)
    regions = training_regions(task.features, loader, len(task.classes), each, args.knn_regions, args.seed, task.device)
    vote = RegionVote(task.features, regions, args.nb_knn, args.temperature)
    return vote.predict, vote.rows


# --------------------------------------------------------------------------- results


def report(args: argparse.Namespace, task: Task, scores: dict[str, SegmentationScore]) -> str:
    """Print and save the scores; return the name of the best row of the network."""
    protocol: dict[str, Any] = {"name": "k-NN of regions" if args.knn else "linear"}
    flags = ["temperature", "knn_regions"] if args.knn else ["epochs", "weight_decay", "cache_features"]
    protocol |= {name: getattr(args, name) for name in [*flags, "stages", "image_size", "seed"]}
    protocol |= {"crop": list(task.crop), "window": task.windows.side, "stride": task.windows.stride}
    protocol |= {"precision": task.identity["--precision"]}
    if not args.knn:
        protocol["batch_size"] = checkpointing.images_per_step(args)
    sizes = len(task.train_set), len(task.val_set), len(task.classes)
    best = max((name for name in scores if name.startswith(NETWORK)), key=lambda name: scores[name].miou)
    print(
        f"{protocol['name']} segmentation: {sizes[1]} validation and {utils.counted(sizes[0], 'training image')}, "
        f"{utils.counted(sizes[2], 'class', 'classes')}"
    )
    for name, row in scores.items():
        print(
            f"{name}: mIoU {row.miou:.2f}, pixel accuracy {row.pixel_accuracy:.2f}, class accuracy {row.class_accuracy:.2f}"
        )
    per_class = (
        f"{name} {'-' if iou is None else f'{iou:.1f}'}" for name, iou in zip(task.classes, scores[best].per_class)
    )
    print(textwrap.fill(f"IoU of {best}: {', '.join(per_class)}", 80))
    results = Results(
        f"segmentation{'_knn' if args.knn else ''}",
        describe_network(args) | {"digest": task.identity["digest of weights and config"]},
        describe_data(args.data_path, *sizes),
        protocol,
        {name: row.summary() | {"per_class": dict(zip(task.classes, row.per_class))} for name, row in scores.items()},
    )
    confusions = {name: row.confusion_P3 for name, row in scores.items()}
    save_results(args.output_dir, results, confusions, task.classes, counted="pixels")
    return best


@torch.no_grad()
def draw_predictions(args: argparse.Namespace, task: Task, predict: Predictor, rows: Sequence[str], row: str) -> None:
    """Write `predictions.png`: some validation images with their masks and what `row` predicts."""
    count = min(args.num_pictures, len(task.val_set))
    items = []
    for index in ((2 * number + 1) * len(task.val_set) // (2 * count) for number in range(count)):
        image, mask_HW = task.val_set.load(index)
        pixels_CHW, _ = task.val_set.pair_transform(image, mask_HW)
        pixels_CHW = pixels_CHW.to(task.device)
        size = mask_HW.shape[0], mask_HW.shape[1]
        found = segmentation.segment(task.features, predict, pixels_CHW, task.windows, args.batch_size_per_gpu, size)
        classes_HW = next(part for name, part in zip(rows, found) if name == row)
        found_HW = classes_HW.to(torch.uint8).cpu().numpy()
        shown = to_rgb(image) if isinstance(image, torch.Tensor) else image
        items.append(Segmented(printable(Path(task.val_set.source.name(index)).name), shown, mask_HW, found_HW))
    if items:
        content = io.BytesIO()
        prediction_page(items, task.classes, f"{row}: images, masks and predictions").save(content, format="png")
        path = Path(args.output_dir) / f"predictions{'_knn' if args.knn else ''}.png"
        with files.disk_errors(args.output_dir):
            files.write_with_backup(path, content.getvalue())


def main(args: argparse.Namespace) -> None:
    """Train linear classifiers or collect regions to vote, segment the validation images, and report."""
    device = launch.init_processes(args)
    utils.setup_logging(collectives.is_main_process())
    with checkpointing.training_run(checkpoint_path(args)):
        task = prepare(args, device)
        predict, rows = collect_regions(args, task) if args.knn else train_classifiers(args, task)
        with stopping.stop_at_once(lambda: "during the evaluation; the same command repeats it"):
            scores = score(args, task, predict, rows)
            if collectives.is_main_process():
                best = report(args, task, scores)
                draw_predictions(args, task, predict, rows, best)
                if not args.knn:  # else they may be those of a linear run that is to be resumed
                    (Path(args.output_dir) / CACHE).unlink(missing_ok=True)


if __name__ == "__main__":
    launch.run_script(partial(main, ARGS))
