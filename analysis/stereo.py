"""Correspondence against ground truth: the two photographs of a motorcycle that scikit-image ships, with their disparity.

A region of the left picture is matched to the whole right picture along nothing but similarity. What stands at column x on the
left stands at column x - disparity of the same row on the right.

Shapes: T regions, C channels, H x W pixels.
Origin: the measure is this project's own; the pictures are of the Middlebury set (Scharstein et al., GCPR 2014).
"""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from analysis.correspondence import Grid, centers, nearest
from data.decode import open_image
from utils import UsageError

FILES = {"left": "motorcycle_left.png", "right": "motorcycle_right.png", "disparity": "motorcycle_disp.npz"}
VALID_SHARE = 0.5  # of a region's pixels whose disparity is known
PIXELS = 8  # side to which the pixels of a region are reduced for the baseline


class StereoPair(NamedTuple):
    """Both pictures, and how far what the left one shows has moved to the left in the right one."""

    left: Image.Image
    right: Image.Image
    disparity_HW: Tensor  # pixels; inf where unknown


class StereoScore(NamedTuple):
    """How well regions find their place in the other picture."""

    regions: int  # matched, of those whose true place is known and inside the picture
    within_one: float  # percent whose match is at most one region away from the true place, on both axes
    median_error: float  # pixels


def load_stereo() -> StereoPair:
    """The pair that scikit-image installs; nothing is downloaded.

    Raises:
        UsageError: the package or its files are missing.
    """
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise UsageError("package skimage is not installed; run pip install -r requirements-demo.txt")
    folder = Path(spec.origin).parent / "data"
    for file in FILES.values():
        if not (folder / file).is_file():
            raise UsageError(f"this release of skimage does not ship {file}; install the one in requirements-demo.txt")
    with np.load(folder / FILES["disparity"]) as stored:
        disparity = torch.from_numpy(np.asarray(next(iter(stored.values())), dtype=np.float32))
    pictures = [open_image(folder / FILES[side]).convert("RGB") for side in ("left", "right")]
    return StereoPair(pictures[0], pictures[1], disparity)


def resized(pair: StereoPair, size: tuple[int, int]) -> StereoPair:
    """The pair at another (height, width); disparities scale with the width, and none is made of known and unknown ones."""
    height, width = size
    left, right = (picture.resize((width, height), Image.Resampling.BICUBIC) for picture in (pair.left, pair.right))
    scaled = F.interpolate(pair.disparity_HW[None, None], size=size, mode="nearest-exact")[0, 0]
    return StereoPair(left, right, scaled * (width / pair.disparity_HW.shape[1]))


def region_disparity(disparity_HW: Tensor, grid: Grid) -> Tensor:
    """(T,) median disparity of each region of the grid; nan where fewer than half of its pixels have one."""
    known = torch.isfinite(disparity_HW) & (disparity_HW > 0)
    values = torch.where(known, disparity_HW, torch.nan)
    rows, columns = (torch.linspace(0, side, count + 1).round().long() for side, count in zip(values.shape, grid))
    medians = []
    for top, bottom in itertools.pairwise(rows):
        for start, end in itertools.pairwise(columns):
            cell = values[top:bottom, start:end].flatten()
            enough = torch.isfinite(cell).float().mean() >= VALID_SHARE
            medians.append(cell.nanmedian() if enough else torch.tensor(torch.nan))
    return torch.stack(medians)


class TruePlaces(NamedTuple):
    """Regions of the left picture whose place in the right one is known."""

    regions_K: Tensor
    places_K2: Tensor  # y, x in pixels


def true_places(disparity_HW: Tensor, grid: Grid) -> TruePlaces:
    """Where the centers of the left picture's regions are in the right one; those that leave the picture are not there."""
    size = (disparity_HW.shape[0], disparity_HW.shape[1])
    places_T2 = centers(grid, size)
    places_T2[:, 1] -= region_disparity(disparity_HW, grid)
    regions_K = (places_T2[:, 1] >= 0).nonzero().squeeze(1)  # nan is not
    return TruePlaces(regions_K, places_T2[regions_K])


def stereo_score(
    left_TC: Tensor, right_TC: Tensor, truth: TruePlaces, grid: Grid, size: tuple[int, int]
) -> StereoScore:
    """Match every region of the left picture to the whole right one and compare with the truth."""
    match_K = nearest(left_TC, right_TC).second_K[truth.regions_K]
    off_K2 = centers(grid, size)[match_K] - truth.places_K2
    return _score(off_K2, grid, size)


def chance_score(truth: TruePlaces, grid: Grid, size: tuple[int, int]) -> StereoScore:
    """What matching to any region of the right picture gives on average."""
    off = centers(grid, size)[None] - truth.places_K2[:, None]
    return _score(off.flatten(0, 1), grid, size)._replace(regions=len(truth.regions_K))


def _score(off_K2: Tensor, grid: Grid, size: tuple[int, int]) -> StereoScore:
    region = torch.tensor([size[0] / grid[0], size[1] / grid[1]])
    near = (off_K2.abs() <= region + 1e-4).all(dim=1).double().mean()
    return StereoScore(len(off_K2), 100 * near.item(), off_K2.norm(dim=1).median().item())


def pixel_regions(image_1CHW: Tensor, grid: Grid) -> Tensor:
    """(T, C) the pixels of each region, reduced to 8 x 8, their mean taken off, of length 1."""
    cells = F.interpolate(image_1CHW, size=(grid[0] * PIXELS, grid[1] * PIXELS), mode="area")
    pixels_TC = F.unfold(cells, PIXELS, stride=PIXELS)[0].T
    per_channel = pixels_TC.unflatten(1, (image_1CHW.shape[1], -1))
    return F.normalize((per_channel - per_channel.mean(dim=2, keepdim=True)).flatten(1), dim=1)
