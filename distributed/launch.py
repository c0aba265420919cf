"""Launch: run a script's main function, and join the process group of torchrun, srun or mpirun.

Origin: the environment variables are those of torchrun, SLURM, Open MPI, MPICH and Intel MPI.
"""

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

INTERRUPTED = 130  # the shell's exit code after Ctrl-C


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main` and exit; an expected error is one line on stderr.

    Exit codes: 2 for a `UsageError` or insufficient memory, 1 for a diverged training (`FloatingPointError`) or any other error,
    130 for an unhandled Ctrl-C, and the code of `Stopped`.
    """
    code = 0
    try:
        code = _exit_code(main)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the process at once
        _print_on_main("interrupted; only files that were reported as written are kept")
        code = INTERRUPTED
    if is_distributed():
        _leave_group(code)
    if code:
        sys.exit(code)


def _exit_code(main: Callable[[], None]) -> int:
    """Run `main` and return the exit code, after printing the reason if it is not 0."""
    try:
        main()
    except Stopped as end:
        _print_on_main(str(end))
        return end.code
    except Exception as error:
        expected = error if isinstance(error, UsageError | FloatingPointError) else lack_of_memory(error)
        if expected is None and not is_distributed():
            raise
        sentence = peers.explain(error) if expected is None else str(expected)
        if sentence is None:
            traceback.print_exc()
        elif sentence:
            rank = f" (process {get_rank()})" if get_rank() and expected else ""
            # One write, unlike print: with PYTHONUNBUFFERED the lines of two processes would otherwise interleave.
            sys.stderr.write(f"{Path(sys.argv[0]).name}: error{rank}: {sentence}\n")
        return 2 if isinstance(expected, UsageError) else 1
    return 0


def _print_on_main(sentence: str) -> None:
    if sentence and process_info().rank == 0:
        print(sentence, file=sys.stderr)


@contextlib.contextmanager
def stop_on_interrupt(message: Callable[[], str]) -> Iterator[None]:
    """Raise `Stopped` with `message()` on Ctrl-C inside the block."""
    try:
        yield
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise Stopped(f"interrupted {message()}", INTERRUPTED) from None


def _leave_group(code: int) -> NoReturn:
    """Exit a process of a group: run the atexit handlers, but skip the interpreter's finalization.

    A gloo thread releases the tensors of a collective, under the GIL, shortly after the main thread has received them. If it still
    waits for the GIL at finalization, Python (before 3.14) ends it inside a destructor, which aborts a finished process:
    "terminate called without an active exception". `destroy_process_group` joins these threads only if nothing else holds the
    group, as the device meshes of FSDP do.

    After an error the group is not destroyed: the other processes then notice at once that this one is gone.
    """
    if code == 0:
        dist.destroy_process_group()
    atexit._run_exitfuncs()  # loader workers, temporary folders, logging
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or a broken pipe
            stream.flush()
    os._exit(code)


# --------------------------------------------------------------------------- processes


class ProcessInfo(NamedTuple):
    """Rank, world size and local rank of this process."""

    rank: int
    world: int
    local_rank: int


# Environment variables by launcher, in order of precedence: torchrun may be started by mpirun, which may be started by srun.
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # and torch.distributed.launch
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "MPICH or Intel MPI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
}


def process_info(local_rank: int | None = None) -> ProcessInfo:
    """Read the launcher's environment variables; without a launcher, or in a batch script that calls python, it is one process.

    Args:
        local_rank: Value of --local_rank, set by old launchers; LOCAL_RANK takes precedence.

    Raises:
        UsageError: The variables are not integers, or a rank is not below the world size.
    """
    env = os.environ
    for launcher, names in LAUNCHERS.items():
        # Scripts that set RANK themselves often omit LOCAL_RANK.
        last = str(local_rank or 0) if launcher == "torchrun" else ""
        texts = [env.get(names[0], ""), env.get(names[1], ""), env.get(names[2], last)]
        if not all(texts):
            continue
        given = ", ".join(f"{name}={text}" for name, text in zip(names, texts))
        if not all(text.isdecimal() for text in texts):
            raise UsageError(f"{given} must be integers; set them as {launcher} does, or unset them")
        info = ProcessInfo(*map(int, texts))
        if not max(info.rank, info.local_rank) < info.world:
            raise UsageError(f"{given} do not fit: ranks count from 0 to {info.world - 1}")
        if info.world > 1 or launcher == "torchrun":
            return info
    return ProcessInfo(0, 1, local_rank or 0)


def init_processes(args: argparse.Namespace) -> torch.device:
    """Join the launcher's process group, if any, and return the device of this process.

    With launchers other than torchrun, MASTER_ADDR and MASTER_PORT must be set. The backend is nccl for CUDA tensors and gloo for
    CPU tensors. When a process dies, the others notice at once through gloo; with nccl the launcher ends them, or torch's watchdog
    after --dist_timeout.

    Raises:
        UsageError: The device is missing, there are fewer GPUs than local processes, or the rendezvous is not given or failed.
    """
    rank, world, local_rank = process_info(args.local_rank)
    if not 0 < args.dist_timeout < float("inf"):
        raise UsageError(f"--dist_timeout {args.dist_timeout} must be a positive number of minutes")
    absent = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if world > 1 and args.dist_url == "env://" and absent:
        raise UsageError(
            f"{world} processes need a rendezvous: set MASTER_ADDR to the host of process 0 and MASTER_PORT to a free port "
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
            rendezvous = next(dist.rendezvous(args.dist_url, rank, world, timeout=timeout))  # type: ignore[attr-defined]
            store = rendezvous[0]
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                store = _fresh_store(store, rank, world, timeout)
            dist.init_process_group(backend, store=store, world_size=world, rank=rank, timeout=timeout)
            peers.register(store, rank, world, args.dist_timeout)
        except dist.DistError as error:
            env = os.environ
            where = f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}" if args.dist_url == "env://" else args.dist_url
            raise UsageError(
                f"process {rank} of {world} did not reach all others at {where} within {args.dist_timeout:g} minutes "
                f"({str(error).splitlines()[0]}); start {world} processes, on hosts that can reach that address"
            ) from error
    return device


def _fresh_store(store: Any, rank: int, world: int, timeout: datetime.timedelta) -> Any:
    """Return a prefix store for this start alone: torchrun's store outlives its workers, and a restarted one would read stale keys.

    The number of restarts may differ between nodes, so the processes agree on a prefix themselves: each writes a random token,
    process 0 answers it with the prefix, and finishes when all have confirmed. Stale keys match none of the tokens.

    Raises:
        dist.DistStoreError: Some process did not answer in time.
    """
    deadline = time.monotonic() + timeout.total_seconds()

    def read(key: str) -> str:
        return str(store.get(key).decode()) if store.check([key]) else ""

    def wait_until(done: Callable[[], bool]) -> None:
        while not done():
            if time.monotonic() > deadline:
                raise dist.DistStoreError("some process of this start did not answer")
            time.sleep(0.01)

    def confirmed_by(other: int) -> bool:
        store.set(f"answer to {other}", read(f"token of {other}") + token)
        return read(f"confirmed by {other}") == token

    prefix = token = uuid.uuid4().hex
    if rank == 0:
        for other in range(1, world):
            wait_until(lambda other=other: confirmed_by(other))  # type: ignore[misc]
    else:
        store.set(f"token of {rank}", token)
        wait_until(lambda: read(f"answer to {rank}").startswith(token))
        prefix = read(f"answer to {rank}").removeprefix(token)
        store.set(f"confirmed by {rank}", prefix)
    return dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]
