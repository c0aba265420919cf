"""Folders and lists of image files: layouts, labels, and invalid data paths."""

from __future__ import annotations

import errno
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from helpers.image_files import whole, write_gray

from data.datasets import ImageDataset, build_dataset
from data.layouts import folders
from data.layouts.folders import class_runs
from data.layouts.sources import UNLABELED, PackedStrings
from utils import UsageError


def names(dataset: ImageDataset, root: Path) -> list[str]:
    return [str(Path(dataset.source.name(i)).relative_to(root)) for i in range(len(dataset))]


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    messages: list[str] = []
    monkeypatch.setattr("utils.logger.warning", lambda message, *values: messages.append(message % values))
    return messages


# --------------------------------------------------------------------------- layouts


def test_class_folders(tmp_path: Path) -> None:
    for name in ("zebra/b.png", "ant/c.JPG", "zebra/deep/a.png", "ant/notes.txt"):
        write_gray((tmp_path / name).with_suffix(".png"), 0).rename(tmp_path / name)
    dataset = build_dataset(tmp_path, "train", whole)
    assert dataset.classes == ("ant", "zebra")
    assert names(dataset, tmp_path) == ["ant/c.JPG", "zebra/b.png", "zebra/deep/a.png"]
    assert dataset.labels.tolist() == [0, 1, 1]
    assert [dataset[i].label for i in range(3)] == [0, 1, 1]
    assert [dataset[i].image_index for i in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("split", ["train", "val"])
def test_folder_with_splits(tmp_path: Path, split: str) -> None:
    for name in ("train/ant/1.png", "train/bee/2.png", "val/ant/3.png", "val/bee/4.png"):
        write_gray(tmp_path / name, 0)
    dataset = build_dataset(tmp_path, split, whole, need_labels=True)
    expected = {"train": ["train/ant/1.png", "train/bee/2.png"], "val": ["val/ant/3.png", "val/bee/4.png"]}
    assert names(dataset, tmp_path) == expected[split]
    assert (dataset.classes, dataset.labels.tolist()) == (("ant", "bee"), [0, 1])


def test_split_itself_as_data_path(tmp_path: Path) -> None:
    write_gray(tmp_path / "train/ant/1.png", 0)
    assert build_dataset(tmp_path / "train", "train", whole).classes == ("ant",)


@pytest.mark.parametrize("files", [["b.png", "a.png"], ["loose.png", "ant/1.png"]])
def test_loose_images_are_unlabeled(tmp_path: Path, files: list[str]) -> None:
    for name in files:
        write_gray(tmp_path / name, 0)
    dataset = build_dataset(str(tmp_path), "train", whole)
    assert names(dataset, tmp_path) == sorted(files)
    assert dataset.classes == ()
    assert [dataset[i].label for i in range(2)] == [UNLABELED, UNLABELED]


def test_train_folder_without_classes(tmp_path: Path) -> None:
    for name in ("train/1.png", "train/2.png", "other/3.png"):
        write_gray(tmp_path / name, 0)
    dataset = build_dataset(tmp_path, "train", whole)
    assert names(dataset, tmp_path) == ["train/1.png", "train/2.png"]
    assert dataset.labels.tolist() == [UNLABELED, UNLABELED]


def test_text_file_of_paths(tmp_path: Path) -> None:
    elsewhere = write_gray(tmp_path / "elsewhere/3.png", 3)
    for name in ("lists/1.png", "pictures/two words.png"):
        write_gray(tmp_path / name, 0)
    listing = tmp_path / "lists/images.txt"
    listing.write_text(
        f"# my photographs\n1.png\n\n  ../pictures/two words.png  \n'{elsewhere}'\n  \"1.png\"\n# '2.png'\n"
    )
    dataset = build_dataset(listing, "train", whole)
    assert [Path(dataset.source.name(i)).resolve() for i in range(len(dataset))] == [
        tmp_path / "lists/1.png",
        tmp_path / "pictures/two words.png",
        elsewhere,
        tmp_path / "lists/1.png",
    ]
    assert dataset.labels.tolist() == [UNLABELED] * 4
    assert dataset[2].views[0].mean() == pytest.approx(3 / 255)


def test_links_to_folders_are_followed(tmp_path: Path) -> None:
    write_gray(tmp_path / "disk/1.png", 0)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/ant").symlink_to(tmp_path / "disk")
    dataset = build_dataset(tmp_path / "data", "train", whole)
    assert names(dataset, tmp_path) == ["data/ant/1.png"]


def test_cyclic_links_are_not_followed(tmp_path: Path) -> None:
    write_gray(tmp_path / "data/ant/1.png", 0)
    (tmp_path / "data/ant/back").symlink_to(tmp_path / "data")
    assert names(build_dataset(tmp_path / "data", "train", whole), tmp_path) == ["data/ant/1.png"]


def test_non_ascii_names(tmp_path: Path) -> None:
    write_gray(tmp_path / "Käfer/größe 1.png", 7)
    dataset = build_dataset(tmp_path, "train", whole)
    assert dataset.classes == ("Käfer",)
    assert dataset[0].views[0].mean() == pytest.approx(7 / 255)


# --------------------------------------------------------------------------- data paths that cannot work


def test_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(UsageError) as caught:
        build_dataset(tmp_path, "train", whole)
    for word in (str(tmp_path), "sub-folders", ".png", ".jpg", ".tiff", ".npy"):
        assert word in str(caught.value)


def test_empty_list(tmp_path: Path) -> None:
    listing = tmp_path / "images.txt"
    listing.write_text("# nothing yet\n")
    with pytest.raises(UsageError, match=r"images\.txt") as caught:
        build_dataset(listing, "train", whole)
    assert "sub-folders" not in str(caught.value)


@pytest.mark.parametrize("path", ["absent", "absent/images.txt"])
def test_missing_data_path(tmp_path: Path, path: str) -> None:
    with pytest.raises(UsageError, match=f"data path .*{path} does not exist"):
        build_dataset(str(tmp_path / path), "train", whole)


@pytest.mark.parametrize("layout", ["files", "zip"])
def test_empty_data_path(layout: str) -> None:
    with pytest.raises(UsageError, match=r"data path is empty"):
        build_dataset("", "train", whole, layout=layout)


def test_list_with_missing_files(tmp_path: Path) -> None:
    write_gray(tmp_path / "1.png", 0)
    (tmp_path / "images.txt").write_text("1.png\n2.png\n3.png\n")
    with pytest.raises(UsageError, match=r"2 missing files, first .*2\.png"):
        build_dataset(tmp_path / "images.txt", "train", whole)


def test_long_lists_are_checked_in_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing files between the checked ones are reported when read."""
    monkeypatch.setattr(folders, "MAX_CHECKED_PATHS", 3)
    for i in (0, 1, 2, 3, 4, 6, 7):
        write_gray(tmp_path / f"{i}.png", i)
    listing = tmp_path / "images.txt"
    listing.write_text("".join(f"{i}.png\n" for i in range(8)))
    dataset = build_dataset(listing, "train", whole)
    assert dataset[5].failures[0].startswith(f"{tmp_path}/5.png: ")
    (tmp_path / "3.png").unlink()
    with pytest.raises(UsageError, match=r"1 missing file \(3 of 8 .*/3\.png"):
        build_dataset(listing, "train", whole)


def test_image_as_data_path(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"1\.png is not text"):
        build_dataset(write_gray(tmp_path / "1.png", 200), "train", whole)


# --------------------------------------------------------------------------- what is no image


def test_only_regular_image_files_are_used(tmp_path: Path, warnings: list[str]) -> None:
    """Hidden files, folders, pipes, sockets and devices are skipped, with one warning."""
    write_gray(tmp_path / "data/1.png", 1)
    write_gray(tmp_path / "data/album.jpg/2.png", 2)
    for name in ("._1.png", ".hidden.jpg", "notes.txt", "a.gif", "B.GIF", "c.avif", "train.tar.gz"):
        (tmp_path / "data" / name).write_bytes(b"no image")
    os.mkfifo(tmp_path / "data/pipe.jpg")
    (tmp_path / "data/endless.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "data/socket.jpg"))
        found = [build_dataset(tmp_path / "data", "train", whole) for _ in range(2)][1]
    assert names(found, tmp_path) == ["data/1.png", "data/album.jpg/2.png"]
    (message,) = warnings
    for kind in ("2 .gif", "1 .avif", "1 .tar.gz", "3 pipes, sockets or devices"):
        assert kind in message


@pytest.mark.parametrize("name", ["pipe.png", "device.png", "folder.png"])
def test_pipes_and_devices_are_never_read(tmp_path: Path, name: str) -> None:
    """In a list they are an error; in place of a file they are reported and replaced."""
    write_gray(tmp_path / "1.png", 9)
    write_gray(tmp_path / name, 0)
    (tmp_path / "images.txt").write_text(f"1.png\n{name}\n")
    listed = build_dataset(tmp_path / "images.txt", "train", whole)
    (tmp_path / name).unlink()
    if name == "pipe.png":
        os.mkfifo(tmp_path / name)
    elif name == "device.png":
        (tmp_path / name).symlink_to("/dev/zero")
    else:
        (tmp_path / name).mkdir()
    assert listed[1].failures[0].startswith(f"{tmp_path / name}: ")
    assert listed[1].views[0].mean() == pytest.approx(9 / 255)
    with pytest.raises(UsageError, match=f"1 missing file, first .*{name}"):
        build_dataset(tmp_path / "images.txt", "train", whole)


def test_huge_file_is_reported_unread(tmp_path: Path) -> None:
    write_gray(tmp_path / "1.png", 9)
    with (tmp_path / "2.png").open("wb") as file:
        file.truncate(2**40)  # sparse
    assert str(2**40) in build_dataset(tmp_path, "train", whole)[1].failures[0]


def test_unreadable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refuse(path: str) -> object:
        if path.endswith("secret"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    write_gray(tmp_path / "open/1.png", 0)
    write_gray(tmp_path / "secret/2.png", 0)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UsageError, match=r"/secret cannot be read \(Permission denied\)"):
        build_dataset(tmp_path, "train", whole)


def test_lists_written_by_other_programs(tmp_path: Path, warnings: list[str]) -> None:
    """With a byte-order mark, Windows line ends, names that are not UTF-8, and files that are not images."""
    strange = os.fsdecode(b"gr\xf6\xdfe.png")
    for number, name in enumerate(("1.png", strange, "._1.png", "list.csv")):
        shutil.copy(write_gray(tmp_path / "gray.png", number), tmp_path / name)
    content = "\r\n".join(("1.png", strange, "._1.png", "list.csv", ""))
    (tmp_path / "images.txt").write_bytes(b"\xef\xbb\xbf" + os.fsencode(content))
    found = build_dataset(tmp_path / "images.txt", "train", whole)
    assert names(found, tmp_path) == ["1.png", strange]
    assert [round(float(found[i].views[0].mean() * 255)) for i in range(2)] == [0, 1]
    assert "2 hidden files" in warnings[0]


def test_missing_labels(tmp_path: Path) -> None:
    write_gray(tmp_path / "flat/1.png", 0)
    (tmp_path / "images.txt").write_text("flat/1.png\n")
    for path in ("flat", "images.txt"):
        with pytest.raises(UsageError, match="images without a class"):
            build_dataset(tmp_path / path, "val", whole, need_labels=True)


def test_missing_split(tmp_path: Path) -> None:
    write_gray(tmp_path / "train/ant/1.png", 0)
    with pytest.raises(UsageError, match="has a folder 'train' but no 'val'"):
        build_dataset(tmp_path, "val", whole, need_labels=True)


@pytest.mark.parametrize("what", ["pipe", "/dev/zero", "/proc/self/mem"])
def test_data_path_with_io_error(tmp_path: Path, what: str) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(UsageError, match=what):
        build_dataset(path if what == "pipe" else what, "train", whole)


@pytest.mark.parametrize("seed", range(5))
def test_class_runs_equal_a_loop(seed: int) -> None:
    """Runs of one path up to many, and folders that begin alike and sort differently from their paths."""
    rng = np.random.default_rng(seed)
    tree = ["a", "a-b", "a.c", "b/a", "b/b", "\u00e9", ""]
    counts = rng.integers(0, 40, len(tree))
    paths = sorted(f"{f}/{i}.png".lstrip("/") for f, count in zip(tree, counts) for i in range(count))
    found = [folder for folder, count in class_runs(PackedStrings(paths)) for _ in range(count)]
    assert found == [path.partition("/")[0] if "/" in path else "" for path in paths]
