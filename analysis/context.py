"""The network under analysis, with its config, scale, device and output folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from yacs.config import CfgNode

import data
from analysis import attention
from analysis.images import Scale, Selection, load_pictures, scale_of
from checkpoints import files
from config.arguments.run_analysis import LEARNING, PATCH_SIZE
from data.transforms import augment
from evaluation.features import frozen_backbone, network_config
from models import Backbone


class AnalysisContext(NamedTuple):
    """What all tasks share."""

    backbone: Backbone
    config: CfgNode
    scale: Scale
    device: torch.device
    output_dir: Path
    args: argparse.Namespace

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        return int(self.config.MODEL.SPEC.IN_CHANS)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width to which all images of a folder are cropped."""
        return self.scale.size_for(*self.config.MODEL.IMAGE_SIZE)

    @property
    def tokens(self) -> list[str]:
        """The class tokens to show attention of, for `Backbone.choose_token`."""
        return ["cls", "cls+"] if self.args.token == "both" else [self.args.token]

    @property
    def block(self) -> int:
        """Index of the block that --block selects."""
        return attention.find_block(self.backbone, self.args.block)

    @property
    def image_path(self) -> str:
        """The image or folder to draw: --image_path, else --data_path."""
        return str(self.args.image_path or self.args.data_path)

    def output_path(self, name: str) -> Path:
        """Return the path of a result, with network and learning in its name."""
        return self.output_dir / f"{self.args.arch}_{LEARNING[self.args.learning]}_{name}"

    def load_pictures(self, path: str) -> Selection:
        """Load an image, or --num_images images of a folder.

        Raises:
            UsageError: no such images, or they cannot be read.
        """
        layout, value_range = data.layout_of(self.args, path), self.config.INPUT.RANGE
        return load_pictures(path, self.args.num_images, self.scale, self.in_chans, layout, value_range)


def build_context(args: argparse.Namespace, device: torch.device) -> AnalysisContext:
    """Load the network, and create --output_dir."""
    config = network_config(args, patch_size=PATCH_SIZE)
    augment.check_normalization(config.INPUT.MEAN, config.INPUT.STD, config.MODEL.SPEC.IN_CHANS)
    backbone = frozen_backbone(args, config, args.pretrained_weights, device)
    if args.token == "both":
        backbone.choose_token("cls")  # tasks choose each of `AnalysisContext.tokens`
    scale = scale_of(backbone, config, args.image_size, device)
    return AnalysisContext(backbone, config, scale, device, files.make_output_dir(args.output_dir), args)
