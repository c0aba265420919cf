"""Color augmentation of batches: operations against Pillow and torchvision, drawn parameters, and independence of the batch."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from skimage import data as photographs
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional as TF

from data.transforms import photometric
from data.transforms.augment import GaussianBlur, Solarize, dino_views
from data.transforms.crops import ByteCrops, split_views
from data.transforms.photometric import (
    BLENDS,
    BOXES,
    CORNER,
    DRAWS,
    HUE_ROUND,
    NEUTRAL,
    ORDERS,
    Colors,
    Photometric,
    blur_matrices,
    box_weights,
    draw_colors,
    make_plan,
)
from data.transforms.recipe import BLUR_RADIUS, Crops, dino_recipe

CROPS = Crops(32, (0.4, 1.0), (2, 1), (16, 12), (0.05, 0.4))
RECIPE = dino_recipe(CROPS, 0.4)
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.1)
CPU = torch.device("cpu")
LARGEST = 1 - 2**-24  # that torch.rand gives


def photograph(size: int = 48) -> Image.Image:
    """Return a photograph of a face with all colors and a large range."""
    return Image.fromarray(photographs.astronaut()[:400, 60:460]).resize((size, size), Image.Resampling.BICUBIC)


def noise(size: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))


def batch(*images: Image.Image) -> Tensor:
    """Stack images to (N, 3, H, W) with values 0..255."""
    return torch.stack([TF.pil_to_tensor(image) for image in images]).float()


def colors(images: int, **fields: Any) -> Colors:
    """Return parameters without effect except those given."""
    nothing = {
        "order": torch.zeros(images, dtype=torch.int64),
        "factors": NEUTRAL.expand(images, 4),
        "gray": torch.zeros(images, dtype=torch.bool),
        "radius": torch.zeros(images),
        "solarize": torch.zeros(images, dtype=torch.bool),
    }
    return Colors(**{**nothing, **fields})


def with_factor(operation: int, values: list[float]) -> Colors:
    factors = NEUTRAL.repeat(len(values), 1)
    factors[:, operation] = torch.tensor(values)
    return colors(len(values), factors=factors, order=torch.arange(len(values)) % 24)


def apply_colors(x_NCHW: Tensor, given: Colors) -> Tensor:
    return photometric.apply_colors(x_NCHW, make_plan(given, CPU))


ADJUST: list[Callable[..., Any]] = [TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue]
FACTORS = [[0.0, 0.6, 0.9, 1.0, 1.3, 1.4, 3.0]] * 3 + [[-0.5, -0.1, -0.03, 0.0, 0.05, 0.1, 0.5]]


# --------------------------------------------------------------------------- operations with given parameters


@pytest.mark.parametrize("image", [photograph(), noise()], ids=["photograph", "noise"])
@pytest.mark.parametrize("operation", range(4), ids=["brightness", "contrast", "saturation", "hue"])
def test_factors_equal_torchvision(operation: int, image: Image.Image) -> None:
    """In float, up to torchvision's rounded gray weights."""
    ours = apply_colors(batch(*[image] * 7), with_factor(operation, FACTORS[operation]))
    for value, result in zip(FACTORS[operation], ours):
        expected = ADJUST[operation](batch(image)[0] / 255, value) * 255
        torch.testing.assert_close(result, expected, rtol=0, atol=0.06)


@pytest.mark.parametrize("operation", range(3), ids=["brightness", "contrast", "saturation"])
def test_factors_equal_pillow(operation: int) -> None:
    """Pillow truncates to integers, and rounds the mean and the gray level."""
    for image in (photograph(), noise()):
        ours = apply_colors(batch(*[image] * 7), with_factor(operation, FACTORS[operation]))
        for value, result in zip(FACTORS[operation], ours):
            difference = result - TF.pil_to_tensor(ADJUST[operation](image, value))
            assert difference.abs().max() <= 1 + 0.51 * abs(1 - value)


def test_hue_equals_pillow_up_to_8_bits() -> None:
    """Pillow stores hue and saturation in 8 bits, with errors of several levels in saturated colors, but no bias."""
    image = photograph()
    values = [-0.1, -0.04, 0.07, 0.1]
    ours = apply_colors(batch(*[image] * 4), with_factor(photometric.HUE, values))
    for value, result in zip(values, ours):
        difference = result - TF.pil_to_tensor(TF.adjust_hue(image, value))
        assert difference.abs().mean() < 1.5
        assert difference.mean().abs() < 0.6
        assert difference.abs().max() < 8


