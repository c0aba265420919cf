"""Self-distillation: what the objectives of DINO, EsViT and UDI share.

    loss = criterion(student_output, teacher_output, epoch)   # changes no state
    criterion.accumulate_center(teacher_output)               # after each micro-batch
    criterion.update_center()                                 # once per step, over all processes

`SelfDistillation` owns the temperatures, the centers and the cross-entropy. Logits are tensors, or `FactoredLogits` whose
cross-entropy is computed in chunks without ever holding all of them (ops/chunked_cross_entropy.py).

Shapes: G groups, S student rows and R teacher rows of a group, N rows, K prototypes, C channels.
Origin: DINO (Caron et al., ICCV 2021), section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distributed.collectives import start_all_reduce_sum
from losses.sinkhorn import sinkhorn_center
from ops.chunked_cross_entropy import Targets, Temperatures, chunked_cross_entropy
from ops.logits import FactoredLogits, Logits, materialize, take_rows
from utils import UsageError

TEACHER_VIEWS = 2
MONITORED_ROWS = 256  # of each level, at most


def teacher_temperature_schedule(
    warmup_teacher_temp: float, teacher_temp: float, warmup_teacher_temp_epochs: int, nepochs: int
) -> np.ndarray:
    """Return the teacher temperature of each epoch: a linear warmup to `teacher_temp`, then constant (DINO, appendix).

    Raises:
        UsageError: The warmup is longer than the training, or a temperature is not positive.
    """
    if warmup_teacher_temp_epochs > nepochs:
        raise UsageError(
            f"warmup_teacher_temp_epochs {warmup_teacher_temp_epochs} exceeds the {nepochs} epochs of the run; lower it"
        )
    if min(warmup_teacher_temp, teacher_temp) <= 0:
        raise UsageError(f"teacher temperatures must be positive, not {warmup_teacher_temp} and {teacher_temp}")
    warmup = np.linspace(warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs)
    return np.concatenate([warmup, np.full(nepochs - warmup_teacher_temp_epochs, teacher_temp)])


class SelfDistillation(nn.Module):
    """Base class of the objectives: temperatures, centers that are synchronized over processes, and the cross-entropy.

    Args:
        out_dim: Number of prototypes K.
        ncrops: Number of student views V; the teacher sees the first two.
        warmup_teacher_temp: Teacher temperature at the start.
        teacher_temp: Teacher temperature after its warmup.
        warmup_teacher_temp_epochs: Length of that warmup.
        nepochs: Number of epochs of the run.
        student_temp: Student temperature.
        center_momentum: EMA momentum of the centers.
        centering: What is subtracted from the teacher's logits: `mean`, the centers, or `sinkhorn`, which assigns the batch equally
            to the prototypes (losses/sinkhorn.py) and leaves the centers unused.

    The state dict holds `center` (1, K) under its published name.

    Raises:
        UsageError: There are fewer views than the teacher needs, or the schedule is invalid.
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
        centering: str = "mean",
    ) -> None:
        super().__init__()
        if ncrops < TEACHER_VIEWS:
            raise UsageError(f"the loss needs at least {TEACHER_VIEWS} views, not {ncrops}")
        self.ncrops = ncrops
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.centering = centering
        self.teacher_temp_schedule = teacher_temperature_schedule(
            warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, nepochs
        )
        # By name of a center, for each micro-batch of the step: an asynchronous all-reduce of (1, K + 1), the weighted sum of
        # the logits and the sum of the weights.
        self._pending: dict[str, list[Callable[[], Tensor]]] = {}
        self._add_center("center", out_dim)

    # ----------------------------------------------------------------- centers

    def _add_center(self, name: str, out_dim: int) -> None:
        self.register_buffer(name, torch.zeros(1, out_dim))

    @torch.no_grad()
    def _accumulate(self, name: str, logits: Logits, weights_N: Tensor | None = None) -> None:
        """Add the rows of `logits` (N, K), each with a weight >= 0 (default 1), to the next center `name`.

        Starts an all-reduce that overlaps with the student's forward.
        """
        sum_1K = _sum_rows(logits, weights_N)
        weight = sum_1K.new_tensor(count_rows(logits)) if weights_N is None else weights_N.to(sum_1K).sum()
        self._pending.setdefault(name, []).append(start_all_reduce_sum(torch.cat([sum_1K, weight.view(1, 1)], dim=1)))

    @torch.no_grad()
    def update_center(self, applied: Tensor | None = None) -> None:
        """Move each center towards the weighted mean of the accumulated rows; a center without weight stays.

        Args:
            applied: Boolean scalar on the device; False, for a step that is skipped, leaves every center unchanged.
        """
        for name, pending in self._pending.items():
            sums = torch.stack([wait() for wait in pending]).sum(dim=0)
            center, moves = getattr(self, name), sums[:, -1:] > 0
            moved = center.lerp(sums[:, :-1] / sums[:, -1:], 1 - self.center_momentum)
            center.copy_(torch.where(moves if applied is None else moves & applied, moved, center))
        self._pending.clear()

    def target_center(self, name: str, teacher: Logits, epoch: int) -> Tensor:
        """Return what is subtracted from the teacher's logits (N, K); with Sinkhorn-Knopp a collective operation."""
        if self.centering == "mean":
            return getattr(self, name)
        return sinkhorn_center(teacher, self.teacher_temp(epoch))

    # ----------------------------------------------------------------- cross-entropy

    def teacher_temp(self, epoch: int) -> float:
        """Return the teacher temperature of `epoch`."""
        return float(self.teacher_temp_schedule[epoch])

    def teacher_probs(self, logits: Tensor, center: Tensor, epoch: int) -> Tensor:
        """Return the centered and sharpened probabilities, detached."""
        return F.softmax((at_least_float32(logits.detach()) - center) / self.teacher_temp(epoch), dim=-1)

    def student_log_probs(self, logits: Tensor) -> Tensor:
        """Return log-probabilities at the student temperature."""
        return F.log_softmax(at_least_float32(logits) / self.student_temp, dim=-1)

    def cross_entropy(self, student: Logits, teacher: Logits, targets: Targets, center: Tensor, epoch: int) -> Tensor:
        """Return the weighted sum of cross-entropies between student rows and the teacher rows that are their targets.

            sum over g, s, m of weights[g, s, m] * H(teacher_probs[g, rows[g, s, m]], student_probs[g, s])

        Args:
            student: Logits (G, S, K).
            teacher: Logits (G, R, K), without gradient.
            targets: Row numbers and weights (G, S, M).
            center: The teacher's center (1, K).
            epoch: Epoch that determines the teacher temperature.
        """
        if isinstance(student, FactoredLogits) and isinstance(teacher, FactoredLogits):
            teacher = teacher._replace(bottleneck=teacher.bottleneck.to(student.bottleneck.dtype))
            temperatures = Temperatures(self.student_temp, self.teacher_temp(epoch))
            return chunked_cross_entropy(student, teacher, targets, center, temperatures)
        log_probs_GSK = self.student_log_probs(materialize(student))
        probs_GRK = self.teacher_probs(materialize(teacher), center, epoch)
        group_G1 = torch.arange(len(probs_GRK), device=center.device)[:, None]
        loss = center.new_zeros(())
        for rows_GS, weights_GS in zip(targets.rows_GSM.unbind(-1), targets.weights_GSM.unbind(-1)):
            # A sum over K, not a matrix product: over 65536 prototypes its rounding error is ten times smaller.
            loss = loss - (weights_GS * (probs_GRK[group_G1, rows_GS] * log_probs_GSK).sum(dim=-1)).sum()
        return loss

    def _monitored(
        self,
        student: Logits,
        student_N: Tensor,
        teacher: Logits,
        teacher_N: Tensor,
        center: Tensor,
        epoch: int,
        features: Tensor,
        term: str = "",
    ) -> MonitoredLevel:
        """Select rows for the collapse monitor."""
        rows = take_rows(student, student_N), take_rows(teacher, teacher_N)
        return MonitoredLevel(*rows, center, self.student_temp, self.teacher_temp(epoch), features, term)


