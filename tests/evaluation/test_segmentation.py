"""The parts of dense evaluation against slow loops: features, classifiers, sliding windows, scores and the vote of regions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.segmentation import VOID
from data.transforms.geometry import CropBox
from evaluation import segmentation
from evaluation.dense_features import DenseFeatures, on_finest_grid, pixel_features
from evaluation.region_knn import Regions, RegionVote, region_labels
from evaluation.segmentation import (
    Classifiers,
    Probe,
    Setting,
    SyncedNorm,
    Windows,
    blend,
    classify,
    confusion_matrix,
    score_of,
    segment,
    window_boxes,
)


def pixels_and_half(stride: int = 1) -> DenseFeatures:
    """Two kinds of features: the mean colors of regions, and half of them."""
    functions = {
        "network": lambda images: F.avg_pool2d(images, stride),
        "half": lambda images: F.avg_pool2d(images, stride) / 2,
    }
    return DenseFeatures(functions, stride, torch.zeros(1, 3, 2 * stride, 2 * stride))


# --------------------------------------------------------------------------- features


def test_columns_and_stride() -> None:
    features = pixels_and_half(4)
    assert (features.stride, features.channels) == (4, 6)
    assert features.columns == {"network": slice(0, 3), "half": slice(3, 6)}
    images = torch.rand(2, 3, 8, 12)
    torch.testing.assert_close(features(images)[:, 3:], F.avg_pool2d(images, 4) / 2)


def test_finest_grid() -> None:
    coarse, fine = torch.rand(2, 3, 2, 3), torch.rand(2, 4, 4, 6)
    maps = on_finest_grid([coarse, fine])
    assert torch.equal(maps[:, 3:], fine)
    torch.testing.assert_close(maps[:, :3], F.interpolate(coarse, scale_factor=2, mode="bilinear"))


@pytest.mark.parametrize(("stride", "side"), [(2, 2), (4, 4), (8, 4), (14, 4)])
def test_raw_pixels_of_each_region(stride: int, side: int) -> None:
    images = torch.rand(2, 3, 2 * stride, 3 * stride)
    found = pixel_features(images, stride)
    assert found.shape == (2, 3 * side**2, 2, 3)
    for row, column in itertools.product(range(2), range(3)):
        region = images[:, :, row * stride : (row + 1) * stride, column * stride : (column + 1) * stride]
        expected = F.adaptive_avg_pool2d(region, side).flatten(1)
        if stride % side == 0:
            torch.testing.assert_close(found[:, :, row, column], expected)
        torch.testing.assert_close(found[:, :, row, column].mean(dim=1), expected.mean(dim=1), rtol=0.2, atol=0.05)


# --------------------------------------------------------------------------- classifiers


def test_norm_equals_batch_norm_without_parameters() -> None:
    torch.manual_seed(0)
    own, torchs = SyncedNorm(5), nn.BatchNorm2d(5, affine=False)
    for _ in range(3):
        x = 3 * torch.randn(4, 5, 6, 7) + 2
        torch.testing.assert_close(own(x), torchs(x))
    x = torch.randn(2, 5, 3, 3)
    torch.testing.assert_close(own.eval()(x), torchs.eval()(x))


def test_steps_equal_a_manual_loop() -> None:
    """Two classifiers on other features and rates, each against BatchNorm, convolution and AdamW of its own."""
    torch.manual_seed(0)
    features = pixels_and_half(2)
    settings = [Setting("network", 0.1), Setting("half", 0.03)]
    probe = Probe(settings, Classifiers(settings, features, 4, seed=3), weight_decay=0.1)
    models = []
    for setting in settings:
        convolution = nn.Conv2d(3, 4, 1)
        nn.init.normal_(convolution.weight, std=0.01, generator=torch.Generator().manual_seed(3))
        nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
        norm = nn.BatchNorm2d(3, affine=False)
        models.append((setting, norm, convolution, torch.optim.AdamW(convolution.parameters(), weight_decay=0.1)))
    for step in range(5):
        images, masks = torch.randn(3, 3, 8, 8), torch.randint(5, (3, 8, 8), dtype=torch.uint8)
        masks[masks == 4] = VOID
        losses = probe.step(step / 5, features(images), masks)
        for loss, (setting, norm, convolution, optimizer) in zip(losses, models):
            maps = features(images)[:, features.columns[setting.features]]
            logits = F.interpolate(convolution(norm(maps)), (8, 8), mode="bilinear")
            known = masks != VOID
            expected = F.cross_entropy(logits.permute(0, 2, 3, 1)[known], masks[known].long())
            torch.testing.assert_close(loss, expected.detach())
            optimizer.param_groups[0]["lr"] = setting.lr * (1 - step / 5)
            optimizer.zero_grad()
            expected.backward()
            optimizer.step()
    for own, (_, _, convolution, _) in zip(probe.classifiers.each, models):
        torch.testing.assert_close(own.state_dict(), convolution.state_dict(), rtol=1e-4, atol=1e-5)
    x = features(torch.randn(2, 3, 8, 8))
    for logits, (setting, norm, convolution, _) in zip(probe.predict(x), models):
        torch.testing.assert_close(logits, convolution(norm.eval()(x[:, features.columns[setting.features]])))


def test_a_step_of_void_changes_nothing() -> None:
    features, settings = pixels_and_half(2), [Setting("network", 0.1)]
    probe = Probe(settings, Classifiers(settings, features, 4, seed=3), weight_decay=0.0)
    before = probe.classifiers.state_dict()["each.0.weight"].clone()
    loss = probe.step(0.0, features(torch.randn(2, 3, 8, 8)), torch.full((2, 8, 8), VOID))
    assert loss.tolist() == [0.0]
    assert torch.equal(probe.classifiers.state_dict()["each.0.weight"], before)


# --------------------------------------------------------------------------- sliding windows


@pytest.mark.parametrize("size", [(8, 8), (20, 13), (8, 21), (3, 40), (16, 16)], ids=str)
@pytest.mark.parametrize("stride", [1, 5, 8])
def test_windows_cover_the_image(size: tuple[int, int], stride: int) -> None:
    boxes = window_boxes(size, Windows(8, stride, 1))
    counts = np.zeros(size, dtype=int)
    for box in boxes:
        assert (box.height, box.width) == (min(8, size[0]), min(8, size[1]))
        assert box.top + box.height <= size[0]
        assert box.left + box.width <= size[1]
        counts[box.top : box.top + box.height, box.left : box.left + box.width] += 1
    assert counts.min() >= 1
    assert len(set(boxes)) == len(boxes)
    for axis, starts in ((0, {box.top for box in boxes}), (1, {box.left for box in boxes})):
        assert len(starts) == 1 + max(0, math.ceil((size[axis] - 8) / stride))


@pytest.mark.parametrize("size", [(20, 13), (8, 21), (5, 6)], ids=str)
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_windows_of_a_function_of_single_pixels_equal_the_whole_image(size: tuple[int, int], batch_size: int) -> None:
    torch.manual_seed(0)
    features, settings = pixels_and_half(), [Setting("half", 1.0), Setting("network", 1.0)]
    probe = Probe(settings, Classifiers(settings, features, 4, seed=0), 0.0)
    probe.classifiers.norm.running_mean.normal_()
    image = torch.randn(3, *size)
    found = list(segment(features, probe.predict, image, Windows(8, 5, 1), batch_size, size))
    for classes, expected in zip(found, probe.predict(features(image[None])), strict=True):
        assert torch.equal(classes, expected[0].argmax(dim=0))


def test_overlapping_windows_are_averaged() -> None:
    """Scores of each window: the mean over all windows of a pixel, resized from regions to pixels."""
    torch.manual_seed(0)
    boxes = window_boxes((12, 16), Windows(8, 3, 4))
    scores = torch.randn(len(boxes), 2, 2, 2)
    sums, counts = torch.zeros(2, 12, 16), torch.zeros(12, 16)
    for number, (top, left) in enumerate(itertools.product((0, 3, 4), (0, 3, 6, 8))):
        sums[:, top : top + 8, left : left + 8] += F.interpolate(scores[number, None], (8, 8), mode="bilinear")[0]
        counts[top : top + 8, left : left + 8] += 1
    torch.testing.assert_close(blend(scores, boxes), sums / counts)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("classes_at_once", [0, 1, 3, 4, 9])
def test_classes_of_chunks_equal_those_of_all_scores(
    classes_at_once: int, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With equal scores of several classes, of which the first counts."""
    torch.manual_seed(0)
    boxes, size = window_boxes((12, 16), Windows(8, 3, 4)), (23, 30)
    scores = torch.randn(len(boxes), 8, 2, 2)
    scores[:, 4:6] = scores[:, 2:3] = scores[:, :1]
    scores[:, 6:] -= 10
    if channels_last:
        scores = scores.to(memory_format=torch.channels_last)
    whole = F.interpolate(blend(scores, boxes)[None, :, :11, :15], size, mode="bilinear")[0].argmax(dim=0)
    assert whole.unique().tolist() == [0, 1, 3]
    monkeypatch.setattr(segmentation, "LARGEST_SCORES", classes_at_once * size[0] * size[1])
    assert torch.equal(classify(scores, boxes, (11, 15), size), whole)


