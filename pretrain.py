"""What every pre-training script shares: flags, data, optimiser and schedules, and the story of a run from its start to its end.

A script brings its own flags, views, networks and loss as a `Script`; `run` does the rest by `engine.train`.

Origin: names and defaults of the flags are those of microsoft/esvit where it has them; the story of a run is this project's own.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader
from yacs.config import CfgNode

import checkpoint
import data
import engine
import files
import flags
import optim
import resume
import sharding
import utils
from bad_steps import MAX_BAD_STEPS, BadSteps
from config import PATCH_SIZE
from data import augment
from flags import bool_flag
from knn_probe import KnnProbe, labelled_images
from models import Backbone
from models.base import BESIDE
from models.heads import DINOHead
from progress import RunLog
from ranges import (
    ABOVE_ZERO,
    BATCH,
    COUNT,
    EPOCHS,
    FACTOR,
    MANY,
    PIXELS,
    SEED,
    SHARE,
    TEMPERATURE,
    WARMUP,
    WORKERS,
    integer,
    number,
)
from utils import UsageError, logger


class Script(NamedTuple):
    """What a script is made of beside what all share; the functions take its arguments (and config, and device)."""

    check: Callable[[argparse.Namespace], None]  # stops on values that nothing else refuses
    load_config: Callable[[argparse.Namespace], CfgNode]
    build_views: Callable[[argparse.Namespace, CfgNode], tuple[data.Transform, data.Finish | None]]
    build_method: Callable[[argparse.Namespace, CfgNode, torch.device], engine.Method]


def run(args: argparse.Namespace, script: Script) -> None:
    """Pre-train as the arguments say.

    Raises:
        UsageError: a mistake, or another run in --output_dir.
        Stopped: a signal came before the first step, or one that asks for an exit code of its own.
    """
    device = utils.init_processes(args)
    utils.setup_logging()
    with resume.training_run(Path(args.output_dir) / resume.CHECKPOINT):
        _run(args, script, device)


def _run(args: argparse.Namespace, script: Script, device: torch.device) -> None:
    # What `auto` stands for is kept with the run, and told where it is another one at a resume.
    args.precision = utils.resolve_precision(args.precision if args.use_fp16 else "fp32", device)
    with utils.failing_together():
        script.check(args)
        config = script.load_config(args)
        augment.check_normalisation(config.INPUT.MEAN, config.INPUT.STD, config.MODEL.SPEC.IN_CHANS)
        loader = build_loader(args, config, *script.build_views(args, config), device)
        knn_images = build_knn_images(args, config)
    utils.must_agree("numbers of images", len(loader.dataset))  # type: ignore[arg-type]
    utils.seed_everything(args.seed)
    method = script.build_method(args, config, device)
    utils.seed_everything(args.seed + utils.get_rank())
    step = build_step(args, method, len(loader), device, args.precision)

    output_dir = Path(args.output_dir)
    with utils.failing_together(), files.usable(output_dir):
        start = resume.resume_run(output_dir, step, args)
        start = start_elsewhere(args, method, step) if start.is_new else start
        files.make_output_dir(output_dir)  # last: a mistaken start leaves nothing behind
    utils.must_agree("checkpoints", (start.epoch, start.steps))
    if start.epoch >= args.epochs:
        done = utils.counted(start.epoch, "epoch")
        logger.info("%s has %s already, --epochs asks for %d: nothing to do", output_dir, done, args.epochs)
        tell_end(args)
        return
    images = len(loader.dataset)  # type: ignore[arg-type]
    seen = start.epoch * images + start.steps * args.batch_size_per_gpu * args.accum_iter * utils.get_world_size()
    with utils.failing_together(), files.usable(output_dir):
        if utils.is_main_process():
            resume.tidy(output_dir, start)
            files.save_provenance(output_dir, args, config)
        normalisation = config.INPUT.MEAN, config.INPUT.STD
        log = RunLog(output_dir, args.epochs, args.log_freq, *normalisation, device, images, seen)
    describe_run(args, method, loader, device, args.precision)

    probe = build_probe(args, method, knn_images, device) if knn_images else None
    with resume.Saver(output_dir, step, args, config) as saver, closing(log):
        finished = engine.train(step, loader, args.epochs, args.accum_iter, log, saver, start, probe)
    if finished:
        tell_end(args)
    elif saver.code:
        raise utils.Stopped(code=saver.code)  # which `saver` has told


# --------------------------------------------------------------------------- flags


def add_student_teacher_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of student and teacher."""
    add = parser.add_argument
    flags.add_network_flags(parser)
    add("--out_dim", type=integer(1, 10_000_000), default=65536, help="number of prototypes K")
    add("--norm_last_layer", type=bool_flag, default=True, help="freeze the gain of the prototypes at 1")
    add("--momentum_teacher", type=SHARE, default=0.996, help="EMA momentum of the teacher at the start; 1 at the end")
    add("--use_bn_in_head", type=bool_flag, default=False, help="BatchNorm in the heads")
    add("--head_hidden_dim", type=integer(1, 131_072), default=2048, help="hidden width of the heads")
    add("--head_bottleneck_dim", type=integer(1, 65_536), default=256, help="width of the heads before the prototypes")
    add("--plain_loss", type=bool_flag, default=False, help="hold all logits at once: slower, for comparison")
    add("--grad_checkpointing", type=bool_flag, default=False, help="recompute blocks in the backward to save memory")
    flags.add_switch(parser, "--fsdp", "spread both networks and the optimiser over the processes, to save memory")
    flags.add_switch(
        parser,
        "--compile",
        "torch.compile both backbones; the first step takes minutes, half a minute where torch still has the code of a run of "
        "these sizes (see TORCHINDUCTOR_CACHE_DIR)",
    )


