"""Attention of a block as numbers: planes of a query, their entropy, the regions that hold most of the mass.

Which layout the maps of a network have is the network's business: `Backbone.attention_plane` and `Backbone.valid_queries`.

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

HIDDEN_BELOW = 1e-30  # weight of a key that a mask hides, see block_uniform_bits


class HeadMaps(NamedTuple):
    """Where one query of one image looks, heads in the order of their entropy, most focused first."""

    planes_Hhw: Tensor  # attention weights
    masks_Hhw: Tensor  # bool: the fewest regions that hold the asked share of the plane's mass
    entropies_H: Tensor  # bits
    heads: list[int]  # their numbers in the network
    block: int
    query_yx: tuple[int, int] | None  # region that looks; None: class or global token

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of regions."""
        return self.planes_Hhw.shape[1], self.planes_Hhw.shape[2]

    @property
    def seen(self) -> tuple[int, int, int, int]:
        """Top, left, bottom and right (the last two not included) of the regions that any head looks at: the query's window."""
        weights_hw = self.planes_Hhw.amax(dim=0)
        looked_at = weights_hw > 1e-6 * weights_hw.max()  # what a mask shuts out may be as much as 1e-44
        if not looked_at.any():
            return 0, 0, weights_hw.shape[0], weights_hw.shape[1]
        rows, columns = (looked_at.any(dim=axis).nonzero().flatten().tolist() for axis in (1, 0))
        return rows[0], columns[0], rows[-1] + 1, columns[-1] + 1


def entropy_bits(weights: Tensor) -> Tensor:
    """Entropy in bits over the last axis, of weights that are scaled to sum to 1; 0 where all are zero."""
    share = scaled(weights)
    return -torch.special.xlogy(share, share).sum(-1) / torch.log(torch.tensor(2.0))


def scaled(weights: Tensor) -> Tensor:
    """Weights over the last axis that sum to 1, or stay zero where all are."""
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, torch.ones_like(total))


def keep_top_mass(weights: Tensor, share: float) -> Tensor:
    """Which entries of the last axis are the fewest that together hold at least `share` of its sum; none where all are zero.

    Entries of equal weight count in the order in which they stand.
    """
    ranked, order = weights.sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(-1) - ranked
    wanted = (before < share * weights.sum(-1, keepdim=True)) & (ranked > 0)
    return torch.zeros_like(wanted).scatter(-1, order, wanted)


def check_attention(backbone: Backbone) -> None:
    """Stop on a network that has no attention.

    Raises:
        UsageError: naming what can be shown of it.
    """
    if not backbone.has_attention:
        raise UsageError(
            f"{type(backbone).__name__} has no attention to show; choose --vis_features or correspondences"
        )


def find_block(backbone: Backbone, number: int) -> int:
    """A block's number counted from the first one, of one that may count from the last (-1).

    Raises:
        UsageError: a network without attention, or no such block.
    """
    check_attention(backbone)
    blocks = sum(backbone.stage_depths)
    if not -blocks <= number < blocks:
        raise UsageError(
            f"--block {number} is not there; choose 0..{blocks - 1}, or -1 for the last of {blocks} blocks"
        )
    return number % blocks


def region_at(point: tuple[float, float], size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """Row and column of the region that covers a point (x, y) of an image of `size` (height, width).

    Raises:
        UsageError: the point is outside.
    """
    x, y = point
    if not (0 <= x < size[1] and 0 <= y < size[0]):
        raise UsageError(f"--query {x:g} {y:g} is outside the image, which is {size[1]} pixels wide and {size[0]} high")
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
    """Where a query looks in a block, head by head.

    Args:
        block: counted from the first.
        share: of the mass that the masks keep.
        point: x and y of the query in an image of `size` (height, width); None: the class or global token where the block
            has maps of it, else the center.

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
    """(B, H) the mean of what each row of a block's maps gave (windows of all images, H, Q); rows of padding do not count."""
    real_WQ = backbone.valid_queries(output).to(rows_WHQ.device)
    rows_BWHQ = rows_WHQ.unflatten(0, (output.tokens_BNC.shape[0], -1))
    return (rows_BWHQ * real_WQ[:, None]).sum(dim=(1, 3)) / real_WQ.sum()


def block_entropy(backbone: Backbone, output: BlockOutput) -> Tensor:
    """Mean entropy (B, H) in bits of the attention of a block's tokens."""
    assert output.attention is not None
    return mean_over_queries(backbone, output, entropy_bits(output.attention.float()))


def block_uniform_bits(backbone: Backbone, output: BlockOutput) -> Tensor:
    """(B, H) the entropy that a block's attention would have if each token looked evenly at all that it sees.

    Keys that a mask hides have weights of 0, or of exp(-100) where shifted windows meet; what is seen is far above both in the
    maps of a blank image, whose tokens are alike. Padding that a network lets be seen counts as seen.
    """
    assert output.attention is not None
    seen_WHQ = (output.attention > HIDDEN_BELOW).sum(dim=-1)
    return mean_over_queries(backbone, output, seen_WHQ.float().log2())


@torch.no_grad()
def of_each_block(
    backbone: Backbone, images_BCHW: Tensor, measure: Callable[[Backbone, BlockOutput], Tensor]
) -> list[Tensor]:
    """What `measure` gives for each block; maps of a block are let go before the next one makes its own."""
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
    """For each block the mean entropy (B, H) in bits of its heads' attention."""
    return of_each_block(backbone, images_BCHW, block_entropy)


def uniform_bits(backbone: Backbone, blank_1CHW: Tensor) -> list[list[float]]:
    """For each block and head the entropy of attention that is spread evenly, on images of this size: none can have more."""
    return [bits_BH[0].tolist() for bits_BH in of_each_block(backbone, blank_1CHW, block_uniform_bits)]
