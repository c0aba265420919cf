"""The parser class and the flags that several scripts share."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import os
import re
from typing import Any, NoReturn

from config.choices import PATCH_SIZE, TOKENS
from config.ranges import BATCH, CROP_RATIO, PIXELS, SEED, WORKERS, Range, integer, number
from utils import UsageError

STARTING_POINTS = {"init_weights", "pretrained_weights_ckpt"}  # not read by a run that resumes from its own checkpoint


class _HelpFormatter(argparse.HelpFormatter):
    """Show defaults and ranges, with short placeholders for values."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, **(kwargs | {"max_help_position": 30}))

    def _get_help_string(self, action: argparse.Action) -> str:
        notes = []
        if action.option_strings and action.default not in (None, "", argparse.SUPPRESS):
            values = action.default if isinstance(action.default, list | tuple) else [action.default]
            notes.append(f"default: {' '.join(map(str, values))}")
        if isinstance(action.type, Range):
            notes.append(action.type.interval(self._get_default_metavar_for_optional(action)))
        help = action.help or ""
        if help.endswith(")"):
            return "; ".join([help[:-1], *notes]) + ")"
        return f"{help} ({'; '.join(notes)})" if notes else help

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        if isinstance(action.type, Range):
            return "N" if action.type.kind is int else "X"
        return {bool_flag: "BOOL", existing_path: "PATH"}.get(action.type, "VALUE")  # type: ignore[arg-type]


class Ascending(argparse.Action):
    """A range given as two numbers, the smaller one first."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        low, high = values
        if low > high:
            raise argparse.ArgumentError(self, f"{low} {high} is not a range: write the smaller number first")
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """An argument parser without abbreviations, whose errors are one line that suggests what was probably meant.

    Args:
        script: the command, as shown in its usage and errors.
        description: one line for `--help`.
    """

    def __init__(self, script: str, description: str) -> None:
        super().__init__(script, description=description, formatter_class=_HelpFormatter, allow_abbrev=False)

    def group(self, title: str) -> argparse._ArgumentGroup:
        """Return the argument group of this title, new or existing."""
        found = (group for group in self._action_groups if group.title == title)
        return next(found, None) or self.add_argument_group(title)

    def parse_command_line(self) -> argparse.Namespace:
        """Parse `sys.argv`, and exit with code 2 if a file or folder that it names does not exist."""
        args = self.parse_args()
        resumes = os.path.exists(os.path.join(getattr(args, "output_dir", None) or ".", "checkpoint.pth"))
        for action in self._actions:
            value = getattr(args, action.dest, None)
            if action.type is not existing_path or not value or (resumes and action.dest in STARTING_POINTS):
                continue
            for path in value if isinstance(value, list) else [value]:
                if not (
                    re.search(r"^pipe:|://|[{*?\[]", path) or os.path.exists(path)
                ):  # addresses, patterns of shards
                    name = "/".join(action.option_strings) or action.metavar
                    self.error(f"argument {name}: '{path}' does not exist; check the path")
        return args

    def format_help(self) -> str:
        """Shorten the usage to one line; the flags are listed below it."""
        required = [action.option_strings[0] for action in self._actions if action.required and action.option_strings]
        others = [str(action.metavar) for action in self._actions if not action.option_strings]
        usage = [self.prog, *(f"{flag} ..." for flag in required), "[flags]", *others]
        self.usage = " ".join(usage).replace("KEY VALUE", "[KEY VALUE ...]")
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """Exit with code 2, and extend argparse's message by a suggestion."""
        _, unknown, rest = message.partition("unrecognized arguments: ")
        flag = next((word.partition("=")[0] for word in rest.split() if word.startswith("-")), None)
        if flag is not None:
            names = difflib.get_close_matches(flag, self._option_string_actions, n=3)
            message += f"; did you mean {' or '.join(names)}?" if names else "; see --help"
        elif unknown:
            message += "; KEY VALUE pairs must be together, after all flags"
        elif re.search(r"'[A-Z_]+(\.[A-Z0-9_]+)+'", message):
            message += "; put -- before KEY VALUE pairs that follow a flag of several or optional values"
        self.exit(2, f"{self.prog}: error: {message}\n")


# --------------------------------------------------------------------------- types of flags


def existing_path(text: str) -> str:
    """Type of a flag that names a file or folder to read; `Parser.parse_command_line` checks that it exists."""
    return text


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


def add_switch(parser: argparse._ActionsContainer, name: str, explanation: str) -> None:
    """Add a flag that is off unless given, alone or with a boolean."""
    parser.add_argument(name, type=bool_flag, nargs="?", const=True, default=False, help=explanation)


# --------------------------------------------------------------------------- groups of flags


def add_network_flags(parser: Parser, *, saved: bool = True, patch_size: int = PATCH_SIZE) -> None:
    """Add the flags that name a network, and its config overrides.

    Args:
        saved: the defaults come from a checkpoint (`evaluation.features.network_config`).
        patch_size: default where no checkpoint has one.
    """
    add = parser.group("network").add_argument
    in_checkpoint = "that of the checkpoint, else " if saved else ""
    text = f"yaml file of the network (default: {in_checkpoint}the published yaml of --arch)"
    add("--cfg", type=existing_path, default=None, help=text)
    text = "architecture, e.g. swin_tiny" + (" (default: that of the checkpoint)" if saved else "")
    add("--arch", default=None if saved else "deit_small", metavar="NAME", help=text)
    text = "patch size in pixels, for architectures whose yaml has no PATCH_SIZE"
    text += f" (default: {in_checkpoint}{patch_size})" if saved else ""
    add("--patch_size", type=integer(1, 1024), default=None if saved else patch_size, help=text)
    text = "config overrides after all flags, e.g. MODEL.SPEC.WINDOW_SIZE 14"
    add("opts", nargs="*", metavar="KEY VALUE", help=text)


