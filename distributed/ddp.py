"""TODO."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distributed import collectives
from models.base import batch_norms

if TYPE_CHECKING:
    pass
# What DistributedDataParallel calls the exchange of buffers before a forward; torch 2.14 renamed it.
SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else "broadcast_buffers"
)


# --------------------------------------------------------------------------- the loop


def wrap_networks(student: nn.Module, teacher: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Wrap the networks for several processes; with one process they come back as they are.

    Networks with BatchNorm share their statistics over processes on CUDA, and the teacher is wrapped too, as published.
    """
    if not collectives.is_distributed():
        return student, teacher
    device = next(student.parameters()).device
    device_ids = [device.index] if device.type == "cuda" else None
    has_batch_norm = bool(batch_norms(student))
    if has_batch_norm:
        if device.type == "cuda":
            student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
            teacher = nn.SyncBatchNorm.convert_sync_batchnorm(teacher)
        teacher.requires_grad_(True)  # DistributedDataParallel refuses a network without trainable parameters
        teacher = DistributedDataParallel(teacher, device_ids=device_ids)
        teacher.requires_grad_(False)
    options: dict[str, Any] = {SYNC_BUFFERS: has_batch_norm, "gradient_as_bucket_view": True}
    return DistributedDataParallel(student, device_ids=device_ids, **options), teacher
