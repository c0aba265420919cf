"""Correspondence with ground truth: the stereo pair of a motorcycle in scikit-image, with its disparity.

Each region of the left picture is matched to all regions of the right picture. A pixel in column x on the left is in column
x - disparity of the same row on the right.

Shapes: T regions, K regions with known position, C channels, H x W pixels.
Origin: the pictures are of the Middlebury stereo data (Scharstein et al., GCPR 2014).
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
VALID_SHARE = 0.5  # of the pixels of a region must have a known disparity
PIXELS = 8  # side of a region for the baseline on raw pixels


class StereoPair(NamedTuple):
    """Both pictures and the disparity of the left one."""

    left: Image.Image
    right: Image.Image
    disparity_HW: Tensor  # pixels; inf where unknown


class StereoScore(NamedTuple):
    """Accuracy of the matches."""

    regions: int  # with a known position inside the right picture
    within_one: float  # percent of matches at most one region from the true position, on both axes
    median_error: float  # pixels


def load_stereo() -> StereoPair:
    """Load the pair from the installed scikit-image.

    Raises:
        UsageError: the package or its files are missing.
    """
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise UsageError("package skimage is not installed; run pip install -r requirements-demo.txt")
    folder = Path(spec.origin).parent / "data"
    for file in FILES.values():
        if not (folder / file).is_file():
            raise UsageError(f"this release of skimage has no {file}; install the one in requirements-demo.txt")
    with np.load(folder / FILES["disparity"]) as stored:
        disparity = torch.from_numpy(np.asarray(next(iter(stored.values())), dtype=np.float32))
    pictures = [open_image(folder / FILES[side]).convert("RGB") for side in ("left", "right")]
    return StereoPair(pictures[0], pictures[1], disparity)


def resized(pair: StereoPair, size: tuple[int, int]) -> StereoPair:
    """Resize the pair to (height, width); disparities are scaled with the width and not interpolated."""
    height, width = size
    left, right = (picture.resize((width, height), Image.Resampling.BICUBIC) for picture in (pair.left, pair.right))
    scaled = F.interpolate(pair.disparity_HW[None, None], size=size, mode="nearest-exact")[0, 0]
    return StereoPair(left, right, scaled * (width / pair.disparity_HW.shape[1]))


def region_disparity(disparity_HW: Tensor, grid: Grid) -> Tensor:
    """Return the median disparity (T,) of each region; nan if it is known for less than half of the pixels."""
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


class TruePositions(NamedTuple):
    """Regions of the left picture with a known position in the right one."""

    regions_K: Tensor
    positions_K2: Tensor  # y, x in pixels


def true_positions(disparity_HW: Tensor, grid: Grid) -> TruePositions:
    """Return the positions of the centers of the left regions in the right picture, without those outside of it."""
    size = (disparity_HW.shape[0], disparity_HW.shape[1])
    positions_T2 = centers(grid, size)
    positions_T2[:, 1] -= region_disparity(disparity_HW, grid)
    regions_K = (positions_T2[:, 1] >= 0).nonzero().squeeze(1)  # False for nan
    return TruePositions(regions_K, positions_T2[regions_K])


def stereo_score(
    left_TC: Tensor, right_TC: Tensor, truth: TruePositions, grid: Grid, size: tuple[int, int]
) -> StereoScore:
    """Match every left region to all right regions and compare with the true positions."""
    match_K = nearest(left_TC, right_TC).second_K[truth.regions_K]
    off_K2 = centers(grid, size)[match_K] - truth.positions_K2
    return _score(off_K2, grid, size)


def chance_score(truth: TruePositions, grid: Grid, size: tuple[int, int]) -> StereoScore:
    """Return the expected score of random matches."""
    off = centers(grid, size)[None] - truth.positions_K2[:, None]
    return _score(off.flatten(0, 1), grid, size)._replace(regions=len(truth.regions_K))


def _score(off_K2: Tensor, grid: Grid, size: tuple[int, int]) -> StereoScore:
    region = torch.tensor([size[0] / grid[0], size[1] / grid[1]])
    near = (off_K2.abs() <= region + 1e-4).all(dim=1).double().mean()
    return StereoScore(len(off_K2), 100 * near.item(), off_K2.norm(dim=1).median().item())


def pixel_regions(image_1CHW: Tensor, grid: Grid) -> Tensor:
    """Return the pixels (T, C) of each region, reduced to 8 x 8, centered and normalized to length 1."""
    cells = F.interpolate(image_1CHW, size=(grid[0] * PIXELS, grid[1] * PIXELS), mode="area")
    pixels_TC = F.unfold(cells, PIXELS, stride=PIXELS)[0].T
    per_channel = pixels_TC.unflatten(1, (image_1CHW.shape[1], -1))
    return F.normalize((per_channel - per_channel.mean(dim=2, keepdim=True)).flatten(1), dim=1)
