"""The worker part of the split backend: crops against Pillow and torchvision, flips, types and seeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import write_images
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as TF

from data.datasets import ImageDataset, build_dataset
from data.transforms.augment import MultiCrop, dino_views
from data.transforms.crops import ByteCrops, split_views
from data.transforms.photometric import DRAWS
from data.transforms.recipe import ASPECT, Crops, ViewSpec, dino_recipe, small_recipe

CROPS = Crops(32, (0.4, 1.0), (2, 1), (16, 12), (0.05, 0.4))
VIEWS = dino_recipe(CROPS, 0.4).views
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.1)


def noise(height: int = 60, width: int = 80) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_output_of_the_worker_part() -> None:
    *crops, draws = ByteCrops(VIEWS)(noise())
    assert [crop.shape for crop in crops] == [(3, size, size) for size in (32, 32, 16, 16, 12)]
    assert all(crop.dtype == torch.uint8 for crop in crops)
    assert all(crop.is_contiguous() for crop in crops)
    assert draws.shape == (5, DRAWS)
    assert draws.dtype == torch.float32
    assert ((draws >= 0) & (draws < 1)).all()
    assert sum(crop.nbytes for crop in crops) * 4 == 3 * 4 * (2 * 32**2 + 2 * 16**2 + 12**2)


@pytest.mark.parametrize("size", [(60, 80), (40, 200), (17, 13), (300, 400)])
def test_crops_equal_torchvision_and_pillow(size: tuple[int, int]) -> None:
    """The boxes of `RandomResizedCrop.get_params` and Pillow's bicubic resize, up to two levels.

    The noise avoids the limits of the range, since both clip between their two passes, which Pillow may do in the other order.
    """
    image, flipped = Image.fromarray(np.asarray(noise(*size)) // 2 + 64), 0
    for seed in range(20):
        torch.manual_seed(seed)
        *crops, _ = ByteCrops(VIEWS)(image)
        torch.manual_seed(seed)
        flips = torch.rand(len(VIEWS)) < 0.5
        for crop, view, flip in zip(crops, VIEWS, flips.tolist()):
            box = RandomResizedCrop.get_params(image, list(view.scale), list(ASPECT))
            expected = TF.resized_crop(image, *box, [view.size, view.size], InterpolationMode.BICUBIC, antialias=True)
            expected = TF.hflip(expected) if flip else expected
            difference = (crop.int() - TF.pil_to_tensor(expected).int()).abs()
            assert difference.max() <= 2
            assert (difference > 1).float().mean() < 0.005
            flipped += flip
    assert 30 < flipped < 70  # of 100


def boxes(crops: Tensor) -> Tensor:
    """Return left, right, top, bottom and flip of crops of an image whose red is the column and green the row."""
    red, green = crops[:, 0].float(), crops[:, 1].float()
    sides = torch.stack([red.mean(dim=1)[:, 0], red.mean(dim=1)[:, -1]]).sort(dim=0).values
    return torch.cat([sides, torch.stack([green.mean(dim=2)[:, 0], green.mean(dim=2)[:, -1]])])


def test_distribution_of_boxes_equals_pil_backend() -> None:
    """Kolmogorov-Smirnov distance of width, height, centers and flips; 1.63 is exceeded in 1 % of all cases."""
    torch.manual_seed(0)
    pixels = np.zeros((200, 250, 3), dtype=np.uint8)
    pixels[:, :, 0], pixels[:, :, 1] = np.arange(250), np.arange(200)[:, None]
    image, count = Image.fromarray(pixels), 500
    view = ViewSpec(16, (0.2, 0.8), blur=0.0, solarize=0.0)
    split = torch.stack([ByteCrops([view])(image)[0] for _ in range(count)])
    pil_view = RandomResizedCrop(16, view.scale, ASPECT, InterpolationMode.BICUBIC, antialias=True)
    pil = torch.stack([TF.pil_to_tensor(pil_view(image)) for _ in range(count)])
    for a, b in zip(boxes(split), boxes(pil)):
        everything = torch.cat([a, b]).unique()
        below = [(values[:, None] <= everything).double().mean(dim=0) for values in (a, b)]
        assert (below[0] - below[1]).abs().max() * (count / 2) ** 0.5 < 1.63
    flips = (split[:, 0, 0, 0] > split[:, 0, 0, -1]).float().mean()
    assert float(flips) == pytest.approx(0.5, abs=3 * 0.5 / count**0.5)


def test_no_local_crops() -> None:
    crops, device_transform = split_views(dino_recipe(CROPS._replace(local_numbers=(), local_sizes=()), 0.4), MEAN, STD)
    views = device_transform([part[None] for part in crops(noise())], torch.device("cpu"))
    assert [view.shape for view in views] == [(1, 3, 32, 32)] * 2


# --------------------------------------------------------------------------- through the data set


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", 6)


def dataset(folder: Path, seed: int = 0, epoch: int = 0) -> ImageDataset:
    images = build_dataset(folder, "train", ByteCrops(VIEWS), 3, seed)
    images.epoch = epoch
    return images


def test_crops_and_draws_depend_on_seed_epoch_and_index(folder: Path) -> None:
    images = dataset(folder, seed=3, epoch=2)
    first = images[4].views
    images[0]
    torch.rand(7)
    assert same(images[4].views, first)
    assert same(dataset(folder, 3, 2)[4].views, first)
    for other in (dataset(folder, 4, 2)[4], dataset(folder, 3, 1)[4], images[5]):
        assert not torch.equal(other.views[-1], first[-1])
        assert not torch.equal(other.views[0], first[0])


def test_all_readable_formats(tmp_path: Path) -> None:
    """Palette, transparency, CMYK, 16 bits and arrays, as in the pil backend."""
    pixels = np.full((40, 50, 3), (200, 100, 50), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "0.png")
    image.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "1.png")
    image.convert("RGBA").save(tmp_path / "2.png")
    image.save(tmp_path / "3.bmp")
    np.save(tmp_path / "4.npy", pixels)
    Image.fromarray(np.full((40, 50), 200 * 257, dtype=np.uint16)).save(tmp_path / "5.png")
    image.convert("CMYK").save(tmp_path / "6.jpg", quality=100)
    found = [
        sample.views[0].float().mean(dim=(1, 2)).round().tolist()
        for sample in map(dataset(tmp_path).__getitem__, range(7))
    ]
    assert found[:6] == [[200, 100, 50]] * 5 + [[200] * 3]
    assert found[6] == pytest.approx([200, 100, 50], abs=3)


def test_pil_backend_is_unchanged(folder: Path) -> None:
    views = dino_views(dino_recipe(CROPS, 0.4), 3, MEAN, STD)
    assert isinstance(views, MultiCrop)
    images = build_dataset(folder, "train", views, 3, 0)
    assert all(view.dtype == torch.float32 for view in images[0].views)


def test_small_recipe_is_dinos_without_blur_and_solarization() -> None:
    small, dino = small_recipe(CROPS, 0.3), dino_recipe(CROPS, 0.3)
    assert small.jitter == dino.jitter
    assert [view[:2] for view in small.views] == [view[:2] for view in dino.views]
    assert {view[2:] for view in small.views} == {(0.0, 0.0)}
