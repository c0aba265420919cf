"""Geometry of crop boxes, and the mapping of points from one crop to another.

Legend: S samples of a grid, W windows on a side of a grid. Everything is (row, column); normalized positions run from 0 at the
first pixel of the image to 1 at the last.

Origin: UDI (Su and Ji, ECCV 2024): crops that overlap a reference, and stratified samples at corresponding positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class CropBox(NamedTuple):
    """A crop in pixels of its image."""

    top: int
    left: int
    height: int
    width: int


class Projection(NamedTuple):
    """Positions of the samples of one crop on the token grid of another."""

    valid_S: Tensor  # bool, whether the sample is inside the other crop
    target_S2: Tensor  # fractional row and column in tokens, inside the grid where valid


# --------------------------------------------------------------------------- crop boxes


def intersection(a: CropBox, b: CropBox) -> CropBox | None:
    """Return the common area of two boxes, None if there is none."""
    top, left = max(a.top, b.top), max(a.left, b.left)
    height = min(a.top + a.height, b.top + b.height) - top
    width = min(a.left + a.width, b.left + b.width) - left
    return CropBox(top, left, height, width) if height > 0 and width > 0 else None


def union(a: CropBox, b: CropBox) -> CropBox:
    """Return the smallest box that contains both."""
    top, left = min(a.top, b.top), min(a.left, b.left)
    height = max(a.top + a.height, b.top + b.height) - top
    width = max(a.left + a.width, b.left + b.width) - left
    return CropBox(top, left, height, width)


def shift_to_overlap(crop: CropBox, reference: CropBox, image_size: tuple[int, int]) -> CropBox:
    """Shift a crop so that on each axis it shares half of the shorter side with `reference`, then into the image."""
    top = _shift(crop.top, crop.height, reference.top, reference.height, image_size[0])
    left = _shift(crop.left, crop.width, reference.left, reference.width, image_size[1])
    return CropBox(top, left, crop.height, crop.width)


def _shift(start: int, length: int, ref_start: int, ref_length: int, limit: int) -> int:
    """Shift one axis by the published rule: with less than half an overlap, half of the shorter side is added to the shift."""
    span = max(start + length, ref_start + ref_length) - min(start, ref_start)
    half = 0.5 * min(length, ref_length)
    shift = max(0.0, span - length - ref_length)
    if span >= length + ref_length - half:
        shift += half
    direction = (ref_start + ref_length / 2) - (start + length / 2)
    shifted = start + round(shift if direction > 0 else -shift if direction < 0 else 0.0)
    return min(max(shifted, 0), limit - length)


def inside(crop: CropBox, outer: CropBox) -> CropBox:
    """Return in image coordinates a crop that is given relative to `outer`."""
    return CropBox(outer.top + crop.top, outer.left + crop.left, crop.height, crop.width)


def normalized_corners(box: CropBox, image_size: tuple[int, int], flipped: bool) -> Tensor:
    """Return normalized (first row, first column, last row, last column); a horizontal flip swaps the columns."""
    rows, columns = (max(side - 1, 1) for side in image_size)
    first, last = box.left / columns, (box.left + box.width - 1) / columns
    if flipped:
        first, last = last, first
    return torch.tensor([box.top / rows, first, (box.top + box.height - 1) / rows, last], dtype=torch.float64)


# --------------------------------------------------------------------------- samples


def stratified_samples(grid: int, window: int, redraw: bool = True) -> Tensor:
    """Draw one token from each `window` x `window` window of a grid, with torch's generator.

    If the windows do not fill the grid, they occupy a random corner of it. Without `redraw` the first token of each window is
    taken, and the windows are at the top left.

    Returns:
        row-major token indices (S).
    """
    windows = grid // window
    slack = grid - windows * window
    first = torch.arange(windows) * window
    cells_2WW = torch.zeros(2, windows, windows, dtype=torch.long)
    corner_2 = torch.zeros(2, dtype=torch.long)
    if redraw:
        cells_2WW = torch.randint(window, (2, windows, windows))
        corner_2 = torch.randint(2, (2,)) * slack
    rows = first[:, None] + cells_2WW[0] + corner_2[0]
    columns = first[None, :] + cells_2WW[1] + corner_2[1]
    return (rows * grid + columns).flatten().sort().values


def token_positions(tokens_S: Tensor, grid: int, align: str) -> Tensor:
    """Return the positions (S, 2) of tokens in their crop, in 0..1."""
    cell_S2 = torch.stack([tokens_S // grid, tokens_S % grid], dim=1).double()
    return cell_S2 / max(grid - 1, 1) if align == "corners" else (cell_S2 + 0.5) / grid


def project(
    tokens_S: Tensor, source_4: Tensor, target_4: Tensor, source_grid: int, target_grid: int, align: str = "corners"
) -> Projection:
    """Map the samples of a crop to the grid of another one; both crops are given by their `normalized_corners`.

    A sample is valid if it is strictly inside the target crop on both axes.
    """
    position_S2 = source_4[:2] + token_positions(tokens_S, source_grid, align) * (source_4[2:] - source_4[:2])
    low, high = torch.minimum(target_4[:2], target_4[2:]), torch.maximum(target_4[:2], target_4[2:])
    valid_S = ((position_S2 > low) & (position_S2 < high)).all(dim=1)
    extent_2 = target_4[2:] - target_4[:2]
    extent_2 = torch.where(extent_2 == 0, 1.0, extent_2)  # a side of one pixel, with no sample strictly inside
    fraction_S2 = (position_S2 - target_4[:2]) / extent_2
    index_S2 = fraction_S2 * (target_grid - 1) if align == "corners" else fraction_S2 * target_grid - 0.5
    return Projection(valid_S, index_S2.clamp(0, target_grid - 1).float())


def stack_projections(projections: Sequence[Projection]) -> Projection:
    """Stack projections of equally many samples along a new first axis."""
    return Projection(*(torch.stack(fields) for fields in zip(*projections)))
