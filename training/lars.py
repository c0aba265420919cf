"""The LARS optimizer of DINO's released code.

Unlike timm's, it excludes 1-d tensors from weight decay and trust ratio, and applies the ratio at weight decay 0 too.

Origin: layer-wise adaptive rate scaling (You et al., 2017) as in Barlow Twins (Zbontar et al., ICML 2021) and DINO (Caron et al.,
ICCV 2021).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from distributed import fsdp

INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step for a weight tensor is proportional to the norm of that tensor.

    For a tensor `w` with gradient `g`, and trust ratio `q` = 1 if either norm is 0::

        d  <- g + weight_decay w           # 1-d tensors: d <- g, q = 1
        q   = eta |w| / |d|
        mu <- momentum mu + q d
        w  <- w - lr mu

    A parameter without a gradient is skipped and keeps its momentum. Norms of sharded tensors are those of the whole. As in torch's
    fused optimizers, the step is skipped, without synchronization, if the attribute `found_inf` (a tensor) is not 0.
    """

    _step_supports_amp_scaling = True  # how torch marks optimizers that read `found_inf`

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        eta: float = 0.001,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; closures are not supported."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                device = params[0].device
                applied = torch.ones((), dtype=torch.bool, device=device) if found_inf is None else found_inf == 0
                self._update(params, group, applied)

    def _update(self, params: list[Tensor], group: dict[str, Any], applied: Tensor) -> None:
        """Update the parameters of one group if `applied`."""
        for parameter in params:
            if "mu" not in self.state[parameter]:
                self.state[parameter]["mu"] = torch.zeros_like(parameter)
        shards = fsdp.local(params)
        mus = fsdp.local([self.state[parameter]["mu"] for parameter in params])
        updates = _zeroed_unless(applied, fsdp.local([p.grad for p in params if p.grad is not None]))
        adapted = [i for i, p in enumerate(params) if p.ndim != 1]
        if adapted:
            weights, directions = ([tensors[i] for i in adapted] for tensors in (shards, updates))
            torch._foreach_add_(directions, weights, alpha=group["weight_decay"])
            w_norms, d_norms = fsdp.norms([*weights, *directions], like=params).chunk(2)
            ratios = torch.where((w_norms > 0) & (d_norms > 0), group["eta"] * w_norms / d_norms, 1.0)
            torch._foreach_mul_(directions, torch.where(applied, ratios, 0.0).unbind())
        one = torch.ones((), dtype=params[0].dtype, device=params[0].device)
        torch._foreach_mul_(mus, torch.where(applied, group["momentum"] * one, one))
        torch._foreach_add_(mus, updates)
        torch._foreach_sub_(shards, torch._foreach_mul(mus, torch.where(applied, group["lr"] * one, 0 * one)))


def _zeroed_unless(applied: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Return copies of the tensors if `applied`, else zeros; multiplying the bits also gives zeros for infinity and NaN."""
    bits = torch._foreach_mul([t.view(INTEGER_OF_SIZE[t.element_size()]) for t in tensors], applied.int())
    return [b.view(t.dtype) for b, t in zip(bits, tensors)]
