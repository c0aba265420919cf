"""Parameter groups, schedules, optimizers, gradient clipping and the teacher's moving average.

Whether a step is applied is a boolean scalar on the device (`applied`). Only `step_if` may synchronize on it, for optimizers
without a fused kernel.

Origin: DINO (Caron et al., ICCV 2021), implementation details; EsViT (Li et al., ICLR 2022) appendix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from config.choices import OPTIMIZERS as OPTIMIZERS
from distributed import fsdp
from training.lars import LARS
from utils import UsageError, counted, logger

FUSED_DEVICES = {"cpu", "cuda"}  # where AdamW and SGD have a fused kernel, which a flag on the device can skip
LOOPING_DEVICES = {"cpu"}  # where a foreach is a loop over tensors, not a few kernels for all of them
# State of each optimizer per parameter, and whether it has the parameter's shape (otherwise it is a scalar).
MOMENTS: dict[type[torch.optim.Optimizer], dict[str, bool]] = {
    torch.optim.AdamW: {"step": False, "exp_avg": True, "exp_avg_sq": True},
    torch.optim.SGD: {"momentum_buffer": True},
    LARS: {"mu": True},
}


def param_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Split the trainable parameters into two named groups: with weight decay, and (1-d tensors and biases) without."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    names = split_by_decay(parameters)
    decayed, plain = ({"params": [parameters[name] for name in group], "param_names": group} for group in names)
    return [decayed, plain | {"weight_decay": 0.0}]


def split_by_decay(parameters: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """Return the names of the parameters with weight decay, and of those without: 1-d tensors and biases."""
    plain = {name for name, parameter in parameters.items() if parameter.ndim == 1 or name.endswith(".bias")}
    return [name for name in parameters if name not in plain], [name for name in parameters if name in plain]


def build_optimizer(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Return AdamW, SGD with momentum 0.9 or LARS; schedules set learning rate and weight decay at each step.

    AdamW and SGD are fused on `FUSED_DEVICES`; elsewhere torch chooses (None, since False would select the slowest form).

    Raises:
        UsageError: The name is unknown.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    fused = all(parameter.device.type in FUSED_DEVICES for parameter in parameters) or None
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=fused)
    if name == "sgd":
        fused = None if fsdp.is_sharded(parameters) else fused  # torch has no fused kernel for shards
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=fused)
        _init_momentum(optimizer)
        return optimizer
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
    """Return one value per iteration: a linear warmup including its end point, then half a cosine to `final_value`.

    Raises:
        UsageError: The warmup is longer than the training.
    """
    if warmup_epochs > epochs:
        raise UsageError(f"--warmup_epochs {warmup_epochs} exceeds the {counted(epochs, 'epoch')} of the run; lower it")
    warmup = np.linspace(start_warmup_value, base_value, warmup_epochs * niter_per_ep)
    remaining = epochs * niter_per_ep - len(warmup)
    progress = np.arange(remaining) / max(remaining, 1)
    cosine = final_value + 0.5 * (base_value - final_value) * (1 + np.cos(np.pi * progress))
    return np.concatenate([warmup, cosine])


def _init_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Create SGD's momentum buffers, as zeros, so that also the first step can be skipped; this changes no result."""
    for group in optimizer.param_groups if isinstance(optimizer, torch.optim.SGD) else ():
        for parameter in group["params"]:
            if optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def named_moments(state: Any, names: Sequence[Sequence[str]] | None, source: str) -> dict[str, dict[str, Any]]:
    """Return the moments of a saved optimizer by parameter name; empty for a parameter that was never updated.

    Args:
        state: State dict of an optimizer, which numbers parameters by position.
        names: Names of each group's parameters, in order, for files without `param_names`.

    Raises:
        UsageError: `state` is no state dict of an optimizer, or has another number of parameters.
    """
    try:
        groups, moments = state["param_groups"], state["state"]
        names = [group["param_names"] for group in groups] if "param_names" in groups[0] else names
        positions = [list(group["params"]) for group in groups]
        found = {number: dict(moments.get(number, {})) for group in positions for number in group}
    except (TypeError, KeyError, IndexError, AttributeError, ValueError):
        raise UsageError(f"{source} has no optimizer state under 'optimizer'; use another file") from None
    sizes = [len(group) for group in positions]
    if names is None or [len(group) for group in names] != sizes:
        expected = "" if names is None else f", expected {' and '.join(str(len(group)) for group in names)}"
        raise UsageError(
            f"{source} has an optimizer with groups of {' and '.join(map(str, sizes))} parameters{expected}; use another file"
        )
    return {str(n): found[i] for group, numbers in zip(names, positions) for n, i in zip(group, numbers)}


