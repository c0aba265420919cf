"""Matrix products and linear layers, which in float32 on a CPU are computed by oneDNN.

torch hands float32 products on a CPU to MKL, which on AMD processors with AVX-512 takes twice as long as oneDNN, the library that
computes those in bfloat16 anyway. The arithmetic is float32 in both; sums are taken in another order. Everywhere else, and for
products too small to pay, it is torch's own product.

Shapes: (..., C) inputs of a layer, (..., D) its outputs; N rows of all leading axes together.
Origin: this project's own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ENOUGH = 2**20  # multiplications of a product that is worth the detour


class Linear(nn.Linear):
    """torch's linear layer by `linear`; parameters, names and initial values are the same."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., D)."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight_DC: Tensor, bias_D: Tensor | None) -> Tensor:
    """(..., C) to (..., D), as `F.linear` has it, under autocast too."""
    # In this order: the meta device knows no autocast, and torch stops where it is asked for it.
    if not _by_onednn(x.numel(), x, weight_DC) or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight_DC, bias_D)
    return _OneDnnLinear.apply(x, weight_DC, bias_D)


def product(a_NC: Tensor, b_CD: Tensor) -> Tensor:
    """The product of two matrices, without gradient."""
    return _onednn(a_NC, b_CD.t()) if _by_onednn(a_NC.numel(), a_NC, b_CD.t()) else a_NC @ b_CD


def weight_gradient(grad_ND: Tensor, x_NC: Tensor) -> Tensor:
    """The gradient (D, C) of a layer's weight."""
    if not _by_onednn(x_NC.numel(), x_NC, grad_ND.t()):
        return grad_ND.t() @ x_NC
    grad_ND = grad_ND.contiguous()  # oneDNN has no fast way for some columns of a wider matrix
    if grad_ND.shape[1] < x_NC.shape[1]:
        return _onednn(grad_ND.t(), x_NC.t())
    return _onednn(x_NC.t(), grad_ND.t()).t().contiguous()  # twice as fast where the layer widens


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_DC: Tensor, bias_D: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_DC)
        return _onednn(x, weight_DC, bias_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_DC = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        grad_ND = grad.reshape(-1, grad.shape[-1])
        return (
            product(grad_ND, weight_DC).view_as(x) if of_x else None,
            weight_gradient(grad_ND, x.reshape(-1, x.shape[-1])) if of_weight else None,
            grad_ND.sum(dim=0) if of_bias else None,
        )


@torch.library.custom_op("esvit::onednn_linear", mutates_args=())  # torch.compile leaves it as it is
def _onednn(x: Tensor, weight_DC: Tensor, bias_D: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight_DC, bias_D, "none", [], "")


@_onednn.register_fake
def _onednn_without_values(x: Tensor, weight_DC: Tensor, bias_D: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight_DC.shape[0])


def _by_onednn(numbers: int, x: Tensor, weight_DC: Tensor) -> bool:
    """Whether oneDNN should multiply `numbers` of inputs with this weight."""
    # First: other programs know F.linear, and a graph for any batch must not be asked how large that is.
    return not torch.compiler.is_exporting() and (
        x.device.type == "cpu"
        and x.dtype == weight_DC.dtype == torch.float32
        and numbers * weight_DC.shape[0] >= ENOUGH
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and bool(torch.backends.mkldnn.enabled)
    )
