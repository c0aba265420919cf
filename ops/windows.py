"""Windows of a token grid, as in Swin Transformer (Liu et al., ICCV 2021, section 3.2): partition, relative positions, shift masks.

Neighborhoods of windows are those of Vision Longformer (Zhang et al., ICCV 2021).

Shapes: B images, H x W token grid, C channels, N = window * window tokens of a window.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.attention import pad_keys


def pad_to_windows(x_BHWC: Tensor, window: int, fill_C: Tensor | None = None) -> Tensor:
    """Pad at the bottom and right to multiples of `window`, with zeros or with the token `fill_C`."""
    height, width = x_BHWC.shape[1:3]
    bottom, right = -height % window, -width % window
    if not (bottom or right):
        return x_BHWC
    if fill_C is None:
        return F.pad(x_BHWC, (0, 0, 0, right, 0, bottom))
    fill_C, batch = fill_C.to(x_BHWC.dtype), x_BHWC.shape[0]
    x = torch.cat([x_BHWC, fill_C.expand(batch, bottom, width, -1)], dim=1) if bottom else x_BHWC
    return torch.cat([x, fill_C.expand(batch, height + bottom, right, -1)], dim=2) if right else x


def crop_to_grid(x_BHWC: Tensor, grid: tuple[int, int]) -> Tensor:
    """Undo `pad_to_windows`. The result is contiguous: linear layers copy others, and slices have a slower backward."""
    bottom, right = x_BHWC.shape[1] - grid[0], x_BHWC.shape[2] - grid[1]
    return F.pad(x_BHWC, (0, 0, 0, -right, 0, -bottom)) if bottom or right else x_BHWC


def window_partition(x_BHWC: Tensor, window: int) -> Tensor:
    """Split a grid whose sides are multiples of `window` into windows (B * windows, N, C), row by row."""
    batch, height, width, channels = x_BHWC.shape
    x = x_BHWC.view(batch, height // window, window, width // window, window, channels)
    return x.transpose(2, 3).reshape(-1, window * window, channels)


def window_reverse(windows: Tensor, window: int, grid: tuple[int, int]) -> Tensor:
    """Undo `window_partition`, (B * windows, N, C) to (B, H, W, C), for the padded `grid`."""
    height, width = grid
    x = windows.view(-1, height // window, width // window, window, window, windows.shape[-1])
    return x.transpose(2, 3).reshape(-1, height, width, windows.shape[-1])


class WindowPartition(NamedTuple):
    """Settings of a partition: the grid is padded to whole windows, rolled by `-shift` on both axes, and split row by row."""

    window: int
    shift: int = 0


def padded_grid(grid: tuple[int, int], window: int) -> tuple[int, int]:
    """Return the (height, width) of a grid after `pad_to_windows`."""
    return grid[0] + -grid[0] % window, grid[1] + -grid[1] % window


def partition_windows(x_BHWC: Tensor, partition: WindowPartition) -> Tensor:
    """Pad with zeros, shift and split a grid into windows (B * windows, N, C)."""
    return window_partition(_pad_and_shift(x_BHWC, partition), partition.window)


def join_windows(windows: Tensor, partition: WindowPartition, grid: tuple[int, int]) -> Tensor:
    """Undo `partition_windows`, (B * windows, N, C) to (B, H, W, C), and remove the padding."""
    x = window_reverse(windows, partition.window, padded_grid(grid, partition.window))
    return _shift_back_and_crop(x, partition, grid)


def partition_heads(
    x_BHWC: Tensor, partition: WindowPartition, parts: int, num_heads: int, fill_C: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Split a joint projection into the heads of windows: (B, H, W, parts * C) to `parts` tensors (B, windows, heads, N, D).

    One copy partitions, splits heads and makes them contiguous, as matrix products need them.

    Args:
        fill_C: token of the padding, by default zeros.
    """
    window = partition.window
    x = _pad_and_shift(x_BHWC, partition, fill_C)
    batch, height, width, channels = x.shape
    rows, columns, head_dim = height // window, width // window, channels // (parts * num_heads)
    x = x.view(batch, rows, window, columns, window, parts, num_heads, head_dim).permute(5, 0, 1, 3, 6, 2, 4, 7)
    return x.reshape(parts, batch, rows * columns, num_heads, window * window, head_dim).unbind()


