"""TODO."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from utils import UsageError


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """A `UsageError` that one process meets inside the block is raised by all of them, so that none waits for the others.

    The block must hold no collective operation.

    Raises:
        UsageError: that of the first process, by rank, that met one.
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
    """Stop on all processes unless they see the same `value`.

    Raises:
        UsageError: naming `what` and the values.
    """
    values = all_gather_objects(value)
    if any(other != values[0] for other in values):
        raise UsageError(
            f"the processes see different {what} ({values}); put --data_path and --output_dir on a disk they share"
        )


def is_distributed() -> bool:
    """Whether this process belongs to a group."""
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    """This process's rank, 0 without a group."""
    return dist.get_rank() if is_distributed() else 0


def get_world_size() -> int:
    """The number of processes, 1 without a group."""
    return dist.get_world_size() if is_distributed() else 1


def is_main_process() -> bool:
    """Whether this process prints and writes."""
    return get_rank() == 0


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over all processes, in place; returns it."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def start_all_reduce_sum(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Begin to sum `tensor` over all processes, in place; returns what waits for the sum and gives it.

    On CUDA it is the device that waits, not the host.
    """
    work = dist.all_reduce(tensor, async_op=True) if is_distributed() else None

    def wait() -> torch.Tensor:
        if work is not None:
            work.wait()
        return tensor

    return wait


def all_gather_objects(value: Any) -> list[Any]:
    """`value` of every process, in rank order, on every process."""
    if not is_distributed():
        return [value]
    gathered: list[Any] = [None] * get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def all_gather_rows(rows: torch.Tensor) -> list[torch.Tensor]:
    """`rows` (n_r, ...) of every process in rank order; the counts n_r may differ, nothing is padded or lost."""
    if not is_distributed():
        return [rows]
    shapes = all_gather_objects((len(rows), tuple(rows.shape[1:]), rows.dtype))
    longest, row_shape, dtype = max(shapes, key=lambda shape: shape[0])  # a process without rows takes the others' word
    padded = torch.zeros(longest, *row_shape, dtype=dtype, device=rows.device)
    padded[: len(rows)] = rows.reshape(len(rows), *row_shape)
    gathered = [torch.empty_like(padded) for _ in shapes]
    dist.all_gather(gathered, padded)
    return [part[:count] for part, (count, _, _) in zip(gathered, shapes)]
