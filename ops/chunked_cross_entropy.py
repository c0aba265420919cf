"""Cross-entropy between student and teacher that never holds all logits: a chunk is multiplied, used and forgotten.

Logits are products of bottleneck vectors with prototypes, so the loss and its gradients with respect to both can be had from one
walk over the rows. For a student row i that learns from teacher probabilities p_j with weights w_ij, W being its prototypes:

    loss_i = w_i (logsumexp(l_i) - t_i . l_i)          l_i = W z_i / student temperature, w_i = sum_j w_ij
    d loss_i / d l_i = w_i (softmax(l_i) - t_i)        t_i = sum_j w_ij p_j / w_i

The gradients of z and W are kept, in float32, from the forward to the backward. Memory is that of W, its gradient and one chunk,
however many rows there are; numbers are those of the plain form to rounding.

Shapes: G groups (images), S student rows and R teacher rows of a group, M targets of a student row, K prototypes, C channels of the
bottleneck; N rows of a chunk, n rows of a block.
Origin: this project's own; the loss is that of EsViT (Li et al., ICLR 2022), equations 2-4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops.linear import product, weight_gradient
from ops.logits import FactoredLogits

# Of logits in float32: the rows that are multiplied together.
CHUNK_BYTES = 128 * 2**20
# Of logits in float32, on a CPU: the rows of a chunk whose probabilities are computed together, so that they stay in its cache.
BLOCK_BYTES = 4 * 2**20
# Of prototypes in float32, on a CPU: those whose gradients are computed and added together, for the same reason.
PROTOTYPE_BLOCK_BYTES = 2 * 2**20


class Targets(NamedTuple):
    """The teacher rows that each student row learns from."""

    rows_GSM: Tensor  # numbers of rows of the same group, 0 .. R - 1
    weights_GSM: Tensor  # not negative; a row of zeros leaves a student row out


class Temperatures(NamedTuple):
    """What logits are divided by."""

    student: float
    teacher: float


def chunked_cross_entropy(
    student: FactoredLogits,
    teacher: FactoredLogits,
    targets: Targets,
    center: Tensor,
    temperatures: Temperatures,
    chunk_bytes: int | None = None,
) -> Tensor:
    """sum over g, s, m of weights[g, s, m] * H(teacher probabilities of row rows[g, s, m], student probabilities of row s).

    Args:
        student: bottleneck (G, S, C); it and the prototypes (K, C) get gradients, each in its own dtype.
        teacher: bottleneck (G, R, C), without gradient, in the dtype of the student's.
        targets: whose row numbers must be in range.
        center: (1, K), subtracted from the teacher's logits.
        chunk_bytes: of the logits in float32 of a chunk's student and teacher rows together, by default `CHUNK_BYTES`; a chunk
            has all teacher rows of a group, at least. Held at once are the larger of the two in the dtype of the factors, the
            teacher's probabilities, and of a block the student's probabilities, their targets and, for factors that are narrower
            than float32, its logits in float32. A block is the larger of the two, on a CPU at most `BLOCK_BYTES`.

    Returns:
        a scalar in float32 (float64 for factors in float64). Gradients are computed with it, where gradients are enabled.

    Raises:
        ValueError: groups or rows of student, teacher and targets that do not fit.
    """
    shapes = tuple(tuple(tensor.shape) for tensor in (student.bottleneck, teacher.bottleneck, targets.rows_GSM))
    (groups, rows, _), (teacher_groups, *_), target_shape = shapes
    if teacher_groups != groups or target_shape[:2] != (groups, rows) or targets.weights_GSM.shape != target_shape:
        raise ValueError(f"student {shapes[0]}, teacher {shapes[1]} and targets {shapes[2]} do not fit each other")
    size = CHUNK_BYTES if chunk_bytes is None else chunk_bytes
    return _ChunkedCrossEntropy.apply(
        student.bottleneck, student.prototypes, teacher, targets, center, temperatures, size, torch.is_grad_enabled()
    )


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Gradients are computed with the loss; the backward multiplies them by that of the output."""

    @staticmethod
    def forward(
        ctx: Any,
        bottleneck_GSC: Tensor,
        prototypes_KC: Tensor,
        teacher: FactoredLogits,
        targets: Targets,
        center: Tensor,
        temperatures: Temperatures,
        chunk_bytes: int,
        enabled: bool,  # gradients, where the function was called: in here they never are
    ) -> Tensor:
        wanted = (enabled and ctx.needs_input_grad[0], enabled and ctx.needs_input_grad[1])
        factors = bottleneck_GSC.dtype
        student = FactoredLogits(bottleneck_GSC, prototypes_KC.to(factors))
        teacher = FactoredLogits(teacher.bottleneck, teacher.prototypes.to(factors))
        with torch.autocast(bottleneck_GSC.device.type, enabled=False):
            walk = _Walk(student, teacher, targets, center, temperatures, chunk_bytes, wanted)
            loss = walk.run()
        ctx.save_for_backward(walk.grad_bottleneck_GSC, walk.grad_prototypes_KC)
        ctx.factors = 1.0, walk.prototypes_factor
        ctx.dtypes = bottleneck_GSC.dtype, prototypes_KC.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        # In place: autograd refuses a second backward through them, which would be scaled twice.
        grads = [
            None if grad is None else grad.mul_(grad_loss * factor).to(dtype)
            for grad, factor, dtype in zip(ctx.saved_tensors, ctx.factors, ctx.dtypes)
        ]
        return (*grads, None, None, None, None, None, None)


