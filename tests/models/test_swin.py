"""Swin: properties that hold for any input."""

from __future__ import annotations

import pytest
import torch

from config.loading import load_config
from models import Backbone, build_model
from ops.attention import split_heads
from ops.windows import (
    WindowPartition,
    crop_to_grid,
    join_window_heads,
    pad_to_windows,
    partition_heads,
    partition_windows,
    relative_position_index,
    shift_mask,
    window_partition,
    window_reverse,
)
from utils import UsageError

TINY = ["MODEL.IMAGE_SIZE", "[64, 64]", "MODEL.SPEC.DIM_EMBED", "12", "MODEL.SPEC.DEPTHS", "[2, 2]"]
TINY += ["MODEL.SPEC.NUM_HEADS", "[1, 2]", "MODEL.SPEC.WINDOW_SIZE", "4", "MODEL.SPEC.DROP_PATH_RATE", "0.0"]


def tiny_network(**kwargs: bool) -> Backbone:
    return build_model("swin", load_config(None, TINY), **kwargs).eval()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (["MODEL.SPEC.NUM_HEADS", "[1]"], "NUM_HEADS [1] .* DEPTHS"),
        (["MODEL.SPEC.NUM_HEADS", "[5, 5]"], "must divide the 12 channels"),
        (["MODEL.IMAGE_SIZE", "4"], "IMAGE_SIZE .* 8 pixels"),
        (["MODEL.SPEC.USE_APE", "true"], "USE_APE"),
    ],
)
def test_inconsistent_values_are_rejected(override: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words.replace("[", r"\[")):
        build_model("swin", load_config(None, TINY + override))


# --------------------------------------------------------------------------- windows


def test_window_reverse_undoes_window_partition() -> None:
    grid = torch.arange(2 * 6 * 9 * 1.0).view(2, 6, 9, 1)
    windows = window_partition(grid, 3)
    assert windows.shape == (2 * 2 * 3, 9, 1)
    torch.testing.assert_close(windows[1], grid[0, :3, 3:6].reshape(9, 1))
    torch.testing.assert_close(window_reverse(windows, 3, (6, 9)), grid)


def test_padding_is_at_the_bottom_and_right() -> None:
    grid = torch.ones(1, 5, 7, 2)
    padded = pad_to_windows(grid, 4)
    assert padded.shape == (1, 8, 8, 2)
    assert padded.sum() == grid.sum()
    assert bool((padded[:, :5, :7] == 1).all())
    assert pad_to_windows(padded, 4) is padded


def test_padding_with_a_token_and_its_gradient() -> None:
    x, fill = torch.randn(2, 5, 7, 3, requires_grad=True), torch.randn(3, requires_grad=True)
    padded = pad_to_windows(x, 4, fill)
    expected = fill.expand(2, 8, 8, 3).clone()
    expected[:, :5, :7] = x
    assert torch.equal(padded, expected)
    direction = torch.randn_like(padded)
    for found, gradient in zip(*(torch.autograd.grad(y, (x, fill), direction) for y in (padded, expected))):
        torch.testing.assert_close(found, gradient)
    assert torch.equal(crop_to_grid(padded, (5, 7)), x)
    assert crop_to_grid(padded, (8, 8)) is padded


@pytest.mark.parametrize("partition", [WindowPartition(3), WindowPartition(4, 2)], ids=str)
@pytest.mark.parametrize("grid", [(6, 9), (5, 7)], ids=str)
def test_heads_of_windows(partition: WindowPartition, grid: tuple[int, int]) -> None:
    """Each part equals partitioning before splitting heads, is contiguous, and is undone."""
    x = torch.randn(2, *grid, 3 * 8)
    parts = partition_heads(x, partition, 3, num_heads=4)
    windows = partition_windows(x, partition).unflatten(0, (2, -1))  # (B, windows, N, 3 C)
    for part, expected in zip(parts, split_heads(windows, 3, 4)):
        assert torch.equal(part, expected)
        assert part.is_contiguous()
    joined = torch.cat([join_window_heads(part, partition, grid) for part in parts], dim=-1)
    assert torch.equal(joined, x)


def test_relative_position_index_is_unique_per_offset() -> None:
    window = 3
    index = relative_position_index(window)
    for a in range(window**2):
        for b in range(window**2):
            rows, columns = a // window - b // window, a % window - b % window
            assert index[a, b] == (rows + window - 1) * (2 * window - 1) + columns + window - 1


def test_shift_mask_separates_what_was_not_adjacent() -> None:
    """Two tokens of a shifted window see each other exactly if they lie in one window of the unrolled plane."""
    height, width, window, shift = 8, 12, 4, 2
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    position = torch.stack([rows, columns], -1).unsqueeze(0)
    rolled = window_partition(torch.roll(position, (-shift, -shift), (1, 2)), window)  # where each token came from
    near = ((rolled[:, :, None] - rolled[:, None, :]).abs() < window).all(-1)
    mask = shift_mask((height, width), window, shift, torch.device("cpu"))
    assert torch.equal(mask == 0, near)
    assert set(mask.unique().tolist()) == {0.0, -100.0}
    assert shift_mask((7, 14), 7, 3, torch.device("cpu")).shape == (2, 49, 56)
