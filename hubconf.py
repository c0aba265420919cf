"""Backbones for `torch.hub.load`: the published networks of EsViT (Li et al., ICLR 2022) and UDI (Su and Ji, ECCV 2024).

    backbone = torch.hub.load("PATH/TO/THIS/CHECKOUT", "esvit_swin_tiny", source="local", weights="checkpoint.pth")
    view_BC = backbone(images_BCHW)
    view_BC, regions_BTC = backbone.forward_features(images_BCHW)
    backbone.choose_token("both")                   # udi_vit_small: view features (B, 2 C) of both class tokens

All entries return a `models.Backbone` in evaluation mode without heads, and accept
    weights: checkpoint file of any supported layout; None for random weights.
    checkpoint_key: network of a full checkpoint, `teacher` or `student`.
    allow_partial: load the tensors that match, and ignore the rest.
They raise `utils.UsageError` for an invalid file. The modules of this checkout are imported as `models`, `config`, `utils`, ...;
use `export.py` in a program that has modules of the same names.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from checkpoints.loading import load_backbone
from models import Backbone, build_model, load_arch_config
from utils import UsageError

dependencies = ["torch", "torchvision", "timm", "yacs", "yaml", "safetensors", "numpy", "filelock", "tqdm"]


def _backbone(
    arch: str,
    overrides: tuple[str, ...] = (),
    weights: str | Path | None = None,
    checkpoint_key: str = "teacher",
    allow_partial: bool = False,
) -> Backbone:
    backbone = build_model(arch, load_arch_config(arch, None, overrides), is_teacher=True)
    if weights is not None:
        try:
            report = load_backbone(backbone, weights, checkpoint_key, allow_partial=allow_partial)
        except UsageError as error:
            raise UsageError(_without_flags(str(error), allow_partial)) from None
        print(f"{weights}: {report}", file=sys.stderr)
    return backbone.eval()


def _without_flags(message: str, allow_partial: bool) -> str:
    """Replace a remedy that names flags or keys of the scripts by arguments of the entries."""
    problem, _, remedy = message.replace("even with --allow_partial", "even partially").rpartition("; ")
    if "--" in remedy or "MODEL." in remedy:
        remedy = "call the entry of the network in the file"
        remedy += "" if allow_partial else ", or pass allow_partial=True to load the tensors that match"
    return f"{problem}; {remedy}"


_TWO_TOKENS = ("MODEL.SPEC.NUM_CLS_TOKENS", "2", "MODEL.SPEC.POS_RESIZE", "scale")
_WINDOW_14 = ("MODEL.SPEC.WINDOW_SIZE", "14")


def esvit_swin_tiny(**kwargs: Any) -> Backbone:
    """Swin-T, window 7."""
    return _backbone("swin_tiny", **kwargs)


def esvit_swin_small(**kwargs: Any) -> Backbone:
    """Swin-S, window 7."""
    return _backbone("swin_small", **kwargs)


def esvit_swin_base(**kwargs: Any) -> Backbone:
    """Swin-B, window 7."""
    return _backbone("swin_base", **kwargs)


def esvit_swin_tiny_w14(**kwargs: Any) -> Backbone:
    """Swin-T, window 14."""
    return _backbone("swin_tiny", _WINDOW_14, **kwargs)


def esvit_swin_small_w14(**kwargs: Any) -> Backbone:
    """Swin-S, window 14."""
    return _backbone("swin_small", _WINDOW_14, **kwargs)


def esvit_swin_base_w14(**kwargs: Any) -> Backbone:
    """Swin-B, window 14."""
    return _backbone("swin_base", _WINDOW_14, **kwargs)


def esvit_vil_2262(**kwargs: Any) -> Backbone:
    """ViL, window 7."""
    return _backbone("vil_2262", **kwargs)


def esvit_cvt_tiny(**kwargs: Any) -> Backbone:
    """CvT, window 7."""
    return _backbone("cvt_tiny", **kwargs)


def esvit_deit_small(**kwargs: Any) -> Backbone:
    """DeiT-S, patches of 16 pixels."""
    return _backbone("deit_small", **kwargs)


def udi_vit_small(**kwargs: Any) -> Backbone:
    """ViT-S of UDI, patches of 16 pixels; the view feature is the first class token, see `Backbone.choose_token`."""
    return _backbone("deit_small", _TWO_TOKENS, **kwargs)


def esvit_resnet50(**kwargs: Any) -> Backbone:
    """ResNet-50."""
    return _backbone("resnet50", **kwargs)