def add_optimisation_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of schedules, precision and steps."""
    add = parser.add_argument
    add("--warmup_teacher_temp", type=TEMPERATURE, default=0.04, help="teacher temperature at the start")
    add("--teacher_temp", type=TEMPERATURE, default=0.04, help="teacher temperature after its warm-up")
    add("--warmup_teacher_temp_epochs", type=WARMUP, default=0, help="epochs of that warm-up")
    add("--use_fp16", type=bool_flag, default=True, help="mixed precision; False is --precision fp32")
    add(
        "--precision", default="auto", choices=utils.PRECISIONS, help="what the networks compute in; losses are float32"
    )
    add("--weight_decay", type=FACTOR, default=0.04, help="at the start")
    add("--weight_decay_end", type=FACTOR, default=0.4, help="at the end of its cosine")
    add("--clip_grad", type=number(0, 1e30), default=3.0, help="largest norm of each parameter's gradient, 0 for none")
    add("--batch_size_per_gpu", type=BATCH, default=64, help="images per process and micro-batch")
    add("--accum_iter", type=BATCH, default=1, help="micro-batches per optimiser step")
    add("--epochs", type=EPOCHS, default=100, help="passes over the images; schedules end with the last")
    add("--freeze_last_layer", type=WARMUP, default=1, help="epochs during which the prototypes stay as they are")
    add("--lr", type=FACTOR, default=0.0005, help="for 256 images; scaled by batch x processes x accumulation / 256")
    add("--warmup_epochs", type=WARMUP, default=10, help="epochs of the learning rate's warm-up")
    add("--min_lr", type=FACTOR, default=1e-6, help="at the end of its cosine")
    add("--optimizer", default="adamw", choices=optim.OPTIMIZERS, help="what moves the student")


def add_view_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of multi-crop, and of the colours that all methods vary."""
    add = parser.add_argument
    add(
        "--global_crops_scale",
        action=flags.Ascending,
        type=ABOVE_ZERO,
        nargs=2,
        default=(0.4, 1.0),
        help="area of the global crops",
    )
    add("--global_crops_size", type=PIXELS, default=None, help="pixels; default: MODEL.IMAGE_SIZE of the yaml")
    add("--local_crops_number", type=integer(0, 1000), nargs="+", default=(8,), help="local crops of each size")
    add(
        "--local_crops_scale",
        action=flags.Ascending,
        type=ABOVE_ZERO,
        nargs=2,
        default=(0.05, 0.4),
        help="area of the local crops",
    )
    add("--local_crops_size", type=PIXELS, nargs="+", default=(96,), help="pixels, one value for each number")
    add(
        "--aug_backend",
        default="auto",
        choices=augment.BACKENDS,
        help="split: colours in batches on the training device",
    )
    add("--color-jitter", dest="color_jitter", type=number(0, 2), default=0.4, help="strength of the colour jitter")


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the data, of what is kept and told, and of the launch; last, because config overrides follow."""
    add = parser.add_argument
    add(
        "--dataset",
        default="imagenet1k",
        help="imagenet1k (any data), imagenet22k, webvision1, openimages_v4, or a folder under --data_path",
    )
    add(
        "--data_path",
        default="",
        help="folder of images, with or without classes or train/, text file of paths, or tar shards (see docs/data.md)",
    )
    flags.add_layout_flags(parser)
    add(
        "--sampler",
        default="distributed",
        choices=("distributed", "chunk"),
        help="chunk: neighbours are read by one node at about the same time (see data/chunks.py)",
    )
    add("--shuffle_buffer", type=COUNT, default=256, help="images that each worker mixes, of tar shards")
    add(
        "--epoch_images",
        type=integer(0, 10**12),
        default=0,
        help="images of an epoch of tar shards; 0: all, as counted or told",
    )
    add(
        "--pretrained_weights_ckpt",
        default="",
        help="full checkpoint whose run goes on here: networks, centers, moments and epoch, on the same schedule; heads that it "
        "lacks start fresh (views first, then --use_dense_prediction). A checkpoint.pth in --output_dir wins",
    )
    add("--init_weights", default="", help="start a new schedule from these weights, of any known layout")
    flags.add_switch(parser, "--allow_partial", "take what fits of either file")
    add("--output_dir", default=".", help="where everything of the run goes")
    add(
        "--saveckp_freq",
        type=integer(0),
        default=5,
        help="keep checkpoint{epoch:04}.pth of every so many epochs from 0000 on, 0 for none",
    )
    add("--save_every_steps", type=integer(0), default=0, help="write checkpoint.pth also within an epoch, 0 for no")
    add("--save_every_minutes", type=number(0, MANY), default=0.0, help="the same by the clock")
    add(
        "--keep_last",
        type=integer(0, 1000),
        default=1,
        help="checkpoint_previous*.pth kept, to go on from if checkpoint.pth is damaged",
    )
    add("--log_freq", type=COUNT, default=10, help="steps between two log lines")
    add("--max_bad_steps", type=COUNT, default=MAX_BAD_STEPS, help="steps in a row, not finite, that end the run")
    add("--knn_every", type=integer(0), default=0, help="epochs between two k-NN scores, 0 for none")
    add("--knn_data_path", default="", help="small labelled folder for them, with train/ and val/ or without a split")
    add("--seed", type=SEED, default=0, help="of weights, order and views")
    add("--num_workers", type=WORKERS, default=10, help="loader processes, at most one a core")
    flags.add_launch_flags(parser)
    add("opts", nargs="*", metavar="KEY VALUE", help="config overrides, e.g. MODEL.SPEC.WINDOW_SIZE 14")


def check_args(args: argparse.Namespace) -> None:
    """Stop on values that no part of the program would refuse by itself.

    Raises:
        UsageError: naming the flag.
    """
    if args.compile and args.grad_checkpointing:
        raise UsageError("--compile and --grad_checkpointing do not work together; turn one of them off")
    if args.fsdp and (args.compile or args.optimizer == "lars"):
        which = "--compile" if args.compile else "--optimizer lars"
        raise UsageError(f"--fsdp and {which} do not work together; leave one of them out")
    if args.pretrained_weights_ckpt and args.init_weights:
        raise UsageError(
            "--pretrained_weights_ckpt continues a run and --init_weights starts a new schedule; leave one of them out"
        )


# --------------------------------------------------------------------------- data


def build_loader(
    args: argparse.Namespace,
    config: CfgNode,
    transform: data.Transform,
    finish: data.Finish | None,
    device: torch.device,
) -> DataLoader[data.Batch]:
    """The training images as batches of the views that `transform` and `finish` make.

    Raises:
        UsageError: --epoch_images without tar shards, or see `data.build_dataset`, `data.build_stream` and `build_train_loader`.
    """
    in_chans = config.MODEL.SPEC.IN_CHANS
    path = args.data_path if args.dataset in data.COLLECTIONS else Path(args.data_path) / args.dataset
    layout = data.layout_of(args, str(path))
    dataset: data.ImageDataset | data.ShardStream
    if layout == "shards":
        dataset = data.build_stream(
            str(path), transform, in_chans, args.seed, args.shuffle_buffer, args.epoch_images, config.INPUT.RANGE
        )
    elif args.epoch_images:
        raise UsageError(f"--epoch_images {args.epoch_images} is for tar shards, {path} holds none; leave it out")
    else:
        dataset = data.build_dataset(
            path, "train", transform, in_chans, args.seed, layout=layout, value_range=config.INPUT.RANGE
        )
    pin = device.type == "cuda"
    return data.build_train_loader(
        dataset, args.batch_size_per_gpu, args.num_workers, pin, finish=finish, sampler=args.sampler
    )


def build_knn_images(args: argparse.Namespace, config: CfgNode) -> list[data.ImageDataset]:
    """The labelled images of --knn_every; none where that is off."""
    if not args.knn_every:
        return []
    return labelled_images(args.knn_data_path, get_crops(args, config).global_size, config, args.seed)


def get_crops(args: argparse.Namespace, config: CfgNode) -> augment.Crops:
    """Sizes, numbers and scales of the views."""
    crops = augment.Crops(
        global_size=args.global_crops_size or config.MODEL.IMAGE_SIZE[0],
        global_scale=tuple(args.global_crops_scale),
        local_numbers=tuple(args.local_crops_number),
        local_sizes=tuple(args.local_crops_size),
        local_scale=tuple(args.local_crops_scale),
    )
    augment.check_crops(crops)
    return crops


# --------------------------------------------------------------------------- networks and step


def head_builder(args: argparse.Namespace, network: Backbone) -> Callable[[], DINOHead]:
    """What makes a head for the features of a network."""
    return partial(
        DINOHead,
        network.num_features,
        args.out_dim,
        use_bn=args.use_bn_in_head,
        norm_last_layer=args.norm_last_layer,
        hidden_dim=args.head_hidden_dim,
        bottleneck_dim=args.head_bottleneck_dim,
        factored=not args.plain_loss,
    )


def pair_networks(
    args: argparse.Namespace,
    student: Backbone,
    teacher: Backbone,
    crops: augment.Crops,
    device: torch.device,
    compiled: str = "forward_features",
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The teacher becomes the student's copy; both come back on the device, wrapped for several processes.

    `compiled` is the method of a backbone that --compile compiles.

    Raises:
        UsageError: crops smaller than a patch.
    """
    smallest = min(crops.global_size, *crops.local_sizes)
    if smallest < student.patch_size:
        raise UsageError(f"crops of {smallest} pixels are smaller than a patch of {student.patch_size}; enlarge them")
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    student.grad_checkpointing = args.grad_checkpointing
    if args.compile:
        compile_backbones(compiled, student, teacher)
    if args.fsdp:
        return sharding.shard_networks(student, teacher, device)
    return engine.wrap_networks(student.to(device), teacher.to(device))


