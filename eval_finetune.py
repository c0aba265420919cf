"""Fine-tune a pre-trained backbone with labels, every weight of it, and score it on validation images.

    python eval_finetune.py --arch swin_tiny --data_path IMAGENET --pretrained_weights OUT/checkpoint.pth --output_dir OUT/finetune
    torchrun --nproc_per_node=8 eval_finetune.py ...                             # 64 images on each process
    python eval_finetune.py ... --mixup 0 --cutmix 0 --aa "" --reprob 0          # few images: less augmentation
    python eval_finetune.py ... --target_list_path 1percent.txt --finetune_head_layer 1     # few labels

--data_path holds train/<class>/ and val/<class>/; the head is a linear layer with an output for each class of train. The recipe:
AdamW, a rate that falls by --layer_decay from block to block towards the input, linear warm-up and half a cosine, mixup and
cutmix, RandAugment and random erasing, label smoothing, drop path. A killed run goes on when its command is repeated; a signal or
Ctrl-C saves it within the epoch at hand.
With --finetune_head_layer the linear layer stands on the first hidden layers of the projection head that pre-training left.
`results.json` in --output_dir has the best accuracy, `best.pth` the weights that reached it (key `model`); epochs
count from 0.

Origin: the recipe of DeiT (Touvron et al., ICML 2021) with the layer-wise rates of BEiT (Bao et al., ICLR 2022), from timm.
"""

from __future__ import annotations

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
from config.arguments import add_token_flag
from config.ranges import (
    ABOVE_ZERO,
    BATCH,
    BELOW_ONE,
    COUNT,
    EPOCHS,
    FACTOR,
    SEED,
    SHARE,
    WARMUP,
    WORKERS,
    integer,
    number,
)
from data.datasets import Transform
from data.layouts.lists import digest_of
from data.transforms import augment
from distributed import collectives, launch
from evaluation.features import data_identity, evaluation_size, labeled_datasets, network_config
from evaluation.finetune import (
    Accuracy,
    Best,
    FineTuner,
    Progress,
    Recipe,
    linear_head,
    projection_layers,
    resume_run,
    save_run,
)
from evaluation.results import claim_folder, write_results
from models import Backbone, build_model
from training import checkpointing
from training.engine import steps_per_epoch
from training.run_log import EpochMeter, RunLog
from utils import UsageError, logger

EVALUATION = "fine-tuning"  # how results.json tells whose it is


