"""Decoding: channels, modes and bit depths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from image_files import NOISE, write_grey
from PIL import Image
from torch import Tensor

from data.decode import read_image


def levels(path: Path, in_chans: int) -> list[int]:
    """The distinct grey levels of a decoded image, which must be the same in each channel."""
    image = read_image(str(path), in_chans)
    assert isinstance(image, Image.Image)
    assert image.mode == {1: "L", 3: "RGB"}[in_chans]
    pixels = np.asarray(image)
    if in_chans == 3:
        assert (pixels == pixels[:, :, :1]).all()
    return [int(level) for level in np.unique(pixels)]


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
