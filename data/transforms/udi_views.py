"""UDI's views: crops that overlap, and where the samples of one lie in another, by the code that colors EsViT's views.

    crops, finish = udi_views(...)     # for the data set, and for batches of its samples

What leaves a worker beside the crops is a few indices and coordinates, not maps over tokens.

Shapes: M samples of a global view, m of a local view (the most that any of them has), L local views.
Origin: UDI (Su and Ji, ECCV 2024); colors as in data/transforms/photometric.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF

from config.choices import ALIGNMENTS, DRAWINGS, PAIR_MODES
from config.choices import REFERENCES as REFERENCES
from data.decode import ImageLike
from data.transforms import geometry
from data.transforms.geometry import Projection, Rect
from data.transforms.photometric import DRAWS, Photometric
from data.transforms.recipe import ASPECT, FLIP, Crops, View, dino_recipe
from utils import UsageError

GLOBALS = 2
BLUR_AND_SOLARIZE = ((0.5, 0.0), (1.0, 0.0), (0.1, 0.2), (0.1, 0.2))  # probabilities, one pair drawn for each crop
BLUR_DRAW, SOLARIZE_DRAW = DRAWS - 3, DRAWS - 1


class Sampling(NamedTuple):
    """How views are placed, and samples drawn and projected."""

    grid_of: Mapping[int, int]  # tokens on a side of a view, by its side in pixels
    global_window: int = 3
    local_window: int = 2
    pair_mode: str = "overlap"
    align: str = "corners"
    reference: str = "intersection"
    # Samples: once for all views of a size (published), for each view, or the first cell of each window.
    drawing: str = "image"


class Correspondence(NamedTuple):
    """Of one image, or of a batch with an axis B before all others; views of a pair as in `outputs.TeacherLevels`.

    Local views of different sizes have different numbers of samples: the last ones of those that have fewer are not valid.
    """

    tokens_2M: Tensor  # sampled tokens of the global views
    valid_2M: Tensor
    target_2M2: Tensor  # [v]: samples of view v in view 1 - v
    local_tokens_Lm: Tensor
    local_valid_L2m: Tensor
    local_target_L2m2: Tensor  # [l, v]: samples of local view l in view v


class UDICrops:
    """Image to its crops (3, size, size), uint8, the draws of their colors, and the fields of `Correspondence`.

    Everything is drawn from torch's generator, which the data set has seeded for this image.

    Raises:
        UsageError: an unknown choice, or a window larger than the grid of a view.
    """

    def __init__(self, views: Sequence[View], sampling: Sampling, flip: float = FLIP) -> None:
        for flag, value, known in (
            ("global_pair_mode", sampling.pair_mode, PAIR_MODES),
            ("srs_align", sampling.align, ALIGNMENTS),
            ("local_reference", sampling.reference, REFERENCES),
            ("srs_drawing", sampling.drawing, DRAWINGS),
        ):
            if value not in known:
                raise UsageError(f"--{flag} {value} must be one of {', '.join(known)}")
        if not 0 <= flip <= 1:
            raise UsageError(f"--flip_prob {flip} must lie in 0..1")
        self.views = tuple(views)
        self.sampling = sampling
        self.flip = flip
        kinds = [("global", sampling.global_window)] * GLOBALS + [("local", sampling.local_window)] * len(views)
        self.windows = [window for _, window in kinds][: len(views)]
        self.grids = [sampling.grid_of[view.size] for view in views]
        for (kind, window), view, grid in zip(kinds, views, self.grids):
            if not 1 <= window <= grid:
                raise UsageError(
                    f"--{kind}_sampling_window_size {window} must lie in 1..{grid}: "
                    f"{kind} views of {view.size} pixels have {grid} x {grid} tokens"
                )

    def __call__(self, image: ImageLike) -> list[Tensor]:
        assert isinstance(image, Image.Image), "the split pipeline is for color images"
        pixels_CHW = TF.pil_to_tensor(image)
        rects = self._rectangles(pixels_CHW)
        flips = (torch.rand(len(self.views)) < self.flip).tolist()
        crops = [_cut(pixels_CHW, rect, view.size, flip) for rect, view, flip in zip(rects, self.views, flips)]
        size = (pixels_CHW.shape[1], pixels_CHW.shape[2])
        places = [geometry.coordinates(rect, size, flip) for rect, flip in zip(rects, flips)]
        return [*crops, _color_draws(len(self.views)), *self._correspondence(places)]

    def _rectangles(self, pixels_CHW: Tensor) -> list[Rect]:
        """The second global view overlaps the first or lies in it; local views overlap what both share, or cover."""
        size = (pixels_CHW.shape[1], pixels_CHW.shape[2])
        first = _drawn(pixels_CHW, self.views[0])
        if self.sampling.pair_mode == "nested":
            second = geometry.inside(_drawn(pixels_CHW[:, : first.height, : first.width], self.views[1]), first)
        else:
            second = geometry.shift_to_overlap(_drawn(pixels_CHW, self.views[1]), first, size)
        if self.sampling.reference == "union":
            reference = geometry.union(first, second)
        else:
            reference = geometry.intersection(first, second) or first
        local = [geometry.shift_to_overlap(_drawn(pixels_CHW, view), reference, size) for view in self.views[GLOBALS:]]
        return [first, second, *local]

    def _correspondence(self, places: Sequence[Tensor]) -> Correspondence:
        tokens = self._draw_tokens()
        pair = geometry.stack_projections([self._project(tokens, places, v, 1 - v) for v in (0, 1)])
        most = max((len(tokens_m) for tokens_m in tokens[GLOBALS:]), default=0)
        local_tokens = torch.zeros(len(places) - GLOBALS, most, dtype=torch.long)
        valid = torch.zeros(len(places) - GLOBALS, GLOBALS, most, dtype=torch.bool)
        target = torch.zeros(*valid.shape, 2)
        for row, tokens_m in enumerate(tokens[GLOBALS:]):
            count = len(tokens_m)
            local_tokens[row, :count] = tokens_m
            for v in range(GLOBALS):
                valid[row, v, :count], target[row, v, :count] = self._project(tokens, places, GLOBALS + row, v)
        return Correspondence(
            torch.stack(tokens[:GLOBALS]).int(), pair.valid_S, pair.target_S2, local_tokens.int(), valid, target
        )

    def _draw_tokens(self) -> list[Tensor]:
        """The sampled tokens of each view."""
        redraw = self.sampling.drawing != "fixed"
        drawn: dict[tuple[int, ...], Tensor] = {}
        tokens = []
        for number, (grid, window) in enumerate(zip(self.grids, self.windows)):
            shared_by = (number,) if self.sampling.drawing == "view" else (grid, number < GLOBALS)
            if shared_by not in drawn:
                drawn[shared_by] = geometry.stratified_samples(grid, window, redraw)
            tokens.append(drawn[shared_by])
        return tokens

    def _project(self, tokens: Sequence[Tensor], places: Sequence[Tensor], source: int, target: int) -> Projection:
        grids = self.grids[source], self.grids[target]
        return geometry.project(tokens[source], places[source], places[target], *grids, self.sampling.align)


class UDIDeviceTransform:
    """Stacked samples of `UDICrops` to views and the fields of `Correspondence`, on the device."""

    def __init__(self, photometric: Photometric) -> None:
        self.photometric = photometric

    def __call__(self, stacked: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        fields = len(Correspondence._fields)
        views = self.photometric(stacked[:-fields], device)
        return [*views, *(field.to(device, non_blocking=True) for field in stacked[-fields:])]


def split_finished(batch: Sequence[Tensor]) -> tuple[Sequence[Tensor], Correspondence]:
    """What `UDIDeviceTransform` gives, apart: the views, and where samples correspond."""
    fields = len(Correspondence._fields)
    return batch[:-fields], Correspondence(*batch[-fields:])


def udi_views(
    crops: Crops,
    mean: Sequence[float],
    std: Sequence[float],
    strength: float,
    sampling: Sampling,
    flip: float = FLIP,
) -> tuple[UDICrops, UDIDeviceTransform]:
    """Both halves; brightness and contrast vary by `strength` as in DINO's views."""
    recipe = dino_recipe(crops, strength)
    even = tuple(view._replace(blur=0.5, solarize=0.5) for view in recipe.views)  # decided by `_color_draws`
    return UDICrops(even, sampling, flip), UDIDeviceTransform(
        Photometric(recipe._replace(views=even), tuple(mean), tuple(std))
    )


def _color_draws(views: int) -> Tensor:
    """(V, DRAWS) uniform numbers, those of blur and solarization decided already: 0 for yes, 1 for no."""
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
