"""The command line of eval_logistic.py."""

from __future__ import annotations

from config.arguments import shared
from config.arguments.shared import Parser, bool_flag
from config.ranges import BLOCKS, EPOCHS, number

POOLED = ("view feature", "mean of the regions", "view feature and mean of the regions")  # by --avgpool_patchtokens


def get_args_parser() -> Parser:
    """Return the parser of eval_logistic.py."""
    parser = Parser("eval_logistic.py", "Score frozen features with multinomial logistic regression.")
    shared.add_network_flags(parser)
    shared.add_token_flag(parser)
    shared.add_weights_flags(parser)
    add = parser.group("features").add_argument
    add("--n_last_blocks", type=BLOCKS, default=1, help="number of last blocks whose tokens are concatenated")
    text = "0: class token; 1: mean patch token; 2: both, concatenated"
    add("--avgpool_patchtokens", type=int, choices=range(len(POOLED)), default=0, help=text)

    shared.add_data_flags(parser, batch_size=128)
    shared.add_list_flag(parser)
    shared.add_crop_flags(parser)

    add = parser.group("logistic regression").add_argument
    text = "L2 penalties; each value is fitted and reported"
    add("--lr_lambd", type=number(1e-12, 1e12), nargs="+", default=[0.01, 0.1, 1.0], help=text)
    add("--adjust_lambd", type=bool_flag, default=True, help="divide the penalties by the number of training images")
    add("--epochs", type=EPOCHS, default=1000, help="maximum number of solver iterations")

    text = "folder for results/logistic.json (default: print only)"
    parser.group("output").add_argument("--output_dir", default=None, metavar="DIR", help=text)
    shared.add_seed_flag(parser, "untrained networks")
    shared.add_launch_flags(parser)
    return parser
