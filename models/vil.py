"""Vision Longformer (ViL; Zhang et al., ICCV 2021): sliding chunk attention in early stages, full attention in later ones.

State-dict keys and outputs agree with microsoft/esvit (golden file vil_2262). Any image size is accepted; at another size than
MODEL.IMAGE_SIZE full attention interpolates its matrix of biases as published, whereas a network built for that size interpolates
the table behind it, so their outputs differ slightly. `layer1.0` embeds the patches of a stage; `layer1.1`, `layer1.2`, ...
alternate between attention and MLP, which together are one block.

Shapes: B images, N tokens (global tokens first, then the regions row by row), C channels, H x W feature map.
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

from config.ranges import SHARE, integer, number
from config.schema import ArchSpec
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

SPEC = ArchSpec(
    "vision_longformer",
    {
        "IN_CHANS": 3,
        "DROP_RATE": 0.0,
        "DROP_PATH_RATE": 0.1,
        "NORM_EMBED": True,
        "AVG_POOL": False,
        "MSVIT": {
            "ARCH": "l1,h3,d96,n2,s1,g1,p4,f7,a0_l2,h6,d192,n2,s1,g1,p2,f7,a0_"
            "l3,h12,d384,n6,s0,g1,p2,f7,a0_l4,h24,d768,n2,s0,g0,p2,f7,a0",
            "SHARE_W": True,
            "SHARE_KV": True,
            "ONLY_GLOBAL": False,
            "ATTN_TYPE": "longformerhand",
            "SW_EXACT": 0,
            "MODE": 0,
            "VIL_MODE_SWITCH": 1.0,
            "LN_EPS": 1e-6,
        },
    },
    ranges={
        "SW_EXACT": integer(-1, 1),
        "MODE": integer(-1, 8),
        "VIL_MODE_SWITCH": SHARE,
        "LN_EPS": number(0, 1, above_low=True),
    },
    name_aliases=("cls_vil",),
    key_aliases={"MODEL.SPEC.DROP": "MODEL.SPEC.DROP_RATE", "MODEL.SPEC.DROP_PATH": "MODEL.SPEC.DROP_PATH_RATE"},
    fixed_choices={  # no squeeze-and-excitation, whose ratio is then irrelevant, and no pooled tokens
        "MODEL.SPEC.MSVIT.POOL_METHOD": ("None", None),
        "MODEL.SPEC.MSVIT.WITH_SE": ("None", None, False),
        "MODEL.SPEC.MSVIT.SE_MLP_RATIO": (0.0625,),
        "MODEL.SPEC.MSVIT.SE_MLP_BALANCE": (False,),
    },
)


class PatchEmbedding(nn.Module):
    """Embed patches of a feature map as the regions of a stage, and prepend the global tokens of the stage.

    Args:
        in_chans: channels of the feature map.
        stage: settings of the stage.
        grid: (height, width) in regions at MODEL.IMAGE_SIZE, the size of the learned embeddings of row (x) and column (y).
        norm: norm of the regions.
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
            self.cls_pos_embed = random_parameter(1, g, stage.dim)  # empty if g is 0, as in the published files
        self.pos_drop = nn.Dropout(drop)

    def forward(self, x_BCHW: Tensor) -> Tokens:
        """Embed (B, C, H, W); maps smaller than a patch are padded, incomplete patches of larger ones are ignored."""
        bottom, right = (max(0, self.patch_size - side) for side in x_BCHW.shape[2:])
        if bottom or right:
            x_BCHW = F.pad(x_BCHW, (0, right, 0, bottom))
        x_BCHW = self.proj(x_BCHW)
        grid = (x_BCHW.shape[2], x_BCHW.shape[3])
        x = self.norm_embed(x_BCHW.flatten(2).transpose(1, 2))
        if self.num_global:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        if self.absolute:
            x = x + torch.cat([self.cls_pos_embed, self._positions(grid)], dim=1)
        return Tokens(self.pos_drop(x), self.num_global, grid)

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """Return the position embeddings (1, regions, C): half of the channels encode the row, half the column.

        As published, the embeddings are interpolated for the number of all tokens: global tokens stretch both axes by the square
        root of their share, which changes the embeddings even at the learned size.
        """
        regions = grid[0] * grid[1]
        stretch = math.sqrt(1 + self.num_global / regions)
        row = resize_axis(self.x_pos_embed, grid[0], stretch).unsqueeze(2).expand(-1, -1, grid[1], -1)
        column = resize_axis(self.y_pos_embed, grid[1], stretch).unsqueeze(1).expand(-1, grid[0], -1, -1)
        return torch.cat([row, column], dim=-1).flatten(1, 2)


def resize_axis(embed_1NC: Tensor, length: int, stretch: float = 1.0) -> Tensor:
    """Resize the embeddings of one axis (bicubic) to `stretch * length` positions, and return the first `length`."""
    learned = embed_1NC.shape[1]
    if stretch == 1:
        return resize_grid(embed_1NC[0], (learned, 1), (length, 1)).unsqueeze(0)
    axis_1CN1 = embed_1NC.float().transpose(1, 2).unsqueeze(3)
    factors = (stretch * length / learned, 1.0)
    resized = F.interpolate(axis_1CN1, scale_factor=factors, mode="bicubic", align_corners=False)
    return resized.squeeze(3).transpose(1, 2)[:, :length].to(embed_1NC.dtype)


