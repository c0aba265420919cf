"""The command line of data/convert.py."""

from __future__ import annotations

from config.arguments.shared import Parser, add_layout_flags, existing_path
from config.ranges import COUNT, PIXELS

LAYOUTS = ("zip", "tsv", "shards", "files")


def get_args_parser() -> Parser:
    """Return the parser of data/convert.py."""
    parser = Parser("python -m data.convert", "Convert images to zip, tsv or tar shards, and back to files.")
    text = "images to convert, as --data_path of the training scripts"
    parser.add_argument("data_path", type=existing_path, metavar="SOURCE", help=text)
    parser.add_argument("dest", metavar="DEST", help="output folder, created if missing")
    parser.add_argument("--to", required=True, choices=LAYOUTS, help="layout of DEST")
    parser.add_argument("--shard_images", type=COUNT, default=5000, help="images per shard")
    text = "shrink images to this many pixels on the longer side; smaller ones are copied unchanged (default: all are)"
    parser.add_argument("--max_side", type=PIXELS, default=None, metavar="N", help=text)
    add_layout_flags(parser)
    return parser
