"""Augmentation: number, order, shape, normalization and probabilities of the views, and each operation."""

from __future__ import annotations

import math
import random
import resource
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision import transforms

from data.decode import ImageLike
from data.transforms.augment import (
    BrightnessContrast,
    Crops,
    GaussianBlur,
    MultiCrop,
    Solarize,
    check_crops,
    check_normalization,
    choose_backend,
    deit_views,
    dino_views,
    eval_view,
    limit_posterize,
    train_view,
)
from data.transforms.recipe import color_jitter, dino_recipe
from utils import UsageError

CROPS = Crops(32, (0.4, 1.0), (2, 1), (16, 12), (0.05, 0.4))
SIZES = [32, 32, 16, 16, 12]
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.1)
DEIT: dict[str, Any] = {
    "color_jitter": 0.4,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "interpolation": "bicubic",
    "erase_prob": 0.25,
    "erase_mode": "pixel",
    "erase_count": 1,
    "clean_first_view": False,
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)


def noise_image(in_chans: int, height: int = 40, width: int = 50) -> ImageLike:
    """Return a PIL image for 1 and 3 channels, else a tensor, as datasets do."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, in_chans), dtype=np.uint8)
    if in_chans == 1:
        return Image.fromarray(pixels[:, :, 0])
    if in_chans == 3:
        return Image.fromarray(pixels)
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def steps_of(view: Any) -> dict[type, Any]:
    """Return the steps of a composed transform by type."""
    return {type(step): step for step in view.transforms}


# --------------------------------------------------------------------------- number, order and shape


@pytest.mark.parametrize("in_chans", [1, 2, 3, 5])
def test_dino_views_in_order(in_chans: int) -> None:
    views = dino_views(dino_recipe(CROPS, 0.4), in_chans, [0.5] * in_chans, [0.25] * in_chans)(noise_image(in_chans))
    assert [view.shape for view in views] == [(in_chans, size, size) for size in SIZES]
    assert all(view.dtype == torch.float32 for view in views)
    assert CROPS.total == len(views) == 5


def test_deit_views_in_order() -> None:
    views = deit_views(CROPS, MEAN, STD, **DEIT)(noise_image(3))
    assert [view.shape for view in views] == [(3, size, size) for size in SIZES]


@pytest.mark.parametrize(("numbers", "sizes"), [((), ()), ((0,), (96,)), ((0, 0), (96, 64))])
def test_no_local_crops(numbers: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    crops = CROPS._replace(local_numbers=numbers, local_sizes=sizes)
    check_crops(crops)
    assert crops.total == 2
    for policy in (dino_views(dino_recipe(crops, 0.4), 3, MEAN, STD), deit_views(crops, MEAN, STD, **DEIT)):
        assert [view.shape for view in policy(noise_image(3))] == [(3, 32, 32), (3, 32, 32)]


def test_zero_crops_of_one_size() -> None:
    crops = CROPS._replace(local_numbers=(1, 0, 2), local_sizes=(20, 16, 12))
    views = dino_views(dino_recipe(crops, 0.4), 3, MEAN, STD)(noise_image(3))
    assert [view.shape[-1] for view in views] == [32, 32, 20, 12, 12]


def test_views_differ_and_are_reproducible() -> None:
    for policy in (dino_views(dino_recipe(CROPS, 0.4), 3, MEAN, STD), deit_views(CROPS, MEAN, STD, **DEIT)):
        passes: list[list[Tensor]] = []
        for seed in (0, 0, 1):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            passes.append(policy(noise_image(3)))
        assert all(torch.equal(a, b) for a, b in zip(passes[0], passes[1]))
        assert all(not torch.equal(a, b) for a, b in zip(passes[0], passes[2]))
        assert not torch.equal(passes[0][0], passes[0][1])
        assert not torch.equal(passes[0][2], passes[0][3])


def test_multi_crop_passes_the_image_to_each_transform() -> None:
    def view(factor: float) -> Any:
        return lambda image: image * factor

    image = torch.rand(3, 4, 4)
    views = MultiCrop([view(1.0), view(2.0), view(3.0)])(image)
    assert all(torch.equal(v, image * factor) for v, factor in zip(views, (1.0, 2.0, 3.0)))


# --------------------------------------------------------------------------- normalization


@pytest.mark.parametrize("levels", [(64,), (64, 64, 64), (10, 30, 50, 70, 90)])
def test_dino_views_normalize_each_channel(levels: tuple[int, ...]) -> None:
    """A constant image below the solarization threshold is not changed by crops, blur and jitter of strength 0."""
    in_chans = len(levels)
    mean = [0.1 * (c + 1) for c in range(in_chans)]
    std = [0.2 + 0.05 * c for c in range(in_chans)]
    planes = torch.tensor(levels, dtype=torch.uint8)[:, None, None].expand(in_chans, 40, 50)
    image: ImageLike = planes.float() / 255
    if in_chans in (1, 3):
        image = Image.fromarray(planes.permute(1, 2, 0).squeeze(-1).numpy())
    expected = torch.tensor([(level / 255 - m) / s for level, m, s in zip(levels, mean, std)])[:, None, None]
    for _ in range(5):
        for view in dino_views(dino_recipe(CROPS, 0.0), in_chans, mean, std)(image):
            torch.testing.assert_close(view, expected.expand_as(view), rtol=0, atol=2e-5)


def test_deit_views_normalize_each_channel() -> None:
    image = Image.new("RGB", (50, 40), (255, 255, 255))
    settings = {**DEIT, "auto_augment": None, "color_jitter": 0.0, "erase_prob": 0.0}
    expected = torch.tensor([(1 - m) / s for m, s in zip(MEAN, STD)])[:, None, None]
    for view in deit_views(CROPS, MEAN, STD, **settings)(image):
        torch.testing.assert_close(view, expected.expand_as(view))


# --------------------------------------------------------------------------- the recipe of DINO


def test_dino_probabilities() -> None:
    """DINO, appendix."""
    views: Sequence[Any] = dino_views(dino_recipe(CROPS, 0.4), 3, MEAN, STD).view_transforms
    steps = [steps_of(view) for view in views]
    assert [s[GaussianBlur].p for s in steps] == [1.0, 0.1, 0.5, 0.5, 0.5]
    assert [s[Solarize].p for s in steps] == [0.0, 0.2, 0.0, 0.0, 0.0]
    for s, scale in zip(steps, [(0.4, 1.0)] * 2 + [(0.05, 0.4)] * 3):
        assert s[transforms.RandomResizedCrop].scale == scale
        assert s[transforms.RandomHorizontalFlip].p == 0.5
        assert s[transforms.RandomGrayscale].p == 0.2
        assert s[transforms.RandomApply].p == 0.8
        (jitter,) = s[transforms.RandomApply].transforms
        assert (jitter.brightness, jitter.contrast, jitter.saturation) == ((0.6, 1.4), (0.6, 1.4), (0.8, 1.2))
        assert jitter.hue == (-0.1, 0.1)


def test_color_jitter_of_many_channels() -> None:
    for view in dino_views(dino_recipe(CROPS, 0.3), 5, [0.5] * 5, [0.25] * 5).view_transforms:
        steps = steps_of(view)
        assert transforms.RandomGrayscale not in steps
        (jitter,) = steps[transforms.RandomApply].transforms
        assert isinstance(jitter, BrightnessContrast)
        assert jitter.jitter.brightness == jitter.jitter.contrast == (0.7, 1.3)


@pytest.mark.parametrize("strength", [-0.1, 2.5])
def test_invalid_jitter_strength(strength: float) -> None:
    with pytest.raises(UsageError, match="--color-jitter"):
        dino_views(dino_recipe(CROPS, strength), 3, MEAN, STD)


@pytest.mark.parametrize("operation", [GaussianBlur, Solarize])
@pytest.mark.parametrize("in_chans", [1, 3, 5])
def test_probabilities_zero_and_one(operation: type, in_chans: int) -> None:
    image = noise_image(in_chans)
    before = np.array(image)
    for _ in range(50):
        assert operation(0.0)(image) is image
        assert not np.array_equal(np.array(operation(1.0)(image)), before)
    assert np.array_equal(np.array(image), before)


@pytest.mark.parametrize("operation", [GaussianBlur, Solarize])
def test_probability_between_zero_and_one(operation: type) -> None:
    image = noise_image(1, 4, 4)
    changed = sum(operation(0.2)(image) is not image for _ in range(2000))
    assert changed / 2000 == pytest.approx(0.2, abs=0.03)  # three standard deviations


def test_solarize_threshold() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = np.where(levels < 128, levels, 255 - levels)
    assert np.array_equal(np.asarray(Solarize(1.0)(Image.fromarray(levels))), expected)
    color = Solarize(1.0)(Image.fromarray(np.stack([levels] * 3, axis=2)))
    assert np.array_equal(np.asarray(color), np.stack([expected] * 3, axis=2))
    tensor = Solarize(1.0)(torch.from_numpy(levels).float().expand(5, 16, 16) / 255)
    assert isinstance(tensor, Tensor)
    torch.testing.assert_close(tensor, torch.from_numpy(expected).float().expand(5, 16, 16) / 255)


def impulse_deviation(blurred: np.ndarray) -> float:
    """Return the standard deviation along x of an image that had one bright column."""
    mass = blurred.astype(np.float64).sum(axis=0)
    x = np.arange(len(mass)) - len(mass) // 2
    assert (x * mass).sum() / mass.sum() == pytest.approx(0, abs=0.05)
    return math.sqrt((x**2 * mass).sum() / mass.sum())


@pytest.mark.parametrize("radius", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("tensor", [False, True])
def test_blur_radius(monkeypatch: pytest.MonkeyPatch, radius: float, tensor: bool) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: radius)
    pixels = np.zeros((31, 31), dtype=np.uint8)
    pixels[:, 15] = 255
    image: ImageLike = torch.from_numpy(pixels).float().expand(5, 31, 31) / 255 if tensor else Image.fromarray(pixels)
    blurred = np.asarray(GaussianBlur(1.0)(image))
    # nine taps cut the tails of the tensor's kernel, eight bits round those of Pillow's
    assert impulse_deviation(blurred[0] if tensor else blurred) == pytest.approx(radius, rel=0.1)


def test_blur_radius_range() -> None:
    pixels = np.zeros((31, 31), dtype=np.uint8)
    pixels[:, 15] = 255
    found = [impulse_deviation(np.asarray(GaussianBlur(1.0)(Image.fromarray(pixels)))) for _ in range(300)]
    assert min(found) < 0.4
    assert max(found) == pytest.approx(2.0, abs=0.15)
    assert np.mean(found) == pytest.approx(1.05, abs=0.15)


def test_brightness_contrast_factors() -> None:
    """In an image of two levels the mean gives the brightness, and the range brightness times contrast."""
    image = torch.tensor([0.25, 0.5]).expand(5, 4, 2)
    brightness, contrast = [], []
    for _ in range(500):
        jittered = BrightnessContrast(color_jitter(0.4))(image)
        brightness.append(float(jittered.mean()) / 0.375)
        contrast.append(float(jittered.max() - jittered.min()) / (0.25 * brightness[-1]))
        torch.testing.assert_close(jittered, jittered[:1, :1].expand(5, 4, 2))
    for factor in (brightness, contrast):
        assert min(factor) == pytest.approx(0.6, abs=0.02)
        assert max(factor) == pytest.approx(1.4, abs=0.02)
    assert abs(np.corrcoef(brightness, contrast)[0, 1]) < 0.15


def test_brightness_contrast_range_and_strength_zero() -> None:
    image = torch.rand(5, 8, 8)
    torch.testing.assert_close(BrightnessContrast(color_jitter(0.0))(image), image)
    jittered = torch.stack([BrightnessContrast(color_jitter(1.0))(image) for _ in range(100)])
    assert jittered.min() == 0
    assert jittered.max() == 1


# --------------------------------------------------------------------------- the recipe of DeiT


@pytest.mark.parametrize("clean", [False, True])
def test_clean_first_view_is_not_erased(clean: bool) -> None:
    """Erased pixels of a white image are exactly 0 after normalization, others are not."""
    image = Image.new("RGB", (50, 40), (255, 255, 255))
    settings = {**DEIT, "auto_augment": None, "color_jitter": 0.0, "erase_prob": 1.0, "erase_mode": "const"}
    views = deit_views(CROPS, MEAN, STD, **{**settings, "clean_first_view": clean})(image)
    assert [bool((view == 0).any()) for view in views] == [not clean, True, True, True, True]


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "augmix-m3", "original", None])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
def test_timm_policies(policy: str | None, interpolation: str) -> None:
    views = deit_views(CROPS, MEAN, STD, **{**DEIT, "auto_augment": policy, "interpolation": interpolation})(
        noise_image(3)
    )
    assert [view.shape[-1] for view in views] == SIZES
    assert all(view.isfinite().all() for view in views)


@pytest.mark.parametrize(
    ("setting", "value", "flag"),
    [
        ("auto_augment", "best", "--aa best"),
        ("auto_augment", "rand-x9", "--aa rand-x9"),
        ("interpolation", "sharp", "--train-interpolation sharp"),
        ("erase_mode", "blue", "--remode blue"),
    ],
)
def test_settings_rejected_by_timm(setting: str, value: str, flag: str) -> None:
    with pytest.raises(UsageError, match=f"timm rejects .*{flag}"):
        deit_views(CROPS, MEAN, STD, **{**DEIT, setting: value})


# --------------------------------------------------------------------------- backends


@pytest.mark.parametrize(
    ("wanted", "policy", "in_chans", "chosen"),
    [
        ("auto", "dino_aug", 3, "split"),
        ("auto", "dino_aug", 1, "pil"),
        ("auto", "dino_aug", 5, "pil"),
        ("auto", "deit_aug", 3, "pil"),
        ("split", "dino_aug", 3, "split"),
        ("pil", "dino_aug", 3, "pil"),
        ("pil", "deit_aug", 3, "pil"),
        ("pil", "dino_aug", 5, "pil"),
    ],
)
def test_choose_backend(wanted: str, policy: str, in_chans: int, chosen: str) -> None:
    assert choose_backend(wanted, policy, in_chans) == chosen


@pytest.mark.parametrize(("policy", "in_chans"), [("deit_aug", 3), ("dino_aug", 1), ("dino_aug", 5)])
def test_split_backend_is_rejected_where_unsupported(policy: str, in_chans: int) -> None:
    with pytest.raises(UsageError, match=f"--aug_backend split .* not {policy} with {in_chans}"):
        choose_backend("split", policy, in_chans)


# --------------------------------------------------------------------------- evaluation


def positions(height: int, width: int, factor: int = 1) -> Image.Image:
    """Return an image whose red is the row and green the column, times a factor."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[:, :, 0] = factor * np.arange(height)[:, None]
    pixels[:, :, 1] = factor * np.arange(width)
    return Image.fromarray(pixels)