def join_window_heads(heads: Tensor, partition: WindowPartition, grid: tuple[int, int]) -> Tensor:
    """Undo `partition_heads` for one part: (B, windows, heads, N, D) to (B, H, W, C) without padding."""
    window = partition.window
    height, width = padded_grid(grid, window)
    x = heads.unflatten(3, (window, window)).unflatten(1, (height // window, width // window))
    x = x.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, height, width, heads.shape[2] * heads.shape[4])
    return _shift_back_and_crop(x, partition, grid)


def _pad_and_shift(x_BHWC: Tensor, partition: WindowPartition, fill_C: Tensor | None = None) -> Tensor:
    x = pad_to_windows(x_BHWC, partition.window, fill_C)
    return torch.roll(x, (-partition.shift, -partition.shift), dims=(1, 2)) if partition.shift else x


def _shift_back_and_crop(x_BHWC: Tensor, partition: WindowPartition, grid: tuple[int, int]) -> Tensor:
    if partition.shift:
        x_BHWC = torch.roll(x_BHWC, (partition.shift, partition.shift), dims=(1, 2))
    return crop_to_grid(x_BHWC, grid)


def valid_tokens(partition: WindowPartition, grid: tuple[int, int]) -> Tensor:
    """Return which tokens of the windows are on the grid, not in its padding: (windows, N)."""
    return partition_windows(torch.ones(1, *grid, 1), partition).squeeze(-1) > 0


def window_attention_plane(
    maps: Tensor, partition: WindowPartition, grid: tuple[int, int], query_yx: tuple[int, int]
) -> Tensor:
    """Return the attention (B, heads, H, W) of one position of the grid, zero outside its window.

    Args:
        maps: attention maps (B * windows, heads, N, N).
    """
    query_1HW1 = torch.zeros(1, *grid, 1)
    query_1HW1[0, query_yx[0], query_yx[1]] = 1
    query = partition_windows(query_1HW1, partition).squeeze(-1)  # (windows, N)
    window, position = query.nonzero()[0].tolist()
    image_maps = maps.unflatten(0, (-1, len(query)))  # (B, windows, heads, N, N)
    plane = maps.new_zeros(len(image_maps), *query.shape, maps.shape[1])
    plane[:, window] = image_maps[:, window, :, position].transpose(1, 2)
    return join_windows(plane.flatten(0, 1), partition, grid).permute(0, 3, 1, 2)


def _positions(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Return row and column (2, N) of the positions of a grid, row by row."""
    axes = torch.arange(height, device=device), torch.arange(width, device=device)
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)


def _offset_index(queries_2Q: Tensor, keys_2N: Tensor) -> Tensor:
    """Return the indices (Q, N) of the offsets query - key, row by row from the smallest offset on each axis."""
    offset = queries_2Q[:, :, None] - keys_2N[:, None, :]
    row, column = offset - offset.amin(dim=(1, 2), keepdim=True)
    return row * (column.max() + 1) + column


def relative_position_index(window: int | tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Return for each pair of positions of a window the row (N, N) of its bias in a table of (2 height - 1)(2 width - 1) rows."""
    height, width = (window, window) if isinstance(window, int) else window
    positions = _positions(height, width, device)
    return _offset_index(positions, positions)


def neighbor_position_index(window: int) -> Tensor:
    """Return for each pair of a position and one of the 3 x 3 windows around it the row (N, 9 N) of a (4 window - 1)^2 table.

    Keys are ordered window by window, row by row.
    """
    side = 3 * window
    plane_1HW2 = _positions(side, side).T.view(1, side, side, 2)
    windows_9N2 = window_partition(plane_1HW2, window)
    return _offset_index(windows_9N2[4].T, windows_9N2.flatten(0, 1).T)


def shift_mask(grid: tuple[int, int], window: int, shift: int, device: torch.device) -> Tensor:
    """Return the mask (windows, N, N) of cyclically shifted windows: -100 between tokens that are not neighbors, else 0.

    The last axis is padded (`ops.attention.pad_keys`).

    Args:
        grid: padded (height, width).
    """
    # Only windows that the border of the shift divides have tokens of both sides: 0 before it, 1 after it on each axis.
    row_H, column_W = (torch.arange(side, device=device) // (side - shift) for side in grid)
    side_1HW1 = torch.add(column_W, row_H[:, None], alpha=2)[None, ..., None]
    side_of_token = window_partition(side_1HW1, window).squeeze(-1)
    differs = side_of_token[:, :, None] != pad_keys(side_of_token)[:, None, :]
    return differs * -100.0
