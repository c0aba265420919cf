"""Attention pooling at samples: plain attention where samples are the tokens, and nothing from samples that do not count."""

from __future__ import annotations

import pytest
import torch

from models.heads import DINOHead
from models.srs import SRS, bilinear_weights, one_hot_weights
from utils import UsageError


def test_all_tokens_as_samples_are_plain_attention() -> None:
    srs, tokens = SRS(24, 3), torch.randn(2, 16, 24)
    normed = srs.norm(tokens)
    q, k, v = srs.qkv(normed).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
    attended = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, dim=-1) @ v
    expected = srs.out_norm(srs.proj(attended.transpose(1, 2).flatten(2)) + normed)
    every = one_hot_weights(torch.arange(16).expand(2, -1), 16)
    assert torch.allclose(srs(tokens, every), expected, atol=1e-5)
    order = torch.randperm(16)
    assert torch.allclose(srs(tokens, every[:, order]), expected[:, order], atol=1e-5)


def test_stacked_samples_are_separate_calls() -> None:
    srs, tokens = SRS(24, 2), torch.randn(2, 20, 24)
    parts = [bilinear_weights(torch.rand(2, s, 2) * 3, (4, 5)) for s in (3, 6)]
    together = srs(tokens, torch.cat(parts, dim=1))
    assert torch.allclose(together, torch.cat([srs(tokens, part) for part in parts], dim=1), atol=1e-6)


def test_samples_that_are_not_valid_are_finite_and_without_gradient() -> None:
    srs, tokens = SRS(24, 2), torch.randn(1, 16, 24, requires_grad=True)
    valid = torch.tensor([[True, False]])
    out = srs(tokens, bilinear_weights(torch.rand(1, 2, 2) * 3, (4, 4)) * valid[..., None])
    assert bool(torch.isfinite(out).all())
    direction = torch.randn(24)
    (of_invalid,) = torch.autograd.grad(((out @ direction) * ~valid).sum(), tokens, retain_graph=True)
    (of_masked,) = torch.autograd.grad(((out @ direction) * valid).sum(), tokens, retain_graph=True)
    (of_first,) = torch.autograd.grad(out[:, 0] @ direction, tokens)
    assert bool(of_invalid.any())  # so it is the mask of the loss that keeps them out
    assert torch.allclose(of_masked, of_first, atol=1e-6)


def test_weights_are_those_of_the_four_tokens_around() -> None:
    places = torch.tensor([[[3.5, 5.5], [13.0, 13.0], [0.0, 2.25]]])
    weights = bilinear_weights(places, (14, 14))[0].unflatten(-1, (14, 14))
    assert weights[0, 3:5, 5:7].tolist() == [[0.25, 0.25], [0.25, 0.25]]
    assert weights[1, 13, 13] == 1
    assert weights[2, 0, 2:4].tolist() == [0.75, 0.25]
    assert weights.sum(dim=(1, 2)).tolist() == [1, 1, 1]
    assert bilinear_weights(torch.zeros(1, 1, 2), (1, 1)).tolist() == [[[1.0]]]
    anywhere = bilinear_weights(torch.rand(1, 5000, 2) * 13, (14, 14))
    torch.testing.assert_close(anywhere.sum(dim=-1), torch.ones(1, 5000))
    assert float(anywhere.min()) >= 0
    assert int((anywhere > 0).sum(dim=-1).max()) == 4


def test_small_has_the_published_size() -> None:
    srs = SRS(384, 6)
    attention = sum(p.numel() for name, p in srs.named_parameters() if not name.startswith("norm."))
    assert attention + 2 * 384 == 592_896
    with torch.device("meta"):
        assert sum(p.numel() for p in DINOHead(384, 65536).parameters()) == 22_352_128


def test_heads_must_divide_the_channels() -> None:
    with pytest.raises(UsageError, match="--srs_heads 5 must divide the 24"):
        SRS(24, 5)
