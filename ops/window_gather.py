"""From a joint projection on a token grid straight to the heads of windows, and back: one copy each way.

Padding, shifting, cutting and splitting heads only move rows of D numbers, so all of it is one lookup by an index that is made once
for a size. Tokens of the padding are not computed: a projection of zeros is its bias, which is put in their places.

Shapes: B images, H x W token grid, C channels = heads * D, N = window * window tokens, L = windows * heads * N rows of one of the
three parts q, k, v; R rows of a grid, D channels of each.
Origin: this project's own; what it computes is the partition of Swin Transformer (Liu et al., ICCV 2021) section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops.windows import WindowPartition, cached_tensors, partition_windows

PARTS = 3  # queries, keys and values


class Routes(NamedTuple):
    """Which row goes where; a row number one past the grid's last stands for padding."""

    to_windows: tuple[Tensor, ...]  # for q, k and v: (L,) rows of the grid, whose tokens hold 3 * heads rows each
    from_windows: Tensor  # (H W 3 heads,) rows of q, k and v one after the other: the way back of `to_windows`
    padding: Tensor  # (3 heads, P) rows of q, k and v one after the other that hold a bias; P may be 0
    to_grid: Tensor  # (H W heads,) rows of the windows, for what comes out of the attention
    from_grid: Tensor  # (L,) rows of the grid: the way back of `to_grid`


@cached_tensors
def routes(grid: tuple[int, int], cut: WindowPartition, num_heads: int, device: torch.device) -> Routes:
    """The routes of one size."""
    tokens = grid[0] * grid[1]
    numbers_HW = torch.arange(1, tokens + 1, device=device).view(1, *grid, 1)
    token_WN = partition_windows(numbers_HW, WindowPartition(*cut)).squeeze(-1) - 1  # -1 in the padding
    head_H = torch.arange(num_heads, device=device)
    from_grid = torch.where(token_WN < 0, tokens * num_heads, token_WN * num_heads)[:, None] + head_H[:, None]
    from_grid = from_grid.clamp(max=tokens * num_heads).flatten()
    part_P = torch.arange(PARTS, device=device).view(-1, 1, 1, 1)
    kind = part_P * num_heads + head_H[:, None]  # (3, 1, heads, 1)
    first_row = torch.where(token_WN < 0, tokens, token_WN)[:, None] * (PARTS * num_heads)
    to_windows = (first_row + kind).flatten(1)  # (3, L); the padding's rows follow those of the grid
    places = torch.arange(to_windows.numel(), device=device)
    order = to_windows.flatten().argsort(stable=True)
    real = tokens * PARTS * num_heads
    padding = places[order[real:]].view(PARTS * num_heads, -1)
    return Routes(
        to_windows.unbind(), places[order[:real]], padding, from_grid.argsort()[: tokens * num_heads], from_grid
    )


def select_rows(rows_BRD: Tensor, index: Tensor, fill_FD: Tensor | None) -> Tensor:
    """Rows by number; those past the last are of `fill_FD`."""
    if fill_FD is not None:
        rows_BRD = torch.cat([rows_BRD, fill_FD.expand(rows_BRD.shape[0], -1, -1)], dim=1)
    return rows_BRD.index_select(1, index)


class _ToWindows(torch.autograd.Function):
    """The gradient of a lookup in which every row is used once is the lookup the other way; autograd would add into zeros."""

    @staticmethod
    def forward(
        ctx: Any, qkv_BHWC: Tensor, fill_FD: Tensor | None, route: Routes, shape: Sequence[int]
    ) -> tuple[Tensor, ...]:
        ctx.route, ctx.padded, ctx.shape = route, fill_FD is not None, qkv_BHWC.shape
        rows_BRD = qkv_BHWC.reshape(qkv_BHWC.shape[0], -1, shape[-1])
        return tuple(select_rows(rows_BRD, index, fill_FD).view(shape) for index in route.to_windows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        batch, depth = ctx.shape[0], grads[0].shape[-1]
        rows = torch.cat([grad.reshape(batch, -1, depth) for grad in grads], dim=1)
        fill = None
        if ctx.padded:
            padding = ctx.route.padding
            fill = rows.index_select(1, padding.flatten()).unflatten(1, padding.shape).sum(dim=(0, 2))
        return rows.index_select(1, ctx.route.from_windows).view(ctx.shape), fill, None, None


class _ToGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, route: Routes, shape: Sequence[int]) -> Tensor:
        ctx.route, ctx.shape = route, x.shape
        return x.reshape(shape[0], -1, x.shape[-1]).index_select(1, route.to_grid).view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHWC: Tensor) -> tuple[Tensor, None, None]:
        depth = ctx.shape[-1]
        rows_BRD = grad_BHWC.reshape(grad_BHWC.shape[0], -1, depth)
        if ctx.route.padding.numel():
            rows_BRD = F.pad(rows_BRD, (0, 0, 0, 1))  # the padding's gradient is zero
        return rows_BRD.index_select(1, ctx.route.from_grid).view(ctx.shape), None, None


def to_windows(
    qkv_BHWC: Tensor, bias: Tensor | None, cut: WindowPartition, num_heads: int, bias_groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a joint projection (B, H, W, 3 C) with that bias (None: zero).

    Each is (B * windows * heads / bias_groups, bias_groups, N, D), images before windows before heads: so that one bias of
    `bias_groups` maps, one for each head or one for each head of each window, serves them all.
    """
    channels = qkv_BHWC.shape[3]
    route = routes((qkv_BHWC.shape[1], qkv_BHWC.shape[2]), cut, num_heads, qkv_BHWC.device)
    depth = channels // (PARTS * num_heads)
    fill_FD = None
    if route.padding.numel():
        fill_FD = (qkv_BHWC.new_zeros(channels) if bias is None else bias.to(qkv_BHWC.dtype)).view(-1, depth)
    q, k, v = _ToWindows.apply(qkv_BHWC, fill_FD, route, (-1, bias_groups, cut.window**2, depth))
    return q, k, v


def to_grid(x: Tensor, cut: WindowPartition, shape: Sequence[int], num_heads: int) -> Tensor:
    """What windows computed, in the shape that `to_windows` gives, on the grid again: `shape` is (B, H, W, C)."""
    return _ToGrid.apply(x, routes((shape[1], shape[2]), cut, num_heads, x.device), shape)
