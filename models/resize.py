"""Bicubic resizing of learned position tables to another image or window size, as in DINO (Caron et al., ICCV 2021) and Swin
Transformer (Liu et al., ICCV 2021).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

RULES = ("size", "scale")
SCALE_OFFSET = 0.1  # positions; keeps a rounded scale factor from losing one


def resize_grid(
    table_NC: Tensor, grid: tuple[int, int], target: tuple[int, int], rule: str = "size", always: bool = False
) -> Tensor:
    """Resize a table (h * w, C) over a `grid` of h x w positions to the `target` grid, in float32.

    Args:
        rule: `size` samples at the centers of the target grid. `scale` is the rule of DINO and UDI, which passes the scale factors
            (target + 0.1) / grid and so samples slightly closer to the first position.
        always: interpolate even if the grids are equal, which changes the table under `scale`.
    """
    if grid == target and not always:
        return table_NC
    plane = table_NC.float().unflatten(0, grid).permute(2, 0, 1).unsqueeze(0)
    if rule == "scale":
        factors = tuple((new + SCALE_OFFSET) / old for new, old in zip(target, grid))
        resized = F.interpolate(plane, scale_factor=factors, mode="bicubic", align_corners=False)
    else:
        resized = F.interpolate(plane, size=target, mode="bicubic", align_corners=False)
    return resized.squeeze(0).flatten(1).T.to(table_NC.dtype)


def resize_square_table(table_NC: Tensor, rows: int) -> Tensor | None:
    """Resize a table over a square of positions to another square with `rows` positions; None if either is not a square."""
    side, target = math.isqrt(len(table_NC)), math.isqrt(rows)
    if table_NC.ndim != 2 or side**2 != len(table_NC) or target**2 != rows:
        return None
    return resize_grid(table_NC, (side, side), (target, target))


def resize_pos_embed(
    pos_embed_1NC: Tensor,
    prefix: int,
    grid: tuple[int, int],
    target: tuple[int, int],
    rule: str = "size",
    always: bool = False,
) -> Tensor:
    """Resize the grid part of position embeddings (1, prefix + h * w, C) as in `resize_grid`; prefix tokens keep theirs."""
    resized = resize_grid(pos_embed_1NC[0, prefix:], grid, target, rule, always)
    return torch.cat([pos_embed_1NC[:, :prefix], resized.unsqueeze(0)], dim=1)
