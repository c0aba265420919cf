"""The worker processes of a loader: how many, and what ends them.

Origin: this project's own.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader


def usable_workers(wanted: int) -> int:
    """`wanted` loader workers, but not more than this process has cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(wanted, cores)


SENT_TO_ALL = {getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT") if hasattr(signal, name)}


class SteadyLoader(DataLoader[Any]):
    """A loader whose workers do not die of what a scheduler or a terminal sends to all processes of a run, which has yet to save.

    They are born with the signals blocked: one that came before they could say so would end them. A SIGTERM of the run itself,
    which comes at its end, still ends them at once. Without signal masks (Windows) or `sigwaitinfo` (macOS) any does.
    """

    def __init__(self, dataset: Any, **options: Any) -> None:
        super().__init__(dataset, worker_init_fn=_outlive_signals, **options)

    def __iter__(self) -> Any:
        """See `DataLoader`."""
        with _signals_blocked():
            return super().__iter__()


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes and threads that are started inside keep the signals blocked; here they come when it is left."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SENT_TO_ALL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _outlive_signals(_worker: int) -> None:
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_end_on_sigterm_of, args=(os.getppid(),), daemon=True).start()
    elif hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _end_on_sigterm_of(run: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != run:
        pass
    os._exit(0)
