"""ViL, the multi-scale Vision Longformer: early stages attend to nearby chunks and to global tokens, later ones to everything.

State-dict keys and numbers are those of the EsViT networks (golden file vil_2262); any image size goes in, square or not.
At another size than MODEL.IMAGE_SIZE full attention resizes, as published, the matrix of its biases; a network built for that
size resizes the table they come from, so the two differ a little. `layer1.0` embeds the patches of a stage, `layer1.1`,
`layer1.2`, ... are attention and MLP in turn; the two make one block.

Shapes: B images, N tokens (the global ones first, then the regions row by row), C channels, H x W map.
Origin: Vision Longformer (Zhang et al., ICCV 2021), conventions of EsViT (Li et al., ICLR 2022).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from yacs.config import CfgNode

from models.base import Backbone, BlockOutput, Tokens, drop_path_rates, init_linear_weights
from models.registry import register
from models.resize import resize_grid
from models.vil_arch import StageSpec, parse_arch
from models.vil_attention import BiasedAttention, ChunkAttention, FullAttention, random_parameter
from ops.mlp import Mlp
from ops.windows import WindowPartition
from utils import UsageError

CONFIGS = "experiments/imagenet/vil/{}.yaml"
MLP_RATIO = 4


class PatchEmbedding(nn.Module):
    """Patches of a map become the regions of a stage, behind global tokens of its own.

    Args:
        in_chans: channels of the map.
        stage: of which stage.
        grid: the regions at MODEL.IMAGE_SIZE, for which learned embeddings of row (x) and column (y) are made.
        norm: of the regions.
        drop: dropout of the tokens.
    """

    cls_token: nn.Parameter
    cls_pos_embed: nn.Parameter

    def __init__(self, in_chans: int, stage: StageSpec, grid: tuple[int, int], norm: nn.Module, drop: float) -> None:
        super().__init__()
        self.num_global = g = stage.num_global
        self.patch_size = stage.patch_size
        self.absolute = stage.absolute
        if g:
            self.cls_token = random_parameter(1, g, stage.dim)
        self.proj = nn.Conv2d(in_chans, stage.dim, stage.patch_size, stage.patch_size)
        self.norm_embed = norm
        if stage.absolute:
            self.x_pos_embed = random_parameter(1, grid[0], stage.dim // 2)
            self.y_pos_embed = random_parameter(1, grid[1], stage.dim // 2)
            self.cls_pos_embed = random_parameter(1, g, stage.dim)  # published files hold it empty too
        self.pos_drop = nn.Dropout(drop)

    def forward(self, x_BCHW: Tensor) -> Tokens:
        """A map to tokens; what is left of it beside whole patches is cut off, what is smaller than one is padded."""
        below, beside = (max(0, self.patch_size - side) for side in x_BCHW.shape[2:])
        if below or beside:
            x_BCHW = F.pad(x_BCHW, (0, beside, 0, below))
        x_BCHW = self.proj(x_BCHW)
        grid = (x_BCHW.shape[2], x_BCHW.shape[3])
        x = self.norm_embed(x_BCHW.flatten(2).transpose(1, 2))
        if self.num_global:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        if self.absolute:
            x = x + torch.cat([self.cls_pos_embed, self._positions(grid)], dim=1)
        return Tokens(self.pos_drop(x), self.num_global, grid)

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """(1, regions, C): half of the channels tell the row, half the column.

        As published the global tokens count among those that the embeddings are resized to: both axes are stretched by the root of
        their share, which at the learned size moves the embeddings a little too.
        """
        regions = grid[0] * grid[1]
        stretch = math.sqrt(1 + self.num_global / regions)
        row = resize_axis(self.x_pos_embed, grid[0], stretch).unsqueeze(2).expand(-1, -1, grid[1], -1)
        column = resize_axis(self.y_pos_embed, grid[1], stretch).unsqueeze(1).expand(-1, grid[0], -1, -1)
        return torch.cat([row, column], dim=-1).flatten(1, 2)


def resize_axis(embed_1NC: Tensor, wanted: int, stretch: float = 1.0) -> Tensor:
    """Embeddings of the positions of one axis, resized (bicubic) to the first `wanted` of `stretch` times as many."""
    learned = embed_1NC.shape[1]
    if stretch == 1:
        return resize_grid(embed_1NC[0], (learned, 1), (wanted, 1)).unsqueeze(0)
    axis_1CN1 = embed_1NC.float().transpose(1, 2).unsqueeze(3)
    factors = (stretch * wanted / learned, 1.0)
    resized = F.interpolate(axis_1CN1, scale_factor=factors, mode="bicubic", align_corners=False)
    return resized.squeeze(3).transpose(1, 2)[:, :wanted].to(embed_1NC.dtype)


class AttentionHalf(nn.Module):
    """Norm and attention on a residual path with stochastic depth."""

    def __init__(self, norm: nn.Module, attn: BiasedAttention, drop_path: float) -> None:
        super().__init__()
        self.norm = norm
        self.attn = attn
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tokens, attention: bool) -> tuple[Tokens, Tensor | None]:
        """Tokens to tokens, and the attention maps if asked for."""
        attended, maps = self.attn(self.norm(x.tokens_BNC), x.grid, attention)
        return x._replace(tokens_BNC=x.tokens_BNC + self.drop_path(attended)), maps


class MlpHalf(nn.Module):
    """Norm and MLP on a residual path with stochastic depth."""

    def __init__(self, norm: nn.Module, mlp: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.norm = norm
        self.mlp = mlp
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tokens) -> Tokens:
        """Tokens to tokens."""
        return x._replace(tokens_BNC=x.tokens_BNC + self.drop_path(self.mlp(self.norm(x.tokens_BNC))))


class Block(NamedTuple):
    """Two neighbors of a stage's list that make one block."""

    attention: AttentionHalf
    mlp: MlpHalf


