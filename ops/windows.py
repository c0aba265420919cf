"""Windows of a token grid, as in Swin Transformer (Liu et al., ICCV 2021, section 3.2): partition, relative positions, shift masks.

Neighborhoods of windows are those of Vision Longformer (Zhang et al., ICCV 2021).

Shapes: B images, H x W token grid, C channels, N = window * window tokens of a window.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def pad_to_windows(x_BHWC: Tensor, window: int, fill_C: Tensor | None = None) -> Tensor:
    """Pad at the bottom and right to multiples of `window`, with zeros or with the token `fill_C`."""
    height, width = x_BHWC.shape[1:3]
    bottom, right = -height % window, -width % window
    if not (bottom or right):
        return x_BHWC
    x = F.pad(x_BHWC, (0, 0, 0, right, 0, bottom))
    if fill_C is not None:
        x[:, height:] = fill_C
        x[:, :, width:] = fill_C
    return x


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


def partition_windows(x_BHWC: Tensor, partition: WindowPartition, fill_C: Tensor | None = None) -> Tensor:
    """Pad (see `pad_to_windows`), shift and split a grid into windows (B * windows, N, C)."""
    x = pad_to_windows(x_BHWC, partition.window, fill_C)
    if partition.shift:
        x = torch.roll(x, (-partition.shift, -partition.shift), dims=(1, 2))
    return window_partition(x, partition.window)


def join_windows(windows: Tensor, partition: WindowPartition, grid: tuple[int, int]) -> Tensor:
    """Undo `partition_windows`, (B * windows, N, C) to (B, H, W, C), and remove the padding."""
    x = window_reverse(windows, partition.window, padded_grid(grid, partition.window))
    if partition.shift:
        x = torch.roll(x, (partition.shift, partition.shift), dims=(1, 2))
    return x[:, : grid[0], : grid[1]]


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

    Args:
        grid: padded (height, width).
    """
    height, width = grid
    regions = torch.zeros(1, height, width, 1, device=device)
    bands = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    for i, rows in enumerate(bands):
        for j, columns in enumerate(bands):
            regions[:, rows, columns] = 3 * i + j
    region_of_token = window_partition(regions, window).squeeze(-1)
    differs = region_of_token[:, :, None] != region_of_token[:, None, :]
    return torch.zeros(differs.shape, device=device).masked_fill(differs, -100.0)
