"""Correspondence of the regions of two views by the cosine similarity of their features.

Shapes: B images, T and S regions of the two views, C channels, K pairs.
Origin: EsViT (Li et al., ICLR 2022) section 3.1 and its appendix; distances are between the centers of regions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models import Backbone

Grid = tuple[int, int]
CLIPPED = 0.02  # share of the values of a principal component that is clipped at each end


class RegionFeatures(NamedTuple):
    """Features of a batch of views, normalized to length 1."""

    view_BC: Tensor
    regions_BTC: Tensor
    grid: Grid

    @property
    def most_like_view(self) -> Tensor:
        """(B,) index of the region that is most similar to the view feature."""
        return (self.regions_BTC @ self.view_BC[:, :, None]).squeeze(-1).argmax(dim=1)


class Pairs(NamedTuple):
    """Regions of view 1 and the most similar regions of view 2."""

    similarity_K: Tensor
    first_K: Tensor
    second_K: Tensor


@torch.no_grad()
def region_features(backbone: Backbone, images_BCHW: Tensor) -> RegionFeatures:
    """Compute view and region features of a batch of images."""
    last = backbone.forward_blocks(images_BCHW)[-1]
    tokens_BNC = backbone.norm(last.tokens_BNC)
    view_BC = backbone.pool(tokens_BNC, last.num_prefix_tokens)
    regions_BTC = tokens_BNC[:, last.num_prefix_tokens :]
    return RegionFeatures(F.normalize(view_BC.float(), dim=-1), F.normalize(regions_BTC.float(), dim=-1), last.grid)


def nearest(first_TC: Tensor, second_SC: Tensor) -> Pairs:
    """Return for each region of view 1, in order, the most similar region of view 2; also for batches (B, T, C)."""
    similarity, index = (first_TC @ second_SC.transpose(-2, -1)).max(dim=-1)
    own = torch.arange(first_TC.shape[-2], device=first_TC.device).expand_as(index)
    return Pairs(similarity, own, index)


def top_pairs(pairs: Pairs, count: int) -> Pairs:
    """Return the `count` most similar pairs, most similar first, ties in the order of view 1."""
    order = pairs.similarity_K.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return Pairs(*(column.gather(-1, order) for column in pairs))


def centers(grid: Grid, size: tuple[float, float]) -> Tensor:
    """Return y and x (T, 2) of the centers of a grid of regions, in pixels of an image of `size` (height, width)."""
    y = (torch.arange(grid[0]) + 0.5) * size[0] / grid[0]
    x = (torch.arange(grid[1]) + 0.5) * size[1] / grid[1]
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)


def mirrored(grid: Grid) -> Tensor:
    """Return the index (T,) of each region after a horizontal flip."""
    return torch.arange(grid[0] * grid[1]).view(grid).flip(1).flatten()


class FlipScore(NamedTuple):
    """The published measure over a set of images."""

    images: int
    accuracy: float  # percent of the ten most similar pairs that are at the true position
    distance: float  # mean pixels between match and true position


def flip_sums(first: RegionFeatures, second: RegionFeatures, size: tuple[int, int], count: int) -> Tensor:
    """Return the sums (3,) over a batch of: images, share of correct pairs, mean distance of pairs in pixels."""
    pairs = top_pairs(nearest(first.regions_BTC, second.regions_BTC), count)
    truth = mirrored(first.grid).to(pairs.first_K.device)[pairs.first_K]
    position = centers(first.grid, size).to(truth.device)
    off = (position[pairs.second_K] - position[truth]).norm(dim=-1)
    hits = (pairs.second_K == truth).float()
    sums = (len(off), hits.mean(dim=1).double().sum().item(), off.mean(dim=1).double().sum().item())
    return torch.tensor(sums, dtype=torch.float64)


def flip_score(sums: Iterable[float]) -> FlipScore:
    """Return the score for sums over all batches."""
    images, hits, off = sums
    return FlipScore(int(images), 100 * hits / max(images, 1), off / max(images, 1))


@torch.no_grad()
def principal_colors(regions_TC: Tensor) -> Tensor:
    """Return the first three principal components of region features as RGB colors (T, 3) in 0..1; constant ones are 0.5.

    The sign of a component is chosen such that its largest entry is positive. The smallest and largest 2 % of its values are
    clipped, which keeps the contrast if there are outliers.
    """
    centered = regions_TC.double() - regions_TC.double().mean(dim=0)
    left, strength, _ = torch.linalg.svd(centered, full_matrices=False)
    components = F.pad(left * strength, (0, max(0, 3 - left.shape[1])))[:, :3]
    largest = components.gather(0, components.abs().argmax(dim=0, keepdim=True))
    components = components * torch.where(largest < 0, -1.0, 1.0)
    low, high = components.quantile(torch.tensor([CLIPPED, 1 - CLIPPED]).double(), dim=0)
    spread = high - low
    flat = spread <= 1e-6 * strength.max().clamp_min(1e-12)
    return torch.where(flat, 0.5, (components - low) / torch.where(flat, 1.0, spread)).clamp(0, 1).float()