def get_args_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = arguments.Parser("eval_finetune.py", description="supervised fine-tuning of a backbone")
    add = parser.add_argument
    switch = partial(arguments.add_switch, parser)
    arguments.add_network_flags(parser)
    arguments.add_weights_flags(parser)
    add(
        "--drop_path", type=SHARE, default=None, help="stochastic depth, MODEL.SPEC.DROP_PATH_RATE; default: the yaml's"
    )
    add_token_flag(parser)
    add(
        "--finetune_head_layer",
        type=integer(0, 1000),
        default=0,
        help="hidden layers of the checkpoint's projection head that are kept",
    )
    add("--init_scale", type=FACTOR, default=1.0, help="factor on the first weights of the linear layer")
    arguments.add_list_flag(parser)
    switch("--grad_checkpointing", "recompute blocks in the backward: less memory, more time")
    add("--epochs", type=EPOCHS, default=100, help="passes over the training images")
    add("--warmup_epochs", type=WARMUP, default=5, help="epochs of the learning rate's warm-up")
    add("--batch_size_per_gpu", type=BATCH, default=64, help="images per process and batch")
    add("--accum_iter", type=BATCH, default=1, help="batches that count as one")
    add("--lr", type=FACTOR, default=5e-4, help="of the head for 256 images a step, scaled with them")
    add("--min_lr", type=FACTOR, default=1e-6, help="at the end, not scaled")
    add(
        "--layer_decay",
        type=ABOVE_ZERO,
        default=0.75,
        help="factor of the rate from a block to the one before it; 1: none",
    )
    add("--weight_decay", type=FACTOR, default=0.05, help="of all but biases, norms and positions")
    add("--clip_grad", type=number(0, 1e30), default=5.0, help="largest norm of all gradients together; 0: no clipping")
    add("--mixup", type=FACTOR, default=0.8, help="alpha of mixup; 0: none")
    add("--cutmix", type=FACTOR, default=1.0, help="alpha of cutmix; 0: none")
    add("--smoothing", type=BELOW_ONE, default=0.1, help="of the labels")
    add("--aa", default="rand-m9-mstd0.5-inc1", help="RandAugment policy of timm; empty: color jitter instead")
    add("--color_jitter", type=number(0, 2), default=0.4, help="where there is no --aa")
    add("--reprob", type=SHARE, default=0.25, help="probability of random erasing")
    switch("--model_ema", "validate an average of the weights too")
    add("--model_ema_decay", type=BELOW_ONE, default=0.9999, help="of that average; lower at the start")
    arguments.add_crop_flags(parser)
    add("--val_interpolation", choices=("bicubic", "bilinear"), default="bicubic", help="resize of validation images")
    add("--precision", choices=utils.PRECISIONS, default="auto", help="of the network; losses are always float32")
    add("--val_freq", type=COUNT, default=1, help="epochs between two validations; the last epoch always has one")
    add("--log_freq", type=COUNT, default=10, help="steps between two lines")
    add("--seed", type=SEED, default=0, help="of the head, order and views, and of random weights")
    add("--num_workers", type=WORKERS, default=10, help="loader processes, at most one a core")
    add("--data_path", default="", help="folder with train/<class>/ and val/<class>/")
    arguments.add_layout_flags(parser)
    add("--output_dir", default=".", help="folder for checkpoint.pth, best.pth, log.txt and results.json")
    arguments.add_launch_flags(parser)
    add("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Stop on values that no part of the program would refuse by itself.

    Raises:
        UsageError: naming the flag.
    """
    if args.finetune_head_layer and (args.token == "both" or not args.pretrained_weights):
        given = "--token both" if args.token == "both" else "--random_weights"
        raise UsageError(
            f"--finetune_head_layer {args.finetune_head_layer} keeps layers that a checkpoint has, of one token, which {given} has "
            "not; leave one of them out"
        )
    if args.warmup_epochs > args.epochs:
        raise UsageError(
            f"{args.warmup_epochs} warm-up epochs do not fit in {utils.counted(args.epochs, 'epoch')}; lower --warmup_epochs"
        )
    if (args.mixup or args.cutmix) and args.batch_size_per_gpu % 2:
        raise UsageError(
            f"mixup pairs images, --batch_size_per_gpu {args.batch_size_per_gpu} must be even, or --mixup and --cutmix 0"
        )


# --------------------------------------------------------------------------- images


def train_transform(args: argparse.Namespace, config: CfgNode, size: int) -> Transform:
    """DeiT's augmentation from timm for color images; random crops and flips for others.

    Raises:
        UsageError: timm does not know the policy.
    """
    mean, std = config.INPUT.MEAN, config.INPUT.STD
    if config.MODEL.SPEC.IN_CHANS != 3:
        logger.info("RandAugment and erasing are for color images: these get random crops and flips")
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
            f"timm does not take --aa {args.aa} ({type(error).__name__}: {error}); try --aa rand-m9-mstd0.5-inc1, or none"
        ) from None
    return augment.MultiCrop([augment.posterized_to_a_bit(view)])


def build_loaders(
    args: argparse.Namespace, config: CfgNode, device: torch.device, size: int
) -> tuple[DataLoader[data.Batch], DataLoader[data.Batch]]:
    """Shuffled and augmented training images, and validation images of which each process has its share; `size` pixels a side."""
    augment.check_normalization(config.INPUT.MEAN, config.INPUT.STD, config.MODEL.SPEC.IN_CHANS)
    mean, std = config.INPUT.MEAN, config.INPUT.STD
    val_transform = augment.eval_view(size, args.crop_ratio, mean, std, args.val_interpolation)
    transform = train_transform(args, config, size)
    train, val = labeled_datasets(args, config, transform, val_transform, args.target_list_path)
    pin = device.type == "cuda"
    return (
        data.build_train_loader(train, args.batch_size_per_gpu, args.num_workers, pin),
        data.build_eval_loader(val, args.batch_size_per_gpu, args.num_workers, pin),
    )


# --------------------------------------------------------------------------- network


def build_network(args: argparse.Namespace, config: CfgNode, classes: int, size: int) -> Backbone:
    """The pre-trained backbone with a new linear head, for images of `size` pixels a side.

    Raises:
        UsageError: see `checkpoint.load_backbone`, `Backbone.choose_token` and `finetune.projection_layers`.
    """
    network = build_model(args.arch, config, patch_size=args.patch_size)
    network.choose_token(args.token)
    if size < network.patch_size:
        raise UsageError(f"images of {size} pixels are smaller than a patch of {network.patch_size}; enlarge them")
    if args.pretrained_weights:
        report = load_backbone(network, args.pretrained_weights, args.checkpoint_key, allow_partial=args.allow_partial)
        logger.info("%s: %s", args.pretrained_weights, report)
    else:
        logger.warning("--random_weights: the network starts from random weights, this is supervised training")
    kept: list[nn.Module] = []
    if args.finetune_head_layer:
        found = args.pretrained_weights, args.checkpoint_key, network.view_tokens[0]
        kept = projection_layers(*found, args.finetune_head_layer, network.num_features)
    network.head = linear_head(kept, network.view_width, classes, args.init_scale)
    network.grad_checkpointing = args.grad_checkpointing
    return network


def make_recipe(args: argparse.Namespace, steps: int) -> Recipe:
    """The recipe of the command line, with the rate scaled to the batch of all processes."""
    batch = args.batch_size_per_gpu * args.accum_iter * collectives.get_world_size()
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


def better(best: Best, accuracies: dict[str, Accuracy], epoch: int) -> Best:
    """The best of before and of this validation; the earlier one of equals."""
    for name, (top1, top5) in accuracies.items():
        if top1 > best.top1:
            best = Best(name, epoch, top1, top5)
    return best


def ranked(classes: int) -> str:
    """What the second accuracy is: that of five classes, or of all where these are fewer."""
    return f"Top{min(classes, 5)}"


def report(progress: Progress, val: data.ImageDataset, about: dict[str, Any], args: argparse.Namespace) -> None:
    """Write `results.json`: the best and the last accuracies; print the best one when the run is finished."""
    best = progress.best
    record = {
        "top1": best.top1,
        "top5": best.top5,
        "epoch": best.epoch,
        "network": best.network,
        "top5_is": ranked(len(val.classes)).lower(),
        "last": {name: accuracy._asdict() for name, accuracy in progress.last.items()},
        "epochs": args.epochs,
        "classes": len(val.classes),
        "val_images": len(val),
        "arch": args.arch,
        "pretrained_weights": args.pretrained_weights,
        "checkpoint_key": args.checkpoint_key,
        "token": args.token,
        "finetune_head_layer": args.finetune_head_layer,
        "target_list_path": args.target_list_path,
        "train_images": about["numbers of images and classes"][0],
        "data_path": args.data_path,
        "image_size": about["--image_size"],
        "crop_ratio": args.crop_ratio,
        "val_interpolation": args.val_interpolation,
    }
    written = write_results(Path(args.output_dir), EVALUATION, record)
    if progress.epochs >= args.epochs:
        logger.info("%s", written)
        images = utils.counted(len(val), "validation image")
        print(f"best of {images}: Top1: {best.top1:.2f} (epoch {best.epoch}, {best.network})")


def train(
    tuner: FineTuner,
    loaders: tuple[DataLoader[data.Batch], DataLoader[data.Batch]],
    progress: Progress,
    about: dict[str, Any],
    args: argparse.Namespace,
    config: CfgNode,
) -> None:
    """The epochs that are left, with validation, `log.txt`, checkpoint and `results.json` after each.

    `about` is what makes a run the same.
    """
    train_loader, val_loader = loaders
    output_dir, recipe = Path(args.output_dir), tuner.recipe
    assert isinstance(train_loader.dataset, data.ImageDataset)
    assert isinstance(val_loader.dataset, data.ImageDataset)
    batch = args.batch_size_per_gpu * recipe.accum_iter * collectives.get_world_size()
    images = len(train_loader.dataset)
    seen = progress.epochs * images + progress.steps * batch
    with collectives.failing_together(), files.disk_errors(output_dir):
        normalization = config.INPUT.MEAN, config.INPUT.STD
        log = RunLog(output_dir, recipe.epochs, args.log_freq, *normalization, tuner.device, images, seen)
    tally = data.FailureTally(len(train_loader.dataset))

    def save_within(progress: Progress, meter: EpochMeter, steps: int) -> str:
        within = progress._replace(steps=steps, meter=meter.state())
        return save_run(output_dir, tuner, within, about, args, config)

    with closing(log), checkpointing.StopRequest(output_dir / checkpointing.CHECKPOINT) as ending:
        for epoch in range(progress.epochs, recipe.epochs):
            meter, done = EpochMeter(epoch, recipe.steps, images_per_step=batch), progress.steps
            if done:
                meter.go_on_from(progress.meter, done)
            ending.save_within = partial(save_within, progress, meter)
            tuner.train_epoch(train_loader, epoch, meter, log, tally, ending, done)
            accuracies: dict[str, Accuracy] = {}
            if (epoch + 1) % args.val_freq == 0 or epoch + 1 == recipe.epochs:
                accuracies = tuner.validate(val_loader)
            progress = Progress(epoch + 1, better(progress.best, accuracies, epoch), accuracies or progress.last)
            about_top5 = {"top5_is": ranked(tuner.classes).lower()} if tuner.classes < 5 else {}
            val = {name: row._asdict() for name, row in accuracies.items()}
            log.finish_epoch(meter, unreadable_images=len(tally.seen), val=val, **about_top5)
            if accuracies and collectives.is_main_process():
                for name, row in accuracies.items():
                    print(
                        f"epoch {epoch}/{recipe.epochs} {name}: Top1: {row.top1:.2f}, {ranked(tuner.classes)}: {row.top5:.2f}"
                    )
                with log.failing_softly():
                    report(progress, val_loader.dataset, about, args)
            ending.failure = save_run(output_dir, tuner, progress, about, args, config)


def main(args: argparse.Namespace) -> None:
    """Fine-tune as the arguments say."""
    device = launch.init_processes(args)
    collectives.setup_logging()
    with checkpointing.training_run(Path(args.output_dir) / checkpointing.CHECKPOINT):
        _fine_tune(args, device)


def _fine_tune(args: argparse.Namespace, device: torch.device) -> None:
    precision = utils.resolve_precision(args.precision, device)
    with collectives.failing_together():
        check_args(args)
        arguments.check_weights(args)
        config = network_config(args, args.drop_path)
        size = evaluation_size(args, config)
        loaders = build_loaders(args, config, device, size)
        output_dir = claim_folder(args.output_dir, EVALUATION)
        recipe = make_recipe(args, steps_per_epoch(len(loaders[0]), args.accum_iter))
    train_set, val_set = (loader.dataset for loader in loaders)
    assert isinstance(train_set, data.ImageDataset)
    assert isinstance(val_set, data.ImageDataset)
    collectives.must_agree("numbers of images", [len(loader.dataset) for loader in loaders])
    classes = len(train_set.classes)
    about = {"--arch": args.arch, "--image_size": size, "--crop_ratio": args.crop_ratio, "--token": args.token}
    about |= {"--finetune_head_layer": args.finetune_head_layer, "--val_interpolation": args.val_interpolation}
    about |= data_identity(train_set, val_set)
    if args.target_list_path:
        about["digest of --target_list_path"] = digest_of(args.target_list_path)
    utils.seed_everything(args.seed)
    with collectives.failing_together():
        network = build_network(args, config, classes, size)
        config = network.settled(config)
    utils.seed_everything(args.seed + collectives.get_rank())
    tuner = FineTuner(network.to(device), recipe, classes, device, precision)
    with collectives.failing_together(), files.disk_errors(output_dir):
        progress = resume_run(output_dir, tuner, about, args)
    collectives.must_agree("checkpoints", (progress.epochs, progress.steps))
    if progress.epochs >= args.epochs:
        done = utils.counted(progress.epochs, "epoch")
        logger.info("%s has %s already, --epochs asks for %d: nothing to do", output_dir, done, args.epochs)
        if collectives.is_main_process():
            report(progress, val_set, about, args)
        return
    with collectives.failing_together(), files.disk_errors(output_dir):
        if collectives.is_main_process():
            checkpointing.clean_up(output_dir, progress.place)
            files.save_provenance(output_dir, args, config)
    train(tuner, loaders, progress, about, args, config)


if __name__ == "__main__":
    launch.run_script(lambda: main(get_args_parser().parse_args()))
