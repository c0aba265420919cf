"""Processes and devices, precision, seeding, logging: nothing about models, images or files.

Every helper for several processes falls through when there is only one, so callers never ask.
Origin: the launch conventions are those of torchrun, SLURM and MPI; the division of labour follows DINO's utils.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

logger = logging.getLogger("esvit")
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


def lack_of_memory(error: Exception) -> UsageError | None:
    """An error of Python, numpy or torch in words, if it says that there is not enough memory."""
    words = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")
    lacking = isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in words)
    )
    reason = (str(error).splitlines() or [""])[0] or type(error).__name__
    remedy = "lower the batch size, the crops or the network's sizes, or use more processes"
    return UsageError(f"not enough memory ({reason}); {remedy}") if lacking else None


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