def test_hue_of_gray_and_pure_colors() -> None:
    levels = torch.tensor([[0, 0, 0], [9, 9, 9], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 100, 0]])
    x = levels.T.float().view(1, 3, 1, 7).repeat(2, 1, 1, 1)
    turned = apply_colors(x, with_factor(photometric.HUE, [1 / 3, -1 / 6]))
    third = torch.tensor([[0, 0, 0], [9, 9, 9], [255, 255, 255], [0, 255, 0], [0, 0, 255], [255, 0, 0], [0, 200, 100]])
    sixth_back = torch.tensor(
        [[0, 0, 0], [9, 9, 9], [255, 255, 255], [255, 0, 255], [255, 255, 0], [0, 255, 255], [200, 0, 100]]
    )
    torch.testing.assert_close(turned[0, :, 0].T, third.float(), rtol=0, atol=1e-3)
    torch.testing.assert_close(turned[1, :, 0].T, sixth_back.float(), rtol=0, atol=1e-3)


def test_all_jitter_orders_equal_torchvision() -> None:
    generator = torch.Generator().manual_seed(1)
    low, high = torch.tensor([0.4, 0.4, 0.2, -0.3]), torch.tensor([1.6, 1.6, 1.8, 0.3])
    factors = low + (high - low) * torch.rand(24, 4, generator=generator)
    image = photograph()
    ours = apply_colors(batch(*[image] * 24), colors(24, order=torch.arange(24), factors=factors))
    for order, values, result in zip(ORDERS.tolist(), factors.tolist(), ours):
        expected = batch(image)[0] / 255
        for operation in order:
            expected = ADJUST[operation](expected, values[operation])
        torch.testing.assert_close(result, expected * 255, rtol=0, atol=0.2)
    assert not torch.allclose(ours[0], ours[-1], atol=5)


def test_orders_are_all_permutations() -> None:
    assert len({tuple(order) for order in ORDERS.tolist()}) == 24
    for order, before, others in zip(ORDERS.tolist(), HUE_ROUND.tolist(), BLENDS.tolist()):
        assert order == [*others[:before], photometric.HUE, *others[before:]]


def test_gray_equals_pillow() -> None:
    for image in (photograph(), noise()):
        x = batch(image, image)
        result = apply_colors(x.clone(), colors(2, gray=torch.tensor([False, True])))
        torch.testing.assert_close(result[0], x[0], rtol=0, atol=0)
        expected = TF.pil_to_tensor(TF.to_grayscale(image, num_output_channels=3)).float()
        torch.testing.assert_close(result[1], expected, rtol=0, atol=0.502)


def test_solarize_equals_pillow() -> None:
    image = noise()
    result = apply_colors(batch(image, image), colors(2, solarize=torch.tensor([True, False])))
    torch.testing.assert_close(result, batch(ImageOps.solarize(image), image), rtol=0, atol=0)


RADII = [0.1, 0.3, 0.5, 0.9, 1.0, 1.3, 1.7, 2.0]


@pytest.mark.parametrize("size", [9, 23, 24, 25, 60, 150])
def test_blur_equals_pillow(size: int) -> None:
    """Pillow rounds six times: three levels on noise; at the border as in the middle."""
    image = noise(size)
    ours = apply_colors(batch(*[image] * 8), colors(8, radius=torch.tensor(RADII)))
    for radius, result in zip(RADII, ours):
        expected = TF.pil_to_tensor(image.filter(ImageFilter.GaussianBlur(radius)))
        assert (result - expected).abs().max() <= 3.3
        assert (result - expected).mean().abs() < 0.6  # ties are rounded up


def test_blur_of_a_photograph_equals_pillow() -> None:
    image = photograph(64)
    ours = apply_colors(batch(*[image] * 8), colors(8, radius=torch.tensor(RADII)))
    for radius, result in zip(RADII, ours):
        assert (result - TF.pil_to_tensor(image.filter(ImageFilter.GaussianBlur(radius)))).abs().mean() < 0.7


def test_blur_has_the_variance_of_its_radius() -> None:
    radius = torch.linspace(*BLUR_RADIUS, 39)
    middle = blur_matrices(box_weights(radius), 31)[:, 15]
    offsets = torch.arange(31) - 15
    torch.testing.assert_close((middle * offsets**2).sum(dim=1).sqrt(), radius, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((middle * offsets).sum(dim=1), torch.zeros(39), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 5, CORNER - 1, CORNER, CORNER + 1, 40, 96])
