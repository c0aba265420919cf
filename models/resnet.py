"""ResNet (He et al., CVPR 2016), ResNeXt and Wide ResNet of torchvision. Regions are the positions of the last feature map.

State-dict keys have the prefix `backbone.backbone.`, as in microsoft/esvit.

Shapes: B images, C channels, H x W feature map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torchvision
from torch import Tensor, nn
from yacs.config import CfgNode

from config.schema import ArchSpec
from models.base import Backbone, Tokens, grid_tokens
from models.huggingface import HubModel, TimmModel, resnet_to_transformers
from models.interop import Converter, State, renamed, resnet_timm_name, resnet_to_detectron2, resnet_to_mmdet
from models.registry import register

CONFIG = "experiments/imagenet/resnet/resnet50.yaml"


class ResNet(Backbone):
    """A network of torchvision as a `Backbone`.

    Args:
        name: name in torchvision.
        in_chans: channels of the images.
    """

    has_attention = False
    any_grid = True
    converters: ClassVar[Mapping[str, Converter]] = {
        "timm": lambda state: renamed(state, resnet_timm_name),
        "mmdet": resnet_to_mmdet,
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
        self.name = name
        self.patch_size = 1
        self.backbone = nn.Module()
        self.backbone.backbone = network  # as in the published keys
        self.stage_dims = tuple(width // 2**i for i in (3, 2, 1, 0))
        self.stage_depths = tuple(len(self.stage_blocks(stage)) for stage in range(4))
        self.norm = nn.Identity()
        self.to(memory_format=torch.channels_last)  # the fastest layout for convolutions

    def enter_stage(self, stage: int, x_BCHW: Tensor) -> Tensor:
        """Apply the stem before the first stage; later stages have strides in their first block."""
        network: Any = self.backbone.backbone
        return network.maxpool(network.relu(network.bn1(network.conv1(x_BCHW)))) if stage == 0 else x_BCHW

    def stage_blocks(self, stage: int) -> Sequence[nn.Module]:
        return getattr(self.backbone.backbone, f"layer{stage + 1}")

    def call_block(self, block: nn.Module, x_BCHW: Tensor, attention: bool) -> tuple[Tensor, None]:
        return block(x_BCHW), None

    def tokens(self, x_BCHW: Tensor) -> Tokens:
        return grid_tokens(x_BCHW.permute(0, 2, 3, 1))

    def timm_name(self, name: str) -> str:
        return resnet_timm_name(name)

    def in_timm(self, config: CfgNode) -> TimmModel:
        in_chans = config.MODEL.SPEC.IN_CHANS
        return TimmModel(self.name, {} if in_chans == 3 else {"in_chans": in_chans})

    def to_transformers(self, state: State, config: CfgNode) -> HubModel:
        return resnet_to_transformers(self.in_timm(config), renamed(state, resnet_timm_name))


NAMES = torchvision.models.list_models(module=torchvision.models, include=["resnet*", "resnext*", "wide_resnet*"])


@register({name: CONFIG if name == "resnet50" else "" for name in NAMES}, ArchSpec("resnet", {"IN_CHANS": 3}))
def build_resnet(arch: str, config: CfgNode, *, dense: bool, patch_size: int) -> ResNet:
    """Build the network of torchvision of that name; it has no patches."""
    return ResNet(arch, config.MODEL.SPEC.IN_CHANS, dense)
