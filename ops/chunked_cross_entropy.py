"""Memory-efficient cross-entropy between student and teacher (EsViT, Li et al., ICLR 2022, equations 2-4), which computes logits
chunk by chunk.

Logits are products of bottleneck vectors z with prototypes W, so the loss and its gradients with respect to both can be computed in
one pass over the rows. For a student row i with teacher probabilities p_j of weights w_ij:

    loss_i = w_i (logsumexp(l_i) - t_i . l_i)          l_i = W z_i / student temperature, w_i = sum_j w_ij
    d loss_i / d l_i = w_i (softmax(l_i) - t_i)        t_i = sum_j w_ij p_j / w_i

The forward computes the gradients of z and W in float32 and stores them for the backward. Memory is that of W, its gradient and one
chunk, independent of the number of rows; results equal those of the direct computation up to rounding.

Shapes: G groups (images), S student rows and R teacher rows of a group, M targets of a student row, K prototypes, C channels of the
bottleneck; N rows of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops.logits import FactoredLogits

# Size of a chunk, in bytes of float32 logits. On CUDA larger ones save launches of kernels.
CHUNK_BYTES = 128 * 2**20
CUDA_CHUNK_BYTES = 256 * 2**20


class Targets(NamedTuple):
    """The teacher rows that are targets of each student row."""

    rows_GSM: Tensor  # row indices in the same group, 0 .. R - 1
    weights_GSM: Tensor  # non-negative; all zero for a student row without loss


class Temperatures(NamedTuple):
    """Divisors of the logits."""

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
    """Return the sum over g, s, m of weights[g, s, m] * H(teacher probabilities of row rows[g, s, m], student ones of row s).

    Args:
        student: bottleneck (G, S, C) and prototypes (K, C); both get gradients in their own dtype.
        teacher: bottleneck (G, R, C) without gradient, in the dtype of the student's.
        targets: row indices, which are not checked, and weights.
        center: (1, K), subtracted from the logits of the teacher.
        chunk_bytes: size of the student and teacher logits of a chunk in float32, by default `CHUNK_BYTES`, or `CUDA_CHUNK_BYTES`
            on CUDA; a chunk has at least all teacher rows of a group.

    Returns:
        A scalar in float32, or float64 for factors in float64.

    Raises:
        ValueError: inconsistent groups or rows of student, teacher and targets.
    """
    shapes = tuple(tuple(tensor.shape) for tensor in (student.bottleneck, teacher.bottleneck, targets.rows_GSM))
    (groups, rows, _), (teacher_groups, *_), target_shape = shapes
    if teacher_groups != groups or target_shape[:2] != (groups, rows) or targets.weights_GSM.shape != target_shape:
        raise ValueError(f"student {shapes[0]}, teacher {shapes[1]} and targets {shapes[2]} have inconsistent shapes")
    default = CUDA_CHUNK_BYTES if center.is_cuda else CHUNK_BYTES
    size = default if chunk_bytes is None else chunk_bytes
    return _ChunkedCrossEntropy.apply(
        student.bottleneck, student.prototypes, teacher, targets, center, temperatures, size, torch.is_grad_enabled()
    )


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Compute gradients in the forward; the backward scales them by the gradient of the loss."""

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
        grad_enabled: bool,  # by the caller; inside of forward gradients are always disabled
    ) -> Tensor:
        needs_grad = (grad_enabled and ctx.needs_input_grad[0], grad_enabled and ctx.needs_input_grad[1])
        factors = bottleneck_GSC.dtype
        student = FactoredLogits(bottleneck_GSC, prototypes_KC.to(factors))
        teacher = FactoredLogits(teacher.bottleneck, teacher.prototypes.to(factors))
        with torch.autocast(bottleneck_GSC.device.type, enabled=False):
            chunks = _ChunkedPass(student, teacher, targets, center, temperatures, chunk_bytes, needs_grad)
            loss = chunks.run()
        ctx.save_for_backward(chunks.grad_bottleneck_GSC, chunks.grad_prototypes_KC)
        ctx.factors = 1.0, chunks.prototypes_factor
        ctx.dtypes = bottleneck_GSC.dtype, prototypes_KC.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        # In place, which is safe: autograd does not allow a second backward through saved tensors.
        grads = [
            None if grad is None else grad.mul_(grad_loss * factor).to(dtype)
            for grad, factor, dtype in zip(ctx.saved_tensors, ctx.factors, ctx.dtypes)
        ]
        return (*grads, None, None, None, None, None, None)


