"""The loss of UDI: self-distillation of the class token, of a second token towards a blended target, and of sampled patches.

    terms = criterion.terms(student, teacher, epoch)      # changes no state
    loss = criterion.total(terms)
    criterion.accumulate_center(teacher)                  # after each micro-batch; then update_center once per step

The last layer is linear, so that the mean of patch logits is the product of the mean bottleneck vector.

Shapes: B images, V = 2 global views, L local views, S samples of a view, K prototypes; X student views, each of which learns from Y
teacher views; G groups of rows that are compared (an image, or a view of one).
Origin: UDI (Su and Ji, ECCV 2024), with the view weights of DINO (Caron et al., ICCV 2021).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from config.choices import LEVELS, TARGET_MIXES
from distributed.collectives import all_reduce_sum, get_world_size
from losses.distillation import (
    MONITORED_ROWS,
    TEACHER_VIEWS,
    MonitoredLevel,
    SelfDistillation,
    at_least_float32,
    evenly_spaced,
)
from ops.chunked_cross_entropy import Targets
from ops.logits import FactoredLogits, Logits, map_rows, materialize
from utils import UsageError

EPSILON = 1e-5  # in the mean over samples, as published: one without samples is 0


class UDILoss(SelfDistillation):
    """The weighted mean over the levels that are present: class token, second token and patches.

    Args:
        out_dim: Number of prototypes K.
        args, kwargs: Further arguments of `SelfDistillation`; the first two views are global.
        alpha: Weight of the patches in the target of the second token.
        target_mix: Blend `logits` before centering (released code) or `probs` after the softmax (paper).
        fall_back: Without a valid sample in a pair of views, the target is that of the class token. Otherwise, as in the released
            code, it is computed from the class token's logits times 1 - alpha, which is softer.
        level_weights: Relative weights of the three levels.

    The state dict holds `center`, `center_plus` and `center_patch`, (1, K) each.

    Raises:
        UsageError: `alpha`, `target_mix` or `level_weights` is invalid.
    """

    center_plus: Tensor
    center_patch: Tensor

    def __init__(
        self,
        out_dim: int,
        *args: Any,
        alpha: float = 0.5,
        target_mix: str = "logits",
        fall_back: bool = False,
        level_weights: Sequence[float] = (1.0, 1.0, 1.0),
        **kwargs: Any,
    ) -> None:
        super().__init__(out_dim, *args, **kwargs)
        if not 0 <= alpha <= 1:
            raise UsageError(f"--alpha {alpha} must be in [0, 1]")
        if target_mix not in TARGET_MIXES:
            raise UsageError(f"--target_mix {target_mix} must be one of {', '.join(TARGET_MIXES)}")
        fits = all(0 <= weight < float("inf") for weight in level_weights)
        if len(level_weights) != len(LEVELS) or not fits or not level_weights[0] > 0:
            given = " ".join(map(str, level_weights))
            raise UsageError(
                f"--level_weights {given} must be three finite numbers, for class token, second token and patches: the first "
                "positive, none negative"
            )
        self.alpha = alpha
        self.target_mix = target_mix
        self.fall_back = fall_back
        self.level_weights = dict(zip(LEVELS, level_weights))
        self._add_center("center_plus", out_dim)
        self._add_center("center_patch", out_dim)

    # ----------------------------------------------------------------- terms

    def terms(self, student: StudentLevels, teacher: TeacherLevels, epoch: int) -> dict[str, Tensor]:
        """Return mean cross-entropies in float32, named `g_` or `l_` (global or local student view v) and one of `LEVELS`.

        With a teacher view w other than v, the teacher's patches p of w at the valid samples of v, P = softmax((. - center) /
        teacher_temp) and Q = softmax(. / student_temp)::

            cl  = H(P(teacher.cls[w]), Q(student.cls[v]))
            mcl = H(P(alpha mean(p) + (1 - alpha) teacher.cls[w]), Q(student.plus[v]))
            pch = mean over samples of H(P(p), Q(student.patch[v]))
        """
        with torch.autocast(self.center.device.type, enabled=False):
            terms = self._class_level(student.cls_VBK, student.local_cls_LBK, teacher.cls_VBK, epoch)
            if student.plus_VBK is not None:
                terms |= self._plus_level(student, teacher, epoch)
            if student.patch_VBSK is not None:
                terms |= self._patch_level(student, teacher, epoch)
        return terms

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted mean of the levels; within a level, local views count L times as much as global ones."""
        locals_, loss, weights = self.ncrops - TEACHER_VIEWS, self.center.new_zeros(()), 0.0
        for name, weight in self.level_weights.items():
            if f"g_{name}" in terms:
                level = terms[f"g_{name}"]
                if f"l_{name}" in terms:
                    level = (level + locals_ * terms[f"l_{name}"]) / (1 + locals_)
                loss, weights = loss + weight * level, weights + weight
        return loss / weights

    def _class_level(self, views_VBK: Logits, local_LBK: Logits, cls_VBK: Logits, epoch: int) -> dict[str, Tensor]:
        """Global views learn from each other, local views from both."""
        teacher = _images_first(cls_VBK)
        views, batch = _leading_shape(cls_VBK)
        flipped = self._arange(views).flip(0)[:, None]
        terms = {
            "g_cl": self.cross_entropy(
                _images_first(views_VBK), teacher, self._uniform_targets(flipped, batch), self.center, epoch
            )
        }
        if _leading_shape(local_LBK)[0]:
            both = self._arange(views).expand(_leading_shape(local_LBK)[0], -1)
            terms["l_cl"] = self.cross_entropy(
                _images_first(local_LBK), teacher, self._uniform_targets(both, batch), self.center, epoch
            )
        return terms

    def _plus_level(self, student: StudentLevels, teacher: TeacherLevels, epoch: int) -> dict[str, Tensor]:
        assert student.plus_VBK is not None
        blend = self._plus_term_logits if self.target_mix == "logits" else self._plus_term_probs
        assert teacher.patch_VBSK is not None
        assert teacher.valid_VBS is not None
        # Each global student view has one teacher view, the other one.
        patches, valid = map_rows(teacher.patch_VBSK, lambda x: x[:, None]), teacher.valid_VBS[:, None]
        other_VV = self._arange(TEACHER_VIEWS).flip(0)[:, None]
        terms = {"g_mcl": blend(student.plus_VBK, patches, valid, teacher.cls_VBK, other_VV, epoch)}
        if student.local_plus_LBK is not None and _leading_shape(student.local_plus_LBK)[0]:
            assert teacher.local_patch_LVBSK is not None
            assert teacher.local_valid_LVBS is not None
            both_LV = self._arange(TEACHER_VIEWS).expand(_leading_shape(student.local_plus_LBK)[0], -1)
            local = teacher.local_patch_LVBSK, teacher.local_valid_LVBS
            terms["l_mcl"] = blend(student.local_plus_LBK, *local, teacher.cls_VBK, both_LV, epoch)
        return terms

    def _patch_level(self, student: StudentLevels, teacher: TeacherLevels, epoch: int) -> dict[str, Tensor]:
        """Return means over the valid samples, or 0 without any; a group is one view of an image."""
        assert student.patch_VBSK is not None
        assert teacher.patch_VBSK is not None
        assert teacher.valid_VBS is not None
        valid_GS = teacher.valid_VBS.flatten(0, 1).to(self.center.dtype)
        rows_GS1 = self._arange(valid_GS.shape[1]).expand_as(valid_GS)[..., None]
        targets = Targets(rows_GS1, _valid_weights(valid_GS)[..., None])
        compared = _flatten(student.patch_VBSK, 2), _flatten(teacher.patch_VBSK, 2)
        terms = {"g_pch": self.cross_entropy(*compared, targets, self.center_patch, epoch)}
        if student.local_patch_LBSK is not None and _leading_shape(student.local_patch_LBSK)[0]:
            assert teacher.local_patch_LVBSK is not None
            assert teacher.local_valid_LVBS is not None
            valid_GSV = teacher.local_valid_LVBS.movedim(1, -1).flatten(0, 1).to(self.center.dtype)
            samples = valid_GSV.shape[1]
            columns_SV = self._arange(samples)[:, None] + samples * self._arange(TEACHER_VIEWS)
            targets = Targets(columns_SV.expand_as(valid_GSV), _valid_weights(valid_GSV))
            patches = map_rows(teacher.local_patch_LVBSK, lambda x: x.movedim(1, 2).flatten(2, 3).flatten(0, 1))
            compared = _flatten(student.local_patch_LBSK, 2), patches
            terms["l_pch"] = self.cross_entropy(*compared, targets, self.center_patch, epoch)
        return terms

    def _arange(self, count: int) -> Tensor:
        return torch.arange(count, device=self.center.device)

    def _uniform_targets(self, rows_XY: Tensor, batch: int) -> Targets:
        """Return targets with equal weights that add up to 1: in each image, X student rows learn from Y teacher rows each."""
        weights = self.center.new_full((batch, *rows_XY.shape), 1 / (batch * rows_XY.numel()))
        return Targets(rows_XY.expand(batch, -1, -1), weights)

    # ----------------------------------------------------------------- target of the second token

    def _alpha(self, valid: Tensor) -> Tensor:
        """Return the weight of the patches for each pair of views with samples `valid` (..., S)."""
        alpha = torch.full(valid.shape[:-1], self.alpha, dtype=self.center.dtype, device=valid.device)
        return torch.where(valid.bool().any(dim=-1), alpha, 0.0) if self.fall_back else alpha

    def mixed_logits(self, patches: Logits, valid: Tensor, cls: Logits) -> Logits:
        """Blend masked means of patches (..., S, K) with class tokens (..., K), before the last layer if they share it."""
        mean, alpha = masked_mean(patches, valid), self._alpha(valid)[..., None]
        if isinstance(mean, FactoredLogits) and isinstance(cls, FactoredLogits) and mean.prototypes is cls.prototypes:
            rows = at_least_float32(cls.bottleneck.detach())
            return mean._replace(bottleneck=alpha * mean.bottleneck + (1 - alpha) * rows)
        return alpha * materialize(mean) + (1 - alpha) * at_least_float32(materialize(cls).detach())

    def _plus_term_logits(
        self, student_XBK: Logits, patches: Logits, valid: Tensor, cls_VBK: Logits, views_XY: Tensor, epoch: int
    ) -> Tensor:
        """Return the term of the second token: each of X student views learns from the Y teacher views in `views_XY`."""
        mixed_XYBK = self.mixed_logits(patches, valid, map_rows(cls_VBK, lambda x: x[views_XY]))
        columns_XY = self._arange(views_XY.numel()).view_as(views_XY)
        targets = self._uniform_targets(columns_XY, _leading_shape(cls_VBK)[1])
        return self.cross_entropy(
            _images_first(student_XBK), _images_first(_flatten(mixed_XYBK, 2)), targets, self.center_plus, epoch
        )

    def _plus_term_probs(
        self, student_XBK: Logits, patches: Logits, valid: Tensor, cls_VBK: Logits, views_XY: Tensor, epoch: int
    ) -> Tensor:
        """Return the same term with blended probabilities: the cross-entropy is linear in them, and each part has its center."""
        student, (batch, samples) = _images_first(student_XBK), valid.shape[2:]
        pairs = views_XY.numel()
        alpha_BXY = self._alpha(valid).movedim(-1, 0)
        valid = valid.to(self.center.dtype)
        shares_XYBS = valid / (valid.sum(dim=-1, keepdim=True) + EPSILON)
        weights_BXYS = alpha_BXY[..., None] * shares_XYBS.movedim(2, 0) / (batch * pairs)
        rows_XM = self._arange(pairs * samples).view(len(views_XY), -1)
        targets = Targets(rows_XM.expand(batch, -1, -1), weights_BXYS.flatten(2))
        rows = map_rows(patches, lambda x: x.movedim(2, 0).flatten(1, 3))
        patch_loss = self.cross_entropy(student, rows, targets, self.center_patch, epoch)
        targets = Targets(views_XY.expand(batch, -1, -1), (1 - alpha_BXY) / (batch * pairs))
        return patch_loss + self.cross_entropy(student, _images_first(cls_VBK), targets, self.center, epoch)

    # ----------------------------------------------------------------- centers

    @torch.no_grad()
    def accumulate_center(self, teacher: TeacherLevels) -> None:
        """Add the teacher logits of a micro-batch to the next centers; invalid samples have no weight."""
        with torch.autocast(self.center.device.type, enabled=False):
            self._accumulate("center", _flatten(teacher.cls_VBK, 2))
            if teacher.patch_VBSK is None:
                return
            for patches, valid, cls in self._pairs_with_patches(teacher):
                if valid.numel():
                    if self.target_mix == "logits":
                        mixed = self.mixed_logits(patches, valid, cls)
                        self._accumulate("center_plus", _flatten(mixed, valid.ndim - 1))
                    self._accumulate("center_patch", _flatten(patches, valid.ndim), valid.flatten())

    def _pairs_with_patches(self, teacher: TeacherLevels) -> list[tuple[Logits, Tensor, Logits]]:
        """Return patches, their validity and the class tokens they are blended with, for global and for local views."""
        assert teacher.patch_VBSK is not None
        assert teacher.valid_VBS is not None
        groups = [(teacher.patch_VBSK, teacher.valid_VBS, map_rows(teacher.cls_VBK, lambda x: x.flip(0)))]
        if teacher.local_patch_LVBSK is not None and teacher.local_valid_LVBS is not None:
            groups.append((teacher.local_patch_LVBSK, teacher.local_valid_LVBS, teacher.cls_VBK))
        return groups

    # ----------------------------------------------------------------- collapse monitor

    def monitored_levels(
        self, student: StudentLevels, teacher: TeacherLevels, epoch: int, features: Mapping[str, Tensor]
    ) -> dict[str, MonitoredLevel]:
        """Sample rows of the global views for the collapse monitor, by level `cls`, `cls+` and `patch`."""
        views, batch = _leading_shape(teacher.cls_VBK)
        images_N = evenly_spaced(batch, MONITORED_ROWS // views, self.center.device)
        student_N, other_N = torch.cat([images_N, batch + images_N]), torch.cat([batch + images_N, images_N])
        cls = _flatten(student.cls_VBK, 2), student_N, _flatten(teacher.cls_VBK, 2), other_N
        levels = {"cls": self._monitored(*cls, self.center, epoch, features["cls"], "g_cl")}
        if teacher.patch_VBSK is None or teacher.valid_VBS is None:
            return levels
        if student.plus_VBK is not None:
            patches, valid, other_cls = self._pairs_with_patches(teacher)[0]
            mixed = _flatten(self.mixed_logits(patches, valid, other_cls), 2)
            plus = _flatten(student.plus_VBK, 2), student_N, mixed, student_N
            levels["cls+"] = self._monitored(*plus, self.center_plus, epoch, features["cls+"], "g_mcl")
        if student.patch_VBSK is not None:
            valid_first = teacher.valid_VBS.flatten().float().argsort(descending=True, stable=True)
            sampled_N = valid_first[:MONITORED_ROWS]
            patch = _flatten(student.patch_VBSK, 3), sampled_N, _flatten(teacher.patch_VBSK, 3), sampled_N
            levels["patch"] = self._monitored(*patch, self.center_patch, epoch, features["patch"], "g_pch")
        return levels


def masked_mean(logits: Logits, valid: Tensor) -> Logits:
    """Return the mean (..., K) over the valid samples of logits (..., S, K); factored logits stay factored."""
    rows = logits.bottleneck if isinstance(logits, FactoredLogits) else logits
    rows = at_least_float32(rows.detach())
    weights = valid.to(rows.dtype)
    mean = (weights[..., None] * rows).sum(dim=-2) / (weights.sum(dim=-1, keepdim=True) + EPSILON)
    return logits._replace(bottleneck=mean) if isinstance(logits, FactoredLogits) else mean


def _valid_weights(valid: Tensor) -> Tensor:
    """Return weights of valid samples whose loss, averaged over processes, is the mean over the samples of all processes.

    The released code averages over the samples of each process instead.
    """
    processes = get_world_size()
    return valid * processes / all_reduce_sum(valid.sum()).clamp(min=1)


def _images_first(logits_XBK: Logits) -> Logits:
    return map_rows(logits_XBK, lambda x: x.movedim(1, 0))


def _flatten(logits: Logits, axes: int) -> Logits:
    """Flatten the first `axes` axes."""
    return map_rows(logits, lambda x: x.flatten(0, axes - 1))


def _leading_shape(logits: Logits) -> tuple[int, int]:
    """Return the sizes of the first two axes."""
    rows = logits.bottleneck if isinstance(logits, FactoredLogits) else logits
    return rows.shape[0], rows.shape[1]


class StudentLevels(NamedTuple):
    """Logits of the student; L may be 0, and levels that are not trained are None."""

    cls_VBK: Logits
    local_cls_LBK: Logits
    plus_VBK: Logits | None = None
    local_plus_LBK: Logits | None = None
    patch_VBSK: Logits | None = None
    local_patch_LBSK: Logits | None = None


class TeacherLevels(NamedTuple):
    """Logits of the teacher.

    `patch[v]` holds patches of view 1 - v at the positions of the samples of student view v, and `local_patch[l, v]` those of view
    v at the positions of the samples of local view l. Invalid samples are ignored.
    """

    cls_VBK: Logits
    patch_VBSK: Logits | None = None
    valid_VBS: Tensor | None = None
    local_patch_LVBSK: Logits | None = None
    local_valid_LVBS: Tensor | None = None
