"""What travels from networks to losses: named fields, known to both and owned by neither.

Shapes: B images, V views, T regions of a view, K prototypes, C channels.
Origin: this project's own.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class MultiCropOutput(NamedTuple):
    """What a dense network gives for a list of crops; rows in the order view, image (, region)."""

    view_logits: Tensor  # (V * B, K)
    region_logits: Tensor  # (sum over views of B * T, K)
    region_features: Tensor  # (sum over views of B * T, C), of the backbone
    regions_per_view: tuple[int, ...]  # T of each of the V views
