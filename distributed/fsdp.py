"""Fully sharded data parallelism: networks whose parameters are sharded over the processes (`--fsdp`).

The parameters of a unit (a block, a head, the rest of the network) are gathered for its forward and backward, and its gradient is
averaged into shards. Student and teacher are sharded alike, so that the optimizer and the teacher's moving average need no
communication. Heads compute their prototypes from gathered parameters, so losses get plain tensors. Checkpoints are the same as
without --fsdp.

Hybrid sharding (`--fsdp_group N`): every N consecutive processes, such as those of a node, hold one copy of the shards.
Parameters are gathered within such a group; gradients are averaged within it, then between the groups, shard by shard.

Origin: PyTorch's `fully_shard` (FSDP2); the ideas are ZeRO stage 3 (Rajbhandari et al., SC 2020) and MiCS (Zhang et al.,
VLDB 2022).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from distributed import collectives, ddp
from models.base import Backbone, batch_norms
from utils import UsageError, logger

# --------------------------------------------------------------------------- networks


def shard_networks(
    student: Backbone, teacher: Backbone, device: torch.device, group: int = 0
) -> tuple[Backbone, Backbone]:
    """Shard both networks in place and move the shards to the device.

    The networks must be equal in every process and not yet on the device, so that the device holds only one whole unit at a time.
    Statistics of BatchNorm are those of DistributedDataParallel (distributed/ddp.py).

    Args:
        group: Number of consecutive processes over which parameters are sharded; 0 for all.

    Raises:
        UsageError: There is only one process, or `group` does not divide their number.
    """
    mesh = build_mesh(device.type, group)
    for network in (student, teacher):
        ddp.synchronize_batch_norms(network, device)
        network.to(memory_format=torch.contiguous_format)  # `fully_shard` takes no other layout
        for unit in (*units(network), network):
            fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    return student, teacher


def build_mesh(device_type: str, group: int) -> DeviceMesh:
    """Return the mesh of all processes: one shard each, or with a smaller `group` (replicas, shards).

    Raises:
        UsageError: There is only one process, or `group` does not divide their number.
    """
    world = collectives.get_world_size()
    if world == 1:
        raise UsageError("--fsdp needs several processes, this run has one; start it with torchrun, or drop --fsdp")
    if group in (0, world):
        return init_device_mesh(device_type, (world,))
    if world % group:
        groups = ", ".join(str(n) for n in range(2, world + 1) if world % n == 0)
        raise UsageError(
            f"--fsdp_group {group} does not divide the {world} processes of this run; choose one of {groups}"
        )
    logger.info("--fsdp_group %d: %d replicas, each sharded over %d processes", group, world // group, group)
    return init_device_mesh(device_type, (world // group, group), mesh_dim_names=("replicate", "shard"))


def units(network: Backbone) -> Iterator[nn.Module]:
    """Yield the modules that are gathered as a unit: blocks (or their separately called parts), heads and the SRS module."""
    for stage in range(len(network.stage_depths)):
        for block in network.stage_blocks(stage):
            yield from block if isinstance(block, tuple) else (block,)
    yield from network.head if isinstance(network.head, nn.ModuleList) else [network.head]
    yield from (part for part in (network.head_dense, network.srs) if part is not None)


def set_gradient_sync(network: nn.Module, enabled: bool) -> None:
    """Set whether the next backward of a sharded network averages gradients; does nothing for other networks."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(enabled)


def broadcast_running_statistics(network: nn.Module) -> None:
    """Give all processes the BatchNorm statistics of process 0, as DistributedDataParallel does once per step; else do nothing."""
    statistics = [s for norm in batch_norms(network) for s in (norm.running_mean, norm.running_var) if s is not None]
    if isinstance(network, FSDPModule) and statistics:
        flat = collectives.broadcast(torch.cat(statistics))
        torch._foreach_copy_(statistics, flat.split([len(s) for s in statistics]))


@contextlib.contextmanager
def unsharded(*networks: nn.Module) -> Iterator[None]:
    """Hold whole networks in every process inside the block, so that processes may call them (without gradients) independently.

    Outside the block a call of a sharded network is a collective operation.
    """
    parts = [module for network in networks for module in network.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)


def reset_forward_state(network: nn.Module) -> None:
    """Drop the state that torch keeps for a backward; without one (the teacher) it would grow with every step."""
    if isinstance(network, FSDPModule) and hasattr(network, "reset_iter_state"):  # not in older releases of torch
        network.reset_iter_state()


# --------------------------------------------------------------------------- tensors


def is_sharded(tensors: Sequence[Tensor]) -> bool:
    """Return whether any of the tensors is sharded."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return this process's shards, as views; tensors that are not sharded are returned unchanged."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def norms(tensors: Sequence[Tensor], like: Sequence[Tensor] | None = None) -> Tensor:
    """Return the L2 norm of each whole tensor, with a single all-reduce over the processes that share it.

    Args:
        like: Tensors that are sharded in the same way, for `tensors` that are shards themselves.
    """
    of_shards = torch.stack(torch._foreach_norm(local(tensors)))
    mesh = next((tensor.device_mesh for tensor in like or tensors if isinstance(tensor, DTensor)), None)
    if mesh is None:
        return of_shards
    squares = of_shards.double().square_()  # in float32 squares overflow or underflow where norms do not
    shard_group = mesh.get_group(mesh.ndim - 1)
    return collectives.all_reduce_sum(squares, shard_group).sqrt_().to(of_shards.dtype)


def shard_like(own: Any, whole: Any) -> Any:
    """Return `whole`, which is equal in every process, sharded like `own`, without communication; other values unchanged.

    The shards are copies, so that `whole` can be freed.
    """
    if not isinstance(own, DTensor) or not isinstance(whole, Tensor) or own.shape != whole.shape:
        return whole
    return distribute_tensor(whole.to(own.device), own.device_mesh, own.placements, src_data_rank=None).clone()


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a sharded tensor whole, on its device, which is a collective operation; other tensors unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
