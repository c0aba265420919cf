"""Datasets: samples, replacements of damaged images, and randomness."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from helpers.image_files import NOISE, encoded, whole, write_gray
from PIL import Image
from torch import Tensor

from data.datasets import REPLACEMENT_TRIES, ImageDataset, build_dataset
from data.decode import ImageLike
from data.layouts.sources import UNLABELED, Files
from utils import isolated_rng


def draws() -> tuple[float, float, float]:
    """Return the next random numbers of Python, numpy and torch."""
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def only_draws(image: ImageLike) -> list[Tensor]:
    """Return one view that depends only on the three generators."""
    return [torch.tensor(draws())]


# --------------------------------------------------------------------------- damaged files

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
def test_damaged_file_is_replaced_and_reported(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(DAMAGED[name])
    write_gray(tmp_path / "zz.png", 50)
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


def test_damaged_multichannel_tiff_is_replaced(tmp_path: Path) -> None:
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


def test_deleted_file_is_replaced(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        write_gray(tmp_path / name, 9)
    dataset = build_dataset(tmp_path, "train", whole)
    (tmp_path / "a.png").unlink()
    sample = dataset[0]
    assert sample.views[0].mean() == pytest.approx(9 / 255)
    assert sample.failures[0].startswith(f"{tmp_path / 'a.png'}: ")


def test_sample_without_a_readable_image_has_no_views(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    sample = build_dataset(tmp_path, "train", whole)[1]
    assert (sample.views, sample.label, sample.image_index) == ([], UNLABELED, 1)
    assert len(sample.failures) == REPLACEMENT_TRIES
    assert set(sample.failures) <= {f"{tmp_path / name}: the file is empty" for name in ("a.png", "b.png")}
    assert sample.failures[0].startswith(str(tmp_path / "b.png"))


def test_error_in_the_transform_is_raised(tmp_path: Path) -> None:
    def broken(image: ImageLike) -> list[Tensor]:
        raise ValueError("a mistake in the transform")

    write_gray(tmp_path / "a.png", 0)
    with pytest.raises(ValueError, match="a mistake in the transform"):
        build_dataset(tmp_path, "train", broken)[0]


# --------------------------------------------------------------------------- randomness


def classes_of_gray(root: Path, count: int) -> Path:
    """Write class folders 0 .. count - 1 with a gray image of that value; image 0 is damaged."""
    for i in range(count):
        write_gray(root / f"{i}" / "image.png", i)
    (root / "0" / "image.png").write_bytes(b"")
    return root


def test_replacement_is_a_function_of_seed_and_epoch(tmp_path: Path) -> None:
    root = classes_of_gray(tmp_path, 10)
    chosen: dict[tuple[int, int], int] = {}
    for seed in range(4):
        for epoch in range(4):
            labels: set[int] = set()
            for _ in range(2):
                dataset = build_dataset(root, "train", whole, seed=seed)
                dataset.epoch = epoch
                random.seed(len(chosen))
                sample = dataset[0]
                labels.add(int(sample.label))
                assert sample.views[0].mean() == pytest.approx(sample.label / 255)
                assert len(sample.failures) >= 1
            assert len(labels) == 1
            chosen[seed, epoch] = labels.pop()
    assert 0 not in chosen.values()
    assert all(len({chosen[seed, epoch] for epoch in range(4)}) > 1 for seed in range(4))
    assert all(len({chosen[seed, epoch] for seed in range(4)}) > 1 for epoch in range(4))


def test_sample_is_a_function_of_seed_epoch_and_index(tmp_path: Path) -> None:
    paths = [str(write_gray(tmp_path / f"{i}.png", 0)) for i in range(3)]
    seen: dict[tuple[int, int, int], tuple[float, ...]] = {}
    for seed in (0, 1):
        for epoch in (0, 1):
            dataset = ImageDataset(Files(paths), [0, 0, 0], ("gray",), only_draws, seed=seed)
            dataset.epoch = epoch
            for index in (2, 0, 1):
                seen[seed, epoch, index] = tuple(dataset[index].views[0].tolist())
    assert len(set(seen.values())) == len(seen) == 12
    draws()
    dataset.epoch = 0
    assert tuple(dataset[1].views[0].tolist()) == seen[1, 0, 1]


@pytest.mark.parametrize("seed", [-1, 2**32, 2**63])
def test_unusual_seeds(tmp_path: Path, seed: int) -> None:
    dataset = ImageDataset(Files([str(write_gray(tmp_path / "0.png", 0))]), [0], ("gray",), only_draws, seed=seed)
    usual = ImageDataset(Files([str(tmp_path / "0.png")]), [0], ("gray",), only_draws)
    assert torch.equal(dataset[0].views[0], dataset[0].views[0])
    assert not torch.equal(dataset[0].views[0], usual[0].views[0])


def test_reading_does_not_change_global_generators(tmp_path: Path) -> None:
    random.seed(1)
    expected = draws(), draws()
    dataset = build_dataset(classes_of_gray(tmp_path, 3), "train", only_draws)
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
