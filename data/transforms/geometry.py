"""Where crops lie in their image, and where a point of one crop lies in another: pure functions, no pixels.

Legend: S samples of a grid, F rows of a grid that has as many columns. Everything is (row, column); normalized positions run from
0 at the first pixel of the image to 1 at the last.
Origin: UDI (Su and Ji, ECCV 2024), crops that overlap a reference and stratified samples at corresponding positions; a crop's size
is drawn by torchvision's RandomResizedCrop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Rect(NamedTuple):
    """A crop in pixels of its image."""

    top: int
    left: int
    height: int
    width: int


class Projection(NamedTuple):
    """Samples of one crop on the token grid of another; what is not valid lies outside of that crop."""

    valid_S: Tensor  # bool
    target_S2: Tensor  # row and column in tokens, fractional, inside the grid where valid


# --------------------------------------------------------------------------- rectangles


def intersection(a: Rect, b: Rect) -> Rect | None:
    """What both cover; None where they are apart."""
    top, left = max(a.top, b.top), max(a.left, b.left)
    height = min(a.top + a.height, b.top + b.height) - top
    width = min(a.left + a.width, b.left + b.width) - left
    return Rect(top, left, height, width) if height > 0 and width > 0 else None


def union(a: Rect, b: Rect) -> Rect:
    """The smallest rectangle around both."""
    top, left = min(a.top, b.top), min(a.left, b.left)
    height = max(a.top + a.height, b.top + b.height) - top
    width = max(a.left + a.width, b.left + b.width) - left
    return Rect(top, left, height, width)


def shift_to_overlap(crop: Rect, reference: Rect, image_size: tuple[int, int]) -> Rect:
    """`crop` moved towards `reference` until, on each axis, they share half of the shorter side; then into the image."""
    top = _shifted(crop.top, crop.height, reference.top, reference.height, image_size[0])
    left = _shifted(crop.left, crop.width, reference.left, reference.width, image_size[1])
    return Rect(top, left, crop.height, crop.width)


def _shifted(start: int, length: int, ref_start: int, ref_length: int, limit: int) -> int:
    """One axis of `shift_to_overlap`, in the published rule: what lacks half an overlap is moved by half a side more."""
    span = max(start + length, ref_start + ref_length) - min(start, ref_start)
    half = 0.5 * min(length, ref_length)
    shift = max(0.0, span - length - ref_length)
    if span >= length + ref_length - half:
        shift += half
    towards = (ref_start + ref_length / 2) - (start + length / 2)
    moved = start + round(shift if towards > 0 else -shift if towards < 0 else 0.0)
    return min(max(moved, 0), limit - length)


def inside(crop: Rect, outer: Rect) -> Rect:
    """`crop`, drawn in an image as large as `outer`, put where `outer` lies."""
    return Rect(outer.top + crop.top, outer.left + crop.left, crop.height, crop.width)


def coordinates(rect: Rect, image_size: tuple[int, int], flipped: bool) -> Tensor:
    """(4) normalized first row, first column, last row, last column; the columns change places under a horizontal flip."""
    rows, columns = (max(side - 1, 1) for side in image_size)
    first, last = rect.left / columns, (rect.left + rect.width - 1) / columns
    if flipped:
        first, last = last, first
    return torch.tensor([rect.top / rows, first, (rect.top + rect.height - 1) / rows, last], dtype=torch.float64)


# --------------------------------------------------------------------------- samples


def stratified_samples(grid: int, window: int, redraw: bool = True) -> Tensor:
    """(S) token numbers in row-major order, one cell of each `window` x `window` cells, drawn from torch's generator.

    Where windows do not fill the grid their block lies in one of its four corners. Without `redraw` each window gives its first
    cell, and the block lies at the top left.
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
    """(S, 2) where tokens stand in their crop, 0..1."""
    place_S2 = torch.stack([tokens_S // grid, tokens_S % grid], dim=1).double()
    return place_S2 / max(grid - 1, 1) if align == "corners" else (place_S2 + 0.5) / grid


def project(
    tokens_S: Tensor, source_4: Tensor, target_4: Tensor, source_grid: int, target_grid: int, align: str = "corners"
) -> Projection:
    """Samples of a crop on the grid of another one; crops are given by their `coordinates`, flips included.

    A sample is valid strictly inside the target crop, on both axes.
    """
    position_S2 = source_4[:2] + token_positions(tokens_S, source_grid, align) * (source_4[2:] - source_4[:2])
    low, high = torch.minimum(target_4[:2], target_4[2:]), torch.maximum(target_4[:2], target_4[2:])
    valid_S = ((position_S2 > low) & (position_S2 < high)).all(dim=1)
    extent_2 = target_4[2:] - target_4[:2]
    extent_2 = torch.where(extent_2 == 0, 1.0, extent_2)  # one pixel wide: nothing is strictly inside
    fraction_S2 = (position_S2 - target_4[:2]) / extent_2
    index_S2 = fraction_S2 * (target_grid - 1) if align == "corners" else fraction_S2 * target_grid - 0.5
    return Projection(valid_S, index_S2.clamp(0, target_grid - 1).float())


def stack_projections(projections: Sequence[Projection]) -> Projection:
    """Projections of one number of samples with a new first axis."""
    return Projection(*(torch.stack(fields) for fields in zip(*projections)))
