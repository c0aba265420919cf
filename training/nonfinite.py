"""Steps whose loss or gradients are not finite: counted, and after too many in a row told apart and kept for a look.

What a diagnosis needs stays on the device (`NonFiniteSteps.remember`) until a run ends with one.
Origin: this project's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import utils
from checkpoints import files, serialization
from distributed import collectives
from utils import logger

LISTED_TENSORS = 5
MAX_BAD_STEPS = 20


class NonFiniteSteps:
    """Counts skipped steps and ends a run that only skips.

    Args:
        most: skipped steps in a row that end the run.
        folder: where `bad_step.pth` goes then; None for nowhere.
    """

    def __init__(self, most: int = MAX_BAD_STEPS, folder: Path | None = None) -> None:
        self.most = most
        self.folder = folder
        self.in_a_row = 0
        self._names: Sequence[str] = ()
        self._norms: Tensor | None = None
        self._scalar_names: Sequence[str] = ()
        self._scalars: Tensor | None = None  # of this process alone
        self._recent: list[dict[str, float]] = []

    def record(self, names: Sequence[str], norms: Tensor, scalars: Mapping[str, Tensor], applied: Tensor) -> None:
        """Keep the norms of the gradients and this process's scalars of the last step that was not `applied`.

        The host does not wait.
        """
        self._names, self._norms = names, _newest_bad(self._norms, norms, applied)
        own = torch.stack([*scalars.values()])
        self._scalar_names, self._scalars = [*scalars], _newest_bad(self._scalars, own, applied)

    def count(self, scalars: dict[str, float], iteration: int) -> bool:
        """Count a step whose scalars have been read; whether the run should end."""
        if not scalars["skipped"]:
            self.in_a_row, self._recent = 0, []
            return False
        self.in_a_row += 1
        self._recent.append({"iteration": float(iteration), **scalars})
        logger.warning("step %d skipped: loss %s or a gradient is not finite", iteration, scalars["loss"])
        return self.in_a_row >= self.most

    def end(self, settings: Mapping[str, float | str], views: Callable[[], Sequence[Tensor]] | None) -> None:
        """End the run on all processes, which all call this.

        Args:
            settings: of the last step, such as its learning rate and precision.
            views: gives the views of this process's last micro-batch.

        Raises:
            FloatingPointError: always, with the diagnosis.
        """
        made = [view.detach().cpu() for view in views()] if views is not None else []
        norms = {} if self._norms is None else dict(zip(self._names, self._norms.tolist()))
        tensors = [name for name, norm in norms.items() if not math.isfinite(norm)]
        own = {} if self._scalars is None else dict(zip(self._scalar_names, self._scalars.tolist()))
        statistics, scalars = zip(*collectives.all_gather_objects(([_statistics(view) for view in made], own)))
        told = ("skipped", "iteration")
        terms = [name for name, value in self._recent[-1].items() if name not in told and not math.isfinite(value)]
        with_images = [rank for rank, parts in enumerate(statistics) if any(part["not_finite"] for part in parts)]
        with_terms = [rank for rank, of_one in enumerate(scalars) if not all(map(math.isfinite, of_one.values()))]
        content = {
            "steps": self._recent,
            "gradient_norms": norms,
            "scalars": list(scalars),
            "settings": dict(settings),
            "view_statistics": list(statistics),
            "views": made,
            "process": collectives.get_rank(),
        }
        writer = [*with_images, *with_terms, 0][0]
        where = collectives.all_gather_objects(self._write(content) if collectives.get_rank() == writer else "")[writer]
        given = ", ".join(f"{name} {value}" for name, value in settings.items())
        listed = ", ".join(tensors[:LISTED_TENSORS]) + (
            f" and {len(tensors) - LISTED_TENSORS} more" if tensors[LISTED_TENSORS:] else ""
        )
        whose = f" of process {', '.join(map(str, with_terms))}" if 0 < len(with_terms) < len(scalars) else ""
        raise FloatingPointError(
            f"{utils.counted(self.most, 'step')} in a row had a loss or gradient that is not finite; not finite were "
            f"{', '.join(terms) if terms else 'no loss'}{whose} (loss {self._recent[-1]['loss']}) and the gradients of "
            f"{listed or 'no parameter'} ({len(tensors)} of {len(norms)}); {given}; {_remedy(terms, with_images)}{where}"
        )

    def _write(self, content: dict[str, Any]) -> str:
        """Save under a name that is free, and say where; a disk that refuses must not hide the diagnosis."""
        if self.folder is None:
            return ""
        path = files.unused(self.folder / "bad_step.pth")
        try:
            serialization.save_file(content, path)
        except (OSError, RuntimeError) as error:
            return f"; {path} could not be written ({error})"
        return f"; the last batch, its statistics and the norms of all gradients are in {path}"


def _newest_bad(kept: Tensor | None, new: Tensor, applied: Tensor) -> Tensor:
    """What a step left: `new` where it was not applied, else what is `kept`, if that has the same length."""
    return torch.where(applied, new if kept is None or len(kept) != len(new) else kept, new)


def _statistics(view: Tensor) -> dict[str, float]:
    """Of the pixels of a view, over all its images."""
    pixels, finite = view.float(), torch.isfinite(view)
    clean = torch.where(finite, pixels, torch.zeros(()))
    return {
        "mean": clean.mean().item(),
        "std": clean.std().item(),
        "least": clean.min().item(),
        "most": clean.max().item(),
        "not_finite": float((~finite).sum().item()),
    }


def _remedy(terms: Sequence[str], bad_ranks: Sequence[int]) -> str:
    """What to try first, by where the first wrong numbers are."""
    if bad_ranks:
        return (
            f"images of process {bad_ranks[0]} hold such numbers themselves: check the files, INPUT.MEAN and INPUT.STD"
        )
    if terms:
        return "resume with --precision fp32, a lower --lr or a smaller --clip_grad"
    return "the losses are finite, so the backward overflows: resume with --precision fp32 or bf16, or a lower --lr"
