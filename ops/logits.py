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


def materialize(logits: Logits) -> Tensor:
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