class AttentionHalf(nn.Module):
    """Pre-norm attention with a residual connection and stochastic depth."""

    def __init__(self, norm: nn.Module, attn: BiasedAttention, drop_path: float) -> None:
        super().__init__()
        self.norm = norm
        self.attn = attn
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tokens, attention: bool) -> tuple[Tokens, Tensor | None]:
        attended, maps = self.attn(self.norm(x.tokens_BNC), x.grid, attention)
        return x._replace(tokens_BNC=x.tokens_BNC + self.drop_path(attended)), maps


class MlpHalf(nn.Module):
    """Pre-norm MLP with a residual connection and stochastic depth."""

    def __init__(self, norm: nn.Module, mlp: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.norm = norm
        self.mlp = mlp
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tokens) -> Tokens:
        return x._replace(tokens_BNC=x.tokens_BNC + self.drop_path(self.mlp(self.norm(x.tokens_BNC))))


class Block(NamedTuple):
    """Two consecutive modules of a stage, which are one block."""

    attention: AttentionHalf
    mlp: MlpHalf


class VisionLongformer(Backbone):
    """Vision Longformer as a `Backbone`.

    Args:
        image_size: the (height, width) of learned positions and of the biases of full attention; other sizes are accepted.
        spec: MODEL.SPEC, with the keys of `SPEC`.

    Raises:
        UsageError: an unsupported variant, an invalid architecture string, or an image too small for the number of stages.
    """

    def __init__(self, image_size: tuple[int, int], spec: CfgNode, dense: bool = False) -> None:
        super().__init__(dense)
        _check(spec)
        msvit = spec.MSVIT
        stages = parse_arch(msvit.ARCH)
        smallest = math.prod(stage.patch_size for stage in stages)
        if min(image_size) < smallest:
            raise UsageError(
                f"MODEL.IMAGE_SIZE {list(image_size)} must be at least {smallest} pixels, one token of the last stage"
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
        """Embed patches of the image, or of the regions of the previous stage, whose global tokens are dropped."""
        if stage:
            x = x.tokens_BNC[:, x.num_prefix_tokens :].transpose(1, 2).unflatten(2, x.grid)
        return self._layer(stage)[0](x)

    def stage_blocks(self, stage: int) -> Sequence[Any]:
        halves: list[Any] = list(self._layer(stage))[1:]
        return [Block(attention, mlp) for attention, mlp in zip(halves[::2], halves[1::2])]

    def call_block(self, block: Any, x: Tokens, attention: bool) -> tuple[Tokens, Tensor | None]:
        x, maps = block.attention(x, attention)
        return block.mlp(x), maps

    def tokens(self, x: Tokens) -> Tokens:
        return x

    def partition_of(self, output: BlockOutput) -> WindowPartition | None:
        """Return the partition of the queries into chunks; their keys are in neighboring chunks too."""
        attn = self.block_at(output.block).attention.attn
        return WindowPartition(attn.window) if isinstance(attn, ChunkAttention) else None

    def query_plane(self, maps: Tensor, output: BlockOutput, query_yx: tuple[int, int] | None) -> Tensor:
        attn = self.block_at(output.block).attention.attn
        if isinstance(attn, ChunkAttention) and query_yx is not None:
            return attn.attention_plane(maps, output.grid, query_yx)
        return super().query_plane(maps, output, query_yx)

    def _layer(self, stage: int) -> nn.ModuleList:
        layer = getattr(self, f"layer{stage + 1}")
        assert isinstance(layer, nn.ModuleList)
        return layer

    def pool(self, tokens_BNC: Tensor, num_prefix_tokens: int) -> Tensor:
        """Return the first global token, or the mean of all tokens if AVG_POOL is on or the stage has none."""
        return tokens_BNC[:, 0] if num_prefix_tokens and not self.avg_pool else tokens_BNC.mean(dim=1)

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Stop sampling neighbors (MODE above 0) after the fraction VIL_MODE_SWITCH of the epochs; then attend to all chunks.

        microsoft/esvit reads that key and does not use it.
        """
        sampling = self.mode > 0 and epoch < self.mode_switch * epochs
        for module in self.modules():
            if isinstance(module, ChunkAttention):
                module.mode = self.mode if sampling else min(self.mode, 0)

    def fit_tensor(self, name: str, tensor: Tensor, image_size: tuple[int, int] | None = None) -> Tensor | None:
        """Resize tables of full attention and of row and column positions too; an unknown image size is assumed square."""
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
    """Return the (height, width) in regions of an image after stages with these patch sizes."""
    height, width = image_size
    for patch_size in patch_sizes:
        height, width = height // patch_size, width // patch_size
    return height, width


def _check(spec: CfgNode) -> None:
    key, msvit = "MODEL.SPEC.MSVIT", spec.MSVIT
    allowed: dict[str, tuple[Any, ...]] = {
        "ATTN_TYPE": ("longformerhand", "longformerauto", "full"),
        "SHARE_KV": (True,),
        "ONLY_GLOBAL": (False,),
    }
    for name, values in allowed.items():
        if msvit[name] not in values:
            raise UsageError(f"{key}.{name} {msvit[name]} is not supported; use {' or '.join(map(str, values))}")


@register({"vil": None} | {name: CONFIGS.format(name) for name in ("vil_1281", "vil_2262", "vil_14121")}, SPEC)
def build_vil(arch: str, config: CfgNode, *, dense: bool, patch_size: int) -> VisionLongformer:
    """Build a Vision Longformer; its patch sizes are in the config."""
    return VisionLongformer(tuple(config.MODEL.IMAGE_SIZE), config.MODEL.SPEC, dense)
