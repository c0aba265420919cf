"""A linear layer of an activation, which keeps the activation's input for the backward and not its output.

What the activation gave is computed again in the backward, to the same bits. In a block's MLP it is the largest tensor that is
kept, four times as wide as the tokens; computing it costs little beside the two products around it. A small one is kept.

Shapes: (..., C) channels of the hidden layer, (..., D) of the output; N rows of all leading axes together.
Origin: this project's own; the MLP is that of ViT (Dosovitskiy et al., ICLR 2021), as timm has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm.layers
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops.linear import linear, product, weight_gradient

# Of what an activation gave, on a CPU: keeping so much costs less than computing it, and rounding the weight behind it, once more.
KEPT_BYTES = 6 * 2**20

Activation = Callable[[Tensor], Tensor]


class Mlp(timm.layers.Mlp):
    """timm's MLP; keys and numbers are the same, where it is large it keeps half as much for the backward."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., channels) to the same shape."""
        if self.training and self.drop1.p > 0:  # dropout keeps the activation's output in any case
            return super().forward(x)
        return self.drop2(
            activated_linear(linear(x, self.fc1.weight, self.fc1.bias), self.act, self.fc2.weight, self.fc2.bias)
        )


def activated_linear(x: Tensor, activation: Activation, weight_DC: Tensor, bias_D: Tensor | None) -> Tensor:
    """`linear(activation(x))`, (..., C) to (..., D).

    Args:
        activation: a function of `x` alone, value by value, without parameters and randomness.

    While a graph is traced (torch.compile, torch.export) the two are left apart: a compiler decides itself what it keeps.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return linear(activation(x), weight_DC, bias_D)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if device == "cpu" and x.numel() * dtype.itemsize <= KEPT_BYTES:
        return linear(activation(x), weight_DC, bias_D)
    return _ActivatedLinear.apply(x, weight_DC, bias_D, activation, dtype)


class _ActivatedLinear(torch.autograd.Function):
    """Products are computed in `dtype`; they are those of `linear` and its backward, in the same order."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_DC: Tensor, bias_D: Tensor | None, activation: Activation, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(x, weight_DC)
        ctx.activation, ctx.dtype, ctx.bias_dtype = activation, dtype, None if bias_D is None else bias_D.dtype
        with torch.autocast(x.device.type, enabled=False):
            bias_D = None if bias_D is None else bias_D.to(dtype)
            return linear(activation(x).to(dtype), weight_DC.to(dtype), bias_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_DC = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        grad_x = grad_weight_DC = grad_bias_D = None
        with torch.autocast(x.device.type, enabled=False):
            with torch.enable_grad():
                x = x.detach().requires_grad_(of_x)
                hidden = ctx.activation(x).to(ctx.dtype)
            grad_ND = grad.reshape(-1, grad.shape[-1])
            if of_weight:
                hidden_NC = hidden.detach().reshape(-1, hidden.shape[-1])
                grad_weight_DC = weight_gradient(grad_ND, hidden_NC).to(weight_DC.dtype)
            if of_bias:
                grad_bias_D = grad_ND.sum(dim=0).to(ctx.bias_dtype)
            if of_x:
                grad_hidden = product(grad_ND, weight_DC.to(ctx.dtype)).view_as(hidden)
                (grad_x,) = torch.autograd.grad(hidden, x, grad_hidden)
        return grad_x, grad_weight_DC, grad_bias_D, None, None
