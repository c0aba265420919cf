"""Command lines: the parser of every script, the flags that several scripts share, and the checks of their values.

Origin: names and defaults are those of microsoft/esvit where it has them, this project's own elsewhere.
"""

from __future__ import annotations

import argparse
import difflib
import re
from typing import Any, NoReturn

import utils
from config.ranges import (
    ABOVE_ZERO,
    BATCH,
    COUNT,
    CROP_RATIO,
    EPOCHS,
    FACTOR,
    MANY,
    PIXELS,
    SEED,
    SHARE,
    TEMPERATURE,
    WARMUP,
    WORKERS,
    Range,
    integer,
    number,
)
from config.schema import PATCH_SIZE
from data.transforms import augment
from models.base import TOKENS
from training import optim
from training.nonfinite import MAX_BAD_STEPS
from utils import UsageError


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Tells ranges and defaults, where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        told = action.help if action.default in (None, "") else super()._get_help_string(action)
        return f"{told or ''} [{action.type}]" if isinstance(action.type, Range) else told


class Ascending(argparse.Action):
    """Two numbers, of which the first must not be the larger one."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        if values[0] > values[1]:
            raise argparse.ArgumentError(
                self, f"{values[0]} {values[1]} is not a range: write the smaller number first"
            )
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """A script's command line: whole names of flags only, and mistakes told in one line with what was probably meant."""

    def __init__(self, script: str, description: str) -> None:
        super().__init__(
            script,
            description=description,
            formatter_class=_Help,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and argparse's message, with a remedy."""
        _, unknown, words = message.partition("unrecognized arguments: ")
        flag = next((word.partition("=")[0] for word in words.split() if word.startswith("-")), None)
        if flag is not None:
            names = difflib.get_close_matches(flag, self._option_string_actions, n=3)
            message += f"; did you mean {' or '.join(names)}?" if names else "; see --help"
        elif unknown:
            message += "; KEY VALUE pairs stand together, after all flags"
        elif re.search(r"'[A-Z_]+(\.[A-Z0-9_]+)+'", message):
            message += "; put -- before KEY VALUE pairs that follow a flag of several or optional values"
        self.exit(2, f"{self.prog}: error: {message}\n")


def bool_flag(text: str) -> bool:
    """Parse a boolean of the command line: on/off, true/false, 1/0.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    lowered = text.lower()
    if lowered in {"on", "true", "1"}:
        return True
    if lowered in {"off", "false", "0"}:
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is not a boolean; write on/off, true/false or 1/0")


def add_network_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name a network, the same in every script."""
    words = "yaml of the network; default: that of the evaluated checkpoint, if it holds one, else the published one of --arch"
    parser.add_argument("--cfg", default=None, help=words)
    parser.add_argument("--arch", default="deit_small", help="registered architecture, e.g. swin_tiny")
    parser.add_argument(
        "--patch_size",
        type=integer(1, 1024),
        default=PATCH_SIZE,
        help="pixels per patch, for networks whose yaml does not say",
    )


def add_switch(parser: argparse._ActionsContainer, name: str, explanation: str) -> None:
    """Add a flag that is off unless given, alone or with a boolean."""
    parser.add_argument(name, type=bool_flag, nargs="?", const=True, default=False, help=explanation)


def add_layout_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how --data_path holds its images, the same in every script."""
    add_switch(
        parser,
        "--zip_mode",
        "images in DIR/{train,val}.zip, named by DIR/{train,val}_map.txt (see data/layouts/zips.py)",
    )
    add_switch(
        parser, "--tsv_mode", "images in DIR/{train,val}.tsv, or a folder of tsv files (see data/layouts/tsv.py)"
    )


def add_crop_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the evaluation's center crop, the same in every script."""
    add = parser.add_argument
    add("--image_size", type=PIXELS, default=None, help="pixels of the crops; default: MODEL.IMAGE_SIZE of the yaml")
    add("--crop_ratio", type=CROP_RATIO, default=0.875, help="center crop as a share of the resized image (224 / 256)")


def add_list_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag that trains on a part of the training images, see data/layouts/image_list.py."""
    words = "text file that names the training images to use, one a line (lists of SimCLRv2); default: all"
    parser.add_argument("--target_list_path", default=None, help=words)


def add_weights_flags(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Add the flags that name the weights of a frozen or starting network, the same in every script that takes them.

    Unless they are `required` --random_weights may stand instead of --pretrained_weights; `check_weights` sees that one is given.
    """
    words = "checkpoint of any known layout; the config inside one of this project takes the place of a missing --cfg"
    parser.add_argument("--pretrained_weights", default="", required=required, help=words)
    parser.add_argument("--checkpoint_key", default="teacher", help="network of a full checkpoint: teacher or student")
    add_switch(parser, "--allow_partial", "take what fits of the checkpoint")
    if not required:
        add_switch(parser, "--random_weights", "take an untrained network on purpose, without --pretrained_weights")


def check_weights(args: argparse.Namespace) -> None:
    """Stop unless one of --pretrained_weights and --random_weights is given: scores of random weights look like any others.

    Raises:
        UsageError: neither, or both.
    """
    if bool(args.pretrained_weights) == args.random_weights:
        given = "exclude each other" if args.random_weights else "are both missing"
        raise UsageError(
            f"--pretrained_weights and --random_weights {given}; pass --pretrained_weights FILE, "
            "or --random_weights alone for an untrained network"
        )


def add_launch_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that every script shares: device, rendezvous and the launcher's local rank."""
    parser.add_argument("--device", default="auto", help="auto (cuda, else mps, else cpu), cuda, cuda:N, mps or cpu")
    parser.add_argument("--dist_url", default="env://", help="where the processes meet, as torch.distributed takes it")
    parser.add_argument(
        "--dist_timeout",
        type=number(0.001, 1_000_000),
        default=30.0,
        help="minutes that a process waits for the others before it gives up",
    )
    parser.add_argument(
        "--local_rank",
        "--local-rank",
        type=integer(0, 1023),
        default=None,
        help="set by old launchers; the environment's LOCAL_RANK wins",
    )


def add_token_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag that chooses among the class tokens of a network that has two."""
    words = "class token that stands for an image, for networks with two (UDI): the first, the second, or one after the other"
    parser.add_argument("--token", choices=list(TOKENS), default="cls", help=words)


# --------------------------------------------------------------------------- flags


def add_student_teacher_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of student and teacher."""
    add = parser.add_argument
    add_network_flags(parser)
    add("--out_dim", type=integer(1, 10_000_000), default=65536, help="number of prototypes K")
    add("--norm_last_layer", type=bool_flag, default=True, help="freeze the gain of the prototypes at 1")
    add("--momentum_teacher", type=SHARE, default=0.996, help="EMA momentum of the teacher at the start; 1 at the end")
    add("--use_bn_in_head", type=bool_flag, default=False, help="BatchNorm in the heads")
    add("--head_hidden_dim", type=integer(1, 131_072), default=2048, help="hidden width of the heads")
    add("--head_bottleneck_dim", type=integer(1, 65_536), default=256, help="width of the heads before the prototypes")
    add("--plain_loss", type=bool_flag, default=False, help="hold all logits at once: slower, for comparison")
    add("--grad_checkpointing", type=bool_flag, default=False, help="recompute blocks in the backward to save memory")
    add_switch(parser, "--fsdp", "spread both networks and the optimizer over the processes, to save memory")
    add_switch(
        parser,
        "--compile",
        "torch.compile both backbones; the first step takes minutes, half a minute where torch still has the code of a run of "
        "these sizes (see TORCHINDUCTOR_CACHE_DIR)",
    )


def add_optimization_flags(parser: argparse.ArgumentParser) -> None:
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
    add("--accum_iter", type=BATCH, default=1, help="micro-batches per optimizer step")
    add("--epochs", type=EPOCHS, default=100, help="passes over the images; schedules end with the last")
    add("--freeze_last_layer", type=WARMUP, default=1, help="epochs during which the prototypes stay as they are")
    add("--lr", type=FACTOR, default=0.0005, help="for 256 images; scaled by batch x processes x accumulation / 256")
    add("--warmup_epochs", type=WARMUP, default=10, help="epochs of the learning rate's warm-up")
    add("--min_lr", type=FACTOR, default=1e-6, help="at the end of its cosine")
    add("--optimizer", default="adamw", choices=optim.OPTIMIZERS, help="what moves the student")


def add_view_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of multi-crop, and of the colors that all methods vary."""
    add = parser.add_argument
    add(
        "--global_crops_scale",
        action=Ascending,
        type=ABOVE_ZERO,
        nargs=2,
        default=(0.4, 1.0),
        help="area of the global crops",
    )
    add("--global_crops_size", type=PIXELS, default=None, help="pixels; default: MODEL.IMAGE_SIZE of the yaml")
    add("--local_crops_number", type=integer(0, 1000), nargs="+", default=(8,), help="local crops of each size")
    add(
        "--local_crops_scale",
        action=Ascending,
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
        help="split: colors in batches on the training device",
    )
    add("--color-jitter", dest="color_jitter", type=number(0, 2), default=0.4, help="strength of the color jitter")


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
    add_layout_flags(parser)
    add(
        "--sampler",
        default="distributed",
        choices=("distributed", "chunk"),
        help="chunk: neighbors are read by one node at about the same time (see data/samplers.py)",
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
    add_switch(parser, "--allow_partial", "take what fits of either file")
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
    add("--knn_data_path", default="", help="small labeled folder for them, with train/ and val/ or without a split")
    add("--seed", type=SEED, default=0, help="of weights, order and views")
    add("--num_workers", type=WORKERS, default=10, help="loader processes, at most one a core")
    add_launch_flags(parser)
    add("opts", nargs="*", metavar="KEY VALUE", help="config overrides, e.g. MODEL.SPEC.WINDOW_SIZE 14")


def check_pretraining(args: argparse.Namespace) -> None:
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
