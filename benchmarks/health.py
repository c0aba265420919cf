"""What watching for a collapse costs: the monitor's time beside that of a log interval of plain steps.

    python benchmarks/health.py                          # Swin-T, batch 4, K = 65536
    python benchmarks/health.py --batch 32

Steps are watched, and the time inside the monitor is taken out of theirs: its median is paid once in --log_freq steps. Picking the
rows to look at counts as the step's. The target is 2 % of the interval.

Origin: this project's own.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from config.ranges import COUNT

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.sides import add_sizes, build_step, make_crops
from distributed import launch
from losses.distillation import MonitoredLevel
from training.collapse import Monitor

TARGET = 0.02


def get_args_parser() -> argparse.ArgumentParser:
    """Sizes."""
    parser = argparse.ArgumentParser("benchmarks/health.py", description=__doc__)
    add_sizes(parser, batch=4)
    parser.add_argument("--log_freq", type=COUNT, default=10, help="steps of an interval")
    parser.add_argument("--repeats", type=COUNT, default=3)
    return parser


class _Timed(Monitor):
    """Adds up the time that it takes."""

    seconds = 0.0

    def measure(self, levels: Mapping[str, MonitoredLevel]) -> dict[str, Tensor]:
        started = time.perf_counter()
        result = super().measure(levels)
        self.seconds += time.perf_counter() - started
        return result


def main(args: argparse.Namespace) -> None:
    """Time steps, and the monitor inside them, and print the ratio."""
    step = build_step("lean", args)
    step.monitor = monitor = _Timed()
    crops = make_crops(args.batch, args.local_crops)
    step([crops], 0, 0, monitor=True)
    plain, cost = [], []
    for i in range(1, args.repeats + 1):
        before, started = monitor.seconds, time.perf_counter()
        step([crops], i, 0, monitor=True)
        cost.append(monitor.seconds - before)
        plain.append(time.perf_counter() - started - cost[-1])
    one, more = statistics.median(plain), statistics.median(cost)
    share = more / (args.log_freq * one)
    print(f"Swin-T, batch {args.batch}, K = {args.out_dim}, cpu, fp32: a step {one:.2f} s, the monitor {more:.3f} s")
    print(f"monitor / interval of {args.log_freq} steps: {share:.2%} (target: below {TARGET:.0%})")


if __name__ == "__main__":
    launch.run_script(lambda: main(get_args_parser().parse_args()))
