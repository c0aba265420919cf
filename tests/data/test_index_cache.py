"""Cache files: created by one of several processes, completely or not at all."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from checkpoints import locks
from data.layouts.index_cache import cache_path, cached_arrays, create_once, fingerprint
from utils import UsageError


def write_content(file: BinaryIO) -> None:
    file.write(b"whole")


def create_slowly(path: Path, made: multiprocessing.Queue[int]) -> None:
    def write(file: BinaryIO) -> None:
        made.put(os.getpid())
        time.sleep(0.3)
        file.write(b"whole")

    assert create_once(path, write)
    assert path.read_bytes() == b"whole"


def test_one_of_three_processes_creates_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    made: multiprocessing.Queue[int] = context.Queue()
    processes = [context.Process(target=create_slowly, args=(tmp_path / "index", made)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert made.get(timeout=5) in {process.pid for process in processes}
    assert made.empty()
    assert os.listdir(tmp_path) == ["index"]


def test_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "index").write_bytes(b"mine")
    assert create_once(tmp_path / "index", lambda file: pytest.fail("written again"))
    assert (tmp_path / "index").read_bytes() == b"mine"


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise KeyError("a mistake")

    def full(file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError("no space left")

    with pytest.raises(KeyError):
        create_once(tmp_path / "index", fail)
    assert not create_once(tmp_path / "index", full)
    assert os.listdir(tmp_path) == []


def test_lock_of_a_dead_process_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once; a lock without an owner, as after a crash of the machine, after a while."""
    monkeypatch.setattr(locks, "LEASE_DURATION", 1.0)
    lock = tmp_path / ".index.lock"

    def die_as_owner() -> None:
        held = locks.lease(lock)
        locks.acquire(held)
        os._exit(0)

    child = multiprocessing.get_context("fork").Process(target=die_as_owner)
    child.start()
    child.join()
    assert lock.exists()
    assert create_once(tmp_path / "index", write_content)
    assert os.listdir(tmp_path) == ["index"]
    (tmp_path / "index").unlink()
    lock.touch()
    assert create_once(tmp_path / "index", write_content)
    assert os.listdir(tmp_path) == ["index"]


def numbers() -> dict[str, np.ndarray]:
    return {"numbers": np.arange(5)}


@pytest.mark.parametrize("damage", ["none", "cut", "empty", "noise"])
def test_cached_arrays_are_rebuilt_if_damaged(tmp_path: Path, damage: str) -> None:
    place = tmp_path / "cache" / "arrays.npz"
    assert cached_arrays(place, numbers)["numbers"].tolist() == [0, 1, 2, 3, 4]
    content = place.read_bytes()
    place.write_bytes({"none": content, "cut": content[:50], "empty": b"", "noise": b"PK\x03\x04" * 9}[damage])
    other = {"numbers": np.arange(3)}
    expected = 5 if damage == "none" else 3
    assert len(cached_arrays(place, lambda: other)["numbers"]) == expected
    assert len(cached_arrays(place, numbers)["numbers"]) == expected
    assert len(cached_arrays(place, numbers, lambda arrays: False)["numbers"]) == 5
    assert len(cached_arrays(place, lambda: other)["numbers"]) == 5


def test_cached_arrays_without_a_writable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert len(cached_arrays(tmp_path / "file" / "arrays.npz", numbers)["numbers"]) == 5


def test_error_while_building_is_raised(tmp_path: Path) -> None:
    def fail() -> dict[str, np.ndarray]:
        raise UsageError("line 3 is wrong")

    with pytest.raises(UsageError, match="line 3 is wrong"):
        cached_arrays(tmp_path / "arrays.npz", fail)
    assert os.listdir(tmp_path) == []


def test_fingerprint_changes_with_each_file(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"1")
    other.write_bytes(b"22")
    states = {fingerprint([one]), fingerprint([other]), fingerprint([one, other]), fingerprint([other, one])}
    one.write_bytes(b"123")
    states.add(fingerprint([one]))
    os.utime(one, ns=(0, 1))
    states.add(fingerprint([one]))
    assert len(states) == 6
    assert fingerprint([one]) in states


def test_folder_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert not create_once(tmp_path / "file" / "index", lambda file: None)


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESVIT_CACHE", str(tmp_path))
    assert cache_path(Path("/a"), ".x").parent == tmp_path
    assert cache_path(Path("/a"), ".x") == cache_path(Path("/a/b/.."), ".x")
    assert cache_path(Path("/a"), ".x") != cache_path(Path("/b"), ".x")


def test_no_cache_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container with an arbitrary user id."""
    for variable in ("ESVIT_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 5)
    place = cache_path(Path("/a"), ".npz")
    assert not create_once(place, write_content)
    assert len(cached_arrays(place, numbers)["numbers"]) == 5