def load_own_moments(optimizer: torch.optim.Optimizer, state: Any, source: str) -> None:
    """Load moments saved by an optimizer with the same groups: by name, or by position if the state has no names.

    Raises:
        UsageError: The state is invalid, or does not have exactly the trained parameters.
    """
    names = [group["param_names"] for group in optimizer.param_groups]
    moments = named_moments(state, names, source)
    if other := moments.keys() ^ {name for group in names for name in group}:
        raise UsageError(f"{source} trained other parameters (such as {min(other)}); choose another --output_dir")
    load_moments(optimizer, moments, source)


def load_moments(
    optimizer: torch.optim.Optimizer, moments: Mapping[str, Mapping[str, Any]], source: str, skip_misfits: bool = False
) -> None:
    """Load moments by parameter name; a parameter without moments starts fresh. Settings of the groups are not loaded.

    Args:
        skip_misfits: Warn about moments that do not fit, and let their parameters start fresh.

    Raises:
        UsageError: The moments of a parameter are of another optimizer, or have another shape.
    """
    named = [pair for group in optimizer.param_groups for pair in zip(group["param_names"], group["params"])]
    wanted, fitted = MOMENTS[type(optimizer)], {}
    for number, (name, parameter) in enumerate(named):
        saved = {key: value for key, value in moments.get(name, {}).items() if value is not None}
        if "mu" in wanted and "momentum_buffer" in saved:  # saved with timm's LARS, which this project used before
            saved["mu"] = saved.pop("momentum_buffer")
        try:
            if saved and saved.keys() != wanted.keys():
                raise UsageError(
                    f"{source} has the moments {', '.join(map(str, saved))} of {name}, {type(optimizer).__name__} needs "
                    f"{', '.join(wanted)}; use the same --optimizer"
                )
            if saved:
                fitted[number] = {
                    k: _check_moment(v, parameter, wanted[k], f"{source}: {k} of {name}") for k, v in saved.items()
                }
        except UsageError as misfit:
            if not skip_misfits:
                raise
            logger.warning("%s; with --allow_partial it starts fresh", misfit)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": fitted})
    _init_momentum(optimizer)


def _check_moment(value: Any, parameter: Tensor, has_shape: bool, what: str) -> Tensor:
    """Return a moment in the layout of its parameter, or the step counter, which has no shape.

    Raises:
        UsageError: The value is no tensor of that shape.
    """
    shape = parameter.shape if has_shape else torch.Size()
    tensor = torch.as_tensor(value) if isinstance(value, Tensor | int | float) else None
    if tensor is None or tensor.shape != shape or tensor.is_complex():
        found = f"is a {type(value).__name__}" if tensor is None else f"has shape {tuple(tensor.shape)}"
        raise UsageError(f"{what} {found}, expected shape {tuple(shape)}; use another file")
    if not has_shape:
        return tensor.to(torch.float32, copy=True)
    return _match_strides(parameter, fsdp.shard_like(parameter, tensor))


def _match_strides(parameter: Tensor, value: Tensor) -> Tensor:
    """Return a moment in the memory format of its parameter, which fused optimizers assume."""
    if value.stride() == parameter.stride():
        return value
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


@torch.no_grad()
def step_if(optimizer: torch.optim.Optimizer, applied: Tensor) -> None:
    """Step the optimizer if `applied` is true; otherwise leave parameters, moments and step counters unchanged.

    Fused optimizers and LARS read the flag on the device (`found_inf`). For SGD on shards, and outside `FUSED_DEVICES`, the host
    reads it: one synchronization per step.
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
    """Clip the norm of each parameter's gradient to `max_norm` (0: no clipping).

    Returns:
        The norm of each gradient before clipping, on the device, in the order of the parameters that have one.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norms = fsdp.norms(gradients)
    if max_norm > 0:
        torch._foreach_mul_(fsdp.local(gradients), (max_norm / (norms + 1e-6)).clamp_(max=1.0).unbind())
    return norms


def drop_last_layer_gradients(model: nn.Module) -> None:
    """Freeze the prototypes for this step by dropping the gradients of all `last_layer` parameters."""
    for name, parameter in model.named_parameters():
        if "last_layer" in name:
            parameter.grad = None


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float, applied: Tensor) -> None:
    """Update the teacher's parameters (not its buffers) if `applied`: teacher <- momentum teacher + (1 - momentum) student."""
    teacher_params, student_params = (fsdp.local(list(net.parameters())) for net in (teacher, student))
    share = applied.float() * (1 - momentum)
    if share.device.type in LOOPING_DEVICES:
        torch._foreach_lerp_(teacher_params, student_params, [share] * len(teacher_params))
        return
    # A list of factors would launch one kernel per parameter, a single tensor does not.
    moves = torch._foreach_sub(student_params, teacher_params)
    torch._foreach_mul_(moves, share)
    torch._foreach_add_(teacher_params, moves)
