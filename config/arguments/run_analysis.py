"""The command line of run_analysis.py: names and defaults of microsoft/esvit, and flags added here."""

from __future__ import annotations

from config.arguments import shared
from config.arguments.shared import Parser, existing_path
from config.ranges import ABOVE_ZERO, COUNT, MANY, PIXELS, integer, number

PATCH_SIZE = 8  # default of the published script
LEARNING = {"ssl": "ssl", "sup": "sup", "supervised": "sup"}  # --learning: part of file names
TASKS = {
    "vis_attention": "draw attention maps of each head",
    "vis_correspondence": "draw the most similar regions of two views or two images",
    "measure_correspondence": "measure over a dataset how often regions match their position in the flipped image",
    "measure_stereo": "measure how well regions match in a stereo pair, against ground truth",
    "vis_entropy": "plot the mean attention entropy of each head over a dataset",
    "vis_features": "draw principal components of the region features as colors",
    "report": "write an HTML page with curves, scores and pictures of a run",
}


def get_args_parser() -> Parser:
    """Return the parser of run_analysis.py."""
    parser = Parser("run_analysis.py", "Analyze a frozen network: attention, correspondence and features.")
    tasks = parser.group("tasks, at least one")
    for task, text in TASKS.items():
        shared.add_switch(tasks, f"--{task}", text)
    shared.add_network_flags(parser, patch_size=PATCH_SIZE)
    shared.add_token_flag(parser)
    shared.add_weights_flags(parser)
    text = "how the network was trained, for file names"
    parser.group("weights").add_argument("--learning", default="ssl", choices=list(LEARNING), help=text)

    group = parser.group("data")
    add = group.add_argument
    add("--image_path", type=existing_path, default=None, help="image, or folder of images (default: --data_path)")
    text = "second image for --vis_correspondence (default: two views of the first)"
    add("--image_path2", type=existing_path, default=None, help=text)
    add("--num_images", type=COUNT, default=4, help="number of images to draw from a folder")
    shared.add_data_flags(parser, batch_size=32, text="image folder for measurements over a dataset")
    text = "shorter side of the images in pixels (default: MODEL.IMAGE_SIZE of the config)"
    add("--image_size", type=PIXELS, default=None, help=text)
    shared.add_switch(group, "--use_saved_aug", "reuse the views that --vis_correspondence saved in --output_dir")

    add = parser.group("attention").add_argument
    text = "pixel of the query region (default: the class token, or the center without one)"
    add("--query", type=number(0, MANY), nargs=2, metavar=("X", "Y"), default=None, help=text)
    text = "block whose attention is drawn: 0 is the first, -1 the last"
    add("--block", type=integer(-1000, 1000), default=-1, help=text)
    add("--threshold", type=ABOVE_ZERO, default=0.6, help="fraction of the attention that masks keep")

    add = parser.group("output").add_argument
    add("--output_dir", default=".", metavar="DIR", help="folder for pictures and measurements")
    text = "folder of the training run for --report (default: --output_dir)"
    add("--run_dir", type=existing_path, default=None, help=text)
    shared.add_seed_flag(parser, "views and untrained networks", seed=8)
    shared.add_launch_flags(parser)
    return parser
