"""TODO."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import datetime
import os
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist

from distributed import peers
from distributed.collectives import get_rank, is_distributed
from utils import Stopped, UsageError, keep_freed_memory, lack_of_memory, resolve_device

INTERRUPTED = 130  # the shell's code for a program that Ctrl-C ended


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`; an error that was foreseen becomes one line on stderr.

    Exit code 2 for a `UsageError` and for sizes that the memory does not hold, 1 for a training that diverged
    (`FloatingPointError`) and for any other error, 130 for a Ctrl-C that nothing else takes, and that of `Stopped`.
    """
    code = 0
    try:
        code = _code_of(main)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the second ends the process at once
        _say("interrupted; nothing that was not told to be written is kept")
        code = INTERRUPTED
    if is_distributed():
        _leave_group(code)
    if code:
        sys.exit(code)


def _code_of(main: Callable[[], None]) -> int:
    """The exit code after `main`, which has told why where it is not 0."""
    try:
        main()
    except Stopped as end:
        _say(str(end))
        return end.code
    except Exception as error:
        foreseen = error if isinstance(error, UsageError | FloatingPointError) else lack_of_memory(error)
        if foreseen is None and not is_distributed():
            raise
        sentence = peers.explain(error) if foreseen is None else str(foreseen)
        if sentence is None:
            traceback.print_exc()
        elif sentence:
            rank = f" (process {get_rank()})" if get_rank() and foreseen else ""
            print(f"{Path(sys.argv[0]).name}: error{rank}: {sentence}", file=sys.stderr)
        return 2 if isinstance(foreseen, UsageError) else 1
    return 0


def _say(sentence: str) -> None:
    """The main process's last words."""
    if sentence and process_info().rank == 0:
        print(sentence, file=sys.stderr)


@contextlib.contextmanager
def telling_interrupt(words: Callable[[], str]) -> Iterator[None]:
    """Ctrl-C in the block ends the program in a sentence whose second half `words` gives.

    Raises:
        Stopped: so it was.
    """
    try:
        yield
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise Stopped(f"interrupted {words()}", INTERRUPTED) from None


def _leave_group(code: int) -> NoReturn:
    """End a process of a group with this exit code, by way of its atexit handlers but without Python's finalization.

    A thread of gloo gives up the tensors of an exchange shortly after the main thread has got them, and needs the interpreter's
    lock for that. One that waits for it when the interpreter finalizes is ended by Python (before 3.14) inside a destructor, which
    aborts a process that was done: "terminate called without an active exception". `destroy_process_group` waits for these threads
    only if nothing else holds the group; meshes of FSDP do.

    After an error the group is not destroyed: others may not come to an exchange that is under way, and see at once that this
    process is gone.
    """
    if code == 0:
        dist.destroy_process_group()
    atexit._run_exitfuncs()  # of loader workers, temporary folders, logging
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it
            stream.flush()
    os._exit(code)


# --------------------------------------------------------------------------- processes


class ProcessInfo(NamedTuple):
    """Which of how many processes this is, and which one on its machine."""

    rank: int
    world: int
    local_rank: int


# What launchers call them, in the order they are looked for: mpirun may use srun to start itself, torchrun stands under both.
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # and torch.distributed.launch
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "MPICH or Intel MPI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
}


def process_info(local_rank: int | None = None) -> ProcessInfo:
    """What the launcher's environment says; one process without a launcher, and in a batch script that calls python itself.

    Args:
        local_rank: that of old launchers' command lines, which torchrun's LOCAL_RANK overrules.

    Raises:
        UsageError: variables that hold no numbers, or a rank that the world has not.
    """
    env = os.environ
    for launcher, names in LAUNCHERS.items():
        # Scripts that set RANK themselves forget LOCAL_RANK.
        last = str(local_rank or 0) if launcher == "torchrun" else ""
        texts = [env.get(names[0], ""), env.get(names[1], ""), env.get(names[2], last)]
        if not all(texts):
            continue
        said = ", ".join(f"{name}={text}" for name, text in zip(names, texts))
        if not all(text.isdecimal() for text in texts):
            raise UsageError(f"{said} are not all whole numbers; set them as {launcher} does, or unset them")
        place = ProcessInfo(*map(int, texts))
        if not max(place.rank, place.local_rank) < place.world:
            raise UsageError(f"{said} do not fit: ranks count from 0 to {place.world - 1}")
        if place.world > 1 or launcher == "torchrun":
            return place
    return ProcessInfo(0, 1, local_rank or 0)


