"""Scaled dot-product attention (Vaswani et al., NeurIPS 2017) with optional attention maps.

Shapes: B images, H heads, Q queries, N keys, C channels, D channels of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of a bias start at multiples of so many elements, and are contiguous: CUDA's memory-efficient attention needs it. Torch
# copies a bias with other rows in each call, and for rows that are not contiguous computes explicit attention.
BIAS_ALIGNMENT = 8


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
    """Attend with a fused kernel, or explicitly where the attention maps are requested.

    Queries, keys and values may have windows as a second axis: (B, windows, H, ...).

    Args:
        bias: added to the logits; broadcasts to (B, H, Q, N), or with windows is (windows or 1, H, Q, N). There may be more than
            N keys (`pad_keys`), of which the first N count.
        scale: factor of the logits, by default D ** -0.5.
        dropout: probability of dropping an attention weight; pass 0 in evaluation mode.
        attention: return the maps (B, H, Q, N), in float32 or wider.
    """
    if q_BHQD.ndim == 5:  # fused kernels take four axes
        windows = q_BHQD.shape[1]
        bias_per_window = bias is not None and len(bias) > 1
        first = 1 if bias_per_window else 0  # such windows become heads, so that the bias broadcasts over images
        q, k, v = (x.flatten(first, first + 1) for x in (q_BHQD, k_BHND, v_BHND))
        bias = bias.flatten(0, 1) if bias is not None and bias_per_window else bias
        x, maps = attend(q, k, v, bias=bias, scale=scale, dropout=dropout, attention=attention)
        axes = (windows, -1) if bias_per_window else (-1, windows)
        return x.unflatten(first, axes), None if maps is None else maps.unflatten(first, axes)
    if bias is not None:
        bias = (bias if attention else bias.to(q_BHQD.dtype))[..., : k_BHND.shape[-2]]
    if not attention:
        return F.scaled_dot_product_attention(q_BHQD, k_BHND, v_BHND, bias, dropout, scale=scale), None
    scale = q_BHQD.shape[-1] ** -0.5 if scale is None else scale
    logits = q_BHQD * scale @ k_BHND.transpose(-2, -1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    maps = (logits if bias is None else logits + bias).softmax(dim=-1)
    return F.dropout(maps, dropout).to(v_BHND.dtype) @ v_BHND, maps


def split_heads(x_BNC: Tensor, parts: int, num_heads: int) -> tuple[Tensor, ...]:
    """Split the channels (..., N, parts * C) of a joint projection into `parts` tensors (..., H, N, C / H)."""
    x = x_BNC.unflatten(-1, (parts, num_heads, -1))  # (..., N, parts, H, D)
    return x.movedim(-3, 0).transpose(-3, -2).unbind(0)


def join_heads(x_BHND: Tensor) -> Tensor:
    """Concatenate heads, (..., H, N, D) to (..., N, H * D)."""
    return x_BHND.transpose(-3, -2).flatten(-2)


def pad_keys(x: Tensor) -> Tensor:
    """Pad the last axis, the keys of a bias or of what it is made from, with zeros to a multiple of `BIAS_ALIGNMENT`."""
    return F.pad(x, (0, -x.shape[-1] % BIAS_ALIGNMENT))


def pairwise_bias(table: Tensor, index: Tensor) -> Tensor:
    """Look up the bias of every pair of positions: table (offsets, H) at index (Q, N) gives (H, Q, N), contiguous."""
    return table.T.index_select(1, index.flatten()).unflatten(1, index.shape)


def drop_rate(module: torch.nn.Module, rate: float) -> float:
    """Return `rate` in training mode, else 0."""
    return rate if module.training else 0.0
