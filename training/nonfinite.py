"""Skipped steps whose loss or gradients are not finite: count them, and end the run with a diagnosis after too many in a row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import utils
from checkpoints import files, serialization
from config.choices import MAX_BAD_STEPS
from distributed import collectives
from utils import logger

LISTED_TENSORS = 5


class NonFiniteSteps:
    """Counts consecutive skipped steps; what a diagnosis needs stays on the device until then.

    Args:
        limit: Number of consecutive skipped steps that ends the run.
        folder: Folder of `bad_step.pth`, which is written then; None to write nothing.
    """

    def __init__(self, limit: int = MAX_BAD_STEPS, folder: Path | None = None) -> None:
        self.limit = limit
        self.folder = folder
        self.in_a_row = 0
        self._names: Sequence[str] = ()
        self._norms: Tensor | None = None
        self._scalar_names: Sequence[str] = ()
        self._scalars: Tensor | None = None  # of this process only
        self._recent: list[dict[str, float]] = []

    def record(self, names: Sequence[str], norms: Tensor, scalars: Mapping[str, Tensor], applied: Tensor) -> None:
        """Keep, without synchronization, the gradient norms and this process's scalars of the last step not `applied`."""
        self._names, self._norms = names, _keep_if_applied(self._norms, norms, applied)
        own = torch.stack([*scalars.values()])
        self._scalar_names, self._scalars = [*scalars], _keep_if_applied(self._scalars, own, applied)

    def count(self, scalars: dict[str, float], iteration: int) -> bool:
        """Count a step by its scalars on the host, and return whether the limit is reached."""
        if not scalars["skipped"]:
            self.in_a_row, self._recent = 0, []
            return False
        self.in_a_row += 1
        self._recent.append({"iteration": float(iteration), **scalars})
        logger.warning("step %d skipped: loss %s or a gradient is not finite", iteration, scalars["loss"])
        return self.in_a_row >= self.limit

    def fail(self, settings: Mapping[str, float | str], views: Callable[[], Sequence[Tensor]] | None) -> None:
        """Raise the diagnosis; a collective operation.

        Args:
            settings: Settings of the last step, such as learning rate and precision.
            views: Returns the views of this process's last micro-batch.

        Raises:
            FloatingPointError: Always.
        """
        last_views = [view.detach().cpu() for view in views()] if views is not None else []
        norms = {} if self._norms is None else dict(zip(self._names, self._norms.tolist()))
        tensors = [name for name, norm in norms.items() if not math.isfinite(norm)]
        own = {} if self._scalars is None else dict(zip(self._scalar_names, self._scalars.tolist()))
        gathered = collectives.all_gather_objects(([_statistics(view) for view in last_views], own))
        statistics, scalars = zip(*gathered)
        terms = [
            name
            for name, value in self._recent[-1].items()
            if name not in ("skipped", "iteration") and not math.isfinite(value)
        ]
        ranks_with_images = [rank for rank, parts in enumerate(statistics) if any(part["not_finite"] for part in parts)]
        ranks_with_terms = [rank for rank, values in enumerate(scalars) if not all(map(math.isfinite, values.values()))]
        content = {
            "steps": self._recent,
            "gradient_norms": norms,
            "scalars": list(scalars),
            "settings": dict(settings),
            "view_statistics": list(statistics),
            "views": last_views,
            "process": collectives.get_rank(),
        }
        writer = [*ranks_with_images, *ranks_with_terms, 0][0]
        written = self._write(content) if collectives.get_rank() == writer else ""
        where = collectives.all_gather_objects(written)[writer]
        listed = ", ".join(tensors[:LISTED_TENSORS])
        if len(tensors) > LISTED_TENSORS:
            listed += f" and {len(tensors) - LISTED_TENSORS} more"
        some_ranks = 0 < len(ranks_with_terms) < len(scalars)
        ranks = f" of process {', '.join(map(str, ranks_with_terms))}" if some_ranks else ""
        raise FloatingPointError(
            f"{utils.counted(self.limit, 'step')} in a row had a loss or gradient that is not finite; not finite were "
            f"{', '.join(terms) if terms else 'no loss'}{ranks} (loss {self._recent[-1]['loss']}) and the gradients of "
            f"{listed or 'no parameter'} ({len(tensors)} of {len(norms)}); "
            f"{', '.join(f'{name} {value}' for name, value in settings.items())}; {_remedy(terms, ranks_with_images)}{where}"
        )

    def _write(self, content: dict[str, Any]) -> str:
        """Save the diagnosis and return the end of the message; an error of the disk must not hide the diagnosis."""
        if self.folder is None:
            return ""
        path = files.unused(self.folder / "bad_step.pth")
        try:
            serialization.save_file(content, path)
        except (OSError, RuntimeError) as error:
            return f"; {path} could not be written ({error})"
        return f"; the last batch, its statistics and the norms of all gradients are in {path}"


def _keep_if_applied(kept: Tensor | None, new: Tensor, applied: Tensor) -> Tensor:
    """Return `kept` if the step was applied, else `new`; `new` also if `kept` has another length."""
    return torch.where(applied, new if kept is None or len(kept) != len(new) else kept, new)


def _statistics(view: Tensor) -> dict[str, float]:
    """Return statistics of the pixels of a view, over all its images."""
    pixels, finite = view.float(), torch.isfinite(view)
    clean = torch.where(finite, pixels, torch.zeros(()))
    return {
        "mean": clean.mean().item(),
        "std": clean.std().item(),
        "least": clean.min().item(),
        "most": clean.max().item(),
        "not_finite": float((~finite).sum().item()),
    }


def _remedy(terms: Sequence[str], ranks_with_images: Sequence[int]) -> str:
    if ranks_with_images:
        return (
            f"images of process {ranks_with_images[0]} contain such values: check the files, INPUT.MEAN and INPUT.STD"
        )
    if terms:
        return "resume with --precision fp32, a lower --lr or a smaller --clip_grad"
    return (
        "the losses are finite, so the backward pass overflows: resume with --precision fp32 or bf16, or a lower --lr"
    )
