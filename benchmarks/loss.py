"""Time and peak memory of the chunked loss (ops/chunked_cross_entropy.py) and of the plain loss, which holds all logits.

    python benchmarks/loss.py                                        # full size: minutes, and 9 GB for the plain side
    python benchmarks/loss.py --batch 4 --out_dim 16384 --dtypes float32
    python benchmarks/loss.py --dtypes float32 --skip_plain          # the chunked side only

Measures everything after the bottleneck: logits of both heads, matching, both losses, centers, and the backward to bottleneck
vectors and prototypes, for the views and regions of Swin-T with 2 crops of 224 and 8 of 96 pixels. bfloat16 uses autocast, which is
emulated and very slow on processors without AMX or AVX-512 instructions for it. Below full size a chunk is not filled, so that the
growth with K means little.

Each side runs in its own process. Peak memory is `ru_maxrss` at the end minus the resident memory after the warmup. For the growth
with K the weights are subtracted: prototypes of student and teacher and a gradient, for each of the two heads.

The plain side is `--plain_loss` of main_esvit.py, which computes logits once per view. The loss of benchmarks/plain.py computes
them once per pair of views, as published, and would take about 25 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from config.ranges import COUNT
from distributed import launch
from losses.region import RegionMatchingLoss
from models.heads import WeightNormLinear
from models.outputs import MultiCropOutput

SIDES = ("plain", "chunked")
REGIONS = (49, 49, *[9] * 8)  # per view, last stage of Swin-T
BOTTLENECK, CHANNELS = 256, 768
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}
TARGETS = {"float32": 0.6, "bfloat16": 0.5}  # time relative to the plain side
TARGET_MEMORY, TARGET_GROWTH = 1 / 6, 1.1
MIB = 2**20


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser; the parent process sets --side for its children."""
    parser = argparse.ArgumentParser(
        "benchmarks/loss.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--batch", type=COUNT, default=32)
    add("--out_dim", type=COUNT, default=65536, help="prototypes K; growth is measured from K / 4")
    add("--dtypes", nargs="+", choices=tuple(PRECISIONS), default=list(PRECISIONS))
    add("--repeats", type=COUNT, default=2, help="runs, of which the fastest counts")
    add("--threads", type=COUNT, default=1)
    add("--skip_plain", action="store_true", help="run the chunked side only")
    add("--side", choices=("both", *SIDES), default="both")
    return parser


class Inputs(NamedTuple):
    """Outputs of the networks before the prototypes, with rows as in `MultiCropOutput`."""

    views: Tensor
    regions: Tensor
    features: Tensor
    regions_per_view: tuple[int, ...]


def make_inputs(batch: int, regions_per_view: tuple[int, ...], student: bool) -> Inputs:
    """Return random unit vectors, and features for matching."""
    rows = batch * sum(regions_per_view)
    views = F.normalize(torch.randn(batch * len(regions_per_view), BOTTLENECK), dim=-1).requires_grad_(student)
    regions = F.normalize(torch.randn(rows, BOTTLENECK), dim=-1).requires_grad_(student)
    return Inputs(views, regions, torch.randn(rows, CHANNELS), regions_per_view)


class Problem:
    """Last layers of student and teacher, inputs and loss; `run` is a step without the optimizer."""

    def __init__(self, side: str, batch: int, out_dim: int, precision: str) -> None:
        torch.manual_seed(0)
        self.factored, self.precision = side == "chunked", precision
        self.student, self.teacher = ([WeightNormLinear(BOTTLENECK, out_dim) for _ in range(2)] for _ in range(2))
        for layer in self.student + self.teacher:
            layer.weight_g.requires_grad_(False)
        for layer in self.teacher:
            layer.requires_grad_(False)
        self.inputs = make_inputs(batch, REGIONS, student=True), make_inputs(batch, REGIONS[:2], student=False)
        self.loss = RegionMatchingLoss(out_dim, len(REGIONS), 0.04, 0.04, 0, 1)

    def _output(self, layers: list[WeightNormLinear], inputs: Inputs) -> MultiCropOutput:
        view_layer, region_layer = (layer.factors if self.factored else layer for layer in layers)
        return MultiCropOutput(
            view_layer(inputs.views), region_layer(inputs.regions), inputs.features, inputs.regions_per_view
        )

    def _forward(self) -> Tensor:
        with utils.autocast(torch.device("cpu"), self.precision):
            with torch.no_grad():
                teacher = self._output(self.teacher, self.inputs[1])
            loss = self.loss(self._output(self.student, self.inputs[0]), teacher, 0)
            self.loss.accumulate_center(teacher)
        return loss

    def run(self) -> float:
        """Run forward, backward and the update of the centers, drop the gradients, and return the loss."""
        loss = self._forward()
        loss.backward()
        self.loss.update_center()
        for tensor in (*self.inputs[0][:2], *(layer.weight_v for layer in self.student)):
            tensor.grad = None
        return loss.item()


