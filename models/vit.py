"""The plain Vision Transformer (DeiT and DINO sizes): class tokens and patch tokens of one resolution.

UDI has two class tokens (MODEL.SPEC.NUM_CLS_TOKENS); the first one is the view feature unless `choose_token` says otherwise.
State-dict keys are those of the released DINO backbones (golden file deit_small). Any patch size, any image size, square or not.

Shapes: B images, N tokens, C channels.
Origin: ViT (Dosovitskiy et al., ICLR 2021), DeiT (Touvron et al., ICML 2021), position resizing of DINO (Caron et al., ICCV 2021),
second class token of UDI (Su and Ji, ECCV 2024).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from timm.layers import DropPath, PatchEmbed
from torch import Tensor, nn
from yacs.config import CfgNode

from models.base import Backbone, ResidualBlock, Tokens, drop_path_rates, init_linear_weights
from models.interop import Converter, vit_to_detectron2, vit_to_timm
from models.registry import register
from models.resize import RULES, resize_pos_embed
from ops.attention import attend, drop_rate, join_heads, split_heads
from ops.linear import Linear
from ops.mlp import Mlp
from utils import UsageError, logger

LayerNorm = partial(nn.LayerNorm, eps=1e-6)
CLASS_TOKENS = (1, 2)
CONFIGS = "experiments/imagenet/vit/{}.yaml"


class Attention(nn.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, attn_drop: float, proj_drop: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = attn_drop
        self.proj = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x_BNC: Tensor, attention: bool = False) -> tuple[Tensor, Tensor | None]:
        """(B, N, C) to the same shape, with the maps (B, heads, N, N) if asked for."""
        q, k, v = split_heads(self.qkv(x_BNC), 3, self.num_heads)
        x, maps = attend(q, k, v, dropout=drop_rate(self, self.attn_drop), attention=attention)
        return self.proj_drop(self.proj(join_heads(x))), maps


class ViTBlock(ResidualBlock):
    """The pre-norm block on `Tokens`."""

    def forward(self, x: Tokens, attention: bool = False) -> tuple[Tokens, Tensor | None]:  # type: ignore[override]
        """Tokens to tokens, and the attention maps if asked for."""
        tokens_BNC, maps = super().forward(x.tokens_BNC, attention)
        return x._replace(tokens_BNC=tokens_BNC), maps


class VisionTransformer(Backbone):
    """ViT as a backbone of the common contract.

    Args:
        image_size: the (height, width) whose grid of patches the position embedding holds; other sizes may go in.
        patch_size: pixels of a patch's side.
        spec: the keys of `config.SPECS["vision_transformer"]`.
        dense: as in `Backbone`.

    Raises:
        UsageError: heads that do not divide the width, an image smaller than a patch, or no or too many class tokens.
    """

    converters: ClassVar[Mapping[str, Converter]] = {"timm": vit_to_timm, "detectron2": vit_to_detectron2}

    def __init__(self, image_size: tuple[int, int], patch_size: int, spec: CfgNode, dense: bool = False) -> None:
        super().__init__(dense)
        dim = spec.DIM_EMBED
        if dim % spec.NUM_HEADS:
            raise UsageError(f"MODEL.SPEC.NUM_HEADS {spec.NUM_HEADS} must divide the {dim} channels of DIM_EMBED")
        if not 1 <= patch_size <= min(image_size):
            raise UsageError(
                f"--patch_size {patch_size} must lie in 1..{min(image_size)}, the side of MODEL.IMAGE_SIZE"
            )
        if spec.NUM_CLS_TOKENS not in CLASS_TOKENS:
            raise UsageError(f"MODEL.SPEC.NUM_CLS_TOKENS {spec.NUM_CLS_TOKENS} must be 1, or 2 as UDI has")
        if spec.POS_RESIZE not in ("auto", *RULES):
            raise UsageError(f"MODEL.SPEC.POS_RESIZE {spec.POS_RESIZE} must be one of auto, {', '.join(RULES)}")
        self.num_cls_tokens: int = spec.NUM_CLS_TOKENS
        self.rule_is_open = spec.POS_RESIZE == "auto"
        self.pos_resize: str = "size" if self.rule_is_open else spec.POS_RESIZE
        self.patch_size = patch_size
        self.image_size = image_size
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.stage_dims, self.stage_depths = (dim,), (spec.DEPTH,)
        self.patch_embed = PatchEmbed(
            img_size=None,
            patch_size=patch_size,
            in_chans=spec.IN_CHANS,
            embed_dim=dim,
            flatten=False,
            output_fmt="NHWC",
        )
        self.cls_token = nn.Parameter(torch.zeros(1, self.num_cls_tokens, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_cls_tokens + math.prod(self.grid), dim))
        self.pos_drop = nn.Dropout(spec.DROP_RATE)
        self.blocks = nn.ModuleList(
            ViTBlock(
                LayerNorm(dim),
                Attention(dim, spec.NUM_HEADS, spec.QKV_BIAS, spec.ATTN_DROP_RATE, spec.DROP_RATE),
                LayerNorm(dim),
                Mlp(dim, int(dim * spec.MLP_RATIO), drop=spec.DROP_RATE),
                DropPath(rate),
            )
            for rate in drop_path_rates(spec.DROP_PATH_RATE, [spec.DEPTH])[0]
        )
        self.norm = LayerNorm(dim)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_linear_weights)
        self.register_state_dict_post_hook(_keep_rule)

    def enter_stage(self, stage: int, x_BCHW: Tensor) -> Tokens:
        """Patches with the class tokens before them, and the position embedding resized to their grid."""
        patches_BHWC = self.patch_embed(x_BCHW)
        grid = (patches_BHWC.shape[1], patches_BHWC.shape[2])
        class_tokens = self.cls_token.expand(patches_BHWC.shape[0], -1, -1)
        tokens_BNC = torch.cat([class_tokens, patches_BHWC.flatten(1, 2)], dim=1)
        prefix = self.num_cls_tokens
        # DINO keeps its square table for square images only, also where the sides differ by less than a patch.
        height, width = x_BCHW.shape[2:]
        always = self.pos_resize == "scale" and height != width and self.grid[0] == self.grid[1]
        positions_1NC = resize_pos_embed(self.pos_embed, prefix, self.grid, grid, self.pos_resize, always)
        return Tokens(self.pos_drop(tokens_BNC + positions_1NC), prefix, grid)

    def stage_blocks(self, stage: int) -> Sequence[nn.Module]:
        """See `Backbone.stage_blocks`."""
        return self.blocks  # type: ignore[return-value]

    def tokens(self, x: Tokens) -> Tokens:
        """See `Backbone.tokens`; the class tokens are the prefix tokens."""
        return x

    def pool(self, tokens_BNC: Tensor, num_prefix_tokens: int) -> Tensor:
        """The class tokens of `view_tokens`, one after the other; the mean of the patches where all were dropped."""
        if not self.view_tokens:
            return tokens_BNC[:, num_prefix_tokens:].mean(dim=1)
        return torch.cat([tokens_BNC[:, token] for token in self.view_tokens], dim=-1)

    def keep_class_tokens(self, kept: int) -> None:
        """See `Backbone.keep_class_tokens`; of more tokens than there are it is a UsageError too."""
        if kept > self.num_cls_tokens:
            raise UsageError(f"{kept} class tokens cannot be kept of {self.num_cls_tokens}; keep fewer")
        positions = self.pos_embed.detach()
        self.pos_embed = nn.Parameter(torch.cat([positions[:, :kept], positions[:, self.num_cls_tokens :]], dim=1))
        self.cls_token = nn.Parameter(self.cls_token.detach()[:, :kept].clone())
        self.num_cls_tokens, self.view_tokens = kept, tuple(range(min(kept, 1)))

    def summary_tokens(self, tokens_BNC: Tensor, num_prefix_tokens: int) -> Tensor:
        """All class tokens."""
        return self.norm(tokens_BNC[:, :num_prefix_tokens])

    def follow(self, pos_resize: str | None) -> None:
        """See `Backbone.follow`; told in a line where the file asks for another rule than `size`."""
        if not self.rule_is_open or pos_resize not in RULES:
            return
        self.pos_resize = pos_resize
        if pos_resize == "scale":
            logger.info(
                "positions are resized by scale, as DINO and UDI do, whose layout the file has (MODEL.SPEC.POS_RESIZE)"
            )

    def settled(self, config: CfgNode) -> CfgNode:
        """See `Backbone.settled`."""
        config = config.clone()
        config.defrost()
        config.MODEL.SPEC.POS_RESIZE = self.pos_resize
        config.freeze()
        return config

    def fit_tensor(self, name: str, tensor: Tensor, image_size: tuple[int, int] | None = None) -> Tensor | None:
        """Position embeddings of another image size are resized; where that is unknown, the file's grid is taken to be square."""
        if name != "pos_embed" or tensor.ndim != 3 or tensor.shape[2] != self.num_features:
            return None
        prefix = self.num_cls_tokens
        side = math.isqrt(max(tensor.shape[1] - prefix, 0))
        grid = (
            (side, side) if image_size is None else (image_size[0] // self.patch_size, image_size[1] // self.patch_size)
        )
        if prefix + math.prod(grid) != tensor.shape[1]:
            return None
        return resize_pos_embed(tensor, prefix, grid, self.grid, self.pos_resize)


def _keep_rule(module: nn.Module, _state: Mapping[str, Tensor], _prefix: str, metadata: dict[str, str]) -> None:
    """torch keeps `metadata` with a state dict and in its file: a bare backbone tells how its positions are resized."""
    metadata["pos_resize"] = str(module.pos_resize)


@register(
    {
        "deit_tiny": CONFIGS.format("deit_tiny"),
        "deit_small": CONFIGS.format("deit_small"),
        "vit_tiny": CONFIGS.format("deit_tiny"),
        "vit_small": CONFIGS.format("deit_small"),
        "vit_base": CONFIGS.format("vit_base"),
        "vit": None,
    },
    config_name="vision_transformer",
)
def build_vit(arch: str, config: CfgNode, *, dense: bool, patch_size: int) -> VisionTransformer:
    """ViT from a config; the patch size is the caller's."""
    return VisionTransformer(tuple(config.MODEL.IMAGE_SIZE), patch_size, config.MODEL.SPEC, dense)
