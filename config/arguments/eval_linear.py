"""The command line of eval_linear.py: names and defaults of microsoft/esvit, and flags added here."""

from __future__ import annotations

from config.arguments.shared import (
    Parser,
    add_crop_flags,
    add_data_flags,
    add_launch_flags,
    add_loader_flags,
    add_network_flags,
    add_overrides,
    add_switch,
    add_token_flag,
    add_weights_flags,
    existing_path,
)
from config.ranges import BLOCKS, COUNT, EPOCHS, SEED, integer, number
from utils import PRECISIONS


class Inferred(int):
    """A default that the number of classes of the data replaces, unlike an equal number given on the command line."""


DEFAULT_LABELS = Inferred(1000)
TRAIN_AUGS = ("standard", "strong")


def get_args_parser() -> Parser:
    """Return the parser of eval_linear.py."""
    parser = Parser("eval_linear.py", "Train linear classifiers on frozen features.")
    add_network_flags(parser)
    add_token_flag(parser)
    add_weights_flags(parser)
    group = parser.group("features")
    words = "number of last blocks whose tokens are concatenated; several values train several classifiers"
    group.add_argument("--n_last_blocks", type=BLOCKS, nargs="+", default=[4], help=words)
    words = "append the mean patch token of the last block; no effect without class tokens"
    add_switch(group, "--avgpool_patchtokens", words)
    words = "cache features of center crops and train on them: fast, but not the published protocol"
    add_switch(group, "--cache_features", words)
    words = "precision of the network; the classifiers are always float32"
    group.add_argument("--precision", choices=PRECISIONS, default="fp32", help=words)

    add_data_flags(parser)
    add_crop_flags(parser)
    words = "training augmentation: random crops and flips, or RandAugment and random erasing too"
    parser.group("data").add_argument("--train_aug", choices=TRAIN_AUGS, default="standard", help=words)
    add_loader_flags(parser, batch_size=128)

    add = parser.group("optimization").add_argument
    add("--epochs", type=EPOCHS, default=100, help="number of training epochs")
    words = "learning rate for a total batch of 256, scaled linearly; several values train several classifiers"
    add("--lr", type=number(0, 1000, above_low=True), nargs="+", default=[0.001], help=words)
    words = "learning rate at the end of the cosine schedule, not scaled"
    add("--lr_min", type=number(0, 1000), default=0.0, help=words)
    words = "outputs of the classifier; unless given, the number of classes in the data"
    add("--num_labels", type=integer(1, 10_000_000), default=DEFAULT_LABELS, help=words)
    add("--val_freq", type=COUNT, default=1, help="epochs between validations")

    group = parser.group("evaluation of a trained classifier")
    add = group.add_argument
    add_switch(group, "--evaluate", "score a trained classifier on val; train and write nothing")
    words = "weights of the classifier for --evaluate (default: checkpoint.pth.tar in --output_dir)"
    add("--linear_weights", type=existing_path, default="", help=words)
    words = "input order of --linear_weights with --avgpool_patchtokens: class token then mean patch (esvit), or alternating (dino)"
    add("--linear_order", choices=("esvit", "dino"), default="esvit", help=words)

    add = parser.group("logging").add_argument
    add("--output_dir", default=".", metavar="DIR", help="folder for checkpoint.pth.tar, log.txt and results.json")
    add("--log_freq", type=COUNT, default=20, help="steps between log lines")

    words = "random seed of classifiers, order, crops and untrained networks"
    parser.group("launch").add_argument("--seed", type=SEED, default=0, help=words)
    add_launch_flags(parser)
    add_overrides(parser)
    return parser
