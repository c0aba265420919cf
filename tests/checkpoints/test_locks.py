"""Folder locks: live owners keep them, dead owners lose them; atomic writes and new files."""

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
from utils import UsageError, setup_logging

HELD: list[object] = []


@pytest.fixture(autouse=True)
def _short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "LEASE_DURATION", 1.0)
    monkeypatch.setattr(locks, "POLL_INTERVAL", 0.02)


def forked(act: Callable[[], None]) -> int:
    """Fork a child that calls `act` and then sleeps; return when it has acted."""
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
    """A process that has locked `tmp_path`."""
    child = forked(lambda: hold(tmp_path))
    yield child
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_second_run_is_rejected_with_process_host_and_time(tmp_path: Path, owner: int) -> None:
    """A stopped owner counts as live."""
    for number in (signal.SIGCONT, signal.SIGSTOP):
        os.kill(owner, number)
        with pytest.raises(UsageError) as refused, files.lock_folder(tmp_path, "training"):
            pytest.fail("two owners")
        for part in (
            f"--output_dir {tmp_path}",
            f"process {owner}",
            socket.gethostname(),
            f"since {time.localtime().tm_year}-",
        ):
            assert part in str(refused.value)
    os.kill(owner, signal.SIGCONT)
    with files.lock_folder(tmp_path, "masks"):  # other files
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            ".masks.lock",
            ".masks.since",
            ".training.lock",
            ".training.since",
        ]


def test_dead_owner_gives_way_at_once_and_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    child = forked(lambda: hold(tmp_path))
    kill(child)
    begun = time.monotonic()
    with files.lock_folder(tmp_path, "training"):
        assert time.monotonic() - begun < locks.LEASE_DURATION / 2
        assert locks.lease(tmp_path / ".training.lock").pid == os.getpid()
    assert capsys.readouterr().err.count(f"process {child} on") == 1
    assert os.listdir(tmp_path) == []


def test_reused_process_number_of_a_dead_owner(tmp_path: Path) -> None:
    """The lock records the start of the process: low numbers are reused after a restart of a machine or container."""
    child = forked(lambda: hold(tmp_path))
    kill(child)
    marker = tmp_path / ".training.lock"
    marker.write_text(marker.read_text().replace(f"pid={child}\n", f"pid={os.getppid()}\n"))
    with files.lock_folder(tmp_path, "training"):
        assert locks.lease(marker).pid == os.getpid()


def test_zombie_is_dead(tmp_path: Path) -> None:
    """Some containers do not reap orphans."""
    child = forked(lambda: hold(tmp_path))
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    with files.lock_folder(tmp_path, "training"):
        assert locks.lease(tmp_path / ".training.lock").pid == os.getpid()
    os.waitpid(child, 0)


@pytest.mark.parametrize("alive", [True, False])
def test_owner_on_another_host_is_dead_without_heartbeat(
    tmp_path: Path, alive: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As long as a lock says: if it is touched, its owner lives."""
    setup_logging()
    with monkeypatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: "elsewhere")
        child = forked(lambda: hold(tmp_path))
    if not alive:
        kill(child)
    begun = time.monotonic()
    if alive:
        with pytest.raises(UsageError, match=f"process {child} on elsewhere"), files.lock_folder(tmp_path, "training"):
            pytest.fail("two owners")
        assert time.monotonic() - begun < locks.LEASE_DURATION
        kill(child)
    else:
        with files.lock_folder(tmp_path, "training"):
            assert time.monotonic() - begun >= locks.LEASE_DURATION
            assert locks.lease(tmp_path / ".training.lock").pid == os.getpid()
        assert f"process {child} on elsewhere" in capsys.readouterr().err


def test_owner_that_died_before_it_wrote_its_name(tmp_path: Path) -> None:
    (tmp_path / ".training.lock").touch()
    with files.lock_folder(tmp_path, "training"):
        assert locks.lease(tmp_path / ".training.lock").pid == os.getpid()


def test_run_that_lost_its_lock_writes_nothing_more(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pth").write_text("of the other")
    with files.lock_folder(tmp_path, "training"):
        (tmp_path / ".training.lock").unlink()
        child = forked(lambda: hold(tmp_path))
        with pytest.raises(UsageError, match=f"process {child}"), files.atomic_write(tmp_path / "checkpoint.pth"):
            pytest.fail("written by both")
    assert (tmp_path / "checkpoint.pth").read_text() == "of the other"
    assert locks.lease(tmp_path / ".training.lock").pid == child  # not released by this process
    kill(child)


def test_lock_whose_file_was_lost_is_renewed(tmp_path: Path) -> None:
    with files.lock_folder(tmp_path, "training"):
        (tmp_path / ".training.lock").unlink()
        with files.atomic_write(tmp_path / "checkpoint.pth") as temporary:
            temporary.write_text("saved")
        assert locks.lease(tmp_path / ".training.lock").pid == os.getpid()
        time.sleep(2 * locks.LEASE_DURATION)  # the heartbeat works again
        assert locks.renew(files._held[tmp_path.resolve()])
    assert os.listdir(tmp_path) == ["checkpoint.pth"]


def test_created_folder_is_removed_if_it_stays_empty(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a mistake"), files.lock_folder(tmp_path / "a" / "b", "training"):
        raise UsageError("a mistake")
    assert os.listdir(tmp_path) == []
    (tmp_path / "mine").mkdir()
    with files.lock_folder(tmp_path / "mine", "training"):
        pass
    with files.lock_folder(tmp_path / "full", "training"):
        (tmp_path / "full" / "file").touch()
    assert sorted(os.listdir(tmp_path)) == ["full", "mine"]


def test_disk_that_fills_up_while_a_folder_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock file exists and nothing else can be written: nothing is left behind, and the folder is unlocked."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(UsageError, match="No space left"), files.lock_folder(tmp_path / "a" / "b", "training"):
            pass
    assert os.listdir(tmp_path) == []
    with files.lock_folder(tmp_path / "a" / "b", "training"):
        pass


def test_concurrent_writers_use_separate_temporary_files(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with files.atomic_write(path) as first, files.atomic_write(path) as second:
        first.write_text("one")
        second.write_text("two, longer")
    assert path.read_text() == "one"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("links", [True, False])
def test_new_files_overwrite_nothing(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even files that are created meanwhile; also on file systems without hard links."""
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


def test_concurrent_writers_of_new_files_get_one_each(tmp_path: Path) -> None:
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
