"""`python -m data.convert --max_side`: images are shrunk once, in their format; others are copied byte for byte."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.image_files import encoded
from PIL import Image

from benchmarks.augment import make_jpegs
from data import convert
from data.datasets import build_dataset
from data.decode import decode_image, open_image
from data.shrink import Shrinker, Unsupported, shrink

PHOTO = Image.open(io.BytesIO(make_jpegs(95, 1)[0]))  # 500 x 375
FORMATS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "jpg": ("JPEG", "RGB", {"quality": 98}), "gray": ("JPEG", "L", {}), "cmyk": ("JPEG", "CMYK", {}),
    "progressive": ("JPEG", "RGB", {"progressive": True}), "png": ("PNG", "RGB", {}), "alpha": ("PNG", "RGBA", {}),
    "palette": ("PNG", "P", {}), "bits": ("PNG", "1", {}), "webp": ("WEBP", "RGB", {"lossless": True}),
    "bmp": ("BMP", "RGB", {}), "ppm": ("PPM", "RGB", {}),
}  # fmt: skip


def content_of(name: str) -> bytes:
    kind, mode, options = FORMATS[name]
    return encoded(partial(PHOTO.convert(mode).save, format=kind, **options))


def pixels(content: bytes) -> np.ndarray:
    image = decode_image(content, 3)
    assert isinstance(image, Image.Image)
    return np.asarray(image).astype(float)


@pytest.mark.parametrize("name", FORMATS)
def test_each_format(name: str) -> None:
    """Size and format; the pixels are those of the whole image after the same filter, up to the compression."""
    content = content_of(name)
    small = shrink(content, 100)
    with open_image(io.BytesIO(small)) as image:
        assert (image.format, image.size) == (FORMATS[name][0], (100, 75))
    expected = Image.fromarray(pixels(content).astype(np.uint8)).resize((100, 75), Image.Resampling.BICUBIC)
    difference = np.abs(pixels(small) - np.asarray(expected).astype(float))
    assert difference.mean() < (
        0.6 if FORMATS[name][0] in ("PNG", "BMP", "PPM") else 6
    )  # lossy: colors at half the size
    assert shrink(content, 500) is content
    assert shrink(small, 100) is small


def test_orientation_profile_and_extreme_sizes() -> None:
    exif = Image.Exif()
    exif[274] = 6
    stored = PHOTO.transpose(Image.Transpose.ROTATE_90)
    small = shrink(encoded(lambda buffer: stored.save(buffer, "JPEG", exif=exif, icc_profile=b"profile")), 50)
    with Image.open(io.BytesIO(small)) as image:
        assert image.size == (50, 38)
        assert not image.getexif()
        assert image.info["icc_profile"] == b"profile"
    expected = np.asarray(PHOTO.resize((50, 38), Image.Resampling.BICUBIC)).astype(float)
    assert np.abs(pixels(small) - expected).mean() < 6
    line = shrink(encoded(lambda buffer: Image.new("RGB", (900, 2)).save(buffer, "PNG")), 30)
    assert Image.open(io.BytesIO(line)).size == (30, 1)


def test_transparent_parts_do_not_color_their_neighbors() -> None:
    image = Image.new("RGBA", (40, 40), (255, 0, 0, 255))
    image.paste((0, 255, 0, 0), (0, 0, 20, 40))
    small = pixels(shrink(encoded(lambda buffer: image.save(buffer, "PNG")), 10))
    assert (small[:, :, 1] == small[:, :, 2]).all()  # red and white only


@pytest.mark.parametrize("kind", ["npy", "TIFF", "GIF", "PNG"])
def test_what_is_not_shrunk(kind: str) -> None:
    """Arrays, TIFF, GIF and images of 16 bits."""
    deep = Image.fromarray(np.zeros((60, 80), dtype=np.uint16))
    image = deep if kind == "PNG" else deep.convert("L")
    content = encoded(lambda buffer: np.save(buffer, np.asarray(deep)) if kind == "npy" else image.save(buffer, kind))
    with pytest.raises(Unsupported):
        shrink(content, 50)
    assert Shrinker(50)(content) is content


@pytest.mark.parametrize("to", ["zip", "tsv", "shards", "files"])
def test_conversion(tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Large images are shrunk, small and damaged ones and arrays are not; names and labels stay."""
    small = encoded(lambda buffer: PHOTO.resize((64, 48)).save(buffer, "JPEG"))
    large = content_of("jpg")
    array = encoded(lambda buffer: np.save(buffer, np.zeros((60, 80, 3), dtype=np.uint8)))
    for label, contents in enumerate(({"a.jpg": small, "b.jpg": large}, {"c.jpg": large[:5000], "d.npy": array})):
        for name, content in contents.items():
            path = tmp_path / "photos" / f"class{label}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    words = [str(tmp_path / "photos"), str(tmp_path / "out"), "--to", to, "--max_side", "100"]
    convert.main(convert.get_args_parser().parse_args(words))
    dataset = build_dataset(tmp_path / "out", "train", lambda image: [], need_labels=True, layout=to)
    found = {dataset.source.read(i): int(dataset.labels[i]) for i in range(4)}
    assert found == {small: 0, shrink(large, 100): 0, large[:5000]: 1, array: 1}
    text = capsys.readouterr().err
    assert "1 image shrunk to 100 pixels" in text
    assert "1 image copied unchanged: damaged" in text
    assert "1 image copied unchanged: arrays" in text


@pytest.mark.parametrize("value", ["0", "-5", "big", "1.5"])
def test_invalid_sides(tmp_path: Path, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        convert.get_args_parser().parse_args([str(tmp_path), str(tmp_path / "out"), "--to", "zip", "--max_side", value])
    assert caught.value.code == 2
    assert "--max_side" in capsys.readouterr().err
