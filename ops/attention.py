"""Softmax attention, once for all architectures: fused where its maps are not wanted, spelled out where they are.

Shapes: B images, or images and windows as two axes; H heads, Q queries, N keys, D channels of a head.
Origin: scaled dot-product attention (Vaswani et al., NeurIPS 2017).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.cpu_attention import attend_to_few, attention_maps

# On a CPU attention over so many keys is spelled out.
FEW_KEYS = 256


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
        return attend_to_few(q_BHQD, k_BHND, v_BHND, bias, scale), None
    shape = (*q_BHQD.shape[:-1], k_BHND.shape[-2])
    q, k, v = (x.flatten(0, 1) for x in (q_BHQD, k_BHND, v_BHND))
    maps = attention_maps(q, k, bias, scale, shape)
    kept = maps if dropout == 0 else F.dropout(maps, dropout)
    x = torch.bmm(kept.to(v.dtype), v).view(*q_BHQD.shape[:-1], v.shape[-1])
    return x, maps.view(shape) if attention else None


def split_heads(x_BNC: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """Split the channels (..., N, parts * C) of a joint projection into `parts` tensors (..., H, N, C / H)."""
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
