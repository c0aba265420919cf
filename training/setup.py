"""What every pre-training script shares: flags, data, optimizer and schedules, and the story of a run from its start to its end.

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

import data
import utils
from checkpoints import files, loading
from config.schema import PATCH_SIZE
from data.transforms import augment
from distributed import collectives, ddp, fsdp, launch
from evaluation.knn_callback import KnnProbe, labeled_images
from models import Backbone
from models.base import METHOD_PREFIXES
from models.heads import DINOHead
from training import checkpointing, engine, optim
from training.nonfinite import NonFiniteSteps
from training.run_log import RunLog
from training.step import Method, Schedules, TrainStep
from utils import UsageError, logger


class Script(NamedTuple):
    """What a script is made of beside what all share; the functions take its arguments (and config, and device)."""

    check: Callable[[argparse.Namespace], None]  # stops on values that nothing else refuses
    load_config: Callable[[argparse.Namespace], CfgNode]
    build_views: Callable[[argparse.Namespace, CfgNode], tuple[data.Transform, data.DeviceTransform | None]]
    build_method: Callable[[argparse.Namespace, CfgNode, torch.device], Method]


def run(args: argparse.Namespace, script: Script) -> None:
    """Pre-train as the arguments say.

    Raises:
        UsageError: a mistake, or another run in --output_dir.
        Stopped: a signal came before the first step, or one that asks for an exit code of its own.
    """
    device = launch.init_processes(args)
    collectives.setup_logging()
    with checkpointing.training_run(Path(args.output_dir) / checkpointing.CHECKPOINT):
        _run(args, script, device)


def _run(args: argparse.Namespace, script: Script, device: torch.device) -> None:
    # What `auto` stands for is kept with the run, and told where it is another one at a resume.
    args.precision = utils.resolve_precision(args.precision if args.use_fp16 else "fp32", device)
    with collectives.failing_together():
        script.check(args)
        config = script.load_config(args)
        augment.check_normalization(config.INPUT.MEAN, config.INPUT.STD, config.MODEL.SPEC.IN_CHANS)
        loader = build_loader(args, config, *script.build_views(args, config), device)
        knn_images = build_knn_images(args, config)
    collectives.must_agree("numbers of images", len(loader.dataset))  # type: ignore[arg-type]
    utils.seed_everything(args.seed)
    method = script.build_method(args, config, device)
    utils.seed_everything(args.seed + collectives.get_rank())
    step = build_step(args, method, len(loader), device, args.precision)

    output_dir = Path(args.output_dir)
    with collectives.failing_together(), files.usable(output_dir):
        start = checkpointing.resume_run(output_dir, step, args)
        start = start_elsewhere(args, method, step) if start.is_new else start
        files.make_output_dir(output_dir)  # last: a mistaken start leaves nothing behind
    collectives.must_agree("checkpoints", (start.epoch, start.steps))
    if start.epoch >= args.epochs:
        done = utils.counted(start.epoch, "epoch")
        logger.info("%s has %s already, --epochs asks for %d: nothing to do", output_dir, done, args.epochs)
        tell_end(args)
        return
    images = len(loader.dataset)  # type: ignore[arg-type]
    seen = start.epoch * images + start.steps * args.batch_size_per_gpu * args.accum_iter * collectives.get_world_size()
    with collectives.failing_together(), files.usable(output_dir):
        if collectives.is_main_process():
            checkpointing.tidy(output_dir, start)
            files.save_provenance(output_dir, args, config)
        normalization = config.INPUT.MEAN, config.INPUT.STD
        log = RunLog(output_dir, args.epochs, args.log_freq, *normalization, device, images, seen)
    describe_run(args, method, loader, device, args.precision)

    probe = build_probe(args, method, knn_images, device) if knn_images else None
    with checkpointing.Saver(output_dir, step, args, config) as saver, closing(log):
        finished = engine.train(step, loader, args.epochs, args.accum_iter, log, saver, start, probe)
    if finished:
        tell_end(args)
    elif saver.code:
        raise utils.Stopped(code=saver.code)  # which `saver` has told


# --------------------------------------------------------------------------- data


def build_loader(
    args: argparse.Namespace,
    config: CfgNode,
    transform: data.Transform,
    finish: data.DeviceTransform | None,
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
    """The labeled images of --knn_every; none where that is off."""
    if not args.knn_every:
        return []
    return labeled_images(args.knn_data_path, get_crops(args, config).global_size, config, args.seed)


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
        return fsdp.shard_networks(student, teacher, device)
    return ddp.wrap_networks(student.to(device), teacher.to(device))


def compile_backbones(method: str, *networks: Backbone) -> None:
    """Compile the stages of networks, one graph for each size of crops; modules, names of parameters and checkpoints stay."""
    for network in networks:
        setattr(network, method, torch.compile(getattr(network, method), dynamic=False))


def build_step(
    args: argparse.Namespace, method: Method, batches_per_epoch: int, device: torch.device, precision: str
) -> TrainStep:
    """The optimizer and the schedules of every step."""
    steps = engine.steps_per_epoch(batches_per_epoch, args.accum_iter)
    batch_size = args.batch_size_per_gpu * collectives.get_world_size() * args.accum_iter
    schedules = Schedules(
        lr=optim.cosine_schedule(args.lr * batch_size / 256, args.min_lr, args.epochs, steps, args.warmup_epochs),
        weight_decay=optim.cosine_schedule(args.weight_decay, args.weight_decay_end, args.epochs, steps),
        momentum=optim.cosine_schedule(args.momentum_teacher, 1.0, args.epochs, steps),
    )
    optimizer = optim.build_optimizer(args.optimizer, optim.param_groups(loading.unwrap(method.student)))
    nonfinite = NonFiniteSteps(args.max_bad_steps, Path(args.output_dir))
    return TrainStep(method, optimizer, schedules, device, precision, args.clip_grad, args.freeze_last_layer, nonfinite)


def build_probe(
    args: argparse.Namespace, method: Method, images: list[data.ImageDataset], device: torch.device
) -> KnnProbe:
    """k-NN scores of both networks; the teacher's is the one without a suffix."""
    networks = {"knn_top1": method.teacher, "knn_top1_student": method.student}
    sizes = args.knn_every, args.batch_size_per_gpu, args.num_workers
    return KnnProbe(networks, images, *sizes, device, args.precision)