def init_processes(args: argparse.Namespace) -> torch.device:
    """Join the process group that the launcher describes (see `LAUNCHERS`), if any, and return this process's device.

    Launchers other than torchrun do not say where the processes meet: MASTER_ADDR and MASTER_PORT must be set. The backend is
    nccl for tensors on CUDA and gloo for others. When a process dies, gloo's others notice at once that its socket is closed;
    nccl's are ended by the launcher, or without one after --dist_timeout by torch's watchdog.

    Raises:
        UsageError: no such device, fewer GPUs than processes on this machine, no meeting place, or processes that did not come.
    """
    rank, world, local_rank = process_info(args.local_rank)
    if not 0 < args.dist_timeout < float("inf"):
        raise UsageError(f"--dist_timeout {args.dist_timeout} must be minutes above 0")
    absent = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if world > 1 and args.dist_url == "env://" and absent:
        raise UsageError(
            f"{world} processes need a place to meet: set MASTER_ADDR to the host of process 0 and MASTER_PORT to a free port "
            f"there ({' and '.join(absent)} not set), or pass --dist_url"
        )
    device = resolve_device(args.device, local_rank)
    if device.type == "cpu":
        keep_freed_memory()
    if world > 1 and (device.type == "mps" or ":" in args.device):
        raise UsageError(
            f"--device {args.device} is one device, {world} processes need one each; use --device auto, cuda or cpu"
        )
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        timeout = datetime.timedelta(minutes=args.dist_timeout)
        try:
            met = next(dist.rendezvous(args.dist_url, rank, world, timeout=timeout))  # type: ignore[attr-defined]
            store = met[0]
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                store = _unread_part(store, rank, world, timeout)
            dist.init_process_group(backend, store=store, world_size=world, rank=rank, timeout=timeout)
            peers.introduce(store, rank, world, args.dist_timeout)
        except dist.DistError as error:
            env = os.environ
            where = f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}" if args.dist_url == "env://" else args.dist_url
            raise UsageError(
                f"process {rank} of {world} did not meet all others at {where} within {args.dist_timeout:g} minutes "
                f"({str(error).splitlines()[0]}); start as many as were announced, where that host can be reached"
            ) from error
    return device


def _unread_part(store: Any, rank: int, world: int, timeout: datetime.timedelta) -> Any:
    """A part of `store` for this start alone: torchrun's outlives workers, and restarted ones would call the dead.

    How often torchrun has restarted differs between its nodes, so the processes agree by themselves. Each says a new word, process
    0 answers it with the name of the part, and is done when all have taken that over: what the dead wrote fits none of it.

    Raises:
        dist.DistStoreError: the others did not come in time.
    """
    deadline = time.monotonic() + timeout.total_seconds()

    def read(key: str) -> str:
        return str(store.get(key).decode()) if store.check([key]) else ""

    def wait_until(done: Callable[[], bool]) -> None:
        while not done():
            if time.monotonic() > deadline:
                raise dist.DistStoreError("some process of this start did not answer")
            time.sleep(0.01)

    def taken_by(other: int) -> bool:
        store.set(f"answer to {other}", read(f"word of {other}") + word)
        return read(f"taken by {other}") == word

    part = word = uuid.uuid4().hex
    if rank == 0:
        for other in range(1, world):
            wait_until(lambda other=other: taken_by(other))  # type: ignore[misc]
    else:
        store.set(f"word of {rank}", word)
        wait_until(lambda: read(f"answer to {rank}").startswith(word))
        part = read(f"answer to {rank}").removeprefix(word)
        store.set(f"taken by {rank}", part)
    return dist.PrefixStore(part, store)  # type: ignore[attr-defined]
