"""Restore the parts of a training state from a checkpoint: networks, centers, and the optimizer's moments by parameter name.

Checkpoints of EsViT, DINO and UDI index their moments by position, in the order of the student's keys in that file; those of this
project hold parameter names (`param_names`).

Origin: the layout of the files is that of DINO and microsoft/esvit.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from checkpoints import layouts, loading
from training import optim
from utils import UsageError, logger

# Types of the fields that are read from checkpoints of pre-training, fine-tuning and linear probes.
FIELDS: dict[str, tuple[type, ...]] = {
    "student": (Mapping,),
    "teacher": (Mapping,),
    "optimizer": (Mapping,),
    "epoch": (int, np.integer),
    "args": (argparse.Namespace, type(None)),
    "fp16_scaler": (Mapping, type(None)),
    "config": (str, type(None)),
    "rng": (list, type(None)),
    "bad_steps_in_a_row": (int,),
    "monitor": (Mapping,),
    "unreadable": (Mapping,),
    "in_epoch": (Mapping,),
    "model": (Mapping,),
    "ema": (Mapping, type(None)),
    "best": (Mapping,),
    "last": (Mapping,),
    "identity": (Mapping, type(None)),
    "state_dict": (Mapping,),
    "scheduler": (Mapping,),
    "best_acc": (int, float, np.number),
    "table": (list,),
    "classifiers": (Mapping,),
    "diverged": (list,),
    "run": (Mapping, type(None)),
}
CRITERION_KEYS = ("dino_loss", "udi_loss")  # fields that hold the centers
GAIN = "last_layer.weight_g"  # of the prototypes; frozen by --norm_last_layer


def check_fields(content: Mapping[str, Any], path: Path) -> None:
    """Raise a `UsageError` for the first field of a checkpoint whose type is wrong."""
    for name, types in FIELDS.items():
        value = content.get(name)
        if name in content and (not isinstance(value, types) or isinstance(value, bool)):
            wanted = " or ".join(kind.__name__ for kind in types)
            raise UsageError(
                f"checkpoint '{path}' holds a {type(value).__name__} under '{name}', not {wanted}; use another file"
            )
    if content.get("epoch", 0) < 0:
        raise UsageError(f"checkpoint '{path}' has epoch {content['epoch']}, which is negative; use another file")


@contextlib.contextmanager
def reading(field: str, path: Path) -> Iterator[None]:
    """Turn errors of a block that reads the field `field` of a checkpoint into a `UsageError` that names it."""
    try:
        yield
    except UsageError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"checkpoint '{path}' cannot be used: its field '{field}' is invalid ({reason}); use another file"
        ) from None


def load_networks(
    path: Path, content: Mapping[str, Any], networks: Mapping[str, nn.Module], extend: bool, allow_partial: bool
) -> tuple[str, ...]:
    """Load `networks`, student and teacher by their field.

    Args:
        networks: Networks by the field that holds their state dict.
        extend: Whole heads that the file lacks start fresh.
        allow_partial: Load what fits.

    Returns:
        Prefixes of the parts that start fresh in a network.

    Raises:
        UsageError: A tensor is missing or does not fit.
    """
    fresh: tuple[str, ...] = ()
    for key, network in networks.items():
        state = layouts.network_state(content, key, path)
        report = loading.load_network(
            network, state, f"checkpoint '{path}'", new_parts=extend, allow_partial=allow_partial
        )
        fresh += tuple(part for part in report.fresh if part not in fresh)
    return fresh


def load_centers(path: Path, content: Mapping[str, Any], criterion: nn.Module, key: str, extend: bool) -> list[str]:
    """Load the centers of the loss from the field `key`, or from another method's where the file lacks it.

    Returns:
        Names of the centers that the file lacks and that start fresh; only with `extend`.
    """
    key = next((k for k in (key, *CRITERION_KEYS) if k in content), key)
    with reading(key, path):
        centers = layouts.criterion_state(content.get(key, {}))
        for name, center in centers.items():
            if not isinstance(center, Tensor):
                raise TypeError(f"{name} is a {type(center).__name__}")
    own = criterion.state_dict()
    fresh = [name for name in own if name not in centers] if extend else []
    if extend:
        centers = {name: centers.get(name, own[name]) for name in own}
    loading.load_network(criterion, layouts.NetworkState(centers, "full checkpoint", key), f"checkpoint '{path}'")
    return fresh


def load_moments(
    path: Path,
    content: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    student: nn.Module,
    fresh: tuple[str, ...],
    extend: bool,
    allow_partial: bool,
) -> None:
    """Load the optimizer's moments by parameter name; parameters with a prefix in `fresh` have none.

    Raises:
        UsageError: The file was made with another optimizer, or trained other parameters.
    """
    source, name = f"checkpoint '{path}'", type(optimizer).__name__.lower()
    saved_name = getattr(content.get("args"), "optimizer", name)
    if saved_name != name and not allow_partial:
        raise UsageError(
            f"{source} was made with --optimizer {saved_name}, not {name}; pass that, or choose another --output_dir"
        )
    if saved_name != name or "optimizer" not in content:
        logger.warning("%s has no moments for --optimizer %s; they start fresh", source, name)
        return
    with reading("optimizer", path):
        moments = optim.named_moments(content["optimizer"], _names_by_position(content, student), source)
    trained = [name for group in optimizer.param_groups for name in group["param_names"]]
    missing = [name for name in trained if name not in moments and not (fresh and name.startswith(fresh))]
    more = [name for name in moments if name not in trained and (not extend or name.endswith(GAIN))]
    if (missing or more) and not allow_partial:
        which = f"did not train {missing[0]}, as this run does" if missing else f"trained {more[0]}, unlike this run"
        remedy = "was --norm_last_layer the same?" if (missing or more)[0].endswith(GAIN) else "use another file"
        raise UsageError(f"{source} {which}; {remedy}")
    optim.load_moments(optimizer, moments, source, skip_misfits=allow_partial)


def _names_by_position(content: Mapping[str, Any], student: nn.Module) -> list[list[str]] | None:
    """Return the names of the parameters that a file's optimizer indexes, in two groups, in the order of the file's student.

    Names are this project's, or the file's where this network lacks the parameter. Frozen gains of prototypes are left out. None
    if the sizes of the file's groups are others.
    """
    ours = layouts.parameter_names(student, content["student"])
    found = {our_name or name: content["student"][name] for name, our_name in ours.items()}
    trained = {name: tensor for name, tensor in found.items() if not name.endswith(GAIN)}
    sizes = [len(group["params"]) for group in content["optimizer"]["param_groups"]]
    for parameters in (found, trained):
        names = list(optim.split_by_decay(parameters))
        if [len(group) for group in names] == sizes:
            return names
    return None
