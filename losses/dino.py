"""The view-level loss of DINO.

Shapes: B images, V student views, Q = 2 teacher views, K prototypes, P images that a student image is mixed from (1 without
mixup), M = Q P targets of a student row. Rows of the inputs are ordered view, image.
The temperatures, the centers and the cross-entropy are in losses/distillation.py.

Origin: DINO (Caron et al., ICCV 2021), section 3.1; EsViT (Li et al., ICLR 2022), equation 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from losses.distillation import (
    MONITORED_ROWS,
    TEACHER_VIEWS,
    MonitoredLevel,
    SelfDistillation,
    check_views,
    count_rows,
    evenly_spaced,
)
from losses.matching import Sources, mixup_sources, unmixed_sources
from ops.chunked_cross_entropy import Targets
from ops.logits import Logits, map_rows


class DINOLoss(SelfDistillation):
    """Cross-entropy between the teacher's centered, sharpened views and all other views of the student.

        for q in teacher views, v in student views, q != v:
            loss += H(softmax((teacher[q] - center) / teacher_temp), softmax(student[v] / student_temp))

    Arguments and state: as `SelfDistillation`.
    """

    weights: ClassVar[dict[str, float]] = {"view_loss": 1.0}

    def forward(
        self,
        student_output: Any,
        teacher_output: Any,
        epoch: int,
        targets_mixup: Sequence[Tensor] | None = None,
        mixed_from: int | None = None,
    ) -> Tensor:
        """Return the loss of the outputs that student and teacher give for a list of crops.

        Args:
            student_output: Logits (V * B, K); for `RegionMatchingLoss` a `MultiCropOutput`, or a tuple in its order.
            teacher_output: The same for the first two views.
            epoch: Epoch that determines the teacher temperature.
            targets_mixup: For each student view the share (B, B) of teacher image (row) in student image (column); None
                without mixup.
            mixed_from: Upper bound of the number of images that one is mixed from; None for B, which is slow.

        Raises:
            ValueError: The number of rows does not fit the number of views (and their regions).
        """
        return self.total(self.terms(student_output, teacher_output, epoch, targets_mixup, mixed_from))

    def terms(
        self,
        student_output: Any,
        teacher_output: Any,
        epoch: int,
        targets_mixup: Sequence[Tensor] | None = None,
        mixed_from: int | None = None,
    ) -> dict[str, Tensor]:
        """Return the unweighted terms of the loss by name, computed outside of autocast; arguments as for `forward`."""
        with torch.autocast(self.center.device.type, enabled=False):
            sources = None if targets_mixup is None else mixup_sources(targets_mixup, mixed_from)
            return self._terms(student_output, teacher_output, epoch, sources)

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """Return the weighted sum of the terms."""
        return torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()

    def _terms(
        self, student_output: Any, teacher_output: Any, epoch: int, sources: Sources | None
    ) -> dict[str, Tensor]:
        return {"view_loss": self.view_loss(student_output, teacher_output, epoch, sources)}

    def view_loss(
        self, student_logits: Logits, teacher_logits: Logits, epoch: int, sources: Sources | None = None
    ) -> Tensor:
        """Return L_V, the mean over images and over the Q V - Q pairs of different views."""
        check_views(student_logits, self.ncrops, "student")
        check_views(teacher_logits, TEACHER_VIEWS, "teacher")
        batch, device = count_rows(teacher_logits) // TEACHER_VIEWS, self.center.device
        sources = sources or unmixed_sources(self.ncrops, batch, device)
        # All rows form one group: student row (v, b) learns from the teacher rows (q, a) of all images a that b is mixed from.
        view_Q = torch.arange(TEACHER_VIEWS, device=device)
        rows_BQP = batch * view_Q[:, None] + sources.images_PB.T[:, None]
        different_VQ = ~torch.eye(self.ncrops, TEACHER_VIEWS, dtype=torch.bool, device=device)
        weights_VBQP = different_VQ[:, None, :, None] * sources.weights_VPB.transpose(1, 2)[:, :, None]
        rows_VBM = rows_BQP.flatten(1).expand(self.ncrops, -1, -1)
        targets = Targets(rows_VBM.flatten(0, 1)[None], weights_VBQP.flatten(2).flatten(0, 1)[None])
        student, teacher = (map_rows(logits, lambda rows: rows[None]) for logits in (student_logits, teacher_logits))
        center = self.target_center("center", teacher_logits, epoch)
        return self.cross_entropy(student, teacher, targets, center, epoch) / (batch * self._pairs)

    @property
    def _pairs(self) -> int:
        """The number of pairs of different teacher and student views."""
        return TEACHER_VIEWS * (self.ncrops - 1)

    def accumulate_center(self, teacher_output: Logits) -> None:
        """Add the teacher logits (Q * B, K) of a micro-batch to the next center."""
        self._accumulate("center", teacher_output)

    def monitored_levels(
        self, student_output: Any, teacher_output: Any, epoch: int, features: Mapping[str, Tensor]
    ) -> dict[str, MonitoredLevel]:
        """Sample rows for the collapse monitor by level: pairs of the two global views.

        Args:
            student_output, teacher_output, epoch: As for `forward`.
            features: Features of the teacher's backbone by level.
        """
        return {"view": self._monitored_views(student_output, teacher_output, epoch, features["view"])}

    def _monitored_views(self, student: Logits, teacher: Logits, epoch: int, features: Tensor) -> MonitoredLevel:
        batch = count_rows(teacher) // TEACHER_VIEWS
        images_N = evenly_spaced(batch, MONITORED_ROWS // TEACHER_VIEWS, self.center.device)
        student_N, teacher_N = torch.cat([batch + images_N, images_N]), torch.cat([images_N, batch + images_N])
        center = self.target_center("center", teacher, epoch)
        return self._monitored(student, student_N, teacher, teacher_N, center, epoch, features)
