"""The command line of export.py."""

from __future__ import annotations

from pathlib import Path

from config.arguments.shared import Parser, add_network_flags, add_weights_flags

CLASS_TOKENS = {"all": None, "first": 1, "none": 0}  # --class_tokens: how many are kept
FORMATS = ("backbone", "safetensors", "timm", "transformers", "detectron2", "mmdet", "onnx", "torchscript")


def get_args_parser() -> Parser:
    """Return the parser of export.py."""
    parser = Parser("export.py", "Export a backbone to other libraries.")
    add_network_flags(parser)
    add_weights_flags(parser, required=True)
    add = parser.group("output").add_argument
    add("--format", required=True, choices=FORMATS, help="file format")
    text = "class tokens to keep, of networks with two (UDI)"
    add("--class_tokens", choices=list(CLASS_TOKENS), default="all", help=text)
    add(
        "--output",
        type=Path,
        required=True,
        metavar="PATH",
        help="file to write, or folder for transformers; must not exist",
    )
    return parser
