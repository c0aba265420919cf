"""Decoding of all channels, modes and bit depths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from helpers.image_files import NOISE, write_gray
from PIL import Image
from torch import Tensor

from data.decode import RASTER, UndeclaredRange, read_image


def levels(path: Path, in_chans: int) -> list[int]:
    """Return the distinct gray levels of a decoded image, equal in all channels."""
    image = read_image(str(path), in_chans)
    assert isinstance(image, Image.Image)
    assert image.mode == {1: "L", 3: "RGB"}[in_chans]
    pixels = np.asarray(image)
    if in_chans == 3:
        assert (pixels == pixels[:, :, :1]).all()
    return [int(level) for level in np.unique(pixels)]


def test_color_and_gray_files(tmp_path: Path) -> None:
    pixels = np.zeros((4, 6, 3), dtype=np.uint8)
    pixels[:, :] = (200, 100, 50)
    Image.fromarray(pixels).save(tmp_path / "color.png")
    gray = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)  # ITU-R 601
    color = read_image(str(tmp_path / "color.png"), 3)
    assert isinstance(color, Image.Image)
    assert color.getpixel((5, 3)) == (200, 100, 50)
    assert levels(tmp_path / "color.png", 1) == [gray]
    assert levels(write_gray(tmp_path / "gray.png", 77), 3) == [77]
    assert levels(tmp_path / "gray.png", 1) == [77]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "CMYK", "1"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_all_modes_are_converted(tmp_path: Path, mode: str, in_chans: int) -> None:
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    Image.new("RGB", (6, 4), (255, 255, 255)).convert(mode).save(path)
    assert levels(path, in_chans) == [255]


@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bit_gray_is_scaled(tmp_path: Path, suffix: str, in_chans: int) -> None:
    pixels = np.repeat(np.array([[0, 256, 16384, 32640, 32768, 65535]], dtype=np.uint16), 3, axis=0)
    path = tmp_path / f"deep.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5 6 3 65535\n" + pixels.astype(">u2").tobytes())
    else:
        Image.fromarray(pixels).save(path)
    assert levels(path, in_chans) == [0, 1, 64, 127, 128, 255]


@pytest.mark.parametrize("suffix", ["tif", "npy"])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_float_gray(tmp_path: Path, suffix: str, in_chans: int) -> None:
    pixels = np.repeat(np.array([[0.0, 0.25, 0.5, 1.0]], dtype=np.float32), 3, axis=0)
    path = tmp_path / f"gray.{suffix}"
    if suffix == "tif":
        tifffile.imwrite(path, pixels)
    else:
        np.save(path, np.repeat(pixels[:, :, None], in_chans, axis=2))
    assert levels(path, in_chans) == [0, 64, 128, 255]


@pytest.mark.parametrize(
    ("dtype", "value", "level"),
    [(np.uint8, 200, 200), (np.uint16, 32768, 128), (np.uint16, 65535, 255), (np.float64, 0.5, 128)],
)
@pytest.mark.parametrize("in_chans", [1, 3])
def test_npy_as_gray_or_color(tmp_path: Path, dtype: type, value: float, level: int, in_chans: int) -> None:
    np.save(tmp_path / "image.npy", np.full((4, 6, in_chans), value, dtype=dtype))
    assert levels(tmp_path / "image.npy", in_chans) == [level]


def test_npy_keeps_pixel_and_channel_order(tmp_path: Path) -> None:
    for name, array in (("rows.npy", NOISE), ("planes.npy", NOISE.transpose(2, 0, 1))):
        np.save(tmp_path / name, array)
        assert (np.asarray(read_image(str(tmp_path / name), 3)) == NOISE).all()


def many_channels(channels: int, dtype: type) -> np.ndarray:
    """Return an array (channels, 4, 6) with distinct values up to the largest of the type."""
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


def test_multichannel_floats_are_not_scaled(tmp_path: Path) -> None:
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
    with pytest.raises(ValueError, match=r"\(24, 32, 3\), 5 channels are needed"):
        read_image(str(path), 5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nonfinite_pixels_are_rejected(tmp_path: Path, value: float) -> None:
    pixels = np.zeros((4, 4, 5), dtype=np.float32)
    pixels[1, 2, 3] = value
    np.save(tmp_path / "image.npy", pixels)
    with pytest.raises(ValueError, match="not finite"):
        read_image(str(tmp_path / "image.npy"), in_chans=5)


# --------------------------------------------------------------------------- black and white


def store(folder: Path, suffix: str, pixels: np.ndarray) -> str:
    """Encode an array as a file of its type."""
    path = folder / f"image.{suffix}"
    if suffix == "npy":
        np.save(path, pixels)
    else:
        tifffile.imwrite(path, pixels, photometric="rgb" if pixels.shape[-1] == 3 else "minisblack")
    return str(path)


UNDECLARED = {
    "int8": (np.int8, -128, 127),
    "int16": (np.int16, 0, 255),
    "int32": (np.int32, 0, 255),
    "uint32": (np.uint32, 0, 4000),
    "int64": (np.int64, 0, 255),
    "float16": (np.float16, 0, 255),
    "float32": (np.float32, 0, 255),
    "float64": (np.float64, -1, 1),
}


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("suffix", ["npy", "tif"])
@pytest.mark.parametrize("name", UNDECLARED)
def test_types_without_a_range_need_input_range(tmp_path: Path, name: str, suffix: str, channels: int) -> None:
    """Without it the error gives the range of the file; with it, values beyond it are clipped."""
    dtype, low, high = UNDECLARED[name]
    pixels = np.full((4, 6, channels), high, dtype=dtype)
    pixels[:2] = low
    path = store(tmp_path, suffix, pixels)
    with pytest.raises(UndeclaredRange, match=rf"image\.{suffix} .*{name} .*from {low} to {high}.*INPUT\.RANGE"):
        read_image(path, channels)
    halves = []
    for limits in ((low, high), (low, low + 2 * (high - low)), (low + (high - low) / 2, high)):
        image = read_image(path, channels, limits)
        values = np.asarray(image) / (1 if isinstance(image, Tensor) else 255)
        values = values.transpose(1, 2, 0) if isinstance(image, Tensor) else values
        assert values.shape[:2] == (4, 6)
        halves.append([float(values[:2].mean()), float(values[2:].mean())])
    assert halves == [[0, 1], [0, pytest.approx(0.5, abs=1 / 255)], [0, 1]]


@pytest.mark.parametrize("channels", [1, 5])
def test_input_range_applies_to_all_but_8_bit_files(tmp_path: Path, channels: int) -> None:
    """12-bit values, and floats in 0..1; 8-bit files are not rescaled."""
    for dtype, value, expected in (
        (np.uint16, 1024, 0.25),
        (np.float32, 0.5, 0.0),
        (np.uint8, 51, 0.2),
        (bool, 1, 1.0),
    ):
        path = store(tmp_path, "npy", np.full((4, 6, channels), value, dtype=dtype))
        pixels = np.asarray(read_image(path, channels, (0, 4096)), dtype=np.float64)
        assert pixels.mean() / (255 if channels == 1 else 1) == pytest.approx(expected, abs=1 / 255)


def test_floats_may_exceed_their_range_slightly(tmp_path: Path) -> None:
    path = store(tmp_path, "npy", np.array([[[-1e-7] * 5, [1 + 1e-6] * 5]], dtype=np.float32))
    image = read_image(path, 5)
    assert isinstance(image, Tensor)
    assert (image.min(), image.max()) == (0, 1)


@pytest.mark.parametrize("in_chans", [1, 3])
def test_arrays_are_converted_to_gray_or_color(tmp_path: Path, in_chans: int) -> None:
    stored = np.full((4, 6, 4 - in_chans), 77, dtype=np.uint8)
    assert levels(Path(store(tmp_path, "npy", stored)), in_chans) == [77]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.uint16])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_tiff_with_16_bit_colors(tmp_path: Path, dtype: type, in_chans: int) -> None:
    """Most of these have no Pillow mode."""
    white = 65535 if dtype is np.uint16 else 1
    pixels: np.ndarray = np.zeros((4, 6, 3), dtype=dtype)
    pixels[:, 3:] = white
    assert levels(Path(store(tmp_path, "tif", pixels)), in_chans) == [0, 255]
    assert levels(Path(store(tmp_path, "tif", pixels[:, :, 0])), in_chans) == [0, 255]


def test_bit_depth_and_photometric_of_a_tiff(tmp_path: Path) -> None:
    """LZW, which needs Pillow, and 0 as white."""
    Image.fromarray(np.full((4, 6), 32768, dtype=np.uint16)).save(tmp_path / "lzw.tif", compression="tiff_lzw")
    assert levels(tmp_path / "lzw.tif", 3) == [128]
    for dtype in (np.uint8, np.uint16):
        tifffile.imwrite(tmp_path / "inverted.tif", np.zeros((4, 6), dtype=dtype), photometric="miniswhite")
        assert levels(tmp_path / "inverted.tif", 3) == [255]


UPRIGHT = np.arange(24).reshape(4, 6)
STORED = {1: UPRIGHT, 2: np.fliplr(UPRIGHT), 3: np.rot90(UPRIGHT, 2), 4: np.flipud(UPRIGHT), 5: UPRIGHT.T,
          6: np.rot90(UPRIGHT), 7: np.rot90(UPRIGHT, 2).T, 8: np.rot90(UPRIGHT, 3)}  # fmt: skip


@pytest.mark.parametrize("kind", ["bytes", "deep", "lzw", "floats", "five", "five of Pillow"])
@pytest.mark.parametrize("orientation", STORED)
def test_orientation_of_a_tiff(tmp_path: Path, orientation: int, kind: str) -> None:
    path, tag = tmp_path / "image.tif", [(274, 3, 1, orientation, True)]
    pixels = np.ascontiguousarray(STORED[orientation] * 10)
    channels = 4 if kind == "five of Pillow" else 5 if kind == "five" else 3
    if kind == "lzw":
        exif = Image.Exif()
        exif[274] = orientation
        Image.fromarray((pixels * 257).astype(np.uint16)).save(path, compression="tiff_lzw", exif=exif)
    elif kind == "five of Pillow":
        exif = Image.Exif()
        exif[274] = orientation
        four = np.repeat(pixels[:, :, None], 4, axis=2).astype(np.uint8)
        Image.fromarray(four, "RGBA").save(path, compression="tiff_lzw", exif=exif)
    else:
        stored = {"bytes": pixels.astype(np.uint8), "deep": (pixels * 257).astype(np.uint16)}
        stored |= {"floats": (pixels / 255).astype(np.float64)}
        stored |= {"five": np.repeat(pixels[:, :, None], 5, axis=2).astype(np.uint8)}
        tifffile.imwrite(path, stored[kind], photometric="minisblack", extratags=tag, planarconfig=1)
    image = read_image(str(path), channels)
    found = (image[0].numpy() * 255).round() if isinstance(image, Tensor) else np.asarray(image)[:, :, 0]
    assert (found == UPRIGHT * 10).all()


def test_only_raster_formats_are_opened(tmp_path: Path) -> None:
    """Pillow would pass PostScript to an interpreter, whatever the file extension."""
    (tmp_path / "image.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    with pytest.raises(ValueError, match="not in a known image format"):
        read_image(str(tmp_path / "image.jpg"), 3)
    assert not {"EPS", "WMF", "HDF5", "GRIB", "BUFR", "FITS", "MPEG"} & set(RASTER)
