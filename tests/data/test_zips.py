"""Images in zip files: the same samples as from folders, with and without workers, and errors in maps."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.image_files import whole
from helpers.runs import TINY_RUN, TINY_SWIN, write_images, zip_folders

import eval_finetune
import eval_knn
import eval_linear
import main_esvit
from checkpoints import serialization
from data.datasets import ImageDataset, build_dataset
from data.layouts import zips
from data.layouts.sources import ForkSafeFile, PackedStrings
from data.layouts.zips import check_readable
from data.loader import build_eval_loader
from utils import UsageError

CLASSES = 3
PER_CLASS = 4


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Twelve training images of three classes."""
    write_images(tmp_path / "folders" / "train", PER_CLASS, size=16, classes=CLASSES)
    return tmp_path / "folders"


@pytest.fixture
def zipped(folders: Path, tmp_path: Path) -> Path:
    return zip_folders(folders, tmp_path / "zipped")


def build(root: Path, seed: int = 0) -> ImageDataset:
    return build_dataset(root, "train", whole, seed=seed, need_labels=True, layout="zip")


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


# --------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
@pytest.mark.parametrize("prefix", ["train.zip@/", ""], ids=["published", "of Swin"])
def test_zip_equals_folder(folders: Path, tmp_path: Path, method: int, prefix: str) -> None:
    root = zip_folders(folders, tmp_path / "zipped", method)
    map_file = root / "train_map.txt"
    map_file.write_text(map_file.read_text().replace("train.zip@/", prefix))
    plain, zipped = build_dataset(folders, "train", whole), build(root)
    assert len(zipped) == len(plain) == CLASSES * PER_CLASS
    assert zipped.labels.tolist() == plain.labels.tolist()
    assert zipped.classes == ("0", "1", "2")
    for i in range(len(plain)):
        assert zipped.source.read(i) == plain.source.read(i)
        assert torch.equal(zipped[i].views[0], plain[i].views[0])
        assert zipped[i][1:] == plain[i][1:]
    assert zipped.source.name(5) == f"{root}/train.zip@/class1/001.png"


def test_map_of_several_zips_in_any_order(folders: Path, zipped: Path) -> None:
    """The map selects, repeats and orders the images; labels need not be consecutive."""
    (zipped / "train.zip").rename(zipped / "first.zip")
    write_images(folders / "second", 1, size=8, classes=1, seed=5)
    zip_folders(folders, zipped, parts=["second"])
    lines = ["second.zip@/class0/000.png\t7", "first.zip@/class2/003.png\t900", "", "first.zip@/class0/000.png\t7\r",
             "second.zip@/class0/000.png\t7"]  # fmt: skip
    (zipped / "train_map.txt").write_bytes("\n".join(lines).encode())
    (zipped / "train.zip").write_bytes((zipped / "first.zip").read_bytes())
    dataset = build(zipped)
    assert dataset.classes == ("7", "900")
    assert dataset.labels.tolist() == [0, 1, 0, 0]
    expected = ["second/class0/000.png", "train/class2/003.png", "train/class0/000.png", "second/class0/000.png"]
    assert [dataset.source.read(i) for i in range(4)] == [(folders / name).read_bytes() for name in expected]


def test_non_ascii_names_and_other_members(folders: Path, tmp_path: Path) -> None:
    (folders / "train" / "class1" / "000.png").rename(folders / "train" / "class1" / "größe 1.png")
    (folders / "train" / "class1" / "notes.txt").write_text("not in the map")
    root = zip_folders(folders, tmp_path / "zipped")
    assert build(root).source.name(7).endswith("train.zip@/class1/größe 1.png")
    assert build(root)[7].failures == ()
    assert len(build(root)) == CLASSES * PER_CLASS


def test_zip_with_prepended_data(zipped: Path) -> None:
    """Offsets in self-extracting files count from the start of the zip data."""
    before = [build(zipped).source.read(i) for i in range(3)]
    path = zipped / "train.zip"
    path.write_bytes(b"#!/bin/sh\n" + path.read_bytes())
    assert [build(zipped).source.read(i) for i in range(3)] == before


def test_missing_flag(zipped: Path) -> None:
    with pytest.raises(UsageError, match=r"no image found under .*, but train\.zip; pass --zip_mode"):
        build_dataset(zipped, "train", whole)


# --------------------------------------------------------------------------- several processes


