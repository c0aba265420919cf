"""Fully sharded data parallelism: networks whose parameters are sharded over the processes (`--fsdp`).

The parameters of a unit (a block, a head, the rest of the network) are gathered for its forward and backward, and its gradient is
averaged into shards. Student and teacher are sharded alike, so that the optimizer and the teacher's moving average need no
communication. Heads compute their prototypes from gathered parameters, so losses get plain tensors. Checkpoints are the same as
without --fsdp.

Origin: PyTorch's `fully_shard` (FSDP2); the idea is ZeRO stage 3 (Rajbhandari et al., SC 2020).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from distributed import collectives
from models.base import Backbone, batch_norms
from utils import UsageError

# --------------------------------------------------------------------------- networks


def shard_networks(student: Backbone, teacher: Backbone, device: torch.device) -> tuple[Backbone, Backbone]:
    """Shard both networks in place and move the shards to the device.

    The networks must be equal in every process and not yet on the device, so that the device holds only one whole unit at a time.

    Raises:
        UsageError: There is only one process, or a network has BatchNorm.
    """
    if collectives.get_world_size() == 1:
        raise UsageError("--fsdp needs several processes, this run has one; start it with torchrun, or drop --fsdp")
    if batch_norms(student):
        raise UsageError(
            "--fsdp does not support BatchNorm in network or heads; drop --fsdp, such networks are small enough without it"
        )
    mesh = init_device_mesh(device.type, (collectives.get_world_size(),))
    for network in (student, teacher):
        for unit in (*units(network), network):
            fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    return student, teacher


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


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of each whole tensor, with a single all-reduce if they are sharded."""
    of_shards = torch.stack(torch._foreach_norm(local(tensors)))
    if not is_sharded(tensors):
        return of_shards
    squares = of_shards.double().square_()  # in float32 squares overflow or underflow where norms do not
    return collectives.all_reduce_sum(squares).sqrt_().to(of_shards.dtype)


def shard_like(own: Any, whole: Any) -> Any:
    """Return `whole`, which is equal in every process, sharded like `own`, without communication; other values unchanged."""
    if not isinstance(own, DTensor) or not isinstance(whole, Tensor) or own.shape != whole.shape:
        return whole
    return distribute_tensor(whole.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def full_state_dict(owner: nn.Module | torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state dict of a network or optimizer with whole tensors; a collective operation.

    The main process gets sharded tensors on the CPU, the others None in their place.
    """
    return tree_map(_gather, owner.state_dict())


def _gather(value: Any) -> Any:
    if not isinstance(value, DTensor):
        return value
    whole = value.full_tensor()
    return whole.cpu() if collectives.is_main_process() else None
