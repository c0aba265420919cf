"""Attention: the fused kernel and the explicit form agree, with every shape of bias."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ops.attention import attend, pad_keys, pairwise_bias

BIASES = {"none": None, "by head": (3, 5, 7), "shared": (1, 3, 5, 7), "by image": (2, 1, 1, 7), "by key": (7,)}


def problem(dtype: torch.dtype = torch.float64, bias: tuple[int, ...] | None = None) -> list[Tensor]:
    """Queries (2, 3, 5, 4), keys (2, 3, 7, 4), values (2, 3, 7, 6), and a bias."""
    torch.manual_seed(0)
    shapes = [(2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6), *([] if bias is None else [bias])]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
def test_fused_and_explicit_attention_agree_with_gradients(bias: tuple[int, ...] | None) -> None:
    inputs = problem(bias=bias)
    direction = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    results = []
    for attention in (False, True):
        q, k, v, *given = inputs
        x, maps = attend(q, k, v, bias=given[0] if given else None, scale=0.7, attention=attention)
        assert (maps is not None) == attention
        results.append([x, *torch.autograd.grad(x, inputs, direction)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("biases", [4, 1], ids=["of each", "of all"])
def test_windows_as_an_axis_have_a_bias(biases: int) -> None:
    q, k, v = (torch.randn(2, 4, 3, 5, 6) for _ in range(3))
    bias = torch.randn(biases, 3, 5, 5)
    for attention in (False, True):
        x, maps = attend(q, k, v, bias=bias, attention=attention)
        for window in range(4):
            one, one_map = attend(
                q[:, window], k[:, window], v[:, window], bias=bias[window % biases], attention=attention
            )
            torch.testing.assert_close(x[:, window], one)
            if maps is not None:
                torch.testing.assert_close(maps[:, window], one_map)


def test_padded_keys_of_a_bias_do_not_count() -> None:
    q, k, v, bias = problem(bias=(3, 5, 7))
    padded = pad_keys(bias) + torch.tensor([0.0] * 7 + [float("nan")])
    assert padded.shape == (3, 5, 8)
    for attention in (False, True):
        x, maps = attend(q, k, v, bias=padded, attention=attention)
        expected, expected_maps = attend(q, k, v, bias=bias, attention=attention)
        torch.testing.assert_close((x, maps), (expected, expected_maps), rtol=0, atol=0)
    assert torch.equal(*(torch.autograd.grad(attend(q, k, v, bias=b)[0].sum(), bias)[0] for b in (padded, bias)))


def test_pairwise_bias_and_its_gradient_are_those_of_a_loop() -> None:
    table, index = torch.randn(6, 2, requires_grad=True), torch.randint(6, (3, 5))
    bias = pairwise_bias(table, index)
    direction, expected = torch.randn(2, 3, 5), torch.zeros(6, 2)
    for h, q, n in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(5)).tolist():
        assert bias[h, q, n] == table[index[q, n], h]
        expected[index[q, n], h] += direction[h, q, n]
    torch.testing.assert_close(torch.autograd.grad(bias, table, direction)[0], expected)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_maps_are_in_float32_and_sum_to_one(autocast: bool) -> None:
    q, k, v, bias = problem(torch.float32, (3, 5, 7))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        x, maps = attend(q, k, v, bias=bias, attention=True)
        fused, _ = attend(q, k, v, bias=bias)
    assert maps is not None
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(2, 3, 5))
    torch.testing.assert_close(x, fused, atol=2e-2 if autocast else 1e-5, rtol=0)
