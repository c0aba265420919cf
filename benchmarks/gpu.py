"""Is this project right, fast and fed on your GPU? One command of at most eight minutes answers.

    python benchmarks/gpu.py                             # everything, in order of value, until the time is over
    python benchmarks/gpu.py --only right --minutes 3    # correctness only
    python benchmarks/gpu.py --device cpu --tiny         # all that a CPU can do, at tiny sizes: seconds

right: networks, losses and updates of the references (tests/golden) in float32 without TF32, and under autocast; UDI;
    augmentation, k-NN, resume, gradient scaling and distributed wrappers.
fast: images per second and peak memory of whole training steps in bf16 (K 65536, 2 + 8 crops), compared with the plain step
    (benchmarks/plain.py) and with timm's backbone alone; idle time and kernels; the largest batch and the predicted one.
fed: images per second of one loader worker, and how many of them a step needs.

Figures are written to a JSON file as they come, and printed as Markdown tables at the end, with a verdict; what the rows print is
in a log beside it. A row that fails, runs out of memory, hangs or crashes does not end the program, and what needs CUDA is marked
as not run on a CPU. The exit code is 1 if a row of `right` failed.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import gpu_fast, gpu_fed, gpu_right
from benchmarks.golden import FOLDER
from benchmarks.gpu_rows import FAILED, PARTS, Record, Row, Setup, run_rows, tables, verdict
from checkpoints import files
from config.ranges import number
from distributed import launch
from utils import UsageError


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(
        "benchmarks/gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run; default: all")
    add("--minutes", type=number(0, 1000), default=8, help="after which nothing is started and what runs is stopped")
    add("--device", default="auto", help="auto, cuda, cuda:N or cpu")
    add("--tiny", action="store_true", help="micro networks and few images, to see whether all rows run")
    add("--golden", type=Path, default=FOLDER, metavar="FOLDER", help="golden numbers; default: tests/golden")
    add("--output", type=Path, default=None, metavar="FILE", help="JSON file; default: gpu_DATE_TIME.json")
    return parser


def plan(only: list[str], tiny: bool) -> list[Row]:
    """Return the rows of some parts in order of value."""
    first, later = gpu_fast.rows(tiny)
    rows = [*gpu_right.rows(tiny), *first, *gpu_fed.rows(tiny), *later]
    return [row for row in rows if row.part in only]


def new_path(output: Path | None) -> Path:
    """Return the path of the record.

    Raises:
        UsageError: The file exists, or its folder does not.
    """
    path = output or Path(time.strftime("gpu_%Y%m%d_%H%M%S.json"))
    if path.exists():
        raise UsageError(f"--output {path} exists and would be overwritten; choose another name")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--output {path}: there is no folder {path.parent}; create it")
    return path


def main(args: argparse.Namespace) -> None:
    """Run the rows, and print tables and verdict, also of an interrupted run."""
    path = new_path(args.output)
    record = Record(path, {"command": shlex.join(sys.argv), "date": time.strftime("%Y-%m-%d %H:%M:%S")})
    rows, setup = plan(args.only, args.tiny), Setup(args.device, args.tiny, args.golden, path.with_suffix(".log"))
    with files.disk_errors(path.parent, "--output"):
        record.write()
        try:
            run_rows(rows, setup, args.minutes, record)
        finally:
            if record.entries:
                sentences = list(verdict(record.entries))
                record.write(verdict=sentences)
                print("\n".join([*tables(record.entries), "", *sentences, f"figures: {path}"]), flush=True)
            else:  # there is no such device
                path.unlink()
    if any(entry.row.part == "right" and entry.result == FAILED for entry in record.entries):
        sys.exit(1)


if __name__ == "__main__":
    launch.run_script(lambda: main(get_args_parser().parse_args()))
