"""`--decode scaled`: same crops as `full`, from JPEG files decoded at a fraction of their size."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.image_files import encoded, write_tsv
from PIL import Image
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from benchmarks.augment import crop_statistics, make_jpegs, pixel_difference, seeded_crops
from data.datasets import ImageDataset, build_dataset
from data.decode import REDUCTIONS, decode_image, jpeg_size
from data.transforms.crops import ByteCrops, ScaledCrops, largest_reduction, random_box, reduced_box
from data.transforms.geometry import CropBox
from data.transforms.recipe import ASPECT, Crops, ViewSpec, dino_recipe
from data.transforms.udi_views import Sampling, udi_views

# Half and a quarter of the published crops: what those are for photographs of twice and four times the sides.
HALF, QUARTER = Crops(112, (0.4, 1.0), (8,), (48,), (0.05, 0.4)), Crops(56, (0.4, 1.0), (8,), (24,), (0.05, 0.4))
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.1)


def byte_crops(crops: Crops) -> ByteCrops:
    return ByteCrops(dino_recipe(crops, 0.4).views)


def upright_size(height: int, width: int, orientation: int) -> tuple[int, int]:
    exif = Image.Exif()
    exif[274] = orientation
    image = Image.new("RGB", (width, height))
    size = jpeg_size(encoded(lambda buffer: image.save(buffer, "JPEG", exif=exif)))
    assert size is not None
    return size


@pytest.mark.parametrize("size", [(375, 500), (40, 900), (900, 40), (7, 5), (1, 1)])
@pytest.mark.parametrize("scale", [(0.05, 0.4), (0.9, 1.0)])
def test_boxes_equal_torchvision(size: tuple[int, int], scale: tuple[float, float]) -> None:
    """Also where no box fits into the image, and in the state of the generator."""
    image, view = torch.empty(()).expand(3, *size), ViewSpec(8, scale, 0.0, 0.0)
    for seed in range(30):
        torch.manual_seed(seed)
        expected = (*RandomResizedCrop.get_params(image, list(scale), list(ASPECT)), torch.rand(1).item())
        torch.manual_seed(seed)
        assert (*random_box(size, view), torch.rand(1).item()) == expected


def slow_reduction(boxes: Sequence[CropBox], views: Sequence[ViewSpec]) -> int:
    """Try each reduction; of each side, count the pixels of the reduced image between the edges nearest to those of the box."""
    best = 1
    for reduction in (2, 4, 8):
        enough = True
        for (top, left, height, width), view in zip(boxes, views):
            for start, length in ((top, height), (left, width)):
                first, last = nearest_edge(start, reduction), nearest_edge(start + length, reduction)
                enough = enough and last - first >= view.size
        best = reduction if enough else best
    return best


def nearest_edge(position: int, reduction: int) -> int:
    """Return the edge of the reduced image nearest to `position`; of two equally near ones the even one, as `round`."""
    return min(range(700), key=lambda edge: (abs(edge * reduction - position), edge % 2))


def test_choice_of_the_reduction_equals_a_slow_loop() -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(25):
        sides = rng.integers(1, 60, 3)
        views = [ViewSpec(int(side), (0.1, 1.0), 0.0, 0.0) for side in sides]
        boxes = [
            CropBox(*rng.integers(0, 500, 2).tolist(), *(side * rng.uniform(0.9, 10, 2)).astype(int).clip(1).tolist())
            for side in sides
        ]
        found.append(largest_reduction(boxes, views))
        assert found[-1] == slow_reduction(boxes, views)
    assert set(found) == {1, 2, 4}
    assert largest_reduction([CropBox(3, 5, 80, 90)], [ViewSpec(10, (0.1, 1.0), 0.0, 0.0)]) == 8


@pytest.mark.parametrize(("crops", "usual", "share"), [(HALF, 2, 0.6), (QUARTER, 4, 0.6)])
def test_crops_keep_their_statistics(crops: Crops, usual: int, share: float) -> None:
    """The tolerances that docs/data.md states, for photographs of 500 x 375 pixels."""
    jpegs, full = make_jpegs(95, None), byte_crops(crops)
    whole, _ = seeded_crops(full, jpegs)
    scaled, reductions = seeded_crops(ScaledCrops(full), jpegs)
    assert reductions[usual] >= share * len(jpegs)
    before, after = crop_statistics(whole), crop_statistics(scaled)
    assert after.mean == pytest.approx(before.mean, abs=0.001)
    assert after.std == pytest.approx(before.std, rel=0.015)
    assert after.roughness == pytest.approx(before.roughness, rel=0.1)
    assert 0 < pixel_difference(whole, scaled) < 0.015


def test_published_crops_of_usual_photographs_are_never_reduced() -> None:
    """A global crop of 224 pixels would need 448 on both sides."""
    crops = byte_crops(Crops(224, (0.4, 1.0), (8,), (96,), (0.05, 0.4)))
    jpegs = make_jpegs(95, 3)
    whole, _ = seeded_crops(crops, jpegs)
    scaled, reductions = seeded_crops(ScaledCrops(crops), jpegs)
    assert reductions == {1: 3}
    assert all(map(torch.equal, whole, scaled))


def gradient(height: int = 375, width: int = 500) -> Image.Image:
    """Red is the column and green the row, as shares of the image."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[:, :, 0], pixels[:, :, 1] = np.linspace(0, 250, width), np.linspace(0, 250, height)[:, None]
    return Image.fromarray(pixels)


TURN = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # EXIF orientation -> transposition that undoes it


