"""UDI's objective: self-distillation of the class token, of a second one towards a blended target, and of sampled patches.

    terms = criterion.level_terms(student, teacher, epoch)     # pure; by name the means over global and over local views
    loss = criterion.total_of(terms)
    criterion.accumulate_centers(teacher)                 # after each micro-batch; then update_center once a step

Temperatures, centres over all processes and softmaxes are those of `losses.DINOLoss`.

Shapes: B images, V = 2 global views, L local views, S samples of a view, K prototypes.
Origin: UDI (Su and Ji, ECCV 2024), with the view weights of DINO (Caron et al., ICCV 2021).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from losses import DINOLoss, Logits, at_least_float32
from outputs import FactoredLogits
from utils import UsageError

TARGET_MIXES = ("logits", "probs")
EPSILON = 1e-5  # in the mean over samples, as published: one without samples is 0


class StudentLevels(NamedTuple):
    """A student's logits; of local views L may be 0, and without a second token or patches their fields are None."""

    cls_VBK: Tensor
    local_cls_LBK: Tensor
    plus_VBK: Tensor | None = None
    local_plus_LBK: Tensor | None = None
    patch_VBSK: Tensor | None = None


class TeacherLevels(NamedTuple):
    """A teacher's logits, patches as tensors or `FactoredLogits`.

    `patch` [v] is of view 1 - v at the places of the samples of student view v, `local_patch` [l, v] of view v at those of local
    view l. Samples that are not valid count nowhere.
    """

    cls_VBK: Tensor
    patch_VBSK: Logits | None = None
    valid_VBS: Tensor | None = None
    local_patch_LVBSK: Logits | None = None
    local_valid_LVBS: Tensor | None = None


