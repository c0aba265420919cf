"""Tiny training steps in this process, and everything that a step may change."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import main_esvit
from helpers.runs import TINY_RUN, TINY_SWIN
from models import load_arch_config
from training import setup
from training.step import TrainStep

CPU = torch.device("cpu")


def build(command_line: Sequence[str], steps: int) -> tuple[main_esvit.EsViT, TrainStep]:
    args = main_esvit.get_args_parser().parse_args(list(command_line))
    config = load_arch_config(args.arch, args.cfg, args.opts)
    torch.manual_seed(0)
    method = main_esvit.build_method(args, config, CPU)
    return method, setup.build_step(args, method, steps * args.accum_iter, CPU, "fp32")


def tiny(*extra: str, steps: int = 4) -> tuple[main_esvit.EsViT, TrainStep]:
    return build([*TINY_RUN, *extra, "--seed", "0", *TINY_SWIN[:-1], "0.0"], steps)


def random_views(images: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, 3, size, size, generator=generator) for size in (32, 32, 16, 16)]


def everything(method: main_esvit.EsViT, step: TrainStep) -> dict[str, Tensor]:
    """All tensors that a step may change."""
    networks = {"student": method.student, "teacher": method.teacher, "criterion": method.criterion}
    tensors = {f"{name}.{key}": value for name, net in networks.items() for key, value in net.state_dict().items()}
    for number, state in step.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{key}": value for key, value in state.items() if isinstance(value, Tensor)}
    return {name: value.clone() for name, value in tensors.items()}


def spoiled(views: list[Tensor]) -> list[Tensor]:
    views[2][0, 0, 0, 0] = float("nan")
    return views