@pytest.mark.parametrize("orientation", TURN)
def test_boxes_and_flips_of_rotated_images(orientation: int) -> None:
    """Crops show the same part of the image, up to a pixel of the reduced one on each side."""
    exif = Image.Exif()
    exif[274] = orientation
    turn = TURN[orientation]
    image = gradient() if turn is None else gradient().transpose(Image.Transpose(turn))
    jpeg = encoded(lambda buffer: image.save(buffer, "JPEG", quality=98, exif=exif))
    assert jpeg_size(jpeg) == (375, 500)
    full = byte_crops(QUARTER)
    (whole, _), (scaled, reductions) = (seeded_crops(side, [jpeg]) for side in (full, ScaledCrops(full)))
    assert reductions == {4: 1}
    for one, other in zip(whole, scaled, strict=True):
        for plane, pixels in ((0, 500), (1, 375)):
            assert (one[plane].float() - other[plane].float()).abs().max() <= 250 * 4 / pixels + 3


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("size", [(375, 500), (9, 17), (8, 15), (64, 33)])
def test_reduced_image_has_the_size_that_boxes_are_mapped_to(size: tuple[int, int], reduction: int) -> None:
    content = encoded(lambda buffer: gradient(*size).save(buffer, "JPEG"))
    image = decode_image(content, 3, (), reduction)
    assert isinstance(image, Image.Image)
    assert (image.height, image.width) == tuple(-(-side // reduction) for side in size)
    box = reduced_box(CropBox(0, 0, *size), reduction)
    assert box.height <= image.height
    assert box.width <= image.width


@pytest.mark.parametrize("orientation", range(9))
def test_upright_size(orientation: int) -> None:
    assert upright_size(30, 50, orientation) == ((50, 30) if orientation >= 5 else (30, 50))


# --------------------------------------------------------------------------- through the data set

VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gray": ("JPEG", "L", {}), "cmyk": ("JPEG", "CMYK", {}), "progressive": ("JPEG", "RGB", {"progressive": True}),
    "png": ("PNG", "RGB", {}), "webp": ("WEBP", "RGB", {}), "bmp": ("BMP", "RGB", {}), "tiff": ("TIFF", "RGB", {}),
}  # fmt: skip


def variants() -> dict[str, bytes]:
    """Return a photograph in several formats, and with 16 bits."""
    photo = Image.open(io.BytesIO(make_jpegs(95, 1)[0]))
    contents = {
        name: encoded(partial(photo.convert(mode).save, format=kind, **options))
        for name, (kind, mode, options) in VARIANTS.items()
    }
    deep = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)
    contents["16 bits"] = encoded(lambda buffer: deep.save(buffer, "PNG"))
    return contents


def both(folder: Path, layout: str = "files") -> list[ImageDataset]:
    """Return the same data set with --decode full and scaled."""
    crops = byte_crops(QUARTER)
    return [build_dataset(folder, "train", transform, 3, 3, layout=layout) for transform in (crops, ScaledCrops(crops))]


def close(full: Sequence[Tensor], scaled: Sequence[Tensor]) -> bool:
    return 0 < pixel_difference(full[:-1], scaled[:-1]) < 0.03 and torch.equal(full[-1], scaled[-1])


def test_all_formats(tmp_path: Path) -> None:
    """JPEG files differ a little, of any mode; other formats do not differ."""
    contents = variants()
    for name, content in contents.items():
        (tmp_path / f"{name}.jpg").write_bytes(content)
    full, scaled = both(tmp_path)
    for i, name in enumerate(sorted(contents)):
        one, other = full[i], scaled[i]
        assert not one.failures
        if name in ("gray", "cmyk", "progressive"):
            assert close(one.views, other.views)
        else:
            assert all(map(torch.equal, one.views, other.views))


def test_sources(tmp_path: Path) -> None:
    """Images of a tsv file, as those of a folder."""
    jpegs = make_jpegs(95, 4)
    write_tsv(tmp_path / "train.tsv", [(f"{i}", "0", jpeg) for i, jpeg in enumerate(jpegs)])
    for one, other in zip(*both(tmp_path, layout="tsv"), strict=True):
        assert close(one.views, other.views)


def test_damaged_images_are_replaced_by_the_same_others(tmp_path: Path) -> None:
    """The random numbers of an attempt that failed are not missing in the next one."""
    for i, jpeg in enumerate(make_jpegs(95, 6)):
        half = len(jpeg) // 2
        damaged = {
            0: jpeg[:half],
            1: jpeg[:half] + b"\xff\xd9",
            2: jpeg[:half] + bytes(half) + b"\xff\xd9",
            3: jpeg[:20],
        }
        (tmp_path / f"{i}.jpg").write_bytes(damaged.get(i, jpeg))
    full, scaled = both(tmp_path)
    for i in range(6):
        one, other = full[i], scaled[i]
        assert one.failures == other.failures
        assert bool(one.failures) == (i < 4)
        assert close(one.views, other.views)


def test_udi_views() -> None:
    """The correspondence is that of the whole image."""
    full = udi_views(HALF, MEAN, STD, 0.4, Sampling({112: 7, 48: 3}))[0]
    scaled = ScaledCrops(full)
    reductions = []
    for seed, jpeg in enumerate(make_jpegs(95, 6)):
        torch.manual_seed(seed)
        expected = full(decode_image(jpeg, 3))
        torch.manual_seed(seed)
        decoded = scaled.decode(jpeg, ())
        found = scaled(decoded)
        reductions.append(decoded.reduction)
        assert all(map(torch.equal, expected[10:], found[10:]))  # draws and correspondence
        assert pixel_difference(expected[:10], found[:10]) < 0.02
    assert 2 in reductions