def rows_and_columns(image: ImageLike, size: int, ratio: float) -> tuple[Tensor, Tensor]:
    """Return the pixel values of a view as rows and columns of the image."""
    (view,) = eval_view(size, ratio, (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))(image)
    assert view.shape == (3, size, size)
    assert (view[2] == 0).all()
    return view[0], view[1]


@pytest.mark.parametrize(
    ("height", "width", "size", "ratio", "top", "left"),
    [
        (8, 12, 4, 0.5, 2, 4),
        (12, 8, 4, 0.5, 4, 2),
        (9, 9, 8, 0.9, 0, 0),  # 8 / 0.9 = 8.89 is rounded to 9, not cut to 8
        (8, 8, 7, 0.9, 0, 0),  # 7.78 to 8
        (256, 256, 224, 0.875, 16, 16),
        (10, 14, 10, 1.0, 0, 2),
    ],
)
def test_eval_view_is_the_center(height: int, width: int, size: int, ratio: float, top: int, left: int) -> None:
    """The short side has the target length, so nothing is interpolated."""
    rows, columns = rows_and_columns(positions(height, width), size, ratio)
    torch.testing.assert_close(rows, torch.arange(top, top + size).float()[:, None].expand(size, size))
    torch.testing.assert_close(columns, torch.arange(left, left + size).float().expand(size, size))


