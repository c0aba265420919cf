"""Flags of both pre-training scripts, and the checks of their combinations; names and defaults of microsoft/esvit."""

from __future__ import annotations

import argparse

from config.arguments import shared, small_runs
from config.arguments.shared import Ascending, Parser, bool_flag, existing_path
from config.choices import AUG_BACKENDS, DECODES, MAX_BAD_STEPS, OPTIMIZERS
from config.ranges import (
    ABOVE_ZERO,
    BATCH,
    COUNT,
    EPOCHS,
    FACTOR,
    MANY,
    PIXELS,
    SHARE,
    TEMPERATURE,
    WARMUP,
    integer,
    number,
)
from utils import PRECISIONS, UsageError


def add_student_teacher_flags(parser: Parser) -> None:
    """Add the flags of student, teacher and projection heads."""
    shared.add_network_flags(parser, saved=False)
    group = parser.group("network")
    add = group.add_argument
    text = "number of prototypes, the output dimension of the heads"
    add("--out_dim", type=integer(1, 10_000_000), default=65536, help=text)
    add("--norm_last_layer", type=bool_flag, default=True, help="fix the norm of the prototypes to 1")
    text = "EMA momentum of the teacher at the start; a cosine schedule raises it to 1"
    add("--momentum_teacher", type=SHARE, default=0.996, help=text)
    add("--use_bn_in_head", type=bool_flag, default=False, help="use BatchNorm in the heads")
    add("--head_hidden_dim", type=integer(1, 131_072), default=2048, help="hidden dimension of the heads")
    add("--head_bottleneck_dim", type=integer(1, 65_536), default=256, help="bottleneck dimension of the heads")
    text = "recompute blocks in the backward pass to save memory"
    add("--grad_checkpointing", type=bool_flag, default=False, help=text)
    shared.add_switch(
        group, "--fsdp", "shard both networks and the optimizer over the processes (FSDP2) to save memory"
    )
    text = "with --fsdp: shard over groups of N processes, such as a node, and replicate between them; 0: over all"
    group.add_argument("--fsdp_group", type=integer(0), default=0, help=text)
    text = "torch.compile both backbones; the first step takes minutes, less with a warm TORCHINDUCTOR_CACHE_DIR"
    shared.add_switch(group, "--compile", text)


def add_loss_flags(parser: Parser) -> None:
    """Add the flags of the self-distillation loss."""
    add = parser.group("loss").add_argument
    add("--warmup_teacher_temp", type=TEMPERATURE, default=0.04, help="teacher temperature at the start of its warm-up")
    add("--teacher_temp", type=TEMPERATURE, default=0.04, help="teacher temperature after its warm-up")
    text = "epochs of the linear warm-up of the teacher temperature"
    add("--warmup_teacher_temp_epochs", type=WARMUP, default=0, help=text)
    text = "materialize all logits instead of computing the loss in chunks; slower, for comparison"
    add("--plain_loss", type=bool_flag, default=False, help=text)


def add_schedule_flags(parser: Parser) -> None:
    """Add the flags of optimizer, schedules and precision."""
    add = parser.group("optimization").add_argument
    add("--epochs", type=EPOCHS, default=100, help="number of training epochs, over which all schedules extend")
    add("--batch_size_per_gpu", type=BATCH, default=64, help="images per process and micro-batch")
    add("--accum_iter", type=BATCH, default=1, help="gradient accumulation: micro-batches per optimizer step")
    add("--optimizer", default="adamw", choices=OPTIMIZERS, help="optimizer of the student")
    text = "peak learning rate for a total batch of 256, scaled linearly with batch x processes x accumulation"
    add("--lr", type=FACTOR, default=0.0005, help=text)
    default = small_runs.DefaultInt(10)
    add("--warmup_epochs", type=WARMUP, default=default, help="epochs of the linear learning-rate warm-up")
    add("--min_lr", type=FACTOR, default=1e-6, help="learning rate at the end of its cosine schedule, not scaled")
    add("--weight_decay", type=FACTOR, default=0.04, help="weight decay at the start")
    add("--weight_decay_end", type=FACTOR, default=0.4, help="weight decay at the end of its cosine schedule")
    text = "maximum gradient norm of each parameter; 0: no clipping"
    add("--clip_grad", type=number(0, 1e30), default=3.0, help=text)
    add("--freeze_last_layer", type=WARMUP, default=1, help="epochs during which the prototypes are frozen")
    add("--use_fp16", type=bool_flag, default=True, help="mixed precision; False is the same as --precision fp32")
    text = "precision of the networks; auto: bf16 where supported, else fp16 or fp32; losses are computed in fp32"
    add("--precision", default="auto", choices=PRECISIONS, help=text)
    add("--max_bad_steps", type=COUNT, default=MAX_BAD_STEPS, help="stop after this many consecutive non-finite steps")


