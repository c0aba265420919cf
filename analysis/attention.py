"""Attention of a block: the weights of a query by region, their entropy, and masks of the top mass.

The layout of attention maps is hidden by `Backbone.attention_plane` and `Backbone.valid_queries`.

Shapes: B images, H heads, W windows of an image, Q queries, N keys, h x w grid of regions, L blocks.
Origin: head-wise masks of DINO (Caron et al., ICCV 2021) section 4.2.2; entropy as in EsViT (Li et al., ICLR 2022).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models import Backbone
from models.base import BlockOutput
from utils import UsageError

MASKED_BELOW = 1e-30  # weights of masked keys, see block_uniform_entropy
UNIFORM = (
    0.9  # share of the regions that a head in effect attends to, 2 ** bits, from which its attention is called uniform
)


class HeadMaps(NamedTuple):
    """Attention of one query of one image, with heads in the order of increasing entropy."""

    planes_Hhw: Tensor  # attention weights
    masks_Hhw: Tensor  # bool: the fewest regions with the requested share of the attention
    entropies_H: Tensor  # bits
    heads: list[int]  # indices in the network
    block: int
    query_yx: tuple[int, int] | None  # region of the query; None: class or global token

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of regions."""
        return self.planes_Hhw.shape[1], self.planes_Hhw.shape[2]

    @property
    def regions(self) -> int:
        """Number of regions that the query can attend to."""
        return max(1, int((self.planes_Hhw.amax(dim=0) > MASKED_BELOW).sum()))

    @property
    def uniform_H(self) -> list[bool]:
        """Whether the attention of a head is spread over nearly all regions that it can attend to."""
        return (self.entropies_H.exp2() >= UNIFORM * self.regions).tolist()

    @property
    def window(self) -> tuple[int, int, int, int]:
        """Top, left, bottom and right (exclusive) of the regions with attention of any head."""
        weights_hw = self.planes_Hhw.amax(dim=0)
        attended = weights_hw > 1e-6 * weights_hw.max()  # masked weights may be as large as 1e-44
        if not attended.any():
            return 0, 0, weights_hw.shape[0], weights_hw.shape[1]
        rows, columns = (attended.any(dim=axis).nonzero().flatten().tolist() for axis in (1, 0))
        return rows[0], columns[0], rows[-1] + 1, columns[-1] + 1


def entropy_bits(weights: Tensor) -> Tensor:
    """Return the entropy over the last axis in bits, of weights normalized to sum 1; 0 where all are zero."""
    total = weights.sum(-1, keepdim=True)
    share = weights / torch.where(total > 0, total, 1.0)
    return -torch.special.xlogy(share, share).sum(-1) / torch.log(torch.tensor(2.0))


def keep_top_mass(weights: Tensor, share: float) -> Tensor:
    """Return a mask of the fewest entries of the last axis with at least `share` of its sum; ties by index."""
    ranked, order = weights.sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(-1) - ranked
    kept = (before < share * weights.sum(-1, keepdim=True)) & (ranked > 0)
    return torch.zeros_like(kept).scatter(-1, order, kept)


def check_attention(backbone: Backbone) -> None:
    """Raise UsageError if the network has no attention."""
    if not backbone.has_attention:
        raise UsageError(
            f"{type(backbone).__name__} has no attention to show; choose --vis_features or correspondences"
        )


def find_block(backbone: Backbone, number: int) -> int:
    """Return the index of a block given from the first (0) or from the last (-1).

    Raises:
        UsageError: no such block, or a network without attention.
    """
    check_attention(backbone)
    blocks = sum(backbone.stage_depths)
    if not -blocks <= number < blocks:
        raise UsageError(
            f"--block {number} does not exist; choose 0..{blocks - 1}, or -1 for the last of {blocks} blocks"
        )
    return number % blocks