def test_workers_and_pickled_copies_read_the_same(zipped: Path) -> None:
    """Forked workers after the parent has read, and pickled copies as for spawned workers."""
    dataset = build(zipped)
    expected = torch.stack([dataset[i].views[0] for i in range(len(dataset))])
    for same in (dataset, pickle.loads(pickle.dumps(dataset))):
        loader = build_eval_loader(same, 5, 2, pin_memory=False)
        loader.multiprocessing_context = "fork"
        for _ in range(2):
            assert torch.equal(torch.cat([batch.views[0] for batch in loader]), expected)


def test_index_size_per_image(zipped: Path) -> None:
    """Workers get 27 bytes, a label, and the name with its end for each image, and no open file."""
    dataset = build(zipped)
    before = len(pickle.dumps(dataset))
    dataset.source.read(0)
    assert len(pickle.dumps(dataset)) == before
    change(zipped / "train_map.txt", "train.zip@/class0/000.png\t0\n", "train.zip@/class0/000.png\t0\n" * 1001)
    name = len("class0/000.png")
    grown = len(pickle.dumps(build(zipped))) - before
    assert grown == pytest.approx(1000 * (27 + 8 + 8 + name), rel=0.01)


def read_in_child(file: ForkSafeFile, results: multiprocessing.Queue[tuple[int, bytes]]) -> None:
    first = file._process
    results.put((first, file.read(3, 4)))


