"""Swin: properties that hold for any input."""

from __future__ import annotations

import pytest
import torch

from config.loading import load_config
from models import Backbone, build_model
from ops.windows import pad_to_windows, relative_position_index, shift_mask, window_partition, window_reverse
from utils import UsageError

TINY = ["MODEL.IMAGE_SIZE", "[64, 64]", "MODEL.SPEC.DIM_EMBED", "12", "MODEL.SPEC.DEPTHS", "[2, 2]"]
TINY += ["MODEL.SPEC.NUM_HEADS", "[1, 2]", "MODEL.SPEC.WINDOW_SIZE", "4", "MODEL.SPEC.DROP_PATH_RATE", "0.0"]


def tiny_network(**kwargs: bool) -> Backbone:
    return build_model("swin", load_config(None, TINY), **kwargs).eval()


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (40, 72), (30, 33)])
def test_attention_maps_are_those_used(size: tuple[int, int]) -> None:
    """The path with maps and the one through scaled_dot_product_attention give the same features; rows sum to 1."""
    network = tiny_network()
    images = torch.randn(2, 3, *size)
    with_maps = network.forward_blocks(images, n=4, attention=True)
    without = network.forward_blocks(images, n=4)
    for a, b in zip(with_maps, without):
        torch.testing.assert_close(a.tokens_BNC, b.tokens_BNC)
        assert b.attention is None
        assert a.attention is not None
        torch.testing.assert_close(a.attention.sum(-1), torch.ones_like(a.attention[..., 0]))


@torch.no_grad()
def test_non_square_images_do_not_mix_and_keep_their_grid() -> None:
    network = tiny_network()
    images = torch.randn(3, 3, 40, 72)
    maps = network.forward_feature_maps(images)
    assert maps.shape == (3, 24, 5, 9)
    torch.testing.assert_close(network.forward_feature_maps(images[1:2]), maps[1:2])
    torch.testing.assert_close(maps.flatten(2).mean(-1), network(images))


@torch.no_grad()
def test_views_keep_their_order_when_sizes_alternate() -> None:
    network = tiny_network(dense=True)
    views = [torch.randn(2, 3, size, size) for size in (64, 32, 32, 64)]
    output = network(views)
    torch.testing.assert_close(output.view_logits, torch.cat([network(view) for view in views]))
    assert output.regions_per_view == (64, 16, 16, 64)
    regions = [network.forward_features(view).regions_BTC.flatten(0, 1) for view in views]
    torch.testing.assert_close(output.region_features, torch.cat(regions))


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    network, images = tiny_network(), torch.randn(2, 3, 64, 64)
    network(images).square().sum().backward()
    plain = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    assert len(plain) == len(list(network.parameters()))
    network.zero_grad()
    network.grad_checkpointing = True
    network(images).square().sum().backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name])


def test_teacher_has_no_stochastic_depth() -> None:
    config = load_config(None, [*TINY[:-1], "0.9"])
    student, teacher = build_model("swin", config), build_model("swin", config, is_teacher=True)
    teacher.load_state_dict(student.state_dict())
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(teacher.train()(images), student.eval()(images))
        assert not torch.equal(student.train()(images), student(images))
    assert config.MODEL.SPEC.DROP_PATH_RATE == 0.9


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (["MODEL.SPEC.NUM_HEADS", "[1]"], "NUM_HEADS [1] .* DEPTHS"),
        (["MODEL.SPEC.NUM_HEADS", "[5, 5]"], "must divide the 12 channels"),
        (["MODEL.IMAGE_SIZE", "4"], "IMAGE_SIZE .* 8 pixels"),
        (["MODEL.SPEC.USE_APE", "true"], "USE_APE"),
    ],
)
def test_values_that_do_not_fit_together(override: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words.replace("[", r"\[")):
        build_model("swin", load_config(None, TINY + override))


def test_n_last_blocks_outside_the_network() -> None:
    with pytest.raises(ValueError, match=r"outside 1\.\.4"):
        tiny_network().forward_return_n_last_blocks(torch.zeros(1, 3, 64, 64), 5)


# --------------------------------------------------------------------------- windows


def test_windows_are_cut_and_put_back() -> None:
    grid = torch.arange(2 * 6 * 9 * 1.0).view(2, 6, 9, 1)
    windows = window_partition(grid, 3)
    assert windows.shape == (2 * 2 * 3, 9, 1)
    torch.testing.assert_close(windows[1], grid[0, :3, 3:6].reshape(9, 1))
    torch.testing.assert_close(window_reverse(windows, 3, (6, 9)), grid)


def test_padding_goes_to_the_bottom_and_the_right() -> None:
    grid = torch.ones(1, 5, 7, 2)
    padded = pad_to_windows(grid, 4)
    assert padded.shape == (1, 8, 8, 2)
    assert padded.sum() == grid.sum()
    assert bool((padded[:, :5, :7] == 1).all())
    assert pad_to_windows(padded, 4) is padded


def test_relative_position_index_tells_offsets_apart() -> None:
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
