"""These networks in the two libraries of Hugging Face: the arguments of `timm.create_model`, and the config and tensors of
`transformers.AutoModel`.

A network becomes transformers' own (SwinModel, ViTModel, ResNetModel) if that computes the same, else timm's in the wrapper of
transformers (TimmWrapperModel). In transformers' Swin `layer_norm_eps` is not that of the norms after the patch projection and of
patch merging, which have 1e-5 instead of 1e-6; the former is made up for exactly, see `swin_to_transformers`. Tensors have the
names of the files on the hub, which all versions of transformers read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from yacs.config import CfgNode

from models.interop import State, renamed, swin_to_timm, vit_to_timm
from utils import UsageError

Arguments = dict[str, Any]


class TimmModel(NamedTuple):
    """A call of `timm.create_model`."""

    name: str
    arguments: Arguments  # those that JSON can hold
    norm_layer: str = ""  # an expression, if the network needs another norm than timm's default

    def call(self, **others: Any) -> str:
        """Return the call as Python code, with other arguments too."""
        words = [repr(self.name), *(f"{key}={value!r}" for key, value in (self.arguments | others).items())]
        words += [f"norm_layer={self.norm_layer}"] if self.norm_layer else []
        return f"timm.create_model({', '.join(words)})"


class HubModel(NamedTuple):
    """A network for `transformers.AutoModel.from_pretrained`."""

    config: dict[str, Any]  # of config.json
    state: dict[str, Tensor]  # of model.safetensors


# Names of timm, and the arguments in which they differ.
TIMM_SWINS: dict[str, Arguments] = {
    "swin_tiny_patch4_window7_224": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]},
    "swin_small_patch4_window7_224": {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24]},
    "swin_base_patch4_window7_224": {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]},
    "swin_large_patch4_window7_224": {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48]},
}
TIMM_VITS: dict[str, Arguments] = {
    "vit_tiny_patch16_224": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "vit_small_patch16_224": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "vit_base_patch16_224": {"embed_dim": 768, "depth": 12, "num_heads": 12},
}


def _nearest(presets: Mapping[str, Arguments], defaults: Arguments, wanted: Arguments) -> TimmModel:
    """Return the model of `presets` that needs the fewest arguments to be the wanted one."""
    models = []
    for name, preset in presets.items():
        given = defaults | preset
        models.append(TimmModel(name, {key: value for key, value in wanted.items() if given.get(key) != value}))
    return min(models, key=lambda model: len(model.arguments))


def _side(size: Sequence[int]) -> int | list[int]:
    """Return (height, width) as these libraries write it: one number for squares."""
    height, width = size
    return height if height == width else [height, width]


def in_wrapper(model: TimmModel, state: State) -> HubModel:
    """Return a model of timm, with the names that its tensors have there, in transformers' wrapper."""
    config = {
        "model_type": "timm_wrapper",
        "architectures": ["TimmWrapperModel"],
        "architecture": model.name,
        "model_args": model.arguments,
        "num_classes": 0,
    }
    return HubModel(config, renamed(state, lambda name: f"timm_model.{name}"))


