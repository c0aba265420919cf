"""The command line of eval_logistic.py."""

from __future__ import annotations

from config.arguments.shared import (
    Parser,
    add_crop_flags,
    add_data_flags,
    add_launch_flags,
    add_list_flag,
    add_loader_flags,
    add_network_flags,
    add_overrides,
    add_token_flag,
    add_weights_flags,
    bool_flag,
)
from config.ranges import BLOCKS, EPOCHS, SEED, number

POOLED = ("view feature", "mean of the regions", "view feature and mean of the regions")  # by --avgpool_patchtokens


def get_args_parser() -> Parser:
    """Return the parser of eval_logistic.py."""
    parser = Parser("eval_logistic.py", "Score frozen features with multinomial logistic regression.")
    add_network_flags(parser)
    add_token_flag(parser)
    add_weights_flags(parser)
    add = parser.group("features").add_argument
    words = "number of last blocks whose tokens are concatenated"
    add("--n_last_blocks", type=BLOCKS, default=1, help=words)
    words = "0: class token; 1: mean patch token; 2: both, concatenated"
    add("--avgpool_patchtokens", type=int, choices=range(len(POOLED)), default=0, help=words)

    add_data_flags(parser)
    add_list_flag(parser)
    add_crop_flags(parser)
    add_loader_flags(parser, batch_size=128)

    add = parser.group("logistic regression").add_argument
    words = "L2 penalties; each value is fitted and reported"
    add("--lr_lambd", type=number(1e-12, 1e12), nargs="+", default=[0.01, 0.1, 1.0], help=words)
    words = "divide the penalties by the number of training images"
    add("--adjust_lambd", type=bool_flag, default=True, help=words)
    add("--epochs", type=EPOCHS, default=1000, help="maximum number of solver iterations")

    words = "folder for results.json (default: print only)"
    parser.group("output").add_argument("--output_dir", default=None, metavar="DIR", help=words)
    parser.group("launch").add_argument("--seed", type=SEED, default=0, help="random seed of untrained networks")
    add_launch_flags(parser)
    add_overrides(parser)
    return parser
