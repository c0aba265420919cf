"""The command line of eval_knn.py: names and defaults of microsoft/esvit, and flags added here."""

from __future__ import annotations

from config.arguments import shared
from config.arguments.shared import Parser, bool_flag, existing_path
from config.choices import KNN_BACKENDS
from config.ranges import COUNT, TEMPERATURE


def get_args_parser() -> Parser:
    """Return the parser of eval_knn.py."""
    parser = Parser("eval_knn.py", "Score frozen features with a weighted k-nearest-neighbor classifier.")
    shared.add_network_flags(parser)
    shared.add_token_flag(parser)
    shared.add_weights_flags(parser)
    text = "dataset folder with train/CLASS/ and val/CLASS/, or only CLASS/ with --leave_one_out"
    shared.add_data_flags(parser, batch_size=128, text=text)
    shared.add_crop_flags(parser)

    group = parser.group("k-NN")
    add = group.add_argument
    text = "numbers of neighbors; 20 usually works best"
    add("--nb_knn", type=COUNT, nargs="+", default=[10, 20, 100, 200], help=text)
    add("--temperature", type=TEMPERATURE, default=0.07, help="temperature of the voting weights")
    add("--backend", default="torch", choices=KNN_BACKENDS, help="library for the search; faiss has to be installed")
    add("--use_cuda", type=bool_flag, default=True, help="keep the features on the GPU if there is one")
    shared.add_switch(group, "--half", "store and compare features in float16")
    shared.add_switch(group, "--leave_one_out", "classify each image of a single set by all other images")
    shared.add_switch(group, "--baselines", "also score raw pixels, color statistics and the untrained network")

    add = parser.group("output").add_argument
    add("--output_dir", default=None, metavar="DIR", help="folder for results/knn.json (default: print only)")
    text = "folder to save features and labels to; must not hold saved features yet"
    add("--dump_features", default=None, metavar="DIR", help=text)
    text = "folder of saved features to score instead of extracting them"
    add("--load_features", type=existing_path, default=None, help=text)

    shared.add_seed_flag(parser, "untrained networks")
    shared.add_launch_flags(parser)
    return parser
