"""Stratified random sampling (SRS): attention pooling of patch tokens at given places of their grid.

One layer of self-attention whose queries are taken at the samples, between tokens where these lie between them, and whose residual
is taken there too. A query does not see the others, so samples of several crops go through together, stacked along S.

The patch level works with every backbone that gives regions; with hierarchical ones it is an extension, not UDI's own.

Shapes: B images, N = H' W' tokens, S samples, C channels.
Origin: UDI (Su and Ji, ECCV 2024).
"""

from __future__ import annotations

from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from models.base import Backbone, init_linear_weights
from ops.attention import attend, join_heads, split_heads
from ops.linear import Linear
from utils import UsageError

LayerNorm = partial(nn.LayerNorm, eps=1e-6)
PUBLISHED = {"norm1.": "norm.", "attn.norm.": "out_norm.", "attn.": ""}  # names of UDI's files, inside its `backbone.`


def bilinear_weights(target_BS2: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, S, N) weights of the four tokens around each place (row, column in tokens).

    The four are built on the device of `target_BS2`, from its coordinates alone; a place on the last row or column has its weight.
    """
    around = []
    for place_BS, side in zip(target_BS2.float().unbind(-1), grid):
        place_BS = place_BS.clamp(0, side - 1)
        low_BS = place_BS.long().clamp(max=max(side - 2, 0))
        upper_BS = place_BS - low_BS
        around.append(((low_BS, 1 - upper_BS), ((low_BS + 1).clamp(max=side - 1), upper_BS)))
    weights_BSN = torch.zeros(*target_BS2.shape[:-1], grid[0] * grid[1], device=target_BS2.device)
    for (rows, row_weights), (columns, column_weights) in product(*around):
        token = (rows * grid[1] + columns)[..., None]
        weights_BSN.scatter_add_(-1, token, (row_weights * column_weights)[..., None])
    return weights_BSN


def one_hot_weights(tokens_BS: Tensor, tokens: int) -> Tensor:
    """(B, S, N) weights of single tokens."""
    weights_BSN = torch.zeros(*tokens_BS.shape, tokens, device=tokens_BS.device)
    return weights_BSN.scatter_(-1, tokens_BS.long()[..., None], 1.0)


class SRS(nn.Module):
    """Patch tokens before the backbone's last norm to representations of samples.

    Args:
        dim: channels of the tokens.
        num_heads: of the attention, see `default_heads`.

    Raises:
        UsageError: heads that do not divide the channels.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise UsageError(f"--srs_heads {num_heads} must divide the {dim} channels of the backbone")
        self.num_heads = num_heads
        self.norm = LayerNorm(dim)
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        self.out_norm = LayerNorm(dim)
        self.apply(init_linear_weights)

    def forward(self, tokens_BNC: Tensor, weights_BSN: Tensor) -> Tensor:
        """(B, N, C) patch tokens, pooled by the weights of `bilinear_weights` or `one_hot_weights`, to (B, S, C)."""
        normed_BNC = self.norm(tokens_BNC)
        q, k, v = split_heads(self.qkv(normed_BNC), 3, self.num_heads)
        weights_BSN = weights_BSN.to(q.dtype)
        pooled, _ = attend(weights_BSN[:, None] @ q, k, v)
        return self.out_norm(self.proj(join_heads(pooled)) + weights_BSN @ normed_BNC)


def default_heads(backbone: Backbone) -> int:
    """Heads of the backbone's last attention, as UDI has it; one for 64 channels where it has none."""
    found = [getattr(module, "num_heads", None) for module in backbone.modules()]
    counts = [heads for heads in found if isinstance(heads, int)]
    return counts[-1] if counts else max(backbone.num_features // 64, 1)