@pytest.mark.parametrize(("height", "width", "top", "left"), [(32, 48, 4, 8), (48, 32, 8, 4)])
def test_eval_view_resizes_the_short_side(height: int, width: int, top: int, left: int) -> None:
    """Halved: pixel i is at 2 i + 0.5 of the image; a bicubic kernel preserves ramps."""
    rows, columns = rows_and_columns(positions(height, width, factor=5), size=8, ratio=0.5)
    expected_rows = 5 * (2 * torch.arange(top, top + 8) + 0.5)
    expected_columns = 5 * (2 * torch.arange(left, left + 8) + 0.5)
    torch.testing.assert_close(rows, expected_rows[:, None].expand(8, 8), rtol=0, atol=0.6)  # eight bits round
    torch.testing.assert_close(columns, expected_columns.expand(8, 8), rtol=0, atol=0.6)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_eval_view_interpolation_equals_pillow(interpolation: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))
    resized = image.resize((48, 32), getattr(Image.Resampling, interpolation.upper())).crop((10, 2, 38, 30))
    (view,) = eval_view(28, 0.875, (0.0,) * 3, (1 / 255,) * 3, interpolation)(image)
    torch.testing.assert_close(view, torch.from_numpy(np.array(resized)).permute(2, 0, 1).float())


