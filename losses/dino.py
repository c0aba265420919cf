"""TODO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from losses.distillation import ROWS, TEACHER_VIEWS, Level, SelfDistillation, check_views, count_rows, spread
from losses.matching import Sources, mixup_sources, unmixed
from ops.chunked_cross_entropy import Targets
from ops.logits import FactoredLogits, Logits, materialize


class DINOLoss(SelfDistillation):
    """Cross-entropy between the teacher's centered, sharpened views and all other views of the student.

    Arguments and state as for `SelfDistillation`.
    """

    weights: ClassVar[dict[str, float]] = {"view_loss": 1.0}

    def accumulate_center(self, teacher_output: Logits) -> None:
        """Add a micro-batch of teacher logits (Q * B, K) to the next center."""
        self._accumulate("center", teacher_output)

    # ----------------------------------------------------------------- loss

    def view_loss(
        self, student_logits: Logits, teacher_logits: Logits, epoch: int, sources: Sources | None = None
    ) -> Tensor:
        """L_V: mean over images and over the Q V - Q pairs of different views; `sources`: None for images that are not mixed."""
        check_views(student_logits, self.ncrops, "student")
        check_views(teacher_logits, TEACHER_VIEWS, "teacher")
        if isinstance(student_logits, FactoredLogits) and isinstance(teacher_logits, FactoredLogits):
            return self._chunked_view_loss(student_logits, teacher_logits, epoch, sources)
        student_VBK = materialize(student_logits).unflatten(0, (self.ncrops, -1))
        teacher_QBK = materialize(teacher_logits).unflatten(0, (TEACHER_VIEWS, -1))
        probs_QBK = self.teacher_probs(teacher_QBK, self.center, epoch)
        columns_Q = []
        for v, logits_BK in enumerate(student_VBK):
            targets_QBK = probs_QBK
            if sources is not None:  # student image b should see the mixture of its sources' probabilities
                targets_QBK = torch.zeros_like(probs_QBK)
                for weights_B, images_B in zip(sources.weights_VPB[v], sources.images_PB):
                    targets_QBK += weights_B[:, None] * probs_QBK[:, images_B]
            # A sum over K, not a matrix product: over 65536 prototypes its rounding is ten times smaller.
            columns_Q.append(-(targets_QBK * self.student_log_probs(logits_BK)).sum(dim=-1).mean(dim=-1))
        loss_QV = torch.stack(columns_Q, dim=1)
        return loss_QV.where(other_views(self.ncrops, loss_QV.device), 0.0).sum() / self._pairs

    def _chunked_view_loss(
        self, student: FactoredLogits, teacher: FactoredLogits, epoch: int, sources: Sources | None
    ) -> Tensor:
        """All rows are one group: student row (v, b) learns from teacher rows (q, a), a being the images that b is mixed from."""
        batch = len(teacher.bottleneck) // TEACHER_VIEWS
        sources = sources or unmixed(self.ncrops, batch, student.bottleneck.device)
        view_Q = torch.arange(TEACHER_VIEWS, device=student.bottleneck.device)
        rows_BQP = batch * view_Q[:, None] + sources.images_PB.T[:, None]
        weights_VBQP = (
            other_views(self.ncrops, view_Q.device).T[:, None, :, None]
            * sources.weights_VPB.transpose(1, 2)[:, :, None]
        )
        rows_VBM = rows_BQP.flatten(1).expand(self.ncrops, -1, -1)
        targets = Targets(rows_VBM.flatten(0, 1)[None], weights_VBQP.flatten(2).flatten(0, 1)[None])
        student, teacher = (factors._replace(bottleneck=factors.bottleneck[None]) for factors in (student, teacher))
        return self._chunked(student, teacher, targets, self.center, epoch) / (batch * self._pairs)

    # ----------------------------------------------------------------- what is watched

    def levels(
        self, student_output: Any, teacher_output: Any, epoch: int, features: Mapping[str, Tensor]
    ) -> dict[str, Level]:
        """Some rows of the outputs for the collapse monitor, by level: pairs of the two global views.

        `features`: of the teacher's backbone, by level. With mixup the student's images are the mixed ones.
        """
        return {"view": self._view_level(student_output, teacher_output, epoch, features["view"])}

    def _view_level(self, student: Logits, teacher: Logits, epoch: int, features: Tensor) -> Level:
        batch = count_rows(teacher) // TEACHER_VIEWS
        images_N = spread(batch, ROWS // TEACHER_VIEWS, self.center.device)
        student_N, teacher_N = torch.cat([batch + images_N, images_N]), torch.cat([images_N, batch + images_N])
        return self._level(student, student_N, teacher, teacher_N, self.center, epoch, features)

    @property
    def _pairs(self) -> int:
        """How many pairs of a teacher's and another student's view there are."""
        return TEACHER_VIEWS * (self.ncrops - 1)

    def terms(
        self,
        student_output: Any,
        teacher_output: Any,
        epoch: int,
        targets_mixup: Sequence[Tensor] | None = None,
        mixed_from: int | None = None,
    ) -> dict[str, Tensor]:
        """The unweighted terms of the loss by name, computed in float32 even where the networks run under autocast.

        Args:
            student_output, teacher_output: as for `forward`.
            epoch: chooses the teacher's temperature.
            targets_mixup: of each student view (B, B), teacher image (row) by student image (column), if images are mixed.
            mixed_from: how many images one is mixed from at most; None for any number, which costs as much as all do.
        """
        with torch.autocast(self.center.device.type, enabled=False):
            sources = None if targets_mixup is None else mixup_sources(targets_mixup, mixed_from)
            return self._terms(student_output, teacher_output, epoch, sources)

    def _terms(
        self, student_output: Any, teacher_output: Any, epoch: int, sources: Sources | None
    ) -> dict[str, Tensor]:
        return {"view_loss": self.view_loss(student_output, teacher_output, epoch, sources)}

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """The weighted sum of the terms: what is minimized."""
        return torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()

    def forward(
        self,
        student_output: Any,
        teacher_output: Any,
        epoch: int,
        targets_mixup: Sequence[Tensor] | None = None,
        mixed_from: int | None = None,
    ) -> Tensor:
        """The loss of a student's and a teacher's output, as the network gives them for a list of crops.

        Here logits (V * B, K) and (Q * B, K); `RegionMatchingLoss` takes `MultiCropOutput`, or plain tuples in its order.
        For mixup see `terms`.

        Raises:
            ValueError: rows that do not fit the number of views (and their regions).
        """
        return self.total(self.terms(student_output, teacher_output, epoch, targets_mixup, mixed_from))


def other_views(student_views: int, device: torch.device) -> Tensor:
    """(Q, V), true where the views differ; view q of the teacher and view q of the student show the same crop."""
    return ~torch.eye(TEACHER_VIEWS, student_views, dtype=torch.bool, device=device)
