"""Attention put back on the image plane: every architecture's layout against what its attention does to an input."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.small_networks import small_network
from torch import Tensor

from models import Backbone
from models.base import BlockOutput
from ops.windows import WindowPartition, join_windows, partition_windows, valid_tokens, window_attention_plane

BATCH = 2


def open_up(network: Backbone) -> Backbone:
    """Make every attention hand on its inputs as values, so that its output at a token is its row of weights times the input."""
    modules: Iterator[Any] = network.modules()
    for module in modules:
        if hasattr(module, "dw"):  # the convolutional projection of CvT
            module.dw.weight.data.zero_()
            module.dw.weight.data[:, :, 1, 1] = 1
            module.bn.eps = 0.0
            identity_values(module.pw)
        for name in ("qkv", "kv", "kv_global", "proj", "proj_out", "proj_global"):
            layer = getattr(module, name, None)
            if isinstance(getattr(layer, "weight", None), Tensor):
                identity_values(layer)
    return network


def identity_values(layer: Any) -> None:
    """The last outputs of a linear layer, as many as it has inputs, become these; the others are made larger."""
    with torch.no_grad():
        weight = layer.weight.flatten(1)
        if len(weight) % weight.shape[1]:
            return  # it embeds patches
        layer.weight *= 20  # attention far from uniform
        weight[-weight.shape[1] :] = torch.eye(weight.shape[1])
        if layer.bias is not None:
            layer.bias.zero_()


def attend(network: Backbone, number: int, grid: tuple[int, int]) -> tuple[BlockOutput, Tensor, Tensor]:
    """A block's attention of random tokens: its maps, the input (B, C, H, W) without prefix tokens, the output alike."""
    stage = next(s for s in range(9) if number < sum(network.stage_depths[: s + 1]))
    block, dim, prefix = network.block_at(number), network.stage_dims[stage], 0
    regions = torch.randn(BATCH, math.prod(grid), dim)
    if hasattr(block, "attention"):  # ViL
        prefix = block.attention.attn.num_global
        tokens = torch.cat([torch.zeros(BATCH, prefix, dim), regions], dim=1)
        out, maps = block.attention.attn(tokens, grid, True)
    elif hasattr(network, "cls_token"):
        prefix = 1
        tokens = torch.cat([torch.zeros(BATCH, prefix, dim), regions], dim=1)
        out, maps = block.attn(tokens, True)
    else:
        tokens = regions
        function = block.attend if hasattr(block, "attend") else block[0].fn
        out, maps = function(regions.unflatten(1, grid), True)
        out = out.flatten(1, 2)
    as_map = [x[:, prefix:].transpose(1, 2).unflatten(2, grid) for x in (tokens, out)]
    return BlockOutput(tokens, prefix, grid, maps, number), as_map[0], as_map[1]


