"""Swin Transformer (Liu et al., ICCV 2021): window attention, shifted in every second block, and patch merging between stages.

State-dict keys and outputs agree with microsoft/esvit (golden files swin_tiny_w7 and swin_tiny_w14), which uses LayerNorm with
eps 1e-6, derives window and shift from MODEL.IMAGE_SIZE, and pads smaller crops after the first norm. Any image size is accepted.

Shapes: B images, H x W token grid, C channels, N tokens of a window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from timm.layers import DropPath, PatchEmbed
from torch import Tensor, nn
from yacs.config import CfgNode

from config.schema import ArchSpec
from models.base import Backbone, BlockOutput, ResidualBlock, Tokens, drop_path_rates, grid_tokens, init_linear_weights
from models.huggingface import HubModel, TimmModel, swin_in_timm, swin_to_transformers
from models.interop import Converter, State, swin_timm_name, swin_to_detectron2, swin_to_mmdet, swin_to_timm
from models.registry import register
from ops.attention import attend, drop_rate, pad_keys, pairwise_bias
from ops.mlp import Mlp
from ops.windows import (
    WindowPartition,
    join_window_heads,
    pad_to_windows,
    padded_grid,
    partition_heads,
    relative_position_index,
    shift_mask,
)
from utils import UsageError

LayerNorm = partial(nn.LayerNorm, eps=1e-6)
CONFIGS = "experiments/imagenet/swin/swin_{}_patch4_window7_224.yaml"

SPEC = ArchSpec(
    "swin_transformer",
    {
        "PATCH_SIZE": 4,
        "IN_CHANS": 3,
        "DIM_EMBED": 96,
        "DEPTHS": [2, 2, 6, 2],
        "NUM_HEADS": [3, 6, 12, 24],
        "WINDOW_SIZE": 7,
        "MLP_RATIO": 4.0,
        "QKV_BIAS": True,
        "DROP_RATE": 0.0,
        "ATTN_DROP_RATE": 0.0,
        "DROP_PATH_RATE": 0.1,
        "PATCH_NORM": True,
        "USE_APE": False,
    },
)


class WindowAttention(nn.Module):
    """Multi-head self-attention in windows, with a learned bias for each relative position."""

    relative_position_index: Tensor  # under its published key
    bias_index: Tensor  # the same with padded keys

    def __init__(
        self,
        dim: int,
        window: int,
        num_heads: int,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
        index_NN = relative_position_index(window)
        self.register_buffer("relative_position_index", index_NN)
        self.register_buffer("bias_index", pad_keys(index_NN), persistent=False)
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = attn_drop
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(
        self, x_BHWC: Tensor, partition: WindowPartition, attention: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Attend (B, H, W, C) in windows, and return the maps (B * windows, heads, N, N) if requested.

        The projection of padding is its bias, so padding is added after the projection.
        """
        grid = (x_BHWC.shape[1], x_BHWC.shape[2])
        qkv = self.qkv(x_BHWC)
        bias = pairwise_bias(self.relative_position_bias_table, self.bias_index).unsqueeze(0)
        if partition.shift:
            padded = padded_grid(grid, partition.window)
            bias = bias + shift_mask(padded, partition.window, partition.shift, x_BHWC.device).unsqueeze(1)
        q, k, v = partition_heads(qkv, partition, 3, self.num_heads, fill_C=self.qkv.bias)
        x, maps = attend(q, k, v, bias=bias, dropout=drop_rate(self, self.attn_drop), attention=attention)
        x = join_window_heads(x, partition, grid)
        return self.proj_drop(self.proj(x)), None if maps is None else maps.flatten(0, 1)


class SwinBlock(ResidualBlock):
    """Window attention and an MLP, for tokens (B, H, W, C)."""

    def __init__(self, dim: int, num_heads: int, window: int, shift: int, drop_path: float, spec: CfgNode) -> None:
        super().__init__(
            LayerNorm(dim),
            WindowAttention(dim, window, num_heads, spec.QKV_BIAS, spec.ATTN_DROP_RATE, spec.DROP_RATE),
            LayerNorm(dim),
            Mlp(dim, int(dim * spec.MLP_RATIO), drop=spec.DROP_RATE),
            DropPath(drop_path),
        )
        self.window = window
        self.shift = shift

    def attend(self, x_BHWC: Tensor, attention: bool) -> tuple[Tensor, Tensor | None]:
        return self.attn(x_BHWC, WindowPartition(self.window, self.shift), attention)


class PatchMerging(nn.Module):
    """Merge 2 x 2 tokens into one with twice the channels; odd sides are padded with zeros."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Merge (B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), 2 C)."""
        x = pad_to_windows(x_BHWC, 2)
        batch, height, width, channels = x.shape
        x = x.view(batch, height // 2, 2, width // 2, 2, channels)
        return self.reduction(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))