def test_small_images_are_padded_to_whole_regions() -> None:
    features = pixels_and_half(4)
    seen: list[tuple[int, ...]] = []

    def predict(maps: Tensor) -> list[Tensor]:
        seen.append(tuple(maps.shape))
        return [maps]

    (found,) = segment(features, predict, torch.ones(3, 6, 9), Windows(8, 8, 4), 1, (6, 9))
    assert seen == [(1, 6, 2, 2), (1, 6, 2, 2)]  # 8 x 8 at columns 0 and 1
    assert found.shape == (6, 9)


# --------------------------------------------------------------------------- scores


def slow_scores(found: np.ndarray, truth: np.ndarray, classes: int) -> tuple[float, float, float, list[float | None]]:
    ious: list[float | None] = []
    recalls = []
    for label in range(classes):
        hits = union = of_class = 0
        for guess, right in zip(found.ravel().tolist(), truth.ravel().tolist()):
            if right == VOID:
                continue
            hits += guess == label and right == label
            union += label in (guess, right)
            of_class += right == label
        ious.append(100 * hits / union if union else None)
        if of_class:
            recalls.append(100 * hits / of_class)
    known = truth != VOID
    present = [iou for iou in ious if iou is not None]
    right = 100 * float((found[known] == truth[known]).mean())
    return sum(present) / len(present), right, sum(recalls) / len(recalls), ious