def resident_mb() -> float:
    """Return the resident memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


def run_side(args: argparse.Namespace) -> None:
    """Measure one side and print its figures as JSON."""
    precision = PRECISIONS[args.dtypes[0]]
    Problem(args.side, 1, 64, precision).run()  # warm up
    problem = Problem(args.side, args.batch, args.out_dim, precision)
    before = resident_mb()
    seconds, cpu_seconds = [], []
    for _ in range(args.repeats):
        start, cpu_start = time.perf_counter(), time.process_time()
        loss = problem.run()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    peak = utils.peak_memory_mb(torch.device("cpu")) - before
    print(json.dumps({"seconds": min(seconds), "cpu_seconds": min(cpu_seconds), "peak_mb": peak, "loss": loss}))


def start_side(args: argparse.Namespace, side: str, dtype: str, out_dim: int) -> dict[str, float]:
    """Run one side in a new process, print its figures and return them."""
    command = [sys.executable, __file__, "--side", side, "--dtypes", dtype, "--out_dim", str(out_dim)]
    command += [f"--{name}={getattr(args, name)}" for name in ("batch", "repeats", "threads")]
    threads = {"OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads)}
    output = subprocess.run(command, env=os.environ | threads, check=True, stdout=subprocess.PIPE, text=True).stdout
    figures: dict[str, float] = json.loads(output)
    print(
        f"{dtype:9} {side:8} K {out_dim:6}: {figures['seconds']:7.2f} s ({figures['cpu_seconds']:.2f} s CPU time)  "
        f"peak {figures['peak_mb']:7.0f} MiB, {figures['peak_mb'] - weights_mb(out_dim, dtype):.0f} without weights  "
        f"loss {figures['loss']:.5f}",
        flush=True,
    )
    return figures


def weights_mb(out_dim: int, dtype: str) -> float:
    """Return the memory of the prototypes of two heads in MiB: student and gradient in float32, teacher, and a copy.

    With bfloat16 the teacher's prototypes have that dtype, and those of one head of the student are copied to it.
    """
    student, teacher, gradient, copy = {"float32": (4, 4, 4, 0), "bfloat16": (4, 2, 4, 2)}[dtype]
    return out_dim * BOTTLENECK * (2 * (student + teacher + gradient) + copy) / MIB


def compare(args: argparse.Namespace, dtype: str) -> None:
    """Run both sides, and the chunked side with K / 4; print figures and ratios."""
    chunked = start_side(args, "chunked", dtype, args.out_dim)
    smaller = start_side(args, "chunked", dtype, args.out_dim // 4)
    rest = [f["peak_mb"] - weights_mb(k, dtype) for f, k in ((chunked, args.out_dim), (smaller, args.out_dim // 4))]
    print(
        f"{dtype:9} four times the prototypes take {rest[0] - rest[1]:+.0f} MiB without the weights, "
        f"{rest[0] / rest[1]:.2f}x (target: {TARGET_GROWTH})"
    )
    if args.skip_plain:
        return
    plain = start_side(args, "plain", dtype, args.out_dim)
    ratio = {key: chunked[key] / plain[key] for key in ("seconds", "cpu_seconds", "peak_mb")}
    print(
        f"{dtype:9} chunked takes {ratio['seconds']:.2f} of the plain time, by CPU time {ratio['cpu_seconds']:.2f} "
        f"(target: {TARGETS[dtype]}), and {ratio['peak_mb']:.3f} of its peak memory (target: {TARGET_MEMORY:.3f})",
        flush=True,
    )


def main(args: argparse.Namespace) -> None:
    """Compare both sides, or run the one of --side."""
    torch.set_num_threads(args.threads)
    if args.side != "both":
        run_side(args)
        return
    print(
        f"batch {args.batch}: {args.batch * sum(REGIONS)} student and {args.batch * sum(REGIONS[:2])} teacher regions, "
        f"{args.threads} thread(s)"
    )
    for dtype in args.dtypes:
        compare(args, dtype)


if __name__ == "__main__":
    launch.run_script(lambda: main(get_args_parser().parse_args()))