@torch.no_grad()
@pytest.mark.parametrize("grid", [(8, 8), (5, 10), (12, 7), (3, 4)], ids=str)
@pytest.mark.parametrize("name", ["swin", "cvt", "vil", "vit"])
def test_plane_times_input_is_the_output(name: str, grid: tuple[int, int]) -> None:
    """Windows, shifts, padding and chunks: at every region the plane times the input is the output of the attention."""
    network = open_up(small_network(name).eval())
    for number in range(sum(network.stage_depths)):
        output, x_BCHW, out_BCHW = attend(network, number, grid)
        for query in [(0, 0), (grid[0] - 1, grid[1] - 1), (grid[0] // 2, grid[1] // 2), (2, 3), (grid[0] - 1, 0)]:
            plane_BHhw = network.attention_plane(output, query)
            heads = plane_BHhw.shape[1]
            assert plane_BHhw.shape == (BATCH, heads, *grid)
            assert float(plane_BHhw.sum((2, 3)).max()) < 1 + 1e-5
            made = torch.einsum("bhyx,bhdyx->bhd", plane_BHhw, x_BCHW.unflatten(1, (heads, -1))).flatten(1)
            torch.testing.assert_close(made, out_BCHW[:, :, query[0], query[1]], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_plane_is_zero_outside_its_window_and_sums_to_one() -> None:
    network = small_network("swin").eval()
    plain, shifted = network.forward_blocks(torch.randn(1, 3, 64, 64), 4, attention=True)[:2]
    assert (network.partition_of(plain), network.partition_of(shifted)) == (
        WindowPartition(4, 0),
        WindowPartition(4, 2),
    )
    for output, rows, columns in ((plain, (4, 8), (8, 12)), (shifted, (2, 6), (10, 14))):
        plane = network.attention_plane(output, (5, 11))
        torch.testing.assert_close(plane.sum((2, 3)), torch.ones(1, plane.shape[1]))
        inside = plane[:, :, rows[0] : rows[1], columns[0] : columns[1]]
        assert float(inside.min()) > 0
        torch.testing.assert_close(inside.sum((2, 3)), plane.sum((2, 3)))
    corner = network.attention_plane(shifted, (0, 0))  # its window holds all four corners, the mask leaves its own
    assert float(corner[:, :, :2, :2].sum((2, 3)).min()) > 1 - 1e-6


@pytest.mark.parametrize(
    "partition", [WindowPartition(4), WindowPartition(4, 2), WindowPartition(3, 1), WindowPartition(1)], ids=str
)
@pytest.mark.parametrize("grid", [(8, 8), (5, 10), (2, 9)], ids=str)
def test_join_windows_undoes_partition_windows(partition: WindowPartition, grid: tuple[int, int]) -> None:
    x = torch.randn(BATCH, *grid, 3)
    assert torch.equal(join_windows(partition_windows(x, partition), partition, grid), x)
    assert int(valid_tokens(partition, grid).sum()) == math.prod(grid)


def test_attention_to_itself_is_an_impulse_at_the_query() -> None:
    """A map whose query gives all weight to itself is an impulse at the query, wherever that is."""
    partition, grid = WindowPartition(4, 2), (6, 11)
    windows = len(valid_tokens(partition, grid))
    maps = torch.eye(16).expand(BATCH * windows, 3, 16, 16)
    for y in range(grid[0]):
        for x in range(grid[1]):
            impulse = torch.zeros(BATCH, 3, *grid)
            impulse[:, :, y, x] = 1
            assert torch.equal(window_attention_plane(maps, partition, grid, (y, x)), impulse)


@torch.no_grad()
@pytest.mark.parametrize(("name", "block"), [("vit", 2), ("vil", 0)])
def test_the_class_token_looks_where_full_attention_is(name: str, block: int) -> None:
    network = small_network(name).eval()
    depth = sum(network.stage_depths)
    output = network.forward_blocks(torch.randn(1, 3, 40, 72), depth - block, attention=True)[0]
    assert output.block == block
    if network.has_class_query(output):
        assert output.attention is not None
        expected = output.attention[:, :, 0, 1:].unflatten(-1, (5, 9))
        torch.testing.assert_close(network.attention_plane(output, None), expected)
    else:
        with pytest.raises(ValueError, match="block 0 has no attention of a class or global token"):
            network.attention_plane(output, None)
    assert network.has_class_query(output) == (name == "vit")


@torch.no_grad()
def test_planes_that_are_not_there() -> None:
    network = small_network("swin").eval()
    (output,) = network.forward_blocks(torch.randn(1, 3, 64, 64), attention=True)
    with pytest.raises(ValueError, match=r"region \(8, 0\) is outside the grid \(8, 8\)"):
        network.attention_plane(output, (8, 0))
    with pytest.raises(ValueError, match="class or global token"):
        network.attention_plane(output, None)
    with pytest.raises(ValueError, match="block 3 of SwinTransformer has no attention maps"):
        network.attention_plane(network.forward_blocks(torch.randn(1, 3, 64, 64))[0], (0, 0))
