"""Images with masks: layouts, coding of class numbers, crops, and what is refused."""

from __future__ import annotations

import random
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.mask_files import write_masks, write_pair
from PIL import Image

from data.datasets import FatalFailure
from data.layouts.masks import find_pairs
from data.segmentation import (
    VOID,
    CropPair,
    MaskCoding,
    SegmentationDataset,
    WholeImage,
    crop_size,
    inspect_pairs,
    read_mask,
    resized,
)
from utils import UsageError

MEAN, STD = [0.0] * 3, [1.0] * 3


def move(pairs: Path, folders: dict[str, str], root: Path) -> Path:
    """Move the folders of the first layout to other places."""
    for old, new in folders.items():
        (root / new).parent.mkdir(parents=True, exist_ok=True)
        (pairs / old).rename(root / new)
    return root


KINDS = {
    "by split": {f"{s}/{k}": f"{s}/{k}" for s in ("train", "val") for k in ("images", "masks")},
    "by kind": {f"{s}/{k}": f"{k}/{s}" for s in ("train", "val") for k in ("images", "masks")},
    "ADE20K": {
        f"{split}/{kind}": f"{folder}/{name}"
        for split, name in (("train", "training"), ("val", "validation"))
        for kind, folder in (("images", "images"), ("masks", "annotations"))
    },
}


@pytest.mark.parametrize("folders", KINDS.values(), ids=KINDS)
def test_layouts_of_folders(tmp_path: Path, folders: dict[str, str]) -> None:
    root = move(write_masks(tmp_path / "a"), folders, tmp_path / "b")
    for split, count in (("train", 5), ("val", 3)):
        pairs = find_pairs(root, split)
        assert [Path(pair.image).name for pair in pairs] == [f"{number:03}.png" for number in range(count)]
        assert all(Path(p.image).name == Path(p.mask).name and p.image != p.mask for p in pairs)
        assert str(root / folders[f"{split}/masks"]) in pairs[0].mask


def test_names_below_folders(tmp_path: Path) -> None:
    """The same file name in two folders, and other extensions of images."""
    for city in ("x", "y"):
        write_pair(tmp_path / "train", f"{city}/1", (8, 8), seed=0)
    (tmp_path / "train/images/x/1.png").rename(tmp_path / "train/images/x/1.bmp")
    assert [pair.mask[-7:] for pair in find_pairs(tmp_path, "train")] == ["x/1.png", "y/1.png"]


def voc(root: Path) -> Path:
    write_masks(root / "raw")
    (root / "JPEGImages").mkdir()
    for path in (root / "raw/train/images").iterdir():
        with Image.open(path) as image:
            image.save(root / "JPEGImages" / f"{path.stem}.jpg")
    (root / "raw/train/masks").rename(root / "SegmentationClass")
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "ImageSets/Segmentation/train.txt").write_text("003\n000\n")
    return root


def test_pascal_voc(tmp_path: Path) -> None:
    pairs = find_pairs(voc(tmp_path), "train")
    assert [Path(pair.image).name for pair in pairs] == ["003.jpg", "000.jpg"]
    assert [Path(pair.mask).name for pair in pairs] == ["003.png", "000.png"]


def edit_voc(text: str) -> Callable[[Path], object]:
    return lambda root: (voc(root) / "ImageSets/Segmentation/train.txt").write_text(text)


def edit(action: Callable[[Path, Path], object]) -> Callable[[Path], object]:
    """Do something to the folders of images and of masks."""

    def edited(root: Path) -> None:
        folder = write_masks(root) / "train"
        action(folder / "images", folder / "masks")

    return edited


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder)
    folder.mkdir()
    return folder


MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda root: None, "no images with masks for train"),
    "no masks": (edit(lambda i, m: m.rename(m.with_name("labels"))), "no images with masks for train"),
    "no images": (edit(lambda i, m: emptied(i)), "train/images has no images"),
    "image without mask": (edit(lambda i, m: (m / "002.png").unlink()), r"images/002\.png; add .*masks/002\.png"),
    "mask without image": (edit(lambda i, m: (i / "002.png").unlink()), r"first .*masks/002\.png"),
    "mask that is no PNG": (edit(lambda i, m: (m / "002.png").rename(m / "002.jpg")), r"masks/002\.jpg is no PNG"),
    "same name": (edit(lambda i, m: (i / "002.bmp").touch()), r"both 002\.bmp and 002\.png"),
    "VOC without list": (lambda root: (voc(root) / "ImageSets/Segmentation/train.txt").unlink(), r"train\.txt"),
    "VOC, empty list": (edit_voc("\n"), r"train\.txt is empty"),
    "VOC, no such image": (edit_voc("000\n77\n"), r"line 2: .*77\.jpg does not exist"),
    "VOC, outside": (edit_voc("../000\n"), r"line 1: '\.\./000'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_of_layout(tmp_path: Path, mistake: str) -> None:
    make, words = MISTAKES[mistake]
    make(tmp_path)
    with pytest.raises(UsageError, match=words):
        find_pairs(tmp_path, "train")


# --------------------------------------------------------------------------- values


def test_coding() -> None:
    values = np.array([[0, 1, 2, 255]], dtype=np.uint8)
    assert MaskCoding(3).decode(values, "").tolist() == [[0, 1, 2, VOID]]
    assert MaskCoding(2, reduce_zero_label=True).decode(values, "").tolist() == [[VOID, 0, 1, VOID]]
    assert MaskCoding(2, ignore_index=2).decode(values[:, :3], "").tolist() == [[0, 1, VOID]]
    assert MaskCoding(255).decode(np.array([[254, 255]], dtype=np.uint8), "").tolist() == [[254, VOID]]
    for coding, named in ((MaskCoding(2), "value 2"), (MaskCoding(3, ignore_index=2), "value 255")):
        with pytest.raises(UsageError, match=rf"mask\.png has the {named}, .*--ignore_index {coding.ignore_index}"):
            coding.decode(values, "mask.png")


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_values_of_gray_and_palette_files(tmp_path: Path, bits: int) -> None:
    """Gray of fewer bits, which Pillow would scale, and a palette of arbitrary colors."""
    values = np.arange(min(2**bits, 16), dtype=np.uint8)[None]
    palette = Image.fromarray(values)
    palette.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    palette.save(tmp_path / "palette.png", bits=bits)
    assert np.array_equal(read_mask(str(tmp_path / "palette.png")), values)
    (tmp_path / "gray.png").write_bytes(gray_png(values, bits))
    assert np.array_equal(read_mask(str(tmp_path / "gray.png")), values)


def gray_png(values: np.ndarray, bits: int) -> bytes:
    """A gray PNG of so many bits, which Pillow does not write."""
    rows = (np.unpackbits(values[:, :, None], axis=2)[:, :, 8 - bits :]).reshape(len(values), -1)
    raw = b"".join(b"\0" + np.packbits(row).tobytes() for row in rows)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (np.zeros((30, 44, 3), np.uint8), "color image"),
        (np.zeros((30, 44), np.uint16), "more than 8 bits"),
        (np.zeros((31, 44), np.uint8), r"44 x 31 pixels, .*44 x 30"),
        (None, "cannot be read"),
    ],
    ids=["RGB", "16 bits", "size", "damaged"],
)
def test_masks_that_cannot_be_used(tmp_path: Path, content: np.ndarray | None, words: str) -> None:
    """Named by the inspection before training, and by the dataset should they change later."""
    path = write_masks(tmp_path) / "train/masks/000.png"
    if content is None:
        path.write_bytes(path.read_bytes()[:60])
    else:
        Image.fromarray(content).save(path)
    pairs = find_pairs(tmp_path, "train")
    with pytest.raises(UsageError, match=rf"000\.png.*{words}"):
        inspect_pairs(pairs, 2, "masks")
    sample = SegmentationDataset(pairs, MaskCoding(3), "abc", WholeImage(None, MEAN, STD))[0]
    assert sample.views == []
    (failure,) = sample.failures
    assert isinstance(failure, FatalFailure)
    assert "000.png" in failure


