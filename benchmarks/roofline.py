"""Roofline of a training step of Swin-T on a CPU: what each part computes and moves, and how close it comes to the machine.

    python benchmarks/roofline.py                       # batch 4, K 65536, views and regions, one thread: some minutes
    python benchmarks/roofline.py --batch 1 --out_dim 4096

The machine is measured first: float32 matrix products (GFLOP/s) and copies (GB/s, reading and writing). For every operation the
program counts FLOPs as torch.utils.flop_counter does, and bytes as if each input were read and each output written once. The limit
of an operation is the longer of the two at the measured peaks; that of a part is the sum over its operations. A share above 1 is
possible: a copy also loads what it overwrites, which is not counted. Times are the minima of CPU time, which other work on the
machine lengthens through shared caches and memory.

The last lines relate the step to its backbone (student and teacher forward, and the student's backward): as measured, and if all
else were its matrix products alone, at the measured peak.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main_esvit
import utils
from benchmarks.sides import add_sizes, build_step, make_crops
from benchmarks.syncs import ALLOCATIONS, QUESTIONS, VIEWS
from config.ranges import COUNT
from distributed import launch
from models import Backbone
from training import optim
from training.step import TrainStep

GEMM_SIDE = 1024
COPY_BYTES = 256 * 2**20
PEAK_ROUNDS = 5
WRITE_ONLY = {"copy_", "fill_", "zero_"}
STUDENT, TEACHER, HEADS = "student backbone, forward", "teacher backbone, forward", "heads of both, forward"
LOSSES, HEADS_BACKWARD, STUDENT_BACKWARD = "losses and their gradients", "heads, backward", "student backbone, backward"
CLIPPING, OPTIMIZER, EMA, CENTERS, OTHER = "clipping", "optimizer", "teacher's moving average", "centers", "other"
PARTS = (
    *(TEACHER, STUDENT, STUDENT_BACKWARD, HEADS, HEADS_BACKWARD),
    *(LOSSES, CLIPPING, OPTIMIZER, EMA, CENTERS, OTHER),
)
BACKBONE = (TEACHER, STUDENT, STUDENT_BACKWARD)


class Peaks(NamedTuple):
    """What the machine reaches."""

    flops: float  # per second
    bytes: float  # read and written, per second


class Work(NamedTuple):
    """Operations so far."""

    flops: float = 0.0
    bytes: float = 0.0
    limit: float = 0.0  # seconds at the peaks

    def __add__(self, other: Any) -> Work:
        return Work(*(a + b for a, b in zip(self, other)))

    def __sub__(self, other: Any) -> Work:
        return Work(*(a - b for a, b in zip(self, other)))


def measure_peaks() -> Peaks:
    """Measure a matrix product and a copy, each at its best of some rounds."""
    a, b = torch.randn(2, GEMM_SIDE, GEMM_SIDE).unbind()
    source, target = torch.ones(2, COPY_BYTES // 4).unbind()
    product = min(seconds(lambda: torch.mm(a, b)) for _ in range(PEAK_ROUNDS))
    copy = min(seconds(lambda: target.copy_(source)) for _ in range(PEAK_ROUNDS))
    return Peaks(2 * GEMM_SIDE**3 / product, 2 * COPY_BYTES / copy)


def seconds(work: Callable[[], object]) -> float:
    """Return the CPU seconds of `work`."""
    start = time.process_time()
    work()
    return time.process_time() - start


class CountedWork(TorchDispatchMode):
    """Sums up the `work` of the operations inside the `with` block."""

    def __init__(self, peaks: Peaks) -> None:
        super().__init__()
        self.peaks = peaks
        self.work = Work()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function.overloadpacket.__name__ not in VIEWS | ALLOCATIONS | QUESTIONS:
            flops, moved = count_flops(function, args, kwargs, result), count_bytes(function, args, kwargs, result)
            self.work += Work(flops, moved, max(flops / self.peaks.flops, moved / self.peaks.bytes))
        return result


def count_flops(function: Any, args: Any, kwargs: Any, result: Any) -> float:
    """Return the FLOPs of matrix products, convolutions and attention; other operations count as 0."""
    packet = function.overloadpacket
    packet = {  # operations without a formula of their own
        torch.ops.aten.addmm_: torch.ops.aten.addmm,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: torch.ops.aten._scaled_dot_product_flash_attention,
    }.get(packet, packet)
    return float(flop_registry[packet](*args, **kwargs, out_val=result)) if packet in flop_registry else 0.0


def count_bytes(function: Any, args: Any, kwargs: Any, result: Any) -> float:
    """Return the bytes of the inputs that are read, and of the outputs, which include inputs that are written."""
    packet = function.overloadpacket.__name__
    read, written = 0, 0
    given: set[int] = set()
    for number, argument in enumerate(function._schema.arguments):
        value = kwargs.get(argument.name, args[number] if number < len(args) else None)
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        given.update(id(tensor) for tensor in tensors)
        size = sum(map(bytes_of, tensors))
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        written += size * is_written
        read += size * (not (is_written and (argument.kwarg_only or packet in WRITE_ONLY)))
    new = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and id(leaf) not in given]
    return float(read + written + sum(map(bytes_of, new)))


def bytes_of(tensor: Tensor) -> int:
    """Return the bytes of the elements, each once where they are expanded."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


# --------------------------------------------------------------------------- the parts of a step


