"""Signals that ask a run to end: which they are, with which code it then ends, and how processes tell each other.

Origin: this project's own.
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

# Schedulers ask with the first two; a run that has saved itself then is done. A closed terminal and Ctrl-C give the shell's codes.
CODES = {getattr(signal, name): code
         for name, code in (("SIGTERM", 0), ("SIGUSR1", 0), ("SIGHUP", 129), ("SIGINT", 130)) if hasattr(signal, name)}  # fmt: skip
# What a process adds to the sum of all for a code; fewer than 4096 processes of one never make up another.
VOTES = {0: 1.0, 129: 2.0**12, 130: 2.0**24}

Handler = Callable[[int, FrameType | None], None]
Self = TypeVar("Self", bound="StopVote")


@contextlib.contextmanager
def handling(handler: Handler) -> Iterator[None]:
    """Let `handler` take the signals in the block; those that are ignored stay so: `nohup`, the background of a script."""
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
def ending_at_once(words: Callable[[], str]) -> Iterator[None]:
    """A signal in the block ends this process at once, in a sentence whose second half `words` gives."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise Stopped(f"stopped by a signal {words()}", CODES[number])

    with handling(end):
        yield


class StopVote:
    """As a context it takes the signals, which then ask for an end instead of ending the process; the second Ctrl-C ends it.

    Args:
        then: what follows the step at hand, in words.

    Attributes:
        asked: this process was, by how much its vote says; 0 where it was not.
    """

    def __init__(self, then: str = "ending") -> None:
        self.asked = 0.0
        self._then = then
        self._handling: contextlib.AbstractContextManager[None] = contextlib.nullcontext()

    def __enter__(self: Self) -> Self:
        self._handling = handling(self._ask)
        self._handling.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._handling.__exit__(None, None, None)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        self.asked = max(self.asked, VOTES[CODES[number]])
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # also where the process waits for others, in no Python code
            if is_main_process():
                os.write(2, f"\nfinishing this step, then {self._then}; Ctrl-C again ends at once\n".encode())

    def wishes(self) -> list[float]:
        """This process's: to end the run. What all processes wish is the sum, in which other numbers travel too."""
        return [self.asked]


def code_of(votes: float) -> int:
    """The exit code that the sum of all processes' wishes asks for."""
    return max(code for code, vote in VOTES.items() if votes >= vote)
