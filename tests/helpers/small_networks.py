"""One small network of every architecture, for tests that hold for all of them."""

from __future__ import annotations

from typing import NamedTuple

from config.loading import load_config
from models import Backbone, build_model


class Small(NamedTuple):
    """A registered name and the config that makes it small."""

    arch: str
    overrides: tuple[str, ...]
    patch_size: int = 8


SMALL = {
    "swin": Small(
        "swin",
        (
            *("MODEL.NAME", "swin_transformer", "MODEL.IMAGE_SIZE", "64", "MODEL.SPEC.DIM_EMBED", "12"),
            *("MODEL.SPEC.DEPTHS", "[2,2]", "MODEL.SPEC.NUM_HEADS", "[1,2]", "MODEL.SPEC.WINDOW_SIZE", "4"),
        ),
    ),
    "vit": Small(
        "vit",
        (
            *("MODEL.NAME", "vision_transformer", "MODEL.IMAGE_SIZE", "64", "MODEL.SPEC.DIM_EMBED", "24"),
            *("MODEL.SPEC.DEPTH", "3", "MODEL.SPEC.NUM_HEADS", "2"),
        ),
    ),
    "resnet": Small("resnet18", ("MODEL.NAME", "resnet", "MODEL.IMAGE_SIZE", "64")),
    "cvt": Small(
        "cvt",
        (
            *("MODEL.NAME", "cvt_v4_transformer", "MODEL.IMAGE_SIZE", "64", "MODEL.SPEC.DIM_EMBED", "[8,16]"),
            *(
                "MODEL.SPEC.PATCH_SIZE",
                "[7,3]",
                "MODEL.SPEC.PATCH_STRIDE",
                "[4,2]",
                "MODEL.SPEC.PATCH_PADDING",
                "[2,1]",
            ),
            *("MODEL.SPEC.DEPTHS", "[2,2]", "MODEL.SPEC.NUM_HEADS", "[1,2]", "MODEL.SPEC.WINDOW_SIZE", "[4,4]"),
            *("MODEL.SPEC.MLP_RATIO", "[4.0,4.0]", "MODEL.SPEC.SHIFT", "True", "MODEL.SPEC.REL_POS_EMBED", "True"),
        ),
    ),
    "vil": Small(
        "vil",
        (
            *("MODEL.NAME", "vision_longformer", "MODEL.IMAGE_SIZE", "64", "MODEL.SPEC.MSVIT.ARCH"),
            "l1,h1,d12,n2,s1,g1,p4,f4,a0_l2,h2,d24,n2,s0,g1,p2,f4,a0",
        ),
    ),
}
ARCHITECTURES = list(SMALL)


def small_network(name: str, *overrides: str, dense: bool = False, is_teacher: bool = False) -> Backbone:
    """The small network of an architecture, in training mode."""
    arch, own, patch_size = SMALL[name]
    config = load_config(None, [*own, *overrides])
    return build_model(arch, config, dense=dense, is_teacher=is_teacher, patch_size=patch_size)
