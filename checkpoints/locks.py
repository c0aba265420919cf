"""Locks for one writer at a time: with a heartbeat, and taken over from an owner that died.

A lock is a file that names its owner's host and process, filelock's `SoftFileLease`. The owner touches it every `BEAT` seconds. A
dead owner on this machine gives way at once, also where its process number is in use again. Of one elsewhere (another host, another
container) nothing is known but its heartbeat: whoever wants the lock watches it for `ABANDONED_AFTER` seconds by its own clock.

    lock = lease(folder / ".training.lock")
    take(lock)          # waits; `give_up` may refuse instead
    ...
    lock.release()

Unlike locks of the kernel (`flock`) these work on every network disk, and can be looked at.

Origin: this project's own, on filelock.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from filelock import AcquireReturnProxy, SoftFileLease, Timeout

BEAT = 5.0  # seconds
ABANDONED_AFTER = 60.0  # seconds without a beat; the same for all who want a lock
POLL = 0.1  # seconds


def lease(path: Path) -> SoftFileLease:
    """Make the lock whose file is `path`; it is not taken yet, and counts for the process, whichever of its threads asks."""
    return SoftFileLease(
        path, lease_duration=ABANDONED_AFTER, heartbeat_interval=min(BEAT, ABANDONED_AFTER / 4), thread_local=False
    )


def take(lock: SoftFileLease, give_up: Callable[[bool], None] | None = None) -> AcquireReturnProxy:
    """Wait until this process holds the lock.

    Args:
        give_up: called after each failed try, with whether the owner's heartbeat was seen since the first one; may raise.

    Returns:
        a context manager that releases the lock.

    Raises:
        OSError: the lock file cannot be written.
    """
    first = seen = _last_beat(lock)
    since = time.monotonic()
    while True:
        with contextlib.suppress(Timeout):
            return lock.acquire(timeout=0)
        beat = _last_beat(lock)
        if beat < 0:
            continue  # removed: filelock 4.1 removes a dead owner's lock in one try and takes it in the next
        if beat != seen:
            seen, since = beat, time.monotonic()
        elif lock.owner is None and time.monotonic() - since > ABANDONED_AFTER:
            lock.force_break()  # its owner died before its name was on the disk, for which filelock would wait for ever
        if give_up is not None:
            give_up(seen != first)
        time.sleep(POLL)


def runs_here(lock: SoftFileLease) -> bool:
    """Whether the owner of a lock that could not be taken is a process of this machine that lives, be it stopped."""
    owner = lock.owner
    own = lease(Path(lock.lock_file).with_name(f".{uuid.uuid4().hex}.lock"))
    with own:
        if owner is None or own.owner is None or owner.hostname != own.owner.hostname:
            return False
    with contextlib.suppress(OSError):  # no /proc: not Linux
        return Path(f"/proc/{owner.pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"  # dead, not buried
    return True


def name_of_owner(lock: SoftFileLease) -> str:
    """The owner of a lock in words."""
    owner = lock.owner
    return (
        "a process without a name yet"
        if owner is None
        else f"process {owner.pid} on {owner.hostname.partition('?')[0]}"
    )


def hold_on(lock: SoftFileLease) -> bool:
    """See that a lock that was taken is this process's still, and renew it where its file or its heartbeat was lost.

    A process that hung, or whose disk was gone, for longer than `ABANDONED_AFTER` may find that another has it.

    Returns:
        whether it is.

    Raises:
        OSError: the disk refuses.
    """
    if lock.owner is not None and not lock.is_lock_held_by_us:
        return False
    if lock.compromise is not None or lock.owner is None:
        os.stat(os.path.dirname(lock.lock_file))  # filelock would make a folder that has vanished
        lock.release(force=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
    return True


def _last_beat(lock: SoftFileLease) -> int:
    """Of the lock's clock, which need not be ours."""
    try:
        return os.stat(lock.lock_file).st_mtime_ns
    except OSError:
        return -1