def add_view_flags(parser: Parser) -> None:
    """Add the flags of multi-crop and of the color jitter."""
    add = parser.group("views").add_argument
    scale = {"action": Ascending, "type": ABOVE_ZERO, "nargs": 2}
    text = "area range of the global crops, as fractions of the image"
    add("--global_crops_scale", **scale, default=(0.4, 1.0), help=text)  # type: ignore[arg-type]
    text = "size of the global crops in pixels (default: MODEL.IMAGE_SIZE of the config)"
    add("--global_crops_size", type=PIXELS, default=None, help=text)
    text = "number of local crops; several values for several sizes"
    add("--local_crops_number", type=integer(0, 1000), nargs="+", default=(8,), help=text)
    text = "area range of the local crops, as fractions of the image"
    add("--local_crops_scale", **scale, default=(0.05, 0.4), help=text)  # type: ignore[arg-type]
    text = "sizes of the local crops in pixels, one for each value of --local_crops_number"
    add("--local_crops_size", type=PIXELS, nargs="+", default=(96,), help=text)
    text = "pil: all augmentation in the workers; split: colors in batches on the training device"
    add("--aug_backend", default="auto", choices=AUG_BACKENDS, help=text)
    text = "scaled: decode JPEG files at 1/2, 1/4 or 1/8 of their size if all crops keep as many pixels as their views"
    add("--decode", default="full", choices=DECODES, help=text)
    add("--color-jitter", dest="color_jitter", type=number(0, 2), default=0.4, help="strength of the color jitter")


def add_run_flags(parser: Parser) -> None:
    """Add the flags of data, checkpoints, logging and launch."""
    add = parser.group("data").add_argument
    text = "imagenet1k (any images), imagenet22k, webvision1, openimages_v4, or a folder under --data_path"
    add("--dataset", default="imagenet1k", metavar="NAME", help=text)
    text = "image folder with or without classes, text file of paths, or tar shards; see docs/data.md"
    add("--data_path", type=existing_path, default="", help=text)
    shared.add_layout_flags(parser)
    text = "order of the images; chunk: neighbors in the files are read together by one node"
    add("--sampler", default="distributed", choices=("distributed", "chunk"), help=text)
    add("--shuffle_buffer", type=COUNT, default=256, help="tar shards: shuffle buffer of each worker in images")
    text = "tar shards: images per epoch; 0: all, as counted or recorded in sizes.json"
    add("--epoch_images", type=integer(0, 10**12), default=0, help=text)
    shared.add_workers_flag(parser)

    group = parser.group("checkpoints")
    add = group.add_argument
    add("--output_dir", default=".", metavar="DIR", help="folder for checkpoints and logs; a run in it is resumed")
    text = (
        "full checkpoint of a run to continue here with its epoch and schedule, possibly with --use_dense_prediction added; "
        "ignored if --output_dir has a checkpoint.pth"
    )
    add("--pretrained_weights_ckpt", type=existing_path, default="", help=text)
    text = "weights to initialize a new run from, of any known layout"
    add("--init_weights", type=existing_path, default="", help=text)
    shared.add_switch(group, "--allow_partial", "load the tensors that fit from either file and ignore the rest")
    add("--saveckp_freq", type=integer(0), default=5, help="keep checkpointEPOCH.pth every N epochs; 0: never")
    add("--save_every_steps", type=integer(0), default=0, help="also save checkpoint.pth every N steps; 0: never")
    text = "also save checkpoint.pth every X minutes; 0: never"
    add("--save_every_minutes", type=number(0, MANY), default=0.0, help=text)
    text = "older checkpoint_previous*.pth to keep, in case checkpoint.pth is damaged"
    add("--keep_last", type=integer(0, 1000), default=1, help=text)

    add = parser.group("logging").add_argument
    add("--log_freq", type=COUNT, default=10, help="steps between log lines")
    add("--knn_every", type=integer(0), default=0, help="epochs between k-NN evaluations; 0: none")
    text = "small labeled dataset for --knn_every, with train/ and val/ or without a split"
    add("--knn_data_path", type=existing_path, default="", help=text)
    shared.add_wandb_flag(parser)

    shared.add_seed_flag(parser, "weights, order and views")
    shared.add_launch_flags(parser)


def check_pretraining(args: argparse.Namespace) -> None:
    """Reject combinations of flags that exclude each other, and fit the schedules to the run.

    Raises:
        UsageError: naming the flags.
    """
    shared.check_wandb(args)
    small_runs.fit_schedules(args)
    if args.compile and args.grad_checkpointing:
        raise UsageError("--compile and --grad_checkpointing do not work together; turn one of them off")
    if args.fsdp and args.compile:
        raise UsageError(
            "--fsdp and --compile do not work together: parameters are gathered between blocks, which would be compiled one "
            "by one, and torch compiles a function for 8 cases at most, fewer than a network has; leave one out"
        )
    if args.fsdp_group and not args.fsdp:
        raise UsageError(f"--fsdp_group {args.fsdp_group} is for sharded networks; pass --fsdp too, or leave it out")
    if args.fsdp_group == 1:
        raise UsageError("--fsdp_group 1 shards nothing; leave --fsdp and --fsdp_group out")
    if args.pretrained_weights_ckpt and args.init_weights:
        raise UsageError(
            "--pretrained_weights_ckpt continues a run and --init_weights starts a new schedule; leave one of them out"
        )
