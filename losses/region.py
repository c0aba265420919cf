"""TODO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor

from losses.dino import DINOLoss
from losses.distillation import ROWS, TEACHER_VIEWS, Level, check_views, count_rows, spread
from losses.matching import Match, Sources, match_regions, match_views, unmixed
from models.outputs import MultiCropOutput, by_view
from ops.chunked_cross_entropy import Targets
from ops.logits import FactoredLogits, materialize


class RegionMatchingLoss(DINOLoss):
    """0.5 L_V + 0.5 L_R, with every student region matched to its most similar teacher region.

    Arguments as for `DINOLoss`. State: `center` and `center_grid`, (1, K) each.
    """

    center_grid: Tensor
    weights: ClassVar[dict[str, float]] = {"view_loss": 0.5, "region_loss": 0.5}

    def __init__(self, out_dim: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(out_dim, *args, **kwargs)
        self._add_center("center_grid", out_dim)

    def accumulate_center(self, teacher_output: MultiCropOutput) -> None:  # type: ignore[override]
        """Add a micro-batch of teacher logits, of views and of regions, to the next centers."""
        self._accumulate("center", teacher_output.view_logits)
        self._accumulate("center_grid", teacher_output.region_logits)

    def region_loss(
        self,
        student: MultiCropOutput,
        teacher: MultiCropOutput,
        epoch: int,
        sources: Sources | None = None,
    ) -> Tensor:
        """L_R: cross-entropy of each student region and its match, mean over regions, images and pairs of different views.

        With mixup a region is matched in every image that its image was mixed from, and its targets are mixed accordingly.
        """
        _check_regions(student, self.ncrops, "student")
        _check_regions(teacher, TEACHER_VIEWS, "teacher")
        batch, images = count_rows(teacher.view_logits) // TEACHER_VIEWS, count_rows(student.view_logits) // self.ncrops
        if images != batch:
            raise ValueError(f"{images} images of the student and {batch} of the teacher do not fit each other")
        mixed, sources = sources is not None, sources or unmixed(self.ncrops, batch, teacher.region_features.device)
        matches = list(match_views(student, teacher, sources, mixed))
        if isinstance(student.region_logits, FactoredLogits) and isinstance(teacher.region_logits, FactoredLogits):
            return self._chunked_region_loss(student, teacher, epoch, sources, matches)
        student_views = by_view(materialize(student.region_logits), student)
        teacher_views = by_view(materialize(teacher.region_logits), teacher)
        log_probs = [self.student_log_probs(logits_BTK) for logits_BTK in student_views]
        probs = [self.teacher_probs(logits_BUK, self.center_grid, epoch) for logits_BUK in teacher_views]
        loss = self.center_grid.new_zeros(())
        for match in matches:
            images_B1 = match.images_B[:, None]
            targets_BTK = probs[match.teacher_view][images_B1, match.regions_BT]
            cross_entropy_BT = -(targets_BTK * log_probs[match.student_view]).sum(dim=-1)
            loss = loss + (match.weights_B * cross_entropy_BT.mean(dim=1)).mean()
        return loss / self._pairs

    def _chunked_region_loss(
        self, student: MultiCropOutput, teacher: MultiCropOutput, epoch: int, sources: Sources, matches: Sequence[Match]
    ) -> Tensor:
        """Groups are student images: the regions of all their views, and those of the teacher's views that they are mixed from."""
        student_BSD = torch.cat(by_view(student.region_logits.bottleneck, student), dim=1)
        teacher_views = by_view(teacher.region_logits.bottleneck, teacher)
        teacher_BRD = torch.cat(
            [view_BUD[images_B] for images_B in sources.images_PB for view_BUD in teacher_views], dim=1
        )
        starts = list(accumulate(student.regions_per_view, initial=0))
        teacher_starts = list(accumulate(teacher.regions_per_view, initial=0))
        batch, regions, _ = student_BSD.shape
        columns = TEACHER_VIEWS * len(sources.images_PB)
        targets = Targets(
            student_BSD.new_zeros(batch, regions, columns, dtype=torch.long),
            student_BSD.new_zeros(batch, regions, columns, dtype=torch.float32),
        )
        for match in matches:
            v, q, p = match.student_view, match.teacher_view, match.source
            place = (slice(None), slice(starts[v], starts[v + 1]), p * TEACHER_VIEWS + q)
            targets.rows_GSM[place] = match.regions_BT + (p * teacher_starts[-1] + teacher_starts[q])
            targets.weights_GSM[place] = match.weights_B[:, None] / student.regions_per_view[v]
        student_logits = student.region_logits._replace(bottleneck=student_BSD)
        teacher_logits = teacher.region_logits._replace(bottleneck=teacher_BRD)
        return self._chunked(student_logits, teacher_logits, targets, self.center_grid, epoch) / (batch * self._pairs)

    def levels(
        self, student_output: Any, teacher_output: Any, epoch: int, features: Mapping[str, Tensor]
    ) -> dict[str, Level]:
        """As for views; also regions of the second view, with their matches in the first."""
        student, teacher = MultiCropOutput(*student_output), MultiCropOutput(*teacher_output)
        first, regions = student.regions_per_view[:TEACHER_VIEWS]
        of_teacher = teacher.regions_per_view[0]
        batch = count_rows(teacher.view_logits) // TEACHER_VIEWS
        images_B1 = spread(batch, ROWS // 8, self.center.device)[:, None]
        some_1T = spread(regions, ROWS // len(images_B1), self.center.device)[None]
        student_BT = batch * first + images_B1 * regions + some_1T
        all_1U = torch.arange(of_teacher, device=self.center.device)
        matches_BT = match_regions(
            student.region_features[student_BT], teacher.region_features[images_B1 * of_teacher + all_1U]
        )
        teacher_N = (images_B1 * of_teacher + matches_BT).flatten()
        logits = student.region_logits, student_BT.flatten(), teacher.region_logits, teacher_N
        return {
            "view": self._view_level(student.view_logits, teacher.view_logits, epoch, features["view"]),
            "region": self._level(*logits, self.center_grid, epoch, features["region"]),
        }

    def _terms(
        self, student_output: Any, teacher_output: Any, epoch: int, sources: Sources | None
    ) -> dict[str, Tensor]:
        student, teacher = MultiCropOutput(*student_output), MultiCropOutput(*teacher_output)
        # First: it needs more room, and gradients stay.
        region_loss = self.region_loss(student, teacher, epoch, sources)
        view_loss = self.view_loss(student.view_logits, teacher.view_logits, epoch, sources)
        return {"view_loss": view_loss, "region_loss": region_loss}


def _check_regions(output: MultiCropOutput, views: int, who: str) -> None:
    check_views(output.view_logits, views, who)
    if len(output.regions_per_view) != views:
        raise ValueError(f"regions_per_view has {len(output.regions_per_view)} entries, the {who} has {views} views")
    rows, expected = (
        count_rows(output.region_logits),
        count_rows(output.view_logits) // views * sum(output.regions_per_view),
    )
    if expected != rows or expected != len(output.region_features):
        raise ValueError(f"the {who} has {rows} region rows, its views add up to {expected}")
