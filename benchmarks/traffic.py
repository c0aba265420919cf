"""The collective operations of a training step: those that DDP, FSDP and hybrid sharding should issue, and those that are issued.

    predicted = fsdp_step(student, criterion, crop_sizes=2, world=4, group=2)       # before the networks are sharded
    with CountCollectives() as counted:
        step([crops], 0, 0)
    assert total(counted.found) == total(predicted)

A block is gathered once per size of crops, in the forward and again in the backward; heads and the rest of the network once. The
teacher sees global crops only. Gradients are reduced once: autograd sums those of all sizes first. This holds for one micro-batch
per step; --accum_iter repeats the gathers. Statistics of BatchNorm are left out.

Origin: ring communication as in Rajbhandari et al., SC 2020, section 7.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distributed import fsdp
from models import Backbone

BUCKET = 25 * 2**20  # bytes of gradients that DDP reduces at once
NORM = 8  # bytes of a gradient's squared norm


class Collective(NamedTuple):
    """A collective operation on a tensor of `nbytes` bytes, counted whole, among every `spacing`-th of some processes."""

    kind: str  # all-gather, reduce-scatter or all-reduce
    nbytes: int
    processes: int
    spacing: int = 1

    @property
    def sent(self) -> float:
        """Bytes that a process sends in a ring."""
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * (self.processes - 1) / self.processes * self.nbytes

    @property
    def hops(self) -> int:
        """Messages that wait for each other: through the tree of an all-reduce, around the ring of the others."""
        return 2 * math.ceil(math.log2(self.processes)) if self.kind == "all-reduce" else self.processes - 1


class Unit(NamedTuple):
    """Parameters that FSDP gathers together, and how often the student calls them in a forward."""

    parameters: list[nn.Parameter]
    calls: int

    def nbytes(self, shards: int = 1, *, trainable: bool = False) -> int:
        """Return the bytes of all or of the trainable parameters, whose first dimension is padded to a multiple of `shards`."""
        return sum(
            math.ceil(len(p) / shards) * shards * (p.nbytes // len(p))
            for p in self.parameters
            if p.requires_grad or not trainable
        )


def units_of(network: Backbone, crop_sizes: int) -> list[Unit]:
    """Return the units of a network that is not sharded yet, the rest of it last."""
    once = {id(part) for part in network.modules() if part in (network.head, network.head_dense, network.srs)}
    once |= {id(head) for head in network.head.children()} if isinstance(network.head, nn.ModuleList) else set()
    units = [Unit([*unit.parameters()], 1 if id(unit) in once else crop_sizes) for unit in fsdp.units(network)]
    inside = {id(parameter) for unit in units for parameter in unit.parameters}
    return [*units, Unit([p for p in network.parameters() if id(p) not in inside], 1)]


# --------------------------------------------------------------------------- predicted


def ddp_step(student: Backbone, criterion: nn.Module, world: int) -> list[Collective]:
    """Return the collectives of a step with whole networks: gradients in buckets, and the centers of the loss."""
    gradients = sum(p.nbytes for p in student.parameters() if p.requires_grad)
    buckets = [min(BUCKET, gradients - start) for start in range(0, gradients, BUCKET)]
    return [*(Collective("all-reduce", bucket, world) for bucket in buckets), *_centers(criterion, world)]


def fsdp_step(student: Backbone, criterion: nn.Module, crop_sizes: int, world: int, group: int = 0) -> list[Collective]:
    """Return the collectives of a step of sharded networks: parameters, gradients and their norms, and the centers.

    Args:
        crop_sizes: Number of sizes of crops.
        group: Number of processes over which parameters are sharded; 0 for all.
    """
    shards = group or world
    found = []
    for unit in units_of(student, crop_sizes):
        gathers = 2 * unit.calls + 1  # the student's forward and backward, the teacher's forward
        found += gathers * [Collective("all-gather", unit.nbytes(shards), shards)]
        if gradients := unit.nbytes(shards, trainable=True):
            found.append(Collective("reduce-scatter", gradients, shards))
            if shards < world:
                found.append(Collective("all-reduce", gradients // shards, world // shards, spacing=shards))
    norms = NORM * sum(p.requires_grad for p in student.parameters())
    return [*found, Collective("all-reduce", norms, shards), *_centers(criterion, world)]


def _centers(criterion: nn.Module, world: int) -> list[Collective]:
    """Return the all-reduce of each center, with the number of its rows."""
    centers = [buffer for buffer in criterion.buffers() if buffer.ndim == 2]
    return [Collective("all-reduce", center.nbytes + center.element_size(), world) for center in centers]


# --------------------------------------------------------------------------- counted

# Operators of torch.distributed on tensors; the position of the argument that holds the whole tensor.
OPERATORS = {
    "_allgather_base_": ("all-gather", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "allreduce_": ("all-reduce", 0),
}


class CountCollectives(TorchDispatchMode):
    """Records the collectives that are issued inside the `with` block, by Python or by the reducer of DDP.

    Raises:
        NotImplementedError: Another operator of torch.distributed than those of `OPERATORS` sends tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Collective] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            name = function.name().removeprefix("c10d::")
            if name not in OPERATORS:
                raise NotImplementedError(f"{name} is not counted")
            kind, position = OPERATORS[name]
            group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
            nbytes = sum(leaf.nbytes for leaf in tree_leaves(args[position]))
            self.found.append(Collective(kind, nbytes, group.size()))
        return function(*args, **(kwargs or {}))


def total(collectives: Iterable[Collective]) -> dict[tuple[str, int], int]:
    """Return the sum of bytes by kind and number of processes."""
    sums: dict[tuple[str, int], int] = {}
    for one in collectives:
        key = one.kind, one.processes
        sums[key] = sums.get(key, 0) + one.nbytes
    return sums
