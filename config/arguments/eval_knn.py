"""The command line of eval_knn.py: names and defaults of microsoft/esvit, and flags added here."""

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
    bool_flag,
    existing_path,
)
from config.choices import KNN_BACKENDS
from config.ranges import COUNT, SEED, TEMPERATURE


def get_args_parser() -> Parser:
    """Return the parser of eval_knn.py."""
    parser = Parser("eval_knn.py", "Score frozen features with a weighted k-nearest-neighbor classifier.")
    add_network_flags(parser)
    add_token_flag(parser)
    add_weights_flags(parser)
    add_data_flags(parser, "dataset folder with train/CLASS/ and val/CLASS/, or only CLASS/ with --leave_one_out")
    add_crop_flags(parser)
    add_loader_flags(parser, batch_size=128)

    group = parser.group("k-NN")
    add = group.add_argument
    words = "numbers of neighbors; 20 usually works best"
    add("--nb_knn", type=COUNT, nargs="+", default=[10, 20, 100, 200], help=words)
    add("--temperature", type=TEMPERATURE, default=0.07, help="temperature of the voting weights")
    words = "library for the search; faiss has to be installed"
    add("--backend", default="torch", choices=KNN_BACKENDS, help=words)
    add("--use_cuda", type=bool_flag, default=True, help="keep the features on the GPU if there is one")
    add_switch(group, "--half", "store and compare features in float16")
    add_switch(group, "--leave_one_out", "classify each image of a single set by all other images")
    add_switch(group, "--baselines", "also score raw pixels, color statistics and the untrained network")

    add = parser.group("output").add_argument
    add("--output_dir", default=None, metavar="DIR", help="folder for results.json (default: print only)")
    words = "folder to save features and labels to; must not hold saved features yet"
    add("--dump_features", default=None, metavar="DIR", help=words)
    words = "folder of saved features to score instead of extracting them"
    add("--load_features", type=existing_path, default=None, help=words)

    parser.group("launch").add_argument("--seed", type=SEED, default=0, help="random seed of untrained networks")
    add_launch_flags(parser)
    add_overrides(parser)
    return parser