@pytest.mark.parametrize("in_chans", [1, 3, 5])
@pytest.mark.parametrize(("height", "width"), [(20, 340), (341, 20), (9, 200), (3, 500)])
def test_eval_view_of_a_thin_image(height: int, width: int, in_chans: int) -> None:
    """Equal to a resize of the whole image up to a shift of less than a pixel."""
    rows, columns = np.mgrid[:height, :width]
    smooth = 0.5 + 0.4 * np.sin(4 * (rows + columns) / min(height, width))
    pixels = torch.from_numpy(smooth).float().expand(in_chans, -1, -1)
    image = pixels if in_chans == 5 else transforms.functional.to_pil_image(pixels)
    (view,) = eval_view(32, 0.875, [0.0] * in_chans, [1.0] * in_chans)(image)
    whole = transforms.functional.resize(image, 37, transforms.InterpolationMode.BICUBIC, antialias=True)
    expected = transforms.functional.center_crop(whole, 32)
    expected = expected if isinstance(expected, Tensor) else transforms.functional.to_tensor(expected)
    torch.testing.assert_close(view, expected, rtol=0, atol=0.06)


@pytest.mark.parametrize("size", [(5000, 2), (2, 5000)])
def test_thin_images_need_little_memory(size: tuple[int, int]) -> None:
    """A resize of the whole image would have 64 million pixels."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (view,) = eval_view(224, 0.875, [0.5] * 3, [0.5] * 3)(Image.new("RGB", size, (255, 0, 0)))
    assert (view[0] == 1).all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


@pytest.mark.parametrize("in_chans", [1, 5])
def test_eval_view_of_other_channels(in_chans: int) -> None:
    image = noise_image(in_chans, 8, 12)
    pixels = np.asarray(image, dtype=np.float32) / (255 if in_chans == 1 else 1)
    expected = torch.from_numpy(pixels.reshape(in_chans, 8, 12)[:, 2:6, 4:8])
    (view,) = eval_view(4, 0.5, [0.5] * in_chans, [0.25] * in_chans)(image)
    torch.testing.assert_close(view, (expected - 0.5) / 0.25)


@pytest.mark.parametrize("in_chans", [1, 3, 5])
def test_train_view(in_chans: int) -> None:
    """Equal to torchvision's crop with its defaults and the same generator."""
    image, mean, std = noise_image(in_chans, 20, 30), [0.5] * in_chans, [0.25] * in_chans
    pixels = image if isinstance(image, Tensor) else transforms.functional.to_tensor(image)
    flips = 0
    for seed in range(40):
        torch.manual_seed(seed)
        (view,) = train_view(8, mean, std)(image)
        torch.manual_seed(seed)
        box = transforms.RandomResizedCrop.get_params(pixels, scale=[0.08, 1.0], ratio=[3 / 4, 4 / 3])
        crop = transforms.functional.resized_crop(pixels, *box, [8, 8], antialias=True)
        flipped = bool(torch.rand(1) < 0.5)
        flips += flipped
        expected = (crop.flip(-1) if flipped else crop) / 0.25 - 2
        torch.testing.assert_close(view, expected, rtol=0, atol=0.02)  # PIL rounds to eight bits
    assert 10 < flips < 30


