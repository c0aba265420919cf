"""Time and memory of a training step of Swin-T, compared with the plain step and with timm's backbone.

    python benchmarks/step.py                                  # batch 4, K 65536, views and regions: some minutes
    python benchmarks/step.py --precisions fp32 --compile      # a fourth side: lean with --compile
    python benchmarks/step.py --scaling --batch 2 --out_dim 8192   # also the lean step over batch, K and local crops

A step includes teacher, student, both losses, backward, clipping, optimizer, centers and the update of the teacher. The side of
timm is a lower bound: its Swin-T on the same crops, with forward passes of teacher and student and the backward, and no heads,
losses or updates. bf16 is autocast, which processors without AMX or AVX-512 emulate: its times are meaningless there.

Sides alternate, each in new processes with three warm-up steps and `--steps` measured ones. Times are minima of wall-clock and CPU
time; memory is `ru_maxrss` of the process. With --compile the first step includes compilation, unless TORCHINDUCTOR_CACHE_DIR has
the compiled graphs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from benchmarks.sides import CPU, SIDES, add_sizes, build_step, build_timm, make_crops
from config.ranges import COUNT
from distributed import launch

COMPILED = "compiled"
WARM_UP_STEPS = 3
DROP_PATH = 0.1  # of the student, as in the published yaml of Swin-T
TIMM_TARGET, PLAIN_TARGETS, MEMORY_TARGET = 1.3, {"lean": 1.6, COMPILED: 2.0}, 0.75
SCALING = {"batch": (1, 2, 4), "out_dim": (4096, 16384, 65536), "local_crops": (0, 4, 8)}

Figures = dict[str, float]


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser; --side is passed to the processes of the sides."""
    parser = argparse.ArgumentParser(
        "benchmarks/step.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_sizes(parser, batch=4)
    add = parser.add_argument
    add("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    add("--rounds", type=COUNT, default=2, help="processes per side")
    add("--steps", type=COUNT, default=1, help="measured steps per process")
    add("--threads", type=COUNT, default=1)
    add("--compile", action="store_true", help="also the lean step with --compile")
    add("--scaling", action="store_true", help="also a table of the lean step's time over batch, K and local crops")
    add("--side", choices=("all", *SIDES, COMPILED), default="all")
    return parser


def build_side(args: argparse.Namespace, precision: str) -> Callable[[], object]:
    """Return a function that runs one step of a side."""
    crops = make_crops(args.batch, args.local_crops)
    if args.side == "timm":
        run = build_timm(precision, DROP_PATH)
        return lambda: run(crops)
    if args.side != "plain":
        utils.keep_freed_memory()  # as main_esvit.py does on a CPU
    flags = ("--compile", "on") if args.side == COMPILED else ()
    step = build_step("plain" if args.side == "plain" else "lean", args, precision=precision, flags=flags)
    return lambda: step([crops], 0, 0)["loss"].item()


def run_side(args: argparse.Namespace) -> None:
    """Measure one side in this process, and print its figures as JSON."""
    work = build_side(args, args.precisions[0])
    warm_up = [time_step(work) for _ in range(WARM_UP_STEPS)]
    seconds, cpu_seconds = zip(*(time_step(work) for _ in range(args.steps)))
    figures = {"seconds": min(seconds), "cpu_seconds": min(cpu_seconds), "first_seconds": warm_up[0][0]}
    print(json.dumps(figures | {"peak_mb": utils.peak_memory_mb(CPU)}))


def time_step(work: Callable[[], object]) -> tuple[float, float]:
    """Return wall-clock and CPU seconds of one step."""
    start, cpu_start = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - cpu_start


def start_side(args: argparse.Namespace, side: str, precision: str, **sizes: int) -> Figures:
    """Measure one side in a new process."""
    names = ("batch", "out_dim", "local_crops", "steps", "threads")
    flags = [f"--{name}={sizes.get(name, getattr(args, name))}" for name in names]
    command = [sys.executable, __file__, *flags, "--side", side, "--precisions", precision]
    threads = {"OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads)}
    output = subprocess.run(command, env=os.environ | threads, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def measure(args: argparse.Namespace, precision: str) -> dict[str, Figures]:
    """Measure all sides alternately, and return the minimum of each figure."""
    sides = [*SIDES, *([COMPILED] if args.compile else [])]
    rounds: dict[str, list[Figures]] = {side: [] for side in sides}
    for _ in range(args.rounds):
        for side in sides:
            rounds[side].append(start_side(args, side, precision))
    if args.compile:
        first_steps = ", ".join(f"{figures['first_seconds']:.0f}" for figures in rounds[COMPILED])
        print(f"  {COMPILED}: seconds of the first step of each process: {first_steps}", flush=True)
    return {side: {key: min(f[key] for f in figures) for key in figures[0]} for side, figures in rounds.items()}


def report(args: argparse.Namespace, precision: str) -> None:
    """Measure and print figures and ratios of one precision."""
    crops = f"2 + {args.local_crops} crops"
    print(f"Swin-T, batch {args.batch}, K {args.out_dim}, {crops}, {precision}, {args.threads} thread(s):", flush=True)
    best = measure(args, precision)
    for side, figures in best.items():
        times = f"{figures['seconds']:7.2f} s ({figures['cpu_seconds']:.2f} s of CPU time)"
        print(f"  {side:9} {times}   peak {figures['peak_mb']:7.0f} MiB")
    for side, target in PLAIN_TARGETS.items():
        if side in best:
            to_timm, to_plain = (best[side]["cpu_seconds"] / best[other]["cpu_seconds"] for other in ("timm", "plain"))
            memory = best[side]["peak_mb"] / best["plain"]["peak_mb"]
            print(
                f"  {side}: {to_timm:.2f}x the CPU time of timm's backbone (target: {TIMM_TARGET}), {1 / to_plain:.2f}x faster "
                f"than plain (target: {target}), {memory:.2f} of its memory (target: {MEMORY_TARGET})",
                flush=True,
            )


def report_scaling(args: argparse.Namespace, precision: str) -> None:
    """Measure and print the lean step over one size at a time."""
    print(f"the lean step over one size at a time, {precision}: CPU seconds and peak MiB")
    for name, values in SCALING.items():
        for value in values:
            figures = start_side(args, "lean", precision, **{name: value})
            print(f"  {name:12} {value:6}   {figures['cpu_seconds']:7.2f}   {figures['peak_mb']:7.0f}", flush=True)


def main(args: argparse.Namespace) -> None:
    """Compare all sides, or measure the one of --side."""
    torch.set_num_threads(args.threads)
    if args.side != "all":
        run_side(args)
        return
    for precision in args.precisions:
        report(args, precision)
        if args.scaling:
            report_scaling(args, precision)


if __name__ == "__main__":
    launch.run_script(lambda: main(get_args_parser().parse_args()))
