"""Mixup and cutmix: the mixed images are the weighted sums given by the targets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from data.transforms.mixup import ViewMixup
from utils import UsageError

IMAGES = 6
SETTINGS: dict[str, Any] = {
    "num_views": 2,
    "batch_size": IMAGES,
    "mixup_alpha": 1.0,
    "cutmix_alpha": 0.0,
    "cutmix_minmax": None,
    "prob": 1.0,
    "switch_prob": 0.5,
    "mode": "batch",
    "smoothing": 0.0,
}
MODES = ("batch", "pair", "elem")


def view_mixup(**changes: Any) -> ViewMixup:
    return ViewMixup(**{**SETTINGS, **changes})


def constant_views(count: int, size: int = 8) -> list[Tensor]:
    """Return views (B, 3, H, W) whose image i is filled with i."""
    return [
        torch.arange(float(IMAGES))[:, None, None, None].expand(IMAGES, 3, size, size).clone() for _ in range(count)
    ]


def weighted_values(weights: Tensor) -> Tensor:
    """Return sum_i weights[i, j] * i for each student image j."""
    return torch.tensor([sum(float(weights[i, j]) * i for i in range(IMAGES)) for j in range(IMAGES)])


@pytest.mark.parametrize("mode", MODES)
def test_every_pixel_is_the_weighted_sum(mode: str) -> None:
    mixed, weights = view_mixup(mode=mode)(constant_views(2))
    for view, weights_of_view in zip(mixed, weights):
        expected = weighted_values(weights_of_view)[:, None, None, None]
        torch.testing.assert_close(view, expected.expand_as(view))
        assert not torch.equal(weights_of_view, torch.eye(IMAGES))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cut", [{"cutmix_alpha": 1.0}, {"cutmix_minmax": (0.2, 0.8)}])
def test_cutmix_weights_are_area_shares(mode: str, cut: dict[str, Any]) -> None:
    mixed, weights = view_mixup(mode=mode, mixup_alpha=0.0, **cut)(constant_views(2, size=16))
    assert any(not torch.equal(view, original) for view, original in zip(mixed, constant_views(2, size=16)))
    for view, weights_of_view in zip(mixed, weights):
        torch.testing.assert_close(view.mean(dim=(1, 2, 3)), weighted_values(weights_of_view))
        assert torch.equal(view, view.round())  # cut, not blended


@pytest.mark.parametrize("mode", MODES)
def test_weights_are_a_distribution_over_two_images(mode: str) -> None:
    _, weights = view_mixup(mode=mode)(constant_views(1))
    torch.testing.assert_close(weights[0].sum(dim=0), torch.ones(IMAGES))
    assert weights[0].min() >= 0
    for j in range(IMAGES):
        others = [i for i in range(IMAGES) if i not in {j, IMAGES - 1 - j}]
        assert weights[0][others, j].abs().max() == 0


def test_draws_in_each_mode() -> None:
    own_share = {mode: view_mixup(mode=mode)(constant_views(1))[1][0].diagonal() for mode in MODES}
    assert len(own_share["batch"].unique()) == 1
    assert torch.equal(own_share["pair"], own_share["pair"].flip(0))
    assert len(own_share["pair"].unique()) == IMAGES // 2
    assert len(own_share["elem"].unique()) == IMAGES


def test_elem_weights_are_not_symmetric() -> None:
    mixed, weights = view_mixup(mode="elem")(constant_views(1))
    assert not torch.allclose(weights[0], weights[0].T)
    assert not torch.allclose(mixed[0][:, 0, 0, 0], weighted_values(weights[0].T))


def test_each_view_has_its_own_draw() -> None:
    _, weights = view_mixup()(constant_views(2))
    assert not torch.equal(weights[0], weights[1])


@pytest.mark.parametrize("num_views", [0, 1, 3, 7])
def test_further_views_are_not_mixed(num_views: int) -> None:
    views = constant_views(4)
    mixed, weights = view_mixup(num_views=num_views)(views)
    assert len(mixed) == len(weights) == 4
    for v, (view, original, weights_of_view) in enumerate(zip(mixed, views, weights)):
        assert torch.equal(view, original) == (v >= num_views)
        assert torch.equal(weights_of_view, torch.eye(IMAGES)) == (v >= num_views)


def test_views_of_several_sizes() -> None:
    views = [*constant_views(1, size=8), *constant_views(1, size=4)]
    mixed, _ = view_mixup()(views)
    assert [view.shape for view in mixed] == [view.shape for view in views]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("alphas", [{"mixup_alpha": 1.0}, {"mixup_alpha": 0.0, "cutmix_alpha": 1.0}])
def test_input_is_not_modified(mode: str, alphas: dict[str, float]) -> None:
    views = constant_views(3)
    view_mixup(mode=mode, **alphas)(views)
    assert all(torch.equal(view, original) for view, original in zip(views, constant_views(3)))


@pytest.mark.parametrize("mode", MODES)
def test_probability_zero_mixes_nothing(mode: str) -> None:
    mixed, weights = view_mixup(mode=mode, prob=0.0)(constant_views(1))
    assert torch.equal(mixed[0], constant_views(1)[0])
    assert torch.equal(weights[0], torch.eye(IMAGES))


def test_smoothing() -> None:
    _, weights = view_mixup(prob=0.0, smoothing=0.3)(constant_views(1))
    torch.testing.assert_close(weights[0], 0.7 * torch.eye(IMAGES) + 0.3 / IMAGES)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("smoothing", "most"), [(0.0, 2), (0.1, IMAGES)])
def test_mixed_from(mode: str, smoothing: float, most: int) -> None:
    mixup = view_mixup(mode=mode, smoothing=smoothing)
    used = torch.stack(mixup(constant_views(3))[1]).ne(0).any(dim=0)
    assert mixup.mixed_from == most
    assert used.sum(dim=0).tolist() == [most] * IMAGES


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 5}, "--batch_size_per_gpu 5 must be even"),
        ({"mode": "image"}, "--mixup-mode image"),
        ({"mixup_alpha": 0.0}, "--mixup, --cutmix or --cutmix-minmax above 0"),
    ],
)
def test_invalid_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        view_mixup(**changes)
