"""Learned tables of positions, resized to another image or window size.

Origin: bicubic resizing as in DINO (Caron et al., ICCV 2021) and Swin Transformer (Liu et al., ICCV 2021).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

RULES = ("size", "scale")
SCALE_OFFSET = 0.1  # of a position, which keeps a rounded scale factor from losing one


def resize_grid(
    table_NC: Tensor, grid: tuple[int, int], wanted: tuple[int, int], rule: str = "size", always: bool = False
) -> Tensor:
    """A table (h * w, C) over a `grid` of h x w positions, made to cover the `wanted` grid; bicubic, in float32.

    Args:
        rule: `size` samples at the centers of the wanted grid; `scale` is DINO's and UDI's, which passes the scale factors
            (wanted + 0.1) / grid and samples a little nearer to the first position (weights trained so want it so).
        always: also where the grids agree, which `scale` does not leave as it is.
    """
    if grid == wanted and not always:
        return table_NC
    plane = table_NC.float().unflatten(0, grid).permute(2, 0, 1).unsqueeze(0)
    if rule == "scale":
        factors = tuple((new + SCALE_OFFSET) / old for new, old in zip(wanted, grid))
        resized = F.interpolate(plane, scale_factor=factors, mode="bicubic", align_corners=False)
    else:
        resized = F.interpolate(plane, size=wanted, mode="bicubic", align_corners=False)
    return resized.squeeze(0).flatten(1).T.to(table_NC.dtype)


def resize_square_table(table_NC: Tensor, wanted_rows: int) -> Tensor | None:
    """A table over a square of positions with `wanted_rows` rows; None unless both numbers of rows are squares."""
    side, wanted = math.isqrt(len(table_NC)), math.isqrt(wanted_rows)
    if table_NC.ndim != 2 or side**2 != len(table_NC) or wanted**2 != wanted_rows:
        return None
    return resize_grid(table_NC, (side, side), (wanted, wanted))


def resize_pos_embed(
    pos_embed_1NC: Tensor,
    prefix: int,
    grid: tuple[int, int],
    wanted: tuple[int, int],
    rule: str = "size",
    always: bool = False,
) -> Tensor:
    """Position embeddings (1, prefix + h * w, C): prefix tokens keep theirs, the grid's are resized; see `resize_grid`."""
    resized = resize_grid(pos_embed_1NC[0, prefix:], grid, wanted, rule, always)
    return torch.cat([pos_embed_1NC[:, :prefix], resized.unsqueeze(0)], dim=1)