class VisionLongformer(Backbone):
    """ViL as a backbone of the common contract.

    Args:
        image_size: the (height, width) that fixes the biases of full attention and learned positions; other sizes may go in.
        spec: the keys of `config.SPECS["vision_longformer"]`.
        dense: as in `Backbone`.

    Raises:
        UsageError: a variant that is not here, an architecture string or values that do not fit, an image too small for the
            number of stages.
    """

    def __init__(self, image_size: tuple[int, int], spec: CfgNode, dense: bool = False) -> None:
        super().__init__(dense)
        _check(spec)
        msvit = spec.MSVIT
        stages = parse_arch(msvit.ARCH)
        smallest = math.prod(stage.patch_size for stage in stages)
        if min(image_size) < smallest:
            raise UsageError(
                f"MODEL.IMAGE_SIZE {list(image_size)} is below {smallest} pixels, one token of the last stage"
            )
        self.image_size = image_size
        self.patch_sizes = [stage.patch_size for stage in stages]
        self.patch_size = self.patch_sizes[0]
        self.stage_dims = tuple(stage.dim for stage in stages)
        self.stage_depths = tuple(stage.depth for stage in stages)
        self.avg_pool = spec.AVG_POOL
        self.mode, self.mode_switch = msvit.MODE, msvit.VIL_MODE_SWITCH
        make_norm = partial(nn.LayerNorm, eps=msvit.LN_EPS)
        drop_paths = drop_path_rates(spec.DROP_PATH_RATE, self.stage_depths)
        channels, grid = spec.IN_CHANS, image_size
        for i, stage in enumerate(stages):
            grid = (grid[0] // stage.patch_size, grid[1] // stage.patch_size)
            norm = make_norm(stage.dim) if spec.NORM_EMBED else nn.Identity()
            layer = nn.ModuleList([PatchEmbedding(channels, stage, grid, norm, spec.DROP_RATE)])
            for drop_path in drop_paths[i]:
                attn: BiasedAttention
                if stage.sparse and msvit.ATTN_TYPE != "full":
                    attn = ChunkAttention(stage, msvit, spec.DROP_RATE)
                else:
                    attn = FullAttention(stage, grid, spec.DROP_RATE)
                mlp = Mlp(stage.dim, MLP_RATIO * stage.dim, drop=spec.DROP_RATE)
                layer.append(AttentionHalf(make_norm(stage.dim), attn, drop_path))
                layer.append(MlpHalf(make_norm(stage.dim), mlp, drop_path))
            self.add_module(f"layer{i + 1}", layer)
            channels = stage.dim
        self.norm = make_norm(self.num_features)
        self.apply(init_linear_weights)

    def enter_stage(self, stage: int, x: Any) -> Tokens:
        """Patches of the image, or of the former stage's regions: its global tokens end with it."""
        if stage:
            x = x.tokens_BNC[:, x.num_prefix_tokens :].transpose(1, 2).unflatten(2, x.grid)
        return self._layer(stage)[0](x)

    def stage_blocks(self, stage: int) -> Sequence[Any]:
        """The pairs of a stage, for `call_block`."""
        halves: list[Any] = list(self._layer(stage))[1:]
        return [Block(attention, mlp) for attention, mlp in zip(halves[::2], halves[1::2])]

    def call_block(self, block: Any, x: Tokens, attention: bool) -> tuple[Tokens, Tensor | None]:
        """Attention, then the MLP."""
        x, maps = block.attention(x, attention)
        return block.mlp(x), maps

    def tokens(self, x: Tokens) -> Tokens:
        """See `Backbone.tokens`; the global tokens are the prefix."""
        return x

    def cut_of(self, output: BlockOutput) -> WindowPartition | None:
        """The chunks of the queries, whose keys lie in the chunks around theirs too."""
        attn = self.block_at(output.block).attention.attn
        return WindowPartition(attn.window) if isinstance(attn, ChunkAttention) else None

    def plane_of_query(self, maps: Tensor, output: BlockOutput, query_yx: tuple[int, int] | None) -> Tensor:
        """See `Backbone.plane_of_query`."""
        attn = self.block_at(output.block).attention.attn
        if isinstance(attn, ChunkAttention) and query_yx is not None:
            return attn.plane(maps, output.grid, query_yx)
        return super().plane_of_query(maps, output, query_yx)

    def _layer(self, stage: int) -> nn.ModuleList:
        layer = getattr(self, f"layer{stage + 1}")
        assert isinstance(layer, nn.ModuleList)
        return layer

    def pool(self, tokens_BNC: Tensor, num_prefix_tokens: int) -> Tensor:
        """The first global token of a stage that has one, unless AVG_POOL is on; else the mean of all tokens."""
        return tokens_BNC[:, 0] if num_prefix_tokens and not self.avg_pool else tokens_BNC.mean(dim=1)

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Training that draws neighbors (MODE above 0) sees all nine chunks once VIL_MODE_SWITCH of the epochs are over.

        The reference reads that key and never uses it. Nothing is remembered: the epoch alone decides, after a resume too.
        """
        drawing = self.mode > 0 and epoch < self.mode_switch * epochs
        for module in self.modules():
            if isinstance(module, ChunkAttention):
                module.mode = self.mode if drawing else min(self.mode, 0)

    def fit_tensor(self, name: str, tensor: Tensor, image_size: tuple[int, int] | None = None) -> Tensor | None:
        """Positions of rows and columns are resized too, and tables of full attention; unknown image sizes are taken as square."""
        owner = self.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, FullAttention) and name.endswith("relative_position_bias_table"):
            side = (math.isqrt(len(tensor)) + 1) // 2
            grid, stage = (side, side), int(name.removeprefix("layer").split(".")[0])
            if image_size is not None:
                grid = _grid(image_size, self.patch_sizes[:stage])
            return owner.fit_table(tensor, grid)
        if name.endswith(("x_pos_embed", "y_pos_embed")) and tensor.ndim == 3:
            return resize_axis(tensor, self.get_parameter(name).shape[1])
        return super().fit_tensor(name, tensor, image_size)


def _grid(image_size: tuple[int, int], patch_sizes: Sequence[int]) -> tuple[int, int]:
    """Regions of an image after patches of these sizes, one stage after the other."""
    height, width = image_size
    for patch_size in patch_sizes:
        height, width = height // patch_size, width // patch_size
    return height, width


def _check(spec: CfgNode) -> None:
    """Refuse what is not here."""
    key, msvit = "MODEL.SPEC.MSVIT", spec.MSVIT
    allowed: dict[str, tuple[Any, ...]] = {
        "ATTN_TYPE": ("longformerhand", "longformerauto", "full"),
        "SHARE_KV": (True,),
        "ONLY_GLOBAL": (False,),
    }
    for name, values in allowed.items():
        if msvit[name] not in values:
            raise UsageError(f"{key}.{name} {msvit[name]} is not supported; use {' or '.join(map(str, values))}")


@register(
    {"vil": None} | {name: CONFIGS.format(name) for name in ("vil_1281", "vil_2262", "vil_14121")},
    config_name="vision_longformer",
)
def build_vil(arch: str, config: CfgNode, *, dense: bool, patch_size: int) -> VisionLongformer:
    """ViL from a config, whose patch sizes count."""
    return VisionLongformer(tuple(config.MODEL.IMAGE_SIZE), config.MODEL.SPEC, dense)
