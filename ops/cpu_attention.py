"""Softmax attention over few keys on a CPU, spelled out: faster there than a fused kernel, and what it keeps is small.

Shapes: B images, H heads, Q queries, N keys, D channels of a head; P = B * H problems.
Origin: scaled dot-product attention (Vaswani et al., NeurIPS 2017).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

HALVES = {torch.float16, torch.bfloat16}


def attention_maps(q_PQD: Tensor, k_PND: Tensor, bias: Tensor | None, scale: float, shape: Sequence[int]) -> Tensor:
    """The maps (P, Q, N) in float32 or better.

    Args:
        bias: added to the scaled logits; anything that broadcasts to `shape`.
        shape: (B, H, Q, N).
    """
    logits = _scaled_product(q_PQD, k_PND.transpose(1, 2), scale)
    if logits.dtype in HALVES:
        logits = logits.float()
    if bias is not None:
        logits = logits.view(shape).add_(bias).view_as(logits)
    return logits.softmax(dim=-1)


def attend_to_few(q_BHQD: Tensor, k_BHND: Tensor, v_BHND: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """What attention gives, (B, H, Q, D of the values), under autocast in its dtype; the maps are kept for the backward alone."""
    device = q_BHQD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else q_BHQD.dtype
    # Products of three axes: with four, matmul expands and copies.
    q, k, v = (x.to(dtype).flatten(0, 1) for x in (q_BHQD, k_BHND, v_BHND))
    shape = (*q_BHQD.shape[:-1], k_BHND.shape[-2])
    with torch.autocast(device, enabled=False):
        return _FewKeys.apply(q, k, v, bias, scale, shape).view(*q_BHQD.shape[:-1], v.shape[-1])


class _FewKeys(torch.autograd.Function):
    """Keeps the maps once, in the dtype of the products; autograd would keep them in float32 too, and round on every way."""

    @staticmethod
    def forward(
        ctx: Any, q_PQD: Tensor, k_PND: Tensor, v_PND: Tensor, bias: Tensor | None, scale: float, shape: Sequence[int]
    ) -> Tensor:
        x_PQD, maps_PQN = _few_keys(q_PQD, k_PND, v_PND, bias, scale, shape)
        ctx.save_for_backward(q_PQD, k_PND, v_PND, maps_PQN)
        ctx.scale, ctx.shape = scale, shape
        ctx.bias = ([], maps_PQN.dtype) if bias is None else (list(bias.shape), bias.dtype)
        return x_PQD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PQD: Tensor) -> tuple[Tensor | None, ...]:
        *grads, grad_bias = _few_keys_backward(grad_PQD, *ctx.saved_tensors, ctx.scale, ctx.shape, *ctx.bias)
        return *grads, grad_bias if ctx.needs_input_grad[3] else None, None, None


# torch.compile leaves these as they are: a softmax that it generates takes twice as long.
@torch.library.custom_op("esvit::few_keys", mutates_args=())
def _few_keys(
    q_PQD: Tensor, k_PND: Tensor, v_PND: Tensor, bias: Tensor | None, scale: float, shape: Sequence[int]
) -> tuple[Tensor, Tensor]:
    maps_PQN = attention_maps(q_PQD, k_PND, bias, scale, shape).to(v_PND.dtype)
    return torch.bmm(maps_PQN, v_PND), maps_PQN


@_few_keys.register_fake
def _few_keys_without_values(
    q_PQD: Tensor, k_PND: Tensor, v_PND: Tensor, bias: Tensor | None, scale: float, shape: Sequence[int]
) -> tuple[Tensor, Tensor]:
    return v_PND.new_empty(*q_PQD.shape[:2], v_PND.shape[2]), v_PND.new_empty(*q_PQD.shape[:2], k_PND.shape[1])


@torch.library.custom_op("esvit::few_keys_backward", mutates_args=())
def _few_keys_backward(
    grad_PQD: Tensor,
    q_PQD: Tensor,
    k_PND: Tensor,
    v_PND: Tensor,
    maps_PQN: Tensor,
    scale: float,
    shape: Sequence[int],
    bias_shape: Sequence[int],
    bias_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_v_PND = torch.bmm(maps_PQN.transpose(1, 2), grad_PQD)
    grad_maps_PQN = torch.bmm(grad_PQD, v_PND.transpose(1, 2))
    grad_logits_PQN = torch._softmax_backward_data(grad_maps_PQN, maps_PQN, -1, maps_PQN.dtype)
    grad_q_PQD = _scaled_product(grad_logits_PQN, k_PND, scale)
    grad_k_PND = _scaled_product(grad_logits_PQN.transpose(1, 2), q_PQD, scale)
    empty = grad_logits_PQN.new_empty((), dtype=bias_dtype)
    grad_bias = _summed(grad_logits_PQN.view(shape), bias_shape, bias_dtype) if bias_shape else empty
    return grad_q_PQD, grad_k_PND, grad_v_PND, grad_bias


@_few_keys_backward.register_fake
def _few_keys_backward_without_values(grad_PQD: Tensor, *kept: Any) -> tuple[Tensor, ...]:
    *qkv, maps_PQN, _, _, bias_shape, bias_dtype = kept
    q, k, v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in qkv)
    return q, k, v, maps_PQN.new_empty(bias_shape, dtype=bias_dtype)


def _summed(grad: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The sum over the axes along which a tensor of that shape was repeated, in `dtype`, which may be wider."""
    ones = [1] * (grad.ndim - len(shape)) + list(shape)
    repeated = [axis for axis, size in enumerate(ones) if size == 1]
    summed = grad.sum(dim=repeated, dtype=dtype) if repeated else grad.to(dtype, copy=True)
    return summed.view(list(shape))


def _scaled_product(a_PIJ: Tensor, b_PJK: Tensor, scale: float) -> Tensor:
    return torch.baddbmm(a_PIJ.new_zeros(1), a_PIJ, b_PJK, beta=0, alpha=scale)