def test_directory_of_a_large_zip_is_cached(zipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the zip or the map changes."""
    monkeypatch.setenv("ESVIT_CACHE", str(tmp_path / "cache"))
    small = build(zipped)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(zips, "MIN_CACHED_BYTES", 1)
    with pytest.MonkeyPatch.context() as forbid:
        for _ in range(2):
            large = build(zipped)
            assert large.labels.tolist() == small.labels.tolist()
            assert large.classes == small.classes
            assert [large.source.name(i) for i in range(12)] == [small.source.name(i) for i in range(12)]
            assert [large.source.read(i) for i in range(12)] == [small.source.read(i) for i in range(12)]
            forbid.setattr(zips, "read_map", lambda *files: pytest.fail("read again"))
    change(zipped / "train_map.txt", "/class0/000.png\t0", "/class0/000.png\t2")
    assert build(zipped).labels.tolist() == [2, *small.labels.tolist()[1:]]
    with zipfile.ZipFile(zipped / "train.zip", "w") as archive:
        archive.writestr("class0/000.png", b"")
    for _ in range(2):
        with pytest.raises(UsageError, match="11 images missing"):
            build(zipped)


def test_forked_process_opens_its_own_handle(tmp_path: Path) -> None:
    """The position of the parent's handle does not change."""
    (tmp_path / "file").write_bytes(bytes(range(100)))
    file = ForkSafeFile(tmp_path / "file")
    assert file.read(50, 2) == bytes([50, 51])
    handle = file._handle
    assert handle is not None
    descriptor_position = os.lseek(handle.fileno(), 0, os.SEEK_CUR)
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[tuple[int, bytes]] = context.Queue()
    child = context.Process(target=read_in_child, args=(file, results))
    child.start()
    inherited, content = results.get(timeout=60)
    child.join()
    assert (inherited, content) == (os.getpid(), bytes([3, 4, 5, 6]))
    assert os.lseek(handle.fileno(), 0, os.SEEK_CUR) == descriptor_position
    assert file.read(52, 1) == bytes([52])
    assert file._handle is handle
    with pytest.raises(EOFError, match="file ends 10 bytes too early"):
        file.read(90, 20)


def test_names() -> None:
    texts = ["", "a", "größe/1.png", "\udcff.png", "", "last"]
    names = PackedStrings(texts)
    assert [names[i] for i in range(6)] == texts
    assert names[-1] == "last"
    assert len(names) == 6
    with pytest.raises(IndexError):
        names[6]


# --------------------------------------------------------------------------- damaged members


def member_position(path: Path, member: str) -> tuple[int, int]:
    """Return offset and size of a stored member's content."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(member)
    return info.header_offset + 30 + len(member), info.compress_size


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
@pytest.mark.parametrize("damage", ["a byte", "zeros", "header"])
def test_damaged_member_is_replaced_and_reported(folders: Path, tmp_path: Path, method: int, damage: str) -> None:
    zipped = zip_folders(folders, tmp_path / "zipped", method)
    start, size = member_position(zipped / "train.zip", "class1/002.png")
    content = bytearray((zipped / "train.zip").read_bytes())
    if damage == "a byte":
        content[start + size // 2] ^= 1
    elif damage == "zeros":
        content[start : start + size] = bytes(size)
    else:
        header = start - 30 - len("class1/002.png")
        content[header : header + 4] = b"RIFF"
    (zipped / "train.zip").write_bytes(content)
    dataset = build(zipped)
    sample = dataset[6]
    name, _, reason = sample.failures[0].partition(": ")
    assert name == f"{zipped}/train.zip@/class1/002.png"
    assert reason.strip()
    if damage == "a byte" and method == zipfile.ZIP_STORED:
        assert reason == "the member does not match its checksum"
    assert sample.image_index == 6
    others = [dataset[i] for i in range(12) if i != 6]
    assert all(other.failures == () for other in others)
    assert sample.label in {other.label for other in others if torch.equal(sample.views[0], other.views[0])}


def test_empty_member_is_replaced_and_reported(folders: Path, tmp_path: Path) -> None:
    (folders / "train" / "class0" / "003.png").write_bytes(b"")
    sample = build(zip_folders(folders, tmp_path / "zipped"))[3]
    assert sample.failures[0].endswith("train.zip@/class0/003.png: the file is empty")
    assert sample.views


def test_zip_truncated_during_the_run(zipped: Path) -> None:
    dataset = build(zipped)
    content = (zipped / "train.zip").read_bytes()
    start, _ = member_position(zipped / "train.zip", "class2/003.png")
    (zipped / "train.zip").write_bytes(content[: start + 10])
    sample = dataset[11]
    assert "train.zip ends" in sample.failures[0]
    assert sample.views[0].shape == (3, 16, 16)
    (zipped / "train.zip").unlink()
    assert build_error(zipped).endswith("train.zip is missing")


def build_error(zipped: Path) -> str:
    with pytest.raises(UsageError) as caught:
        build(zipped)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("train.zip@/class0/001.png 0", "line 2 has no label: 'train.zip@/class0/001.png 0'"),
        ("train.zip@/class0/001.png\t", "line 2: label ''"),
        ("train.zip@/class0/001.png\tcat", "line 2: label 'cat'"),
        ("train.zip@/class0/001.png\t-1", "line 2: label '-1'"),
        ("train.zip@/class0/001.png\t1.0", "line 2: label '1.0'"),
        ("train.zip@/class0/001.png\t2147483648", "line 2: label '2147483648'"),
        ("train.zip@/class0/001.png\t" + "9" * 5000, "line 2: label"),
        ("train.zip@/../../etc/passwd\t0", "line 2: '../../etc/passwd'"),
        ("train.zip@//etc/passwd\t0", "line 2: '/etc/passwd'"),
        ("train.zip@/class0/./001.png\t0", "line 2: 'class0/./001.png'"),
        ("train.zip@/class0/\t0", "line 2: 'class0/'"),
        ("\t0", "line 2: ''"),
        ("../train.zip@/class0/001.png\t0", "line 2: '../train.zip'"),
        ("/tmp/train.zip@/class0/001.png\t0", "line 2: '/tmp/train.zip'"),
        ("train.tar@/class0/001.png\t0", "line 2: 'train.tar'"),
        ("other.zip@/class0/001.png\t0", "line 2 names other.zip"),
        ("train.zip@/class0/absent.png\t0", "1 image missing from the zip file, first train.zip@/class0/absent"),
        ("train.zip@/class0\t0", "first train.zip@/class0 in line 2"),
    ],
)  # fmt: skip
def test_invalid_map_line(zipped: Path, line: str, words: str) -> None:
    change(zipped / "train_map.txt", "train.zip@/class0/001.png\t0", line)
    message = build_error(zipped)
    assert words in message
    assert str(zipped / "train_map.txt") in message


@pytest.mark.parametrize("missing", ["train.zip", "train_map.txt"])
def test_missing_files(zipped: Path, missing: str) -> None:
    (zipped / missing).unlink()
    message = build_error(zipped)
    assert message.startswith("--zip_mode needs train.zip and train_map.txt")
    assert message.endswith(f"{zipped / missing} is missing")


def test_binary_or_empty_map(zipped: Path) -> None:
    (zipped / "train_map.txt").write_bytes(b"\xff\xfe\x00")
    assert "is not text in UTF-8" in build_error(zipped)
    (zipped / "train_map.txt").write_text("\n \n")
    assert "lists no image" in build_error(zipped)


@pytest.mark.parametrize("keep", [0, 100, -10])
def test_truncated_zip(zipped: Path, keep: int) -> None:
    path = zipped / "train.zip"
    path.write_bytes(path.read_bytes()[:keep])
    assert f"{path} is not a complete zip file" in build_error(zipped)


def test_unsupported_members(zipped: Path, folders: Path) -> None:
    zip_folders(folders, zipped, zipfile.ZIP_LZMA)
    assert "line 1: class0/000.png is compressed by method 14" in build_error(zipped)
    zip_folders(folders, zipped, zipfile.ZIP_STORED)
    path = zipped / "train.zip"
    content = bytearray(path.read_bytes())
    directory = content.index(b"PK\x01\x02")
    content[directory + 8] |= 1  # the flag of encrypted members
    path.write_bytes(content)
    assert "line 1: class0/000.png is encrypted" in build_error(zipped)


def test_zip_bomb_is_not_decompressed(tmp_path: Path) -> None:
    """Of a gigabyte of zeros in a megabyte only the announced size is decompressed."""
    with zipfile.ZipFile(tmp_path / "train.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(2**26))
    directory = bytearray((tmp_path / "train.zip").read_bytes())
    place = directory.rindex(b"PK\x01\x02") + 24
    directory[place : place + 4] = (1000).to_bytes(4, "little")
    (tmp_path / "train.zip").write_bytes(directory)
    (tmp_path / "train_map.txt").write_text("\ufefftrain.zip@/a.png\t0\n", encoding="utf-8")
    dataset = build_dataset(tmp_path, "train", whole, layout="zip")
    tracemalloc.start()
    with pytest.raises(ValueError, match="checksum"):
        dataset.source.read(0)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_huge_member(zipped: Path) -> None:
    """The size is checked before reading."""
    info = zipfile.ZipInfo("large.png")
    info.file_size = 2**30 + 1
    with pytest.raises(UsageError, match=r"line 9: large\.png .*1073741825 bytes"):
        check_readable(info, "train_map.txt line 9")


# --------------------------------------------------------------------------- the scripts


@pytest.fixture
def both(folders: Path, zipped: Path) -> dict[str, list[str]]:
    """Return flags for the same images in folders and zip files, with a validation set."""
    write_images(folders / "val", 2, size=16, classes=CLASSES, seed=1)
    zip_folders(folders, zipped)
    return {"folders": ["--data_path", str(folders)], "zipped": ["--data_path", str(zipped), "--zip_mode"]}


EVALUATION = [
    "--random_weights",
    "--arch",
    "swin",
    "--cfg",
    "experiments/demo/swin_micro.yaml",
    "--device",
    "cpu",
    "--num_workers",
    "0",
]
SCRIPTS = {
    eval_knn: ["--nb_knn", "1", "3"],
    eval_linear: ["--epochs", "2", "--n_last_blocks", "2", "--lr", "10"],
    eval_finetune: ["--epochs", "1", "--warmup_epochs", "0", "--batch_size_per_gpu", "4", "--precision", "fp32"],
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_evaluations_of_zips_and_folders_are_equal(script: Any, both: dict[str, list[str]], tmp_path: Path) -> None:
    found = {}
    for name, flags in both.items():
        out = tmp_path / f"{script.__name__}_{name}"
        command = [*EVALUATION, *SCRIPTS[script], *flags, "--output_dir", str(out), "--seed", "0", *TINY_SWIN]
        script.main(script.get_args_parser().parse_args(command))
        (path,) = (out / "results").glob("*.json")
        text = path.read_text()
        text = text.replace(flags[flags.index("--data_path") + 1], "DATA")
        for i in range(CLASSES):  # folders have names for their classes
            text = text.replace(f'"class{i}"', f'"{i}"')
        found[name] = json.loads(text)
    assert found["zipped"] == found["folders"]


def test_pretraining_on_zips_and_folders_is_equal(both: dict[str, list[str]], tmp_path: Path) -> None:
    students = []
    for name, flags in both.items():
        command = [*TINY_RUN, *flags, "--output_dir", str(tmp_path / name), "--epochs", "1", "--seed", "0", *TINY_SWIN]
        main_esvit.main(main_esvit.get_args_parser().parse_args(command))
        students.append(serialization.load_file(tmp_path / name / "checkpoint.pth")["student"])
    torch.testing.assert_close(students[1], students[0], rtol=0, atol=0)


def test_val_class_missing_from_train(both: dict[str, list[str]], zipped: Path) -> None:
    change(zipped / "val_map.txt", "val.zip@/class1/000.png\t1", "val.zip@/class1/000.png\t5")
    command = [*EVALUATION, *both["zipped"], "--seed", "0", *TINY_SWIN]
    with pytest.raises(UsageError, match=r"not in train: 5 .*val\.zip@/class1/000\.png is of class 5"):
        eval_knn.main(eval_knn.get_args_parser().parse_args(command))
