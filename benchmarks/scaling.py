"""Write docs/scaling.md: memory, traffic and efficiency on 1 to 1,024 GPUs, for DDP, --fsdp and --fsdp_group.

    python benchmarks/scaling.py --output docs/scaling.md                      # all networks, some minutes on one core
    python benchmarks/scaling.py --networks "Swin-T, window 7" --tflops 60     # print one, with an assumption of your own

Nothing here is measured: networks and one step are simulated with tensors that have shapes but no values. The arithmetic is
explained in the text that is written (`INTRODUCTION`); the collectives are those of benchmarks/traffic.py.

Origin: ring communication as in Rajbhandari et al., SC 2020, section 7.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import utils
from benchmarks import traffic
from benchmarks.memory import GB, LiveStorages, simulated
from benchmarks.rows import ROWS, Row
from benchmarks.sides import add_sizes, build_step, make_crops
from benchmarks.traffic import Collective
from checkpoints import files
from config.ranges import COUNT, number
from distributed import launch
from models import Backbone

META, CPU = torch.device("meta"), torch.device("cpu")
SWIN_1B = "experiments/imagenet/swin/swin_1b_patch4_window7_224.yaml"
NETWORKS = ROWS | {"Swin-L, window 7": Row("swin_large"), "Swin-1B, window 7": Row("swin")}
YAMLS = {"Swin-1B, window 7": SWIN_1B}
WORLDS = (1, 2, 4, 8, 16, 64, 256, 1024)
STRATEGIES = ("DDP", "FSDP", "hybrid")

INTRODUCTION = """\
# Scaling to many GPUs

Memory, traffic and efficiency on {first} to {last} GPUs, for DistributedDataParallel (no flag), `--fsdp` and hybrid sharding
(`--fsdp --fsdp_group {node}`). This page is the output of [benchmarks/scaling.py](../benchmarks/scaling.py):

```bash
python benchmarks/scaling.py {networks}--output docs/scaling.md
```

Everything is calculated, nothing was measured on a GPU. The bytes that are sent were compared with those that two and four
processes send on a CPU, and are equal (`tests/distributed/test_sharding.py`).

## Arithmetic

A step has {batch} images per GPU with 2 + {local_crops} crops of 224 and 96 pixels, views and regions, K = {out_dim}, AdamW,
networks in {precision}. The global batch grows with the number of GPUs. With P bytes of parameters, T of them trainable, and N
GPUs:

- **State**: student P, teacher P, gradients T, two moments 2 T. DDP holds all of it on every GPU. FSDP holds 1/N of it (hybrid
  sharding 1/{node}), and what is gathered: two units (a block or head, and the next one), the parameters outside all units, and
  the whole gradients of the blocks, because autograd sums the gradients of both sizes of crops before they can be scattered.
- **Activations** are what a simulated step needs beyond the state at its peak. In bf16 they contain a copy of the student's
  matrices, which autocast makes with and without `--fsdp`. The CUDA context, scratch memory and fragmentation come on top:
  leave two GB.
- **Sent** is what one GPU sends per step around rings: 2 (N - 1)/N of an all-reduced tensor, (N - 1)/N of a gathered or
  scattered one. DDP all-reduces T. FSDP gathers blocks twice per size of crops for the student and once for the teacher,
  everything else twice and once, and scatters T. Hybrid sharding does this among {node} GPUs, and all-reduces the shards of the
  gradients between such groups. All of them all-reduce the centers of the loss.
- **Efficiency** is the time of the matrix products and convolutions of a step, counted in the simulation, divided by the time
  of a step with communication: first if nothing of it overlaps with computing, then if everything does.

`fully_shard` pads the first dimension of a tensor to a multiple of the GPUs that share it, which is why it sends more on many.
The memory of a row includes the activations without `--grad_checkpointing`. Hybrid sharding needs more than one node.

