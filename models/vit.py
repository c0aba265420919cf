"""Vision Transformer (Dosovitskiy et al., ICLR 2021) in the sizes of DeiT (Touvron et al., ICML 2021) and DINO.

State-dict keys and outputs agree with facebookresearch/dino (golden file deit_small). UDI (Su and Ji, ECCV 2024) adds a second
class token by MODEL.SPEC.NUM_CLS_TOKENS. Any patch size and image size are accepted, square or not.

Shapes: B images, N tokens, C channels.
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

from config.ranges import integer
from config.schema import ArchSpec
from models.base import Backbone, ResidualBlock, Tokens, drop_path_rates, init_linear_weights
from models.huggingface import HubModel, TimmModel, vit_in_timm, vit_to_transformers
from models.interop import Converter, State, vit_to_detectron2, vit_to_timm
from models.registry import register
from models.resize import RULES, resize_pos_embed
from ops.attention import attend, drop_rate, join_heads, split_heads
from ops.mlp import Mlp
from utils import UsageError, logger

LayerNorm = partial(nn.LayerNorm, eps=1e-6)
CLASS_TOKENS = (1, 2)
CONFIGS = "experiments/imagenet/vit/{}.yaml"

SPEC = ArchSpec(
    "vision_transformer",
    {  # the patch size is the flag --patch_size
        "IN_CHANS": 3,
        "NUM_CLS_TOKENS": 1,  # 2 for UDI
        # How position embeddings are resized, see models/resize.py: size, scale (DINO and UDI), or auto for the rule of the code
        # base that wrote the loaded file.
        "POS_RESIZE": "auto",
        "DIM_EMBED": 384,
        "DEPTH": 12,
        "NUM_HEADS": 6,
        "MLP_RATIO": 4.0,
        "QKV_BIAS": True,
        "DROP_RATE": 0.0,
        "ATTN_DROP_RATE": 0.0,
        "DROP_PATH_RATE": 0.1,
    },
    ranges={"NUM_CLS_TOKENS": integer(0, 1024)},
)


class Attention(nn.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, attn_drop: float, proj_drop: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = attn_drop
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x_BNC: Tensor, attention: bool = False) -> tuple[Tensor, Tensor | None]:
        """Attend (B, N, C), and return the maps (B, heads, N, N) if requested."""
        q, k, v = split_heads(self.qkv(x_BNC), 3, self.num_heads)
        x, maps = attend(q, k, v, dropout=drop_rate(self, self.attn_drop), attention=attention)
        return self.proj_drop(self.proj(join_heads(x))), maps


class ViTBlock(ResidualBlock):
    """A `ResidualBlock` for `Tokens`."""

    def forward(self, x: Tokens, attention: bool = False) -> tuple[Tokens, Tensor | None]:  # type: ignore[override]
        tokens_BNC, maps = super().forward(x.tokens_BNC, attention)
        return x._replace(tokens_BNC=tokens_BNC), maps


class VisionTransformer(Backbone):
    """ViT as a `Backbone`.

    Args:
        image_size: the (height, width) of the learned position embedding; other sizes are accepted.
        patch_size: side of a patch in pixels.
        spec: MODEL.SPEC, with the keys of `SPEC`.

    Raises:
        UsageError: heads that do not divide the width, a patch larger than the image, or an invalid choice.
    """

    converters: ClassVar[Mapping[str, Converter]] = {"timm": vit_to_timm, "detectron2": vit_to_detectron2}

    def __init__(self, image_size: tuple[int, int], patch_size: int, spec: CfgNode, dense: bool = False) -> None:
        super().__init__(dense)
        dim = spec.DIM_EMBED
        if dim % spec.NUM_HEADS:
            raise UsageError(f"MODEL.SPEC.NUM_HEADS {spec.NUM_HEADS} must divide the {dim} channels of DIM_EMBED")
        if not 1 <= patch_size <= min(image_size):
            raise UsageError(f"--patch_size {patch_size} must be in 1..{min(image_size)}, the side of MODEL.IMAGE_SIZE")
        if spec.NUM_CLS_TOKENS not in CLASS_TOKENS:
            raise UsageError(f"MODEL.SPEC.NUM_CLS_TOKENS {spec.NUM_CLS_TOKENS} must be 1, or 2 for UDI")
        if spec.POS_RESIZE not in ("auto", *RULES):
            raise UsageError(f"MODEL.SPEC.POS_RESIZE {spec.POS_RESIZE} must be one of auto, {', '.join(RULES)}")
        self.num_cls_tokens: int = spec.NUM_CLS_TOKENS
        self.auto_pos_resize = spec.POS_RESIZE == "auto"
        self.pos_resize: str = "size" if self.auto_pos_resize else spec.POS_RESIZE
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
        self.register_state_dict_post_hook(_save_pos_resize)

    def enter_stage(self, stage: int, x_BCHW: Tensor) -> Tokens:
        """Embed patches, prepend class tokens and add positions, resized to the grid of the image."""
        patches_BHWC = self.patch_embed(x_BCHW)
        grid = (patches_BHWC.shape[1], patches_BHWC.shape[2])
        class_tokens = self.cls_token.expand(patches_BHWC.shape[0], -1, -1)
        tokens_BNC = torch.cat([class_tokens, patches_BHWC.flatten(1, 2)], dim=1)
        prefix = self.num_cls_tokens
        # DINO skips resizing for square images only, and not for sides that differ by less than a patch.
        height, width = x_BCHW.shape[2:]
        always = self.pos_resize == "scale" and height != width and self.grid[0] == self.grid[1]
        positions_1NC = resize_pos_embed(self.pos_embed, prefix, self.grid, grid, self.pos_resize, always)
        return Tokens(self.pos_drop(tokens_BNC + positions_1NC), prefix, grid)

    def stage_blocks(self, stage: int) -> Sequence[nn.Module]:
        return self.blocks  # type: ignore[return-value]

    def tokens(self, x: Tokens) -> Tokens:
        return x

    def pool(self, tokens_BNC: Tensor, num_prefix_tokens: int) -> Tensor:
        """Return the class tokens of `view_tokens`, concatenated, or the mean patch without class tokens."""
        if not self.view_tokens:
            return tokens_BNC[:, num_prefix_tokens:].mean(dim=1)
        return torch.cat([tokens_BNC[:, token] for token in self.view_tokens], dim=-1)

    def keep_class_tokens(self, kept: int) -> None:
        """Keep the first `kept` class tokens and their positions; raise UsageError if there are fewer."""
        if kept > self.num_cls_tokens:
            raise UsageError(f"cannot keep {kept} of {self.num_cls_tokens} class tokens; keep fewer")
        positions = self.pos_embed.detach()
        self.pos_embed = nn.Parameter(torch.cat([positions[:, :kept], positions[:, self.num_cls_tokens :]], dim=1))
        self.cls_token = nn.Parameter(self.cls_token.detach()[:, :kept].clone())
        self.num_cls_tokens, self.view_tokens = kept, tuple(range(min(kept, 1)))

    def class_features(self, tokens_BNC: Tensor, num_prefix_tokens: int) -> Tensor:
        """Return all class tokens, normalized."""
        return self.norm(tokens_BNC[:, :num_prefix_tokens])

    def adopt_pos_resize(self, rule: str | None) -> None:
        """Adopt the rule of a loaded file if MODEL.SPEC.POS_RESIZE is auto."""
        if not self.auto_pos_resize or rule not in RULES:
            return
        self.pos_resize = rule
        if rule == "scale":
            logger.info("position embeddings are resized by the rule 'scale' of DINO and UDI (MODEL.SPEC.POS_RESIZE)")

    def resolve_config(self, config: CfgNode) -> CfgNode:
        """Return the config with the rule of resizing and the number of class tokens that are in use."""
        config = config.clone()
        config.defrost()
        config.MODEL.SPEC.POS_RESIZE, config.MODEL.SPEC.NUM_CLS_TOKENS = self.pos_resize, self.num_cls_tokens
        config.freeze()
        return config

    def fit_tensor(self, name: str, tensor: Tensor, image_size: tuple[int, int] | None = None) -> Tensor | None:
        """Resize position embeddings of another image size, whose grid is assumed to be square if it is unknown."""
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

    @property
    def any_grid(self) -> bool:
        """The factors of the rule `scale` are constants of a graph."""
        return self.pos_resize == "size"

    def in_timm(self, config: CfgNode) -> TimmModel:
        return vit_in_timm(config, self.patch_size, self.num_cls_tokens)

    def to_transformers(self, state: State, config: CfgNode) -> HubModel:
        return vit_to_transformers(state, config)


def _save_pos_resize(module: nn.Module, _state: Mapping[str, Tensor], _prefix: str, metadata: dict[str, str]) -> None:
    """Store the rule of resizing in the metadata of the state dict, which is saved with it."""
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
    SPEC,
)
def build_vit(arch: str, config: CfgNode, *, dense: bool, patch_size: int) -> VisionTransformer:
    """Build a ViT."""
    return VisionTransformer(tuple(config.MODEL.IMAGE_SIZE), patch_size, config.MODEL.SPEC, dense)
