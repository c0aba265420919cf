"""Give a training step the state that a checkpoint holds: networks, centers, and the optimizer's moments by name.

Files of EsViT, DINO and UDI number their moments by position, in the order of the student's keys in that file; this project's own
hold the names (`param_names`). Where everything must fit and where heads may start fresh is the caller's choice.

Origin: the layout of the files is that of DINO and microsoft/esvit.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from checkpoints import layouts, loading
from training import optim
from utils import UsageError, logger

if TYPE_CHECKING:
    from training.step import Method, TrainStep

# What checkpoints of pre-training, of fine-tuning and of linear probes hold under the names that are read again.
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
LOSSES = ("dino_loss", "udi_loss")  # where methods keep their centers
GAIN = "last_layer.weight_g"  # of the prototypes, which --norm_last_layer freezes


def check_fields(content: Mapping[str, Any], path: Path) -> None:
    """Stop on a checkpoint one of whose fields is of another type than programs write.

    Raises:
        UsageError: naming the first such field.
    """
    for name, types in FIELDS.items():
        value = content.get(name)
        if name in content and (not isinstance(value, types) or isinstance(value, bool)):
            wanted = " or ".join(kind.__name__ for kind in types)
            raise UsageError(
                f"checkpoint '{path}' holds a {type(value).__name__} under '{name}', not {wanted}; use another file"
            )
    if content.get("epoch", 0) < 0:
        raise UsageError(f"checkpoint '{path}' is at epoch {content['epoch']}, which is below 0; use another file")


@contextlib.contextmanager
def reading(field: str, path: Path) -> Iterator[None]:
    """A block that takes over what a checkpoint holds under `field`.

    Raises:
        UsageError: it is not what this project writes there.
    """
    try:
        yield
    except UsageError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"checkpoint '{path}' cannot be used: its '{field}' is not as training writes it ({reason}); use another file"
        ) from None


def restore(path: Path, content: Mapping[str, Any], step: TrainStep, args: Any, extend: bool = False) -> None:
    """Load a checkpoint's networks, centers, moments and loss scale into `step`.

    Args:
        path: how messages name the file.
        content: of the file, whose fields are checked.
        step: partly changed where an error is raised.
        args: of this run: `optimizer`, and with `extend` `allow_partial`.
        extend: heads and centers that the file lacks as a whole start fresh, with `args.allow_partial` also what else does not
            fit; otherwise everything must be there.

    Raises:
        UsageError: what is missing or does not fit, by name.
    """
    source, method = f"checkpoint '{path}'", step.method
    partial = extend and args.allow_partial
    needed = {"student", "teacher", "epoch", *(() if partial else ("optimizer",))}
    absent = (needed if extend else needed | {method.criterion_key}) - content.keys()
    if absent:
        other = " (another method made it)" if absent == {method.criterion_key} else ""
        remedy = "pass --init_weights FILE to start a new schedule from it" if extend else "choose another --output_dir"
        raise UsageError(f"{source} cannot be resumed, it has no {', '.join(sorted(absent))}{other}; {remedy}")
    for network, key in ((method.student, "student"), (method.teacher, "teacher")):
        state = loading.network_state(content, key, path)
        report = loading.load_network(network, state, source, new_parts=extend, allow_partial=partial)
    fresh = [part.rstrip(".") for part in report.fresh] + _restore_centers(path, content, method, extend)
    _restore_moments(path, content, step, args, report.fresh, extend)
    if extend:
        logger.info("%s goes on%s", source, f"; {', '.join(fresh)} start fresh" if fresh else "")
    with reading("fp16_scaler", path):
        if step.scaler.is_enabled() and content.get("fp16_scaler"):
            step.scaler.load_state_dict(content["fp16_scaler"])
    step.nonfinite.in_a_row = content.get("bad_steps_in_a_row", 0)
    with reading("monitor", path):
        step.monitor.load_state(content.get("monitor", {}))


def _restore_centers(path: Path, content: Mapping[str, Any], method: Method, extend: bool) -> list[str]:
    """Load the centers of the loss; with `extend` those that the file lacks stay, also where another method wrote it.

    Returns:
        names of those that stay.
    """
    criterion, key = method.criterion, method.criterion_key
    key = next((k for k in (key, *LOSSES) if k in content), key)
    with reading(key, path):
        centers = layouts.criterion_state(content.get(key, {}))
        for name, center in centers.items():
            if not isinstance(center, Tensor):
                raise TypeError(f"{name} is a {type(center).__name__}")
    own = criterion.state_dict()
    fresh = [name for name in own if name not in centers] if extend else []
    if extend:
        centers = {name: centers.get(name, own[name]) for name in own}
    loading.load_network(criterion, loading.NetworkState(centers, "full checkpoint", key), f"checkpoint '{path}'")
    return fresh


def _restore_moments(
    path: Path, content: Mapping[str, Any], step: TrainStep, args: Any, fresh: tuple[str, ...], extend: bool
) -> None:
    """Give each trained parameter the moments of its name; parts that are `fresh` have none."""
    source, partial = f"checkpoint '{path}'", extend and args.allow_partial
    saved_with = getattr(content.get("args"), "optimizer", args.optimizer)
    if saved_with != args.optimizer and not partial:
        raise UsageError(
            f"{source} was made with --optimizer {saved_with}, not {args.optimizer}; pass that, or choose another --output_dir"
        )
    if saved_with != args.optimizer or "optimizer" not in content:
        logger.warning("%s has no moments for --optimizer %s; they start fresh", source, args.optimizer)
        return
    with reading("optimizer", path):
        names = _names_of_positions(content, loading.unwrap(step.method.student))
        moments = optim.named_moments(content["optimizer"], names, source)
    trained = [name for group in step.optimizer.param_groups for name in group["param_names"]]
    missing = [name for name in trained if name not in moments and not (fresh and name.startswith(fresh))]
    more = [name for name in moments if name not in trained and (not extend or name.endswith(GAIN))]
    if (missing or more) and not partial:
        which = f"did not train {missing[0]}, as this run does" if missing else f"trained {more[0]}, unlike this run"
        remedy = "was --norm_last_layer the same?" if (missing or more)[0].endswith(GAIN) else "use another file"
        raise UsageError(f"{source} {which}; {remedy}")
    optim.load_moments(step.optimizer, moments, source, skip_misfits=partial)


def _names_of_positions(content: Mapping[str, Any], student: nn.Module) -> list[list[str]] | None:
    """Names of the parameters that a file's optimizer numbers, in two groups, by the order of the file's own student.

    They are this project's, or the file's where this network lacks the parameter. Gains of prototypes are left out where they were
    frozen. None: the file's groups are of other sizes.
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
