"""Which process is missing when an exchange between processes fails: what gloo tells is an address, or that time is up.

Each process tells its number and host when it joins. When an exchange fails, each that is still there leaves a sign in the store
where they met, waits a moment for the others' signs, and knows the missing ones; the first of those that are there tells.

Origin: this project's own.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from typing import Any, NamedTuple

import torch.distributed as dist

ANSWER_WITHIN = 5.0  # seconds that the others have to leave their sign
GLOO = re.compile("gloo/transport/|pair closure|onnection closed by peer")  # in the errors of an exchange on a CPU
TIME_IS_UP = re.compile("timed out|timeout", re.IGNORECASE)


class _Group(NamedTuple):
    """What this process knows of all."""

    store: Any
    rank: int
    world: int
    minutes: float  # of --dist_timeout
    first: str  # who process 0 is, whose end may be that of the store


_group: _Group | None = None


def introduce(store: Any, rank: int, world: int, minutes: float) -> None:
    """Tell the others who this process is; all do so once, when they join. `minutes` are those of --dist_timeout."""
    global _group
    store.set(f"process {rank}", f"process {rank} of {world} (pid {os.getpid()} on {socket.gethostname()})")
    _group = _Group(store, rank, world, minutes, store.get("process 0").decode())


def explain(error: BaseException) -> str | None:
    """The sentence to tell instead of the traceback of a failed exchange: who is missing, and the likely cause.

    Returns:
        None where `error` is something else; an empty text where another process tells.
    """
    if _group is None or not (isinstance(error, dist.DistError) or GLOO.search(str(error))):
        return None
    missing: list[list[str]] = []
    asking = threading.Thread(target=lambda: missing.append(_missing(_group)), daemon=True)
    asking.start()
    asking.join(2 * ANSWER_WITHIN)  # a store on a host that is lost does not answer at all
    if missing and missing[0] == [_OTHER_TELLS]:
        return ""
    names = " and ".join(missing[0] if missing else [_group.first])
    again = "then start the same command again"
    if not names:
        reason = " ".join(str(error).split())[:300]
        return (
            f"an exchange between the processes failed although all are there ({reason}); see to the network, {again}"
        )
    if TIME_IS_UP.search(str(error)):
        return (
            f"{names} did not answer within the {_group.minutes:g} minutes of --dist_timeout: it is stopped or hangs; "
            f"see to it, or raise --dist_timeout, {again}"
        )
    return (
        f"{names} is gone: unless an error of its own is told, it was killed, most likely because memory ran out, or its node "
        f"was lost; see to that, {again}"
    )


_OTHER_TELLS = "another process tells"


def _missing(group: _Group) -> list[str]:
    """Leave a sign, and name the processes that do not; or only say that another one tells."""
    try:
        group.store.set(f"sign of {group.rank}", "here")
        deadline = time.monotonic() + ANSWER_WITHIN
        here = {group.rank}
        while len(here) < group.world and time.monotonic() < deadline:
            time.sleep(0.05)
            here |= {rank for rank in set(range(group.world)) - here if group.store.check([f"sign of {rank}"])}
        if min(here) < group.rank:
            return [_OTHER_TELLS]
        return [group.store.get(f"process {rank}").decode() for rank in range(group.world) if rank not in here]
    except RuntimeError:  # the store has gone with the process that held it
        return [group.first]
