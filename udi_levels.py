"""UDI's levels: which samples of a batch go through the networks, and what comes out of these, by level and view.

Shapes: B images, V = 2 global views, L local views, M samples of a global view, m of a local one (S of either), N tokens of a view,
K prototypes.
Origin: UDI (Su and Ji, ECCV 2024).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from data.udi_views import Correspondence
from losses import TEACHER_VIEWS
from models.srs import bilinear_weights, one_hot_weights
from outputs import LevelOutput, StudentLevels, TeacherLevels, changed, split_rows

# --------------------------------------------------------------------------- into the networks


def teacher_weights(found: Correspondence, grid: int) -> list[Tensor]:
    """Of each teacher view (B, M + L m, N): at the samples of the other global view, then at those of all local ones."""
    local = found.local_target_L2m2
    places = [
        torch.cat([found.target_2M2[:, 1 - view], local[:, :, view].flatten(1, 2)], dim=1)
        for view in range(TEACHER_VIEWS)
    ]
    return [bilinear_weights(place_BS2, (grid, grid)) for place_BS2 in places]


def student_weights(
    found: Correspondence, sides: Sequence[int], grid_of: Mapping[int, int], local: bool
) -> list[Tensor | None]:
    """Of each view, whose side in pixels is given, (B, S, N) at its own samples; with `local` also of the local ones."""
    tokens = [*found.tokens_2M.unbind(1), *found.local_tokens_Lm.unbind(1)]
    return [
        one_hot_weights(own, grid_of[side] ** 2) if local or view < TEACHER_VIEWS else None
        for view, (own, side) in enumerate(zip(tokens, sides))
    ]


# --------------------------------------------------------------------------- out of the networks


def teacher_levels(output: LevelOutput, found: Correspondence) -> TeacherLevels:
    """Of both global views, sampled as `teacher_weights` says or not at all."""
    batch, _, samples = found.valid_2M.shape
    _, local_views, _, local_samples = found.local_valid_L2m.shape
    levels = TeacherLevels(changed(output.token_logits[0], lambda x: x.unflatten(0, (TEACHER_VIEWS, batch))))
    if output.sample_logits is None:
        return levels
    rows = changed(output.sample_logits, lambda x: x.unflatten(0, (TEACHER_VIEWS, batch, -1)))
    levels = levels._replace(
        patch_VBSK=changed(rows, lambda x: x[:, :, :samples].flip(0)), valid_VBS=found.valid_2M.transpose(0, 1)
    )
    if not local_views:
        return levels
    local_shape = (local_views, local_samples)
    return levels._replace(
        local_patch_LVBSK=changed(rows, lambda x: x[:, :, samples:].unflatten(2, local_shape).movedim(2, 0)),
        local_valid_LVBS=found.local_valid_L2m.movedim(0, 2),
    )


def student_levels(output: LevelOutput, found: Correspondence) -> StudentLevels:
    """Of all views, sampled as `student_weights` says or not at all."""
    batch, _, samples = found.valid_2M.shape
    tokens = [changed(rows, lambda x: x.unflatten(0, (-1, batch))) for rows in output.token_logits]
    halves = [changed(rows, part) for rows in tokens for part in (_of_globals, _of_locals)]
    levels = StudentLevels(*halves)
    if output.sample_features is None:
        return levels
    of_globals = TEACHER_VIEWS * batch * samples
    of_locals = len(output.sample_features) - of_globals
    rows, local = split_rows(output.sample_logits, [of_globals, of_locals])
    levels = levels._replace(patch_VBSK=changed(rows, lambda x: x.unflatten(0, (TEACHER_VIEWS, batch, samples))))
    if not of_locals:
        return levels
    local_shape = (found.local_tokens_Lm.shape[1], batch, found.local_tokens_Lm.shape[2])
    return levels._replace(local_patch_LBSK=changed(local, lambda x: x.unflatten(0, local_shape)))


def _of_globals(rows: Tensor) -> Tensor:
    return rows[:TEACHER_VIEWS]


def _of_locals(rows: Tensor) -> Tensor:
    return rows[TEACHER_VIEWS:]