def compile_backbones(method: str, *networks: Backbone) -> None:
    """Compile the stages of networks, one graph for each size of crops; modules, names of parameters and checkpoints stay."""
    for network in networks:
        setattr(network, method, torch.compile(getattr(network, method), dynamic=False))


def build_step(
    args: argparse.Namespace, method: engine.Method, batches_per_epoch: int, device: torch.device, precision: str
) -> engine.TrainStep:
    """The optimiser and the schedules of every step."""
    steps = engine.steps_per_epoch(batches_per_epoch, args.accum_iter)
    batch_size = args.batch_size_per_gpu * utils.get_world_size() * args.accum_iter
    schedules = engine.Schedules(
        lr=optim.cosine_schedule(args.lr * batch_size / 256, args.min_lr, args.epochs, steps, args.warmup_epochs),
        weight_decay=optim.cosine_schedule(args.weight_decay, args.weight_decay_end, args.epochs, steps),
        momentum=optim.cosine_schedule(args.momentum_teacher, 1.0, args.epochs, steps),
    )
    optimizer = optim.build_optimizer(args.optimizer, optim.param_groups(checkpoint.unwrap(method.student)))
    bad_steps = BadSteps(args.max_bad_steps, Path(args.output_dir))
    return engine.TrainStep(
        method, optimizer, schedules, device, precision, args.clip_grad, args.freeze_last_layer, bad_steps
    )


