"""Graceful stop: signals, exit codes, and the votes by which all ranks stop at the same step.

SIGTERM, SIGUSR1, SIGHUP and Ctrl-C let the current step finish; the run is then saved (training/checkpointing.py) and exits.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TypeVar

from distributed.collectives import is_main_process
from utils import Stopped

# Exit codes by signal. Schedulers send the first two, and a run that has saved itself has then succeeded; a closed terminal and
# Ctrl-C exit with the shell's codes.
CODES = {getattr(signal, name): code
         for name, code in (("SIGTERM", 0), ("SIGUSR1", 0), ("SIGHUP", 129), ("SIGINT", 130)) if hasattr(signal, name)}  # fmt: skip
# Vote of one process by exit code; the sum over fewer than 4096 processes still tells the codes apart.
VOTES = {0: 1.0, 129: 2.0**12, 130: 2.0**24}

Handler = Callable[[int, FrameType | None], None]
Self = TypeVar("Self", bound="StopSignals")


@contextlib.contextmanager
def handling(handler: Handler) -> Iterator[None]:
    """Install `handler` for the stop signals inside the block; signals that are ignored (`nohup`) stay ignored."""
    before = {number: signal.getsignal(number) for number in CODES}
    for number, old in before.items():
        if old != signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)


@contextlib.contextmanager
def stop_at_once(message: Callable[[], str]) -> Iterator[None]:
    """Raise `Stopped` with `message()` when a signal arrives inside the block."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise Stopped(f"stopped by a signal {message()}", CODES[number])

    with handling(stop):
        yield


class StopSignals:
    """Context manager that turns stop signals into votes; a second Ctrl-C ends the process at once.

    Args:
        then: Action after the current step, for the message that Ctrl-C prints.
    """

    def __init__(self, then: str = "stopping") -> None:
        self.vote = 0.0
        self._then = then
        self._handling: contextlib.AbstractContextManager[None] = contextlib.nullcontext()

    def __enter__(self: Self) -> Self:
        self._handling = handling(self._receive)
        self._handling.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._handling.__exit__(None, None, None)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.vote = max(self.vote, VOTES[CODES[number]])
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # works also while the process waits inside a collective
            if is_main_process():
                os.write(2, f"\nfinishing this step, then {self._then}; Ctrl-C again ends at once\n".encode())

    def votes(self) -> list[float]:
        """Return the votes of this process, to be summed over all processes: to stop."""
        return [self.vote]


def exit_code(stop_votes: float) -> int:
    """Return the exit code for a positive sum of stop votes."""
    return max(code for code, vote in VOTES.items() if stop_votes >= vote)
