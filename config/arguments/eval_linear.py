"""The command line of eval_linear.py: names and defaults of microsoft/esvit, and flags added here."""

from __future__ import annotations

from config.arguments import shared
from config.arguments.shared import Parser, existing_path
from config.arguments.small_runs import PUBLISHED_RATE, DefaultInt
from config.ranges import BLOCKS, COUNT, EPOCHS, integer, number
from utils import PRECISIONS

DEFAULT_LABELS = DefaultInt(1000)
TRAIN_AUGS = ("standard", "strong")


def get_args_parser() -> Parser:
    """Return the parser of eval_linear.py."""
    parser = Parser("eval_linear.py", "Train linear classifiers on frozen features.")
    shared.add_network_flags(parser)
    shared.add_token_flag(parser)
    shared.add_weights_flags(parser)
    group = parser.group("features")
    text = "number of last blocks whose tokens are concatenated; several values train several classifiers"
    group.add_argument("--n_last_blocks", type=BLOCKS, nargs="+", default=[4], help=text)
    text = "append the mean patch token of the last block; no effect without class tokens"
    shared.add_switch(group, "--avgpool_patchtokens", text)
    text = "cache features of center crops and train on them: fast, but not the published protocol"
    shared.add_switch(group, "--cache_features", text)
    text = "precision of the network; the classifiers are always float32"
    group.add_argument("--precision", choices=PRECISIONS, default="fp32", help=text)

    shared.add_data_flags(parser, batch_size=128)
    shared.add_crop_flags(parser)
    text = "training augmentation: random crops and flips, or RandAugment and random erasing too"
    parser.group("data").add_argument("--train_aug", choices=TRAIN_AUGS, default="standard", help=text)

    add = parser.group("optimization").add_argument
    add("--epochs", type=EPOCHS, default=100, help="number of training epochs")
    text = "learning rate for a total batch of 256, scaled linearly; several values train several classifiers"
    add("--lr", type=number(0, 1000, above_low=True), nargs="+", default=[PUBLISHED_RATE], help=text)
    text = "learning rate at the end of the cosine schedule, not scaled"
    add("--lr_min", type=number(0, 1000), default=0.0, help=text)
    text = "outputs of the classifier; unless given, the number of classes in the data"
    add("--num_labels", type=integer(1, 10_000_000), default=DEFAULT_LABELS, help=text)
    add("--val_freq", type=COUNT, default=1, help="epochs between validations")

    group = parser.group("evaluation of a trained classifier")
    add = group.add_argument
    shared.add_switch(group, "--evaluate", "score a trained classifier on val; train and write nothing")
    text = "weights of the classifier for --evaluate (default: checkpoint.pth.tar in --output_dir)"
    add("--linear_weights", type=existing_path, default="", help=text)
    text = "input order of --linear_weights with --avgpool_patchtokens: class token then mean patch (esvit), or alternating (dino)"
    add("--linear_order", choices=("esvit", "dino"), default="esvit", help=text)

    add = parser.group("logging").add_argument
    add(
        "--output_dir",
        default=".",
        metavar="DIR",
        help="folder for checkpoint.pth.tar, log.txt and results/linear.json",
    )
    add("--log_freq", type=COUNT, default=20, help="steps between log lines")
    shared.add_wandb_flag(parser)

    shared.add_seed_flag(parser, "classifiers, order, crops and untrained networks")
    shared.add_launch_flags(parser)
    return parser
