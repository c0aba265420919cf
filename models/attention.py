"""Softmax attention, once for all architectures: fused where its maps are not wanted, spelled out where they are.

On a CPU a spelled-out attention over few keys is the faster one, and what it keeps is small (`FEW_KEYS`).

Shapes: B images, or images and windows as two axes; H heads, Q queries, N keys, D channels of a head; P = B * H problems.
Origin: scaled dot-product attention (Vaswani et al., NeurIPS 2017).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

FEW_KEYS = 256
HALVES = {torch.float16, torch.bfloat16}


def attend(
    q_BHQD: Tensor,
    k_BHND: Tensor,
    v_BHND: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    attention: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attend, and return the maps (B, H, Q, N), in float32 or better, when `attention` is set; they are not kept otherwise.

    Args:
        bias: added to the logits, anything that broadcasts to (B, H, Q, N); (windows, H, Q, N) where windows are an axis.
        scale: of the logits, D ** -0.5 unless given.
        dropout: probability of dropping an entry of the maps; the caller passes 0 outside training.
    """
    if q_BHQD.ndim == 5:
        # (B, windows, H, ...): fused kernels take four axes. Windows join the heads, so that one bias serves all images.
        windows = q_BHQD.shape[1]
        q, k, v = (x.flatten(1, 2) for x in (q_BHQD, k_BHND, v_BHND))
        bias = None if bias is None else bias.flatten(0, 1)
        x, maps = attend(q, k, v, bias=bias, scale=scale, dropout=dropout, attention=attention)
        return x.unflatten(1, (windows, -1)), None if maps is None else maps.unflatten(1, (windows, -1))
    scale = q_BHQD.shape[-1] ** -0.5 if scale is None else scale
    if not attention and (q_BHQD.device.type != "cpu" or k_BHND.shape[-2] > FEW_KEYS):
        bias = None if bias is None else bias.to(q_BHQD.dtype)
        return F.scaled_dot_product_attention(q_BHQD, k_BHND, v_BHND, bias, dropout, scale=scale), None
    if not (attention or dropout or torch.compiler.is_exporting()):
        return _attend_to_few(q_BHQD, k_BHND, v_BHND, bias, scale), None
    # Products of three axes: with four, matmul expands and copies.
    q, k, v = ((x if x.ndim == 3 else x.flatten(0, 1)) for x in (q_BHQD, k_BHND, v_BHND))
    logits = _scaled_product(q, k.transpose(1, 2), scale)
    if logits.dtype in HALVES:
        logits = logits.float()
    shape = (*q_BHQD.shape[:-1], k_BHND.shape[-2])
    if bias is not None:
        logits = logits.view(shape).add_(bias).view_as(logits)
    maps = logits.softmax(dim=-1)
    kept = maps if dropout == 0 else F.dropout(maps, dropout)
    x = torch.bmm(kept.to(v.dtype), v).view(*q_BHQD.shape[:-1], v.shape[-1])
    return x, maps.view(shape) if attention else None


def _attend_to_few(q_BHQD: Tensor, k_BHND: Tensor, v_BHND: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    device = q_BHQD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else q_BHQD.dtype
    q, k, v = (x.to(dtype).flatten(0, 1) for x in (q_BHQD, k_BHND, v_BHND))
    shape = (*q_BHQD.shape[:-1], k_BHND.shape[-2])
    with torch.autocast(device, enabled=False):
        return _FewKeys.apply(q, k, v, bias, scale, shape).view(*q_BHQD.shape[:-1], v.shape[-1])


class _FewKeys(torch.autograd.Function):
    """Keeps the maps once, in the dtype of the products; autograd would keep them in float32 too, and round on every way.

    The softmax and the sums of its gradient are float32 in any case.
    """

    @staticmethod
    def forward(
        ctx: Any, q_PQD: Tensor, k_PND: Tensor, v_PND: Tensor, bias: Tensor | None, scale: float, shape: Sequence[int]
    ) -> Tensor:
        x_PQD, maps_PQN = _few_keys(q_PQD, k_PND, v_PND, bias, scale, shape)
        ctx.save_for_backward(q_PQD, k_PND, v_PND, maps_PQN)
        ctx.scale, ctx.shape = scale, shape
        ctx.bias_shape, ctx.bias_dtype = ([], None) if bias is None else (bias.shape, bias.dtype)
        return x_PQD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PQD: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias = _few_keys_backward(grad_PQD, *ctx.saved_tensors, ctx.scale, ctx.shape, ctx.bias_shape)
        return q, k, v, bias.to(ctx.bias_dtype) if ctx.needs_input_grad[3] else None, None, None


# torch.compile leaves these as they are: a softmax that it generates takes twice as long.
@torch.library.custom_op("esvit::few_keys", mutates_args=())
def _few_keys(
    q_PQD: Tensor, k_PND: Tensor, v_PND: Tensor, bias: Tensor | None, scale: float, shape: Sequence[int]
) -> tuple[Tensor, Tensor]:
    logits_PQN = _scaled_product(q_PQD, k_PND.transpose(1, 2), scale)
    if logits_PQN.dtype in HALVES:
        logits_PQN = logits_PQN.float()
    if bias is not None:
        logits_PQN.view(shape).add_(bias)
    maps_PQN = logits_PQN.softmax(dim=-1).to(v_PND.dtype)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_v_PND = torch.bmm(maps_PQN.transpose(1, 2), grad_PQD)
    grad_maps_PQN = torch.bmm(grad_PQD, v_PND.transpose(1, 2))
    grad_logits_PQN = torch._softmax_backward_data(grad_maps_PQN, maps_PQN, -1, maps_PQN.dtype)
    grad_q_PQD = _scaled_product(grad_logits_PQN, k_PND, scale)
    grad_k_PND = _scaled_product(grad_logits_PQN.transpose(1, 2), q_PQD, scale)
    grad_bias = grad_logits_PQN.view(shape).sum_to_size(bias_shape) if bias_shape else grad_logits_PQN.new_empty(())
    return grad_q_PQD, grad_k_PND, grad_v_PND, grad_bias


@_few_keys_backward.register_fake
def _few_keys_backward_without_values(
    grad_PQD: Tensor,
    q_PQD: Tensor,
    k_PND: Tensor,
    v_PND: Tensor,
    maps_PQN: Tensor,
    scale: float,
    shape: Sequence[int],
    bias_shape: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_PQD, k_PND, v_PND))
    return q, k, v, maps_PQN.new_empty(bias_shape)


def _scaled_product(a_PIJ: Tensor, b_PJK: Tensor, scale: float) -> Tensor:
    return torch.baddbmm(a_PIJ.new_zeros(1), a_PIJ, b_PJK, beta=0, alpha=scale)


def split_heads(x_BNC: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """Cut the channels (..., N, parts * C) of a joint projection into `parts` tensors (..., H, N, C / H)."""
    x = x_BNC.unflatten(-1, (parts, num_heads, -1))  # (..., N, parts, H, D)
    return x.movedim(-3, 0).transpose(-3, -2).unbind(0)


def join_heads(x_BHND: Tensor) -> Tensor:
    """(..., H, N, D) back to (..., N, H * D)."""
    return x_BHND.transpose(-3, -2).flatten(-2)


def pairwise_bias(table: Tensor, index: Tensor) -> Tensor:
    """Look a bias up for every pair: table (offsets, H) at index (Q, N) gives (H, Q, N)."""
    return table[index].permute(2, 0, 1)


def drop_rate(module: torch.nn.Module, rate: float) -> float:
    """`rate` while the module trains, else 0."""
    return rate if module.training else 0.0
