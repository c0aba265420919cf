"""The loss of EsViT: the view-level loss of DINO and region matching.

Shapes: B images, V student views, Q = 2 teacher views, T regions of a student view, U regions of a teacher view, S and R regions of
all views of an image, K prototypes, P images that a student image is mixed from (1 without mixup). Rows of the inputs are ordered
view, image, region.
Origin: EsViT (Li et al., ICLR 2022), section 3.2, equations 2-4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor

from losses.dino import DINOLoss
from losses.distillation import MONITORED_ROWS, TEACHER_VIEWS, MonitoredLevel, check_views, count_rows, evenly_spaced
from losses.matching import Sources, match_regions, match_views, unmixed_sources
from models.outputs import MultiCropOutput, by_view
from ops.chunked_cross_entropy import Targets
from ops.logits import map_rows


class RegionMatchingLoss(DINOLoss):
    """0.5 L_V + 0.5 L_R: every student region learns from the most similar region of each teacher view.

        for q in teacher views, v in student views, q != v, region t of v:
            u = argmax cosine(student_features[v][t], teacher_features[q])
            loss += H(softmax((teacher[q][u] - center_grid) / teacher_temp), softmax(student[v][t] / student_temp))

    Arguments: as `DINOLoss`. The state dict holds `center` and `center_grid`, (1, K) each.
    """

    center_grid: Tensor
    weights: ClassVar[dict[str, float]] = {"view_loss": 0.5, "region_loss": 0.5}

    def __init__(self, out_dim: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(out_dim, *args, **kwargs)
        self._add_center("center_grid", out_dim)

    def _terms(
        self, student_output: Any, teacher_output: Any, epoch: int, sources: Sources | None
    ) -> dict[str, Tensor]:
        student, teacher = MultiCropOutput(*student_output), MultiCropOutput(*teacher_output)
        # Regions first: they need more temporary memory, and the gradients computed with each loss are kept.
        region_loss = self.region_loss(student, teacher, epoch, sources)
        view_loss = self.view_loss(student.view_logits, teacher.view_logits, epoch, sources)
        return {"view_loss": view_loss, "region_loss": region_loss}

    def region_loss(
        self, student: MultiCropOutput, teacher: MultiCropOutput, epoch: int, sources: Sources | None = None
    ) -> Tensor:
        """Return L_R, the mean over regions, images and pairs of different views.

        With mixup a region is matched in every image that its image is mixed from, weighted by that image's share.
        """
        _check_regions(student, self.ncrops, "student")
        _check_regions(teacher, TEACHER_VIEWS, "teacher")
        batch, images = count_rows(teacher.view_logits) // TEACHER_VIEWS, count_rows(student.view_logits) // self.ncrops
        if images != batch:
            raise ValueError(f"the student has {images} images and the teacher {batch}")
        mixed, sources = sources is not None, sources or unmixed_sources(self.ncrops, batch, self.center.device)
        # A group is a student image: the regions of all its views, and those of the teacher views that it is mixed from.
        student_BSK = map_rows(student.region_logits, lambda rows: torch.cat(by_view(rows, student), dim=1))
        teacher_BRK = map_rows(
            teacher.region_logits,
            lambda rows: torch.cat(
                [view[images_B] for images_B in sources.images_PB for view in by_view(rows, teacher)], dim=1
            ),
        )
        starts = list(accumulate(teacher.regions_per_view, initial=0))
        rows = [
            match.regions_BS + (match.source * starts[-1] + starts[match.teacher_view])
            for match in match_views(student, teacher, sources, mixed)
        ]
        targets = Targets(torch.stack(rows, dim=-1), self._region_weights(student.regions_per_view, sources))
        center = self.target_center("center_grid", teacher.region_logits, epoch)
        return self.cross_entropy(student_BSK, teacher_BRK, targets, center, epoch) / (batch * self._pairs)

    @staticmethod
    def _region_weights(regions_per_view: Sequence[int], sources: Sources) -> Tensor:
        """Return the weights (B, S, Q * P) of teacher regions: the share of their image, 0 in the same view."""
        views = zip(sources.weights_VPB.transpose(1, 2), regions_per_view)
        weights_BSP = torch.cat([(shares_BP / T)[:, None].expand(-1, T, -1) for shares_BP, T in views], dim=1)
        weights_BSQP = weights_BSP[:, :, None].repeat(1, 1, TEACHER_VIEWS, 1)
        starts = list(accumulate(regions_per_view, initial=0))
        for q in range(TEACHER_VIEWS):
            weights_BSQP[:, starts[q] : starts[q + 1], q] = 0
        return weights_BSQP.flatten(2)

    def accumulate_center(self, teacher_output: MultiCropOutput) -> None:  # type: ignore[override]
        """Add the teacher logits of a micro-batch, of views and of regions, to the next centers."""
        self._accumulate("center", teacher_output.view_logits)
        self._accumulate("center_grid", teacher_output.region_logits)

    def monitored_levels(
        self, student_output: Any, teacher_output: Any, epoch: int, features: Mapping[str, Tensor]
    ) -> dict[str, MonitoredLevel]:
        """Sample rows for the collapse monitor: views as in `DINOLoss`, and regions of the second view with their matches."""
        student, teacher = MultiCropOutput(*student_output), MultiCropOutput(*teacher_output)
        first, regions = student.regions_per_view[:TEACHER_VIEWS]
        teacher_regions = teacher.regions_per_view[0]
        batch = count_rows(teacher.view_logits) // TEACHER_VIEWS
        images_B1 = evenly_spaced(batch, MONITORED_ROWS // 8, self.center.device)[:, None]
        sampled_1T = evenly_spaced(regions, MONITORED_ROWS // len(images_B1), self.center.device)[None]
        student_BT = batch * first + images_B1 * regions + sampled_1T
        teacher_BU = images_B1 * teacher_regions + torch.arange(teacher_regions, device=self.center.device)
        matches_BT = match_regions(student.region_features[student_BT], teacher.region_features[teacher_BU])
        teacher_N = (images_B1 * teacher_regions + matches_BT).flatten()
        logits = student.region_logits, student_BT.flatten(), teacher.region_logits, teacher_N
        return {
            "view": self._monitored_views(student.view_logits, teacher.view_logits, epoch, features["view"]),
            "region": self._monitored(
                *logits, self.target_center("center_grid", teacher.region_logits, epoch), epoch, features["region"]
            ),
        }


def _check_regions(output: MultiCropOutput, views: int, who: str) -> None:
    check_views(output.view_logits, views, who)
    if len(output.regions_per_view) != views:
        raise ValueError(f"regions_per_view has {len(output.regions_per_view)} entries, the {who} has {views} views")
    rows = count_rows(output.region_logits)
    expected = count_rows(output.view_logits) // views * sum(output.regions_per_view)
    if expected != rows or expected != len(output.region_features):
        raise ValueError(f"the {who} has {rows} region rows, expected {expected}")
