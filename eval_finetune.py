"""Fine-tune a pre-trained backbone with labels and score it on validation images.

    python eval_finetune.py --data_path IMAGENET --pretrained_weights OUT/checkpoint.pth --output_dir OUT/finetune
    torchrun --nproc_per_node=8 eval_finetune.py ...                             # 64 images on each process
    python eval_finetune.py ... --mixup 0 --cutmix 0 --aa "" --reprob 0          # few images: less augmentation
    python eval_finetune.py ... --target_list_path 1percent.txt --finetune_head_layer 1     # few labels

--data_path holds train/<class>/ and val/<class>/; the head is a linear layer with one output for each training class. The recipe:
AdamW with layer-wise learning rate decay, linear warm-up and a cosine schedule, mixup and cutmix, RandAugment and random erasing,
label smoothing, drop path. --finetune_head_layer keeps the first hidden layers of the projection head below the linear layer. A run
that was killed is resumed by the same command. Epochs are counted from 0.

Results: `results/finetune.json` in --output_dir; `best.pth` has the weights of the best epoch (key `model`). docs/evaluation.md has
the details.
Origin: the recipe of DeiT (Touvron et al., ICML 2021) with the layer-wise rates of BEiT (Bao et al., ICLR 2022), from timm.
"""

from __future__ import annotations

from config.arguments.eval_finetune import get_args_parser as get_args_parser

if __name__ == "__main__":  # --help and usage errors are answered before torch is imported
    ARGS = get_args_parser().parse_command_line()

import argparse
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform
from torch import nn
from torch.utils.data import DataLoader
from yacs.config import CfgNode

import data
import utils
from checkpoints import files
from checkpoints.loading import load_backbone
from config import arguments
from config.arguments import small_runs
from data.datasets import Transform
from data.layouts.image_list import list_digest
from data.transforms import augment
from distributed import collectives, launch
from evaluation import linear
from evaluation.features import data_identity, evaluation_size, labeled_datasets, network_config
from evaluation.finetune import Accuracy, Best, FineTuner, Recipe, linear_head, projection_layers, save_run
from evaluation.results import Results, describe_data, describe_network, save_results, topk_name
from evaluation.run_dir import make_run_dir
from models import Backbone, build_model
from training import checkpointing, setup, stopping
from training.engine import steps_per_epoch
from training.run_log import EpochMeter, RunLog
from utils import UsageError, logger


def check_args(args: argparse.Namespace) -> None:
    """Raise UsageError for flags that cannot be combined, and fit the warm-up to the run."""
    arguments.check_weights(args)
    arguments.check_wandb(args)
    if args.finetune_head_layer and (args.token == "both" or not args.pretrained_weights):
        given = "--token both" if args.token == "both" else "--random_weights"
        raise UsageError(
            f"--finetune_head_layer {args.finetune_head_layer} needs the projection head of one token in a checkpoint and excludes "
            f"{given}; leave out one of them"
        )
    small_runs.fit_schedules(args)
    if (args.mixup or args.cutmix) and args.batch_size_per_gpu % 2:
        raise UsageError(
            f"--batch_size_per_gpu {args.batch_size_per_gpu} must be even for mixup and cutmix; change it, or pass --mixup 0 "
            "--cutmix 0"
        )


# --------------------------------------------------------------------------- data


def train_transform(args: argparse.Namespace, config: CfgNode, size: int) -> Transform:
    """Return the augmentation of DeiT for RGB images, random crops and flips for others.

    Raises:
        UsageError: timm rejects the policy of --aa.
    """
    mean, std = config.INPUT.MEAN, config.INPUT.STD
    if config.MODEL.SPEC.IN_CHANS != 3:
        logger.info("RandAugment and random erasing need RGB images: using random crops and flips")
        return augment.train_view(size, mean, std)
    try:
        view = create_transform(
            size,
            is_training=True,
            color_jitter=args.color_jitter,
            auto_augment=args.aa or None,
            interpolation="bicubic",
            mean=tuple(mean),
            std=tuple(std),
            re_prob=args.reprob,
            re_mode="pixel",
        )
    except (KeyError, AssertionError, ValueError) as error:
        raise UsageError(
            f"timm rejects --aa {args.aa} ({type(error).__name__}: {error}); try --aa rand-m9-mstd0.5-inc1, or --aa ''"
        ) from None
    return augment.MultiCrop([augment.limit_posterize(view)])


def build_datasets(args: argparse.Namespace, config: CfgNode, size: int) -> tuple[data.ImageDataset, data.ImageDataset]:
    """Open the augmented training images and the validation images, squares of `size` pixels."""
    mean, std = config.INPUT.MEAN, config.INPUT.STD
    augment.check_normalization(mean, std, config.MODEL.SPEC.IN_CHANS)
    return labeled_datasets(
        args.data_path,
        config,
        train_transform(args, config, size),
        augment.eval_view(size, args.crop_ratio, mean, std, args.val_interpolation),
        seed=args.seed,
        layout=data.layout_of(args),
        train_list=args.target_list_path,
    )


