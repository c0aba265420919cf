"""The command line of extract_features.py."""

from __future__ import annotations

from config.arguments import shared
from config.arguments.shared import Parser
from config.choices import KNN_BACKENDS, PROJECTIONS
from config.ranges import ABOVE_ZERO, COUNT


def get_args_parser() -> Parser:
    """Return the parser of extract_features.py."""
    parser = Parser("extract_features.py", "Extract features of any images, and find neighbors and duplicates.")
    shared.add_network_flags(parser)
    shared.add_token_flag(parser)
    shared.add_weights_flags(parser)
    text = "image folder with or without classes, text file of paths, or tar shards; see docs/data.md"
    shared.add_data_flags(parser, batch_size=128, text=text)
    add = parser.group("data").add_argument
    text = "part of --data_path, if it has the folders, archives or shards of both"
    add("--split", choices=("train", "val"), default="train", help=text)
    text = "imagenet1k (any images), imagenet22k, webvision1, openimages_v4, or a folder under --data_path"
    add("--dataset", default="imagenet1k", metavar="NAME", help=text)
    shared.add_crop_flags(parser)

    group = parser.group("features")
    shared.add_switch(group, "--regions", "also save the features of all regions, regions.npy")
    shared.add_switch(group, "--half", "save float16")
    shared.add_switch(group, "--normalize", "scale each feature to length 1")

    group = parser.group("neighbors and pictures, also of a finished folder")
    add = group.add_argument
    text = "write the K nearest images of each image, and a picture of some of them"
    add("--neighbors", type=COUNT, default=None, metavar="K", help=text)
    text = "write the pairs of images with a cosine similarity of at least T"
    add("--duplicates", type=ABOVE_ZERO, default=None, metavar="T", help=text)
    text = "draw the images in two dimensions; umap needs the package umap-learn"
    add("--plot", choices=PROJECTIONS, default=None, help=text)
    text = "library for the search; auto: faiss on a CPU if it is installed, else torch"
    add("--backend", choices=("auto", *KNN_BACKENDS), default="auto", help=text)

    add = parser.group("output").add_argument
    add("--output_dir", required=True, metavar="DIR", help="folder for the features; an extraction is resumed there")
    shared.add_seed_flag(parser, "untrained networks and plots")
    shared.add_launch_flags(parser)
    return parser
