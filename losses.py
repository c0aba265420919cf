"""The objective: teacher temperature, centre, the view loss and the loss of matched regions.

    loss = criterion(student_output, teacher_output, epoch)   # pure: changes no state
    criterion.accumulate_center(teacher_output)               # of each micro-batch
    criterion.update_center()                                 # once a step, over all processes

Logits come multiplied, or as `FactoredLogits`; then the same numbers are computed in chunks (chunked_loss.py). Which regions are
compared is found by matching.py.

Shapes: B images, V student views, Q = 2 teacher views, T regions of a student view, U regions of a teacher view, K prototypes,
D channels of the bottleneck, P images that a student image is mixed from, 1 without mixup. Rows of the inputs
are ordered view, image (, region).
Origin: DINO (Caron et al., ICCV 2021) section 3.1; EsViT (Li et al., ICLR 2022) section 3.2, equations 2-4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import health
from chunked_loss import Targets, Temperatures, chunked_cross_entropy
from matching import Match, Sources, match_regions, match_views, mixup_sources, unmixed
from outputs import FactoredLogits, Logits, MultiCropOutput, by_view, multiplied
from utils import UsageError, start_all_reduce_sum

TEACHER_VIEWS = 2


def teacher_temperature_schedule(
    warmup_teacher_temp: float, teacher_temp: float, warmup_teacher_temp_epochs: int, nepochs: int
) -> np.ndarray:
    """The teacher's temperature of each epoch: a linear warm-up that ends at `teacher_temp`, then constant (DINO, appendix).

    Raises:
        UsageError: a warm-up longer than the training, or a temperature that is not positive.
    """
    if warmup_teacher_temp_epochs > nepochs:
        raise UsageError(
            f"the teacher temperature warms up for {warmup_teacher_temp_epochs} epochs, the run has {nepochs}; "
            "lower --warmup_teacher_temp_epochs"
        )
    if min(warmup_teacher_temp, teacher_temp) <= 0:
        raise UsageError(f"teacher temperatures must be positive, not {warmup_teacher_temp} and {teacher_temp}")
    warmup = np.linspace(warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs)
    return np.concatenate([warmup, np.full(nepochs - warmup_teacher_temp_epochs, teacher_temp)])


class SelfDistillation(nn.Module):
    """What objectives of self-distillation share: temperatures, centres over all processes, and probabilities.

    Args:
        out_dim: number of prototypes K.
        ncrops: student views V; the first two are the teacher's.
        warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, nepochs: the teacher's temperature schedule.
        student_temp: the student's temperature.
        center_momentum: EMA momentum of the centre.

    State: `center` (1, K), in the state dict under the published name.

    Raises:
        UsageError: fewer views than the teacher's, or see `teacher_temperature_schedule`.
    """

    center: Tensor

    def __init__(
        self,
        out_dim: int,
        ncrops: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        nepochs: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        if ncrops < TEACHER_VIEWS:
            raise UsageError(f"the loss compares at least {TEACHER_VIEWS} views, not {ncrops}")
        self.ncrops = ncrops
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.teacher_temp_schedule = teacher_temperature_schedule(
            warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, nepochs
        )
        # Of this step, by name of a centre: (1, K + 1) of each micro-batch, the weighted sum of its logits and the sum of the
        # weights, on their way to the sum over all processes.
        self._sums: dict[str, list[Callable[[], Tensor]]] = {}
        self._add_center("center", out_dim)

    # ----------------------------------------------------------------- centre

    def _add_center(self, name: str, out_dim: int) -> None:
        self.register_buffer(name, torch.zeros(1, out_dim))

    @torch.no_grad()
    def _accumulate(self, name: str, logits: Logits, weights_N: Tensor | None = None) -> None:
        """Add N rows to the next centre `name`, each with its weight, not negative, or 1.

        Their sum over all processes is begun here and not waited for: it goes on while the student computes.
        """
        total_1K = _sum_of_rows(logits, weights_N)
        weight = (
            total_1K.new_full((), _count(logits))
            if weights_N is None
            else at_least_float32(weights_N).sum().to(total_1K)
        )
        sums = torch.cat([total_1K, weight.view(1, 1)], dim=1)
        self._sums.setdefault(name, []).append(start_all_reduce_sum(sums))

    @torch.no_grad()
    def update_center(self, applied: Tensor | None = None) -> None:
        """Move each centre towards the weighted mean of what was accumulated, over all processes; one without weight stays.

        `applied`, a boolean scalar on the device, is false for a step that is skipped: then no centre changes.
        """
        for name, started in self._sums.items():
            sums = torch.stack([wait() for wait in started]).sum(dim=0)
            center, moves = getattr(self, name), sums[:, -1:] > 0
            moved = center.lerp(sums[:, :-1] / sums[:, -1:], 1 - self.center_momentum)
            center.copy_(torch.where(moves if applied is None else moves & applied, moved, center))
        self._sums.clear()

    # ----------------------------------------------------------------- probabilities

    def teacher_temp(self, epoch: int) -> float:
        """The teacher's temperature in `epoch`."""
        return float(self.teacher_temp_schedule[epoch])

    def teacher_probs(self, logits: Tensor, center: Tensor, epoch: int) -> Tensor:
        """Centred and sharpened probabilities, without gradient."""
        return F.softmax((at_least_float32(logits.detach()) - center) / self.teacher_temp(epoch), dim=-1)

    def student_log_probs(self, logits: Tensor) -> Tensor:
        """Log-probabilities at the student's temperature, in float32."""
        return F.log_softmax(at_least_float32(logits) / self.student_temp, dim=-1)

    def _chunked(
        self, student: FactoredLogits, teacher: FactoredLogits, targets: Targets, center: Tensor, epoch: int
    ) -> Tensor:
        temperatures = Temperatures(self.student_temp, self.teacher_temp(epoch))
        return chunked_cross_entropy(student, teacher, targets, center, temperatures)

    def _level(
        self,
        student: Logits,
        student_N: Tensor,
        teacher: Logits,
        teacher_N: Tensor,
        center: Tensor,
        epoch: int,
        features: Tensor,
        term: str = "",
    ) -> health.Level:
        """Those rows for the collapse monitor."""
        rows = health.take(student, student_N), health.take(teacher, teacher_N)
        return health.Level(*rows, center, self.student_temp, self.teacher_temp(epoch), features, term)