class Stopwatch:
    """Attributes what `read` measures (seconds, or work) to the part of the step that is running.

    A part inside another one interrupts it.
    """

    def __init__(self, read: Callable[[], Any]) -> None:
        self.read = read
        self.spent: dict[str, Any] = {}
        self._running = [OTHER]
        self._since = read()

    def switch(self) -> None:
        """Attribute everything since the last switch."""
        now, part = self.read(), self._running[-1]
        used = now - self._since
        self.spent[part] = self.spent[part] + used if part in self.spent else used
        self._since = now

    def start(self, part: str) -> None:
        """Let `part` interrupt what is running."""
        self.switch()
        self._running.append(part)

    def stop(self) -> None:
        """End the part that is running."""
        self.switch()
        self._running.pop()

    def replace(self, part: str, by: str) -> None:
        """Go on with another part in the place of `part` if that is running."""
        if self._running[-1] == part:
            self.switch()
            self._running[-1] = by

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function as a part."""

        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.start(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.stop()

        return run


@contextmanager
def watched(step: TrainStep, watch: Stopwatch) -> Iterator[None]:
    """Attribute the parts of the step inside the block."""
    method = step.method
    assert isinstance(method, main_esvit.EsViT)
    student, teacher, criterion = method.student, method.teacher, method.criterion
    assert isinstance(student, Backbone)
    assert isinstance(teacher, Backbone)
    heads = [head for network in (student, teacher) for head in (network.head, network.head_dense) if head is not None]
    forward = student.forward_features

    def forward_student(x: Tensor) -> Any:
        features = forward(x)
        features.view_BC.register_hook(lambda _: watch.replace(HEADS_BACKWARD, STUDENT_BACKWARD))
        return features

    owners = [
        (teacher, "forward_features", TEACHER, teacher.forward_features),
        (student, "forward_features", STUDENT, forward_student),
        *((head, "forward", HEADS, head.forward) for head in heads),
        (criterion, "terms", LOSSES, criterion.terms),
        *((criterion, name, CENTERS, getattr(criterion, name)) for name in ("accumulate_center", "update_center")),
        (Tensor, "backward", HEADS_BACKWARD, Tensor.backward),
        (optim, "clip_each_gradient", CLIPPING, optim.clip_each_gradient),
        (optim, "step_if", OPTIMIZER, optim.step_if),
        (optim, "update_teacher", EMA, optim.update_teacher),
    ]
    with ExitStack() as stack:
        for owner, name, part, function in owners:
            stack.enter_context(mock.patch.object(owner, name, watch.timed(part, function)))
        yield


def run_watched(step: TrainStep, crops: list[Tensor], read: Callable[[], Any]) -> dict[str, Any]:
    """Run a step, and return what `read` measured by part."""
    watch = Stopwatch(read)
    with watched(step, watch):
        step([crops], 1, 0)["loss"].item()
    watch.switch()
    return watch.spent


# --------------------------------------------------------------------------- the program


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(
        "benchmarks/roofline.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_sizes(parser, batch=4)
    parser.add_argument("--steps", type=COUNT, default=2, help="timed steps")
    parser.add_argument("--threads", type=COUNT, default=1)
    return parser


def measure(args: argparse.Namespace, peaks: Peaks) -> tuple[dict[str, Work], dict[str, float]]:
    """Return the work and the seconds of each part, after a warm-up step."""
    utils.keep_freed_memory()  # as main_esvit.py does on a CPU
    step, crops = build_step("lean", args), make_crops(args.batch, args.local_crops)
    step([crops], 0, 0)
    with CountedWork(peaks) as counted:
        work = run_watched(step, crops, lambda: counted.work)
    times = [run_watched(step, crops, time.process_time) for _ in range(args.steps)]
    return work, {part: min(spent.get(part, 0.0) for spent in times) for part in PARTS}


def processor() -> str:
    """Return the name of the processor and its vector instructions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown processor"
    )
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def row(name: str, work: Work, spent: float) -> str:
    """Return a row of the table."""
    reached = f"{work.flops / spent / 1e9:8.0f} {work.bytes / spent / 1e9:8.1f}" if spent else " " * 17
    share = f"{work.limit / spent:6.2f}" if spent else ""
    return f"| {name:26} | {work.flops / 1e9:7.1f} {work.bytes / 1e9:6.1f} | {spent:6.2f} {reached} | {work.limit:6.2f} {share} |"


def report(work: dict[str, Work], spent: dict[str, float], peaks: Peaks) -> None:
    """Print the table and the bounds of the whole step."""
    print(f"| {'part':26} |   GFLOP     GB |      s  GFLOP/s     GB/s |  limit  share |")
    for part in PARTS:
        print(row(part, work.get(part, Work()), spent[part]))
    total = sum(work.values(), Work())
    print(row("step", total, sum(spent.values())))
    backbone = sum(spent[part] for part in BACKBONE)
    products = sum(work[part].flops for part in work if part not in BACKBONE) / peaks.flops
    print(f"step / backbone: {sum(spent.values()) / backbone:.2f}")
    print(f"step / backbone, with the matrix products of all else at the peak: {1 + products / backbone:.2f}")


def main(args: argparse.Namespace) -> None:
    """Measure the machine and the step, and print the table."""
    torch.set_num_threads(args.threads)
    print(f"Swin-T, batch {args.batch}, K {args.out_dim}, 2 + {args.local_crops} crops, fp32, {args.threads} thread(s)")
    peaks = measure_peaks()
    print(f"{processor()}: {peaks.flops / 1e9:.0f} GFLOP/s, {peaks.bytes / 1e9:.1f} GB/s", flush=True)
    report(*measure(args, peaks), peaks)


if __name__ == "__main__":
    launch.run_script(lambda: main(get_args_parser().parse_args()))
