"""Label propagation: labels of the first frame of a video are transferred to all frames by the similarity of regions.

The label of a region is the mean of the labels of the most similar regions near its position in the first and the last few frames,
weighted by exp(cosine / temperature).

Shapes: N regions of a frame, C channels, K labels, h x w grid of regions, H x W pixels.
Origin: the protocol of DINO (Caron et al., ICCV 2021) section 4.2.2 after Jabri et al. (NeurIPS 2020).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from config.choices import VIDEO_LAST_FRAMES, VIDEO_RADIUS, VIDEO_TEMPERATURE, VIDEO_TOP

Grid = tuple[int, int]


class PropagationConfig(NamedTuple):
    """Hyperparameters of label propagation."""

    last_frames: int = VIDEO_LAST_FRAMES  # in addition to the first one
    radius: int = VIDEO_RADIUS  # in regions, along each axis; 0: the whole frame
    top: int = VIDEO_TOP
    temperature: float = VIDEO_TEMPERATURE


class Labeled(NamedTuple):
    """Features and labels of the regions of a frame."""

    features_NC: Tensor  # of length 1
    labels_NK: Tensor  # shares, 0..1


def near(grid: Grid, radius: int) -> Tensor:
    """Return whether two regions are at most `radius` rows and columns apart (N, N)."""
    sides = [torch.arange(side) for side in grid]
    rows, columns = ((side[:, None] - side).abs() <= (radius or len(side)) for side in sides)
    return (rows[:, None, :, None] & columns[:, None, :]).flatten(0, 1).flatten(1)


def propagated(features_NC: Tensor, context: Iterable[Labeled], near_NN: Tensor, config: PropagationConfig) -> Tensor:
    """Return the labels (N, K) of a frame from those of the frames in `context`; one N x N matrix is in memory at a time."""
    best_Nk = features_NC.new_empty(len(features_NC), 0)
    labels_NkK: Tensor | None = None
    for frame in context:
        cosines_NN = (features_NC @ frame.features_NC.T).masked_fill(~near_NN, -torch.inf)
        found = cosines_NN.topk(min(config.top, cosines_NN.shape[1]))
        labels = frame.labels_NK[found.indices]
        labels_NkK = labels if labels_NkK is None else torch.cat([labels_NkK, labels], dim=1)
        best_Nk, order = torch.cat([best_Nk, found.values], dim=1).sort(dim=1, descending=True, stable=True)
        best_Nk, order = best_Nk[:, : config.top], order[:, : config.top]
        labels_NkK = labels_NkK.gather(1, order[..., None].expand(-1, -1, labels_NkK.shape[2]))
    assert labels_NkK is not None
    return ((best_Nk / config.temperature).softmax(dim=1)[..., None] * labels_NkK).sum(dim=1)


def propagate(maps: Iterable[Tensor], first_NK: Tensor, config: PropagationConfig) -> Iterator[Tensor]:
    """Yield the labels (N, K) of every frame after the first.

    Args:
        maps: region features (C, h, w) of the frames in order, all of one grid.
        first_NK: labels of the first frame.
    """
    first: Labeled | None = None
    near_NN = torch.empty(0)
    last: deque[Labeled] = deque(maxlen=config.last_frames)
    for map_Chw in maps:
        features_NC = F.normalize(map_Chw.flatten(1).T, dim=1)
        if first is None:
            first = Labeled(features_NC, first_NK)
            near_NN = near((map_Chw.shape[1], map_Chw.shape[2]), config.radius).to(features_NC.device)
            continue
        labels_NK = propagated(features_NC, [first, *last], near_NN, config)
        last.append(Labeled(features_NC, labels_NK))
        yield labels_NK


def to_regions(labels_HW: Tensor, values: Tensor, grid: Grid) -> Tensor:
    """Return one-hot labels (N, K): whether the center pixel of a region has the label of `values` (K)."""
    nearest_hw = F.interpolate(labels_HW[None, None].float(), grid, mode="nearest-exact")[0, 0]
    return (nearest_hw.flatten()[:, None] == values).float()


def to_pixels(labels_NK: Tensor, grid: Grid, size: Grid) -> Tensor:
    """Return the index of the label of each pixel (H, W), after bilinear interpolation and normalization of each label to 0..1."""
    shares_KHW = F.interpolate(labels_NK.T.unflatten(1, grid)[None], size, mode="bilinear", align_corners=False)[0]
    shares_KHW = shares_KHW - shares_KHW.amin(dim=(1, 2), keepdim=True)
    largest = shares_KHW.amax(dim=(1, 2), keepdim=True)
    return torch.where(largest > 0, shares_KHW / largest, shares_KHW).argmax(dim=0)
