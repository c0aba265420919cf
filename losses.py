"""The objective: teacher temperature, centre, the view loss and region matching.

    loss = criterion(student_output, teacher_output, epoch)   # pure: changes no state
    criterion.accumulate_center(teacher_output)               # after each micro-batch
    criterion.update_center()                                 # once a step, over all processes

Shapes: B images, V student views, Q = 2 teacher views, T regions of a student view, U regions of a teacher view,
K prototypes, C backbone channels. Rows of the inputs are ordered view, image (, region).
Origin: DINO (Caron et al., ICCV 2021) section 3.1; EsViT (Li et al., ICLR 2022) section 3.2, equations 2-4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from outputs import MultiCropOutput
from utils import UsageError, all_reduce_sum

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


class DINOLoss(nn.Module):
    """Cross-entropy between the teacher's centred, sharpened views and all other views of the student.

    Args:
        out_dim: number of prototypes K.
        ncrops: student views V; the first two are the teacher's.
        warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, nepochs: the teacher's temperature schedule.
        student_temp: the student's temperature.
        center_momentum: EMA momentum of the centre.

    State: `center` (1, K), in the state dict under the published name.
    """

    center: Tensor
    weights: ClassVar[dict[str, float]] = {"view_loss": 1.0}

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
        self._sums: dict[str, tuple[Tensor, int]] = {}  # name of a centre -> (sum of its logits, rows) of this step
        self._add_center("center", out_dim)

    # ----------------------------------------------------------------- centre

    def _add_center(self, name: str, out_dim: int) -> None:
        self.register_buffer(name, torch.zeros(1, out_dim))

    @torch.no_grad()
    def _accumulate(self, name: str, logits: Tensor) -> None:
        total, rows = self._sums.get(name, (torch.zeros_like(getattr(self, name)), 0))
        self._sums[name] = (total + logits.float().sum(dim=0, keepdim=True), rows + len(logits))

    def accumulate_center(self, teacher_output: Tensor) -> None:
        """Add a micro-batch of teacher logits (Q * B, K) to the next centre."""
        self._accumulate("center", teacher_output)

    @torch.no_grad()
    def update_center(self) -> None:
        """Move each centre towards the mean of what was accumulated, over all processes."""
        for name, (total, rows) in self._sums.items():
            sum_and_rows = all_reduce_sum(torch.cat([total, total.new_full((1, 1), rows)], dim=1))
            center = getattr(self, name)
            center.lerp_(sum_and_rows[:, :-1] / sum_and_rows[:, -1:], 1 - self.center_momentum)
        self._sums.clear()

    def drop_accumulated(self) -> None:
        """Forget what was accumulated: the step was skipped."""
        self._sums.clear()

    # ----------------------------------------------------------------- loss

    def teacher_temp(self, epoch: int) -> float:
        """The teacher's temperature in `epoch`."""
        return float(self.teacher_temp_schedule[epoch])

    def teacher_probs(self, logits: Tensor, center: Tensor, epoch: int) -> Tensor:
        """Centred and sharpened probabilities, without gradient."""
        return F.softmax((logits.detach().float() - center) / self.teacher_temp(epoch), dim=-1)

    def student_log_probs(self, logits: Tensor) -> Tensor:
        """Log-probabilities at the student's temperature, in float32."""
        return F.log_softmax(logits.float() / self.student_temp, dim=-1)

    def view_loss(
        self, student_logits: Tensor, teacher_logits: Tensor, epoch: int, targets_mixup: Sequence[Tensor] | None = None
    ) -> Tensor:
        """L_V: mean over images and over the Q V - Q pairs of different views.

        `targets_mixup[v]` (B, B) weighs, for the student's view v, teacher image (row) by student image (column).
        """
        student_VBK = _split(student_logits, self.ncrops, "student")
        teacher_QBK = _split(teacher_logits, TEACHER_VIEWS, "teacher")
        probs_QBK = self.teacher_probs(teacher_QBK, self.center, epoch)
        columns_Q = []
        for v, logits_BK in enumerate(student_VBK):
            targets_QBK = probs_QBK
            if targets_mixup is not None:  # what student image b should see is the mixture sum_a M_ab p_a
                targets_QBK = torch.einsum("ab,qak->qbk", targets_mixup[v].float(), probs_QBK)
            # A sum over K, not a matrix product: over 65536 prototypes its rounding is ten times smaller.
            columns_Q.append(-(targets_QBK * self.student_log_probs(logits_BK)).sum(dim=-1).mean(dim=-1))
        return _mean_over_other_views(torch.stack(columns_Q, dim=1))

    def terms(
        self, student_output: Any, teacher_output: Any, epoch: int, targets_mixup: Sequence[Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The unweighted terms of the loss by name, computed in float32 even where the networks run under autocast."""
        with torch.autocast(self.center.device.type, enabled=False):
            return self._terms(student_output, teacher_output, epoch, targets_mixup)

    def _terms(
        self, student_output: Any, teacher_output: Any, epoch: int, targets_mixup: Sequence[Tensor] | None
    ) -> dict[str, Tensor]:
        return {"view_loss": self.view_loss(student_output, teacher_output, epoch, targets_mixup)}

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """The weighted sum of the terms: what is minimised."""
        return torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()

    def forward(
        self, student_output: Any, teacher_output: Any, epoch: int, targets_mixup: Sequence[Tensor] | None = None
    ) -> Tensor:
        """The loss of a student's and a teacher's output, as the network gives them for a list of crops.

        Here logits (V * B, K) and (Q * B, K); `RegionMatchingLoss` takes `MultiCropOutput`, or plain tuples in its order.

        Raises:
            ValueError: rows that do not fit the number of views (and their regions).
        """
        return self.total(self.terms(student_output, teacher_output, epoch, targets_mixup))


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
        targets_mixup: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """L_R: cross-entropy of each student region and its match, mean over regions, images and pairs of different views."""
        student_views = _split_regions(student, self.ncrops, "student")
        teacher_views = _split_regions(teacher, TEACHER_VIEWS, "teacher")
        teacher_probs = [self.teacher_probs(view.logits_BTK, self.center_grid, epoch) for view in teacher_views]
        loss_QV = teacher_probs[0].new_zeros(TEACHER_VIEWS, self.ncrops)
        for v, student_view in enumerate(student_views):
            log_probs_BTK = self.student_log_probs(student_view.logits_BTK)
            weights_BB = None if targets_mixup is None else targets_mixup[v]
            for q, teacher_view in enumerate(teacher_views):
                if q != v:
                    loss_QV[q, v] = matched_cross_entropy(
                        log_probs_BTK,
                        student_view.features_BTC,
                        teacher_probs[q],
                        teacher_view.features_BTC,
                        weights_BB,
                    )
        return _mean_over_other_views(loss_QV)

    def _terms(
        self, student_output: Any, teacher_output: Any, epoch: int, targets_mixup: Sequence[Tensor] | None
    ) -> dict[str, Tensor]:
        student, teacher = MultiCropOutput(*student_output), MultiCropOutput(*teacher_output)
        return {
            "view_loss": self.view_loss(student.view_logits, teacher.view_logits, epoch, targets_mixup),
            "region_loss": self.region_loss(student, teacher, epoch, targets_mixup),
        }


def match_regions(student_features_BTC: Tensor, teacher_features_BUC: Tensor) -> Tensor:
    """(B, T) index of the teacher region with the highest cosine to each student region (EsViT equation 4)."""
    student = F.normalize(student_features_BTC.detach().float(), dim=-1)
    teacher = F.normalize(teacher_features_BUC.detach().float(), dim=-1)
    return (student @ teacher.transpose(1, 2)).argmax(dim=-1)


def matched_cross_entropy(
    log_probs_BTK: Tensor,
    student_features_BTC: Tensor,
    teacher_probs_BUK: Tensor,
    teacher_features_BUC: Tensor,
    weights_BB: Tensor | None = None,
) -> Tensor:
    """Mean cross-entropy of student regions with the teacher probabilities at their matches.

    With mixup, `weights_BB` (teacher image, student image) says how much of each teacher image is in a student image: its
    regions are matched in every image that it was mixed from, and their targets are mixed with the same weights.
    """
    regions = log_probs_BTK.shape[0] * log_probs_BTK.shape[1]
    if weights_BB is None:
        matches_BT = match_regions(student_features_BTC, teacher_features_BUC)
        targets_BTK = teacher_probs_BUK.gather(1, matches_BT[..., None].expand(-1, -1, teacher_probs_BUK.shape[-1]))
        return -(targets_BTK * log_probs_BTK).sum() / regions
    source, mixed = weights_BB.nonzero(as_tuple=True)  # the P pairs of a teacher image and a student image made from it
    matches_PT = match_regions(student_features_BTC[mixed], teacher_features_BUC[source])
    targets_PTK = teacher_probs_BUK[source[:, None], matches_PT]
    cross_entropy_PT = -(targets_PTK * log_probs_BTK[mixed]).sum(dim=-1)
    return (weights_BB[source, mixed].float()[:, None] * cross_entropy_PT).sum() / regions


class _RegionView(NamedTuple):
    logits_BTK: Tensor
    features_BTC: Tensor


def _split(logits: Tensor, views: int, who: str) -> Tensor:
    """(V * B, K) to (V, B, K)."""
    if len(logits) % views:
        raise ValueError(f"{len(logits)} rows of {who} logits are not a multiple of the {views} views")
    return logits.unflatten(0, (views, -1))


def _split_regions(output: MultiCropOutput, views: int, who: str) -> list[_RegionView]:
    """Cut the flat region rows of an output into its views."""
    if len(output.regions_per_view) != views:
        raise ValueError(f"regions_per_view has {len(output.regions_per_view)} entries, the {who} has {views} views")
    batch = len(output.view_logits) // views
    rows = [batch * regions for regions in output.regions_per_view]
    if sum(rows) != len(output.region_logits) or sum(rows) != len(output.region_features):
        raise ValueError(f"the {who} has {len(output.region_logits)} region rows, its views add up to {sum(rows)}")
    return [
        _RegionView(logits.unflatten(0, (batch, -1)), features.unflatten(0, (batch, -1)))
        for logits, features in zip(output.region_logits.split(rows), output.region_features.split(rows))
    ]


def _mean_over_other_views(loss_QV: Tensor) -> Tensor:
    """Mean over the pairs of different views; view q of the teacher and view q of the student show the same crop."""
    teacher_views, student_views = loss_QV.shape
    same_view = torch.eye(teacher_views, student_views, dtype=torch.bool, device=loss_QV.device)
    return loss_QV.masked_fill(same_view, 0.0).sum() / (teacher_views * (student_views - 1))
