"""Errors, logging, devices, precision and seeding.

This module imports torch where a function needs it, so that command lines are parsed without it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import logging
import os
import random
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("esvit")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt(3)


class UsageError(ValueError):
    """A mistake in arguments, configs or files, reported as one line that names the remedy."""


class Stopped(BaseException):
    """A stop that was asked for, by a signal or Ctrl-C; not an error, so `except Exception` does not catch it.

    Args:
        message: shown to the user.
        code: exit code; 0 if nothing is lost and a scheduler asked for the stop.
    """

    def __init__(self, message: str = "", code: int = 0) -> None:
        super().__init__(message)
        self.code = code


def lack_of_memory(error: Exception) -> UsageError | None:
    """Return a `UsageError` if Python, numpy or torch ran out of memory, else None."""
    import torch

    patterns = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")
    lacking = isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in patterns)
    )
    reason = (str(error).splitlines() or [""])[0] or type(error).__name__
    remedy = "lower the batch size, the crops or the network's sizes, or use more processes"
    return UsageError(f"not enough memory ({reason}); {remedy}") if lacking else None


# --------------------------------------------------------------------------- logging


def setup_logging(is_main_process: bool = True) -> None:
    """Log to stderr, at INFO in the main process and at ERROR in others."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # like stderr: file names need not be UTF-8
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO if is_main_process else logging.ERROR)


def import_optional(module: str, flag: str, package: str, instead: str) -> Any:
    """Import a module of a package that only `flag` needs.

    Raises:
        UsageError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UsageError(
            f"{flag} needs the package {package}, which is not installed; run pip install {package}, or use {instead}"
        ) from None


def counted(count: int, one: str, several: str = "") -> str:
    """Return "1 image", "2 images", ...; `several` is the plural where it is not formed with s."""
    return f"{count} {one if count == 1 else several or one + 's'}"


def flattened(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values of a nested mapping."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# --------------------------------------------------------------------------- devices and precision


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device for `name`; `auto` prefers CUDA, then MPS, then the CPU.

    Raises:
        UsageError: the device is unknown or not available on this machine.
    """
    import torch

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
            available = counted(count, "CUDA device is", "CUDA devices are")
            raise UsageError(f"device '{name}' (index {index}) is not available, {available}; try --device cpu")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("device 'mps' is not available; try --device auto")
    return device


def resolve_precision(name: str, device: torch.device) -> str:
    """Return the precision for `name`; `auto` is bf16 where the device computes in it, fp16 on older GPUs, else fp32.

    Raises:
        UsageError: an unknown name, or fp16 without a CUDA device (its gradient scaling needs one).
    """
    import torch

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


def _cpu_multiplies_bf16() -> bool:
    """Check for matrix instructions in bf16 (AMX); emulation would be slower than fp32."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Return the autocast context of a resolved precision; a null context for fp32."""
    import torch

    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype={"bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def keep_freed_memory() -> None:
    """Keep glibc from returning freed memory to the system between steps.

    By default it returns large blocks at once, and the kernel clears every page of the next one: for the short-lived tensors of a
    training step on a CPU that takes longer than the computation. The process stays at its peak memory.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def peak_memory_mb(device: torch.device) -> float:
    """Return the peak memory so far in MiB: allocated on a GPU, else the resident set of this process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def main_memory() -> int:
    """Return the main memory of this machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # not on Windows


# --------------------------------------------------------------------------- randomness


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, numpy and torch."""
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def get_rng_state() -> dict[str, Any]:
    """Return the state of all generators as tensors and plain values, which `torch.load` reads with weights_only."""
    import torch

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
    import torch

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
    """Seed all generators by `entropy` inside the block, and restore them afterwards.

    A sample drawn inside depends on (seed, epoch, index) alone, not on the number of workers or processes.
    """
    import torch

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
