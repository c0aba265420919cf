"""Parameter groups, schedules, the optimisers, gradient clipping and the teacher's moving average.

Whether a step counts is known on the device alone (`applied`, a boolean scalar tensor): nothing here makes the host wait for it,
apart from the optimizers that `step_where` names.

Origin: DINO (Caron et al., ICCV 2021), implementation details; EsViT (Li et al., ICLR 2022) appendix.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import sharding
from lars import LARS
from utils import UsageError, counted

OPTIMIZERS = ("adamw", "sgd", "lars")
FUSED_DEVICES = {"cpu", "cuda"}  # where AdamW and SGD have a fused kernel that a flag on the device can hold back
HOW_IT_COMPUTES = ("fused", "foreach", "capturable")  # settings of a parameter group that change no number but rounding


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

    AdamW and SGD are fused where that exists (`FUSED_DEVICES`), elsewhere as torch chooses (None; False would choose the slowest).

    Raises:
        UsageError: an unknown name.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    fused = all(parameter.device.type in FUSED_DEVICES for parameter in parameters) or None
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=fused)
    if name == "sgd":
        fused = None if sharding.is_sharded(parameters) else fused  # torch has no such kernel for shards
        return _with_momentum(torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=fused))
    if name == "lars":
        return LARS(groups)
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
        raise UsageError(
            f"{warmup_epochs} warm-up epochs do not fit in {counted(epochs, 'epoch')}; lower --warmup_epochs"
        )
    warmup = np.linspace(start_warmup_value, base_value, warmup_epochs * niter_per_ep)
    remaining = epochs * niter_per_ep - len(warmup)
    progress = np.arange(remaining) / max(remaining, 1)
    cosine = final_value + 0.5 * (base_value - final_value) * (1 + np.cos(np.pi * progress))
    return np.concatenate([warmup, cosine])


def _with_momentum(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Let each parameter's momentum start at zero: the same numbers as none, and a first step can be held back."""
    for group in optimizer.param_groups if isinstance(optimizer, torch.optim.SGD) else ():
        for parameter in group["params"]:
            if optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a saved state dict; how this optimiser computes (`HOW_IT_COMPUTES`) stays as it was built.

    Raises:
        ValueError: the state is of other parameters.
    """
    kept = [{key: group[key] for key in HOW_IT_COMPUTES if key in group} for group in optimizer.param_groups]
    groups = [saved | own for saved, own in zip(state["param_groups"], kept, strict=True)]
    parameters = dict(enumerate(parameter for group in optimizer.param_groups for parameter in group["params"]))
    moments = {
        number: {key: sharding.placed_like(parameters.get(number), value) for key, value in of_one.items()}
        for number, of_one in state["state"].items()
    }
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    for parameter, of_one in optimizer.state.items():
        of_one.update({key: _laid_out_like(parameter, value) for key, value in of_one.items()})
    _with_momentum(optimizer)


def _laid_out_like(parameter: Tensor, value: Any) -> Any:
    """A moment in the memory format of its parameter, which fused optimisers take for granted."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape or value.stride() == parameter.stride():
        return value
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


@torch.no_grad()
def step_where(optimizer: torch.optim.Optimizer, applied: Tensor) -> None:
    """Step the optimizer where `applied` is true; elsewhere no parameter, moment or step counter changes.

    Fused optimizers and LARS read the flag on the device (`found_inf`). SGD on shards, and AdamW and SGD outside `FUSED_DEVICES`,
    do not: the host reads it, one wait a step.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.found_inf = (~applied).float()  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
    elif applied.item():
        optimizer.step()


@torch.no_grad()
def clip_each_gradient(model: nn.Module, max_norm: float) -> Tensor:
    """Scale each parameter's gradient down to its own norm `max_norm` (0: leave it).

    Returns:
        the norm of each gradient before it was scaled, in the order of the parameters that have one, on the device.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norms = sharding.norms(gradients)
    if max_norm > 0:
        torch._foreach_mul_(sharding.local(gradients), (max_norm / (norms + 1e-6)).clamp_(max=1.0).unbind())
    return norms


def drop_last_layer_gradients(model: nn.Module) -> None:
    """Freeze the prototypes for this step: forget the gradient of every `last_layer` parameter."""
    for name, parameter in model.named_parameters():
        if "last_layer" in name:
            parameter.grad = None


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float, applied: Tensor) -> None:
    """teacher <- momentum teacher + (1 - momentum) student where `applied`, for parameters, not for buffers."""
    teacher_params, student_params = (sharding.local(list(net.parameters())) for net in (teacher, student))
    share = applied.float() * (1 - momentum)
    if share.device.type == "cpu":
        torch._foreach_lerp_(teacher_params, student_params, [share] * len(teacher_params))
        return
    # One factor for all, as a tensor: a list of factors would be a kernel for each parameter on CUDA.
    moves = torch._foreach_sub(student_params, teacher_params)
    torch._foreach_mul_(moves, share)
    torch._foreach_add_(teacher_params, moves)