# --------------------------------------------------------------------------- network


def build_network(args: argparse.Namespace, config: CfgNode, classes: int, size: int) -> Backbone:
    """Build the pre-trained backbone with a new linear head, for images of `size` pixels.

    Raises:
        UsageError: invalid weights, --token or --finetune_head_layer, or images smaller than a patch.
    """
    network = build_model(args.arch, config, patch_size=args.patch_size)
    network.choose_token(args.token)
    if size < network.patch_size:
        raise UsageError(
            f"images of {size} pixels are smaller than a patch of {network.patch_size}; raise --image_size"
        )
    if args.pretrained_weights:
        report = load_backbone(network, args.pretrained_weights, args.checkpoint_key, allow_partial=args.allow_partial)
        logger.info("%s: %s", args.pretrained_weights, report)
    else:
        logger.warning("--random_weights: the network starts from random weights, this is supervised training")
    hidden: list[nn.Module] = []
    if args.finetune_head_layer:
        source = args.pretrained_weights, args.checkpoint_key, network.view_tokens[0]
        hidden = projection_layers(*source, args.finetune_head_layer, network.num_features)
    network.head = linear_head(hidden, network.view_width, classes, args.init_scale)
    network.grad_checkpointing = args.grad_checkpointing
    return network


def build_recipe(args: argparse.Namespace, steps: int) -> Recipe:
    """Return the hyperparameters of the command line for epochs of so many steps."""
    batch = checkpointing.images_per_step(args)
    return Recipe(
        epochs=args.epochs,
        steps=steps,
        lr=args.lr * batch / 256,
        min_lr=args.min_lr,
        warmup_epochs=args.warmup_epochs,
        layer_decay=args.layer_decay,
        weight_decay=args.weight_decay,
        mixup=args.mixup,
        cutmix=args.cutmix,
        smoothing=args.smoothing,
        clip_grad=args.clip_grad,
        accum_iter=args.accum_iter,
        ema_decay=args.model_ema_decay if args.model_ema else None,
    )


# --------------------------------------------------------------------------- the run


def run_identity(
    args: argparse.Namespace, size: int, train_set: data.ImageDataset, val_set: data.ImageDataset
) -> dict[str, Any]:
    """Return what must not change when a run is resumed, by flag."""
    identity = {"--arch": args.arch, "--image_size": size, "--crop_ratio": args.crop_ratio, "--token": args.token}
    identity |= {"--finetune_head_layer": args.finetune_head_layer, "--val_interpolation": args.val_interpolation}
    identity |= data_identity(train_set, val_set)
    if args.target_list_path:
        identity["digest of --target_list_path"] = list_digest(args.target_list_path)
    return identity


def better(best: Best, accuracies: dict[str, Accuracy], epoch: int) -> Best:
    """Return the better one of `best` and the networks of a validation; `best` if equal."""
    for name, accuracy in accuracies.items():
        if accuracy.top1 > best.top1:
            best = Best(name, epoch, *accuracy)
    return best


def train(
    tuner: FineTuner,
    train_loader: DataLoader[data.Batch],
    val_loader: DataLoader[data.Batch],
    position: checkpointing.RunPosition,
    identity: dict[str, Any],
    args: argparse.Namespace,
    config: CfgNode,
    log: RunLog,
) -> None:
    """Train the remaining epochs; log and save each, and validate every --val_freq epochs and after the last one."""
    output_dir, recipe = Path(args.output_dir), tuner.recipe
    batch = checkpointing.images_per_step(args)
    tally = data.FailureTally(len(train_loader.dataset))  # type: ignore[arg-type]
    top5 = topk_name(tuner.classes)

    def save_within(meter: EpochMeter, steps: int) -> str:
        within = checkpointing.RunPosition(meter.epoch, steps, meter.state())
        return save_run(output_dir, tuner, within, identity, args, config)

    with closing(log), checkpointing.StopRequest(output_dir / checkpointing.CHECKPOINT) as ending:
        for epoch in range(position.epoch, recipe.epochs):
            meter = EpochMeter(epoch, recipe.steps, images_per_step=batch)
            done = position.steps if epoch == position.epoch else 0
            if done:
                meter.resume(position.meter, done)
            ending.save_within = partial(save_within, meter)
            tuner.train_epoch(train_loader, epoch, meter, log, tally, ending, done)
            accuracies: dict[str, Accuracy] = {}
            if (epoch + 1) % args.val_freq == 0 or epoch + 1 == recipe.epochs:
                accuracies = tuner.validate(val_loader)
                tuner.best, tuner.last = better(tuner.best, accuracies, epoch), accuracies
            top5_is = {"top5_is": top5.lower()} if tuner.classes < 5 else {}
            val = {name: {"top1": row.top1, "top5": row.top5} for name, row in accuracies.items()}
            log.finish_epoch(meter, unreadable_images=len(tally.seen), val=val, **top5_is)
            if collectives.is_main_process():
                for name, row in accuracies.items():
                    print(f"epoch {epoch}/{recipe.epochs} {name}: Top1: {row.top1:.2f}, {top5}: {row.top5:.2f}")
            ending.failure = save_run(output_dir, tuner, checkpointing.RunPosition(epoch + 1), identity, args, config)


