"""Networks whose parameters are spread over the processes (`--fsdp`), and what the rest has to know of it.

A unit (a block, a head, what remains of the network) is gathered when its forward or backward begins and given up when that ends;
its gradient is averaged into shards. Student and teacher are cut alike, so that the optimizer and the moving average work on shards
without a word to other processes. Prototypes are computed inside the forward of their head, from gathered parameters: losses see
plain tensors. Files are those of a run without --fsdp.

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
    """Shard both networks, in place: a share for each process, and move the shares to the device.

    They must hold the same values in every process, and stay where they were made until then: only a unit at a time is whole on
    the device.

    Raises:
        UsageError: one process, or a network with BatchNorm.
    """
    if collectives.get_world_size() == 1:
        raise UsageError("--fsdp spreads networks over processes, this run has one; use torchrun, or leave --fsdp out")
    if batch_norms(student):
        raise UsageError(
            "--fsdp takes no network or head with BatchNorm, which are small enough without it; leave it out"
        )
    mesh = init_device_mesh(device.type, (collectives.get_world_size(),))
    for network in (student, teacher):
        for unit in (*units(network), network):
            fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    return student, teacher


def units(network: Backbone) -> Iterator[nn.Module]:
    """What is gathered together: every block (in parts, where these are called by themselves), every head, what pools samples."""
    for stage in range(len(network.stage_depths)):
        for block in network.stage_blocks(stage):
            yield from block if isinstance(block, tuple) else (block,)
    yield from network.head if isinstance(network.head, nn.ModuleList) else [network.head]
    yield from (part for part in (network.head_dense, network.srs) if part is not None)


def set_gradient_sync(network: nn.Module, wanted: bool) -> None:
    """Whether the next backward of a sharded network averages gradients over processes; others are left as they are."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(wanted)


@contextlib.contextmanager
def unsharded(*networks: nn.Module) -> Iterator[None]:
    """In the block sharded networks are whole in every process, which calls them (or their parts) as often as it likes.

    Outside it calls are exchanges that all processes make equally often, through the network's `forward`. No gradients inside.
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
    """Drop what torch notes of each forward for a backward, which a teacher never has: it would grow with every step."""
    if isinstance(network, FSDPModule) and hasattr(network, "reset_iter_state"):  # not in older releases of torch
        network.reset_iter_state()


# --------------------------------------------------------------------------- tensors


def is_sharded(tensors: Sequence[Tensor]) -> bool:
    """Whether these are shares of larger tensors."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The shares that this process holds, as views; tensors that are whole come back as they are."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm of each whole tensor: one exchange for all of them where they are sharded, none where they are not."""
    of_shares = torch.stack(torch._foreach_norm(local(tensors)))
    if not is_sharded(tensors):
        return of_shares
    squares = of_shares.double().square_()  # in float32 they would overflow or vanish where the norms do not
    return collectives.all_reduce_sum(squares).sqrt_().to(of_shares.dtype)


def shard_like(own: Any, whole: Any) -> Any:
    """A whole value, equal in every process, cut as `own` is cut; anything else as it is. No process talks to another."""
    if not isinstance(own, DTensor) or not isinstance(whole, Tensor) or own.shape != whole.shape:
        return whole
    return distribute_tensor(whole.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def full_state_dict(owner: nn.Module | torch.optim.Optimizer) -> dict[str, Any]:
    """The state dict of a network or an optimizer with every tensor whole, those that were shared out on the CPU.

    All processes must call this together; the main one gets the tensors, the others None in their places.
    """
    return tree_map(_gathered, owner.state_dict())


def _gathered(value: Any) -> Any:
    if not isinstance(value, DTensor):
        return value
    whole = value.full_tensor()
    return whole.cpu() if collectives.is_main_process() else None
