"""Student and teacher under DistributedDataParallel."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distributed import collectives
from models.base import batch_norms

# The option that synchronizes buffers before a forward, renamed in torch 2.14.
SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else "broadcast_buffers"
)


def wrap_networks(student: nn.Module, teacher: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Wrap student and teacher for several processes; with one process return them unchanged.

    The teacher is wrapped only if the networks have BatchNorm, whose statistics are then shared over processes on CUDA, as in the
    published implementation.
    """
    if not collectives.is_distributed():
        return student, teacher
    device = next(student.parameters()).device
    device_ids = [device.index] if device.type == "cuda" else None
    has_batch_norm = bool(batch_norms(student))
    if has_batch_norm:
        synchronize_batch_norms(student, device)
        synchronize_batch_norms(teacher, device)
        teacher.requires_grad_(True)  # DistributedDataParallel refuses a network without trainable parameters
        teacher = DistributedDataParallel(teacher, device_ids=device_ids)
        teacher.requires_grad_(False)
    options: dict[str, Any] = {SYNC_BUFFERS: has_batch_norm, "gradient_as_bucket_view": True}
    return DistributedDataParallel(student, device_ids=device_ids, **options), teacher


def synchronize_batch_norms(network: nn.Module, device: torch.device) -> None:
    """Share the batch statistics of a network's BatchNorm layers over all processes, in place; only CUDA has a kernel for it."""
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(network)
