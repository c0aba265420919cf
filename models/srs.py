"""Attention pooling for the stratified random sampling (SRS) of UDI (Su and Ji, ECCV 2024).

One layer of self-attention with queries and residuals interpolated at sampled positions of the token grid. Queries are independent
of each other, so samples of several crops can be stacked along S. It accepts the regions of any backbone; UDI itself uses ViT.

Shapes: B images, N = H' W' tokens, S samples, C channels.
"""

from __future__ import annotations

from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from models.base import Backbone, init_linear_weights
from ops.attention import attend, join_heads, split_heads
from utils import UsageError

LayerNorm = partial(nn.LayerNorm, eps=1e-6)
PUBLISHED = {"norm1.": "norm.", "attn.norm.": "out_norm.", "attn.": ""}  # prefixes in UDI's files, below `backbone.`


def bilinear_weights(target_BS2: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the weights (B, S, N) of bilinear interpolation at positions (row, column) in units of tokens."""
    neighbors = []
    for position_BS, side in zip(target_BS2.float().unbind(-1), grid):
        position_BS = position_BS.clamp(0, side - 1)
        low_BS = position_BS.long().clamp(max=max(side - 2, 0))
        fraction_BS = position_BS - low_BS
        neighbors.append(((low_BS, 1 - fraction_BS), ((low_BS + 1).clamp(max=side - 1), fraction_BS)))
    weights_BSN = torch.zeros(*target_BS2.shape[:-1], grid[0] * grid[1], device=target_BS2.device)
    for (rows, row_weights), (columns, column_weights) in product(*neighbors):
        token = (rows * grid[1] + columns)[..., None]
        weights_BSN.scatter_add_(-1, token, (row_weights * column_weights)[..., None])
    return weights_BSN


def one_hot_weights(tokens_BS: Tensor, tokens: int) -> Tensor:
    """Return the weights (B, S, N) that select single tokens."""
    weights_BSN = torch.zeros(*tokens_BS.shape, tokens, device=tokens_BS.device)
    return weights_BSN.scatter_(-1, tokens_BS.long()[..., None], 1.0)


class SRS(nn.Module):
    """Pool patch tokens, taken before the final norm of the backbone, at samples.

    Args:
        dim: channels of the tokens.
        num_heads: attention heads, see `default_heads`.

    Raises:
        UsageError: `num_heads` does not divide `dim`.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise UsageError(f"--srs_heads {num_heads} must divide the {dim} channels of the backbone")
        self.num_heads = num_heads
        self.norm = LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.out_norm = LayerNorm(dim)
        self.apply(init_linear_weights)

    def forward(self, tokens_BNC: Tensor, weights_BSN: Tensor) -> Tensor:
        """Pool patch tokens (B, N, C) with the weights of `bilinear_weights` or `one_hot_weights` to (B, S, C)."""
        normed_BNC = self.norm(tokens_BNC)
        q, k, v = split_heads(self.qkv(normed_BNC), 3, self.num_heads)
        weights_BSN = weights_BSN.to(q.dtype)
        pooled, _ = attend(weights_BSN[:, None] @ q, k, v)
        return self.out_norm(self.proj(join_heads(pooled)) + weights_BSN @ normed_BNC)


def default_heads(backbone: Backbone) -> int:
    """Return the number of heads of the backbone's last attention, as in UDI; one per 64 channels without attention."""
    found = (getattr(module, "num_heads", None) for module in backbone.modules())
    counts = [heads for heads in found if isinstance(heads, int)]
    return counts[-1] if counts else max(backbone.num_features // 64, 1)
