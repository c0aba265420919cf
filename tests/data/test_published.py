"""WebVision-v1 and OpenImages-v4 in their published layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.image_files import encoded, whole, write_gray, write_tsv
from PIL import Image

from data.datasets import ImageDataset, Sample, build_dataset
from data.loader import build_eval_loader, collate
from utils import UsageError


def gray(value: int) -> bytes:
    return encoded(lambda buffer: Image.new("L", (4, 3), value).save(buffer, "PNG"))


def levels(dataset: ImageDataset) -> list[int]:
    return [round(float(dataset[i].views[0].mean() * 255)) for i in range(len(dataset))]


# --------------------------------------------------------------------------- WebVision


@pytest.fixture
def webvision(tmp_path: Path) -> Path:
    for number, name in enumerate(["google/q1/a.png", "google/q2/b c.png", "flickr/q1/d.png"]):
        write_gray(tmp_path / name, 10 * number + 10)
    (tmp_path / "info").mkdir()
    (tmp_path / "info" / "train_filelist_google.txt").write_text("google/q2/b c.png 11\ngoogle/q1/a.png 4\n")
    (tmp_path / "info" / "train_filelist_flickr.txt").write_text("flickr/q1/d.png 4\n\n")
    return tmp_path


def test_webvision(webvision: Path) -> None:
    dataset = build_dataset(webvision, "train", whole, layout="webvision1")
    assert levels(dataset) == [20, 10, 30]
    assert dataset.classes == ("4", "11")
    assert dataset.labels.tolist() == [1, 0, 0]
    assert dataset.source.name(0) == f"{webvision}/google/q2/b c.png"
    (webvision / "info" / "train_filelist_google.txt").unlink()
    assert levels(build_dataset(webvision, "train", whole, layout="webvision1")) == [30]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("google/q1/a.png", "line 1 has no label: 'google/q1/a.png'"),
        ("google/q1/a.png cat", "line 1: label 'cat'"),
        ("google/q1/a.png -1", "line 1: label '-1'"),
        ("../../etc/passwd 0", "line 1: '../../etc/passwd'"),
        ("/etc/passwd 0", "line 1: '/etc/passwd'"),
    ],
)
def test_invalid_line_of_webvision(webvision: Path, line: str, words: str) -> None:
    (webvision / "info" / "train_filelist_google.txt").write_text(line + "\n")
    with pytest.raises(UsageError) as caught:
        build_dataset(webvision, "train", whole, layout="webvision1")
    assert words in str(caught.value)


def test_missing_image_of_webvision(webvision: Path) -> None:
    (webvision / "google" / "q1" / "a.png").unlink()
    sample = build_dataset(webvision, "train", whole, layout="webvision1")[1]
    assert sample.failures[0].startswith(f"{webvision}/google/q1/a.png: ")
    assert sample.views


# --------------------------------------------------------------------------- OpenImages


@pytest.fixture
def openimages(tmp_path: Path) -> Path:
    """Write four images and an index of three of them, one of them twice."""
    tsv = write_tsv(tmp_path / "train.tsv", [(f"k{i}", "", gray(10 * i + 10)) for i in range(4)])
    begins = [0]
    for line in tsv.read_bytes().splitlines(keepends=True):
        begins.append(begins[-1] + len(line))
    (tmp_path / "train.balance_min1000.lineidx").write_text("".join(f"{begins[i]}\n" for i in (2, 0, 2, 3)))
    labels = {"k0": ["/m/a"], "k2": ["/m/c", "/m/a"], "k3": [], "k9": ["/m/b"]}
    rows = [f"{key}\t{json.dumps([{'class': name, 'conf': 1} for name in names])}\n" for key, names in labels.items()]
    (tmp_path / "train.label.verify_20191102.tsv").write_text("".join(rows))
    (tmp_path / "train.label.verify_20191102.6962.tag.labelmap").write_text("/m/a\n/m/b\n/m/c\n")
    return tmp_path


def build(root: Path, need_labels: bool = True) -> ImageDataset:
    return build_dataset(root, "train", whole, need_labels=need_labels, layout="openimages_v4")


def test_openimages(openimages: Path) -> None:
    dataset = build(openimages)
    assert levels(dataset) == [30, 10, 30, 40]
    assert dataset.classes == ("/m/a", "/m/b", "/m/c")
    batches = list(build_eval_loader(dataset, 3, 0, pin_memory=False))
    assert [batch.labels_B.tolist() for batch in batches] == [[[1, 0, 1], [1, 0, 0], [1, 0, 1]], [[0, 0, 0]]]
    unlabeled = build(openimages, need_labels=False)
    assert levels(unlabeled) == [30, 10, 30, 40]
    assert [unlabeled[i].label for i in range(4)] == [-1] * 4
    assert unlabeled.source.name(1) == f"{openimages}/train.tsv at byte 0"


def test_unreadable_image_with_multi_labels(openimages: Path) -> None:
    batch = collate([build(openimages)[0], Sample([], -1, 1, ("x: gone",))])
    assert batch.views == []
    assert torch.equal(batch.labels_B, torch.tensor([[1, 0, 1], [0, 0, 0]], dtype=torch.uint8))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("train.balance_min1000.lineidx", "1\n", "does not match"),
        ("train.balance_min1000.lineidx", "", "is empty"),
        ("train.balance_min1000.lineidx", "x\n", "must have one integer a line"),
        ("train.label.verify_20191102.tsv", "k0\n", "line 1 has no labels"),
        ("train.label.verify_20191102.tsv", 'k0\t["/m/z"]\n', "line 1: label '/m/z' is not one of the 3 classes"),
        ("train.label.verify_20191102.tsv", "k0\t[]\n", "has key 'k2'"),
    ],
)
def test_inconsistent_files_of_openimages(openimages: Path, name: str, content: str, words: str) -> None:
    (openimages / name).write_text(content)
    with pytest.raises(UsageError) as caught:
        build(openimages)
    assert words in str(caught.value)
    (openimages / name).unlink()
    with pytest.raises(UsageError, match=f"lacks {name}"):
        build(openimages)


@pytest.mark.parametrize("layout", ["webvision1", "openimages_v4"])
def test_only_training_images(tmp_path: Path, layout: str) -> None:
    with pytest.raises(UsageError, match=f"--dataset {layout} has no split 'val'"):
        build_dataset(tmp_path, "val", whole, layout=layout)
