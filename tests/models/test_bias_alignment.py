"""Biases reach the fused attention in the layout that CUDA's memory-efficient kernel takes as it is, in one call per block."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers.small_networks import SMALL
from torch import Tensor

from config.loading import load_config
from models import build_model

# Windows whose number of keys is no multiple of the alignment; and calls of attention in the four blocks, of which the two of ViL
# with sliding chunks have one for regions and one for global tokens.
NETWORKS = {
    "swin": (("MODEL.SPEC.WINDOW_SIZE", "7"), 4),
    "cvt": (("MODEL.SPEC.WINDOW_SIZE", "[3,3]"), 4),
    "vil": ((), 6),
}


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [64, 40], ids="{} pixels".format)
@pytest.mark.parametrize("name", NETWORKS)
def test_rows_of_biases_are_aligned(name: str, size: int, precision: torch.dtype) -> None:
    """The rule of torch: the last stride is 1, or attention is computed explicitly; the others are multiples of 8, or it copies."""
    overrides, calls = NETWORKS[name]
    network = build_model(SMALL[name].arch, load_config(None, [*SMALL[name].overrides, *overrides]))
    biases: list[Tensor] = []
    fused = F.scaled_dot_product_attention

    def note(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert bias.dtype == q.dtype == precision
        assert q.ndim == 4
        biases.append(bias)
        return fused(q, k, v, bias, *args, **kwargs)

    with (
        mock.patch.object(F, "scaled_dot_product_attention", note),
        torch.autocast("cpu", precision, enabled=precision != torch.float32),
    ):
        network(torch.randn(2, 3, size, size))
    assert len(biases) == calls
    assert any(bias.shape[-1] % 8 for bias in biases)
    for bias in biases:
        *strides, last = bias.stride()
        assert last == 1
        assert not any(stride % 8 for stride in strides)
