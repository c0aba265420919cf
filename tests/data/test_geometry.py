"""Crop boxes, stratified samples and their projection between crops."""

from __future__ import annotations

import random

import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from data.transforms.geometry import (
    CropBox,
    inside,
    intersection,
    normalized_corners,
    project,
    shift_to_overlap,
    stratified_samples,
    token_positions,
    union,
)

WHOLE = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
HALF = torch.tensor([0.25, 0.25, 0.75, 0.75], dtype=torch.float64)
FLIPPED_HALF = torch.tensor([0.25, 0.75, 0.75, 0.25], dtype=torch.float64)


@pytest.mark.parametrize(("grid", "window", "count"), [(14, 3, 16), (6, 2, 9), (4, 2, 4), (8, 3, 4)])
def test_one_sample_per_window_in_each_corner(grid: int, window: int, count: int) -> None:
    seen, corners = set(), set()
    for _ in range(300):
        samples = stratified_samples(grid, window)
        assert len(set(samples.tolist())) == count
        rows, columns = samples // grid, samples % grid
        fitting = {
            (top, left)
            for top in (0, grid % window)
            for left in (0, grid % window)
            if min(rows.min() - top, columns.min() - left) >= 0
            and len({(r, c) for r, c in zip(((rows - top) // window).tolist(), ((columns - left) // window).tolist())})
            == count
            and max(rows.max() - top, columns.max() - left) < grid // window * window
        }
        assert fitting
        if len(fitting) == 1:
            corners |= fitting
        seen |= set(samples.tolist())
    assert len(seen) == grid**2  # border cells too
    assert len(corners) == (4 if grid % window else 1)


def test_without_redraw_the_first_cells_are_taken() -> None:
    assert stratified_samples(6, 2, redraw=False).tolist() == [0, 2, 4, 12, 14, 16, 24, 26, 28]


def test_projection_into_the_central_half() -> None:
    tokens = torch.tensor([0, 5 * 14 + 6, 13 * 14 + 13])
    plain, flipped = (project(tokens, WHOLE, half, 14, 14) for half in (HALF, FLIPPED_HALF))
    assert plain.valid_S.tolist() == flipped.valid_S.tolist() == [False, True, False]
    assert plain.target_S2[1].tolist() == pytest.approx([3.5, 5.5])
    assert flipped.target_S2[1].tolist() == pytest.approx([3.5, 7.5])


def test_equal_crops_project_onto_themselves_inside_the_border() -> None:
    tokens = torch.arange(196)
    for crop in (WHOLE, HALF, FLIPPED_HALF):
        projection = project(tokens, crop, crop, 14, 14)
        assert int(projection.valid_S.sum()) == 144
        expected = torch.stack([tokens // 14, tokens % 14], dim=1).float()
        assert torch.allclose(projection.target_S2[projection.valid_S], expected[projection.valid_S], atol=1e-5)


def test_centered_tokens_of_equal_crops_are_all_valid() -> None:
    projection = project(torch.arange(36), HALF, HALF, 6, 6, "centers")
    assert bool(projection.valid_S.all())
    assert torch.allclose(projection.target_S2[:, 1], torch.arange(36) % 6 + 0.0, atol=1e-5)


@pytest.mark.parametrize("align", ["corners", "centers"])
def test_target_is_the_same_point_of_the_image(align: str) -> None:
    """With an image of positions, a sample and its target have the same value, with and without flips."""
    generator = random.Random(0)
    for _ in range(200):
        size = (generator.randint(50, 300), generator.randint(50, 300))
        a, b = (
            CropBox(
                generator.randint(0, 20), generator.randint(0, 20), generator.randint(10, 30), generator.randint(10, 30)
            )
            for _ in range(2)
        )
        source, target = (normalized_corners(rect, size, generator.random() < 0.5) for rect in (a, b))
        tokens = stratified_samples(14, 3)
        projection = project(tokens, source, target, 14, 14, align)
        shown = source[:2] + token_positions(tokens, 14, align) * (source[2:] - source[:2])
        fraction = projection.target_S2 / 13 if align == "corners" else (projection.target_S2 + 0.5) / 14
        found = target[:2] + fraction * (target[2:] - target[:2])
        off_in_tokens = ((found - shown) / (target[2:] - target[:2])).abs() * 14
        valid = off_in_tokens[projection.valid_S]
        assert not len(valid) or float(valid.max()) <= (1e-4 if align == "corners" else 0.5 + 1e-4)


def test_flips() -> None:
    rect = CropBox(2, 3, 10, 20)
    plain, flipped = (normalized_corners(rect, (51, 101), flip) for flip in (False, True))
    assert plain.tolist() == pytest.approx([2 / 50, 3 / 100, 11 / 50, 22 / 100])
    assert flipped[[0, 3, 2, 1]].tolist() == plain.tolist()


def test_shifted_crops_overlap_and_nested_ones_are_inside() -> None:
    torch.manual_seed(0)
    image = torch.empty(3, 300, 400)
    for scale in ([0.25, 1.0], [0.05, 0.25]):
        for _ in range(2000):
            first = CropBox(*RandomResizedCrop.get_params(image, [0.25, 1.0], [3 / 4, 4 / 3]))
            second = shift_to_overlap(
                CropBox(*RandomResizedCrop.get_params(image, scale, [3 / 4, 4 / 3])), first, (300, 400)
            )
            assert second.top >= 0
            assert second.left >= 0
            assert second.top + second.height <= 300
            assert second.left + second.width <= 400
            both = intersection(first, second)
            assert both is not None
            assert both.height >= 0.5 * min(first.height, second.height) - 2
            assert both.width >= 0.5 * min(first.width, second.width) - 2
            within = RandomResizedCrop.get_params(image[:, : first.height, : first.width], scale, [3 / 4, 4 / 3])
            nested = inside(CropBox(*within), first)
            assert intersection(nested, first) == nested


def test_intersection_and_union() -> None:
    a, b = CropBox(0, 0, 10, 10), CropBox(5, 8, 10, 10)
    assert intersection(a, b) == CropBox(5, 8, 5, 2)
    assert union(a, b) == CropBox(0, 0, 15, 18)
    assert intersection(a, CropBox(10, 0, 5, 5)) is None
