"""The command line of compare_runs.py."""

from __future__ import annotations

from config.arguments.shared import Parser, existing_path


def get_args_parser() -> Parser:
    """Return the parser of compare_runs.py."""
    parser = Parser("compare_runs.py", "Compare runs: settings that differ, scores, cost and curves.")
    text = "folders of runs, which may be unfinished"
    parser.add_argument("runs", nargs="+", type=existing_path, metavar="RUN", help=text)
    text = "names of the runs, in their order (default: those of the folders)"
    parser.add_argument("--names", nargs="+", metavar="NAME", default=None, help=text)
    text = "folder for table.md, table.csv, curves.png and comparison.html (default: the table is only printed)"
    parser.add_argument("--output_dir", default=None, metavar="DIR", help=text)
    return parser