def _hub_names(state: State, names: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename tensors by the rules (pattern: replacement), and split `qkv` into query, key and value."""
    named: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for pattern, replacement in names.items():
            name = re.sub(pattern, replacement, name)
        if ".qkv." in name:
            parts = zip(("query", "key", "value"), tensor.chunk(3))
            named |= {name.replace(".qkv.", f".{part}."): rows.contiguous() for part, rows in parts}
        else:
            named[name] = tensor
    return named


BLOCK_NAMES = {
    r"\.norm1\.": ".layernorm_before.",
    r"\.norm2\.": ".layernorm_after.",
    r"\.mlp\.fc1\.": ".intermediate.dense.",
    r"\.mlp\.fc2\.": ".output.dense.",
    r"\.attn\.proj\.": ".attention.output.dense.",
    r"^norm\.": "layernorm.",
    r"^patch_embed\.proj\.": "embeddings.patch_embeddings.projection.",
}


# --------------------------------------------------------------------------- Swin


def swin_in_timm(config: CfgNode) -> TimmModel:
    """Return timm's Swin of a config, whose LayerNorms have eps 1e-5 by default; those of `timm.layers` have 1e-6."""
    spec = config.MODEL.SPEC
    defaults = {"img_size": 224, "patch_size": 4, "window_size": 7, "in_chans": 3, "mlp_ratio": 4.0, "qkv_bias": True}
    wanted = {
        "img_size": _side(config.MODEL.IMAGE_SIZE),
        "patch_size": spec.PATCH_SIZE,
        "window_size": spec.WINDOW_SIZE,
        "in_chans": spec.IN_CHANS,
        "embed_dim": spec.DIM_EMBED,
        "depths": list(spec.DEPTHS),
        "num_heads": list(spec.NUM_HEADS),
        "mlp_ratio": spec.MLP_RATIO,
        "qkv_bias": spec.QKV_BIAS,
    }
    return _nearest(TIMM_SWINS, defaults, wanted)._replace(norm_layer="timm.layers.LayerNorm")


def swin_to_transformers(state: State, config: CfgNode) -> HubModel:
    """Convert to transformers' Swin, or to timm's if a stage has a smaller window, for which the former has no table.

    The norm after the patch projection has eps 1e-5 there, and LayerNorm(x, eps) = LayerNorm(sqrt(10) x, 10 eps), so the
    projection is multiplied by sqrt(10).

    Raises:
        UsageError: a network without that norm.
    """
    spec = config.MODEL.SPEC
    if not spec.PATCH_NORM:
        raise UsageError("MODEL.SPEC.PATCH_NORM False: the Swin of transformers has this norm; choose another --format")
    tables = {tensor.shape[0] for name, tensor in state.items() if name.endswith("relative_position_bias_table")}
    if tables != {(2 * spec.WINDOW_SIZE - 1) ** 2}:
        return in_wrapper(swin_in_timm(config), swin_to_timm(state))
    names = {
        r"^layers\.": "encoder.layers.",
        r"^patch_embed\.norm\.": "embeddings.norm.",
        **BLOCK_NAMES,
        r"\.attn\.": ".attention.self.",
    }
    named = _hub_names(state, names)
    for kind in ("weight", "bias"):
        named[f"embeddings.patch_embeddings.projection.{kind}"] *= math.sqrt(10)
    hub_config = {
        "model_type": "swin",
        "architectures": ["SwinModel"],
        "image_size": _side(config.MODEL.IMAGE_SIZE),
        "patch_size": spec.PATCH_SIZE,
        "num_channels": spec.IN_CHANS,
        "embed_dim": spec.DIM_EMBED,
        "depths": list(spec.DEPTHS),
        "num_heads": list(spec.NUM_HEADS),
        "window_size": spec.WINDOW_SIZE,
        "mlp_ratio": spec.MLP_RATIO,
        "qkv_bias": spec.QKV_BIAS,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "drop_path_rate": spec.DROP_PATH_RATE,
    }
    return HubModel(hub_config, named)


# --------------------------------------------------------------------------- ViT


def vit_in_timm(config: CfgNode, patch_size: int, class_tokens: int) -> TimmModel:
    """Return timm's ViT of a config, where a second class token is a register token."""
    spec = config.MODEL.SPEC
    defaults = {"img_size": 224, "patch_size": 16, "in_chans": 3, "mlp_ratio": 4.0, "qkv_bias": True}
    wanted = {
        "img_size": _side(config.MODEL.IMAGE_SIZE),
        "patch_size": patch_size,
        "in_chans": spec.IN_CHANS,
        "embed_dim": spec.DIM_EMBED,
        "depth": spec.DEPTH,
        "num_heads": spec.NUM_HEADS,
        "mlp_ratio": spec.MLP_RATIO,
        "qkv_bias": spec.QKV_BIAS,
    }
    model = _nearest(TIMM_VITS, defaults, wanted)
    tokens: dict[int, Arguments] = {
        0: {"class_token": False, "global_pool": "avg", "fc_norm": False},
        1: {},
        2: {"reg_tokens": 1, "no_embed_class": False},
    }
    return model._replace(arguments=model.arguments | tokens[class_tokens])


def vit_to_transformers(state: State, config: CfgNode) -> HubModel:
    """Convert to transformers' ViT, or to timm's if the number of class tokens is not one.

    The former's pooler is an affine map of the class token; these networks have none, so the identity is exported, and
    `pooler_output` is the class token.
    """
    spec = config.MODEL.SPEC
    patch_size = state["patch_embed.proj.weight"].shape[-1]
    class_tokens = state["cls_token"].shape[1] if "cls_token" in state else 0
    if class_tokens != 1:
        return in_wrapper(vit_in_timm(config, patch_size, class_tokens), vit_to_timm(state))
    names = {
        r"^blocks\.": "encoder.layer.",
        r"^cls_token": "embeddings.cls_token",
        r"^pos_embed": "embeddings.position_embeddings",
        **BLOCK_NAMES,
        r"\.attn\.": ".attention.attention.",
    }
    identity = {"pooler.dense.weight": torch.eye(spec.DIM_EMBED), "pooler.dense.bias": torch.zeros(spec.DIM_EMBED)}
    hub_config = {
        "model_type": "vit",
        "architectures": ["ViTModel"],
        "image_size": _side(config.MODEL.IMAGE_SIZE),
        "patch_size": patch_size,
        "num_channels": spec.IN_CHANS,
        "hidden_size": spec.DIM_EMBED,
        "num_hidden_layers": spec.DEPTH,
        "num_attention_heads": spec.NUM_HEADS,
        "intermediate_size": int(spec.DIM_EMBED * spec.MLP_RATIO),
        "qkv_bias": spec.QKV_BIAS,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "pooler_act": "linear",
    }
    return HubModel(hub_config, _hub_names(state, names) | identity)


# --------------------------------------------------------------------------- ResNet


def resnet_to_transformers(model: TimmModel, state: State) -> HubModel:
    """Convert to transformers' ResNet, or to timm's if it has grouped or wide blocks.

    Both have the strides of torchvision, in the 3x3 convolutions of a bottleneck.

    Args:
        model: the network in timm.
        state: with the names that torchvision and timm give the tensors.
    """
    in_chans = state["conv1.weight"].shape[1]
    blocks = [
        {int(match[1]) for name in state if (match := re.match(rf"layer{i}\.(\d+)\.", name))} for i in (1, 2, 3, 4)
    ]
    bottleneck = "layer1.0.conv3.weight" in state
    if bottleneck and state["layer1.0.conv2.weight"].shape[:2] != (64, 64):
        return in_wrapper(model, state)
    names = {
        r"^conv1\.": "embedder.embedder.convolution.",
        r"^bn1\.": "embedder.embedder.normalization.",
        r"^layer(\d)\.(\d+)\.": lambda match: f"encoder.stages.{int(match[1]) - 1}.layers.{match[2]}.",
        r"downsample\.0\.": "shortcut.convolution.",
        r"downsample\.1\.": "shortcut.normalization.",
        r"\bconv(\d)\.": lambda match: f"layer.{int(match[1]) - 1}.convolution.",
        r"\bbn(\d)\.": lambda match: f"layer.{int(match[1]) - 1}.normalization.",
    }
    hub_config = {
        "model_type": "resnet",
        "architectures": ["ResNetModel"],
        "num_channels": in_chans,
        "embedding_size": 64,
        "hidden_sizes": [(256 if bottleneck else 64) * 2**i for i in range(4)],
        "depths": [len(numbers) for numbers in blocks],
        "layer_type": "bottleneck" if bottleneck else "basic",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
    }
    return HubModel(hub_config, _hub_names(state, names))
