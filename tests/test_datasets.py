"""Images on disk: every layout of a data path, labels, damaged files, channels and bit depths, and their randomness."""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as TF

from data.datasets import REPLACEMENT_TRIES, UNLABELLED, ImageDataset, ImageLike, build_dataset, read_image
from utils import UsageError, isolated_rng


def whole(image: ImageLike) -> list[Tensor]:
    """One view: the image itself."""
    return [image if isinstance(image, Tensor) else TF.to_tensor(image)]


def draws() -> tuple[float, float, float]:
    """The next random numbers of Python, numpy and torch."""
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def only_draws(image: ImageLike) -> list[Tensor]:
    """One view that depends on the three generators alone."""
    return [torch.tensor(draws())]


def write_grey(path: Path, value: int, size: tuple[int, int] = (4, 6)) -> Path:
    """An image filled with one value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(size, value, dtype=np.uint8)).save(path)
    return path


def encoded(save: Callable[[io.BytesIO], Any]) -> bytes:
    buffer = io.BytesIO()
    save(buffer)
    return buffer.getvalue()


def names(dataset: ImageDataset, root: Path) -> list[str]:
    return [str(Path(dataset.path(i)).relative_to(root)) for i in range(len(dataset))]


def levels(path: Path, in_chans: int) -> list[int]:
    """The distinct grey levels of a decoded image, which must be the same in each channel."""
    image = read_image(str(path), in_chans)
    assert isinstance(image, Image.Image)
    assert image.mode == {1: "L", 3: "RGB"}[in_chans]
    pixels = np.asarray(image)
    if in_chans == 3:
        assert (pixels == pixels[:, :, :1]).all()
    return [int(level) for level in np.unique(pixels)]


# --------------------------------------------------------------------------- layouts


def test_class_folders(tmp_path: Path) -> None:
    for name in ("zebra/b.png", "ant/c.JPG", "zebra/deep/a.png", "ant/notes.txt"):
        write_grey((tmp_path / name).with_suffix(".png"), 0).rename(tmp_path / name)
    dataset = build_dataset(tmp_path, "train", whole)
    assert dataset.classes == ("ant", "zebra")
    assert names(dataset, tmp_path) == ["ant/c.JPG", "zebra/b.png", "zebra/deep/a.png"]
    assert dataset.labels.tolist() == [0, 1, 1]
    assert [dataset[i].label for i in range(3)] == [0, 1, 1]
    assert [dataset[i].image_index for i in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("split", ["train", "val"])
def test_folder_of_splits(tmp_path: Path, split: str) -> None:
    for name in ("train/ant/1.png", "train/bee/2.png", "val/ant/3.png", "val/bee/4.png"):
        write_grey(tmp_path / name, 0)
    dataset = build_dataset(tmp_path, split, whole, need_labels=True)
    expected = {"train": ["train/ant/1.png", "train/bee/2.png"], "val": ["val/ant/3.png", "val/bee/4.png"]}
    assert names(dataset, tmp_path) == expected[split]
    assert (dataset.classes, dataset.labels.tolist()) == (("ant", "bee"), [0, 1])


def test_split_itself_as_data_path(tmp_path: Path) -> None:
    write_grey(tmp_path / "train/ant/1.png", 0)
    assert build_dataset(tmp_path / "train", "train", whole).classes == ("ant",)


@pytest.mark.parametrize("files", [["b.png", "a.png"], ["loose.png", "ant/1.png"]])
def test_loose_images_have_no_label(tmp_path: Path, files: list[str]) -> None:
    for name in files:
        write_grey(tmp_path / name, 0)
    dataset = build_dataset(str(tmp_path), "train", whole)
    assert names(dataset, tmp_path) == sorted(files)
    assert dataset.classes == ()
    assert [dataset[i].label for i in range(2)] == [UNLABELLED, UNLABELLED]


def test_train_folder_without_classes(tmp_path: Path) -> None:
    for name in ("train/1.png", "train/2.png", "other/3.png"):
        write_grey(tmp_path / name, 0)
    dataset = build_dataset(tmp_path, "train", whole)
    assert names(dataset, tmp_path) == ["train/1.png", "train/2.png"]
    assert dataset.labels.tolist() == [UNLABELLED, UNLABELLED]


def test_text_file_of_paths(tmp_path: Path) -> None:
    elsewhere = write_grey(tmp_path / "elsewhere/3.png", 3)
    for name in ("lists/1.png", "pictures/two words.png"):
        write_grey(tmp_path / name, 0)
    listing = tmp_path / "lists/images.txt"
    listing.write_text(f"# my photographs\n1.png\n\n  ../pictures/two words.png  \n{elsewhere}\n")
    dataset = build_dataset(listing, "train", whole)
    assert [Path(dataset.path(i)).resolve() for i in range(len(dataset))] == [
        tmp_path / "lists/1.png",
        tmp_path / "pictures/two words.png",
        elsewhere,
    ]
    assert dataset.labels.tolist() == [UNLABELLED] * 3
    assert dataset[2].views[0].mean() == pytest.approx(3 / 255)


def test_links_to_folders_are_followed(tmp_path: Path) -> None:
    write_grey(tmp_path / "disk/1.png", 0)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/ant").symlink_to(tmp_path / "disk")
    dataset = build_dataset(tmp_path / "data", "train", whole)
    assert names(dataset, tmp_path) == ["data/ant/1.png"]


def test_link_that_leads_back_adds_no_image_twice(tmp_path: Path) -> None:
    write_grey(tmp_path / "data/ant/1.png", 0)
    (tmp_path / "data/ant/back").symlink_to(tmp_path / "data")
    assert names(build_dataset(tmp_path / "data", "train", whole), tmp_path) == ["data/ant/1.png"]


def test_names_outside_ascii(tmp_path: Path) -> None:
    write_grey(tmp_path / "Käfer/größe 1.png", 7)
    dataset = build_dataset(tmp_path, "train", whole)
    assert dataset.classes == ("Käfer",)
    assert dataset[0].views[0].mean() == pytest.approx(7 / 255)


# --------------------------------------------------------------------------- data paths that cannot work


def test_empty_folder_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(UsageError) as caught:
        build_dataset(tmp_path, "train", whole)
    for word in (str(tmp_path), "sub-folders", ".png", ".jpg", ".tiff", ".npy"):
        assert word in str(caught.value)


def test_list_without_a_path(tmp_path: Path) -> None:
    listing = tmp_path / "images.txt"
    listing.write_text("# nothing yet\n")
    with pytest.raises(UsageError, match=r"images\.txt") as caught:
        build_dataset(listing, "train", whole)
    assert "sub-folders" not in str(caught.value)


@pytest.mark.parametrize("path", ["", "absent", "absent/images.txt"])
def test_missing_data_path(tmp_path: Path, path: str) -> None:
    with pytest.raises(UsageError, match=f"data path '.*{path}' does not exist; --data_path takes"):
        build_dataset(str(tmp_path / path) if path else "", "train", whole)


def test_list_that_names_missing_files(tmp_path: Path) -> None:
    write_grey(tmp_path / "1.png", 0)
    (tmp_path / "images.txt").write_text("1.png\n2.png\n3.png\n")
    with pytest.raises(UsageError, match=r"names 2 files that do not exist, the first is .*2\.png"):
        build_dataset(tmp_path / "images.txt", "train", whole)


def test_image_as_data_path(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a text file of paths"):
        build_dataset(write_grey(tmp_path / "1.png", 200), "train", whole)


def test_labels_that_are_needed_but_missing(tmp_path: Path) -> None:
    write_grey(tmp_path / "flat/1.png", 0)
    (tmp_path / "images.txt").write_text("flat/1.png\n")
    for path in ("flat", "images.txt"):
        with pytest.raises(UsageError, match="images without a class"):
            build_dataset(tmp_path / path, "val", whole, need_labels=True)


def test_split_that_is_needed_but_missing(tmp_path: Path) -> None:
    write_grey(tmp_path / "train/ant/1.png", 0)
    with pytest.raises(UsageError, match="no folder 'val' beside the other one"):
        build_dataset(tmp_path, "val", whole, need_labels=True)


# --------------------------------------------------------------------------- damaged files

NOISE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
PNG = encoded(lambda buffer: Image.fromarray(NOISE).save(buffer, "PNG"))
JPEG = encoded(lambda buffer: Image.fromarray(NOISE).save(buffer, "JPEG"))
NPY = encoded(lambda buffer: np.save(buffer, NOISE))
DAMAGED = {
    "empty.png": b"",
    "text.jpg": b"not an image",
    "page.png": b"<html>404</html>",
    "truncated.png": PNG[: len(PNG) // 2],
    "truncated.jpg": JPEG[: len(JPEG) // 2],
    "chunk.png": PNG[:40] + b"\xff" * 8 + PNG[48:],
    "empty.npy": b"",
    "text.npy": b"not an array",
    "truncated.npy": NPY[:-10],
    "header.npy": NPY[:60].ljust(80) + NPY[80:],
    "zip.npy": b"PK\x03\x04" + NPY[4:],
    "archive.npy": encoded(lambda buffer: np.savez(buffer, image=NOISE)),
    "objects.npy": encoded(lambda buffer: np.save(buffer, np.array([{}], dtype=object), allow_pickle=True)),
    "no_pixels.npy": encoded(lambda buffer: np.save(buffer, NOISE[:0])),
    "channels.npy": encoded(lambda buffer: np.save(buffer, NOISE[:, :, :2])),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_file_is_replaced_and_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(DAMAGED[name])
    write_grey(tmp_path / "zz.png", 50)
    dataset = build_dataset(tmp_path, "train", whole)
    sample = dataset[0]
    assert sample.image_index == 0
    assert sample.views[0].mean() == pytest.approx(50 / 255)
    assert set(sample.failures) == {sample.failures[0]}
    path, _, reason = sample.failures[0].partition(": ")
    assert path == str(tmp_path / name)
    assert reason.strip()
    assert "\n" not in reason
    assert dataset[1].failures == ()


def test_damaged_tiff_of_many_channels_is_replaced(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tifffile.imwrite(
        tmp_path / "whole.tif", rng.integers(0, 256, (5, 24, 32), dtype=np.uint8), photometric="minisblack"
    )
    content = (tmp_path / "whole.tif").read_bytes()
    for trial in range(40):
        damaged = bytearray(content)
        for place in rng.integers(0, 300, 6):
            damaged[place] = rng.integers(0, 256)
        (tmp_path / f"{trial:02}.tif").write_bytes(damaged)
    dataset = build_dataset(tmp_path, "train", whole, in_chans=5)
    samples = [dataset[i] for i in range(len(dataset))]
    assert sum(bool(sample.failures) for sample in samples) > 10
    assert all(sample.views for sample in samples)


def test_file_that_vanishes_is_replaced(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        write_grey(tmp_path / name, 9)
    dataset = build_dataset(tmp_path, "train", whole)
    (tmp_path / "a.png").unlink()
    sample = dataset[0]
    assert sample.views[0].mean() == pytest.approx(9 / 255)
    assert sample.failures[0].startswith(f"{tmp_path / 'a.png'}: ")


def test_nothing_readable_gives_no_view(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    sample = build_dataset(tmp_path, "train", whole)[1]
    assert (sample.views, sample.label, sample.image_index) == ([], UNLABELLED, 1)
    assert len(sample.failures) == REPLACEMENT_TRIES
    assert set(sample.failures) <= {f"{tmp_path / name}: the file is empty" for name in ("a.png", "b.png")}
    assert sample.failures[0].startswith(str(tmp_path / "b.png"))


def test_error_of_the_transform_is_no_failure_of_the_file(tmp_path: Path) -> None:
    def broken(image: ImageLike) -> list[Tensor]:
        raise ValueError("a mistake in the transform")

    write_grey(tmp_path / "a.png", 0)
    with pytest.raises(ValueError, match="a mistake in the transform"):
        build_dataset(tmp_path, "train", broken)[0]


# --------------------------------------------------------------------------- randomness


def classes_of_grey(root: Path, count: int) -> Path:
    """Class folders 0 .. count - 1, the image in folder i filled with i; image 0 is damaged."""
    for i in range(count):
        write_grey(root / f"{i}" / "image.png", i)
    (root / "0" / "image.png").write_bytes(b"")
    return root


def test_replacement_depends_on_seed_and_epoch_alone(tmp_path: Path) -> None:
    root = classes_of_grey(tmp_path, 10)
    chosen: dict[tuple[int, int], int] = {}
    for seed in range(4):
        for epoch in range(4):
            labels = set()
            for _ in range(2):
                dataset = build_dataset(root, "train", whole, seed=seed)
                dataset.epoch = epoch
                random.seed(len(chosen))
                sample = dataset[0]
                labels.add(sample.label)
                assert sample.views[0].mean() == pytest.approx(sample.label / 255)
                assert len(sample.failures) >= 1
            assert len(labels) == 1
            chosen[seed, epoch] = labels.pop()
    assert 0 not in chosen.values()
    assert all(len({chosen[seed, epoch] for epoch in range(4)}) > 1 for seed in range(4))
    assert all(len({chosen[seed, epoch] for seed in range(4)}) > 1 for epoch in range(4))


def test_sample_depends_on_seed_epoch_and_index_alone(tmp_path: Path) -> None:
    paths = [str(write_grey(tmp_path / f"{i}.png", 0)) for i in range(3)]
    seen: dict[tuple[int, int, int], tuple[float, ...]] = {}
    for seed in (0, 1):
        for epoch in (0, 1):
            dataset = ImageDataset(paths, [0, 0, 0], ("grey",), only_draws, seed=seed)
            dataset.epoch = epoch
            for index in (2, 0, 1):
                seen[seed, epoch, index] = tuple(dataset[index].views[0].tolist())
    assert len(set(seen.values())) == len(seen) == 12
    draws()
    dataset.epoch = 0
    assert tuple(dataset[1].views[0].tolist()) == seen[1, 0, 1]


@pytest.mark.parametrize("seed", [-1, 2**32, 2**63])
def test_unusual_seeds(tmp_path: Path, seed: int) -> None:
    dataset = ImageDataset([str(write_grey(tmp_path / "0.png", 0))], [0], ("grey",), only_draws, seed=seed)
    usual = ImageDataset([str(tmp_path / "0.png")], [0], ("grey",), only_draws)
    assert torch.equal(dataset[0].views[0], dataset[0].views[0])
    assert not torch.equal(dataset[0].views[0], usual[0].views[0])


def test_reading_leaves_the_global_generators_alone(tmp_path: Path) -> None:
    random.seed(1)
    expected = draws(), draws()
    dataset = build_dataset(classes_of_grey(tmp_path, 3), "train", only_draws)
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(1)
    before = draws()
    assert dataset[0].failures
    assert (before, draws()) == expected


def test_isolated_rng() -> None:
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    expected = draws()
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    inside = []
    for entropy in ((0, 1, 2), (0, 1, 2), (0, 2, 1), (5,)):
        with isolated_rng(*entropy):
            inside.append(draws())
    with contextlib.suppress(KeyError), isolated_rng(7):
        raise KeyError(draws())
    assert draws() == expected
    assert inside[0] == inside[1]
    for numbers in zip(*inside[1:]):  # Python's, numpy's and torch's
        assert len(set(numbers)) == 3


# --------------------------------------------------------------------------- channels and bit depths


def test_colour_and_grey_files(tmp_path: Path) -> None:
    pixels = np.zeros((4, 6, 3), dtype=np.uint8)
    pixels[:, :] = (200, 100, 50)
    Image.fromarray(pixels).save(tmp_path / "colour.png")
    grey = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)  # ITU-R 601
    colour = read_image(str(tmp_path / "colour.png"), 3)
    assert isinstance(colour, Image.Image)
    assert colour.getpixel((5, 3)) == (200, 100, 50)
    assert levels(tmp_path / "colour.png", 1) == [grey]
    assert levels(write_grey(tmp_path / "grey.png", 77), 3) == [77]
    assert levels(tmp_path / "grey.png", 1) == [77]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "CMYK", "1"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_any_mode_becomes_grey_or_colour(tmp_path: Path, mode: str, in_chans: int) -> None:
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    Image.new("RGB", (6, 4), (255, 255, 255)).convert(mode).save(path)
    assert levels(path, in_chans) == [255]


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bit_grey_is_scaled(tmp_path: Path, suffix: str, in_chans: int) -> None:
    pixels = np.repeat(np.array([[0, 256, 16384, 32640, 32768, 65535]], dtype=np.uint16), 3, axis=0)
    path = tmp_path / f"deep.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5 6 3 65535\n" + pixels.astype(">u2").tobytes())
    else:
        Image.fromarray(pixels).save(path)
    assert levels(path, in_chans) == [0, 1, 64, 127, 128, 255]


@pytest.mark.parametrize("suffix", ["tif", "npy"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_floating_grey_from_zero_to_one(tmp_path: Path, suffix: str, in_chans: int) -> None:
    pixels = np.repeat(np.array([[0.0, 0.25, 0.5, 1.0]], dtype=np.float32), 3, axis=0)
    path = tmp_path / f"grey.{suffix}"
    if suffix == "tif":
        tifffile.imwrite(path, pixels)
    else:
        np.save(path, np.repeat(pixels[:, :, None], in_chans, axis=2))
    assert levels(path, in_chans) == [0, 64, 128, 255]


@pytest.mark.parametrize(
    ("dtype", "value", "level"),
    [
        (np.uint8, 200, 200),
        (np.uint16, 32768, 128),
        (np.uint16, 65535, 255),
        (np.float64, 0.5, 128),
        (np.float32, 7.0, 255),
    ],
)
@pytest.mark.parametrize("in_chans", [1, 3])
def test_npy_as_grey_or_colour(tmp_path: Path, dtype: type, value: float, level: int, in_chans: int) -> None:
    np.save(tmp_path / "image.npy", np.full((4, 6, in_chans), value, dtype=dtype))
    assert levels(tmp_path / "image.npy", in_chans) == [level]


def test_npy_keeps_the_order_of_pixels_and_channels(tmp_path: Path) -> None:
    for name, array in (("rows.npy", NOISE), ("planes.npy", NOISE.transpose(2, 0, 1))):
        np.save(tmp_path / name, array)
        assert (np.asarray(read_image(str(tmp_path / name), 3)) == NOISE).all()


def many_channels(channels: int, dtype: type) -> np.ndarray:
    """(channels, 4, 6) with another value in each place, up to the largest of the type."""
    values = np.linspace(0, np.iinfo(dtype).max, channels * 4 * 6)
    return values.astype(dtype).reshape(channels, 4, 6)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("suffix", ["npy", "tif", "TIFF"])
@pytest.mark.parametrize("channels", [2, 5, 13])
def test_many_channels(tmp_path: Path, channels: int, suffix: str, last: bool, dtype: type) -> None:
    planes = many_channels(channels, dtype)
    stored = planes.transpose(1, 2, 0) if last else planes
    path = tmp_path / f"spectrum.{suffix}"
    if suffix == "npy":
        np.save(path, stored)
    else:
        tifffile.imwrite(path, stored, photometric="minisblack", planarconfig="contig" if last else None)
    image = read_image(str(path), channels)
    assert isinstance(image, Tensor)
    assert image.dtype == torch.float32
    expected = torch.from_numpy(planes.astype(np.float64) / np.iinfo(dtype).max)
    torch.testing.assert_close(image.double(), expected, rtol=0, atol=1e-6)


def test_floats_of_many_channels_are_taken_as_they_are(tmp_path: Path) -> None:
    array = np.random.default_rng(0).random((4, 6, 5)).astype(np.float32)
    np.save(tmp_path / "image.npy", array)
    image = read_image(str(tmp_path / "image.npy"), 5)
    assert isinstance(image, Tensor)
    assert torch.equal(image, torch.from_numpy(array).permute(2, 0, 1))


def test_four_channels_of_a_png(tmp_path: Path) -> None:
    Image.new("RGBA", (6, 4), (255, 102, 51, 0)).save(tmp_path / "image.png")
    image = read_image(str(tmp_path / "image.png"), 4)
    assert isinstance(image, Tensor)
    assert image.shape == (4, 4, 6)
    torch.testing.assert_close(image[:, 0, 0], torch.tensor([1.0, 0.4, 0.2, 0.0]))


@pytest.mark.parametrize("suffix", ["png", "npy", "tif"])
def test_wrong_number_of_channels(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    if suffix == "npy":
        np.save(path, NOISE)
    else:
        Image.fromarray(NOISE).save(path)
    with pytest.raises(ValueError, match=r"\(24, 32, 3\), 5 channels are wanted"):
        read_image(str(path), 5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pixels_that_are_not_finite_make_a_file_unreadable(tmp_path: Path, value: float) -> None:
    pixels = np.zeros((4, 4, 5), dtype=np.float32)
    pixels[1, 2, 3] = value
    np.save(tmp_path / "image.npy", pixels)
    with pytest.raises(ValueError, match="not finite"):
        read_image(str(tmp_path / "image.npy"), in_chans=5)
