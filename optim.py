"""Parameter groups, schedules, the optimisers, gradient clipping and the teacher's moving average.

Origin: DINO (Caron et al., ICCV 2021), implementation details; EsViT (Li et al., ICLR 2022) appendix.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from timm.optim import Lars
from torch import Tensor, nn

from utils import UsageError

OPTIMIZERS = ("adamw", "sgd", "lars")


def param_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups of trainable parameters: with weight decay, and (1-d tensors and biases) without."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim == 1 or name.endswith(".bias") else decayed).append(parameter)
    return [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]


def build_optimizer(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW, SGD with momentum 0.9 or LARS; learning rate and weight decay are set by the schedules of each step.

    Raises:
        UsageError: an unknown name.
    """
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    if name == "lars":
        return Lars(groups, lr=0.0, momentum=0.9)
    raise UsageError(f"unknown optimizer '{name}'; choose one of {', '.join(OPTIMIZERS)}")


def cosine_schedule(
    base_value: float,
    final_value: float,
    epochs: int,
    niter_per_ep: int,
    warmup_epochs: int = 0,
    start_warmup_value: float = 0.0,
) -> np.ndarray:
    """One value for each iteration: a linear warm-up that includes its end point, then half a cosine to `final_value`.

    Raises:
        UsageError: a warm-up longer than the training.
    """
    if warmup_epochs > epochs:
        raise UsageError(f"{warmup_epochs} warm-up epochs do not fit in {epochs} epochs; lower --warmup_epochs")
    warmup = np.linspace(start_warmup_value, base_value, warmup_epochs * niter_per_ep)
    remaining = epochs * niter_per_ep - len(warmup)
    progress = np.arange(remaining) / max(remaining, 1)
    cosine = final_value + 0.5 * (base_value - final_value) * (1 + np.cos(np.pi * progress))
    return np.concatenate([warmup, cosine])


@torch.no_grad()
def clip_each_gradient(model: nn.Module, max_norm: float) -> Tensor:
    """Scale each parameter's gradient down to its own norm `max_norm` (0: leave it), without a copy to the host.

    Returns:
        a boolean scalar on the device: whether every gradient is finite.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norms = torch._foreach_norm(gradients)
    if max_norm > 0:
        torch._foreach_mul_(gradients, [(max_norm / (norm + 1e-6)).clamp(max=1.0) for norm in norms])
    return torch.isfinite(torch.stack(norms)).all()


def drop_last_layer_gradients(model: nn.Module) -> None:
    """Freeze the prototypes for this step: forget the gradient of every `last_layer` parameter."""
    for name, parameter in model.named_parameters():
        if "last_layer" in name:
            parameter.grad = None


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum teacher + (1 - momentum) student, for parameters, not for buffers."""
    teacher_params: list[Tensor] = list(teacher.parameters())
    torch._foreach_mul_(teacher_params, momentum)
    torch._foreach_add_(teacher_params, list(student.parameters()), alpha=1 - momentum)