def build_probe(
    args: argparse.Namespace, method: engine.Method, images: list[data.ImageDataset], device: torch.device
) -> KnnProbe:
    """k-NN scores of both networks; the teacher's is the one without a suffix."""
    networks = {"knn_top1": method.teacher, "knn_top1_student": method.student}
    sizes = args.knn_every, args.batch_size_per_gpu, args.num_workers
    return KnnProbe(networks, images, *sizes, device, args.precision)


def start_elsewhere(args: argparse.Namespace, method: engine.Method, step: engine.TrainStep) -> resume.Place:
    """Where a run without a checkpoint of its own starts: at --pretrained_weights_ckpt, else anew, from --init_weights if given.

    Raises:
        UsageError: a damaged file, or one of another network.
    """
    if args.pretrained_weights_ckpt:
        return resume.continue_run(Path(args.pretrained_weights_ckpt), step, args)
    if args.init_weights:
        content, path = checkpoint.load_file(args.init_weights), args.init_weights
        for network, key in ((method.student, "student"), (method.teacher, "teacher")):
            state = checkpoint.network_state(content, key, path)
            report = checkpoint.load_network(
                network, state, f"checkpoint '{path}'", resize=True, new_parts=True, allow_partial=args.allow_partial
            )
            logger.info("%s from %s: %s", key, path, report)
    return resume.Place(is_new=True)


