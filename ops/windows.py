"""Windows over a token grid: padding, cutting, putting back, relative positions and masks.

Shapes: B images, H x W token grid, C channels, N = window * window tokens of a window.
Origin: Swin Transformer (Liu et al., ICCV 2021) section 3.2; neighborhoods as in Vision Longformer (Zhang et al., ICCV 2021).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

P = ParamSpec("P")
Made = TypeVar("Made")

_kept: list[Any] = []  # the caches of `cached_tensors`


def cached_tensors(make: Callable[P, Made]) -> Callable[P, Made]:
    """Keep the tensors that a function makes of sizes and a device for its next call with the same ones.

    A graph that torch.compile traces takes them as inputs that never change; traced itself, the making would be generated into the
    kernels that read them. One that torch.export traces makes them. Named tuples arrive as plain ones.
    """

    @lru_cache(maxsize=128)
    def kept(*args: Any, **kwargs: Any) -> tuple[Made]:
        with torch.inference_mode(False):  # what an evaluation wants first may be trained with later
            return (make(*args, **kwargs),)

    @torch.compiler.assume_constant_result  # knows no named tuples, and all tensors that a function returns bare by one name
    def constant(*args: Any, **kwargs: Any) -> tuple[Made]:
        return kept(*args, **kwargs)

    @wraps(make)
    def get(*args: P.args, **kwargs: P.kwargs) -> Made:
        if torch.compiler.is_exporting():
            return make(*args, **kwargs)
        return constant(*(tuple(arg) if isinstance(arg, tuple) else arg for arg in args), **kwargs)[0]

    _kept.append(kept)
    return get


def clear_cached_tensors() -> None:
    """Forget what `cached_tensors` keeps, as is needed after a simulation, whose tensors hold no values."""
    for cache in _kept:
        cache.cache_clear()


def pad_to_windows(x_BHWC: Tensor, window: int) -> Tensor:
    """Zero-pad at the bottom and at the right so that both sides are multiples of `window`."""
    height, width = x_BHWC.shape[1:3]
    bottom, right = -height % window, -width % window
    return F.pad(x_BHWC, (0, 0, 0, right, 0, bottom)) if bottom or right else x_BHWC


def window_partition(x_BHWC: Tensor, window: int) -> Tensor:
    """Split a grid whose sides are multiples of `window` into (B * windows, N, C), windows row by row."""
    batch, height, width, channels = x_BHWC.shape
    x = x_BHWC.view(batch, height // window, window, width // window, window, channels)
    return x.transpose(2, 3).reshape(-1, window * window, channels)


def window_reverse(windows: Tensor, window: int, grid: tuple[int, int]) -> Tensor:
    """Undo `window_partition`: (B * windows, N, C) back to (B, H, W, C) for the padded `grid`."""
    height, width = grid
    x = windows.view(-1, height // window, width // window, window, window, windows.shape[-1])
    return x.transpose(2, 3).reshape(-1, height, width, windows.shape[-1])


class WindowPartition(NamedTuple):
    """How a grid becomes windows: padded to whole ones, moved up and to the left in a circle, cut row by row."""

    window: int
    shift: int = 0


def padded_grid(grid: tuple[int, int], window: int) -> tuple[int, int]:
    """The sides that `pad_to_windows` gives."""
    return grid[0] + -grid[0] % window, grid[1] + -grid[1] % window


def partition_windows(x_BHWC: Tensor, cut: WindowPartition) -> Tensor:
    """Any grid to windows (B * windows, N, C)."""
    x = pad_to_windows(x_BHWC, cut.window)
    if cut.shift:
        x = torch.roll(x, (-cut.shift, -cut.shift), dims=(1, 2))
    return window_partition(x, cut.window)


def join_windows(windows: Tensor, cut: WindowPartition, grid: tuple[int, int]) -> Tensor:
    """Undo `partition_windows`: (B * windows, N, C) back to (B, H, W, C), the padding cut off."""
    x = window_reverse(windows, cut.window, padded_grid(grid, cut.window))
    if cut.shift:
        x = torch.roll(x, (cut.shift, cut.shift), dims=(1, 2))
    return x[:, : grid[0], : grid[1]]


def real_tokens(cut: WindowPartition, grid: tuple[int, int]) -> Tensor:
    """(windows, N) whether a position of a window lies on the grid, and not in its padding."""
    return partition_windows(torch.ones(1, *grid, 1), cut).squeeze(-1) > 0


def window_plane(maps: Tensor, cut: WindowPartition, grid: tuple[int, int], query_yx: tuple[int, int]) -> Tensor:
    """Attention (B, heads, H, W) of one position of the grid, of maps (B * windows, heads, N, N): zero outside its window."""
    asked_1HW1 = torch.zeros(1, *grid, 1)
    asked_1HW1[0, query_yx[0], query_yx[1]] = 1
    asked = partition_windows(asked_1HW1, cut).squeeze(-1)  # (windows, N)
    window, position = asked.nonzero()[0].tolist()
    of_image = maps.unflatten(0, (-1, len(asked)))  # (B, windows, heads, N, N)
    spread = maps.new_zeros(of_image.shape[0], *asked.shape, maps.shape[1])
    spread[:, window] = of_image[:, window, :, position].transpose(1, 2)
    return join_windows(spread.flatten(0, 1), cut, grid).permute(0, 3, 1, 2)


def _positions(height: int, width: int) -> Tensor:
    """(2, N) row and column of the positions of a grid, row by row."""
    return torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")).flatten(1)


def _index_of_offsets(queries_2Q: Tensor, keys_2N: Tensor) -> Tensor:
    """(Q, N) numbers of the offsets query - key, counted row by row from the smallest offset that occurs on each axis."""
    offset = queries_2Q[:, :, None] - keys_2N[:, None, :]
    row, column = offset - offset.amin(dim=(1, 2), keepdim=True)
    return row * (column.max() + 1) + column


def relative_position_index(window: int | tuple[int, int]) -> Tensor:
    """(N, N) row of the table that holds the bias of each pair of positions of a window.

    The table has (2 height - 1)(2 width - 1) rows; one number stands for a square window.
    """
    height, width = (window, window) if isinstance(window, int) else window
    positions = _positions(height, width)
    return _index_of_offsets(positions, positions)


def neighbor_position_index(window: int) -> Tensor:
    """(N, 9 N) row of the (4 window - 1)^2 table for each position of a window and those of its 3 x 3 neighborhood.

    Keys stand window by window, in three rows of three; the fifth window is the queries' own.
    """
    side = 3 * window
    plane_1HW2 = _positions(side, side).T.view(1, side, side, 2)
    windows_9N2 = window_partition(plane_1HW2, window)
    return _index_of_offsets(windows_9N2[4].T, windows_9N2.flatten(0, 1).T)


@cached_tensors
def shift_mask(grid: tuple[int, int], window: int, shift: int, device: torch.device) -> Tensor:
    """(windows, N, N) added to the logits of cyclically shifted windows: -100 between tokens from different borders.

    Built for the padded `grid`.
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
