"""The command line of eval_video.py: names and defaults of DINO's script, and flags added here."""

from __future__ import annotations

from config.arguments import shared
from config.arguments.shared import Parser, existing_path
from config.choices import VIDEO_LAST_FRAMES, VIDEO_RADIUS, VIDEO_TEMPERATURE, VIDEO_TOP
from config.ranges import COUNT, PIXELS, TEMPERATURE, integer


def get_args_parser() -> Parser:
    """Return the parser of eval_video.py."""
    parser = Parser("eval_video.py", "Propagate the object masks of a video's first frame by frozen region features.")
    shared.add_network_flags(parser)
    shared.add_weights_flags(parser)
    add = parser.group("data").add_argument
    add("--frames", required=True, type=existing_path, help="folder with the frames of one video")
    add("--first_mask", required=True, type=existing_path, help="indexed PNG with the objects of the first frame")
    text = "folder for the masks, an indexed PNG per frame; no file is overwritten"
    add("--output_dir", required=True, metavar="DIR", help=text)
    add("--image_size", type=PIXELS, default=480, help="shorter side of the frames in pixels")

    add = parser.group("label propagation").add_argument
    text = "preceding frames to propagate labels from, beside the first one"
    add("--n_last_frames", type=integer(0), default=VIDEO_LAST_FRAMES, help=text)
    text = "radius of the neighborhood in regions; 0: the whole frame"
    add("--size_mask_neighborhood", type=integer(0), default=VIDEO_RADIUS, help=text)
    add("--topk", type=COUNT, default=VIDEO_TOP, help="number of most similar regions to propagate labels from")
    text = "temperature of their weights, exp(cosine / temperature)"
    add("--temperature", type=TEMPERATURE, default=VIDEO_TEMPERATURE, help=text)

    shared.add_seed_flag(parser, "untrained networks")
    shared.add_device_flag(parser)
    parser.set_defaults(token="cls")  # region features do not depend on it
    return parser
