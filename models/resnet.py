"""ResNet and its kin, as torchvision defines them: regions are the positions of the last map, the view feature is their mean.

Keys carry the published prefix `backbone.backbone.` (golden file resnet50).

Shapes: B images, C channels, H x W map.
Origin: ResNet (He et al., CVPR 2016), networks of torchvision; key names of microsoft/esvit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torchvision
from torch import Tensor, nn
from yacs.config import CfgNode

from models.base import Backbone, Tokens, grid_tokens
from models.interop import Converter, renamed, resnet_timm_name, resnet_to_detectron2
from models.registry import register

CONFIG = "experiments/imagenet/resnet/resnet50.yaml"


class ResNet(Backbone):
    """A torchvision ResNet, ResNeXt or wide ResNet as a backbone of the common contract.

    Args:
        name: torchvision's name of the network.
        in_chans: channels of the images.
        dense: as in `Backbone`.
    """

    has_attention = False
    converters: ClassVar[Mapping[str, Converter]] = {
        "timm": lambda state: renamed(state, resnet_timm_name),
        "mmdet": lambda state: renamed(state, resnet_timm_name),
        "detectron2": resnet_to_detectron2,
    }

    def __init__(self, name: str, in_chans: int = 3, dense: bool = False) -> None:
        super().__init__(dense)
        network = torchvision.models.get_model(name, weights=None)
        if in_chans != 3:
            first = network.conv1
            network.conv1 = nn.Conv2d(in_chans, first.out_channels, 7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        width = network.fc.in_features
        del network.fc
        self.patch_size = 1
        self.backbone = nn.Module()
        self.backbone.backbone = network  # the published nesting
        self.stage_dims = tuple(width // 2**i for i in (3, 2, 1, 0))
        self.stage_depths = tuple(len(self.stage_blocks(stage)) for stage in range(4))
        self.norm = nn.Identity()
        self.to(memory_format=torch.channels_last)  # how convolutions run fastest, in half precision above all

    def enter_stage(self, stage: int, x_BCHW: Tensor) -> Tensor:
        """The stem before the first stage; later stages stride inside their first block."""
        network: Any = self.backbone.backbone
        return network.maxpool(network.relu(network.bn1(network.conv1(x_BCHW)))) if stage == 0 else x_BCHW

    def stage_blocks(self, stage: int) -> Sequence[nn.Module]:
        """See `Backbone.stage_blocks`."""
        return getattr(self.backbone.backbone, f"layer{stage + 1}")

    def call_block(self, block: nn.Module, x_BCHW: Tensor, attention: bool) -> tuple[Tensor, None]:
        """torchvision's blocks take and return a map."""
        return block(x_BCHW), None

    def tokens(self, x_BCHW: Tensor) -> Tokens:
        """See `Backbone.tokens`; a position of the map is a token."""
        return grid_tokens(x_BCHW.permute(0, 2, 3, 1))

    def timm_name(self, name: str) -> str:
        """See `Backbone.timm_name`."""
        return resnet_timm_name(name)


# Every ResNet-like name of the installed torchvision.
NAMES = torchvision.models.list_models(module=torchvision.models, include=["resnet*", "resnext*", "wide_resnet*"])


@register({name: CONFIG if name == "resnet50" else "" for name in NAMES}, config_name="resnet")
def build_resnet(arch: str, config: CfgNode, *, dense: bool, patch_size: int) -> ResNet:
    """ResNet by torchvision's name; it has no patches."""
    return ResNet(arch, config.MODEL.SPEC.IN_CHANS, dense)
