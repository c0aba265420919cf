"""Conversion of state dicts between these networks and other libraries.

timm and torchvision differ in names only. detectron2 has the names of its `modeling/backbone` and of its torchvision converter,
without the prefix `backbone.`, which its matching heuristics find. mmdet has the names of its `models/backbones`; its Swin reads
only names with the prefix `backbone.`, and merges patches with `nn.Unfold`, which orders channels differently.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from models.resize import resize_grid
from utils import UsageError

State = Mapping[str, Tensor]
Converter = Callable[[State], dict[str, Tensor]]


def renamed(state: State, rename: Callable[[str], str]) -> dict[str, Tensor]:
    """Return `state` with its keys renamed."""
    return {rename(name): tensor for name, tensor in state.items()}


def _substitute(name: str, rules: Mapping[str, str]) -> str:
    for pattern, replacement in rules.items():
        name = re.sub(pattern, replacement, name)
    return name


# --------------------------------------------------------------------------- Swin


def swin_timm_name(name: str) -> str:
    """Return timm's name: timm merges patches at the start of a stage, the published keys at the end of the previous one."""
    return re.sub(r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) + 1}.downsample.", name)


def swin_to_timm(state: State) -> dict[str, Tensor]:
    """Convert to timm's Swin, which has no buffers of relative position indices."""
    kept = {name: tensor for name, tensor in state.items() if not name.endswith("relative_position_index")}
    return renamed(kept, swin_timm_name)


def swin_to_detectron2(state: State) -> dict[str, Tensor]:
    """Convert to detectron2's Swin."""
    rules = _output_norm(state)
    return renamed(_with_one_window(state), lambda name: _substitute(name, rules))


def swin_to_mmdet(state: State) -> dict[str, Tensor]:
    """Convert to mmdet's Swin, with merged channels in the order of `nn.Unfold`; it computes relative position indices itself."""
    rules = {
        **_output_norm(state),
        r"^layers\.": "stages.",
        r"^patch_embed\.proj\.": "patch_embed.projection.",
        r"\.attn\.": ".attn.w_msa.",
        r"\.mlp\.fc1\.": ".ffn.layers.0.0.",
        r"\.mlp\.fc2\.": ".ffn.layers.1.",
    }
    converted = {}
    for name, tensor in _with_one_window(state).items():
        if not name.endswith("relative_position_index"):
            in_order = _in_unfold_order(tensor) if ".downsample." in name else tensor
            converted[f"backbone.{_substitute(name, rules)}"] = in_order
    return converted


def _output_norm(state: State) -> dict[str, str]:
    """Return the rename rule of the final norm, for detectors that normalize the output of every stage."""
    last = max(int(match[1]) for name in state if (match := re.match(r"layers\.(\d+)\.", name)))
    return {r"^norm\.": f"norm{last}."}


def _with_one_window(state: State) -> dict[str, Tensor]:
    """Resize the tables of smaller windows to the largest window, for detectors that have one window size in all stages."""
    sides = {name: math.isqrt(len(table)) for name, table in state.items() if name.endswith("bias_table")}
    largest = max(sides, key=lambda name: sides[name])
    fitted = dict(state)
    for name, side in sides.items():
        fitted[name] = resize_grid(state[name], (side, side), (sides[largest], sides[largest]))
        fitted[name.replace("bias_table", "index")] = state[largest.replace("bias_table", "index")]
    return fitted


def _in_unfold_order(weight: Tensor) -> Tensor:
    """Reorder the input channels (..., 4 C) of patch merging from (column, row, C) to the (C, row, column) of `nn.Unfold`."""
    return weight.unflatten(-1, (2, 2, -1)).movedim(-1, -3).transpose(-1, -2).flatten(-3)


# --------------------------------------------------------------------------- ViT


def vit_to_timm(state: State) -> dict[str, Tensor]:
    """Convert to timm's ViT, where a second class token is a register token."""
    kept = dict(state)
    if "cls_token" in kept and kept["cls_token"].shape[1] == 2:
        kept["cls_token"], kept["reg_token"] = (token.contiguous() for token in kept["cls_token"].split(1, dim=1))
    return kept


def vit_from_timm(state: State) -> dict[str, Tensor]:
    """Convert from timm's ViT: append register tokens to the class token."""
    joined = dict(state)
    if {"cls_token", "reg_token"} <= joined.keys():
        joined["cls_token"] = torch.cat([joined["cls_token"], joined.pop("reg_token")], dim=1)
    return joined


def vit_to_detectron2(state: State) -> dict[str, Tensor]:
    """Convert to detectron2's ViT, which has the published names, the position of a class token, but no token and no final norm.

    Raises:
        UsageError: more than one class token.
    """
    if "cls_token" in state and state["cls_token"].shape[1] > 1:
        raise UsageError("detectron2's ViT supports at most one class token; pass --class_tokens first or none")
    return {name: tensor for name, tensor in state.items() if not name.startswith(("cls_token", "norm."))}


# --------------------------------------------------------------------------- ResNet


def resnet_timm_name(name: str) -> str:
    """Return the name in timm and torchvision, without the published prefix."""
    return name.removeprefix("backbone.backbone.")


def resnet_to_mmdet(state: State) -> dict[str, Tensor]:
    """Convert to mmdet's ResNet and ResNeXt, which have torchvision's names; mmengine matches them without a prefix.

    Raises:
        UsageError: a Wide ResNet.
    """
    renamed_state = renamed(state, resnet_timm_name)
    if renamed_state["layer1.0.conv2.weight"].shape[1] > 64:
        raise UsageError("mmdet has no Wide ResNet; export to detectron2, timm or onnx instead")
    return renamed_state


def resnet_to_detectron2(state: State) -> dict[str, Tensor]:
    """Convert to the names that detectron2's converter gives torchvision networks: stem, res2 .. res5, shortcut."""
    rules = {
        r"^(conv1|bn1)\.": r"stem.\1.",
        r"^layer(\d)\.": lambda match: f"res{int(match[1]) + 1}.",
        r"\bbn(\d)\.": r"conv\1.norm.",
        r"downsample\.0\.": "shortcut.",
        r"downsample\.1\.": "shortcut.norm.",
    }
    return renamed(state, lambda name: _substitute(resnet_timm_name(name), rules))  # type: ignore[arg-type]