def test_turned_photos_have_the_size_of_their_mask(tmp_path: Path) -> None:
    """A camera's orientation swaps height and width when the image is decoded."""
    write_pair(tmp_path / "train", "1", (8, 12), seed=0)
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (8, 12)).save(tmp_path / "train/images/1.png", exif=exif)
    pairs = find_pairs(tmp_path, "train")
    assert inspect_pairs(pairs, 1, "masks")[0].size == (8, 12)
    image, mask = SegmentationDataset(pairs, MaskCoding(3), "abc", WholeImage(None, MEAN, STD)).load(0)
    assert (image.height, image.width) == mask.shape == (8, 12)  # type: ignore[union-attr]


def test_inspection(tmp_path: Path) -> None:
    pairs = find_pairs(write_masks(tmp_path), "train")
    facts = inspect_pairs(pairs, 3, "masks")
    for pair, fact in zip(pairs, facts):
        values = np.asarray(Image.open(pair.mask))
        assert (fact.size, fact.values) == (values.shape, tuple(np.unique(values).tolist()))
    assert len({fact.digest for fact in facts}) == len(facts)


# --------------------------------------------------------------------------- crops


def coordinates(height: int, width: int) -> tuple[torch.Tensor, np.ndarray]:
    """A picture whose second channel is 1 exactly where the mask is 1."""
    mask = (np.add.outer(np.arange(height) // 7, np.arange(width) // 5) % 2).astype(np.uint8)
    return torch.from_numpy(mask).float().expand(4, -1, -1).clone(), mask


@pytest.mark.parametrize("crop", [(16, 24), (64, 24), (90, 90)], ids=str)
def test_random_crops_keep_pixels_and_classes_together(crop: tuple[int, int]) -> None:
    image, mask = coordinates(40, 60)
    view = CropPair(crop, None, [0.5] * 4, [1.0] * 4, augment=True)
    void, flips, sizes = 0, 0, set()
    for seed in range(30):
        random.seed(seed)
        pixels, labels = view(image, mask)
        assert (tuple(pixels.shape), tuple(labels.shape)) == ((4, *crop), crop)
        known = labels != VOID
        assert (pixels[:, ~known] == 0).all()  # the mean color
        agree = ((pixels[0][known] > 0) == (labels[known] == 1)).float().mean()
        assert agree > 0.8  # but at borders, which are blurred
        void += int((~known).any())
        flips += int((~known)[:, 0].all())
        sizes.add(int(known.sum()))
    if crop == (90, 90):
        assert void >= 25
        assert 5 < flips < 25
        assert len(sizes) > 20
    if crop == (16, 24):
        assert sizes == {16 * 24}


def test_crops_without_augmentation_are_central() -> None:
    image, mask = coordinates(40, 60)
    pixels, labels = CropPair((20, 64), None, [0.0] * 4, [1.0] * 4, augment=False)(image, mask)
    assert torch.equal(pixels[:, :, :60], image[:, 10:30])
    assert torch.equal(labels[:, :60], torch.from_numpy(mask[10:30]))
    assert (labels[:, 60:] == VOID).all()


def test_whole_images_are_resized_but_not_their_masks() -> None:
    image, mask = coordinates(40, 60)
    pixels, labels = WholeImage(20, [0.0] * 4, [1.0] * 4)(image, mask)
    assert pixels.shape == (4, 20, 30)
    assert torch.equal(labels, torch.from_numpy(mask))


def test_sizes() -> None:
    assert resized((240, 320), None) == (240, 320)
    assert resized((240, 321), 120, 2.0) == (240, 321)
    assert crop_size([(240, 320), (100, 330)], 512, 16) == (240, 336)
    assert crop_size([(240, 320), (100, 330)], 256, 16) == (240, 256)
