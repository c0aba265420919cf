"""timm's MLP (of ViT, Dosovitskiy et al., ICLR 2021) that recomputes the output of its activation in the backward.

The hidden layer is the largest tensor of a transformer block. A training step without this file peaks 16 % higher for Swin-T
and 13 % higher for DeiT-S (bf16, batch 8, simulated as in benchmarks/memory.py), and takes the same CPU time (0.96 to 1.07
times).

Shapes: C channels of the hidden layer, D of the output, N rows of all leading axes together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Activation = Callable[[Tensor], Tensor]


class Mlp(timm.layers.Mlp):
    """timm's MLP, with the same keys and outputs, that stores half as much for the backward."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.drop1.p > 0:  # dropout stores the output of the activation anyway
            return super().forward(x)
        return self.drop2(activated_linear(self.fc1(x), self.act, self.fc2.weight, self.fc2.bias))


def activated_linear(x: Tensor, activation: Activation, weight_DC: Tensor, bias_D: Tensor | None) -> Tensor:
    """Return `F.linear(activation(x), weight_DC, bias_D)`, (..., C) to (..., D), storing `x` only for the backward.

    Traced graphs (torch.compile, torch.export, torch.jit.trace) get the plain form: compilers choose what to recompute.

    Args:
        activation: an elementwise, deterministic function without parameters.
    """
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    if tracing or not torch.is_grad_enabled():
        return F.linear(activation(x), weight_DC, bias_D)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return _ActivatedLinear.apply(x, weight_DC, bias_D, activation, dtype)


class _ActivatedLinear(torch.autograd.Function):
    """The same operations as autograd's, in the same order, with products in `dtype`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_DC: Tensor, bias_D: Tensor | None, activation: Activation, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(x, weight_DC)
        ctx.activation, ctx.dtype, ctx.bias_dtype = activation, dtype, None if bias_D is None else bias_D.dtype
        with torch.autocast(x.device.type, enabled=False):
            bias_D = None if bias_D is None else bias_D.to(dtype)
            return F.linear(activation(x).to(dtype), weight_DC.to(dtype), bias_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_DC = ctx.saved_tensors
        x_needs_grad, weight_needs_grad, bias_needs_grad = ctx.needs_input_grad[:3]
        grad_x = grad_weight_DC = grad_bias_D = None
        with torch.autocast(x.device.type, enabled=False):
            with torch.enable_grad():
                x = x.detach().requires_grad_(x_needs_grad)
                hidden = ctx.activation(x).to(ctx.dtype)
            grad_ND = grad.reshape(-1, grad.shape[-1])
            if weight_needs_grad:
                hidden_NC = hidden.detach().reshape(-1, hidden.shape[-1])
                grad_weight_DC = (grad_ND.T @ hidden_NC).to(weight_DC.dtype)
            if bias_needs_grad:
                grad_bias_D = grad_ND.sum(dim=0).to(ctx.bias_dtype)
            if x_needs_grad:
                grad_hidden = (grad_ND @ weight_DC.to(ctx.dtype)).view_as(hidden)
                (grad_x,) = torch.autograd.grad(hidden, x, grad_hidden)
        return grad_x, grad_weight_DC, grad_bias_D, None, None
