"""Outputs of a backbone with heads, by name. Logits are tensors or `ops.logits.FactoredLogits`, depending on the head.

Shapes: B images, V views, T regions of a view, S samples of a view, K prototypes, C channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class MultiCropOutput(NamedTuple):
    """Output of a dense network for a list of crops; rows are ordered by view, image and region."""

    view_logits: Any  # (V * B, K)
    region_logits: Any  # (sum over views of B * T, K)
    region_features: Tensor  # (sum over views of B * T, C), of the backbone
    regions_per_view: tuple[int, ...]  # T of each view


class LevelOutput(NamedTuple):
    """Class tokens and samples of a list of crops; rows are ordered by view, image and sample."""

    token_logits: tuple[Any, ...]  # (V * B, K) of each class token that goes through the head
    sample_logits: Any | None  # (sum over sampled views of B * S, K)
    token_features: Tensor  # (V * B, class tokens, C), of the backbone
    sample_features: Tensor | None  # (sum over sampled views of B * S, C)


def by_view(rows: Tensor, output: MultiCropOutput) -> list[Tensor]:
    """Split the region rows of an output, or values computed from them, into (B, T, ...) of each view."""
    batch = len(rows) // sum(output.regions_per_view)
    views = rows.split([batch * regions for regions in output.regions_per_view])
    return [view.unflatten(0, (batch, -1)) for view in views]
