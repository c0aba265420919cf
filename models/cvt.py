"""Convolutional vision transformer (CvT): convolutional embeddings, and attention in windows of convolutional projections.

State-dict keys and numbers are those of the EsViT network (golden file cvt_tiny); any image size goes in, square or not.
Beyond the published network, by yaml keys: windows shifted in every second block, a relative position bias, another stem.

Shapes: B images, H x W token grid, C channels, N tokens of a window.
Origin: CvT (Wu et al., ICCV 2021) as EsViT (Li et al., ICLR 2022) changed it: attention in windows (Swin Transformer, Liu et al.,
ICCV 2021), logits scaled by the whole width, one projection for queries, keys and values. The 1x1 convolutions are computed
as linear layers on channels-last tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, LayerNormFp32, QuickGELU
from torch import Tensor, nn
from yacs.config import CfgNode

from models.base import Backbone, BlockOutput, Tokens, drop_path_rates, grid_tokens
from models.registry import register
from ops.attention import attend, drop_rate, join_heads, pairwise_bias, split_heads
from ops.linear import linear
from ops.mlp import activated_linear
from ops.windows import (
    WindowPartition,
    join_windows,
    pad_to_windows,
    partition_windows,
    relative_position_index,
    shift_mask,
)
from utils import UsageError

LayerNorm = partial(LayerNormFp32, eps=1e-5)
CONFIGS = "experiments/imagenet/cvt_v4/{}.yaml"
RES_STEM_STRIDE = 4


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution, by its weight's shape, of channels-last tokens (B, H, W, C)."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1, bias=bias)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, C')."""
        return linear(x_BHWC, self.weight.flatten(1), self.bias)


