"""Worker processes of a data loader: their number, and how they react to signals."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader

# Sent by schedulers and terminals to all processes of a job.
GROUP_SIGNALS = {getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT") if hasattr(signal, name)}


def usable_workers(wanted: int) -> int:
    """Return `wanted`, limited to the number of CPU cores available to this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(wanted, cores)


class SignalSafeLoader(DataLoader[Any]):
    """A data loader whose workers ignore the signals that a scheduler or terminal sends to all processes of a job.

    The main process handles them by saving a checkpoint, for which it needs the workers. They start with the signals blocked,
    and exit on a SIGTERM only if it comes from the main process. On systems without signal masks (Windows) or `sigwaitinfo`
    (macOS) any SIGTERM ends them.
    """

    def __init__(self, dataset: Any, **options: Any) -> None:
        super().__init__(dataset, worker_init_fn=_init_worker, **options)

    def __iter__(self) -> Any:
        with _signals_blocked():
            return super().__iter__()


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block signals for this block and for the processes and threads started in it; this process gets them afterwards."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _init_worker(_worker: int) -> None:
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_exit_on_sigterm_from, args=(os.getppid(),), daemon=True).start()
    elif hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _exit_on_sigterm_from(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
