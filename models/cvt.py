"""CvT (Wu et al., ICCV 2021) in the variant of EsViT (Li et al., ICLR 2022): convolutional embeddings, and window attention with
convolutional projections.

State-dict keys and outputs agree with microsoft/esvit (golden file cvt_tiny): logits are scaled by the full width, and queries,
keys and values share one projection. Options of the yaml add shifted windows, a relative position bias and another stem. Any
image size is accepted. 1x1 convolutions are computed as linear layers on channels-last tokens.

Shapes: B images, H x W token grid, C channels, N tokens of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNormFp32, QuickGELU
from torch import Tensor, nn
from yacs.config import CfgNode

from config.ranges import integer
from config.schema import ArchSpec
from models.base import Backbone, BlockOutput, Tokens, drop_path_rates, grid_tokens
from models.huggingface import HubModel
from models.interop import State
from models.registry import register
from ops.attention import attend, drop_rate, pad_keys, pairwise_bias
from ops.mlp import activated_linear
from ops.windows import (
    WindowPartition,
    join_window_heads,
    pad_to_windows,
    partition_heads,
    relative_position_index,
    shift_mask,
)
from utils import UsageError

LayerNorm = partial(LayerNormFp32, eps=1e-5)
CONFIGS = "experiments/imagenet/cvt_v4/{}.yaml"
RES_STEM_STRIDE = 4

SPEC = ArchSpec(
    "cvt_v4_transformer",
    {
        "IN_CHANS": 3,
        "NUM_STAGES": 0,  # 0: the length of DEPTHS
        "PATCH_SIZE": [7, 3, 3, 3],
        "PATCH_STRIDE": [4, 2, 2, 2],
        "PATCH_PADDING": [2, 1, 1, 1],
        "DIM_EMBED": [64, 192, 384, 768],
        "DEPTHS": [2, 2, 6, 2],
        "NUM_HEADS": [1, 3, 6, 12],
        "WINDOW_SIZE": [7, 7, 7, 7],
        "MLP_RATIO": [4.0, 4.0, 4.0, 4.0],
        "QKV_BIAS": True,
        "SHIFT": False,
        "REL_POS_EMBED": False,
        "RES_STEM": False,
        "DROP_RATE": 0.0,
        "ATTN_DROP_RATE": 0.0,
        "DROP_PATH_RATE": 0.1,
    },
    ranges={"NUM_STAGES": integer(0, 100), "PATCH_STRIDE": integer(1, 1024), "PATCH_PADDING": integer(0, 1024)},
    name_aliases=("cls_cvt_v4",),
    key_aliases={"MODEL.SPEC.DEPTH": "MODEL.SPEC.DEPTHS"},
    fixed_choices={
        "MODEL.SPEC.INIT": ("trunc_norm",),
        "MODEL.SPEC.CLS_TOKEN": (False,),
        "MODEL.SPEC.POS_EMBED": (False,),
        "MODEL.SPEC.QKV_PROJ_METHOD": ("dw_bn",),
        "MODEL.SPEC.KERNEL_QKV": (3,),
        "MODEL.SPEC.PADDING_QKV": (1,),
        "MODEL.SPEC.STRIDE_QKV": (1,),
        "MODEL.SPEC.PADDING_KV": (1,),
        "MODEL.SPEC.STRIDE_KV": (1,),
        "MODEL.SPEC.PADDING_Q": (1,),
        "MODEL.SPEC.STRIDE_Q": (1,),
        "MODEL.SPEC.NORM": ("layernorm", "layer_norm", "LayerNorm", "ln"),
        "MODEL.SPEC.ACT": ("quick_gelu", "quickgelu", "QuickGELU"),
    },
    per_stage=True,
)


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution of channels-last tokens (B, H, W, C)."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1, bias=bias)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return F.linear(x_BHWC, self.weight.flatten(1), self.bias)


class QKVProjection(nn.Module):
    """Project (B, H, W, C) to queries, keys and values (B, H, W, 3 C): depth-wise 3x3 convolution, BatchNorm, 1x1 convolution."""

    def __init__(self, dim: int, bias: bool) -> None:
        super().__init__()
        self.dw = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim, bias=False)
        self.bn = nn.BatchNorm2d(dim)
        self.pw = PointwiseConv(dim, 3 * dim, bias)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return self.pw(self.bn(self.dw(x_BHWC.permute(0, 3, 1, 2))).permute(0, 2, 3, 1))


class ConvAttention(nn.Module):
    """Multi-head self-attention in windows of a grid (B, H, W, C).

    The window shrinks to the shorter side of the grid. The grid is zero-padded to whole windows before the projection, and padding
    is attended to like any other token.

    Args:
        dim, num_heads: channels, and number of heads.
        window: maximum side of a window.
        shifts: shift windows by half their side if both sides of the grid are larger than one, and mask attention across borders;
            microsoft/esvit applies the mask without shifting.
        drop_path: rate of stochastic depth.
        spec: MODEL.SPEC, with the keys of `SPEC`.
    """

    relative_position_index: Tensor

    def __init__(self, dim: int, num_heads: int, window: int, shifts: bool, drop_path: float, spec: CfgNode) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.shifts = shifts
        self.scale = dim**-0.5  # of the full width, not of a head, as in microsoft/esvit
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
        """Attend (B, H, W, C) in windows, and return the maps (B * windows, heads, N, N) if requested."""
        grid = (x_BHWC.shape[1], x_BHWC.shape[2])
        partition = self.partition_of(grid)
        qkv = self.qkv(pad_to_windows(x_BHWC, partition.window))
        mask = None
        if partition.shift:
            mask = shift_mask((qkv.shape[1], qkv.shape[2]), partition.window, partition.shift, qkv.device)
        bias = self.bias(partition.window, mask)
        q, k, v = partition_heads(qkv, partition, 3, self.num_heads)
        dropout = drop_rate(self, self.attn_drop)
        x, maps = attend(q, k, v, bias=bias, scale=self.scale, dropout=dropout, attention=attention)
        x = self.drop(self.proj_out(join_window_heads(x, partition, grid)))
        return x, None if maps is None else maps.flatten(0, 1)

    def partition_of(self, grid: tuple[int, int]) -> WindowPartition:
        """Return the partition of a grid into windows."""
        window = min(self.window, *grid)
        return WindowPartition(window, window // 2 if self.shifts and window < min(grid) else 0)

    def bias(self, window: int, mask: Tensor | None) -> Tensor | None:
        """Return the sum of relative position bias and shift mask, (1 or windows, heads, N, padded N), or None without either.

        A window smaller than the learned one uses the biases of its offsets, those of the upper left corner of the full window.
        """
        bias = None if mask is None else mask.unsqueeze(1).expand(-1, self.num_heads, -1, -1)
        if self.relative_position_bias_table is None:
            return bias
        corner = self.relative_position_index.view((self.window,) * 4)[:window, :window, :window, :window]
        index = pad_keys(corner.reshape(window**2, window**2))
        relative = pairwise_bias(self.relative_position_bias_table, index).unsqueeze(0)
        return relative if bias is None else relative + bias


class FeedForward(nn.Module):
    """An MLP of two 1x1 convolutions with QuickGELU."""

    def __init__(self, dim: int, hidden: int, drop_path: float, spec: CfgNode) -> None:
        super().__init__()
        self.net = nn.Sequential(
            PointwiseConv(dim, hidden), QuickGELU(), PointwiseConv(hidden, dim), residual_drop(drop_path, spec)
        )

    def forward(self, x_BHWC: Tensor) -> Tensor:
        enter, activation, leave, drop = self.net
        assert isinstance(leave, PointwiseConv)
        return drop(activated_linear(enter(x_BHWC), activation, leave.weight.flatten(1), leave.bias))


class PreNorm(nn.Module):
    """Apply a norm, then a module."""

    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = LayerNorm(dim)
        self.fn = fn

    def forward(self, x_BHWC: Tensor, *args: bool) -> Any:
        return self.fn(self.norm(x_BHWC), *args)


class CvTBlock(nn.Sequential):
    """The pre-norm block for tokens (B, H, W, C), nested as in the published keys: attention at 0, MLP at 1."""

    def __init__(self, attn: ConvAttention, mlp: FeedForward, dim: int) -> None:
        super().__init__(PreNorm(dim, attn), PreNorm(dim, mlp))

    def forward(self, x_BHWC: Tensor, attention: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return tokens of the same shape, and the attention maps if requested."""
        attn, mlp = self
        attended, maps = attn(x_BHWC, attention)
        x = x_BHWC + attended
        return x + mlp(x), maps