class QKVProjection(nn.Module):
    """Queries, keys and values of a grid: a depth-wise 3x3 convolution, BatchNorm, a point-wise convolution."""

    def __init__(self, dim: int, bias: bool) -> None:
        super().__init__()
        self.dw = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim, bias=False)
        self.bn = nn.BatchNorm2d(dim)
        self.pw = PointwiseConv(dim, 3 * dim, bias)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, 3 C)."""
        return self.pw(self.bn(self.dw(x_BHWC.permute(0, 3, 1, 2))).permute(0, 2, 3, 1))


class ConvAttention(nn.Module):
    """Multi-head self-attention in windows of a grid (B, H, W, C).

    The window shrinks to the shorter side of the grid at hand. The grid is padded with zeros to whole windows before the
    projection, and what is padded is attended to like any token.

    Args:
        dim, num_heads: channels, and heads that share them.
        window: side of the largest window.
        shifts: shift the windows by half their side, where the grid is longer than one both ways, and mask what the shift
            brings together; the reference masks that way without shifting.
        drop_path: rate of stochastic depth.
        spec: the keys of `config.SPECS["cvt_v4_transformer"]`.
    """

    relative_position_index: Tensor

    def __init__(self, dim: int, num_heads: int, window: int, shifts: bool, drop_path: float, spec: CfgNode) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.shifts = shifts
        self.scale = dim**-0.5  # of the whole width, as published, not of a head
        self.attn_drop = spec.ATTN_DROP_RATE
        self.qkv = QKVProjection(dim, spec.QKV_BIAS)
        self.proj_out = PointwiseConv(dim, dim)
        self.drop = residual_drop(drop_path, spec)
        self.relative_position_bias_table: nn.Parameter | None = None
        if spec.REL_POS_EMBED:
            self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
            self.register_buffer("relative_position_index", relative_position_index(window), persistent=False)
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x_BHWC: Tensor, attention: bool = False) -> tuple[Tensor, Tensor | None]:
        """Attend in windows: (B, H, W, C) to the same, with the maps (B * windows, heads, N, N) if asked for."""
        grid = (x_BHWC.shape[1], x_BHWC.shape[2])
        cut = self.cut_of(grid)
        qkv = self.qkv(pad_to_windows(x_BHWC, cut.window))
        mask = None
        if cut.shift:
            mask = shift_mask((qkv.shape[1], qkv.shape[2]), cut.window, cut.shift, qkv.device)
        windows, maps = self.attend_windows(partition_windows(qkv, cut), self.bias(cut.window, mask), attention)
        return self.drop(self.proj_out(join_windows(windows, cut, grid))), maps

    def cut_of(self, grid: tuple[int, int]) -> WindowPartition:
        """The window and the shift for a grid."""
        window = min(self.window, *grid)
        return WindowPartition(window, window // 2 if self.shifts and window < min(grid) else 0)

    def bias(self, window: int, mask: Tensor | None) -> Tensor | None:
        """What is added to the logits, (1 or windows, heads, N, N): relative position bias, shift mask, both, or nothing.

        An offset keeps its bias in every window: a smaller one uses the part of the table that its offsets reach, which are
        those of the upper left corner of the full window.
        """
        bias = None if mask is None else mask.unsqueeze(1).expand(-1, self.num_heads, -1, -1)
        if self.relative_position_bias_table is None:
            return bias
        corner = self.relative_position_index.view((self.window,) * 4)[:window, :window, :window, :window]
        relative = pairwise_bias(self.relative_position_bias_table, corner.reshape(window**2, window**2)).unsqueeze(0)
        return relative if bias is None else relative + bias

    def attend_windows(self, qkv: Tensor, bias: Tensor | None, attention: bool) -> tuple[Tensor, Tensor | None]:
        """Attention inside windows: (B * windows, N, 3 C) to (B * windows, N, C), and the maps if asked for."""
        if bias is not None:  # the windows of an image become an axis: one bias serves all images without a copy
            qkv = qkv.unflatten(0, (-1, len(bias)))
        q, k, v = split_heads(qkv, 3, self.num_heads)
        dropout = drop_rate(self, self.attn_drop)
        x, maps = attend(q, k, v, bias=bias, scale=self.scale, dropout=dropout, attention=attention)
        x = join_heads(x)
        if bias is None:
            return x, maps
        return x.flatten(0, 1), None if maps is None else maps.flatten(0, 1)


class FeedForward(nn.Module):
    """Two 1x1 convolutions with QuickGELU between them."""

    def __init__(self, dim: int, hidden: int, drop_path: float, spec: CfgNode) -> None:
        super().__init__()
        self.net = nn.Sequential(
            PointwiseConv(dim, hidden), QuickGELU(), PointwiseConv(hidden, dim), residual_drop(drop_path, spec)
        )

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """(B, H, W, C) to the same shape."""
        enter, activation, leave, drop = self.net
        assert isinstance(leave, PointwiseConv)
        return drop(activated_linear(enter(x_BHWC), activation, leave.weight.flatten(1), leave.bias))


class PreNorm(nn.Module):
    """A norm, and a function of what it normalized."""

    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = LayerNorm(dim)
        self.fn = fn

    def forward(self, x_BHWC: Tensor, *args: bool) -> Any:
        """What the function makes of the normalized tokens."""
        return self.fn(self.norm(x_BHWC), *args)


class CvTBlock(nn.ModuleList):
    """The pre-norm block as the published keys nest it: attention at 0, MLP at 1; tokens are (B, H, W, C)."""

    def __init__(self, attn: ConvAttention, mlp: FeedForward, dim: int) -> None:
        super().__init__([PreNorm(dim, attn), PreNorm(dim, mlp)])

    def forward(self, x_BHWC: Tensor, attention: bool = False) -> tuple[Tensor, Tensor | None]:
        """x to the same shape, and the attention maps if asked for."""
        attn, mlp = self
        attended, maps = attn(x_BHWC, attention)
        x = x_BHWC + attended
        return x + mlp(x), maps


def residual_drop(drop_path: float, spec: CfgNode) -> nn.Module:
    """What training does to a residual before it is added: dropout and stochastic depth."""
    return nn.Sequential(nn.Dropout(spec.DROP_RATE), DropPath(drop_path))


class ResStem(nn.Module):
    """The way into the first stage with RES_STEM: three 3x3 convolutions, each with BatchNorm and ReLU."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels, stride in ((in_channels, 2), (dim, 1), (dim, 2)):
            layers += [nn.Conv2d(channels, dim, 3, stride, 1, bias=False), nn.BatchNorm2d(dim), nn.ReLU()]
        self.stem = nn.Sequential(*layers)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to (B, ceil(H / 4), ceil(W / 4), dim)."""
        return self.stem(x_BCHW).permute(0, 2, 3, 1)


class ConvEmbed(nn.Module):
    """The way into a stage: a strided convolution, then a norm over the channels."""

    def __init__(self, in_channels: int, dim: int, patch_size: int, stride: int, padding: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride, padding)
        self.norm = LayerNorm(dim)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) to (B, H', W', dim)."""
        return self.norm(self.proj(x_BCHW).permute(0, 2, 3, 1))


