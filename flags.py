"""Command lines: the parser of every script, the flags that several scripts share, and the checks of their values.

Origin: names and defaults are those of microsoft/esvit where it has them, this project's own elsewhere.
"""

from __future__ import annotations

import argparse
import difflib
import re
from typing import Any, NoReturn

from config import PATCH_SIZE
from ranges import CROP_RATIO, PIXELS, Range, integer, number
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
        parser, "--zip_mode", "images in DIR/{train,val}.zip, named by DIR/{train,val}_map.txt (see data/zips.py)"
    )
    add_switch(parser, "--tsv_mode", "images in DIR/{train,val}.tsv, or a folder of tsv files (see data/tsv.py)")


def add_crop_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the evaluation's center crop, the same in every script."""
    add = parser.add_argument
    add("--image_size", type=PIXELS, default=None, help="pixels of the crops; default: MODEL.IMAGE_SIZE of the yaml")
    add("--crop_ratio", type=CROP_RATIO, default=0.875, help="center crop as a share of the resized image (224 / 256)")


def add_list_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag that trains on a part of the training images, see data/lists.py."""
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