# --------------------------------------------------------------------------- checks


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ({"local_numbers": (8,)}, ["--local_crops_number", "--local_crops_size"]),
        ({"local_numbers": ()}, ["--local_crops_number", "--local_crops_size"]),
        ({"local_numbers": (2, -1)}, ["--local_crops_number"]),
        ({"local_sizes": (16, 0)}, ["--local_crops_size"]),
        ({"global_size": 0}, ["--global_crops_size"]),
        ({"global_scale": (0.0, 1.0)}, ["--global_crops_scale", "0.0 1.0"]),
        ({"global_scale": (0.5, 0.4)}, ["--global_crops_scale", "0.5 0.4"]),
        ({"local_scale": (0.1, 1.1)}, ["--local_crops_scale", "0.1 1.1"]),
        ({"local_scale": (-0.1, 0.4)}, ["--local_crops_scale"]),
        ({"local_scale": (math.nan, 0.4)}, ["--local_crops_scale"]),
    ],
)
def test_invalid_crops(changes: dict[str, Any], flags: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        check_crops(CROPS._replace(**changes))
    assert all(flag in str(caught.value) for flag in flags), caught.value


def test_valid_crops() -> None:
    check_crops(CROPS)
    check_crops(
        CROPS._replace(global_scale=(1.0, 1.0), local_scale=(0.3, 0.3), local_numbers=(0, 0), local_sizes=(1, 1))
    )


@pytest.mark.parametrize(
    ("mean", "std", "in_chans"),
    [
        (MEAN, STD, 1),
        (MEAN, STD, 5),
        (MEAN, STD[:2], 3),
        (MEAN[:2], STD, 3),
        (MEAN, (0.2, 0.0, 0.2), 3),
        (MEAN, (0.2, -0.1, 0.2), 3),
        (MEAN, (0.2, math.nan, 0.2), 3),
        ((0.5, math.nan, 0.5), STD, 3),
        ((), (), 0),
    ],
)
def test_invalid_normalization(mean: Sequence[float], std: Sequence[float], in_chans: int) -> None:
    with pytest.raises(UsageError, match=rf"INPUT\.MEAN .* INPUT\.STD .* {in_chans} finite values"):
        check_normalization(mean, std, in_chans)


def test_valid_normalization() -> None:
    check_normalization(MEAN, STD, 3)
    check_normalization([0.5], [1e-3], 1)
    check_normalization([0.0] * 5, [1.0] * 5, 5)


def test_strongest_posterization_keeps_one_bit() -> None:
    """timm keeps none at magnitude 10, which Pillow rejects; other levels are not changed."""
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    for policy in ("rand-m10-inc1", "rand-m0", "v0"):
        view = limit_posterize(create_transform(16, is_training=True, auto_augment=policy))
        step = next(step for step in view.transforms if hasattr(step, "ops") or hasattr(step, "policy"))
        policies = getattr(step, "policy", None) or [step.ops]
        posterizing = [op for some in policies for op in some if op.name.startswith("Posterize")]
        assert posterizing
        for operation in posterizing:
            operation.prob, operation.magnitude_std = 1.0, 0.0
            kept = len(np.unique(np.asarray(operation(image))))
            plain = operation.level_fn.args[0](operation.magnitude, {})[0]
            assert kept == 2 ** max(1, plain)