def report(
    tuner: FineTuner, datasets: tuple[data.ImageDataset, data.ImageDataset], size: int, args: argparse.Namespace
) -> None:
    """Print the best accuracy, and save it with those of the last epoch."""
    train_set, val_set = datasets
    best, classes = tuner.best, len(val_set.classes)
    images = utils.counted(len(val_set), "validation image")
    print(f"best of {images}: Top1: {best.top1:.2f} (epoch {best.epoch}, {best.network})")
    flags = ("epochs", "finetune_head_layer", "target_list_path", "crop_ratio", "val_interpolation", "seed")
    scores: dict[str, dict[str, Any]] = {
        "best": {"top1": best.top1, "top5": best.top5, "epoch": best.epoch, "network": best.network}
    }
    scores |= {f"last, {name}": {"top1": row.top1, "top5": row.top5} for name, row in tuner.last.items()}
    confusions = dict(zip(scores, [best.confusion_P3, *(row.confusion_P3 for row in tuner.last.values())]))
    results = Results(
        "finetune",
        describe_network(args),
        describe_data(args.data_path, len(train_set), len(val_set), classes),
        {name: getattr(args, name) for name in flags} | {"image_size": size, "top5_is": topk_name(classes).lower()},
        scores,
    )
    with files.disk_errors(args.output_dir):
        save_results(args.output_dir, results, confusions, train_set.classes)


def fine_tune(args: argparse.Namespace, device: torch.device) -> None:
    """Fine-tune the network, or resume its training, and report the accuracy."""
    precision = utils.resolve_precision(args.precision, device)
    pin_memory = device.type == "cuda"
    with collectives.failing_together():
        check_args(args)
        config = network_config(args, args.drop_path)
        size = evaluation_size(args, config)
        train_set, val_set = build_datasets(args, config, size)
        train_loader = data.build_train_loader(train_set, args.batch_size_per_gpu, args.num_workers, pin_memory)
        val_loader = data.build_eval_loader(val_set, args.batch_size_per_gpu, args.num_workers, pin_memory)
        recipe = build_recipe(args, steps_per_epoch(len(train_loader), args.accum_iter))
        output_dir = make_run_dir(args.output_dir, checkpointing.CHECKPOINT, linear.CHECKPOINT)
    collectives.must_agree("numbers of images", [len(train_set), len(val_set)])

    utils.seed_everything(args.seed)
    with collectives.failing_together():
        network = build_network(args, config, len(train_set.classes), size)
        config = network.resolve_config(config)
    utils.seed_everything(args.seed + collectives.get_rank())
    tuner = FineTuner(network.to(device), recipe, len(train_set.classes), device, precision)

    identity = run_identity(args, size, train_set, val_set)
    with collectives.failing_together(), files.disk_errors(output_dir):
        load = partial(tuner.load_state_dict, identity=identity)
        position = checkpointing.resume_run(output_dir / checkpointing.CHECKPOINT, load, args)
    collectives.must_agree("checkpoints", (position.epoch, position.steps))
    unfinished = position.epoch < args.epochs
    if unfinished:
        log = setup.open_log(args, config, len(train_set), position, device)
    with stopping.StopSignals():  # a signal after the last step does not prevent the report
        if unfinished:
            train(tuner, train_loader, val_loader, position, identity, args, config, log)
        else:
            done = utils.counted(position.epoch, "epoch")
            logger.info("%s already has %s of --epochs %d: nothing to train", output_dir, done, args.epochs)
        if collectives.is_main_process():
            report(tuner, (train_set, val_set), size, args)


def main(args: argparse.Namespace) -> None:
    """Fine-tune a network, and report its accuracy."""
    device = launch.init_processes(args)
    utils.setup_logging(collectives.is_main_process())
    with checkpointing.training_run(Path(args.output_dir) / checkpointing.CHECKPOINT):
        fine_tune(args, device)


if __name__ == "__main__":
    launch.run_script(partial(main, ARGS))
