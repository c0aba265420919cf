"""The cached scan of large folders: valid until a folder changes, and made by one of several processes."""

from __future__ import annotations

import io
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.image_files import whole
from tqdm import tqdm

from data.datasets import build_dataset
from data.layouts import folder_scan, index_cache
from data.layouts.folder_scan import _Scan, find_images
from data.layouts.index_cache import cache_path
from data.layouts.sources import PackedStrings

FOLDERS, PER_FOLDER = 3, 4


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use a temporary cache folder, and cache trees from ten images on."""
    monkeypatch.setenv("ESVIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(folder_scan, "MIN_CACHED_IMAGES", 10)
    monkeypatch.setattr(folder_scan, "SETTLE_NS", 0)
    return tmp_path / "cache"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for folder in range(FOLDERS):
        (tmp_path / "tree" / f"c{folder}").mkdir(parents=True)
        for number in range(PER_FOLDER):
            (tmp_path / "tree" / f"c{folder}" / f"{number}.png").touch()
    return tmp_path / "tree"


def walked(root: Path) -> list[str]:
    """Return the expected result by `os.walk`."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*.png"))


def forbid_scanning(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise AssertionError("the tree was listed again")

    monkeypatch.setattr(folder_scan._Scan, "_list_folder", fail)


def test_second_start_uses_the_cache(tree: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_dataset(tree, "train", whole)
    assert [path.name for path in cache.iterdir()] == [cache_path(tree, ".files").name]
    forbid_scanning(monkeypatch)
    again = build_dataset(tree, "train", whole)
    names = [again.source.name(i) for i in range(len(again))]
    assert names == [first.source.name(i) for i in range(len(first))] == [f"{tree}/{name}" for name in walked(tree)]
    assert again.labels.tolist() == first.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize("what", ["added", "removed", "linked"])
def test_nested_change_is_detected(tree: Path, tmp_path: Path, what: str) -> None:
    """Only the changed folder itself gets a new modification time. Also behind a link."""
    deep = tree / "c1" / "a" / "b" / "c"
    deep.mkdir(parents=True)
    (deep / "1.png").touch()
    (tmp_path / "elsewhere").mkdir()
    (tree / "c2" / "link").symlink_to(tmp_path / "elsewhere")
    before = list(find_images(tree))
    above = [folder.stat().st_mtime_ns for folder in (tree, *deep.parents[:3])]
    if what == "added":
        (deep / "2.png").touch()
    elif what == "removed":
        (deep / "1.png").unlink()
    else:
        (tmp_path / "elsewhere" / "3.png").touch()
    assert [folder.stat().st_mtime_ns for folder in (tree, *deep.parents[:3])] == above
    changed = {"added": {"c1/a/b/c/2.png"}, "removed": {"c1/a/b/c/1.png"}, "linked": {"c2/link/3.png"}}[what]
    assert set(find_images(tree)) ^ set(before) == changed
    assert set(find_images(tree)) ^ set(before) == changed


@pytest.mark.parametrize(("terminal", "main"), [(True, True), (True, False), (False, True)])
def test_progress_bar_on_the_main_terminal(
    tree: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool, main: bool
) -> None:
    shown = io.StringIO()
    at_once = {"file": shown, "delay": 0, "mininterval": 0, "leave": True}
    monkeypatch.setattr(index_cache, "tqdm", lambda items, **options: tqdm(items, **(options | at_once)))
    monkeypatch.setattr(index_cache, "is_main_process", lambda: main)
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    assert list(find_images(tree)) == walked(tree)
    if terminal and main:
        assert f"images below {tree}: {FOLDERS * PER_FOLDER} files" in shown.getvalue()
    else:
        assert shown.getvalue() == ""


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "new folder", "folder gone", "deep", "replaced"])
def test_changed_folder_is_detected(tree: Path, change: str) -> None:
    before = list(find_images(tree))
    if change == "added":
        (tree / "c1" / "9.png").touch()
    elif change == "removed":
        (tree / "c1" / "2.png").unlink()
    elif change == "renamed":
        (tree / "c1" / "2.png").rename(tree / "c1" / "5.png")
    elif change == "new folder":
        (tree / "c9").mkdir()
        (tree / "c9" / "1.png").touch()
    elif change == "deep":
        (tree / "c0" / "deep").mkdir()
        (tree / "c0" / "deep" / "1.png").touch()
    else:
        for path in (tree / "c2").iterdir():
            path.unlink()
        (tree / "c2").rmdir()
        if change == "replaced":
            (tree / "c2").mkdir()
            (tree / "c2" / "other.png").touch()
    found = list(find_images(tree))
    assert found == walked(tree) != before
    assert list(find_images(tree)) == found


def test_recently_changed_folder_is_scanned_again(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may change again with the same modification time."""
    monkeypatch.setattr(folder_scan, "SETTLE_NS", 10**12)
    find_images(tree)
    forbid_scanning(monkeypatch)
    with pytest.raises(AssertionError, match="listed again"):
        find_images(tree)


def test_small_trees_are_not_cached(tree: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_scan, "MIN_CACHED_IMAGES", FOLDERS * PER_FOLDER + 1)
    assert list(find_images(tree)) == walked(tree)
    assert not cache.exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "other"])
def test_damaged_cache_is_replaced(tree: Path, damage: str) -> None:
    expected = list(find_images(tree))
    place = cache_path(tree, ".files")
    content = place.read_bytes()
    if damage == "other":
        with place.open("wb") as file:
            np.savez(file, text=np.zeros(3), ends=np.array([9]))
    else:
        place.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "noise": b"PK\x03\x04" * 50}[damage])
    assert list(find_images(tree)) == expected


def test_read_only_cache_folder(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ESVIT_CACHE", str(tmp_path / "file" / "cache"))
    assert list(find_images(tree)) == walked(tree)


def scan_slowly(tree: Path, listed: multiprocessing.Queue[int]) -> None:
    images = _Scan._walk

    def slow(scan: _Scan) -> Iterator[str]:
        for name in images(scan):
            time.sleep(0.03)
            yield name
        listed.put(os.getpid())

    _Scan._walk = slow  # type: ignore[method-assign,assignment]
    assert list(find_images(tree)) == walked(tree)


def test_one_of_three_processes_scans(tree: Path) -> None:
    context = multiprocessing.get_context("fork")
    listed: multiprocessing.Queue[int] = context.Queue()
    processes = [context.Process(target=scan_slowly, args=(tree, listed)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert listed.get(timeout=5) in {process.pid for process in processes}
    assert listed.empty()


def test_packed_strings() -> None:
    names = PackedStrings(["a", "größe", "\udcff", ""])
    assert list(names) == ["a", "größe", "\udcff", ""]
    assert list(PackedStrings.from_arrays(names.text, names.ends)) == list(names)
    for text, ends in ((names.text, names.ends[:-2]), (names.text, names.ends[::-1]), (names.text[1:], names.ends)):
        with pytest.raises(ValueError, match="inconsistent"):
            PackedStrings.from_arrays(text, ends)