Assumptions, each a flag: a GPU achieves {tflops:g} TFLOP/s; a node has {node} GPUs; a GPU sends {inside:g} GB/s within its
node, and all GPUs of a node together {between:g} GB/s to other nodes; a message takes {latency:g} microseconds, around a ring
or through the tree of an all-reduce. A ring is as fast as its slowest link; groups that send between the same nodes share the
links.
"""


class Cluster(NamedTuple):
    """The assumptions about the machines."""

    tflops: float  # achieved by a GPU
    node: int  # GPUs of a node
    inside: float  # GB/s that a GPU sends within its node
    between: float  # GB/s that a node sends to others
    latency: float  # microseconds of a message

    def seconds(self, collective: Collective) -> float:
        """Return the time of a collective operation."""
        bandwidth = self.inside
        if collective.processes * collective.spacing > self.node:
            groups = min(collective.spacing, self.node)  # that send from the same node at the same time
            bandwidth = min(self.inside, self.between / groups)
        return collective.sent / (bandwidth * GB) + collective.hops * self.latency / 1e6

    def efficiency(self, flops: float, collectives: Sequence[Collective]) -> tuple[float, float]:
        """Return the share of a step's time in which a GPU computes, if no communication overlaps with it and if all does."""
        computing, sending = flops / (self.tflops * 1e12), sum(map(self.seconds, collectives))
        return computing / (computing + sending), computing / max(computing, sending)


class Plan(NamedTuple):
    """A network and its simulated step."""

    student: Backbone
    criterion: nn.Module
    crop_sizes: int
    parameters: int  # bytes
    trainable: int
    flops: float
    activations: int  # bytes
    checkpointed: int  # the same with --grad_checkpointing

    @property
    def state(self) -> int:
        """Bytes of student, teacher, gradients and two moments."""
        return 2 * self.parameters + 3 * self.trainable

    def memory(self, shards: int) -> float:
        """Return the bytes of a process without activations, its parameters sharded over so many."""
        if shards == 1:
            return self.state
        *units, rest = traffic.units_of(self.student, self.crop_sizes)
        state = sum(2 * unit.nbytes(shards) + 3 * unit.nbytes(shards, trainable=True) for unit in (*units, rest))
        by_size = sorted((unit.nbytes(shards) for unit in units), reverse=True)
        summed = sum(unit.nbytes(trainable=True) for unit in units if unit.calls > 1)
        return state / shards + rest.nbytes(shards) + sum(by_size[:2]) + max(by_size[0], summed)

    def collectives(self, strategy: str, world: int, node: int) -> list[Collective]:
        """Return the collective operations of a step."""
        if world == 1:
            return []
        if strategy == "DDP":
            return traffic.ddp_step(self.student, self.criterion, world)
        group = node if strategy == "hybrid" else 0
        return traffic.fsdp_step(self.student, self.criterion, self.crop_sizes, world, group)


