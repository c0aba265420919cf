"""The projection head: published keys, normalization and the frozen gain."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.heads import DINOHead, WeightNormLinear
from ops.logits import FactoredLogits


@pytest.mark.parametrize("use_bn", [False, True])
def test_published_keys(use_bn: bool) -> None:
    head = DINOHead(12, 7, use_bn=use_bn)
    linear_layers = ("mlp.0", "mlp.3", "mlp.6") if use_bn else ("mlp.0", "mlp.2", "mlp.4")
    shapes = {name: tuple(value.shape) for name, value in head.state_dict().items()}
    assert shapes["last_layer.weight_g"] == (7, 1)
    assert shapes["last_layer.weight_v"] == (7, 256)
    assert [shapes[f"{layer}.weight"] for layer in linear_layers] == [(2048, 12), (2048, 2048), (256, 2048)]
    assert ("mlp.1.running_mean" in shapes) is use_bn


@pytest.mark.parametrize("bottleneck", [4, 64])
def test_prototypes_start_as_the_weights_of_torchs_linear_layer(bottleneck: int) -> None:
    ours = WeightNormLinear(bottleneck, 20000).weight_v
    assert ours.abs().max() <= bottleneck**-0.5
    theirs = torch.nn.Linear(bottleneck, 20000).weight
    shares = torch.linspace(0.05, 0.95, 10)
    torch.testing.assert_close(ours.flatten().quantile(shares), theirs.flatten().quantile(shares), rtol=0.03, atol=5e-3)
    assert torch.equal(WeightNormLinear(bottleneck, 5).weight_g, torch.ones(5, 1))


def test_weight_norm_equals_torch() -> None:
    ours = WeightNormLinear(5, 3)
    torch.nn.init.normal_(ours.weight_g)
    theirs = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(5, 3, bias=False))
    theirs.parametrizations.weight.original0.data.copy_(ours.weight_g.data)
    theirs.parametrizations.weight.original1.data.copy_(ours.weight_v.data)
    x = torch.randn(4, 5)
    torch.testing.assert_close(ours(x), theirs(x))


def test_logits_are_cosines_while_the_gain_is_one() -> None:
    head, x = DINOHead(6, 9, hidden_dim=8, bottleneck_dim=4), torch.randn(5, 6)
    expected = F.cosine_similarity(head.mlp(x)[:, None], head.last_layer.weight_v[None], dim=-1)
    torch.testing.assert_close(head(x), expected)


def test_norm_last_layer_freezes_the_gain_only() -> None:
    frozen = {name for name, p in DINOHead(6, 9).named_parameters() if not p.requires_grad}
    assert frozen == {"last_layer.weight_g"}
    assert all(p.requires_grad for p in DINOHead(6, 9, norm_last_layer=False).parameters())


@pytest.mark.parametrize("nlayers", [1, 2, 3])
def test_every_parameter_gets_a_gradient(nlayers: int) -> None:
    head = DINOHead(6, 9, norm_last_layer=False, nlayers=nlayers, hidden_dim=8, bottleneck_dim=4)
    head(torch.randn(5, 6)).square().sum().backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in head.parameters())
    assert len(list(head.parameters())) == 2 * nlayers + 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factored_logits_multiply_to_the_plain_ones(dtype: torch.dtype) -> None:
    """Without autocast and under it, with the bottleneck in the dtype that it multiplies in."""
    head, x = DINOHead(6, 9, norm_last_layer=False, hidden_dim=8, bottleneck_dim=4), torch.randn(5, 6)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        plain = head(x)
        head.factored = True
        factors = head(x)
    assert isinstance(factors, FactoredLogits)
    assert factors.bottleneck.dtype == plain.dtype == dtype
    assert factors.prototypes.dtype == torch.float32
    assert torch.equal(factors.product(), plain)
    factors.product().float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in head.parameters())


def test_batch_norm_normalizes_parts_apart() -> None:
    """As the parts one by one would be; without BatchNorm parts change nothing."""
    parts = [torch.randn(5, 8), 3 + torch.randn(7, 8)]
    for use_bn in (True, False):
        head = DINOHead(8, 6, use_bn=use_bn, hidden_dim=10, bottleneck_dim=4)
        together = head(torch.cat(parts), [5, 7])
        torch.testing.assert_close(together, torch.cat([head(part) for part in parts]))
        assert torch.allclose(together, head(torch.cat(parts)), atol=1e-6) != use_bn