class _ChunkedPass:
    """One pass over all groups, with buffers that chunks share.

    After `run`, the gradients of the loss are `grad_bottleneck_GSC`, and `grad_prototypes_KC` times `prototypes_factor`; None if
    not needed.
    """

    def __init__(
        self,
        student: FactoredLogits,
        teacher: FactoredLogits,
        targets: Targets,
        center: Tensor,
        temperatures: Temperatures,
        chunk_bytes: int,
        needs_grad: tuple[bool, bool],
    ) -> None:
        self.student, self.teacher, self.temperatures, self.needs_grad = student, teacher, temperatures, needs_grad
        factors = student.bottleneck.dtype  # dtype of the matrix products
        dtype = torch.promote_types(factors, torch.float32)
        tiny = torch.finfo(dtype).tiny
        self.student_offset = center.new_zeros((1, 1), dtype=dtype)
        self.teacher_offset = center.to(dtype) / -temperatures.teacher
        self.weights_GS = targets.weights_GSM.to(dtype).sum(dim=-1)
        self.mixture_GSM = targets.weights_GSM / self.weights_GS.clamp_min(tiny)[..., None]
        self.cross_entropy_GS = torch.empty_like(self.weights_GS)

        groups, self.rows_per_group = self.weights_GS.shape
        prototypes, teacher_rows = len(student.prototypes), teacher.bottleneck.shape[1]
        rows_that_fit = chunk_bytes // (prototypes * dtype.itemsize)
        self.groups_per_chunk, self.rows_per_chunk = _divide(groups, self.rows_per_group, teacher_rows, rows_that_fit)
        student_N, teacher_N = (self.groups_per_chunk * rows for rows in (self.rows_per_chunk, teacher_rows))
        first_row_G = torch.arange(groups, device=center.device) % self.groups_per_chunk * teacher_rows
        self.rows_GSM = targets.rows_GSM + first_row_G[:, None, None]  # among the teacher rows of a chunk
        new = student.bottleneck.new_empty
        self.teacher_probs_NK = new(teacher_N, prototypes, dtype=dtype)
        self.probs_NK = new(student_N, prototypes, dtype=dtype)
        self.widened_NK = None if factors == dtype else new(max(student_N, teacher_N), prototypes, dtype=dtype)

        self.scale = _safe_scale(factors, student_N)
        largest_weight = self.weights_GS.max().clamp_min(tiny)
        self.prototypes_factor = largest_weight / (temperatures.student * self.scale)
        self.weighted_GSC = (student.bottleneck * (self.weights_GS / largest_weight)[..., None]).to(factors)
        self.grad_bottleneck_GSC = torch.empty_like(student.bottleneck, dtype=dtype) if needs_grad[0] else None
        self.grad_prototypes_KC = torch.zeros_like(student.prototypes, dtype=dtype) if needs_grad[1] else None

    def run(self) -> Tensor:
        """Return the loss, and set the gradients."""
        for groups in _slices(len(self.weights_GS), self.groups_per_chunk):
            self._compute_teacher_probs(groups)
            for rows in _slices(self.rows_per_group, self.rows_per_chunk):
                self._process_chunk((groups, rows))
        if self.grad_bottleneck_GSC is not None:
            self.grad_bottleneck_GSC *= (self.weights_GS / (self.temperatures.student * self.scale))[..., None]
        return (self.weights_GS * self.cross_entropy_GS).sum()

    def _compute_teacher_probs(self, groups: slice) -> None:
        logits_NK = self.teacher.bottleneck[groups].flatten(0, 1) @ self.teacher.prototypes.T
        scaled_NK = self._scaled(logits_NK, self.temperatures.teacher, self.teacher_offset)
        torch.softmax(scaled_NK, dim=-1, out=self.teacher_probs_NK[: len(scaled_NK)])

    def _process_chunk(self, chunk: tuple[slice, slice]) -> None:
        """Set the cross-entropy of the student rows of a chunk, and accumulate their gradients."""
        bottleneck_NC, cross_entropy_N = (
            self.student.bottleneck[chunk].flatten(0, 1),
            self.cross_entropy_GS[chunk].view(-1),
        )
        rows_NM, mixture_NM = self.rows_GSM[chunk].flatten(0, 1), self.mixture_GSM[chunk].flatten(0, 1)

        logits_NK = bottleneck_NC @ self.student.prototypes.T
        scaled_NK = self._scaled(logits_NK, self.temperatures.student, self.student_offset)
        probs_NK = torch.softmax(scaled_NK, dim=-1, out=self.probs_NK[: len(scaled_NK)])
        # The largest probability is 1 / sum exp(l - largest l).
        log_sum_exp_N = scaled_NK.amax(dim=-1) - probs_NK.amax(dim=-1).log()
        targets_NK = F.embedding_bag(rows_NM, self.teacher_probs_NK, per_sample_weights=mixture_NM, mode="sum")
        torch.sub(log_sum_exp_N, scaled_NK.mul_(targets_NK).sum(dim=-1), out=cross_entropy_N)
        if any(self.needs_grad):
            grad_NK = probs_NK.sub_(targets_NK)
            grad_NK = grad_NK if self.scale == 1 else grad_NK.mul_(self.scale)
            self._add_gradients(chunk, grad_NK if self.widened_NK is None else logits_NK.copy_(grad_NK))

    def _add_gradients(self, chunk: tuple[slice, slice], grad_logits_NK: Tensor) -> None:
        """Accumulate the gradients of both factors from those of the logits, which are times `scale` and for rows of weight 1.

        That of the bottleneck is not weighted yet.
        """
        if self.grad_bottleneck_GSC is not None:
            grad_gsC = self.grad_bottleneck_GSC[chunk]
            grad_gsC.copy_((grad_logits_NK @ self.student.prototypes).view_as(grad_gsC))
        if self.grad_prototypes_KC is not None:
            weighted_NC = self.weighted_GSC[chunk].flatten(0, 1)
            if self.grad_prototypes_KC.dtype == weighted_NC.dtype:
                self.grad_prototypes_KC.addmm_(grad_logits_NK.T, weighted_NC)
            else:
                self.grad_prototypes_KC += grad_logits_NK.T @ weighted_NC

    def _scaled(self, logits_NK: Tensor, temperature: float, offset: Tensor) -> Tensor:
        """Return offset + logits / temperature, in float32 or wider; the logits may be overwritten."""
        out = logits_NK if self.widened_NK is None else self.widened_NK[: len(logits_NK)]
        return torch.add(offset, logits_NK, alpha=1 / temperature, out=out)


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _divide(groups: int, rows: int, teacher_rows: int, rows_that_fit: int) -> tuple[int, int]:
    """Return the groups of a chunk and the student rows of each; only a group that is too large is split into rows."""
    if rows + teacher_rows <= rows_that_fit:
        chunks = math.ceil(groups / (rows_that_fit // (rows + teacher_rows)))
        return math.ceil(groups / chunks), rows
    chunks = math.ceil(rows / max(rows_that_fit - teacher_rows, rows_that_fit // 2, 1))
    return 1, math.ceil(rows / chunks)


def _safe_scale(dtype: torch.dtype, rows: int) -> float:
    """Return the factor of the gradients of logits that prevents underflow in float16.

    Their sum over a chunk, at most 1 per row, must not overflow at 65504.
    """
    return 2.0 ** math.floor(math.log2(2**15 / rows)) if dtype == torch.float16 else 1.0