class CountFlops(TorchDispatchMode):
    """Counts the operations of matrix products, convolutions and attention in `total`."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if count := flop_registry.get(function._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def simulate(name: str, args: argparse.Namespace, *flags: str) -> tuple[Plan, int]:
    """Simulate forward and backward of a network, with fake tensors from the start; return its plan and the peak of its memory."""
    yaml = ("--cfg", YAMLS[name]) if name in YAMLS else ()
    with META:
        step = build_step(
            "lean",
            args,
            arch=NETWORKS[name].arch,
            overrides=NETWORKS[name].overrides,
            precision=args.precision,
            flags=(*yaml, *flags),
            device=META,
        )
    method = step.method
    student, criterion = method.student, method.criterion
    assert isinstance(student, Backbone)
    with simulated():
        for module in (student, method.teacher, criterion):
            module.to_empty(device=CPU)
        crops = make_crops(args.batch, args.local_crops)
        with CountFlops() as flops, LiveStorages() as memory:
            for tensor in (*crops, *student.parameters(), *method.teacher.parameters()):
                memory.track(tensor)
            with utils.autocast(CPU, args.precision):
                loss, _ = method.compute_loss(crops, 0)
            loss.backward()
    parameters = sum(p.nbytes for p in student.parameters())
    trainable = sum(p.nbytes for p in student.parameters() if p.requires_grad)
    crop_sizes = 2 if args.local_crops else 1
    return Plan(student, criterion, crop_sizes, parameters, trainable, flops.total, 0, 0), memory.peak


def make_plan(name: str, args: argparse.Namespace) -> Plan:
    """Simulate a network with and without --grad_checkpointing."""
    plan, peak = simulate(name, args)
    _, checkpointed = simulate(name, args, "--grad_checkpointing", "on")
    held = 2 * plan.parameters + plan.trainable  # without moments
    return plan._replace(activations=peak - held, checkpointed=checkpointed - held)


def section(name: str, args: argparse.Namespace, cluster: Cluster) -> Iterator[str]:
    """Yield the lines about a network."""
    plan = make_plan(name, args)
    yield f"## {name}"
    yield ""
    parameters, trainable, state = (size / GB for size in (plan.parameters, plan.trainable, plan.state))
    activations, checkpointed = plan.activations / GB, plan.checkpointed / GB
    yield f"{plan.parameters / 4e6:,.1f}M parameters with heads: P = {parameters:.2f} GB, T = {trainable:.2f} GB, state"
    yield f"{state:.2f} GB. Activations {activations:.2f} GB; {checkpointed:.2f} GB with `--grad_checkpointing True`."
    yield f"A step computes {plan.flops / 1e12:.2f} TFLOP in {1000 * plan.flops / (cluster.tflops * 1e12):.0f} ms."
    yield ""
    columns = ("memory, GB", "sent, GB", "efficiency, %")
    yield "| GPUs | " + " | ".join(f"{column}: {name}" for column in columns for name in STRATEGIES) + " |"
    yield "|" + " ---: |" * (1 + len(columns) * len(STRATEGIES))
    for world in args.worlds:
        yield f"| {world} | " + " | ".join(cells(plan, world, cluster)) + " |"
    yield ""


def cells(plan: Plan, world: int, cluster: Cluster) -> list[str]:
    """Return memory, traffic and efficiency of each strategy; hybrid sharding needs more than one node."""
    memory: list[str] = []
    sent: list[str] = []
    efficiency: list[str] = []
    for strategy in STRATEGIES:
        one_node = world <= cluster.node or world % cluster.node
        if (world == 1 and strategy != "DDP") or (strategy == "hybrid" and one_node):
            row = ("", "", "")
        else:
            shards = {"DDP": 1, "FSDP": world, "hybrid": cluster.node}[strategy]
            collectives = plan.collectives(strategy, world, cluster.node)
            low, high = cluster.efficiency(plan.flops, collectives)
            held = plan.memory(shards) + plan.activations
            row = (
                f"{held / GB:.1f}",
                f"{sum(one.sent for one in collectives) / GB:.2f}",
                "100" if world == 1 else f"{100 * low:.0f} to {100 * high:.0f}",
            )
        for column, cell in zip((memory, sent, efficiency), row):
            column.append(cell)
    return [*memory, *sent, *efficiency]


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(
        "benchmarks/scaling.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_sizes(parser, batch=32)
    add, positive = parser.add_argument, number(0, 1e9, above_low=True)
    add(
        "--networks", nargs="+", choices=tuple(NETWORKS), default=list(NETWORKS), metavar="NETWORK", help="default: all"
    )
    add("--precision", choices=("fp32", "bf16"), default="bf16")
    add("--worlds", type=COUNT, nargs="+", default=list(WORLDS), help="numbers of GPUs")
    add("--tflops", type=positive, default=100.0, help="TFLOP/s that a GPU achieves in a step")
    add("--node_gpus", type=COUNT, default=8, help="GPUs of a node")
    add("--inside", type=positive, default=200.0, help="GB/s that a GPU sends within its node")
    add("--between", type=positive, default=50.0, help="GB/s that a node sends to other nodes")
    add("--latency", type=number(0, 1e6), default=5.0, help="microseconds of a message")
    add("--output", type=Path, default=None, help="file to write; default: print")
    return parser


def introduction(args: argparse.Namespace, cluster: Cluster) -> str:
    """Return the text before the networks."""
    sizes = {key: getattr(args, key) for key in ("batch", "local_crops", "out_dim", "precision")}
    networks = "" if args.networks == list(NETWORKS) else f"--networks {shlex.join(args.networks)} "
    worlds = {"first": f"{args.worlds[0]:,}", "last": f"{args.worlds[-1]:,}"}
    return INTRODUCTION.format(networks=networks, **worlds, **sizes, **cluster._asdict())


def lines(args: argparse.Namespace) -> Iterator[str]:
    """Yield the lines of the page."""
    cluster = Cluster(args.tflops, args.node_gpus, args.inside, args.between, args.latency)
    yield introduction(args, cluster)
    for name in args.networks:
        yield from section(name, args, cluster)


def main(args: argparse.Namespace) -> None:
    """Write the page."""
    if args.output is None:
        for line in lines(args):
            print(line, flush=True)
        return
    text = "\n".join(lines(args))
    with files.atomic_write(args.output) as temporary:
        temporary.write_text(text)


if __name__ == "__main__":
    launch.run_script(lambda: main(get_args_parser().parse_args()))
