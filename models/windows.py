"""Windows over a token grid: padding, cutting, putting back, relative positions and the mask of shifted windows.

Shapes: B images, H x W token grid, C channels, N = window * window tokens of a window.
Origin: Swin Transformer (Liu et al., ICCV 2021) section 3.2.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def pad_to_windows(x_BHWC: Tensor, window: int) -> Tensor:
    """Zero-pad at the bottom and at the right so that both sides are multiples of `window`."""
    height, width = x_BHWC.shape[1:3]
    bottom, right = -height % window, -width % window
    return F.pad(x_BHWC, (0, 0, 0, right, 0, bottom)) if bottom or right else x_BHWC


def window_partition(x_BHWC: Tensor, window: int) -> Tensor:
    """Cut a grid whose sides are multiples of `window` into (B * windows, N, C), windows row by row."""
    batch, height, width, channels = x_BHWC.shape
    x = x_BHWC.view(batch, height // window, window, width // window, window, channels)
    return x.transpose(2, 3).reshape(-1, window * window, channels)


def window_reverse(windows: Tensor, window: int, grid: tuple[int, int]) -> Tensor:
    """Undo `window_partition`: (B * windows, N, C) back to (B, H, W, C) for the padded `grid`."""
    height, width = grid
    x = windows.view(-1, height // window, width // window, window, window, windows.shape[-1])
    return x.transpose(2, 3).reshape(-1, height, width, windows.shape[-1])


def relative_position_index(window: int) -> Tensor:
    """(N, N) row of the (2 window - 1)^2 table that holds the bias of each pair of positions."""
    axis = torch.arange(window)
    positions = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).flatten(1)
    offset = positions[:, :, None] - positions[:, None, :] + window - 1
    return offset[0] * (2 * window - 1) + offset[1]


@lru_cache(maxsize=128)
def shift_mask(grid: tuple[int, int], window: int, shift: int, device: torch.device) -> Tensor:
    """(windows, N, N) added to the logits of cyclically shifted windows: -100 between tokens from different borders.

    Built for the padded `grid`, once per size and device.
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
