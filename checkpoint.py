"""Checkpoints: the published layout, written whole or not at all, read without running anybody's code.

`checkpoint.pth` holds student (keys prefixed `module.`), teacher, optimizer, epoch (the next one), args, dino_loss and
fp16_scaler as the published files do; this project adds config, rng (one entry a process) and world_size.

Origin: file names and keys follow DINO and microsoft/esvit.
"""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from utils import UsageError

PREFIX = "module."
HEADS = ("head.", "head_dense.")
LISTED_NAMES = 5


def unwrap(network: nn.Module) -> nn.Module:
    """The network inside a DistributedDataParallel wrapper, or itself."""
    return network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network


def prefixed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the published `module.` before each key."""
    return {PREFIX + key.removeprefix(PREFIX): value for key, value in state.items()}


# --------------------------------------------------------------------------- files


def save_file(state: Mapping[str, Any] | Tensor, path: Path) -> None:
    """Write `state` to a temporary file beside `path`, flush it to the disk and move it into place."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_file(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; see `_load_safely`.

    Raises:
        UsageError: as there, or content that is no dictionary.
    """
    content = _load_safely(path)
    if not isinstance(content, dict):
        raise UsageError(
            f"checkpoint '{path}' holds a {type(content).__name__}, not a dictionary of tensors; use another file"
        )
    return content


def load_tensor(path: str | Path) -> Tensor:
    """Read a file that holds one tensor onto the CPU; see `_load_safely`.

    Raises:
        UsageError: as there, or content that is no tensor.
    """
    content = _load_safely(path)
    if not isinstance(content, Tensor):
        raise UsageError(f"'{path}' holds a {type(content).__name__}, not a tensor; use another file")
    return content


def _load_safely(path: str | Path) -> Any:
    """Read a file without unpickling anything but tensors, plain values and argparse.Namespace.

    Raises:
        UsageError: no such file, a damaged or foreign one, or one that only unsafe unpickling could read.
    """
    if not os.path.isfile(path):
        raise UsageError(f"checkpoint '{path}' does not exist; check the path")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "GLOBAL" in str(error):
            raise UsageError(
                f"checkpoint '{path}' holds more than tensors and plain values and is not read for safety; where you trust it, "
                "convert it once: torch.save(torch.load(FILE, weights_only=False)['teacher'], NEW)"
            ) from None
        raise UsageError(f"'{path}' is not a torch checkpoint or is damaged; use another file") from None
    except (RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"checkpoint '{path}' is damaged or no torch file ({reason}); use another file") from None
    return content


# --------------------------------------------------------------------------- networks


class LoadReport(NamedTuple):
    """What a network took from a file."""

    layout: str
    matched: int
    left_out: int

    def __str__(self) -> str:
        return f"{self.layout}: {self.matched} tensors loaded, {self.left_out} left out"


def network_state(content: Mapping[str, Any], key: str, path: str | Path) -> tuple[dict[str, Tensor], str]:
    """The network `key` (student or teacher) of a full checkpoint, or the whole of a bare one, without `module.`; and its layout.

    Raises:
        UsageError: a full checkpoint without `key`, or content that is no state dict.
    """
    layout = "bare network"
    if "student" in content or "teacher" in content:
        if key not in content:
            raise UsageError(
                f"checkpoint '{path}' has no '{key}'; it has {', '.join(sorted(content))}; name a network that is there"
            )
        content, layout = content[key], f"full checkpoint, {key}"
    tensors = {
        name.removeprefix(PREFIX): value
        for name, value in content.items()
        if isinstance(value, Tensor) and not name.endswith(".attn_mask")  # older files kept the shift masks
    }
    if not tensors:
        raise UsageError(
            f"checkpoint '{path}' holds no tensors of a network; it has the keys {', '.join(map(str, content))[:200]}"
        )
    return tensors, layout


def load_network(network: nn.Module, state: Mapping[str, Tensor], source: str, layout: str = "network") -> LoadReport:
    """Load a state dict into a network, wrapped or not; every tensor of the network must be there in its shape.

    A network without heads leaves those of the file out; a file without heads leaves those of the network as they are.

    Raises:
        UsageError: a number of prototypes or other shapes that differ, or names that are missing, with the first of them.
    """
    network = unwrap(network)
    wanted = network.state_dict()
    state = {name.removeprefix(PREFIX): value for name, value in state.items()}
    for name in sorted(wanted.keys() & state.keys()):
        ours, theirs = tuple(wanted[name].shape), tuple(state[name].shape)
        if ours == theirs:
            continue
        if "last_layer.weight" in name and ours[0] != theirs[0]:
            raise UsageError(
                f"{source} has heads of {theirs[0]} prototypes, this run of {ours[0]}; set --out_dim {theirs[0]}"
            )
        raise UsageError(
            f"{source} is of another network: {name} has shape {theirs}, this one wants {ours}; check --arch and --cfg"
        )
    file_has_heads = any(name.startswith(HEADS) for name in state)
    missing = [name for name in wanted if name not in state and (file_has_heads or not name.startswith(HEADS))]
    unexpected = [name for name in state if name not in wanted and not name.startswith(HEADS)]
    if missing or unexpected:
        raise UsageError(
            f"{source} is of another network: {len(missing)} tensors are missing ({_first(missing)}), "
            f"{len(unexpected)} unexpected ({_first(unexpected)}); check --arch, --cfg and --use_dense_prediction"
        )
    network.load_state_dict(state, strict=False)
    matched = len(wanted.keys() & state.keys())
    return LoadReport(layout, matched, len(state) - matched)


def _first(names: list[str]) -> str:
    listed = ", ".join(names[:LISTED_NAMES])
    return f"{listed}, ..." if len(names) > LISTED_NAMES else listed or "none"


def load_backbone(network: nn.Module, path: str | Path, key: str = "teacher") -> LoadReport:
    """Load the backbone of a checkpoint file for evaluation.

    Raises:
        UsageError: see `load_file`, `network_state` and `load_network`.
    """
    state, layout = network_state(load_file(path), key, path)
    return load_network(network, state, f"checkpoint '{path}'", layout)