def add_weights_flags(parser: Parser, *, required: bool = False) -> None:
    """Add the flags that name the weights of an evaluated network.

    Unless they are `required`, --random_weights is an alternative to --pretrained_weights; `check_weights` requires one of them.
    """
    group = parser.group("weights")
    text = "checkpoint, of this project or any published EsViT, DINO or UDI layout"
    group.add_argument("--pretrained_weights", type=existing_path, default="", required=required, help=text)
    text = "network to load from a full checkpoint: teacher or student"
    group.add_argument("--checkpoint_key", default="teacher", metavar="NAME", help=text)
    add_switch(group, "--allow_partial", "load the tensors that fit and ignore the rest")
    if not required:
        add_switch(group, "--random_weights", "use an untrained network instead of --pretrained_weights")


def check_weights(args: argparse.Namespace) -> None:
    """Reject a command line without weights: scores of random weights look like any others.

    Raises:
        UsageError: neither --pretrained_weights nor --random_weights is given, or both are.
    """
    if bool(args.pretrained_weights) == args.random_weights:
        given = "exclude each other" if args.random_weights else "are both missing"
        raise UsageError(
            f"--pretrained_weights and --random_weights {given}; pass --pretrained_weights FILE, "
            "or --random_weights with --arch NAME for an untrained network"
        )


def add_token_flag(parser: Parser) -> None:
    """Add the flag that chooses among the class tokens of a network that has two."""
    text = (
        "class token used as the view feature by networks with two (UDI): the first, the second or both, concatenated"
    )
    parser.group("network").add_argument("--token", choices=list(TOKENS), default="cls", help=text)


def add_data_flags(
    parser: Parser, batch_size: int, text: str = "dataset folder with train/CLASS/ and val/CLASS/"
) -> None:
    """Add the flags of an evaluation's images and data loader; `text` describes --data_path."""
    add = parser.group("data").add_argument
    add("--data_path", type=existing_path, default="", help=text)
    add_layout_flags(parser)
    add("--batch_size_per_gpu", type=BATCH, default=batch_size, help="images per process and step")
    add_workers_flag(parser)


def add_layout_flags(parser: Parser) -> None:
    """Add the flags that name the layout of --data_path."""
    group = parser.group("data")
    add_switch(group, "--zip_mode", "read DIR/{train,val}.zip with DIR/{train,val}_map.txt")
    add_switch(group, "--tsv_mode", "read DIR/{train,val}.tsv, or a folder of tsv files")


def add_workers_flag(parser: Parser) -> None:
    """Add --num_workers."""
    text = "data loader workers per process, at most one per core"
    parser.group("data").add_argument("--num_workers", type=WORKERS, default=10, help=text)


def add_crop_flags(parser: Parser) -> None:
    """Add the flags of the evaluation's center crop."""
    add = parser.group("data").add_argument
    text = "size of the crops in pixels (default: MODEL.IMAGE_SIZE of the config)"
    add("--image_size", type=PIXELS, default=None, help=text)
    text = "center crop as a fraction of the resized image; 0.875 is 224 / 256"
    add("--crop_ratio", type=CROP_RATIO, default=0.875, help=text)


def add_list_flag(parser: Parser) -> None:
    """Add the flag that restricts training to a list of images."""
    text = (
        "text file with the names of the training images to use, one per line, such as SimCLR's 1%% list (default: all)"
    )
    parser.group("data").add_argument("--target_list_path", type=existing_path, default=None, help=text)


def add_device_flag(parser: Parser) -> None:
    """Add --device."""
    text = "auto, cuda, cuda:N, mps or cpu; auto prefers cuda, then mps"
    parser.group("launch").add_argument("--device", default="auto", metavar="NAME", help=text)


def add_seed_flag(parser: Parser, seeded: str, seed: int = 0) -> None:
    """Add --seed, which seeds what `seeded` names."""
    parser.group("launch").add_argument("--seed", type=SEED, default=seed, help=f"random seed of {seeded}")


def add_wandb_flag(parser: Parser) -> None:
    """Add --wandb; `check_wandb` checks its package."""
    text = "mirror TensorBoard to this project of Weights & Biases; requires the package wandb"
    parser.group("logging").add_argument("--wandb", default="", metavar="PROJECT", help=text)


def check_wandb(args: argparse.Namespace) -> None:
    """Reject --wandb without its package.

    Raises:
        UsageError: it is not installed.
    """
    spec = importlib.util.find_spec("wandb") if args.wandb else None
    if args.wandb and (spec is None or spec.origin is None):  # a folder named wandb is not the package
        raise UsageError(f"--wandb {args.wandb} needs the package wandb; install it with pip install wandb")


def add_launch_flags(parser: Parser) -> None:
    """Add the flags of device and process group."""
    add_device_flag(parser)
    add = parser.group("launch").add_argument
    add("--dist_url", default="env://", metavar="URL", help="init_method of torch.distributed")
    text = "timeout of collective operations in minutes"
    add("--dist_timeout", type=number(0.001, 1_000_000), default=30.0, help=text)
    text = "set by old launchers; the environment variable LOCAL_RANK takes precedence"
    add("--local_rank", "--local-rank", type=integer(0, 1023), default=None, help=text)