def test_blur_matrices_are_three_boxes_with_a_repeated_border(size: int) -> None:
    boxes = box_weights(torch.tensor([0.2, 1.1, 2.0]))
    line = torch.rand(3, size, generator=torch.Generator().manual_seed(0))
    expected = line
    for _ in range(BOXES):
        wide = torch.cat([expected[:, :1]] * 2 + [expected] + [expected[:, -1:]] * 2, dim=1)
        expected = sum(boxes[:, abs(d), None] * wide[:, 2 + d : 2 + d + size] for d in range(-2, 3))  # type: ignore[assignment]
    blurred = (blur_matrices(boxes, size) @ line[:, :, None]).squeeze(2)
    torch.testing.assert_close(blurred, expected, rtol=0, atol=1e-6)


def test_chain_equals_pillow() -> None:
    """All operations in the order of the recipe."""
    image = photograph()
    factors = torch.tensor([[0.7, 1.3, 0.9, 0.06], [1.2, 0.8, 1.1, -0.05]])
    given = colors(
        2,
        order=torch.tensor([5, 17]),
        factors=factors,
        gray=torch.tensor([False, True]),
        radius=torch.tensor([1.5, 0.4]),
        solarize=torch.tensor([True, True]),
    )
    ours = apply_colors(batch(image, image), given)
    for i in range(2):
        expected = image
        for operation in ORDERS[given.order[i]].tolist():
            expected = ADJUST[operation](expected, float(factors[i, operation]))
        expected = TF.to_grayscale(expected, 3) if given.gray[i] else expected
        expected = ImageOps.solarize(expected.filter(ImageFilter.GaussianBlur(float(given.radius[i]))))
        difference = ours[i] - TF.pil_to_tensor(expected)
        assert difference.abs().mean() < 2.5  # four operations that truncate
        assert difference.abs().quantile(0.99) < 9


# --------------------------------------------------------------------------- drawn parameters


def uniform_distance(values: Tensor, low: float, high: float) -> float:
    """Return the Kolmogorov-Smirnov distance from the uniform distribution, times the square root of the sample size."""
    sorted_values = ((values.double() - low) / (high - low)).sort().values
    steps = torch.arange(len(values) + 1) / len(values)
    distance = torch.maximum((sorted_values - steps[:-1]).abs().max(), (sorted_values - steps[1:]).abs().max())
    return float(distance) * len(values) ** 0.5


@pytest.fixture(scope="module")
def drawn() -> Colors:
    return draw_colors(torch.rand(20_000, 5, DRAWS, generator=torch.Generator().manual_seed(3)), RECIPE)


def share(chosen: Tensor) -> Tensor:
    return chosen.float().mean(dim=0)


def test_probabilities(drawn: Colors) -> None:
    """DINO, appendix; four standard deviations of 20,000 draws are at most 0.0142."""
    jittered = (drawn.factors != NEUTRAL).any(dim=-1)
    expected = {"jitter": [0.8] * 5, "gray": [0.2] * 5, "blur": [1, 0.1, 0.5, 0.5, 0.5], "solarize": [0, 0.2, 0, 0, 0]}
    found = {"jitter": jittered, "gray": drawn.gray, "blur": drawn.radius > 0, "solarize": drawn.solarize}
    for name, shares in expected.items():
        torch.testing.assert_close(share(found[name]), torch.tensor(shares), rtol=0, atol=0.0142, msg=name)
    assert share(drawn.radius > 0)[0] == 1
    assert share(drawn.solarize)[[0, 2, 3, 4]].sum() == 0


