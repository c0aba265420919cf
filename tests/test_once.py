"""Files made once: by one of several processes, whole or not at all."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from typing import BinaryIO

import pytest

import data.once
from data.once import cache_file, make_once


def write_whole(file: BinaryIO) -> None:
    file.write(b"whole")


def make_slowly(path: Path, made: multiprocessing.Queue[int]) -> None:
    def write(file: BinaryIO) -> None:
        made.put(os.getpid())
        time.sleep(0.3)
        file.write(b"whole")

    assert make_once(path, write)
    assert path.read_bytes() == b"whole"


def test_one_of_three_processes_makes_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    made: multiprocessing.Queue[int] = context.Queue()
    processes = [context.Process(target=make_slowly, args=(tmp_path / "index", made)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert made.get(timeout=5) in {process.pid for process in processes}
    assert made.empty()
    assert os.listdir(tmp_path) == ["index"]


def test_what_is_there_is_never_written_again(tmp_path: Path) -> None:
    (tmp_path / "index").write_bytes(b"mine")
    assert make_once(tmp_path / "index", lambda file: pytest.fail("written again"))
    assert (tmp_path / "index").read_bytes() == b"mine"


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise KeyError("a mistake")

    def full(file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError("no space left")

    with pytest.raises(KeyError):
        make_once(tmp_path / "index", fail)
    assert not make_once(tmp_path / "index", full)
    assert os.listdir(tmp_path) == []


def test_lock_of_a_dead_process_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.once, "ABANDONED_AFTER", 0.05)
    monkeypatch.setattr(data.once, "POLL", 0.02)
    (tmp_path / "index.lock").touch()
    assert make_once(tmp_path / "index", write_whole)
    assert os.listdir(tmp_path) == ["index"]


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert not make_once(tmp_path / "file" / "index", lambda file: None)


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESVIT_CACHE", str(tmp_path))
    assert cache_file(Path("/a"), ".x").parent == tmp_path
    assert cache_file(Path("/a"), ".x") == cache_file(Path("/a/b/.."), ".x")
    assert cache_file(Path("/a"), ".x") != cache_file(Path("/b"), ".x")
