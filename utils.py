"""Processes and devices, precision, seeding, logging: nothing about models, images or files.

Every helper for several processes falls through when there is only one, so callers never ask.
Origin: the launch conventions are those of torchrun, SLURM and MPI; the division of labour follows DINO's utils.py.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import ctypes
import datetime
import io
import logging
import os
import random
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
import torch.distributed as dist

import peers

logger = logging.getLogger("esvit")

INTERRUPTED = 130  # the shell's code for a program that Ctrl-C ended
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt(3)


class UsageError(ValueError):
    """A mistake of the person who started the program, told in one sentence that names the remedy."""


class Stopped(BaseException):
    """The end that somebody asked a run for, told in one sentence; no error, and nothing that an `except Exception` should see.

    `code` is the exit code: 0 where nothing is lost and it was a scheduler who asked.
    """

    def __init__(self, sentence: str = "", code: int = 0) -> None:
        super().__init__(sentence)
        self.code = code


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


def lack_of_memory(error: Exception) -> UsageError | None:
    """An error of Python, numpy or torch in words, if it says that there is not enough memory."""
    words = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")
    lacking = isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in words)
    )
    reason = (str(error).splitlines() or [""])[0] or type(error).__name__
    remedy = "lower the batch size, the crops or the network's sizes, or use more processes"
    return UsageError(f"not enough memory ({reason}); {remedy}") if lacking else None


def _say(sentence: str) -> None:
    """The main process's last words."""
    if sentence and place_of_process().rank == 0:
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
    """End a process of a group with this exit code, by way of its atexit handlers but without Python's finalisation.

    A thread of gloo gives up the tensors of an exchange shortly after the main thread has got them, and needs the interpreter's
    lock for that. One that waits for it when the interpreter finalises is ended by Python (before 3.14) inside a destructor, which
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


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """A `UsageError` that one process meets inside the block is raised by all of them, so that none waits for the others.

    The block must hold no collective operation.

    Raises:
        UsageError: that of the first process, by rank, that met one.
    """
    message = None
    try:
        yield
    except UsageError as error:
        message = str(error)
    first = next((m for m in all_gather_objects(message) if m is not None), None)
    if first is not None:
        raise UsageError(first)


def must_agree(what: str, value: Any) -> None:
    """Stop on all processes unless they see the same `value`.

    Raises:
        UsageError: naming `what` and the values.
    """
    values = all_gather_objects(value)
    if any(other != values[0] for other in values):
        raise UsageError(
            f"the processes see different {what} ({values}); put --data_path and --output_dir on a disk they share"
        )


# --------------------------------------------------------------------------- devices and precision


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """The torch device for `name`; `auto` prefers CUDA, then MPS, then the CPU.

    Raises:
        UsageError: the device is unknown or not present on this machine.
    """
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
        else:
            name = "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"unknown device '{name}'; choose auto, cuda, cuda:N, mps or cpu") from None
    if device.type not in {"cpu", "cuda", "mps"}:
        raise UsageError(f"device '{name}' is not supported; choose auto, cuda, cuda:N, mps or cpu")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = local_rank if device.index is None else device.index
        if index >= count:
            here = counted(count, "CUDA device is", "CUDA devices are")
            raise UsageError(f"device '{name}' (index {index}) is not here, {here}; try --device cpu")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("device 'mps' is not here; try --device auto")
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """The precision that `auto` stands for: bf16 where the device computes in it, fp16 on older GPUs, else fp32.

    Raises:
        UsageError: an unknown name, or fp16 without a CUDA device (its gradient scaling needs one).
    """
    if name not in PRECISIONS:
        raise UsageError(f"unknown precision '{name}'; choose one of {', '.join(PRECISIONS)}")
    if name == "fp16" and device.type != "cuda":
        raise UsageError(f"--precision fp16 needs a CUDA device, this run is on {device.type}; choose bf16 or fp32")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu" and _cpu_multiplies_bf16():
        return "bf16"
    return "fp32"


def keep_freed_memory() -> None:
    """Let memory that tensors on a CPU leave be used by the next ones, where the C library is glibc.

    By default it gives large blocks back at once and takes new ones for the next tensor, whose every page the system then clears.
    In a step, where tensors of many megabytes live for a moment, that takes longer than what is computed on them. It settles within
    a few steps; what the process holds stays what it held at its peak.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _cpu_multiplies_bf16() -> bool:
    """Whether the processor has matrix instructions for bf16 (AMX); emulation would be slower than fp32."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """The autocast context of a resolved precision; fp32 gives one that does nothing."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MiB so far: allocated on a GPU, else the resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


