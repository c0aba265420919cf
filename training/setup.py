"""Builders of a pre-training run: data, student and teacher, optimizer and schedules, resume, log.

Origin: the schedules are those of DINO (Caron et al., ICCV 2021) and microsoft/esvit.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from yacs.config import CfgNode

import data
import utils
from checkpoints import files, layouts, loading, serialization
from config.arguments import small_runs
from data.transforms import augment
from data.transforms.crops import CropTransform, ScaledCrops
from distributed import collectives, ddp, fsdp
from models import Backbone
from models.base import METHOD_PREFIXES
from models.heads import DINOHead
from training import checkpointing, engine, estimate, optim
from training.checkpointing import RunPosition
from training.nonfinite import NonFiniteSteps
from training.run_log import RunLog
from training.step import Method, Schedules, TrainStep
from training.wandb_mirror import mirror_tensorboard
from utils import UsageError, logger

# --------------------------------------------------------------------------- data


def build_loader(
    args: argparse.Namespace,
    config: CfgNode,
    transform: data.Transform,
    device_transform: data.DeviceTransform | None,
    device: torch.device,
) -> DataLoader[data.Batch]:
    """Build the loader of the training images, whose batches are made by `transform` and `device_transform`.

    Raises:
        UsageError: --epoch_images without tar shards, --decode scaled for a transform of whole images, or the images cannot be
            found or do not make a batch.
    """
    if args.decode == "scaled":
        if not isinstance(transform, CropTransform):
            raise UsageError(
                "--decode scaled needs the crops of --aug_backend split: --aug-opt dino_aug or small_aug with 3 channels; "
                "change these, or use --decode full"
            )
        transform = ScaledCrops(transform)
    augment.check_normalization(config.INPUT.MEAN, config.INPUT.STD, config.MODEL.SPEC.IN_CHANS)
    in_chans = config.MODEL.SPEC.IN_CHANS
    path = args.data_path if args.dataset in data.COLLECTIONS else Path(args.data_path) / args.dataset
    layout = data.layout_of(args, str(path))
    dataset: data.ImageDataset | data.ShardStream
    if layout == "shards":
        dataset = data.build_stream(
            str(path), transform, in_chans, args.seed, args.shuffle_buffer, args.epoch_images, config.INPUT.RANGE
        )
    elif args.epoch_images:
        raise UsageError(f"--epoch_images {args.epoch_images} requires tar shards, but {path} has none; leave it out")
    else:
        dataset = data.build_dataset(
            path, "train", transform, in_chans, args.seed, layout=layout, value_range=config.INPUT.RANGE
        )
    pin = device.type == "cuda"
    return data.build_train_loader(
        dataset, args.batch_size_per_gpu, args.num_workers, pin, device_transform=device_transform, sampler=args.sampler
    )


def get_crops(args: argparse.Namespace, config: CfgNode) -> augment.Crops:
    """Return sizes, numbers and scales of the crops.

    Raises:
        UsageError: They do not fit each other.
    """
    crops = augment.Crops(
        global_size=args.global_crops_size or config.MODEL.IMAGE_SIZE[0],
        global_scale=tuple(args.global_crops_scale),
        local_numbers=tuple(args.local_crops_number),
        local_sizes=tuple(args.local_crops_size),
        local_scale=tuple(args.local_crops_scale),
    )
    augment.check_crops(crops)
    return crops


# --------------------------------------------------------------------------- student and teacher


def head_builder(args: argparse.Namespace, network: Backbone) -> Callable[[], DINOHead]:
    """Return a function that builds a head for the features of a backbone."""
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
    """Copy the student to the teacher, move both to the device, and wrap them for several processes.

    Args:
        args: `grad_checkpointing`, `compile`, `fsdp` and `fsdp_group`.
        compiled: Name of the backbone's method that --compile compiles, once per size of crops.

    Raises:
        UsageError: Crops are smaller than a patch.
    """
    smallest = min(crops.global_size, *crops.local_sizes)
    if smallest < student.patch_size:
        raise UsageError(f"crops of {smallest} pixels are smaller than a patch of {student.patch_size}; enlarge them")
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    student.grad_checkpointing = args.grad_checkpointing
    if args.compile:
        logger.info(
            "--compile: both networks are compiled during the first step, which takes minutes; later ones are faster"
        )
        for network in (student, teacher):
            setattr(network, compiled, torch.compile(getattr(network, compiled), dynamic=False))
    if args.fsdp:
        return fsdp.shard_networks(student, teacher, device, args.fsdp_group)
    return ddp.wrap_networks(student.to(device), teacher.to(device))


# --------------------------------------------------------------------------- optimizer and schedules


def build_step(
    args: argparse.Namespace, method: Method, batches_per_epoch: int, device: torch.device, precision: str
) -> TrainStep:
    """Build the optimizer and the schedules, with one value per optimizer step."""
    steps = engine.steps_per_epoch(batches_per_epoch, args.accum_iter)
    schedules = Schedules(
        lr=optim.cosine_schedule(
            args.lr * checkpointing.images_per_step(args) / 256, args.min_lr, args.epochs, steps, args.warmup_epochs
        ),
        weight_decay=optim.cosine_schedule(args.weight_decay, args.weight_decay_end, args.epochs, steps),
        momentum=optim.cosine_schedule(args.momentum_teacher, 1.0, args.epochs, steps),
    )
    small_runs.warn_slow_teacher(args.momentum_teacher, float(schedules.momentum.prod()), args.epochs * steps)
    optimizer = optim.build_optimizer(args.optimizer, optim.param_groups(loading.unwrap(method.student)))
    nonfinite = NonFiniteSteps(args.max_bad_steps, Path(args.output_dir))
    return TrainStep(method, optimizer, schedules, device, precision, args.clip_grad, args.freeze_last_layer, nonfinite)


# --------------------------------------------------------------------------- resume


def resume(args: argparse.Namespace, step: TrainStep) -> RunPosition:
    """Load the state of the run, and return its position.

    A checkpoint in --output_dir is resumed; else the run that wrote --pretrained_weights_ckpt is continued; else a new schedule
    starts, from the weights of --init_weights if given.

    Raises:
        UsageError: The file is damaged or does not fit, on all processes.
    """
    output_dir = Path(args.output_dir)
    with collectives.failing_together(), files.disk_errors(output_dir):
        position = checkpointing.resume_run(output_dir / checkpointing.CHECKPOINT, step.load_state_dict, args)
        if position.is_new and args.pretrained_weights_ckpt:
            load = partial(step.load_state_dict, extend=True, allow_partial=args.allow_partial)
            position = checkpointing.continue_run(Path(args.pretrained_weights_ckpt), load, args)
        elif position.is_new and args.init_weights:
            init_weights(args.init_weights, step.method, args.allow_partial)
        files.make_output_dir(output_dir)  # only now: a failed start leaves nothing behind
    collectives.must_agree("checkpoints", (position.epoch, position.steps))
    return position


def init_weights(path: str, method: Method, allow_partial: bool) -> None:
    """Load student and teacher from a file of any known layout; heads that it lacks start fresh."""
    content = serialization.load_file(path, mapped=True)
    for network, key in ((method.student, "student"), (method.teacher, "teacher")):
        state = layouts.network_state(content, key, path)
        report = loading.load_network(
            network, state, f"checkpoint '{path}'", resize=True, new_parts=True, allow_partial=allow_partial
        )
        logger.info("%s from %s: %s", key, path, report)


# --------------------------------------------------------------------------- log


def open_log(
    args: argparse.Namespace,
    config: CfgNode,
    images: int,
    position: RunPosition,
    device: torch.device,
    epoch_freq: int = 1,
) -> RunLog:
    """Clean the output folder, record its provenance (`config.yaml`, `run.json`), and open its log.

    Args:
        images: Images of an epoch, over all processes.
        epoch_freq: Epochs between two that the terminal shows.
    """
    output_dir = Path(args.output_dir)
    seen = position.epoch * images + position.steps * checkpointing.images_per_step(args)
    with collectives.failing_together(), files.disk_errors(output_dir):
        if collectives.is_main_process():
            checkpointing.clean_up(output_dir, position)
            files.save_provenance(output_dir, args, config, seen / images)
        mean, std = config.INPUT.MEAN, config.INPUT.STD
        project = args.wandb if collectives.is_main_process() else ""
        with mirror_tensorboard(project, output_dir, vars(args)) as finish:
            return RunLog(output_dir, args.epochs, args.log_freq, mean, std, device, images, seen, epoch_freq, finish)


def config_of(method: Method, config: CfgNode) -> CfgNode:
    """Return the config with automatic values resolved by the backbone, as checkpoints hold it."""
    backbone = loading.unwrap(method.student)
    return backbone.resolve_config(config) if isinstance(backbone, Backbone) else config


def log_run(
    args: argparse.Namespace, config: CfgNode, method: Method, loader: DataLoader[data.Batch], device: torch.device
) -> None:
    """Log a summary: network, data and device; on a CPU also how long a full-size network will take."""
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
        args.precision,
    )
    if device.type == "cpu" and isinstance(network, Backbone) and collectives.is_main_process():
        steps = engine.steps_per_epoch(len(loader), args.accum_iter)
        sides = get_crops(args, config).sides
        estimate.log_training_time(args, network, in_backbone, sides, steps, config.MODEL.SPEC.IN_CHANS)


def log_end(args: argparse.Namespace) -> None:
    """Log where the results of a finished run are, and the command that evaluates its network."""
    checkpoint = Path(args.output_dir) / checkpointing.CHECKPOINT
    evaluate = ["python", "eval_knn.py", "--pretrained_weights", str(checkpoint), "--data_path", "IMAGES"]
    logger.info(
        "the run is finished: %s holds %s, log.txt and the curves (tensorboard --logdir %s). docs/first_hour.md looks at features "
        "without labels. To evaluate its network on IMAGES/train/<class>/ and IMAGES/val/<class>/: %s",
        *(args.output_dir, checkpointing.CHECKPOINT, shlex.quote(args.output_dir)),
        shlex.join([*evaluate, "--output_dir", args.output_dir]),
    )
