"""Sinkhorn-Knopp assignment of teacher rows to prototypes, expressed as a center.

The algorithm scales exp(logits / temperature) alternately, so that all prototypes get equal shares of the batch and each row adds
up to 1. Its result is u_n exp(logits_nk / temperature) v_k. Rows are scaled last, so it equals the softmax over k of

    (logits_nk - center_k) / temperature        center_k = -temperature log v_k

and any loss that subtracts a center can use it. Each iteration is one pass over the rows, chunk by chunk.

Shapes: N rows, K prototypes.
Origin: SwAV (Caron et al., NeurIPS 2020), section 3.1, after Cuturi (NeurIPS 2013); used instead of centering by DINOv2 (Oquab et
al., TMLR 2024), section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distributed.collectives import all_reduce_max, all_reduce_sum
from ops.logits import FactoredLogits, Logits, materialize, take_rows

ITERATIONS = 3
CHUNK_BYTES = 32 * 2**20  # logits of a chunk in float32


@torch.no_grad()
def sinkhorn_center(
    logits: Logits, temperature: float, iterations: int = ITERATIONS, chunk_bytes: int = CHUNK_BYTES
) -> Tensor:
    """Return the center (1, K) of the rows (N, K) of all processes, with mean 0; a collective operation."""
    bottleneck = logits.bottleneck if isinstance(logits, FactoredLogits) else logits
    prototypes = len(logits.prototypes) if isinstance(logits, FactoredLogits) else logits.shape[-1]
    chunks = torch.arange(len(bottleneck), device=bottleneck.device).split(max(1, chunk_bytes // (4 * prototypes)))
    log_v_K = torch.zeros(
        prototypes, dtype=torch.promote_types(bottleneck.dtype, torch.float32), device=bottleneck.device
    )
    for iteration in range(iterations):
        log_sum_K = torch.full_like(log_v_K, -torch.inf)
        for rows_N in chunks:
            scaled_NK = materialize(take_rows(logits, rows_N)).to(log_v_K.dtype) / temperature
            if iteration:  # u = 1 in the first
                scaled_NK = scaled_NK - (scaled_NK + log_v_K).logsumexp(dim=1, keepdim=True)
            log_sum_K = log_sum_K.logaddexp(scaled_NK.logsumexp(dim=0))
        largest_K = all_reduce_max(log_sum_K.clone())
        log_v_K = -(largest_K + all_reduce_sum((log_sum_K - largest_K).exp()).log())
    return -temperature * (log_v_K - log_v_K.mean())[None]
