"""UDI's views: what leaves a worker, how often colours change, and that samples and targets show the same pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from data.recipe import Crops
from data.udi_views import BLUR_DRAW, SOLARIZE_DRAW, Correspondence, Sampling, _colour_draws, udi_views
from utils import UsageError

CROPS = Crops(112, (0.25, 1.0), (3,), (48,), (0.05, 0.25))
GRIDS = {112: 14, 48: 6, 32: 4}


def ramp() -> Image.Image:
    rows, columns = np.mgrid[0:150, 0:200]
    return Image.fromarray(np.stack([rows, columns, 0 * rows], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("drawing", ["image", "view"])
@pytest.mark.parametrize("mode", ["overlap", "nested"])
def test_samples_and_their_targets_show_the_same_pixels(mode: str, drawing: str) -> None:
    crops, finish = udi_views(CROPS, (0.5,) * 3, (0.25,) * 3, 0.4, Sampling(GRIDS, pair_mode=mode, drawing=drawing))
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
    finished = finish(stacked, torch.device("cpu"))
    assert [tuple(t.shape) for t in finished] == [
        *[(2, 3, 112, 112)] * 2, *[(2, 3, 48, 48)] * 3, (2, 2, 16), (2, 2, 16), (2, 2, 16, 2), (2, 3, 9),
        (2, 3, 2, 9), (2, 3, 2, 9, 2),
    ]  # fmt: skip


def test_blur_and_solarisation_come_as_often_as_published() -> None:
    draws = _colour_draws(20000)
    assert float((draws[:, BLUR_DRAW] < 0.5).float().mean()) == pytest.approx(0.425, abs=0.015)
    assert float((draws[:, SOLARIZE_DRAW] < 0.5).float().mean()) == pytest.approx(0.10, abs=0.01)


def test_without_local_views() -> None:
    crops, _ = udi_views(CROPS._replace(local_numbers=(0,)), (0.5,) * 3, (0.25,) * 3, 0.4, Sampling(GRIDS))
    assert Correspondence(*crops(ramp())[-6:]).local_valid_L2m.shape[:2] == (0, 2)


def test_other_modes_are_refused() -> None:
    with pytest.raises(UsageError, match="--global_pair_mode apart must be one of overlap, nested"):
        udi_views(CROPS, (0.5,) * 3, (0.25,) * 3, 0.4, Sampling(GRIDS, pair_mode="apart"))
