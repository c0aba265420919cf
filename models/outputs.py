"""TODO."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class MultiCropOutput(NamedTuple):
    """What a dense network gives for a list of crops; rows in the order view, image (, region).

    Logits are tensors, or `FactoredLogits` where the heads are told to give these.
    """

    view_logits: Any  # (V * B, K)
    region_logits: Any  # (sum over views of B * T, K)
    region_features: Tensor  # (sum over views of B * T, C), of the backbone
    regions_per_view: tuple[int, ...]  # T of each of the V views


class LevelOutput(NamedTuple):
    """Class tokens and samples of a list of crops; rows in the order view, image (, sample)."""

    token_logits: tuple[Any, ...]  # of each class token that goes through the head (V * B, K)
    sample_logits: Any | None  # (sum over sampled views of B * S, K)
    token_features: Tensor  # (V * B, class tokens, C), of the backbone
    sample_features: Tensor | None  # (as many rows, C)


def by_view(rows: Tensor, output: MultiCropOutput) -> list[Tensor]:
    """Flat region rows of an output, or what was made of them, by its views: (B, T, ...) each."""
    batch = len(rows) // sum(output.regions_per_view)
    views = rows.split([batch * regions for regions in output.regions_per_view])
    return [view.unflatten(0, (batch, -1)) for view in views]
