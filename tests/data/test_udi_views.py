"""UDI's views: output of the worker part, color frequencies, and correspondence of samples and targets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from data.transforms import geometry
from data.transforms.recipe import Crops
from data.transforms.udi_views import (
    BLUR_DRAW,
    REFERENCES,
    SOLARIZE_DRAW,
    Correspondence,
    Sampling,
    _color_draws,
    udi_views,
)
from utils import UsageError

CROPS = Crops(112, (0.25, 1.0), (3,), (48,), (0.05, 0.25))
MEAN, STD = (0.5,) * 3, (0.25,) * 3
GRIDS = {112: 14, 48: 6, 32: 4}


def ramp() -> Image.Image:
    rows, columns = np.mgrid[0:150, 0:200]
    return Image.fromarray(np.stack([rows, columns, 0 * rows], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("drawing", ["image", "view"])
@pytest.mark.parametrize("mode", ["overlap", "nested"])
def test_samples_and_targets_show_the_same_pixels(mode: str, drawing: str) -> None:
    crops, device_transform = udi_views(CROPS, MEAN, STD, 0.4, Sampling(GRIDS, pair_mode=mode, drawing=drawing))
    checked = 0
    for _ in range(30):
        out = crops(ramp())
        views, found = out[:2], Correspondence(*out[-6:])
        for v in (0, 1):
            tokens = found.tokens_2M[v].long()
            source = torch.stack([tokens // 14, tokens % 14], dim=1)
            for place, target in zip(source[found.valid_2M[v]], found.target_2M2[v][found.valid_2M[v]]):
                a, b = (torch.round(at / 13 * 111).long() for at in (place, target))
                shown, same = (views[w][:2, p[0], p[1]].float() for w, p in ((v, a), (1 - v, b)))
                assert float((shown - same).abs().max()) <= 4
                checked += 1
    assert checked > 300
    stacked = [torch.stack([a, b]) for a, b in zip(crops(ramp()), crops(ramp()))]
    finished = device_transform(stacked, torch.device("cpu"))
    assert [tuple(t.shape) for t in finished] == [
        *[(2, 3, 112, 112)] * 2, *[(2, 3, 48, 48)] * 3, (2, 2, 16), (2, 2, 16), (2, 2, 16, 2), (2, 3, 9),
        (2, 3, 2, 9), (2, 3, 2, 9, 2),
    ]  # fmt: skip


def test_blur_and_solarize_frequencies() -> None:
    draws = _color_draws(20000)
    assert float((draws[:, BLUR_DRAW] < 0.5).float().mean()) == pytest.approx(0.425, abs=0.015)
    assert float((draws[:, SOLARIZE_DRAW] < 0.5).float().mean()) == pytest.approx(0.10, abs=0.01)


def test_without_local_views() -> None:
    crops, _ = udi_views(CROPS._replace(local_numbers=(0,)), MEAN, STD, 0.4, Sampling(GRIDS))
    assert Correspondence(*crops(ramp())[-6:]).local_valid_L2m.shape[:2] == (0, 2)


def test_unknown_modes() -> None:
    with pytest.raises(UsageError, match="--global_pair_mode apart must be one of overlap, nested"):
        udi_views(CROPS, MEAN, STD, 0.4, Sampling(GRIDS, pair_mode="apart"))


def test_local_views_of_several_sizes() -> None:
    """Surplus samples of the smaller views are not valid; the others are correct."""
    crops = CROPS._replace(local_numbers=(2, 1), local_sizes=(48, 32))
    found = Correspondence(*udi_views(crops, MEAN, STD, 0.4, Sampling(GRIDS))[0](ramp())[-6:])
    assert found.local_tokens_Lm.shape == (3, 9)
    assert torch.equal(found.local_tokens_Lm[0], found.local_tokens_Lm[1])
    assert len(set(found.local_tokens_Lm[2, :4].tolist())) == 4
    assert int(found.local_tokens_Lm[2].max()) < 16
    assert not found.local_valid_L2m[2, :, 4:].any()


@pytest.mark.parametrize(("drawing", "alike"), [("image", True), ("view", False), ("fixed", True)])
def test_drawing_modes(drawing: str, alike: bool) -> None:
    crops = udi_views(CROPS, MEAN, STD, 0.4, Sampling(GRIDS, drawing=drawing))[0]
    first, second = (Correspondence(*crops(ramp())[-6:]) for _ in range(2))
    assert torch.equal(first.tokens_2M[0], first.tokens_2M[1]) == alike
    assert torch.equal(first.local_tokens_Lm[0], first.local_tokens_Lm[1]) == alike
    assert torch.equal(first.tokens_2M, second.tokens_2M) == (drawing == "fixed")


@pytest.mark.parametrize("mode", ["overlap", "nested"])
def test_second_view_overlaps_the_first_or_is_inside(mode: str) -> None:
    """In each of 10,000 draws: by half of the shorter side on each axis up to rounding, or completely."""
    crops = udi_views(CROPS._replace(local_numbers=(0,)), MEAN, STD, 0.4, Sampling(GRIDS, pair_mode=mode))[0]
    for _ in range(10_000):
        first, second = crops.draw_placement((300, 400)).boxes
        shared = geometry.intersection(first, second)
        assert shared is not None
        assert shared.height >= 0.5 * min(first.height, second.height) - 2
        assert shared.width >= 0.5 * min(first.width, second.width) - 2
        assert mode == "overlap" or shared == second


@pytest.mark.parametrize("reference", REFERENCES)
def test_local_views_overlap_the_reference(reference: str) -> None:
    """By half of the shorter side on each axis, up to rounding."""
    crops = udi_views(CROPS, MEAN, STD, 0.4, Sampling(GRIDS, reference=reference))[0]
    combine = {"union": geometry.union, "intersection": geometry.intersection}[reference]
    for _ in range(200):
        first, second, *local = crops.draw_placement((150, 200)).boxes
        box = combine(first, second)
        assert box is not None
        for rect in local:
            shared = geometry.intersection(rect, box)
            assert shared is not None
            assert shared.height >= 0.5 * min(rect.height, box.height) - 2
            assert shared.width >= 0.5 * min(rect.width, box.width) - 2


@pytest.mark.parametrize(("flip", "ascending"), [(0.0, True), (1.0, False)])
def test_flip_frequency(flip: float, ascending: bool) -> None:
    """The ramp's columns increase unless a view is flipped."""
    for view in udi_views(CROPS, MEAN, STD, 0.4, Sampling(GRIDS), flip)[0](ramp())[:5]:
        row = view[1, view.shape[1] // 2].int()
        assert bool(row[-1] > row[0]) == ascending


def test_invalid_sampling() -> None:
    with pytest.raises(UsageError, match=r"--local_sampling_window_size 7 must be in 1\.\.6: local views of 48 pixels"):
        udi_views(CROPS, MEAN, STD, 0.4, Sampling(GRIDS, local_window=7))
    with pytest.raises(UsageError, match=r"--flip_prob 1\.5 must be in 0\.\.1"):
        udi_views(CROPS, MEAN, STD, 0.4, Sampling(GRIDS), 1.5)