def test_scores_equal_a_slow_loop() -> None:
    """Class 3 is only predicted, 4 only true, 5 neither."""
    rng = np.random.default_rng(0)
    found, truth = rng.choice([0, 1, 2, 3], (2, 9, 7)), rng.choice([0, 1, 2, 4, VOID], (2, 9, 7))
    matrices = [
        confusion_matrix(torch.from_numpy(a), torch.from_numpy(b.astype(np.uint8)), 6) for a, b in zip(found, truth)
    ]
    score = score_of(matrices[0] + matrices[1])
    *means, per_class = slow_scores(found, truth, 6)
    assert score[:3] == pytest.approx(means)
    assert score.per_class[:5] == pytest.approx(per_class[:5])
    assert score.per_class[3:] == [0.0, 0.0, None]


def test_classes_at_the_resolution_of_the_mask() -> None:
    scores = torch.zeros(2, 2, 2)
    scores[1, 0] = scores[0, 1] = 1.0
    whole = [CropBox(0, 0, 2, 2)]
    assert classify(scores[None], whole, (2, 2), (8, 4)).tolist() == [[1] * 4] * 4 + [[0] * 4] * 4


# --------------------------------------------------------------------------- the vote of regions


def test_labels_of_regions_equal_a_slow_loop() -> None:
    rng = np.random.default_rng(0)
    mask = rng.choice([0, 1, 2, VOID], (6, 8)).astype(np.uint8)
    mask[:3, :2] = VOID
    found = region_labels(torch.from_numpy(mask), (2, 4), 3)
    for row, column in itertools.product(range(2), range(4)):
        pixels = mask[row * 3 : row * 3 + 3, column * 2 : column * 2 + 2]
        known = (pixels != VOID).sum()
        expected = [(pixels == label).sum() / max(known, 1) for label in range(3)]
        assert found[row * 4 + column].tolist() == pytest.approx(expected)
    assert found[0].tolist() == [0.0] * 3


def test_vote_equals_a_slow_loop() -> None:
    torch.manual_seed(0)
    features = pixels_and_half(2)
    keys, labels = torch.randn(30, 6), torch.rand(30, 4).softmax(dim=1)
    vote = RegionVote(features, Regions(keys, labels), [5, 1, 99], 0.2)
    assert vote.rows == [f"{name}, {k}-NN" for name in ("network", "half") for k in (5, 1, 99)]
    maps = torch.randn(2, 6, 3, 4)
    found = iter(vote.predict(maps))
    for columns, k in itertools.product(features.columns.values(), (5, 1, 30)):
        scores = next(found)
        for image, row, column in itertools.product(range(2), range(3), range(4)):
            query = maps[image, columns, row, column]
            similarity = F.cosine_similarity(query[None], keys[:, columns])
            weights = torch.zeros(30)
            for index in similarity.argsort(descending=True)[:k]:
                weights[index] = math.exp(float(similarity[index]) / 0.2)
            expected = (weights[:, None] * labels).sum(dim=0) / weights.sum()
            torch.testing.assert_close(scores[image, :, row, column], expected, rtol=1e-4, atol=1e-6)
