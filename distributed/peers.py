"""Find out which process is missing when a collective operation fails; gloo reports an address or a timeout only.

Each process registers its rank and host when it joins. When a collective fails, each live process signs in the rendezvous store,
waits for the signatures of the others, and so learns which are missing; the live process with the lowest rank reports them.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from typing import Any, NamedTuple

import torch.distributed as dist

ANSWER_WITHIN = 5.0  # seconds to wait for the signatures of other processes
GLOO = re.compile("gloo/transport/|pair closure|onnection closed by peer")  # in errors of gloo collectives
TIMED_OUT = re.compile("timed out|timeout", re.IGNORECASE)


class _Group(NamedTuple):
    """The registered process group."""

    store: Any
    rank: int
    world: int
    minutes: float  # --dist_timeout
    first: str  # description of process 0, which may host the store


_group: _Group | None = None


def register(store: Any, rank: int, world: int, minutes: float) -> None:
    """Register this process with the others; all processes call this once. `minutes` is --dist_timeout."""
    global _group
    store.set(f"process {rank}", f"process {rank} of {world} (pid {os.getpid()} on {socket.gethostname()})")
    _group = _Group(store, rank, world, minutes, store.get("process 0").decode())


def explain(error: BaseException) -> str | None:
    """Describe a failed collective operation: which processes are missing, and the likely cause.

    Returns:
        The sentence to print instead of a traceback; None if `error` is something else, empty if another process reports it.
    """
    if _group is None or not (isinstance(error, dist.DistError) or GLOO.search(str(error))):
        return None
    missing: list[list[str]] = []
    query = threading.Thread(target=lambda: missing.append(_missing(_group)), daemon=True)
    query.start()
    query.join(2 * ANSWER_WITHIN)  # a store on a lost host does not answer
    if missing and missing[0] == [_REPORTED_BY_OTHER]:
        return ""
    names = " and ".join(missing[0] if missing else [_group.first])
    again = "then repeat the command"
    if not names:
        reason = " ".join(str(error).split())[:300]
        return f"a collective operation failed although all processes are alive ({reason}); check the network, {again}"
    if TIMED_OUT.search(str(error)):
        return (
            f"{names} did not answer within the {_group.minutes:g} minutes of --dist_timeout: it is suspended or hangs; "
            f"check it, or raise --dist_timeout, {again}"
        )
    return (
        f"{names} is gone: unless it has printed an error, it was killed, most likely because memory ran out, or its node "
        f"was lost; fix that, {again}"
    )


_REPORTED_BY_OTHER = "reported by another process"


def _missing(group: _Group) -> list[str]:
    """Sign, and return the processes that do not; or `_REPORTED_BY_OTHER` if a live process has a lower rank."""
    try:
        group.store.set(f"signature of {group.rank}", "here")
        deadline = time.monotonic() + ANSWER_WITHIN
        here = {group.rank}
        while len(here) < group.world and time.monotonic() < deadline:
            time.sleep(0.05)
            here |= {rank for rank in set(range(group.world)) - here if group.store.check([f"signature of {rank}"])}
        if min(here) < group.rank:
            return [_REPORTED_BY_OTHER]
        return [group.store.get(f"process {rank}").decode() for rank in range(group.world) if rank not in here]
    except RuntimeError:  # the process that hosted the store is gone
        return [group.first]