def test_factors_and_radii_are_uniform_in_their_ranges(drawn: Colors) -> None:
    """A distance of 1.63 is exceeded in 1 % of all cases."""
    for view in range(5):
        factors = drawn.factors[:, view]
        factors = factors[(factors != NEUTRAL).any(dim=1)]
        for values, (low, high) in zip(factors.T, [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
            assert uniform_distance(values, low, high) < 1.63
        radii = drawn.radius[:, view]
        assert uniform_distance(radii[radii > 0], 0.1, 2.0) < 1.63


def test_orders_are_uniform(drawn: Colors) -> None:
    """Chi-square with 23 degrees of freedom: 41.6 is exceeded in 1 % of all cases."""
    counts = torch.bincount(drawn.order.flatten(), minlength=24).double()
    assert len(counts) == 24
    expected = counts.sum() / 24
    assert ((counts - expected) ** 2 / expected).sum() < 41.6


def test_parameters_are_independent(drawn: Colors) -> None:
    """Within a view and between views."""
    columns = [drawn.order, *drawn.factors.unbind(-1), drawn.gray, drawn.solarize, drawn.radius]
    table = torch.stack([column[:, view].double() for column in columns for view in (1, 2)])
    table = table[table.std(dim=1) > 0]
    correlations = torch.corrcoef(table) - torch.eye(len(table))
    # the factors of an image without jitter are all neutral, which leaves them uncorrelated since they are symmetric
    assert correlations.abs().max() < 4 / 20_000**0.5


def test_smallest_and_largest_draws() -> None:
    lowest, highest = (
        draw_colors(torch.zeros(1, 5, DRAWS), RECIPE),
        draw_colors(torch.full((1, 5, DRAWS), LARGEST), RECIPE),
    )
    assert (lowest.order == 0).all()
    assert (highest.order == 23).all()
    torch.testing.assert_close(lowest.factors[0, 0], torch.tensor([0.6, 0.6, 0.8, -0.1]))
    assert (lowest.gray & (lowest.radius > 0) == torch.ones(1, 5, dtype=torch.bool)).all()
    torch.testing.assert_close(lowest.radius[0], torch.full((5,), 0.1))
    assert not highest.gray.any()
    assert highest.radius[0].tolist() == pytest.approx([2.0, 0, 0, 0, 0])
    assert (highest.factors == NEUTRAL).all()


def test_strength_zero_changes_nothing() -> None:
    still = draw_colors(torch.rand(100, 5, DRAWS), dino_recipe(CROPS, 0.0))
    torch.testing.assert_close(still.factors, NEUTRAL.expand(100, 5, 4), rtol=0, atol=0)
    x = batch(noise())
    torch.testing.assert_close(apply_colors(x.clone(), colors(1)), x, rtol=0, atol=0)


# --------------------------------------------------------------------------- against the PIL operations over many draws

MANY = 800


def pil_operation(name: str) -> Callable[[Image.Image], Image.Image]:
    """Return an operation of the pil backend that is always applied."""
    jitter = RECIPE.jitter
    alone: dict[str, Any] = {
        "brightness": transforms.ColorJitter(brightness=jitter.brightness),
        "contrast": transforms.ColorJitter(contrast=jitter.contrast),
        "saturation": transforms.ColorJitter(saturation=jitter.saturation),
        "hue": transforms.ColorJitter(hue=jitter.hue),
        "jitter": transforms.ColorJitter(*jitter),
        "gray": transforms.RandomGrayscale(p=1.0),
        "blur": GaussianBlur(1.0),
        "solarize": Solarize(1.0),
    }
    operation: Callable[[Image.Image], Image.Image] = alone[name]
    return operation


def split_operation(name: str) -> Colors:
    """Apply the same operation of the split backend `MANY` times with drawn parameters."""
    draws = torch.rand(MANY, 5, DRAWS, generator=torch.Generator().manual_seed(5))
    draws[..., 0] = 0  # jittered
    full = draw_colors(draws, RECIPE)
    full = Colors(*(field[:, 0] for field in full))
    factors = NEUTRAL.repeat(MANY, 1)
    names = ["brightness", "contrast", "saturation", "hue"]
    for i in range(4) if name == "jitter" else [names.index(name)] if name in names else []:
        factors[:, i] = full.factors[:, i]
    yes = torch.ones(MANY, dtype=torch.bool)
    fields: dict[str, Tensor] = {"order": full.order, "factors": factors}
    fields |= {"gray": {"gray": yes}, "solarize": {"solarize": yes}, "blur": {"radius": full.radius}}.get(name, {})
    return colors(MANY, **fields)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue", "jitter", "gray", "blur", "solarize"])
def test_distribution_of_each_operation_equals_pillow(name: str) -> None:
    """Mean, variance and histogram of all pixels, and of the images' means and variances."""
    random.seed(0)
    image = photograph(24)
    operation = pil_operation(name)
    pil = torch.stack([TF.pil_to_tensor(operation(image)) for _ in range(MANY)]).float()
    split = apply_colors(batch(image).repeat(MANY, 1, 1, 1), split_operation(name))
    means = [x.mean(dim=(0, 2, 3)) for x in (pil, split)]
    torch.testing.assert_close(means[1], means[0], rtol=0, atol=2.5)  # Pillow truncates; four operations of jitter most
    deviations = [x.std(dim=(0, 2, 3)) for x in (pil, split)]
    torch.testing.assert_close(deviations[1], deviations[0], rtol=0.02, atol=0.5)
    of_images = [torch.stack([x.mean(dim=(1, 2, 3)), x.std(dim=(1, 2, 3))]).std(dim=1) for x in (pil, split)]
    torch.testing.assert_close(of_images[1], of_images[0], rtol=0.08, atol=0.15)
    # Pillow's truncated levels lie half a level below ours on the average, so bins are compared after a half is added
    shares = [torch.histc((x + h).clamp(0, 255), 16, 0, 256) / x.numel() for x, h in ((pil, 0.5), (split, 0.0))]
    assert (shares[0] - shares[1]).abs().sum() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("view", [0, 1, 2])
def test_distribution_of_views_equals_pil_backend(view: int) -> None:
    """Crops, flips and colors of both backends on one photograph."""
    random.seed(0)
    torch.manual_seed(0)
    image = photograph()
    pil_view = dino_views(dino_recipe(CROPS, 0.4), 3, (0, 0, 0), (1 / 255,) * 3).view_transforms[view]
    pil = torch.stack([pil_view(image) for _ in range(MANY)])
    byte_crops = ByteCrops(RECIPE.views[view : view + 1])
    alone = Photometric(RECIPE._replace(views=RECIPE.views[view : view + 1]), (0, 0, 0), (1 / 255,) * 3)
    (split,) = alone([torch.stack(parts) for parts in zip(*(byte_crops(image) for _ in range(MANY)))], CPU)
    torch.testing.assert_close(split.mean(dim=(0, 2, 3)), pil.mean(dim=(0, 2, 3)), rtol=0, atol=6)
    torch.testing.assert_close(split.std(dim=(0, 2, 3)), pil.std(dim=(0, 2, 3)), rtol=0.05, atol=0)
    torch.testing.assert_close(split.std(dim=(1, 2, 3)).mean(), pil.std(dim=(1, 2, 3)).mean(), rtol=0.05, atol=0)
    shares = [torch.histc((x + h).clamp(0, 255), 16, 0, 256) / x.numel() for x, h in ((pil, 0.5), (split, 0.0))]
    assert (shares[0] - shares[1]).abs().sum() < 0.08


# --------------------------------------------------------------------------- batches


def samples(count: int) -> tuple[list[list[Tensor]], Photometric]:
    """Return the output of the worker part for some images, and the device part."""
    torch.manual_seed(0)
    crops, device_transform = split_views(dino_recipe(CROPS, 0.4), MEAN, STD)
    return [crops(noise(50)) for _ in range(count)], device_transform


def stacked(parts: list[list[Tensor]]) -> list[Tensor]:
    return [torch.stack(part) for part in zip(*parts)]


def test_views_in_order() -> None:
    parts, device_transform = samples(6)
    views = device_transform(stacked(parts), CPU)
    assert [view.shape for view in views] == [(6, 3, size, size) for size in (32, 32, 16, 16, 12)]
    assert all(view.dtype == torch.float32 for view in views)


def test_colors_are_independent_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """And of the number of images processed at once, bit for bit."""
    parts, device_transform = samples(9)
    together = device_transform(stacked(parts), CPU)
    reversed_ = device_transform(stacked(parts[::-1]), CPU)
    alone = [device_transform(stacked([part]), CPU) for part in parts]
    monkeypatch.setattr(photometric, "CACHED_PIXELS", 1)
    one_by_one = device_transform(stacked(parts), CPU)
    for v in range(5):
        assert torch.equal(together[v], reversed_[v].flip(0))
        assert torch.equal(together[v], torch.cat([views[v] for views in alone]))
        assert torch.equal(together[v], one_by_one[v])


def test_input_crops_are_not_modified() -> None:
    parts, device_transform = samples(3)
    before = stacked(parts)
    after = [tensor.clone() for tensor in before]
    device_transform(before, CPU)
    assert all(torch.equal(a, b) for a, b in zip(before, after))


def test_normalization_of_each_channel() -> None:
    """A constant image below the solarization threshold, with jitter of strength 0."""
    levels = (10, 60, 120)
    crops, device_transform = split_views(dino_recipe(CROPS, 0.0), MEAN, STD)
    parts = stacked([crops(Image.new("RGB", (50, 40), levels)) for _ in range(4)])
    parts[-1][..., 6] = LARGEST
    expected = torch.tensor([(level / 255 - m) / s for level, m, s in zip(levels, MEAN, STD)])[:, None, None]
    for view in device_transform(parts, CPU):
        torch.testing.assert_close(view, expected.expand_as(view), rtol=0, atol=2e-5)


def test_no_synchronization_with_the_device() -> None:
    """Tensors of the meta device have no values that could be read."""
    parts, device_transform = samples(6)
    views = device_transform(stacked(parts), torch.device("meta"))
    assert [(view.device.type, view.shape) for view in views] == [
        ("meta", (6, 3, size, size)) for size in (32, 32, 16, 16, 12)
    ]
    with pytest.raises((RuntimeError, NotImplementedError)):
        views[0].sum().item()
