"""The picture of the crops: every view of every image once, in its size, in the column of its image, and little else."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from training.crop_picture import IMAGES, draw_crops


def colored(sides: list[int], images: int, channels: int = 3) -> list[Tensor]:
    """Views of one color each: red counts images, green views."""
    views = []
    for number, side in enumerate(sides):
        view = torch.zeros(images, channels, side, side)
        view[:, 0] = (torch.arange(images) + 1).view(-1, 1, 1) / 255
        view[:, min(1, channels - 1)] += (number + 1) / 255
        views.append(view)
    return views


@pytest.mark.parametrize("images", [1, 3, IMAGES + 2])
@pytest.mark.parametrize(
    ("sides", "factor"), [([224, 224, *[96] * 8], 1), ([64, 64, *[32] * 5], 2), ([96, 96, 48, 32, 32], 1), ([8, 4], 16)]
)
def test_views_of_every_image(sides: list[int], factor: int, images: int) -> None:
    red, green, blue = (
        np.asarray(draw_crops(colored(sides, images), [0.0] * 3, [1.0] * 3)).astype(int).transpose(2, 0, 1)
    )
    of_view_and_image = np.where(blue == 0, 256 * red + green, 0)
    spans = []
    for image in range(min(images, IMAGES)):
        left, right, tops = red.shape[1], 0, []
        for view, side in enumerate(sides):
            rows, columns = (of_view_and_image == 256 * (image + 1) + view + 1).nonzero()
            assert len(rows) == (factor * side) ** 2
            assert rows.max() - rows.min() + 1 == columns.max() - columns.min() + 1 == factor * side
            left, right = min(left, columns.min()), max(right, columns.max())
            tops.append((rows.min(), columns.min()))
        assert tops == sorted(tops)  # read line by line, the views are in their order
        spans.append((left, right))
    assert all(ends < begins for (_, ends), (begins, _) in pairwise(spans))
    if len(sides) > 5 and images > 1:
        assert (of_view_and_image > 0).mean() > 0.6  # the rest is labels and gaps


def test_normalization_is_undone_and_one_channel_is_gray() -> None:
    views = [view / 0.5 - 0.1 for view in colored([16, 16], 2, channels=1)]
    picture = np.asarray(draw_crops(views, [0.05], [0.5]))
    assert {(2, 2, 2), (3, 3, 3), (4, 4, 4)} <= {tuple(pixel) for pixel in picture.reshape(-1, 3).tolist()}
