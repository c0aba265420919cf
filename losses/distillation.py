"""The objective: teacher temperature, center, the view loss and the loss of matched regions.

    loss = criterion(student_output, teacher_output, epoch)   # pure: changes no state
    criterion.accumulate_center(teacher_output)               # of each micro-batch
    criterion.update_center()                                 # once a step, over all processes

Logits come multiplied, or as `FactoredLogits`; then the same numbers are computed in chunks (ops/chunked_cross_entropy.py).
Which regions are
compared is found by losses/matching.py.

Shapes: B images, V student views, Q = 2 teacher views, T regions of a student view, U regions of a teacher view, K prototypes,
D channels of the bottleneck, P images that a student image is mixed from, 1 without mixup. Rows of the inputs
are ordered view, image (, region).
Origin: DINO (Caron et al., ICCV 2021) section 3.1; EsViT (Li et al., ICLR 2022) section 3.2, equations 2-4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distributed.collectives import start_all_reduce_sum
from ops.chunked_cross_entropy import Targets, Temperatures, chunked_cross_entropy
from ops.logits import FactoredLogits, Logits
from utils import UsageError

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
    """What objectives of self-distillation share: temperatures, centers over all processes, and probabilities.

    Args:
        out_dim: number of prototypes K.
        ncrops: student views V; the first two are the teacher's.
        warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs, nepochs: the teacher's temperature schedule.
        student_temp: the student's temperature.
        center_momentum: EMA momentum of the center.

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
        # Of this step, by name of a center: (1, K + 1) of each micro-batch, the weighted sum of its logits and the sum of the
        # weights, on their way to the sum over all processes.
        self._sums: dict[str, list[Callable[[], Tensor]]] = {}
        self._add_center("center", out_dim)

    # ----------------------------------------------------------------- center

    def _add_center(self, name: str, out_dim: int) -> None:
        self.register_buffer(name, torch.zeros(1, out_dim))

    @torch.no_grad()
    def _accumulate(self, name: str, logits: Logits, weights_N: Tensor | None = None) -> None:
        """Add N rows to the next center `name`, each with its weight, not negative, or 1.

        Their sum over all processes is begun here and not waited for: it goes on while the student computes.
        """
        total_1K = sum_of_rows(logits, weights_N)
        weight = (
            total_1K.new_full((), count_rows(logits))
            if weights_N is None
            else at_least_float32(weights_N).sum().to(total_1K)
        )
        sums = torch.cat([total_1K, weight.view(1, 1)], dim=1)
        self._sums.setdefault(name, []).append(start_all_reduce_sum(sums))

    @torch.no_grad()
    def update_center(self, applied: Tensor | None = None) -> None:
        """Move each center towards the weighted mean of what was accumulated, over all processes; one without weight stays.

        `applied`, a boolean scalar on the device, is false for a step that is skipped: then no center changes.
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
        """Centered and sharpened probabilities, without gradient."""
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
    ) -> Level:
        """Those rows for the collapse monitor."""
        rows = take_rows(student, student_N), take_rows(teacher, teacher_N)
        return Level(*rows, center, self.student_temp, self.teacher_temp(epoch), features, term)


def count_rows(logits: Logits) -> int:
    """Return the number of rows N of logits (N, K)."""
    return len(logits.bottleneck) if isinstance(logits, FactoredLogits) else len(logits)


def sum_of_rows(logits: Logits, weights_N: Tensor | None) -> Tensor:
    """(1, K) in float32, weighted; the sum of products is the product of the sum."""
    if not isinstance(logits, FactoredLogits):
        return weighted_rows(logits, weights_N).sum(dim=0, keepdim=True)
    with torch.autocast(logits.prototypes.device.type, enabled=False):
        sum_1C = weighted_rows(logits.bottleneck, weights_N).sum(dim=0, keepdim=True)
        return F.linear(sum_1C, logits.prototypes.to(sum_1C.dtype))


def weighted_rows(rows_NC: Tensor, weights_N: Tensor | None) -> Tensor:
    """Multiply each row by its weight, in at least float32."""
    rows_NC = at_least_float32(rows_NC)
    return rows_NC if weights_N is None else rows_NC * weights_N.to(rows_NC.dtype)[:, None]


def at_least_float32(tensor: Tensor) -> Tensor:
    """In float32, or in float64 if it has that."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def check_views(logits: Logits, views: int, who: str) -> None:
    """Raise a ValueError unless the rows are a multiple of the number of views."""
    if count_rows(logits) % views:
        raise ValueError(f"{count_rows(logits)} rows of {who} logits are not a multiple of the {views} views")


ROWS = 256  # of each level, at most


class Level(NamedTuple):
    """Rows of one level of a method's outputs; row i of the student learns from row i of the teacher."""

    student_logits: Logits  # (N, K)
    teacher_logits: Logits  # (N, K)
    center: Tensor  # (1, K), subtracted from the teacher's
    student_temp: float
    teacher_temp: float
    features: Tensor  # (any number, C), of the teacher's backbone
    # Of the loss that compares these rows; by default `NAME_loss`, and the whole loss where that is not logged.
    term: str = ""


# --------------------------------------------------------------------------- rows to look at


def spread(count: int, wanted: int, device: torch.device) -> Tensor:
    """Up to `wanted` of the numbers 0 .. count - 1, evenly spaced: a sample that needs no random number."""
    wanted = min(count, wanted)
    return torch.arange(wanted, device=device) * count // wanted


def take_rows(logits: Logits, rows_N: Tensor) -> Logits:
    """Those rows, without gradient."""
    if isinstance(logits, FactoredLogits):
        return FactoredLogits(logits.bottleneck.detach()[rows_N], logits.prototypes.detach())
    return logits.detach()[rows_N]