class CvTStage(nn.Module):
    """The blocks of one resolution."""

    def __init__(self, blocks: Sequence[CvTBlock]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)


class CvT(Backbone):
    """CvT as a backbone of the common contract.

    Args:
        spec: the keys of `config.SPECS["cvt_v4_transformer"]`; with RES_STEM the first of PATCH_SIZE and PATCH_PADDING is unused.
        dense: as in `Backbone`.

    Raises:
        UsageError: a stage list of another length than DEPTHS, heads that do not divide the width, or a patch stride that the
            stem of RES_STEM does not have.
    """

    def __init__(self, spec: CfgNode, dense: bool = False) -> None:
        super().__init__(dense)
        self._check(spec)
        self.patch_size = spec.PATCH_STRIDE[0]
        self.stage_depths = tuple(spec.DEPTHS)
        self.stage_dims = tuple(spec.DIM_EMBED)
        drop_paths = drop_path_rates(spec.DROP_PATH_RATE, spec.DEPTHS)
        in_channels = spec.IN_CHANS
        for i, dim in enumerate(self.stage_dims):
            embed: nn.Module
            if spec.RES_STEM and i == 0:
                embed = ResStem(in_channels, dim)
            else:
                embed = ConvEmbed(in_channels, dim, spec.PATCH_SIZE[i], spec.PATCH_STRIDE[i], spec.PATCH_PADDING[i])
            blocks = []
            for j, drop_path in enumerate(drop_paths[i]):
                shifts = spec.SHIFT and j % 2 == 1
                attn = ConvAttention(dim, spec.NUM_HEADS[i], spec.WINDOW_SIZE[i], shifts, drop_path, spec)
                blocks.append(CvTBlock(attn, FeedForward(dim, int(dim * spec.MLP_RATIO[i]), drop_path, spec), dim))
            self.add_module(f"stage{i}", nn.Sequential(embed, CvTStage(blocks)))
            in_channels = dim
        self.norm = LayerNorm(self.num_features)
        self.apply(init_conv_weights)

    def _check(self, spec: CfgNode) -> None:
        stages = len(spec.DEPTHS)
        if spec.NUM_STAGES not in (0, stages):
            raise UsageError(
                f"MODEL.SPEC.NUM_STAGES {spec.NUM_STAGES} must be the number of entries of DEPTHS {spec.DEPTHS}"
            )
        for key, value in spec.items():
            if isinstance(value, list) and len(value) != stages:
                raise UsageError(f"MODEL.SPEC.{key} {value} must have one entry for each of DEPTHS {spec.DEPTHS}")
        for dim, num_heads in zip(spec.DIM_EMBED, spec.NUM_HEADS):
            if dim % num_heads:
                raise UsageError(f"MODEL.SPEC.NUM_HEADS {num_heads} must divide the {dim} channels of its stage")
        if spec.RES_STEM and spec.PATCH_STRIDE[0] != RES_STEM_STRIDE:
            raise UsageError(
                f"MODEL.SPEC.RES_STEM True has stride {RES_STEM_STRIDE}; set the first of PATCH_STRIDE {spec.PATCH_STRIDE} to it"
            )

    def enter_stage(self, stage: int, x: Tensor) -> Tensor:
        """Images (B, C, H, W), or the tokens of the stage before, to tokens (B, H', W', C')."""
        return getattr(self, f"stage{stage}")[0](x if stage == 0 else x.permute(0, 3, 1, 2))

    def stage_blocks(self, stage: int) -> Sequence[nn.Module]:
        """See `Backbone.stage_blocks`."""
        return getattr(self, f"stage{stage}")[1].layers

    def tokens(self, x_BHWC: Tensor) -> Tokens:
        """See `Backbone.tokens`."""
        return grid_tokens(x_BHWC)

    def cut_of(self, output: BlockOutput) -> WindowPartition:
        """See `Backbone.cut_of`."""
        return self.block_at(output.block)[0].fn.cut_of(output.grid)


def init_conv_weights(module: nn.Module) -> None:
    """Convolutions start from a truncated normal of deviation 0.02 with zero bias; for `nn.Module.apply`."""
    if isinstance(module, nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@register(
    {"cvt_tiny": CONFIGS.format("s1"), "cvt_small": CONFIGS.format("s3"), "cvt": None}, config_name="cvt_v4_transformer"
)
def build_cvt(arch: str, config: CfgNode, *, dense: bool, patch_size: int) -> CvT:
    """CvT from a config, whose patch sizes count."""
    return CvT(config.MODEL.SPEC, dense)