class DINOLoss(SelfDistillation):
    """Cross-entropy between the teacher's centred, sharpened views and all other views of the student.

    Arguments and state as for `SelfDistillation`.
    """

    weights: ClassVar[dict[str, float]] = {"view_loss": 1.0}

    def accumulate_center(self, teacher_output: Logits) -> None:
        """Add a micro-batch of teacher logits (Q * B, K) to the next centre."""
        self._accumulate("center", teacher_output)

    # ----------------------------------------------------------------- loss

    def view_loss(
        self, student_logits: Logits, teacher_logits: Logits, epoch: int, sources: Sources | None = None
    ) -> Tensor:
        """L_V: mean over images and over the Q V - Q pairs of different views; `sources`: None for images that are not mixed."""
        _check_views(student_logits, self.ncrops, "student")
        _check_views(teacher_logits, TEACHER_VIEWS, "teacher")
        if isinstance(student_logits, FactoredLogits) and isinstance(teacher_logits, FactoredLogits):
            return self._chunked_view_loss(student_logits, teacher_logits, epoch, sources)
        student_VBK = multiplied(student_logits).unflatten(0, (self.ncrops, -1))
        teacher_QBK = multiplied(teacher_logits).unflatten(0, (TEACHER_VIEWS, -1))
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
        return loss_QV.where(_other_views(self.ncrops, loss_QV.device), 0.0).sum() / self._pairs

    def _chunked_view_loss(
        self, student: FactoredLogits, teacher: FactoredLogits, epoch: int, sources: Sources | None
    ) -> Tensor:
        """All rows are one group: student row (v, b) learns from teacher rows (q, a), a being the images that b is mixed from."""
        batch = len(teacher.bottleneck) // TEACHER_VIEWS
        sources = sources or unmixed(self.ncrops, batch, student.bottleneck.device)
        view_Q = torch.arange(TEACHER_VIEWS, device=student.bottleneck.device)
        rows_BQP = batch * view_Q[:, None] + sources.images_PB.T[:, None]
        weights_VBQP = (
            _other_views(self.ncrops, view_Q.device).T[:, None, :, None]
            * sources.weights_VPB.transpose(1, 2)[:, :, None]
        )
        rows_VBM = rows_BQP.flatten(1).expand(self.ncrops, -1, -1)
        targets = Targets(rows_VBM.flatten(0, 1)[None], weights_VBQP.flatten(2).flatten(0, 1)[None])
        student, teacher = (factors._replace(bottleneck=factors.bottleneck[None]) for factors in (student, teacher))
        return self._chunked(student, teacher, targets, self.center, epoch) / (batch * self._pairs)

    # ----------------------------------------------------------------- what is watched

    def levels(
        self, student_output: Any, teacher_output: Any, epoch: int, features: Mapping[str, Tensor]
    ) -> dict[str, health.Level]:
        """Some rows of the outputs for the collapse monitor, by level: pairs of the two global views.

        `features`: of the teacher's backbone, by level. With mixup the student's images are the mixed ones.
        """
        return {"view": self._view_level(student_output, teacher_output, epoch, features["view"])}

    def _view_level(self, student: Logits, teacher: Logits, epoch: int, features: Tensor) -> health.Level:
        batch = _count(teacher) // TEACHER_VIEWS
        images_N = health.spread(batch, health.ROWS // TEACHER_VIEWS, self.center.device)
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
        """The weighted sum of the terms: what is minimised."""
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
        """Add a micro-batch of teacher logits, of views and of regions, to the next centres."""
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
        batch, images = _count(teacher.view_logits) // TEACHER_VIEWS, _count(student.view_logits) // self.ncrops
        if images != batch:
            raise ValueError(f"{images} images of the student and {batch} of the teacher do not fit each other")
        mixed, sources = sources is not None, sources or unmixed(self.ncrops, batch, teacher.region_features.device)
        matches = list(match_views(student, teacher, sources, mixed))
        if isinstance(student.region_logits, FactoredLogits) and isinstance(teacher.region_logits, FactoredLogits):
            return self._chunked_region_loss(student, teacher, epoch, sources, matches)
        student_views = by_view(multiplied(student.region_logits), student)
        teacher_views = by_view(multiplied(teacher.region_logits), teacher)
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
    ) -> dict[str, health.Level]:
        """As for views; also regions of the second view, with their matches in the first."""
        student, teacher = MultiCropOutput(*student_output), MultiCropOutput(*teacher_output)
        first, regions = student.regions_per_view[:TEACHER_VIEWS]
        of_teacher = teacher.regions_per_view[0]
        batch = _count(teacher.view_logits) // TEACHER_VIEWS
        images_B1 = health.spread(batch, health.ROWS // 8, self.center.device)[:, None]
        some_1T = health.spread(regions, health.ROWS // len(images_B1), self.center.device)[None]
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


def _count(logits: Logits) -> int:
    return len(logits.bottleneck) if isinstance(logits, FactoredLogits) else len(logits)


def _sum_of_rows(logits: Logits, weights_N: Tensor | None) -> Tensor:
    """(1, K) in float32, weighted; the sum of products is the product of the sum."""
    if not isinstance(logits, FactoredLogits):
        return _weighted(logits, weights_N).sum(dim=0, keepdim=True)
    with torch.autocast(logits.prototypes.device.type, enabled=False):
        sum_1C = _weighted(logits.bottleneck, weights_N).sum(dim=0, keepdim=True)
        return F.linear(sum_1C, logits.prototypes.to(sum_1C.dtype))


def _weighted(rows_NC: Tensor, weights_N: Tensor | None) -> Tensor:
    rows_NC = at_least_float32(rows_NC)
    return rows_NC if weights_N is None else rows_NC * weights_N.to(rows_NC.dtype)[:, None]


def at_least_float32(tensor: Tensor) -> Tensor:
    """In float32, or in float64 if it has that."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _check_views(logits: Logits, views: int, who: str) -> None:
    if _count(logits) % views:
        raise ValueError(f"{_count(logits)} rows of {who} logits are not a multiple of the {views} views")


def _check_regions(output: MultiCropOutput, views: int, who: str) -> None:
    _check_views(output.view_logits, views, who)
    if len(output.regions_per_view) != views:
        raise ValueError(f"regions_per_view has {len(output.regions_per_view)} entries, the {who} has {views} views")
    rows, expected = _count(output.region_logits), _count(output.view_logits) // views * sum(output.regions_per_view)
    if expected != rows or expected != len(output.region_features):
        raise ValueError(f"the {who} has {rows} region rows, its views add up to {expected}")


def _other_views(student_views: int, device: torch.device) -> Tensor:
    """(Q, V), true where the views differ; view q of the teacher and view q of the student show the same crop."""
    return ~torch.eye(TEACHER_VIEWS, student_views, dtype=torch.bool, device=device)
