"""The command line of data/demo.py."""

from __future__ import annotations

from pathlib import Path

from config.arguments.shared import Parser


def get_args_parser() -> Parser:
    """Return the parser of data/demo.py."""
    parser = Parser("python -m data.demo", "Cut the demo data from photographs that installed packages ship.")
    parser.add_argument("root", type=Path, metavar="FOLDER", help="output folder")
    return parser
