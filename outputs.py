"""What travels from networks to losses: named fields, known to both and owned by neither.

Shapes: B images, V views, T regions of a view, S samples of a view, K prototypes, C channels; UDI's levels also have L local views.
Origin: this project's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor


class FactoredLogits(NamedTuple):
    """Logits not multiplied yet, for losses that never need all of them at once.

    The product is computed in the dtype of the bottleneck; prototypes may be wider, so that their gradient is.
    """

    bottleneck: Tensor  # (..., C), of any length; DINO's head gives it length 1
    prototypes: Tensor  # (K, C)

    def product(self) -> Tensor:
        """The logits (..., K)."""
        return F.linear(self.bottleneck, self.prototypes.to(self.bottleneck.dtype))


Logits = Tensor | FactoredLogits


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


class StudentLevels(NamedTuple):
    """UDI's logits of a student; of local views L may be 0, and what is not learned is None."""

    cls_VBK: Logits
    local_cls_LBK: Logits
    plus_VBK: Logits | None = None
    local_plus_LBK: Logits | None = None
    patch_VBSK: Logits | None = None
    local_patch_LBSK: Logits | None = None


class TeacherLevels(NamedTuple):
    """UDI's logits of a teacher.

    `patch` [v] is of view 1 - v at the places of the samples of student view v, `local_patch` [l, v] of view v at those of local
    view l. Samples that are not valid count nowhere.
    """

    cls_VBK: Logits
    patch_VBSK: Logits | None = None
    valid_VBS: Tensor | None = None
    local_patch_LVBSK: Logits | None = None
    local_valid_LVBS: Tensor | None = None


def multiplied(logits: Logits) -> Tensor:
    """Logits as a tensor, whichever they are."""
    return logits.product() if isinstance(logits, FactoredLogits) else logits


def split_rows(logits: Any, rows: Sequence[int]) -> list[Any]:
    """Logits (N, K), multiplied or not, cut into consecutive parts of so many rows."""
    if isinstance(logits, FactoredLogits):
        return [logits._replace(bottleneck=part) for part in logits.bottleneck.split(list(rows))]
    return list(logits.split(list(rows)))


def changed(logits: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Logits, multiplied or not, with the same change of their leading axes."""
    if isinstance(logits, FactoredLogits):
        return logits._replace(bottleneck=change(logits.bottleneck))
    return change(logits)


def by_view(rows: Tensor, output: MultiCropOutput) -> list[Tensor]:
    """Flat region rows of an output, or what was made of them, by its views: (B, T, ...) each."""
    batch = len(rows) // sum(output.regions_per_view)
    views = rows.split([batch * regions for regions in output.regions_per_view])
    return [view.unflatten(0, (batch, -1)) for view in views]
