"""Image lists: selected images and invalid lists."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from helpers.runs import write_images, zip_folders

import data
from data.layouts.image_list import list_digest, select_listed
from utils import UsageError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Write three classes of four images; in `own` all file names differ, as in ImageNet."""
    write_images(tmp_path / "same/train", 4, classes=3)
    for path in (tmp_path / "same/train").glob("*/*.png"):
        target = tmp_path / "own/train" / path.parent.name / f"{path.parent.name}_{path.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return tmp_path


def dataset(root: Path, layout: str = "files") -> data.ImageDataset:
    return data.build_dataset(root, "train", lambda image: [], need_labels=True, layout=layout)


@pytest.mark.parametrize("layout", ["files", "zip"])
def test_selected_images_keep_labels_and_content(images: Path, layout: str) -> None:
    """A last line without a line end counts, duplicates count once, and classes keep their numbers."""
    root = images / "own"
    if layout == "zip":
        root = zip_folders(root, images / "zip", parts=["train"])
    file = images / "list.txt"
    file.write_text("class2_003.png\n\nclass0_001.png\nclass0_001.png\nclass2_000.png")
    whole, kept = dataset(root, layout), dataset(root, layout)
    select_listed(kept, file)
    names = [kept.source.name(i).rsplit("/", 1)[1] for i in range(len(kept))]
    assert names == ["class0_001.png", "class2_000.png", "class2_003.png"]
    assert kept.labels.tolist() == [0, 2, 2]
    assert kept.classes == whole.classes
    positions = [1, 8, 11]
    assert [kept.source.read(i) for i in range(3)] == [whole.source.read(i) for i in positions]
    assert np.array_equal(whole.labels[positions], kept.labels)


def test_ambiguous_names_with_folders(images: Path) -> None:
    file, kept = images / "list.txt", dataset(images / "same")
    file.write_text("class1/002.png\nclass0/002.png\n")
    select_listed(kept, file)
    assert [kept.source.name(i).rsplit("/", 2)[1] for i in range(len(kept))] == ["class0", "class1"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("000.png\n", "1 name that several images have, first 000.png"),
        ("class0/000.png\nclass0/009.png\nx.png", "2 names that no image has, first class0/009.png"),
        ("\n \n", "is empty"),
        ("\0\xff", "is not text"),
        (None, r"cannot be read \(No such file or directory\)"),
    ],
    ids=["ambiguous", "unknown", "empty", "binary", "missing"],
)
def test_invalid_lists(images: Path, text: str | None, words: str) -> None:
    file = images / "list.txt"
    if text is not None:
        file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=words):
        select_listed(dataset(images / "same"), file)


def test_pipe_as_list(images: Path) -> None:
    os.mkfifo(images / "pipe.txt")
    with pytest.raises(UsageError, match=r"pipe\.txt is a folder, pipe"):
        select_listed(dataset(images / "same"), images / "pipe.txt")


def test_list_with_a_byte_order_mark(images: Path) -> None:
    kept = dataset(images / "same")
    for name, mark in (("plain.txt", b""), ("marked.txt", b"\xef\xbb\xbf")):
        (images / name).write_bytes(mark + b"class0/000.png\r\n")
    select_listed(kept, images / "marked.txt")
    assert len(kept) == 1
    assert list_digest(images / "plain.txt") == list_digest(images / "marked.txt")


def test_digest(images: Path) -> None:
    for name, text in {"a": "x\ny\n", "b": "y\nx", "c": "x\nz"}.items():
        (images / name).write_text(text)
    assert list_digest(images / "a") == list_digest(images / "b") != list_digest(images / "c")