# --------------------------------------------------------------------------- processes


class Place(NamedTuple):
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


def place_of_process(local_rank: int | None = None) -> Place:
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
        place = Place(*map(int, texts))
        if not max(place.rank, place.local_rank) < place.world:
            raise UsageError(f"{said} do not fit: ranks count from 0 to {place.world - 1}")
        if place.world > 1 or launcher == "torchrun":
            return place
    return Place(0, 1, local_rank or 0)


def init_processes(args: argparse.Namespace) -> torch.device:
    """Join the process group that the launcher describes (see `LAUNCHERS`), if any, and return this process's device.

    Launchers other than torchrun do not say where the processes meet: MASTER_ADDR and MASTER_PORT must be set. The backend is
    nccl for tensors on CUDA and gloo for others. When a process dies, gloo's others notice at once that its socket is closed;
    nccl's are ended by the launcher, or without one after --dist_timeout by torch's watchdog.

    Raises:
        UsageError: no such device, fewer GPUs than processes on this machine, no meeting place, or processes that did not come.
    """
    rank, world, local_rank = place_of_process(args.local_rank)
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


def is_distributed() -> bool:
    """Whether this process belongs to a group."""
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    """This process's rank, 0 without a group."""
    return dist.get_rank() if is_distributed() else 0


def get_world_size() -> int:
    """The number of processes, 1 without a group."""
    return dist.get_world_size() if is_distributed() else 1


def is_main_process() -> bool:
    """Whether this process prints and writes."""
    return get_rank() == 0


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over all processes, in place; returns it."""
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def start_all_reduce_sum(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Begin to sum `tensor` over all processes, in place; returns what waits for the sum and gives it.

    On CUDA it is the device that waits, not the host.
    """
    work = dist.all_reduce(tensor, async_op=True) if is_distributed() else None

    def wait() -> torch.Tensor:
        if work is not None:
            work.wait()
        return tensor

    return wait


def all_gather_objects(value: Any) -> list[Any]:
    """`value` of every process, in rank order, on every process."""
    if not is_distributed():
        return [value]
    gathered: list[Any] = [None] * get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def all_gather_rows(rows: torch.Tensor) -> list[torch.Tensor]:
    """`rows` (n_r, ...) of every process in rank order; the counts n_r may differ, nothing is padded or lost."""
    if not is_distributed():
        return [rows]
    shapes = all_gather_objects((len(rows), tuple(rows.shape[1:]), rows.dtype))
    longest, row_shape, dtype = max(shapes, key=lambda shape: shape[0])  # a process without rows takes the others' word
    padded = torch.zeros(longest, *row_shape, dtype=dtype, device=rows.device)
    padded[: len(rows)] = rows.reshape(len(rows), *row_shape)
    gathered = [torch.empty_like(padded) for _ in shapes]
    dist.all_gather(gathered, padded)
    return [part[:count] for part, (count, _, _) in zip(gathered, shapes)]


# --------------------------------------------------------------------------- randomness


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def get_rng_state() -> dict[str, Any]:
    """The state of all generators of this process, made of tensors and plain values so that it loads safely."""
    _, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore what `get_rng_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


@contextlib.contextmanager
def isolated_rng(*entropy: int) -> Iterator[None]:
    """Inside the block all generators are seeded by `entropy`; afterwards they are as they were.

    What a sample looks like then depends on (seed, epoch, index) alone: not on the number of workers, of processes,
    nor on what was drawn before.
    """
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        sequence = np.random.SeedSequence([number % 2**64 for number in entropy])
        seed = int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would visit every device, a millisecond a sample
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


# --------------------------------------------------------------------------- words


def counted(count: int, one: str, several: str = "") -> str:
    """A count with its noun, whose plural has an s unless it is given."""
    return f"{count} {one if count == 1 else several or one + 's'}"


# --------------------------------------------------------------------------- logging


def setup_logging() -> None:
    """The main process logs at INFO to stderr, the others only errors."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: names of files need not be UTF-8
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if is_main_process() else logging.ERROR)
