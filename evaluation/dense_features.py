"""Region features on one grid: stages of frozen networks and raw pixels, concatenated along the channels.

Shapes: B images, C channels, h x w regions of the finest stage.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode

import utils
from evaluation.features import NETWORK, PIXELS, UNTRAINED, FeatureFunction, frozen_backbone
from models import Backbone
from utils import UsageError

PATCH_SIDE = 4  # of raw pixels; a region of more pixels is averaged to so many


class DenseFeatures:
    """A function from images (B, C, H, W) to the features (B, C, h, w) of a network and of baselines.

    Args:
        functions: by name; all return maps of the same grid.
        multiple: what the sides of images must be multiples of, in pixels.
        example: images of that kind, to measure widths and grid.

    Attributes:
        columns: channels of each function, by its name.
        stride: side of a region of the grid, in pixels.
    """

    def __init__(self, functions: dict[str, FeatureFunction], multiple: int, example_BCHW: Tensor) -> None:
        self.functions, self.multiple = functions, multiple
        maps = {name: function(example_BCHW) for name, function in functions.items()}
        self.stride = example_BCHW.shape[2] // next(iter(maps.values())).shape[2]
        self.columns: dict[str, slice] = {}
        self.channels = 0
        for name, map_BChw in maps.items():
            self.columns[name] = slice(self.channels, self.channels + map_BChw.shape[1])
            self.channels += map_BChw.shape[1]

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        return torch.cat([function(images_BCHW) for function in self.functions.values()], dim=1)


def build_dense_features(
    args: argparse.Namespace, config: CfgNode, backbone: Backbone, device: torch.device, precision: str
) -> DenseFeatures:
    """Return the features of --stages of a network, and those of --baselines.

    Raises:
        UsageError: no such stage.
    """
    count = len(backbone.stage_depths)
    stages = [number - 1 for number in args.stages or [count]]
    if max(stages) >= count:
        last = utils.counted(count, "stage")
        raise UsageError(f"--stages {max(stages) + 1}: {args.arch} has {last}; choose from 1 to {count}")
    blank_BCHW = torch.zeros(1, config.MODEL.SPEC.IN_CHANS, *config.MODEL.IMAGE_SIZE, device=device)
    multiple = round(blank_BCHW.shape[2] / backbone.region_grid(blank_BCHW)[0])
    example_BCHW = blank_BCHW.new_zeros(1, blank_BCHW.shape[1], 2 * multiple, 2 * multiple)
    functions: dict[str, FeatureFunction] = {NETWORK: network_features(backbone, stages, device, precision)}
    if args.baselines:
        stride = DenseFeatures(functions, multiple, example_BCHW).stride
        functions[PIXELS] = partial(pixel_features, stride=stride)
        if args.pretrained_weights:
            untrained = frozen_backbone(args, config, "", device)
            functions[UNTRAINED] = network_features(untrained, stages, device, precision)
    return DenseFeatures(functions, multiple, example_BCHW)


def network_features(
    backbone: Backbone, stages: Sequence[int], device: torch.device, precision: str
) -> FeatureFunction:
    """Return a function that computes the regions of some stages, counted from 0, on the finest grid of them."""

    @torch.no_grad()
    def function(images_BCHW: Tensor) -> Tensor:
        with utils.autocast(device, precision):
            maps = backbone.forward_stage_maps(images_BCHW, stages)
        return on_finest_grid([map_BChw.float() for map_BChw in maps])

    return function


def on_finest_grid(maps: Sequence[Tensor]) -> Tensor:
    """Resize maps (B, C, h, w) bilinearly to the largest of their grids, and concatenate them."""
    grid = max((tuple(map_BChw.shape[2:]) for map_BChw in maps), key=lambda side: side[0] * side[1])
    return torch.cat([upsampled(map_BChw, grid) for map_BChw in maps], dim=1)


def upsampled(maps_BChw: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps bilinearly to (height, width)."""
    if tuple(maps_BChw.shape[2:]) == tuple(size):
        return maps_BChw
    return F.interpolate(maps_BChw, tuple(size), mode="bilinear", align_corners=False)


def pixel_features(images_BCHW: Tensor, stride: int) -> Tensor:
    """Return the values of the pixels of each region of `stride` pixels, averaged to at most `PATCH_SIDE` x `PATCH_SIDE`."""
    side = min(PATCH_SIDE, stride)
    rows, columns = (length // stride * side for length in images_BCHW.shape[2:])
    return F.pixel_unshuffle(F.adaptive_avg_pool2d(images_BCHW, (rows, columns)), side)
