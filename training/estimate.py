"""Estimate of the training time of a full-size network on a CPU, logged before the first step."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence

import torch

import utils
from losses.distillation import TEACHER_VIEWS
from models import Backbone
from utils import counted, logger

FULL_SIZE = 5_000_000  # parameters of a backbone; most networks of experiments/demo have a million
BACKWARD = 2  # times the forward pass
RECIPE = "docs/first_hour.md has a recipe that takes minutes (--arch swin --cfg experiments/demo/swin_micro.yaml)"


def log_training_time(
    args: argparse.Namespace, network: Backbone, parameters: int, sides: Sequence[int], steps: int, channels: int
) -> None:
    """Log what a step, an epoch and the run will take if a full-size `network` is trained on a CPU.

    Args:
        parameters: Number of parameters of the backbone.
        sides: Size of each view of an image in pixels, the teacher's views first.
        steps: Optimizer steps of an epoch.
    """
    if parameters < FULL_SIZE or args.compile or args.fsdp:
        return
    images = args.batch_size_per_gpu * args.accum_iter
    seconds = images * seconds_per_image(network, sides, channels, args.precision)
    logger.warning(
        "on this CPU a step of %s will take about %s, an epoch %s and the run of %s %s; %s",
        counted(images, "image"),
        duration(seconds),
        duration(seconds * steps),
        counted(args.epochs, "epoch"),
        duration(seconds * steps * args.epochs),
        RECIPE,
    )


def seconds_per_image(network: Backbone, sides: Sequence[int], channels: int, precision: str) -> float:
    """Time the forward pass of one image's views, and add the teacher's and the backward pass; heads and loss are left out.

    A copy of the network is used and random states are restored, so that training is the same with and without it.
    """
    network = copy.deepcopy(network).eval()
    device = torch.device("cpu")
    seconds: list[float] = []
    with torch.no_grad(), utils.isolated_rng(0), utils.autocast(device, precision):
        for side in sides:
            view = torch.zeros(1, channels, side, side)
            if side not in sides[: len(seconds)]:
                network.forward_features(view)  # the first call also allocates
            started = time.perf_counter()
            network.forward_features(view)
            seconds.append(time.perf_counter() - started)
    return (1 + BACKWARD) * sum(seconds) + sum(seconds[:TEACHER_VIEWS])


def duration(seconds: float) -> str:
    """Return a time in its largest unit: `40 seconds`, `12 minutes`, `2.5 hours`, `9 days`."""
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.{0 if seconds >= 10 * length else 1}f} {unit}s"
    return f"{seconds:.{0 if seconds >= 10 else 1}f} seconds"
