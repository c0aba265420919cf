"""Logits over prototypes, as a tensor or as factors that are multiplied later, chunk by chunk.

Shapes: N rows, K prototypes, C channels of the bottleneck.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor


class FactoredLogits(NamedTuple):
    """The factors of logits, for losses that never need all logits at once.

    The product is computed in the dtype of the bottleneck; prototypes may have a wider one, for their gradient.
    """

    bottleneck: Tensor  # (..., C); of unit norm from DINO's head
    prototypes: Tensor  # (K, C)

    def product(self) -> Tensor:
        """Return the logits (..., K)."""
        return F.linear(self.bottleneck, self.prototypes.to(self.bottleneck.dtype))


Logits = Tensor | FactoredLogits


def materialize(logits: Logits) -> Tensor:
    """Return logits as a tensor."""
    return logits.product() if isinstance(logits, FactoredLogits) else logits


def split_rows(logits: Any, rows: Sequence[int]) -> list[Any]:
    """Split logits (N, K) into consecutive parts with these numbers of rows."""
    if isinstance(logits, FactoredLogits):
        return [logits._replace(bottleneck=part) for part in logits.bottleneck.split(list(rows))]
    return list(logits.split(list(rows)))


def map_rows(logits: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function of the leading axes (a reshape, transposition or selection) to logits (..., K)."""
    if isinstance(logits, FactoredLogits):
        return logits._replace(bottleneck=function(logits.bottleneck))
    return function(logits)


def take_rows(logits: Logits, rows_N: Tensor) -> Logits:
    """Return the rows with the given indices, detached."""
    if isinstance(logits, FactoredLogits):
        return FactoredLogits(logits.bottleneck.detach()[rows_N], logits.prototypes.detach())
    return logits.detach()[rows_N]
