"""Time of the collapse monitor relative to a log interval.

    python benchmarks/health.py                          # Swin-T, batch 4, K = 65536
    python benchmarks/health.py --batch 32

The monitor runs once per --log_freq steps; its median time is compared with that of so many steps without it. Sampling the rows
counts as part of the step. The target is 2 % of the interval.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.sides import add_sizes, build_step, make_crops
from config.ranges import COUNT
from distributed import launch
from losses.distillation import MonitoredLevel
from training.collapse import Monitor

TARGET = 0.02


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser("benchmarks/health.py", description=__doc__)
    add_sizes(parser, batch=4)
    parser.add_argument("--log_freq", type=COUNT, default=10, help="steps per interval")
    parser.add_argument("--repeats", type=COUNT, default=3)
    return parser


class _TimedMonitor(Monitor):
    """Measures its own time."""

    seconds = 0.0

    def measure(self, levels: Mapping[str, MonitoredLevel]) -> dict[str, Tensor]:
        started = time.perf_counter()
        result = super().measure(levels)
        self.seconds += time.perf_counter() - started
        return result


def main(args: argparse.Namespace) -> None:
    """Time steps and the monitor, and print the ratio."""
    step = build_step("lean", args)
    step.monitor = monitor = _TimedMonitor()
    crops = make_crops(args.batch, args.local_crops)
    step([crops], 0, 0, monitor=True)
    step_times, monitor_times = [], []
    for i in range(1, args.repeats + 1):
        before, started = monitor.seconds, time.perf_counter()
        step([crops], i, 0, monitor=True)
        monitor_times.append(monitor.seconds - before)
        step_times.append(time.perf_counter() - started - monitor_times[-1])
    step_time, monitor_time = statistics.median(step_times), statistics.median(monitor_times)
    share = monitor_time / (args.log_freq * step_time)
    print(
        f"Swin-T, batch {args.batch}, K = {args.out_dim}, cpu, fp32: step {step_time:.2f} s, monitor {monitor_time:.3f} s"
    )
    print(f"monitor / interval of {args.log_freq} steps: {share:.2%} (target: below {TARGET:.0%})")


if __name__ == "__main__":
    launch.run_script(lambda: main(get_args_parser().parse_args()))
