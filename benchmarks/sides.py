"""The steps that benchmarks compare, on random crops: this project's (`lean`), the plain one, and the backbone of timm alone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main_esvit
import utils
from benchmarks.plain import PlainStep, make_plain, make_plain_loss
from config.ranges import COUNT, integer
from models import load_arch_config
from training import setup
from training.step import TrainStep

SIDES = ("timm", "plain", "lean")
GLOBAL_SIZE, LOCAL_SIZE = 224, 96
TIMM_NAME = "swin_tiny_patch4_window7_224"
CPU = torch.device("cpu")
ANY_SIZE: dict[str, dict[str, Any]] = {  # what makes networks of timm take crops of any size
    "swin": {"strict_img_size": False},
    "deit": {"dynamic_img_size": True},
}


def add_sizes(parser: argparse.ArgumentParser, batch: int) -> None:
    """Add the flags for the size of a step."""
    parser.add_argument("--batch", type=COUNT, default=batch, help="images per step")
    parser.add_argument("--out_dim", type=COUNT, default=65536, help="prototypes K")
    parser.add_argument(
        "--local_crops", type=integer(0, 1000), default=8, help="crops of 96 pixels, besides two of 224"
    )


def make_crops(batch: int, local_crops: int, device: torch.device | None = None) -> list[Tensor]:
    """Return two global and some local random crops."""
    sizes = [GLOBAL_SIZE] * 2 + [LOCAL_SIZE] * local_crops
    return [torch.randn(batch, 3, size, size, device=device) for size in sizes]


def build_step(
    side: str,
    args: argparse.Namespace,
    *,
    arch: str = "swin_tiny",
    dense: bool = True,
    precision: str = "fp32",
    flags: tuple[str, ...] = (),
    overrides: tuple[str, ...] = (),
    device: torch.device = CPU,
) -> TrainStep:
    """Return the lean or the plain step as main_esvit.py builds it from `flags`, with prototypes that are not frozen."""
    sizes = ["--batch_size_per_gpu", args.batch, "--out_dim", args.out_dim, "--local_crops_number", args.local_crops]
    plain = ["--plain_loss", "on"] if side == "plain" else []
    line = ["--arch", arch, "--use_dense_prediction", dense, "--freeze_last_layer", 0, "--epochs", 1, *sizes, *plain]
    line += ["--warmup_epochs", 0, *flags, *(["--"] if overrides else []), *overrides]
    options = main_esvit.get_args_parser().parse_args([str(word) for word in line])
    config = load_arch_config(options.arch, options.cfg, options.opts)
    torch.manual_seed(0)
    method = main_esvit.build_method(options, config, device)
    step = setup.build_step(options, method, 100, device, precision)
    if side == "plain":
        make_plain(method.student)
        make_plain(method.teacher)
        make_plain_loss(method.criterion)
        return PlainStep(step)
    return step


def cache_masks(network: nn.Module) -> nn.Module:
    """Cache the shift masks of timm's Swin by size; with `strict_img_size=False` it would compute them in every forward."""
    for module in network.modules():
        if isinstance(module, SwinTransformerBlock):
            module.get_attn_mask = _cached_by_size(module.get_attn_mask)
    return network


def _cached_by_size(make: Callable[[Tensor], Tensor | None]) -> Callable[[Tensor], Tensor | None]:
    cache: dict[tuple[torch.Size, torch.dtype], Tensor | None] = {}

    def get(x_BHWC: Tensor) -> Tensor | None:
        key = x_BHWC.shape[1:3], x_BHWC.dtype
        if key not in cache:
            cache[key] = make(x_BHWC)
        return cache[key]

    return get


def build_timm(
    precision: str, drop_path: float, name: str = TIMM_NAME, device: torch.device = CPU, **settings: Any
) -> Callable[[list[Tensor]], None]:
    """Return a function that runs a network of timm on crops: teacher forward, student forward and backward; no head, no loss."""
    family = next((family for family in ANY_SIZE if family in name), "")
    settings = ANY_SIZE.get(family, {}) | {"num_classes": 0} | settings
    student = cache_masks(timm.create_model(name, drop_path_rate=drop_path, **settings)).to(device)
    teacher = cache_masks(timm.create_model(name, drop_path_rate=0.0, **settings)).to(device)

    def run(crops: list[Tensor]) -> None:
        with utils.autocast(device, precision):
            with torch.no_grad():
                teacher(torch.cat(crops[:2]))
            groups = [crops[:2], crops[2:]] if len(crops) > 2 else [crops]
            features = torch.cat([student(torch.cat(group)) for group in groups])
        features.float().square().mean().backward()
        student.zero_grad(set_to_none=True)

    return run
