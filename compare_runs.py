"""Compare runs: settings that differ, losses, scores of all evaluations, cost, and curves.

    python compare_runs.py RUN1 RUN2 RUN3
    python compare_runs.py RUN1 RUN2 --names "views" "views and regions" --output_dir COMPARISON

Each RUN is the --output_dir of a training or an evaluation, finished or not. Scores are read from `results/` in it and in its
subfolders. The best score of a row is marked if the runs were evaluated on the same data by the same protocol.

Results: the table, in the terminal; with --output_dir also `table.md`, `table.csv`, `curves.png` and `comparison.html`, one page
without external resources. docs/evaluation.md has the details.
"""

from __future__ import annotations

from config.arguments.compare_runs import get_args_parser as get_args_parser

if __name__ == "__main__":  # --help and usage errors are answered before torch is imported
    ARGS = get_args_parser().parse_command_line()

import argparse
import html
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from analysis import plots, report, tables
from analysis.comparison import Run, build_curves, build_rows, open_runs
from checkpoints import files
from distributed import launch
from utils import UsageError, counted, setup_logging

STYLE = """<style>
.best { font-weight: bold; } .section th { padding-top: 1.2em; text-align: left; }
.runs .number { white-space: normal; overflow-wrap: anywhere; min-width: 5em; } .runs td:first-child { white-space: nowrap; }
</style>"""


def main(args: argparse.Namespace) -> None:
    """Read the runs, print the table, and write the files."""
    setup_logging()
    if args.output_dir:
        files.make_output_dir(args.output_dir)
    runs = open_runs(args.runs, args.names)
    names, rows = [run.name for run in runs], build_rows(runs)
    if not rows:
        raise UsageError(f"{', '.join(names)} have no epoch and no score yet, so there is nothing to compare")
    print(tables.as_text(names, rows, shutil.get_terminal_size().columns))
    if args.output_dir:
        with files.disk_errors(args.output_dir):
            write_files(Path(args.output_dir), runs, rows)


def write_files(folder: Path, runs: Sequence[Run], rows: Sequence[tables.Row]) -> None:
    """Write the table, the curves and the page; previous files with other content are kept as `.bak`."""
    names, curves = [run.name for run in runs], build_curves(runs)
    contents = {
        "table.md": tables.as_markdown(names, rows).encode(errors="backslashreplace"),
        "table.csv": tables.as_csv(names, rows).encode(errors="backslashreplace"),
        "comparison.html": build_page(runs, rows).encode(errors="backslashreplace"),
    }
    if curves:
        contents["curves.png"] = plots.as_png(plots.curve_grid(curves))
    for name, content in contents.items():
        files.write_with_backup(folder / name, content)


def build_page(runs: Sequence[Run], rows: Sequence[tables.Row]) -> str:
    """Return the page: table, curves, and the commands of the runs."""
    title = f"Comparison of {counted(len(runs), 'run')}"
    parts = [STYLE, f"<h1>{title}</h1>", tables.as_html([run.name for run in runs], rows)]
    parts.append(f"<p>Bold: {tables.LEGEND}.</p>")
    if curves := build_curves(runs):
        parts.append(f"<h2>Curves</h2>{report.inlined(report.plot(plots.curve_grid(curves), 'curves of the runs'))}")
    parts.append("<h2>Commands</h2>")
    for run in runs:
        summary = html.escape(f"{run.name}: {run.folder}")
        text = html.escape("\n\n".join(report.commands(report.history(run.folder).starts)) or "not recorded")
        parts.append(f"<details><summary>{summary}</summary><pre>{text}</pre></details>")
    return report.document(title, parts)


if __name__ == "__main__":
    launch.run_script(partial(main, ARGS))