def start_elsewhere(args: argparse.Namespace, method: Method, step: TrainStep) -> checkpointing.RunPosition:
    """Where a run without a checkpoint of its own starts: at --pretrained_weights_ckpt, else anew, from --init_weights if given.

    Raises:
        UsageError: a damaged file, or one of another network.
    """
    if args.pretrained_weights_ckpt:
        return checkpointing.continue_run(Path(args.pretrained_weights_ckpt), step, args)
    if args.init_weights:
        content, path = loading.load_file(args.init_weights), args.init_weights
        for network, key in ((method.student, "student"), (method.teacher, "teacher")):
            state = loading.network_state(content, key, path)
            report = loading.load_network(
                network, state, f"checkpoint '{path}'", resize=True, new_parts=True, allow_partial=args.allow_partial
            )
            logger.info("%s from %s: %s", key, path, report)
    return checkpointing.RunPosition(is_new=True)


def describe_run(
    args: argparse.Namespace,
    method: Method,
    loader: DataLoader[data.Batch],
    device: torch.device,
    precision: str,
) -> None:
    """Say once what is trained on what."""
    network = loading.unwrap(method.student)
    in_backbone = sum(p.numel() for name, p in network.named_parameters() if not name.startswith(METHOD_PREFIXES))
    logger.info(
        "%s, %.1fM parameters (with heads %.1fM), %s; %s, %s of %d on %s; %s, %s",
        args.arch,
        in_backbone / 1e6,
        sum(p.numel() for p in network.parameters()) / 1e6,
        method.tasks,
        utils.counted(len(loader.dataset), "image"),  # type: ignore[arg-type]
        utils.counted(len(loader), "batch", "batches"),
        args.batch_size_per_gpu,
        "one process" if collectives.get_world_size() == 1 else f"each of {collectives.get_world_size()} processes",
        device,
        precision,
    )


def tell_end(args: argparse.Namespace) -> None:
    """Say where the results of a finished run are, and the command that scores its network."""
    score = ["python", "eval_knn.py", "--arch", args.arch]  # the checkpoint holds the rest of the network's config
    if args.patch_size != PATCH_SIZE:
        score += ["--patch_size", str(args.patch_size)]
    score += [
        "--pretrained_weights",
        str(Path(args.output_dir) / checkpointing.CHECKPOINT),
        "--checkpoint_key",
        "teacher",
    ]
    logger.info(
        "the run is done: %s has %s, log.txt and the curves (tensorboard --logdir %s). To score its network, with "
        "IMAGES/train/<class>/ and IMAGES/val/<class>/: %s",
        *(args.output_dir, checkpointing.CHECKPOINT, shlex.quote(args.output_dir)),
        shlex.join([*score, "--data_path", "IMAGES", "--output_dir", args.output_dir]),
    )
