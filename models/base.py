"""The contract of a backbone: what every architecture gives its callers, written once.

An architecture supplies `forward_blocks` (its stages), `norm`, `stage_dims` and `stage_depths`. From these this class makes
view and region features, the features of a linear probe, attention maps and multi-crop batching. The heads are attributes
`head` and `head_dense`, so state-dict keys are the published ones.

Shapes: B images, V views, T regions of a view, K prototypes, C channels, N tokens.
Origin: EsViT (Li et al., ICLR 2022) sections 3.1-3.2; method names follow microsoft/esvit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from outputs import MultiCropOutput


class BlockOutput(NamedTuple):
    """What one block leaves behind."""

    tokens_BNC: Tensor
    grid: tuple[int, int]  # height and width that the tokens without prefix tokens fill
    attention: Tensor | None  # (B * windows, heads, N, N), when asked for


class Features(NamedTuple):
    """Normalised features of the last stage."""

    view_BC: Tensor
    regions_BTC: Tensor


class Backbone(nn.Module, ABC):
    """A multi-stage (or plain) vision backbone under the common contract.

    Attributes:
        dense: whether region outputs are wanted, with `head_dense` beside `head`.
        head, head_dense: empty (`nn.Identity`) until a method sets them; `head_dense` is None unless dense.
        stage_dims, stage_depths: channels and number of blocks of each stage.
        num_prefix_tokens: tokens before the regions (class or global tokens).
        norm: the norm of the last stage's tokens.
        grad_checkpointing: recompute blocks in the backward instead of keeping their activations.
    """

    stage_dims: tuple[int, ...]
    stage_depths: tuple[int, ...]
    num_prefix_tokens: int = 0
    norm: nn.Module

    def __init__(self, dense: bool = False) -> None:
        super().__init__()
        self.dense = dense
        self.head: nn.Module = nn.Identity()
        self.head_dense: nn.Module | None = nn.Identity() if dense else None
        self.grad_checkpointing = False

    @abstractmethod
    def forward_blocks(self, x_BCHW: Tensor, n: int = 1, attention: bool = False) -> list[BlockOutput]:
        """Outputs of the last `n` blocks in order, before the final norm, with attention maps if asked for."""

    @property
    def num_features(self) -> int:
        """Channels of the view and region features."""
        return self.stage_dims[-1]

    def pool(self, tokens_BNC: Tensor) -> Tensor:
        """The view feature (B, C) of a block's tokens: their mean, unless an architecture says otherwise."""
        return tokens_BNC.mean(dim=1)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that supervised fine-tuning keeps out of weight decay."""
        return set()

    def run_block(self, block: nn.Module, *inputs: object) -> Tensor:
        """Call a block, through activation checkpointing when that is on and gradients are wanted."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    # ----------------------------------------------------------------- features

    def forward_features(self, x_BCHW: Tensor) -> Features:
        """View feature and region features of one batch of equally sized images."""
        tokens_BNC = self.norm(self.forward_blocks(x_BCHW)[-1].tokens_BNC)
        return Features(self.pool(tokens_BNC), tokens_BNC[:, self.num_prefix_tokens :])

    def forward_feature_maps(self, x_BCHW: Tensor) -> Tensor:
        """Region features put back on the image plane: (B, C, H', W')."""
        block = self.forward_blocks(x_BCHW)[-1]
        regions_BTC = self.norm(block.tokens_BNC)[:, self.num_prefix_tokens :]
        return regions_BTC.transpose(1, 2).unflatten(2, block.grid)

    def forward_return_n_last_blocks(self, x_BCHW: Tensor, n: int, return_patch_avgpool: bool = False) -> Tensor:
        """Features of the linear probe (EsViT section 4.1): the pooled token of each of the last `n` blocks, concatenated.

        The final norm is applied to the blocks of the last stage only, whose width it has.
        `return_patch_avgpool` appends the mean region of the last block, for networks whose pooled token is another one.

        Raises:
            ValueError: `n` outside 1 .. number of blocks.
        """
        if not 1 <= n <= sum(self.stage_depths):
            raise ValueError(f"n_last_blocks {n} is outside 1..{sum(self.stage_depths)}, the blocks of this network")
        blocks = self.forward_blocks(x_BCHW, n)
        first_of_last_stage = n - self.stage_depths[-1]
        tokens = [self.norm(b.tokens_BNC) if i >= first_of_last_stage else b.tokens_BNC for i, b in enumerate(blocks)]
        pooled = [self.pool(tokens_BNC) for tokens_BNC in tokens]
        if return_patch_avgpool:
            pooled.append(tokens[-1][:, self.num_prefix_tokens :].mean(dim=1))
        return torch.cat(pooled, dim=-1)

    def forward_selfattention(self, x_BCHW: Tensor, n: int = 1) -> Tensor | list[Tensor]:
        """Attention maps after the softmax, (B * windows, heads, N, N): of the last block, or a list of the last `n`."""
        maps = [block.attention for block in self.forward_blocks(x_BCHW, n, attention=True)]
        found = [m for m in maps if m is not None]
        return found[-1] if n == 1 else found

    # ----------------------------------------------------------------- multi-crop

    def forward(self, crops: Tensor | Sequence[Tensor]) -> Tensor | MultiCropOutput:
        """View output of one batch, or of a list of crops in its order.

        Args:
            crops: (B, C, H, W), or a list of such tensors; neighbours of one size go through the stages together.

        Returns:
            for a tensor, or a network that is not dense: `head(view features)`, (V * B, K), or (V * B, C) while the head is
            empty; for a list and a dense network: `MultiCropOutput`.
        """
        if isinstance(crops, Tensor):
            return self.head(self.forward_features(crops).view_BC)
        groups = [list(group) for _, group in groupby(crops, key=lambda crop: crop.shape[-2:])]
        features = [self.forward_features(torch.cat(group)) for group in groups]
        view_logits = self.head(torch.cat([f.view_BC for f in features]))
        if self.head_dense is None:
            return view_logits
        region_features = torch.cat([f.regions_BTC.flatten(0, 1) for f in features])
        regions_per_view = tuple(f.regions_BTC.shape[1] for f, group in zip(features, groups) for _ in group)
        return MultiCropOutput(view_logits, self.head_dense(region_features), region_features, regions_per_view)