class MonitoredLevel(NamedTuple):
    """Sampled rows of one level of the outputs (views, regions, ...) for the collapse monitor.

    Row i of the teacher is a target of row i of the student.
    """

    student_logits: Logits  # (N, K)
    teacher_logits: Logits  # (N, K)
    center: Tensor  # (1, K), subtracted from the teacher logits
    student_temp: float
    teacher_temp: float
    features: Tensor  # (any number, C), from the teacher's backbone
    term: str = ""  # the loss term of this level; empty for `<level>_loss`, or the whole loss where that is not logged


def evenly_spaced(count: int, wanted: int, device: torch.device) -> Tensor:
    """Return up to `wanted` evenly spaced integers of range(count): a sample without random numbers."""
    wanted = min(count, wanted)
    return torch.arange(wanted, device=device) * count // wanted


def count_rows(logits: Logits) -> int:
    """Return the number of rows N of logits (N, K)."""
    return len(logits.bottleneck) if isinstance(logits, FactoredLogits) else len(logits)


def check_views(logits: Logits, views: int, who: str) -> None:
    """Raise a ValueError unless the number of rows is a multiple of the number of views."""
    if count_rows(logits) % views:
        raise ValueError(f"{count_rows(logits)} rows of {who} logits are not a multiple of the {views} views")


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return `tensor` in float32, or unchanged in float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _sum_rows(logits: Logits, weights_N: Tensor | None) -> Tensor:
    """Return the weighted sum (1, K) of the rows in float32; factored logits are summed before the product."""
    if not isinstance(logits, FactoredLogits):
        rows_NC = at_least_float32(logits)
        return (rows_NC if weights_N is None else rows_NC * weights_N.to(rows_NC)[:, None]).sum(dim=0, keepdim=True)
    with torch.autocast(logits.prototypes.device.type, enabled=False):
        sum_1C = _sum_rows(logits.bottleneck, weights_N)
        return F.linear(sum_1C, logits.prototypes.to(sum_1C.dtype))