def residual_drop(drop_path: float, spec: CfgNode) -> nn.Module:
    """Return dropout and stochastic depth of a residual branch."""
    return nn.Sequential(nn.Dropout(spec.DROP_RATE), DropPath(drop_path))


class ResStem(nn.Module):
    """The stem of RES_STEM: three 3x3 convolutions with BatchNorm and ReLU."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels, stride in ((in_channels, 2), (dim, 1), (dim, 2)):
            layers += [nn.Conv2d(channels, dim, 3, stride, 1, bias=False), nn.BatchNorm2d(dim), nn.ReLU()]
        self.stem = nn.Sequential(*layers)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Embed (B, C, H, W) to (B, ceil(H / 4), ceil(W / 4), dim)."""
        return self.stem(x_BCHW).permute(0, 2, 3, 1)


class ConvEmbed(nn.Module):
    """The entry to a stage: a strided convolution and a norm over channels."""

    def __init__(self, in_channels: int, dim: int, patch_size: int, stride: int, padding: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride, padding)
        self.norm = LayerNorm(dim)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Embed (B, C, H, W) to (B, H', W', dim)."""
        return self.norm(self.proj(x_BCHW).permute(0, 2, 3, 1))


class CvT(Backbone):
    """CvT as a `Backbone`.

    Args:
        spec: MODEL.SPEC, with the keys of `SPEC`; RES_STEM ignores the first entries of PATCH_SIZE and PATCH_PADDING.

    Raises:
        UsageError: a list of another length than DEPTHS, heads that do not divide the width, or RES_STEM with another stride.
    """

    def __init__(self, spec: CfgNode, dense: bool = False) -> None:
        super().__init__(dense)
        self._check(spec)
        self.tied_to_grid = spec.SHIFT or spec.REL_POS_EMBED
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
            stage = nn.Module()
            stage.layers = nn.ModuleList(blocks)
            self.add_module(f"stage{i}", nn.ModuleList([embed, stage]))
            in_channels = dim
        self.norm = LayerNorm(self.num_features)
        self.apply(init_conv_weights)

    def _check(self, spec: CfgNode) -> None:
        stages = len(spec.DEPTHS)
        if spec.NUM_STAGES not in (0, stages):
            raise UsageError(f"MODEL.SPEC.NUM_STAGES {spec.NUM_STAGES} must be the length of DEPTHS {spec.DEPTHS}")
        for key, value in spec.items():
            if isinstance(value, list) and len(value) != stages:
                raise UsageError(f"MODEL.SPEC.{key} {value} must have one entry for each entry of DEPTHS {spec.DEPTHS}")
        for dim, num_heads in zip(spec.DIM_EMBED, spec.NUM_HEADS):
            if dim % num_heads:
                raise UsageError(f"MODEL.SPEC.NUM_HEADS {num_heads} must divide the {dim} channels of its stage")
        if spec.RES_STEM and spec.PATCH_STRIDE[0] != RES_STEM_STRIDE:
            raise UsageError(
                f"MODEL.SPEC.RES_STEM has stride {RES_STEM_STRIDE}, PATCH_STRIDE is {spec.PATCH_STRIDE}; set its first entry to "
                f"{RES_STEM_STRIDE}"
            )

    def enter_stage(self, stage: int, x: Tensor) -> Tensor:
        """Embed images (B, C, H, W), or tokens of the previous stage, to tokens (B, H', W', C')."""
        return getattr(self, f"stage{stage}")[0](x if stage == 0 else x.permute(0, 3, 1, 2))

    def stage_blocks(self, stage: int) -> Sequence[nn.Module]:
        return getattr(self, f"stage{stage}")[1].layers

    def tokens(self, x_BHWC: Tensor) -> Tokens:
        return grid_tokens(x_BHWC)

    def partition_of(self, output: BlockOutput) -> WindowPartition:
        return self.block_at(output.block)[0].fn.partition_of(output.grid)

    @property
    def any_grid(self) -> bool:
        """Masks of shifted windows and biases of relative positions are constants of a graph."""
        return not self.tied_to_grid

    def to_transformers(self, state: State, config: CfgNode) -> HubModel:
        raise UsageError(
            "--format transformers does not support CvT: the CvT of transformers attends to the whole image through projections of "
            "its own for queries, keys and values, this one in windows through a shared one; choose one of backbone, safetensors, "
            "onnx, torchscript"
        )


def init_conv_weights(module: nn.Module) -> None:
    """Initialize a convolution from a truncated normal of standard deviation 0.02 with zero bias; for `nn.Module.apply`."""
    if isinstance(module, nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@register({"cvt_tiny": CONFIGS.format("s1"), "cvt_small": CONFIGS.format("s3"), "cvt": None}, SPEC)
def build_cvt(arch: str, config: CfgNode, *, dense: bool, patch_size: int) -> CvT:
    """Build a CvT; its patch sizes are in the config."""
    return CvT(config.MODEL.SPEC, dense)
