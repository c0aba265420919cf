"""Networks that are compared with those of detectors, and their feature maps as detectors return them."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from fill import fill_
from torch import Tensor

from checkpoints import loading
from config.loading import load_config
from models import Backbone, build_model

DEPTHS, NUM_HEADS, DIM = [2, 2, 3, 2], [1, 2, 2, 4], 8


def swin(window: int, image_size: int = 224) -> Backbone:
    """A narrow Swin with the stages of the published ones."""
    spec = {"DIM_EMBED": DIM, "NUM_HEADS": NUM_HEADS, "DEPTHS": DEPTHS, "WINDOW_SIZE": window}
    overrides = [word for key, value in spec.items() for word in (f"MODEL.SPEC.{key}", str(value))]
    config = load_config(None, ["MODEL.NAME", "swin_transformer", "MODEL.IMAGE_SIZE", str(image_size), *overrides])
    return filled(build_model("swin", config)).eval()


def resnet(arch: str) -> Backbone:
    return build_model(arch, load_config(None, ["MODEL.NAME", "resnet"])).eval()


def filled(network: Backbone) -> Backbone:
    fill_(network.state_dict())
    return network


def load(network: Backbone, other: Backbone, folder: Path) -> None:
    """Load the weights of another network, with tables of positions resized."""
    torch.save(other.state_dict(), folder / "other.pth")
    loading.load_backbone(network, folder / "other.pth")


def stage_maps(network: Backbone, images: Tensor) -> list[Tensor]:
    """The last tokens (B, C, H, W) of each stage, normalized as in detectors: with weights in the last stage only."""
    blocks = network.forward_blocks(images, sum(network.stage_depths))
    maps = []
    for stage, end in enumerate(accumulate(network.stage_depths), start=1):
        tokens_BNC, grid = blocks[end - 1].tokens_BNC, blocks[end - 1].grid
        if stage == len(network.stage_depths):
            tokens_BNC = network.norm(tokens_BNC)
        elif network.has_attention:
            tokens_BNC = F.layer_norm(tokens_BNC, tokens_BNC.shape[-1:], eps=1e-6)
        maps.append(tokens_BNC.transpose(1, 2).unflatten(2, grid))
    return maps