def describe_run(
    args: argparse.Namespace,
    method: engine.Method,
    loader: DataLoader[data.Batch],
    device: torch.device,
    precision: str,
) -> None:
    """Say once what is trained on what."""
    network = checkpoint.unwrap(method.student)
    in_backbone = sum(p.numel() for name, p in network.named_parameters() if not name.startswith(BESIDE))
    logger.info(
        "%s, %.1fM parameters (with heads %.1fM), %s; %s, %s of %d on %s; %s, %s",
        args.arch,
        in_backbone / 1e6,
        sum(p.numel() for p in network.parameters()) / 1e6,
        method.tasks,
        utils.counted(len(loader.dataset), "image"),  # type: ignore[arg-type]
        utils.counted(len(loader), "batch", "batches"),
        args.batch_size_per_gpu,
        "one process" if utils.get_world_size() == 1 else f"each of {utils.get_world_size()} processes",
        device,
        precision,
    )


def tell_end(args: argparse.Namespace) -> None:
    """Say where the results of a finished run are, and the command that scores its network."""
    score = ["python", "eval_knn.py", "--arch", args.arch]  # the checkpoint holds the rest of the network's config
    if args.patch_size != PATCH_SIZE:
        score += ["--patch_size", str(args.patch_size)]
    score += ["--pretrained_weights", str(Path(args.output_dir) / resume.CHECKPOINT), "--checkpoint_key", "teacher"]
    logger.info(
        "the run is done: %s has %s, log.txt and the curves (tensorboard --logdir %s). To score its network, with "
        "IMAGES/train/<class>/ and IMAGES/val/<class>/: %s",
        *(args.output_dir, resume.CHECKPOINT, shlex.quote(args.output_dir)),
        shlex.join([*score, "--data_path", "IMAGES", "--output_dir", args.output_dir]),
    )
