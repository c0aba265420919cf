"""UDI's views: crops that overlap, and where the samples of one lie in another, by the code that colours EsViT's views.

    crops, finish = udi_views(...)     # for the data set, and for batches of its samples

What leaves a worker beside the crops is a few indices and coordinates, not maps over tokens.

Shapes: M samples of a global view, m of a local view, L local views.
Origin: UDI (Su and Ji, ECCV 2024); colours as in data/photometric.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF

from data import geometry
from data.decode import ImageLike
from data.geometry import Rect
from data.photometric import DRAWS, Photometric
from data.recipe import ASPECT, FLIP, Crops, View, dino_recipe
from utils import UsageError

PAIR_MODES = ("overlap", "nested")
BLUR_AND_SOLARIZE = ((0.5, 0.0), (1.0, 0.0), (0.1, 0.2), (0.1, 0.2))  # probabilities, one pair drawn for each crop
BLUR_DRAW, SOLARIZE_DRAW = DRAWS - 3, DRAWS - 1


class Sampling(NamedTuple):
    """How samples are drawn and projected."""

    patch_size: int
    global_window: int = 3
    local_window: int = 2
    pair_mode: str = "overlap"
    align: str = "corners"


class Correspondence(NamedTuple):
    """Of one image, or of a batch with an axis B before all others; views of a pair as in `udi_losses.TeacherLevels`."""

    tokens_M: Tensor  # sampled tokens of both global views, int16
    valid_2M: Tensor
    target_2M2: Tensor  # [v]: samples of view v in view 1 - v
    local_valid_L2m: Tensor
    local_target_L2m2: Tensor  # [l, v]: samples of local view l in view v


class UDICrops:
    """Image to its crops (3, size, size), uint8, the draws of their colours, and the fields of `Correspondence`."""

    def __init__(self, views: Sequence[View], sampling: Sampling) -> None:
        if sampling.pair_mode not in PAIR_MODES or sampling.align not in geometry.ALIGNMENTS:
            raise UsageError(
                f"--global_pair_mode {sampling.pair_mode} must be one of {', '.join(PAIR_MODES)}, "
                f"--srs_align {sampling.align} one of {', '.join(geometry.ALIGNMENTS)}"
            )
        self.views = tuple(views)
        self.sampling = sampling

    def __call__(self, image: ImageLike) -> list[Tensor]:
        assert isinstance(image, Image.Image), "the split pipeline is for colour images"
        pixels_CHW = TF.pil_to_tensor(image)
        rects = self._rectangles(pixels_CHW)
        flips = (torch.rand(len(self.views)) < FLIP).tolist()
        crops = [_cut(pixels_CHW, rect, view.size, flip) for rect, view, flip in zip(rects, self.views, flips)]
        size = (pixels_CHW.shape[1], pixels_CHW.shape[2])
        places = [geometry.coordinates(rect, size, flip) for rect, flip in zip(rects, flips)]
        return [*crops, _colour_draws(len(self.views)), *self._correspondence(places)]

    def _rectangles(self, pixels_CHW: Tensor) -> list[Rect]:
        """The second global view overlaps the first or lies in it; local views overlap what both share."""
        size = (pixels_CHW.shape[1], pixels_CHW.shape[2])
        first = _drawn(pixels_CHW, self.views[0])
        if self.sampling.pair_mode == "nested":
            second = geometry.inside(_drawn(pixels_CHW[:, : first.height, : first.width], self.views[1]), first)
        else:
            second = geometry.shift_to_overlap(_drawn(pixels_CHW, self.views[1]), first, size)
        shared = geometry.intersection(first, second) or first
        local = [geometry.shift_to_overlap(_drawn(pixels_CHW, view), shared, size) for view in self.views[2:]]
        return [first, second, *local]

    def _correspondence(self, places: Sequence[Tensor]) -> Correspondence:
        patch, align = self.sampling.patch_size, self.sampling.align
        grid = self.views[0].size // patch
        tokens_M = geometry.stratified_samples(grid, self.sampling.global_window)
        pair = geometry.stack_projections(
            [geometry.project(tokens_M, places[v], places[1 - v], grid, grid, align) for v in (0, 1)]
        )
        local_grid = self.views[-1].size // patch
        tokens_m = geometry.stratified_samples(local_grid, self.sampling.local_window)  # shared by all local views
        valid, target = (
            torch.zeros(0, 2, len(tokens_m), dtype=torch.bool),
            torch.zeros(0, 2, len(tokens_m), 2),
        )
        if len(places) > 2:
            local = [
                geometry.stack_projections(
                    [geometry.project(tokens_m, place, places[v], local_grid, grid, align) for v in (0, 1)]
                )
                for place in places[2:]
            ]
            valid, target = geometry.stack_projections(local)
        return Correspondence(tokens_M.short(), pair.valid_S, pair.target_S2, valid, target)


class UDIFinish:
    """Stacked samples of `UDICrops` to views and the fields of `Correspondence`, on the device."""

    def __init__(self, photometric: Photometric) -> None:
        self.photometric = photometric

    def __call__(self, stacked: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        fields = len(Correspondence._fields)
        views = self.photometric(stacked[:-fields], device)
        return [*views, *(field.to(device, non_blocking=True) for field in stacked[-fields:])]


def udi_views(
    crops: Crops, mean: Sequence[float], std: Sequence[float], strength: float, sampling: Sampling
) -> tuple[UDICrops, UDIFinish]:
    """Both halves; brightness and contrast vary by `strength` as in DINO's views."""
    recipe = dino_recipe(crops, strength)
    even = tuple(view._replace(blur=0.5, solarize=0.5) for view in recipe.views)  # decided by `_colour_draws`
    return UDICrops(even, sampling), UDIFinish(Photometric(recipe._replace(views=even), tuple(mean), tuple(std)))


def _colour_draws(views: int) -> Tensor:
    """(V, DRAWS) uniform numbers, those of blur and solarisation decided already: 0 for yes, 1 for no."""
    draws_VR = torch.rand(views, DRAWS)
    odds_V2 = torch.tensor(BLUR_AND_SOLARIZE)[torch.randint(len(BLUR_AND_SOLARIZE), (views,))]
    for column, odds_V in zip((BLUR_DRAW, SOLARIZE_DRAW), odds_V2.T):
        draws_VR[:, column] = (draws_VR[:, column] >= odds_V).float()
    return draws_VR


def _drawn(pixels_CHW: Tensor, view: View) -> Rect:
    return Rect(*RandomResizedCrop.get_params(pixels_CHW, list(view.scale), list(ASPECT)))


def _cut(pixels_CHW: Tensor, rect: Rect, size: int, flip: bool) -> Tensor:
    box = pixels_CHW[None, :, rect.top : rect.top + rect.height, rect.left : rect.left + rect.width]
    crop = F.interpolate(box, (size, size), mode="bicubic", antialias=True)[0]
    return crop.flip(-1) if flip else crop
