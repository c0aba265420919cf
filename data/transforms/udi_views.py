"""Views for UDI: overlapping crops, and the positions of the samples of one crop in another.

    transform, device_transform = udi_views(...)     # for the dataset, and for batches

The colors are those of EsViT's views (photometric.py). Beside the crops, a worker sends only a few indices and coordinates.

Shapes: M samples of a global view, m of a local view (the maximum over all), L local views.

Origin: UDI (Su and Ji, ECCV 2024).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from config.choices import ALIGNMENTS, DRAWINGS, PAIR_MODES
from config.choices import REFERENCES as REFERENCES
from data.decode import ImageLike
from data.transforms import geometry
from data.transforms.crops import Placement, cut_crops, random_box, to_pixels
from data.transforms.geometry import CropBox, Projection
from data.transforms.photometric import DRAWS, Photometric
from data.transforms.recipe import FLIP, Crops, ViewSpec, dino_recipe
from utils import UsageError

GLOBALS = 2
BLUR_AND_SOLARIZE = ((0.5, 0.0), (1.0, 0.0), (0.1, 0.2), (0.1, 0.2))  # probabilities, one pair drawn for each crop
BLUR_DRAW, SOLARIZE_DRAW = DRAWS - 3, DRAWS - 1


class Sampling(NamedTuple):
    """How crops are placed, and how samples are drawn and projected."""

    grid_of: Mapping[int, int]  # side of a view in pixels -> side of its grid in tokens
    global_window: int = 3
    local_window: int = 2
    pair_mode: str = "overlap"
    align: str = "corners"
    reference: str = "intersection"
    # Draw samples once for all views of a size (published), for each view, or take the first cell of each window.
    drawing: str = "image"


class Correspondence(NamedTuple):
    """Corresponding positions in the views of one image, or of a batch with a leading axis B.

    Local views of different sizes have different numbers of samples; the surplus ones of the smaller views are not valid.
    """

    tokens_2M: Tensor  # sampled tokens of the global views
    valid_2M: Tensor
    target_2M2: Tensor  # [v]: samples of view v in view 1 - v
    local_tokens_Lm: Tensor
    local_valid_L2m: Tensor
    local_target_L2m2: Tensor  # [l, v]: samples of local view l in view v


class UDICrops:
    """Transform an image to its uint8 crops (3, size, size), the draws of their colors, and the fields of `Correspondence`.

    All randomness comes from torch's generator, which the dataset seeds for each image.

    Raises:
        UsageError: an unknown choice, or a window larger than the grid of a view.
    """

    def __init__(self, views: Sequence[ViewSpec], sampling: Sampling, flip: float = FLIP) -> None:
        for flag, value, known in (
            ("global_pair_mode", sampling.pair_mode, PAIR_MODES),
            ("srs_align", sampling.align, ALIGNMENTS),
            ("local_reference", sampling.reference, REFERENCES),
            ("srs_drawing", sampling.drawing, DRAWINGS),
        ):
            if value not in known:
                raise UsageError(f"--{flag} {value} must be one of {', '.join(known)}")
        if not 0 <= flip <= 1:
            raise UsageError(f"--flip_prob {flip} must be in 0..1")
        self.views = tuple(views)
        self.sampling = sampling
        self.flip = flip
        kinds = [("global", sampling.global_window)] * GLOBALS + [("local", sampling.local_window)] * len(views)
        self.windows = [window for _, window in kinds][: len(views)]
        self.grids = [sampling.grid_of[view.size] for view in views]
        for (kind, window), view, grid in zip(kinds, views, self.grids):
            if not 1 <= window <= grid:
                raise UsageError(
                    f"--{kind}_sampling_window_size {window} must be in 1..{grid}: "
                    f"{kind} views of {view.size} pixels have {grid} x {grid} tokens"
                )

    def __call__(self, image: ImageLike, size: tuple[int, int] | None = None, reduction: int = 1) -> list[Tensor]:
        pixels_CHW = to_pixels(image)
        size = size or (pixels_CHW.shape[1], pixels_CHW.shape[2])
        placement = self.draw_placement(size)
        crops = cut_crops(pixels_CHW, self.views, placement, reduction)
        corners = [geometry.normalized_corners(box, size, flip) for box, flip in zip(*placement)]
        return [*crops, _color_draws(len(self.views)), *self._correspondence(corners)]

    def draw_placement(self, size: tuple[int, int]) -> Placement:
        boxes = self._draw_boxes(size)
        return Placement(boxes, (torch.rand(len(self.views)) < self.flip).tolist())

    def _draw_boxes(self, size: tuple[int, int]) -> list[CropBox]:
        """Draw a second global view that overlaps the first or is inside it, and local views that overlap their reference."""
        first = random_box(size, self.views[0])
        if self.sampling.pair_mode == "nested":
            second = geometry.inside(random_box((first.height, first.width), self.views[1]), first)
        else:
            second = geometry.shift_to_overlap(random_box(size, self.views[1]), first, size)
        if self.sampling.reference == "union":
            reference = geometry.union(first, second)
        else:
            reference = geometry.intersection(first, second) or first
        local = [geometry.shift_to_overlap(random_box(size, view), reference, size) for view in self.views[GLOBALS:]]
        return [first, second, *local]

    def _correspondence(self, corners: Sequence[Tensor]) -> Correspondence:
        tokens = self._draw_tokens()
        pair = geometry.stack_projections([self._project(tokens, corners, v, 1 - v) for v in (0, 1)])
        local = len(corners) - GLOBALS
        samples = max((len(tokens_m) for tokens_m in tokens[GLOBALS:]), default=0)
        local_tokens = torch.zeros(local, samples, dtype=torch.long)
        valid = torch.zeros(local, GLOBALS, samples, dtype=torch.bool)
        target = torch.zeros(*valid.shape, 2)
        for row, tokens_m in enumerate(tokens[GLOBALS:]):
            count = len(tokens_m)
            local_tokens[row, :count] = tokens_m
            for v in range(GLOBALS):
                valid[row, v, :count], target[row, v, :count] = self._project(tokens, corners, GLOBALS + row, v)
        return Correspondence(
            torch.stack(tokens[:GLOBALS]).int(), pair.valid_S, pair.target_S2, local_tokens.int(), valid, target
        )

    def _draw_tokens(self) -> list[Tensor]:
        """Draw the samples of each view."""
        redraw = self.sampling.drawing != "fixed"
        drawn: dict[tuple[int, ...], Tensor] = {}
        tokens = []
        for number, (grid, window) in enumerate(zip(self.grids, self.windows)):
            key = (number,) if self.sampling.drawing == "view" else (grid, number < GLOBALS)
            if key not in drawn:
                drawn[key] = geometry.stratified_samples(grid, window, redraw)
            tokens.append(drawn[key])
        return tokens

    def _project(self, tokens: Sequence[Tensor], corners: Sequence[Tensor], source: int, target: int) -> Projection:
        grids = self.grids[source], self.grids[target]
        return geometry.project(tokens[source], corners[source], corners[target], *grids, self.sampling.align)


class UDIDeviceTransform:
    """Transform stacked samples of `UDICrops` to views and the fields of `Correspondence`, on the device."""

    def __init__(self, photometric: Photometric) -> None:
        self.photometric = photometric

    def __call__(self, stacked: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        fields = len(Correspondence._fields)
        views = self.photometric(stacked[:-fields], device)
        return [*views, *(field.to(device, non_blocking=True) for field in stacked[-fields:])]


def split_correspondence(batch: Sequence[Tensor]) -> tuple[Sequence[Tensor], Correspondence]:
    """Split the output of `UDIDeviceTransform` into the views and the correspondence."""
    fields = len(Correspondence._fields)
    return batch[:-fields], Correspondence(*batch[-fields:])


def udi_views(
    crops: Crops, mean: Sequence[float], std: Sequence[float], strength: float, sampling: Sampling, flip: float = FLIP
) -> tuple[UDICrops, UDIDeviceTransform]:
    """Return the worker part and the device part of the transform; `strength` is that of DINO's color jitter."""
    recipe = dino_recipe(crops, strength)
    # With probability 0.5 the draws of `_color_draws`, which are 0 or 1, decide.
    views = tuple(view._replace(blur=0.5, solarize=0.5) for view in recipe.views)
    photometric = Photometric(recipe._replace(views=views), tuple(mean), tuple(std))
    return UDICrops(views, sampling, flip), UDIDeviceTransform(photometric)


def _color_draws(views: int) -> Tensor:
    """Return uniform numbers (V, DRAWS) in which those of blur and solarization are decided: 0 for yes, 1 for no."""
    draws_VR = torch.rand(views, DRAWS)
    odds_V2 = torch.tensor(BLUR_AND_SOLARIZE)[torch.randint(len(BLUR_AND_SOLARIZE), (views,))]
    for column, odds_V in zip((BLUR_DRAW, SOLARIZE_DRAW), odds_V2.T):
        draws_VR[:, column] = (draws_VR[:, column] >= odds_V).float()
    return draws_VR