class SwinStage(nn.Module):
    """Blocks of one resolution, and patch merging to the next."""

    def __init__(
        self, dim: int, num_heads: int, resolution: tuple[int, int], drop_paths: list[float], merge: bool, spec: CfgNode
    ) -> None:
        super().__init__()
        fits_one_window = min(resolution) <= spec.WINDOW_SIZE
        window = min(*resolution, spec.WINDOW_SIZE)
        self.blocks = nn.ModuleList(
            SwinBlock(dim, num_heads, window, 0 if fits_one_window or i % 2 == 0 else window // 2, drop_path, spec)
            for i, drop_path in enumerate(drop_paths)
        )
        self.downsample = PatchMerging(dim) if merge else None


class SwinTransformer(Backbone):
    """Swin Transformer as a `Backbone`.

    Args:
        image_size: the (height, width) that determines window and shift of each stage; other sizes are accepted.
        spec: MODEL.SPEC, with the keys of `SPEC`.

    Raises:
        UsageError: a list of another length than DEPTHS, heads that do not divide the width, or an image too small for the
            number of stages.
    """

    converters: ClassVar[Mapping[str, Converter]] = {
        "timm": swin_to_timm,
        "detectron2": swin_to_detectron2,
        "mmdet": swin_to_mmdet,
    }

    def __init__(self, image_size: tuple[int, int], spec: CfgNode, dense: bool = False) -> None:
        super().__init__(dense)
        stages = len(spec.DEPTHS)
        self.patch_size = spec.PATCH_SIZE
        self.stage_depths = tuple(spec.DEPTHS)
        self.stage_dims = tuple(spec.DIM_EMBED * 2**i for i in range(stages))
        self._check(image_size, spec)
        self.patch_embed = PatchEmbed(
            img_size=None,
            patch_size=spec.PATCH_SIZE,
            in_chans=spec.IN_CHANS,
            embed_dim=spec.DIM_EMBED,
            norm_layer=LayerNorm if spec.PATCH_NORM else None,
            flatten=False,
            output_fmt="NHWC",
        )
        self.pos_drop = nn.Dropout(spec.DROP_RATE)
        drop_paths = drop_path_rates(spec.DROP_PATH_RATE, spec.DEPTHS)
        self.layers = nn.ModuleList()
        for i, (dim, num_heads) in enumerate(zip(self.stage_dims, spec.NUM_HEADS)):
            resolution = (image_size[0] // spec.PATCH_SIZE // 2**i, image_size[1] // spec.PATCH_SIZE // 2**i)
            self.layers.append(SwinStage(dim, num_heads, resolution, drop_paths[i], i < stages - 1, spec))
        self.norm = LayerNorm(self.num_features)
        self.apply(init_linear_weights)

    def _check(self, image_size: tuple[int, int], spec: CfgNode) -> None:
        if len(spec.NUM_HEADS) != len(spec.DEPTHS):
            raise UsageError(
                f"MODEL.SPEC.NUM_HEADS {spec.NUM_HEADS} must have one entry for each entry of DEPTHS {spec.DEPTHS}"
            )
        for dim, num_heads in zip(self.stage_dims, spec.NUM_HEADS):
            if dim % num_heads:
                raise UsageError(f"MODEL.SPEC.NUM_HEADS {num_heads} must divide the {dim} channels of its stage")
        smallest = spec.PATCH_SIZE * 2 ** (len(spec.DEPTHS) - 1)
        if min(image_size) < smallest:
            raise UsageError(
                f"MODEL.IMAGE_SIZE {list(image_size)} must be at least {smallest} pixels for {len(spec.DEPTHS)} stages"
            )
        if spec.USE_APE:
            raise UsageError("MODEL.SPEC.USE_APE True is not supported (no EsViT network has it); set it to False")

    def enter_stage(self, stage: int, x: Tensor) -> Tensor:
        """Apply patch embedding, (B, C, H, W) to (B, H', W', C), before stage 0, else patch merging."""
        if stage == 0:
            return self.pos_drop(self.patch_embed(x))
        merge = self.layers[stage - 1].downsample
        assert isinstance(merge, PatchMerging)
        return merge(x)

    def stage_blocks(self, stage: int) -> Sequence[SwinBlock]:
        return self.layers[stage].blocks  # type: ignore[return-value]

    def tokens(self, x_BHWC: Tensor) -> Tokens:
        return grid_tokens(x_BHWC)

    def partition_of(self, output: BlockOutput) -> WindowPartition:
        block = self.block_at(output.block)
        return WindowPartition(block.window, block.shift)

    def timm_name(self, name: str) -> str:
        return swin_timm_name(name)

    def export_note(self, library: str) -> str | None:
        """Return which stages differ in detectors, where all have one window size and a shift in every second block."""
        if library not in {"mmdet", "detectron2"}:
            return None
        windows = [
            [(block.window, block.shift) for block in self.stage_blocks(stage)] for stage in range(len(self.stage_dims))
        ]
        largest = max(window for stage in windows for window, _ in stage)
        differing = [
            str(number)
            for number, stage in enumerate(windows, start=1)
            if stage != [(largest, largest // 2 * (block % 2)) for block in range(len(stage))]
        ]
        if not differing:
            return None
        where = f"stage{'s' * (len(differing) > 1)} {' and '.join(differing)}"
        return (
            f"{library} has windows of {largest} in all stages, and shifts them in every second block. This network does not in "
            f"{where}, where one window covers MODEL.IMAGE_SIZE: the features in {library} differ from there on, until fine-tuned"
        )

    def in_timm(self, config: CfgNode) -> TimmModel:
        return swin_in_timm(config)

    def to_transformers(self, state: State, config: CfgNode) -> HubModel:
        return swin_to_transformers(state, config)


@register(
    {
        size: CONFIGS.format(size.removeprefix("swin_"))
        for size in ("swin_tiny", "swin_small", "swin_base", "swin_large")
    }
    | {"swin": None},
    SPEC,
)
def build_swin(arch: str, config: CfgNode, *, dense: bool, patch_size: int) -> SwinTransformer:
    """Build a Swin Transformer; its patch size is in the config."""
    return SwinTransformer(tuple(config.MODEL.IMAGE_SIZE), config.MODEL.SPEC, dense)