class UDILoss(DINOLoss):
    """The mean of the levels that there are: `cls`, `plus` (with a second token and patches) and `patch`.

    Args:
        args, kwargs: of `DINOLoss`.
        alpha: weight of the patches in the target of the second token.
        target_mix: blend `logits` before centring (the released code) or `probs` after the softmax (the paper's words).

    State: `center`, `center_plus` and `center_patch`, (1, K) each.

    Raises:
        UsageError: `alpha` outside 0..1, or another mix.
    """

    center_plus: Tensor
    center_patch: Tensor

    def __init__(self, out_dim: int, *args: Any, alpha: float = 0.5, target_mix: str = "logits", **kwargs: Any) -> None:
        super().__init__(out_dim, *args, **kwargs)
        if not 0 <= alpha <= 1:
            raise UsageError(f"--alpha {alpha} must lie in 0..1")
        if target_mix not in TARGET_MIXES:
            raise UsageError(f"--target_mix {target_mix} must be one of {', '.join(TARGET_MIXES)}")
        self.alpha = alpha
        self.target_mix = target_mix
        self._add_center("center_plus", out_dim)
        self._add_center("center_patch", out_dim)

    # ----------------------------------------------------------------- levels

    def level_terms(self, student: StudentLevels, teacher: TeacherLevels, epoch: int) -> dict[str, Tensor]:
        """Means of the cross-entropies by the names of the log: g(lobal) or l(ocal), cl(s), mcl (the second token), pch."""
        with torch.autocast(self.center.device.type, enabled=False):
            cls_VBK = self.teacher_probs(teacher.cls_VBK, self.center, epoch)
            terms = {"g_cl": self._cross_entropy(cls_VBK.flip(0), student.cls_VBK).mean()}
            if len(student.local_cls_LBK):
                terms["l_cl"] = self._cross_entropy(cls_VBK.mean(dim=0), student.local_cls_LBK).mean()
            if student.plus_VBK is not None:
                terms |= self._plus_level(student, teacher, epoch)
            if student.patch_VBSK is not None:
                terms["g_pch"] = self._patch_level(student.patch_VBSK, teacher, epoch)
        return terms

    def _plus_level(self, student: StudentLevels, teacher: TeacherLevels, epoch: int) -> dict[str, Tensor]:
        assert student.plus_VBK is not None
        targets_VBK, local_LVBK = self._targets(teacher, epoch)
        terms = {"g_mcl": self._cross_entropy(targets_VBK, student.plus_VBK).mean()}
        if local_LVBK is not None and student.local_plus_LBK is not None and len(student.local_plus_LBK):
            terms["l_mcl"] = self._cross_entropy(local_LVBK.mean(dim=1), student.local_plus_LBK).mean()
        return terms

    def _patch_level(self, student_VBSK: Tensor, teacher: TeacherLevels, epoch: int) -> Tensor:
        """Mean over the valid samples of this batch; 0 if there are none."""
        assert teacher.patch_VBSK is not None
        assert teacher.valid_VBS is not None
        probs_VBSK = self.teacher_probs(_product(teacher.patch_VBSK), self.center_patch, epoch)
        valid_VBS = teacher.valid_VBS.to(probs_VBSK.dtype)
        return (valid_VBS * self._cross_entropy(probs_VBSK, student_VBSK)).sum() / valid_VBS.sum().clamp(min=1)

    def _cross_entropy(self, probs: Tensor, logits: Tensor) -> Tensor:
        return -(probs * self.student_log_probs(logits)).sum(dim=-1)

    # ----------------------------------------------------------------- the second token's target

    def _targets(self, teacher: TeacherLevels, epoch: int) -> tuple[Tensor, Tensor | None]:
        """Probabilities for the second token on the global views, and on the local ones by teacher view."""
        if self.target_mix == "logits":
            globals_VBK, locals_LVBK = self._mixed_logits(teacher)
            targets = self.teacher_probs(globals_VBK, self.center_plus, epoch)
            return targets, None if locals_LVBK is None else self.teacher_probs(locals_LVBK, self.center_plus, epoch)
        cls_VBK = self.teacher_probs(teacher.cls_VBK, self.center, epoch)

        def blend(patches: Logits | None, valid: Tensor | None, cls: Tensor) -> Tensor:
            assert patches is not None
            assert valid is not None
            probs = self.teacher_probs(_product(patches), self.center_patch, epoch)
            return self.alpha * masked_mean(probs, valid) + (1 - self.alpha) * cls

        targets = blend(teacher.patch_VBSK, teacher.valid_VBS, cls_VBK.flip(0))
        if teacher.local_patch_LVBSK is None:
            return targets, None
        return targets, blend(teacher.local_patch_LVBSK, teacher.local_valid_LVBS, cls_VBK)

    def _mixed_logits(self, teacher: TeacherLevels) -> tuple[Tensor, Tensor | None]:
        """Blended logits (V, B, K) and (L, V, B, K); the patches' are averaged before the last layer where they are factored."""
        cls_VBK = at_least_float32(teacher.cls_VBK.detach())

        def blend(patches: Logits, valid: Tensor | None, cls: Tensor) -> Tensor:
            assert valid is not None
            return self.alpha * masked_mean(patches, valid) + (1 - self.alpha) * cls

        assert teacher.patch_VBSK is not None
        mixed_VBK = blend(teacher.patch_VBSK, teacher.valid_VBS, cls_VBK.flip(0))
        if teacher.local_patch_LVBSK is None:
            return mixed_VBK, None
        return mixed_VBK, blend(teacher.local_patch_LVBSK, teacher.local_valid_LVBS, cls_VBK)

    # ----------------------------------------------------------------- total and centres

    def total_of(self, terms: dict[str, Tensor], locals_: int) -> Tensor:
        """The mean of the levels; in a level, all local views weigh `locals_` times the global ones."""
        levels = [terms["g_pch"]] if "g_pch" in terms else []
        for name in ("cl", "mcl"):
            if f"g_{name}" in terms:
                local = terms.get(f"l_{name}")
                whole = terms[f"g_{name}"]
                levels.append(whole if local is None else (whole + locals_ * local) / (1 + locals_))
        return torch.stack(levels).mean()

    @torch.no_grad()
    def accumulate_centers(self, teacher: TeacherLevels) -> None:
        """Add a micro-batch of teacher logits to the next centres; samples that are not valid have no weight."""
        self._accumulate("center", teacher.cls_VBK.flatten(0, -2))
        if teacher.patch_VBSK is None:
            return
        if self.target_mix == "logits":
            for mixed in self._mixed_logits(teacher):
                if mixed is not None and len(mixed):
                    self._accumulate("center_plus", mixed.flatten(0, -2))
        patches = ((teacher.patch_VBSK, teacher.valid_VBS), (teacher.local_patch_LVBSK, teacher.local_valid_LVBS))
        for logits, valid in patches:
            if logits is not None and valid is not None:
                self._accumulate("center_patch", _rows(logits), valid.flatten())


def masked_mean(logits: Logits, valid: Tensor) -> Tensor:
    """Mean (..., K) over the valid samples of logits (..., S, K); of factored ones before they are multiplied, the same number."""
    rows = logits.bottleneck if isinstance(logits, FactoredLogits) else logits
    rows = at_least_float32(rows.detach())
    weights = valid.to(rows.dtype)
    mean = (weights[..., None] * rows).sum(dim=-2) / (weights.sum(dim=-1, keepdim=True) + EPSILON)
    if not isinstance(logits, FactoredLogits):
        return mean
    return FactoredLogits(mean, logits.prototypes.detach().to(mean.dtype)).product()


def _product(logits: Logits) -> Tensor:
    return logits.product() if isinstance(logits, FactoredLogits) else logits


def _rows(logits: Logits) -> Logits:
    if isinstance(logits, FactoredLogits):
        return logits._replace(bottleneck=logits.bottleneck.flatten(0, -2))
    return logits.flatten(0, -2)
