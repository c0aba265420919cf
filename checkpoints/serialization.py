"""Read and write checkpoint files: torch's format and safetensors, without running code from a file.

Besides tensors and plain values, published files hold arguments (a Namespace in EsViT, DINO and UDI, a yacs config in the original
Swin) and numpy scalars. These types, listed in `READABLE`, are the only ones that are unpickled.
"""

from __future__ import annotations

import argparse
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from checkpoints.files import atomic_write
from distributed import fsdp
from distributed.collectives import all_gather_objects, is_main_process
from utils import UsageError

CHUNK = 2**20  # bytes
# numpy 1 and 2 spell the constructor of scalars differently; a CfgNode is read as an ordered dictionary, without code of yacs.
NUMPY_SCALAR = np.float64(0).__reduce__()[0]
READABLE: list[Any] = [
    argparse.Namespace,
    (OrderedDict, "yacs.config.CfgNode"),
    (NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
    (NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    np.dtype,
    *{type(np.dtype(code)) for code in "?bhilqBHILQefd"},
]


class DamagedError(UsageError):
    """A checkpoint file is damaged, or no checkpoint file at all."""


# --------------------------------------------------------------------------- writing


def save_file(state: Mapping[str, Any] | Tensor, path: Path) -> None:
    """Write `state` to `path` atomically."""
    with atomic_write(path) as temporary:
        write_file(state, temporary)


def write_file(state: Mapping[str, Any] | Tensor, path: Path) -> None:
    """Write `state` to `path`.

    Raises:
        OSError: The write fails; torch's writer may hide this behind a RuntimeError.
    """
    try:
        with path.open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise OSError(" ".join(str(error).split())) from error


def check_finite(**networks: Mapping[str, Tensor]) -> None:
    """Check that the main process's weights, or all shards, are finite before they are saved; a collective operation.

    Raises:
        FloatingPointError: A weight is not finite; raised on all processes.
    """
    saved = {
        key: state for key, state in networks.items() if is_main_process() or fsdp.is_sharded(list(state.values()))
    }
    own = next((f"{key}.{name}" for key, state in saved.items() for name in nonfinite(state)), None)
    wrong = next((name for name in all_gather_objects(own) if name is not None), None)
    if wrong is not None:
        raise FloatingPointError(
            f"{wrong} is not finite, so this state is not saved and the previous checkpoint is kept; restart with a lower --lr "
            "or with --precision fp32"
        )


def nonfinite(state: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield the names of tensors that contain a value that is not finite; of a sharded tensor, this process's shard counts."""
    for name, tensor in zip(state, fsdp.local(list(state.values())), strict=True):
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            yield name


# --------------------------------------------------------------------------- reading


def load_file(path: str | Path, mapped: bool = False, checked: bool = True) -> dict[str, Any]:
    """Load a checkpoint onto the CPU.

    Args:
        mapped: Map the tensors into memory instead of reading them (not for safetensors and files from before torch 1.6).
        checked: Compare the whole file with its checksums.

    Raises:
        DamagedError: The file is damaged or no checkpoint.
        UsageError: It does not exist, holds types outside `READABLE`, or is no dictionary.
    """
    content = _load(path, mapped, checked)
    if not isinstance(content, dict):
        raise UsageError(
            f"checkpoint '{path}' holds a {type(content).__name__}, not a dictionary of tensors; use another file"
        )
    return content


def load_tensor(path: str | Path) -> Tensor:
    """Load a file that holds a single tensor onto the CPU.

    Raises:
        UsageError: As in `load_file`, or the content is no tensor.
    """
    content = _load(path)
    if not isinstance(content, Tensor):
        raise UsageError(f"'{path}' holds a {type(content).__name__}, not a tensor; use another file")
    return content


def _load(path: str | Path, mapped: bool = False, checked: bool = True) -> Any:
    check_readable(path)
    if checked and not is_safetensors(path):
        _check_checksums(path)
    try:
        if is_safetensors(path):
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals(READABLE):
            mapped = mapped and zipfile.is_zipfile(path)
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            except RuntimeError as error:
                if "unable to mmap" not in str(error):  # as some file systems are
                    raise
                content = torch.load(path, map_location="cpu", weights_only=True)
    except safetensors.SafetensorError as error:
        raise UsageError(f"'{path}' is not a safetensors file or is damaged ({error}); use another file") from None
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "GLOBAL" in str(error):
            raise UsageError(
                f"checkpoint '{path}' holds objects other than tensors and plain values and is refused for safety; if you trust "
                "it, convert it once: torch.save(torch.load(FILE, weights_only=False)[KEY], NEW), KEY being 'teacher' or 'model'"
            ) from None
        raise DamagedError(f"'{path}' is not a torch checkpoint or is damaged; use another file") from None
    except (RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        if "TorchScript" in str(error):
            raise UsageError(f"'{path}' is a TorchScript graph; use the checkpoint that it was exported from") from None
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedError(f"checkpoint '{path}' is damaged or not a torch file ({reason}); use another file") from None
    return content


def is_safetensors(path: str | Path) -> bool:
    """Return whether a path has the suffix of safetensors files."""
    return Path(path).suffix == ".safetensors"


def check_readable(path: str | Path) -> None:
    """Raise a `UsageError` unless `path` is a readable file; a FIFO is rejected without waiting for its writer."""
    if not os.path.lexists(path):
        raise UsageError(f"checkpoint '{path}' does not exist; check the path")
    if not os.path.isfile(path):
        other = "a pipe, socket or device" if os.path.exists(path) else "a dangling link"
        raise DamagedError(f"checkpoint '{path}' is {'a folder' if os.path.isdir(path) else other}; pass a file")
    try:
        Path(path).open("rb").close()
    except OSError as error:
        raise DamagedError(f"checkpoint '{path}' cannot be read ({error.strerror}); check its permissions") from None


def _check_checksums(path: str | Path) -> None:
    """Raise a `DamagedError` if a record of torch's zip file does not match its CRC-32, which `torch.load` ignores."""
    try:
        if not zipfile.is_zipfile(path):  # written before torch 1.6
            return
        with zipfile.ZipFile(path) as records:
            for record in records.infolist():
                with records.open(record) as content:
                    while record.CRC and content.read(CHUNK):  # 0: written without checksums
                        pass
    except Exception as error:  # zipfile raises many types of errors on damaged bytes
        raise DamagedError(f"checkpoint '{path}' is damaged ({error}); use another file") from None
