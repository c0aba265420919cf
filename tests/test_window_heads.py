"""One lookup to the heads of windows and back, against padding, rolling, cutting and splitting step by step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.plain import make_plain
from config.loading import load_config
from models import build_model
from ops.window_gather import to_grid, to_windows
from ops.windows import WindowPartition, join_windows, partition_windows

SIZES = [
    ((8, 8), WindowPartition(4)),
    ((8, 8), WindowPartition(4, 2)),
    ((5, 7), WindowPartition(4)),
    ((5, 7), WindowPartition(4, 2)),
    ((3, 3), WindowPartition(7)),
    ((6, 9), WindowPartition(3, 1)),
]


def step_by_step(
    tokens_BHWC: Tensor, weight: Tensor, bias: Tensor | None, cut: WindowPartition, num_heads: int
) -> Tensor:
    """Pad with zeros before the projection, which makes its bias of them; (3, B * windows, heads, N, D)."""
    qkv = torch.nn.functional.linear(partition_windows(tokens_BHWC, cut), weight, bias)
    return qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("grid", "cut"), SIZES, ids=str)
def test_values_and_gradients_of_both_ways(grid: tuple[int, int], cut: WindowPartition, with_bias: bool) -> None:
    tokens = torch.randn(2, *grid, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(18, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(18, dtype=torch.float64, requires_grad=True) if with_bias else None
    wanted = [x for x in (tokens, weight, bias) if x is not None]

    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q * k.sin() + v.exp()

    expected_windows = mix(*step_by_step(tokens, weight, bias, cut, 2))
    expected = join_windows(expected_windows.transpose(1, 2).flatten(2), cut, grid)
    qkv = torch.nn.functional.linear(tokens, weight, bias)
    found_windows = mix(*to_windows(qkv, bias, cut, 2, bias_groups=2))
    found = to_grid(found_windows, cut, tokens.shape, 2)
    torch.testing.assert_close(found_windows, expected_windows)
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(expected)
    for a, b in zip(torch.autograd.grad(found, wanted, direction), torch.autograd.grad(expected, wanted, direction)):
        torch.testing.assert_close(a, b)


def test_groups_of_a_shifted_bias_hold_the_windows_of_one_image() -> None:
    qkv = torch.randn(2, 8, 8, 12)
    by_head = to_windows(qkv, None, WindowPartition(4, 2), 2, bias_groups=2)
    by_window = to_windows(qkv, None, WindowPartition(4, 2), 2, bias_groups=8)
    for a, b in zip(by_head, by_window):
        assert a.shape == (8, 2, 16, 2)
        assert torch.equal(a.flatten(0, 1), b.flatten(0, 1))
        assert b.shape == (2, 8, 16, 2)


@pytest.mark.parametrize("size", [64, 40])
def test_network_equals_the_plain_one(size: int) -> None:
    """Features and every gradient, with windows that fit the grid and with padding."""
    spec = ["MODEL.IMAGE_SIZE", "64", "MODEL.SPEC.DIM_EMBED", "12", "MODEL.SPEC.DEPTHS", "[2,2]"]
    spec += ["MODEL.SPEC.NUM_HEADS", "[1,2]", "MODEL.SPEC.WINDOW_SIZE", "4", "MODEL.SPEC.DROP_PATH_RATE", "0.0"]
    ours, plain = (build_model("swin", load_config(None, spec)).double() for _ in range(2))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.3)
    plain.load_state_dict(ours.state_dict())
    make_plain(plain)
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    features = [network(images) for network in (ours, plain)]
    torch.testing.assert_close(*features)
    for feature in features:
        feature.square().sum().backward()
    for (name, a), b in zip(ours.named_parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
