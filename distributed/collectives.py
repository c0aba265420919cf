"""Collective operations, which return their input when there is only one process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from utils import UsageError


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Raise a `UsageError` of one process inside the block on all processes, so that none waits for the others.

    The block must contain no collective operation.

    Raises:
        UsageError: The error of the lowest rank that raised one.
    """
    message = None
    try:
        yield
    except UsageError as error:
        message = str(error)
    first = next((m for m in all_gather_objects(message) if m is not None), None)
    if first is not None:
        raise UsageError(first)


def must_agree(what: str, value: Any) -> None:
    """Raise a `UsageError` on all processes unless they all have the same `value`, described by `what`."""
    values = all_gather_objects(value)
    if any(other != values[0] for other in values):
        raise UsageError(
            f"the processes see different {what} ({values}); put --data_path and --output_dir on a disk they share"
        )


def is_distributed() -> bool:
    """Return whether this process belongs to a process group."""
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    """Return the rank of this process, 0 without a group."""
    return dist.get_rank() if is_distributed() else 0


def get_world_size() -> int:
    """Return the number of processes, 1 without a group."""
    return dist.get_world_size() if is_distributed() else 1


def is_main_process() -> bool:
    """Return whether this process has rank 0, which logs and writes files."""
    return get_rank() == 0


def all_reduce_sum(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """Sum `tensor` over the processes of `group`, or all, in place, and return it."""
    if is_distributed():
        dist.all_reduce(tensor, group=group)
    return tensor


def broadcast(tensor: torch.Tensor) -> torch.Tensor:
    """Overwrite `tensor` by that of process 0, and return it."""
    if is_distributed():
        dist.broadcast(tensor, 0)
    return tensor


def all_reduce_max(tensor: torch.Tensor) -> torch.Tensor:
    """Take the maximum of `tensor` over all processes in place, and return it."""
    if is_distributed():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def start_all_reduce_sum(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Start to sum `tensor` over all processes in place; return a function that waits for the sum and returns it.

    On CUDA the device waits, not the host.
    """
    work = dist.all_reduce(tensor, async_op=True) if is_distributed() else None

    def wait() -> torch.Tensor:
        if work is not None:
            work.wait()
        return tensor

    return wait


def all_gather_objects(value: Any) -> list[Any]:
    """Return `value` of every process, in rank order."""
    if not is_distributed():
        return [value]
    gathered: list[Any] = [None] * get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def all_gather_rows(rows: torch.Tensor) -> list[torch.Tensor]:
    """Return `rows` (n_r, ...) of every process in rank order, without padding; the counts n_r may differ."""
    if not is_distributed():
        return [rows]
    shapes = all_gather_objects((len(rows), tuple(rows.shape[1:]), rows.dtype))
    longest, row_shape, dtype = max(shapes, key=lambda shape: shape[0])  # of a process that has rows
    padded = torch.zeros(longest, *row_shape, dtype=dtype, device=rows.device)
    padded[: len(rows)] = rows.reshape(len(rows), *row_shape)
    gathered = [torch.empty_like(padded) for _ in shapes]
    dist.all_gather(gathered, padded)
    return [part[:count] for part, (count, _, _) in zip(gathered, shapes)]
