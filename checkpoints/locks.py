"""File locks with a heartbeat, which are taken over from an owner that died.

    lock = lease(folder / ".training.lock")
    acquire(lock)       # waits; the callback `on_busy` may raise instead
    ...
    lock.release()

A lock is a file that names its owner's host and process (filelock's `SoftFileLease`), touched every `HEARTBEAT_INTERVAL` seconds. A
dead owner on this machine is detected at once, even if its process number is in use again. An owner elsewhere (another host or
container) counts as dead after `LEASE_DURATION` seconds without a heartbeat, by the clock of the waiting process. Unlike `flock`,
this works on every network file system.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from filelock import AcquireReturnProxy, SoftFileLease, Timeout

HEARTBEAT_INTERVAL = 5.0  # seconds
LEASE_DURATION = 60.0  # seconds without a heartbeat; must be the same for all processes
POLL_INTERVAL = 0.1  # seconds


def lease(path: Path) -> SoftFileLease:
    """Return the lock with file `path`, not acquired yet; it is shared by all threads of the process."""
    return SoftFileLease(
        path,
        lease_duration=LEASE_DURATION,
        heartbeat_interval=min(HEARTBEAT_INTERVAL, LEASE_DURATION / 4),
        thread_local=False,
    )


def acquire(lock: SoftFileLease, on_busy: Callable[[bool], None] | None = None) -> AcquireReturnProxy:
    """Wait until this process holds the lock.

    Args:
        on_busy: Called after each failed attempt, with whether there was a heartbeat since the first one; may raise.

    Returns:
        A context manager that releases the lock.

    Raises:
        OSError: The lock file cannot be written.
    """
    first = seen = _last_heartbeat(lock)
    since = time.monotonic()
    while True:
        with contextlib.suppress(Timeout):
            return lock.acquire(timeout=0)
        heartbeat = _last_heartbeat(lock)
        if heartbeat < 0:
            continue  # filelock 4.1 removes the lock of a dead owner in one attempt and acquires it in the next
        if heartbeat != seen:
            seen, since = heartbeat, time.monotonic()
        elif lock.owner is None and time.monotonic() - since > LEASE_DURATION:
            lock.force_break()  # the owner died before it wrote its name; filelock would wait forever
        if on_busy is not None:
            on_busy(seen != first)
        time.sleep(POLL_INTERVAL)


def has_live_local_owner(lock: SoftFileLease) -> bool:
    """Return whether the owner of a busy lock is a live process of this machine; stopped processes count as live."""
    owner = lock.owner
    probe = lease(Path(lock.lock_file).with_name(f".{uuid.uuid4().hex}.lock"))
    with probe:  # filelock's name of this host
        if owner is None or probe.owner is None or owner.hostname != probe.owner.hostname:
            return False
    with contextlib.suppress(OSError):  # no /proc outside Linux
        return Path(f"/proc/{owner.pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"  # zombie, dead
    return True


def describe_owner(lock: SoftFileLease) -> str:
    """Return process and host of a lock's owner, for messages."""
    owner = lock.owner
    return "an unknown process" if owner is None else f"process {owner.pid} on {owner.hostname.partition('?')[0]}"


def renew(lock: SoftFileLease) -> bool:
    """Renew a lock whose file or heartbeat was lost, and return whether this process still holds it.

    It does not if another process took it over because this one hung, or lost its disk, for longer than `LEASE_DURATION`.

    Raises:
        OSError: The lock file cannot be written.
    """
    if lock.owner is not None and not lock.is_lock_held_by_us:
        return False
    if lock.compromise is not None or lock.owner is None:
        os.stat(os.path.dirname(lock.lock_file))  # filelock would create a folder that has disappeared
        lock.release(force=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
    return True


def _last_heartbeat(lock: SoftFileLease) -> int:
    """Return the time of the last heartbeat by the file system's clock; -1 if there is no lock file."""
    try:
        return os.stat(lock.lock_file).st_mtime_ns
    except OSError:
        return -1
