"""Memory and communication per GPU against the number of GPUs, for DDP and --fsdp.

    python benchmarks/scaling.py                                        # Swin-L, K = 65536, views and regions, batch 32
    python benchmarks/scaling.py --arch swin_tiny --out_dim 4096 --batch 4 --worlds 1 2

This is a calculation, not a measurement. Parameters, gradients, AdamW's moments and the teacher are counted from the networks;
activations are what the simulated step of benchmarks/memory.py needs beyond these at its peak.

With --fsdp a process holds its shard and what is gathered: the rest of the network (no block or head), the two largest units (one
is computed while the next one arrives) and the gradient of the largest. In a ring of N processes, DDP sends 2 (N - 1) / N of the
gradients; FSDP sends (N - 1) / N of all gathered parameters and all reduced gradients. A block of the student is gathered once
per crop size in the forward and in the backward, and its gradient is reduced as often; the teacher runs on global crops only.
Under autocast the gradients of matrices are reduced once per step, which is less. This is for one micro-batch per step;
--accum_iter repeats the gathers and keeps whole gradients in between.

Origin: ring communication as in Rajbhandari et al., SC 2020, section 7.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from torch import Tensor, nn

from benchmarks.memory import GB, peak_bytes
from benchmarks.sides import add_sizes, build_step
from config.ranges import COUNT
from distributed import fsdp, launch
from models import Backbone

COLUMNS = ("networks and optimizer", "with activations", "with checkpointing", "sent")


class Sizes(NamedTuple):
    """Bytes of one network and of its training state."""

    parameters: int
    trainable: int
    blocks: int  # parameters in blocks
    heads: int  # in heads
    rest: int  # elsewhere
    largest_units: tuple[int, int]
    centers: int

    @property
    def state(self) -> int:
        """Bytes of student, teacher, gradients and two moments."""
        return 2 * self.parameters + 3 * self.trainable


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors that share no memory."""
    return sum(tensor.nbytes for tensor in tensors)


def measure(student: Backbone, criterion: nn.Module) -> Sizes:
    """Count a network by the units in which FSDP gathers it."""
    heads = [head for head in (student.head, student.head_dense) if head is not None]
    units = sorted(bytes_of(unit.parameters()) for unit in fsdp.units(student))
    parameters, in_heads = bytes_of(student.parameters()), sum(bytes_of(head.parameters()) for head in heads)
    return Sizes(
        parameters=parameters,
        trainable=bytes_of(parameter for parameter in student.parameters() if parameter.requires_grad),
        blocks=sum(units) - in_heads,
        heads=in_heads,
        rest=parameters - sum(units),
        largest_units=(units[-1], units[-2]),
        centers=bytes_of(criterion.buffers()),
    )


def memory_ddp(sizes: Sizes, world: int) -> float:
    """Return the bytes of a process without activations; the buckets of DDP hold the gradients."""
    return sizes.state + sizes.centers


def memory_fsdp(sizes: Sizes, world: int) -> float:
    """Return the bytes of a process without activations: its shard and what is gathered."""
    if world == 1:
        return memory_ddp(sizes, world)
    gathered = sizes.rest + sum(sizes.largest_units) + sizes.largest_units[0]
    return sizes.state / world + gathered + sizes.centers


def sent_ddp(sizes: Sizes, world: int, crop_sizes: int) -> float:
    """Return the bytes that a process sends in a step: gradients and centers, all-reduced."""
    return 2 * (world - 1) / world * (sizes.trainable + sizes.centers)


def sent_fsdp(sizes: Sizes, world: int, crop_sizes: int) -> float:
    """Return the bytes that a process sends in a step: gathered parameters of both networks, scattered gradients, centers."""
    student = 2 * (crop_sizes * sizes.blocks + sizes.heads + sizes.rest)
    frozen = sizes.parameters - sizes.trainable  # gains of the prototypes
    gradients = crop_sizes * sizes.blocks + sizes.heads + sizes.rest - frozen
    return (world - 1) / world * (student + sizes.parameters + gradients + 2 * sizes.centers)


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(
        "benchmarks/scaling.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_sizes(parser, batch=32)
    parser.add_argument("--arch", default="swin_large")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--worlds", type=COUNT, nargs="+", default=[1, 2, 4, 8, 16, 32], help="numbers of GPUs")
    return parser


def main(args: argparse.Namespace) -> None:
    """Print sizes and table."""
    method = build_step("lean", args, arch=args.arch, precision=args.precision).method
    student = method.student
    assert isinstance(student, Backbone)
    sizes = measure(student, method.criterion)
    crop_sizes = 2 if args.local_crops else 1
    del method, student
    print(
        f"{args.arch}, views and regions, K {args.out_dim}, batch {args.batch} per GPU, 2 + {args.local_crops} crops, AdamW"
    )
    print(
        f"student {sizes.parameters / GB:.2f} GB (blocks {sizes.blocks / GB:.2f}, heads {sizes.heads / GB:.2f}, "
        f"rest {sizes.rest / GB:.2f}), teacher the same; gradients {sizes.trainable / GB:.2f} GB, moments "
        f"{2 * sizes.trainable / GB:.2f} GB, centers {sizes.centers / 1e6:.2f} MB"
    )
    extra = {
        side: peak_bytes(side, args, args.batch, arch=args.arch) - sizes.state - sizes.centers
        for side in ("lean", "checkpointed")
    }
    print(
        f"activations, {args.precision}: {extra['lean'] / GB:.2f} GB, "
        f"with --grad_checkpointing True {extra['checkpointed'] / GB:.2f} GB"
    )
    columns = ["GPUs", *(f"{name}, {column}" for column in COLUMNS for name in ("DDP", "FSDP"))]
    print(f"\nGB per GPU; sent per step\n\n| {' | '.join(columns)} |\n|{' ---: |' * len(columns)}")
    for world in args.worlds:
        states = (memory_ddp(sizes, world), memory_fsdp(sizes, world))
        held = [state + more for more in (0, extra["lean"], extra["checkpointed"]) for state in states]
        sent = [send(sizes, world, crop_sizes) for send in (sent_ddp, sent_fsdp)]
        print(f"| {world} | {' | '.join(f'{figure / GB:.2f}' for figure in (*held, *sent))} |")


if __name__ == "__main__":
    launch.run_script(lambda: main(get_args_parser().parse_args()))
