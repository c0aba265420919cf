"""Images in tsv files: the same samples as from folders, indices, and all kinds of labels."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.image_files import encoded, whole, write_tsv
from helpers.runs import TINY_RUN, TINY_SWIN, write_images
from PIL import Image

import main_esvit
from checkpoints import serialization
from data.datasets import ImageDataset, build_dataset
from data.layouts import index_cache
from data.layouts import tsv as tsv_layout
from data.layouts.tsv import index_lines, load_line_offsets
from data.loader import build_eval_loader
from utils import UsageError

CLASSES = 3
PER_CLASS = 4
IMAGES = CLASSES * PER_CLASS


def gray(value: int) -> bytes:
    return encoded(lambda buffer: Image.new("L", (4, 3), value).save(buffer, "PNG"))


def build(root: Path, need_labels: bool = True, split: str = "train") -> ImageDataset:
    return build_dataset(root, split, whole, need_labels=need_labels, layout="tsv")


def error_of(root: Path) -> str:
    with pytest.raises(UsageError) as caught:
        build(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    write_images(tmp_path / "folders" / "train", PER_CLASS, size=16, classes=CLASSES)
    return tmp_path / "folders"


def rows_of(folder: Path) -> Iterator[tuple[str, str, bytes]]:
    for label, part in enumerate(sorted(folder.iterdir())):
        for path in sorted(part.iterdir()):
            yield f"{part.name}_{path.stem}", str(label), path.read_bytes()


@pytest.fixture
def tsv(folders: Path, tmp_path: Path) -> Path:
    return write_tsv(tmp_path / "tsv" / "train.tsv", rows_of(folders / "train"))


def lines_of(tsv: Path) -> list[bytes]:
    return tsv.read_bytes().splitlines(keepends=True)


# --------------------------------------------------------------------------- what is read


def test_tsv_equals_folder(folders: Path, tsv: Path) -> None:
    plain = build_dataset(folders, "train", whole)
    for root in (tsv, tsv.parent):
        dataset = build(root)
        assert len(dataset) == IMAGES
        assert dataset.labels.tolist() == plain.labels.tolist()
        assert dataset.classes == ("0", "1", "2")
        for i in range(IMAGES):
            assert dataset.source.read(i) == plain.source.read(i)
            assert torch.equal(dataset[i].views[0], plain[i].views[0])
            assert dataset[i][1:] == plain[i][1:]
        assert dataset.source.name(5) == f"{tsv} line 6"
    assert build(tsv, need_labels=False).labels.tolist() == [-1] * IMAGES


def test_workers_read_the_same(tsv: Path) -> None:
    dataset = build(tsv)
    expected = torch.stack([dataset[i].views[0] for i in range(IMAGES)])
    loader = build_eval_loader(dataset, 5, 2, pin_memory=False)
    loader.multiprocessing_context = "fork"
    assert torch.equal(torch.cat([batch.views[0] for batch in loader]), expected)


@pytest.mark.parametrize("block", [7, 100, 2**24])
@pytest.mark.parametrize("ending", [b"\n", b"\r\n", b""], ids=["newline", "windows", "none"])
def test_index_is_created_beside_the_file(
    tsv: Path, monkeypatch: pytest.MonkeyPatch, block: int, ending: bytes
) -> None:
    """For all block sizes and line ends."""
    monkeypatch.setattr(tsv_layout, "INDEX_BLOCK", block)
    inner = ending or b"\n"
    tsv.write_bytes(inner.join(line.strip() for line in lines_of(tsv)) + ending)
    begins = np.cumsum([0] + [len(line) for line in lines_of(tsv)])[:-1].tolist()
    first = [build(tsv).source.read(i) for i in range(IMAGES)]
    index = tsv.with_suffix(".lineidx")
    assert index.read_text() == "".join(f"{begin}\n" for begin in begins)
    assert sorted(os.listdir(tsv.parent)) == ["train.lineidx", "train.tsv"]
    made = index.stat().st_mtime_ns
    assert [build(tsv).source.read(i) for i in range(IMAGES)] == first
    assert index.stat().st_mtime_ns == made


def test_index_in_a_read_only_folder(tsv: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is written to the cache folder, or else kept in memory."""
    expected = index_lines(tsv).tolist()
    real = index_cache.create_once
    refused: list[Path] = []

    def refuse(path: Path, write: object) -> bool:
        refused.append(path)
        return False

    def beside_refused(path: Path, write: object) -> bool:
        return refuse(path, write) if path.parent == tsv.parent else real(path, write)  # type: ignore[arg-type]

    monkeypatch.setenv("ESVIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tsv_layout, "create_once", beside_refused)
    assert load_line_offsets(tsv).tolist() == expected
    (kept,) = (tmp_path / "cache").iterdir()
    assert [int(line) for line in kept.read_text().split()] == expected
    write_tsv(tsv, [("a", "0", gray(1))])  # another file of that name has an index of its own
    assert load_line_offsets(tsv).tolist() == [0]
    monkeypatch.setattr(tsv_layout, "create_once", refuse)
    assert load_line_offsets(tsv).tolist() == [0]
    assert os.listdir(tsv.parent) == ["train.tsv"]


def test_linelist(tsv: Path) -> None:
    everything = build(tsv)
    tsv.with_suffix(".linelist").write_text("9\n0\n9\n4\n")
    chosen = build(tsv)
    assert [chosen.source.read(i) for i in range(4)] == [everything.source.read(i) for i in (9, 0, 9, 4)]
    assert chosen.labels.tolist() == [2, 0, 2, 1]
    assert chosen.source.name(0) == f"{tsv} line 10"
    tsv.with_suffix(".linelist").write_text("9\n12\n")
    assert "names line 12" in error_of(tsv)
    assert "lines 0 to 11" in error_of(tsv)


def test_labels_of_a_large_file_are_cached(tsv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the file or its linelist changes."""
    monkeypatch.setenv("ESVIT_CACHE", str(tmp_path / "cache"))
    small = build(tsv)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(tsv_layout, "MIN_CACHED_LINES", 1)
    with pytest.MonkeyPatch.context() as forbid:
        for _ in range(2):
            large = build(tsv)
            assert (large.labels.tolist(), large.classes) == (small.labels.tolist(), small.classes)
            forbid.setattr(tsv_layout.TsvLines, "read_label", lambda *line: pytest.fail("read again"))
    tsv.with_suffix(".linelist").write_text("9\n0\n")
    assert build(tsv).labels.tolist() == [1, 0]
    tsv.with_suffix(".lineidx").unlink()
    write_tsv(tsv, [("a", "x", gray(1)), *[("b", "y", gray(2))] * 9])
    assert build(tsv).classes == ("x", "y")


@pytest.mark.parametrize("line", ["", "\n", "ké\t0\n", "-1\n"])
def test_invalid_linelist(tsv: Path, line: str) -> None:
    tsv.with_suffix(".linelist").write_text("3\n" + line)
    if line.strip():
        assert "train.linelist" in error_of(tsv)
    else:
        assert len(build(tsv)) == 1


@pytest.mark.parametrize(
    "change", ["grown", "cut", "shifted", "beyond", "negative", "unsorted", "words", "fewer lines", "empty"]
)
def test_inconsistent_index(tsv: Path, change: str) -> None:
    build(tsv)
    index = tsv.with_suffix(".lineidx")
    numbers = [int(line) for line in index.read_text().split()]
    if change == "grown":
        with tsv.open("ab") as file:
            file.write(lines_of(tsv)[0])
    elif change == "cut":
        tsv.write_bytes(b"".join(lines_of(tsv)[:-2]))
    else:
        numbers = {
            "shifted": [number + 1 for number in numbers], "beyond": [*numbers, 10**12], "negative": [-1, *numbers[1:]],
            "unsorted": numbers[::-1], "words": [], "fewer lines": numbers[:-1], "empty": [],
        }[change]  # fmt: skip
        index.write_text("\n".join(map(str, numbers)) + ("zero\n" if change == "words" else ""))
    before = index.read_bytes()
    assert f"{index} " in error_of(tsv)
    assert index.read_bytes() == before


# --------------------------------------------------------------------------- folders of files, labels


def test_folder_of_files_with_a_labelmap(tmp_path: Path) -> None:
    """As ImageNet-22K: classes are in the order of the map, and label files have no images."""
    root = tmp_path / "22k"
    write_tsv(root / "b.tsv", [("k3", json.dumps([{"class": "n2", "conf": 1}]), gray(30))])
    write_tsv(root / "a.tsv", [("k1", '["n1"]', gray(10)), ("k2", "n3", gray(20))])
    (root / "a.label.tsv").write_text("k1\tn9\n")
    (root / "labelmap_22k_reorder.txt").write_text("n3\tthird\nn9\nn1\nn2\n")
    dataset = build(root)
    assert dataset.classes == ("n3", "n9", "n1", "n2")
    assert dataset.labels.tolist() == [2, 0, 3]
    assert [int(dataset[i].views[0][0, 0, 0] * 255) for i in range(3)] == [10, 20, 30]
    assert [dataset.source.name(i) for i in (1, 2)] == [f"{root}/a.tsv line 2", f"{root}/b.tsv line 1"]
    write_tsv(root / "c.tsv", [("k4", "n7", gray(40))])
    assert f"{root}/c.tsv line 1: label 'n7' is not one of the 4 classes" in error_of(root)
    write_tsv(root / "c.tsv", [("k4", "4", gray(40))])
    assert "label '4' is not one of the 4 classes" in error_of(root)
    assert len(build(root, need_labels=False)) == 4
    (root / "labelmap_22k_reorder.txt").write_text("n1\nn2\nn1\n")
    assert "has the class 'n1' twice" in error_of(root)


@pytest.mark.parametrize(
    ("column", "names"),
    [
        ("7", ["7"]), ("n0144", ["n0144"]), ("", []), ('"cat"', ["cat"]), ("[3]", ["3"]), ("{not json", ["{not json"]),
        ('[{"class": "cat", "conf": 0.9}, {"class": "dog"}]', ["cat", "dog"]), ('{"class": 5}', ["5"]), ("[]", []),
        ('[{"rect": [1, 2]}]', []), ("tabby, tabby cat", ["tabby, tabby cat"]),
    ],
)  # fmt: skip
def test_parse_label_column(column: str, names: list[str]) -> None:
    assert tsv_layout.parse_label_column(column) == names


def test_numeric_labels_without_a_labelmap(tmp_path: Path) -> None:
    tsv = write_tsv(tmp_path / "train.tsv", [(name, name, gray(1)) for name in ("10", "9", "200", "9")])
    assert build(tsv).classes == ("9", "10", "200")
    assert build(tsv).labels.tolist() == [1, 0, 2, 0]


@pytest.mark.parametrize(("label", "words"), [("", "line 2 has 0 labels"), ('["a", "b"]', "line 2 has 2 labels")])
def test_lines_without_one_label(tmp_path: Path, label: str, words: str) -> None:
    tsv = write_tsv(tmp_path / "train.tsv", [("a", "a", gray(1)), ("b", label, gray(2))])
    assert words in error_of(tsv)
    assert build(tsv, need_labels=False)[1].failures == ()


def test_missing_files(tmp_path: Path, tsv: Path) -> None:
    with pytest.raises(UsageError, match=r"--tsv_mode needs val\.tsv, or a folder"):
        build(tsv.parent, split="val")
    with pytest.raises(UsageError, match="but tsv files; pass --tsv_mode"):
        build_dataset(tsv.parent, "train", whole)
    (tmp_path / "empty.tsv").touch()
    assert "is empty" in error_of(tmp_path / "empty.tsv")


# --------------------------------------------------------------------------- damaged lines


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"key only\n", "the line has 1 columns; it takes key, label and image"),
        (b"key\t3\n", "the line has 2 columns"),
        (b"key\t3\t\n", "the file is empty"),
        (b"key\t3\t!!!!\n", ""),  # the reason is worded by Python
        (b"key\t3\tiVBORw0KGgo\n", "Incorrect padding"),
        (b"\n", "the line has 1 columns"),
        (b"\xff\xfe\t\xff\tQUJD\n", ""),
    ],
)
def test_damaged_line_is_replaced_and_reported(tsv: Path, line: bytes, reason: str) -> None:
    lines = lines_of(tsv)
    tsv.write_bytes(b"".join([*lines[:5], line, *lines[6:]]))
    dataset = build(tsv, need_labels=False)
    sample = dataset[5]
    assert sample.failures[0].startswith(f"{tsv} line 6: {reason}")
    assert sample.views[0].shape == (3, 16, 16)
    assert all(dataset[i].failures == () for i in range(IMAGES) if i != 5)
    if line.count(b"\t") == 0:
        assert "line 6 has no key and label" in error_of(tsv)


def test_file_truncated_during_the_run(tsv: Path) -> None:
    dataset = build(tsv)
    tsv.write_bytes(b"".join(lines_of(tsv)[:6]))
    sample = dataset[9]
    assert "train.tsv ends before byte" in sample.failures[0]
    assert sample.views


# --------------------------------------------------------------------------- the script


def test_pretraining_on_tsv_and_folders_is_equal(folders: Path, tsv: Path, tmp_path: Path) -> None:
    students = []
    for name, flags in {"a": [str(folders)], "b": [str(tsv.parent), "--tsv_mode", "--dataset", "imagenet22k"]}.items():
        command = [*TINY_RUN, "--data_path", *flags, "--output_dir", str(tmp_path / name), "--epochs", "1"]
        main_esvit.main(main_esvit.get_args_parser().parse_args([*command, "--seed", "0", *TINY_SWIN]))
        students.append(serialization.load_file(tmp_path / name / "checkpoint.pth")["student"])
    torch.testing.assert_close(students[1], students[0], rtol=0, atol=0)
