"""Region matching against the cosines of each pair of views."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from losses.matching import match_regions, match_views, mixup_sources, unmixed_sources
from models.outputs import MultiCropOutput


def views_of(features: list[Tensor]) -> MultiCropOutput:
    """Features (B, T, C) of each view as a network gives them, without logits."""
    none = torch.zeros(0)
    rows = torch.cat([view_BTC.flatten(0, 1) for view_BTC in features])
    return MultiCropOutput(none, none, rows, tuple(view_BTC.shape[1] for view_BTC in features))


@pytest.mark.parametrize("mixed", [False, True])
def test_matches_of_all_views_are_those_of_each_pair(mixed: bool) -> None:
    views, teacher_views = ([torch.randn(3, regions, 5) for regions in sides] for sides in ((16, 16, 4), (16, 16)))
    weights = [torch.rand(3, 3).softmax(0) for _ in range(3)]
    sources = mixup_sources(weights) if mixed else unmixed_sources(3, 3, torch.device("cpu"))
    matches = list(match_views(views_of(views), views_of(teacher_views), sources, mixed))
    sources_of = range(len(sources.images_PB))
    assert [(match.teacher_view, match.source) for match in matches] == [(q, p) for q in range(2) for p in sources_of]
    for match in matches:
        for view, regions_BT in zip(views, match.regions_BS.split([16, 16, 4], dim=1)):
            expected = match_regions(view, teacher_views[match.teacher_view][match.images_B])
            assert torch.equal(regions_BT, expected)


def test_matches_ignore_length_and_find_copies() -> None:
    teacher = torch.randn(2, 7, 5)
    order = torch.stack([torch.randperm(7) for _ in range(2)])
    student = torch.stack([teacher[b, order[b]] for b in range(2)]) * torch.rand(2, 7, 1).add(0.1)
    assert torch.equal(match_regions(student, teacher), order)