def region_at(point: tuple[float, float], size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """Return row and column of the region at a point (x, y) of an image of `size` (height, width).

    Raises:
        UsageError: the point is outside.
    """
    x, y = point
    if not (0 <= x < size[1] and 0 <= y < size[0]):
        raise UsageError(
            f"--query {x:g} {y:g} is outside the image of {size[1]} x {size[0]} pixels; choose a pixel inside"
        )
    return int(y * grid[0] / size[0]), int(x * grid[1] / size[1])


@torch.no_grad()
def head_maps(
    backbone: Backbone,
    image_1CHW: Tensor,
    block: int,
    share: float,
    point: tuple[float, float] | None = None,
    size: tuple[int, int] | None = None,
) -> HeadMaps:
    """Return the attention of a query in a block by head.

    Args:
        block: index of the block.
        share: of the attention that the masks keep.
        point: x and y of the query in an image of `size` (height, width); None: the class or global token if the block has
            attention of it, else the center.

    Raises:
        UsageError: the point is outside the image.
    """
    output = backbone.forward_blocks(image_1CHW, sum(backbone.stage_depths) - block, attention=True)[0]
    query: tuple[int, int] | None = None
    if point is not None:
        query = region_at(point, size or (image_1CHW.shape[2], image_1CHW.shape[3]), output.grid)
    elif not backbone.has_class_query(output):
        query = output.grid[0] // 2, output.grid[1] // 2
    planes_Hhw = backbone.attention_plane(output, query)[0].float().cpu()
    flat_HN = planes_Hhw.flatten(1)
    entropies_H = entropy_bits(flat_HN)
    heads = entropies_H.argsort(stable=True)
    masks = keep_top_mass(flat_HN, share).view_as(planes_Hhw)
    return HeadMaps(planes_Hhw[heads], masks[heads], entropies_H[heads], heads.tolist(), block, query)


def mean_over_queries(backbone: Backbone, output: BlockOutput, rows_WHQ: Tensor) -> Tensor:
    """Return the mean (B, H) of values of each query (windows of all images, H, Q), without queries that are padding."""
    real_WQ = backbone.valid_queries(output).to(rows_WHQ.device)
    rows_BWHQ = rows_WHQ.unflatten(0, (output.tokens_BNC.shape[0], -1))
    return (rows_BWHQ * real_WQ[:, None]).sum(dim=(1, 3)) / real_WQ.sum()


def block_entropy(backbone: Backbone, output: BlockOutput) -> Tensor:
    """Return the mean entropy (B, H) of the attention of a block in bits."""
    assert output.attention is not None
    return mean_over_queries(backbone, output, entropy_bits(output.attention.float()))


def block_uniform_entropy(backbone: Backbone, output: BlockOutput) -> Tensor:
    """Return the mean entropy (B, H) in bits of uniform attention over the keys that a block does not mask.

    Masked keys have weights of 0, or of exp(-100) in shifted windows. In a blank image all tokens are alike and the other weights
    are far larger. Padding that a network does not mask is counted.
    """
    assert output.attention is not None
    visible_WHQ = (output.attention > MASKED_BELOW).sum(dim=-1)
    return mean_over_queries(backbone, output, visible_WHQ.float().log2())


@torch.no_grad()
def measure_blocks(
    backbone: Backbone, images_BCHW: Tensor, measure: Callable[[Backbone, BlockOutput], Tensor]
) -> list[Tensor]:
    """Return `measure` of each block; attention maps of one block are in memory at a time."""
    found: list[Tensor] = []
    x: Any = images_BCHW
    for stage in range(len(backbone.stage_depths)):
        x = backbone.enter_stage(stage, x)
        for block in backbone.stage_blocks(stage):
            x, maps = backbone.call_block(block, x, True)
            found.append(measure(backbone, BlockOutput(*backbone.tokens(x), maps, len(found))))
            del maps
    return found


def entropies(backbone: Backbone, images_BCHW: Tensor) -> list[Tensor]:
    """Return the mean entropy (B, H) of the attention of each block in bits."""
    return measure_blocks(backbone, images_BCHW, block_entropy)


def uniform_entropies(backbone: Backbone, blank_1CHW: Tensor) -> list[list[float]]:
    """Return the entropy of uniform attention, the maximum, by block and head in bits, for images of the size of `blank_1CHW`."""
    return [bits_BH[0].tolist() for bits_BH in measure_blocks(backbone, blank_1CHW, block_uniform_entropy)]