class _Walk:
    """One pass over all groups, with buffers that the chunks share.

    After `run`, `grad_bottleneck_GSC` is the gradient of the loss, `grad_prototypes_KC` times `prototypes_factor` the other one;
    they are None where not wanted.
    """

    def __init__(
        self,
        student: FactoredLogits,
        teacher: FactoredLogits,
        targets: Targets,
        center: Tensor,
        temperatures: Temperatures,
        chunk_bytes: int,
        wanted: tuple[bool, bool],
    ) -> None:
        self.student, self.teacher, self.temperatures, self.wanted = student, teacher, temperatures, wanted
        factors = student.bottleneck.dtype  # products are computed in this, everything else in:
        dtype = torch.promote_types(factors, torch.float32)
        tiny = torch.finfo(dtype).tiny
        self.center = center.to(dtype)
        self.rows_GSM = targets.rows_GSM
        self.weights_GS = targets.weights_GSM.to(dtype).sum(dim=-1)
        self.mixture_GSM = targets.weights_GSM / self.weights_GS.clamp_min(tiny)[..., None]
        self.largest_weight = self.weights_GS.max().clamp_min(tiny)

        groups, self.rows_per_group = self.weights_GS.shape
        prototypes, teacher_rows = len(student.prototypes), teacher.bottleneck.shape[1]
        row_bytes = prototypes * dtype.itemsize
        self.groups_per_chunk, self.rows_per_chunk = _divide(
            groups, self.rows_per_group, teacher_rows, chunk_bytes // row_bytes
        )
        student_N, teacher_N = (self.groups_per_chunk * rows for rows in (self.rows_per_chunk, teacher_rows))
        most_N = max(student_N, teacher_N)
        on_cpu = student.bottleneck.device.type == "cpu"
        self.rows_per_block = min(max(BLOCK_BYTES // row_bytes, 1), most_N) if on_cpu else most_N
        prototype_bytes = student.prototypes.shape[1] * dtype.itemsize
        self.prototypes_per_block = max(PROTOTYPE_BLOCK_BYTES // prototype_bytes, 1) if on_cpu else prototypes
        new = student.bottleneck.new_empty
        self.teacher_probs_NK = new(teacher_N, prototypes, dtype=dtype)
        self.probs_nK = new(self.rows_per_block, prototypes, dtype=dtype)
        self.widened_nK = None if factors == dtype else torch.empty_like(self.probs_nK)
        self.scale = _safe_scale(factors, student_N)
        self.prototypes_factor = self.largest_weight / (temperatures.student * self.scale)

        empty = torch.empty_like
        self.grad_bottleneck_GSC = empty(student.bottleneck, dtype=dtype) if wanted[0] else None
        self.grad_prototypes_KC = empty(student.prototypes, dtype=dtype) if wanted[1] else None

    def run(self) -> Tensor:
        """The loss; gradients are there afterwards."""
        loss = self.weights_GS.new_zeros(())
        for groups in _slices(len(self.weights_GS), self.groups_per_chunk):
            self._compute_teacher_probs(groups)
            for rows in _slices(self.rows_per_group, self.rows_per_chunk):
                loss += self._walk_chunk((groups, rows))
        return loss

    def _compute_teacher_probs(self, groups: slice) -> None:
        logits_NK = product(self.teacher.bottleneck[groups].flatten(0, 1), self.teacher.prototypes.T)
        for block in _slices(len(logits_NK), self.rows_per_block):
            scaled_nK = self._widened(logits_NK[block]).sub_(self.center).mul_(1 / self.temperatures.teacher)
            torch.softmax(scaled_nK, dim=-1, out=self.teacher_probs_NK[block])

    def _walk_chunk(self, chunk: tuple[slice, slice]) -> Tensor:
        """The loss of the student rows of a chunk, whose gradients it adds."""
        bottleneck_NC, weights_N = self.student.bottleneck[chunk].flatten(0, 1), self.weights_GS[chunk].flatten()
        rows_gsM, mixture_NM = self.rows_GSM[chunk], self.mixture_GSM[chunk].flatten(0, 1)
        first_row_g = torch.arange(len(rows_gsM), device=rows_gsM.device) * self.teacher.bottleneck.shape[1]
        rows_NM = (rows_gsM + first_row_g[:, None, None]).flatten(0, 1)

        logits_NK = product(bottleneck_NC, self.student.prototypes.T)
        cross_entropies = []
        for block in _slices(len(logits_NK), self.rows_per_block):
            scaled_nK = self._widened(logits_NK[block]).mul_(1 / self.temperatures.student)
            probs_nK = torch.softmax(scaled_nK, dim=-1, out=self.probs_nK[: len(scaled_nK)])
            # The largest probability is 1 / sum exp(l - largest l).
            log_sum_exp_n = scaled_nK.amax(dim=-1) - probs_nK.amax(dim=-1).log()
            targets_nK = F.embedding_bag(
                rows_NM[block], self.teacher_probs_NK, per_sample_weights=mixture_NM[block], mode="sum"
            )
            cross_entropies.append(log_sum_exp_n - scaled_nK.mul_(targets_nK).sum(dim=-1))
            if any(self.wanted):
                grad_nK = probs_nK.sub_(targets_nK)
                logits_NK[block] = grad_nK if self.scale == 1 else grad_nK.mul_(self.scale)
        if any(self.wanted):
            self._add_gradients(chunk, grad_logits_NK=logits_NK)
        return (weights_N * torch.cat(cross_entropies)).sum()

    def _add_gradients(self, chunk: tuple[slice, slice], grad_logits_NK: Tensor) -> None:
        """Multiply gradients of logits, for rows of weight 1 and times `scale`, back to both factors."""
        bottleneck_gsC, weights_gs = self.student.bottleneck[chunk], self.weights_GS[chunk][..., None]
        if self.grad_bottleneck_GSC is not None:
            grad_gsC = product(grad_logits_NK, self.student.prototypes).view_as(bottleneck_gsC)
            self.grad_bottleneck_GSC[chunk] = grad_gsC * (weights_gs / (self.temperatures.student * self.scale))
        if self.grad_prototypes_KC is not None:
            weighted_NC = (bottleneck_gsC * (weights_gs / self.largest_weight)).to(bottleneck_gsC.dtype).flatten(0, 1)
            self._add_to_prototypes(grad_logits_NK, weighted_NC, first=all(part.start == 0 for part in chunk))

    def _add_to_prototypes(self, grad_logits_NK: Tensor, weighted_NC: Tensor, first: bool) -> None:
        total_KC = self.grad_prototypes_KC
        assert total_KC is not None
        if total_KC.dtype == weighted_NC.dtype and total_KC.device.type != "cpu":
            total_KC.addmm_(grad_logits_NK.T, weighted_NC, beta=0 if first else 1)
            return
        for block in _slices(len(total_KC), self.prototypes_per_block):
            grad_kC = weight_gradient(grad_logits_NK[:, block], weighted_NC)
            total_KC[block] = grad_kC if first else total_KC[block].add_(grad_kC)

    def _widened(self, logits_nK: Tensor) -> Tensor:
        """The same logits in float32 or wider, to be overwritten."""
        if self.widened_nK is None:
            return logits_nK
        return self.widened_nK[: len(logits_nK)].copy_(logits_nK)


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _divide(groups: int, rows: int, teacher_rows: int, rows_that_fit: int) -> tuple[int, int]:
    """How many groups and how many student rows of each make a chunk; rows of a group are divided where they are too many."""
    if rows + teacher_rows <= rows_that_fit:
        chunks = math.ceil(groups / (rows_that_fit // (rows + teacher_rows)))
        return math.ceil(groups / chunks), rows
    chunks = math.ceil(rows / max(rows_that_fit - teacher_rows, rows_that_fit // 2, 1))
    return 1, math.ceil(rows / chunks)


def _safe_scale(dtype: torch.dtype, rows: int) -> float:
    """What gradients of logits are multiplied by before they are rounded to `dtype`.

    The smallest of them would vanish in float16, which overflows at 65504: sums over a chunk, of at most 1 a row, must stay below.
    """
    return 2.0 ** math.floor(math.log2(2**15 / rows)) if dtype == torch.float16 else 1.0
