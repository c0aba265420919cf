"""The published networks, for benchmarks that measure all of them.

Origin: EsViT (Li et al., ICLR 2022), tables of results and of speed.
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """A published network."""

    arch: str
    overrides: tuple[str, ...] = ()
    timm_name: str | None = None  # None if timm lacks the network
    paper: int | None = None  # images per second in the paper, None if not given


WINDOW_14 = ("MODEL.SPEC.WINDOW_SIZE", "14")
ROWS = {
    "DeiT-S/16": Row("deit_small", (), "deit_small_patch16_224", 1007),
    "ResNet-50": Row("resnet50", (), "resnet50"),
    "Swin-T, window 7": Row("swin_tiny", (), "swin_tiny_patch4_window7_224", 808),
    "Swin-S, window 7": Row("swin_small", (), "swin_small_patch4_window7_224", 467),
    "Swin-B, window 7": Row("swin_base", (), "swin_base_patch4_window7_224", 297),
    "Swin-T, window 14": Row("swin_tiny", WINDOW_14),
    "Swin-S, window 14": Row("swin_small", WINDOW_14, None, 383),
    "Swin-B, window 14": Row("swin_base", WINDOW_14, None, 254),
    "ViL, window 7": Row("vil_2262", (), None, 386),
    "CvT, window 7": Row("cvt_tiny", (), None, 848),
}
