"""Locks: an owner that lives is not disturbed, one that is dead gives way, here at once and elsewhere after a while."""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from checkpoints import files, locks
from distributed import collectives
from utils import UsageError

HELD: list[object] = []


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "LEASE_DURATION", 1.0)
    monkeypatch.setattr(locks, "POLL_INTERVAL", 0.02)


def forked(act: Callable[[], None]) -> int:
    """A child that acts, says so and then sleeps."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            act()
            os.write(write, b"done")
            time.sleep(60)
        finally:
            os._exit(1)
    assert os.read(read, 4) == b"done"
    return child


def hold(folder: Path) -> None:
    run = files.lock_folder(folder, "training")
    run.__enter__()
    HELD.append(run)


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[int]:
    """A process that holds `tmp_path` for training."""
    child = forked(lambda: hold(tmp_path))
    yield child
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def bury(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_second_run_is_refused_and_told_of_the_first(tmp_path: Path, owner: int) -> None:
    """By process, host and time; a stopped owner is one that lives, for it will go on."""
    for number in (signal.SIGCONT, signal.SIGSTOP):
        os.kill(owner, number)
        with pytest.raises(UsageError) as refused, files.lock_folder(tmp_path, "training"):
            pytest.fail("two owners")
        for word in (
            f"--output_dir {tmp_path}",
            f"process {owner}",
            socket.gethostname(),
            f"since {time.localtime().tm_year}-",
        ):
            assert word in str(refused.value)
    os.kill(owner, signal.SIGCONT)
    with files.lock_folder(tmp_path, "masks"):  # other files
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            ".masks.lock",
            ".masks.since",
            ".training.lock",
            ".training.since",
        ]


def test_dead_owner_gives_way_at_once_and_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    collectives.setup_logging()
    child = forked(lambda: hold(tmp_path))
    bury(child)
    begun = time.monotonic()
    with files.lock_folder(tmp_path, "training"):
        assert time.monotonic() - begun < locks.LEASE_DURATION / 2
        assert locks.lease(tmp_path / ".training.lock").pid == os.getpid()
    assert capsys.readouterr().err.count(f"process {child} on") == 1
    assert os.listdir(tmp_path) == []


def test_number_of_a_dead_owner_may_be_in_use_again(tmp_path: Path) -> None:
    """Its start is on record: after a restart of the machine, or of a container, low numbers come again."""
    child = forked(lambda: hold(tmp_path))
    bury(child)
    marker = tmp_path / ".training.lock"
    marker.write_text(marker.read_text().replace(f"pid={child}\n", f"pid={os.getppid()}\n"))
    with files.lock_folder(tmp_path, "training"):
        assert locks.lease(marker).pid == os.getpid()


def test_child_that_nobody_buries_is_dead(tmp_path: Path) -> None:
    """As in containers whose first process does not wait for orphans."""
    child = forked(lambda: hold(tmp_path))
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    with files.lock_folder(tmp_path, "training"):
        assert locks.lease(tmp_path / ".training.lock").pid == os.getpid()
    os.waitpid(child, 0)


@pytest.mark.parametrize("alive", [True, False])
def test_owner_on_another_host_is_watched(
    tmp_path: Path, alive: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As long as a lock says: if it is touched, its owner lives."""
    collectives.setup_logging()
    with monkeypatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: "elsewhere")
        child = forked(lambda: hold(tmp_path))
    if not alive:
        bury(child)
    begun = time.monotonic()
    if alive:
        with pytest.raises(UsageError, match=f"process {child} on elsewhere"), files.lock_folder(tmp_path, "training"):
            pytest.fail("two owners")
        assert time.monotonic() - begun < locks.LEASE_DURATION
        bury(child)
    else:
        with files.lock_folder(tmp_path, "training"):
            assert time.monotonic() - begun >= locks.LEASE_DURATION
            assert locks.lease(tmp_path / ".training.lock").pid == os.getpid()
        assert f"process {child} on elsewhere" in capsys.readouterr().err


def test_owner_that_died_before_it_could_write_its_name(tmp_path: Path) -> None:
    (tmp_path / ".training.lock").touch()
    with files.lock_folder(tmp_path, "training"):
        assert locks.lease(tmp_path / ".training.lock").pid == os.getpid()


def test_run_that_seemed_dead_writes_nothing_more(tmp_path: Path) -> None:
    """Another has taken its folder over meanwhile."""
    (tmp_path / "checkpoint.pth").write_text("of the other")
    with files.lock_folder(tmp_path, "training"):
        (tmp_path / ".training.lock").unlink()
        child = forked(lambda: hold(tmp_path))
        with pytest.raises(UsageError, match=f"process {child}"), files.atomic_write(tmp_path / "checkpoint.pth"):
            pytest.fail("written by both")
    assert (tmp_path / "checkpoint.pth").read_text() == "of the other"
    assert locks.lease(tmp_path / ".training.lock").pid == child  # which is not released by us
    bury(child)


def test_lock_that_was_lost_with_its_disk_is_renewed(tmp_path: Path) -> None:
    with files.lock_folder(tmp_path, "training"):
        (tmp_path / ".training.lock").unlink()
        with files.atomic_write(tmp_path / "checkpoint.pth") as temporary:
            temporary.write_text("saved")
        assert locks.lease(tmp_path / ".training.lock").pid == os.getpid()
        time.sleep(2 * locks.LEASE_DURATION)  # and its heart beats again
        assert locks.renew(files._held[tmp_path.resolve()])
    assert os.listdir(tmp_path) == ["checkpoint.pth"]


def test_folder_that_a_run_leaves_empty_is_removed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a mistake"), files.lock_folder(tmp_path / "a" / "b", "training"):
        raise UsageError("a mistake")
    assert os.listdir(tmp_path) == []
    (tmp_path / "mine").mkdir()
    with files.lock_folder(tmp_path / "mine", "training"):
        pass
    with files.lock_folder(tmp_path / "full", "training"):
        (tmp_path / "full" / "file").touch()
    assert sorted(os.listdir(tmp_path)) == ["full", "mine"]


def test_disk_that_fills_up_while_a_folder_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock has its file, and there is no room for another: nothing is left, and the folder is free."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(UsageError, match="No space left"), files.lock_folder(tmp_path / "a" / "b", "training"):
            pass
    assert os.listdir(tmp_path) == []
    with files.lock_folder(tmp_path / "a" / "b", "training"):
        pass


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    """Each has a temporary name of its own: the file is that of the last, whole."""
    path = tmp_path / "file"
    with files.atomic_write(path) as first, files.atomic_write(path) as second:
        first.write_text("one")
        second.write_text("two, longer")
    assert path.read_text() == "one"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("links", [True, False])
def test_new_files_take_no_name_that_is_taken(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of those that appear while they are written; on disks without links too."""
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "no links")))
    names = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    names[0].write_text("mine")

    def write(path: Path) -> None:
        path.write_text("new")
        names[1].write_text("mine too")

    assert files.write_new(names, write) == names[2]
    assert [path.read_text() for path in names] == ["mine", "mine too", "new"]
    with pytest.raises(FileExistsError):
        files.write_new(names, write)
    (tmp_path / "d").symlink_to("nowhere")
    with pytest.raises(FileExistsError):
        files.write_new([tmp_path / "d"], write)
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c", "d"]


def test_many_writers_of_new_files_all_get_one(tmp_path: Path) -> None:
    names = [tmp_path / str(number) for number in range(20)]
    writers = [
        threading.Thread(target=files.write_new, args=(names, lambda path, n=n: path.write_text(str(n))))
        for n in range(20)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(int(path.read_text()) for path in names) == list(range(20))
