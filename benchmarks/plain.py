"""The baseline of the benchmarks: a training step with the same results and without optimizations of time or memory.

It follows the published implementations of DINO (Caron et al., ICCV 2021) and Swin Transformer (Liu et al., ICCV 2021): explicit
attention on padded windows, losses that store all logits and loop over pairs of views, and loops over parameters for clipping,
the optimizer and the teacher, with a synchronization for each parameter and each loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import utils
from losses.dino import DINOLoss
from losses.distillation import TEACHER_VIEWS, at_least_float32
from losses.region import RegionMatchingLoss
from models.outputs import MultiCropOutput, by_view
from models.swin import SwinBlock, WindowAttention
from ops.attention import pairwise_bias
from ops.mlp import Mlp
from ops.windows import WindowPartition, join_windows, padded_grid, partition_windows, shift_mask
from training import optim
from training.step import MicroBatch, TrainStep

Loss = TypeVar("Loss", bound=DINOLoss)


class PlainSwinBlock(SwinBlock):
    """A Swin block with explicit attention; `make_plain` turns a `SwinBlock` into it."""

    def attend(self, x_BHWC: Tensor, attention: bool) -> tuple[Tensor, Tensor | None]:
        attn, partition = self.attn, WindowPartition(self.window, self.shift)
        assert isinstance(attn, WindowAttention)
        grid = (x_BHWC.shape[1], x_BHWC.shape[2])
        windows = partition_windows(x_BHWC, partition)  # (B * windows, N, C)
        count, tokens, channels = windows.shape
        q, k, v = attn.qkv(windows).view(count, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        logits = logits + pairwise_bias(attn.relative_position_bias_table, attn.relative_position_index)
        if self.shift:
            mask = shift_mask(padded_grid(grid, self.window), self.window, self.shift, torch.device("cpu"))[
                ..., :tokens
            ]
            mask = mask.to(x_BHWC.device)
            logits = logits.view(len(x_BHWC), len(mask), *logits.shape[1:]) + mask[:, None]
            logits = logits.flatten(0, 1)
        maps = logits.softmax(dim=-1)
        x = (maps.to(v.dtype) @ v).transpose(1, 2).reshape(count, tokens, channels)
        return join_windows(attn.proj_drop(attn.proj(x)), partition, grid), maps if attention else None


def make_plain(network: nn.Module) -> nn.Module:
    """Replace the Swin blocks and MLPs of a network by plain ones, in place; parameters and their names stay."""
    plain: dict[type[nn.Module], type[nn.Module]] = {SwinBlock: PlainSwinBlock, Mlp: timm.layers.Mlp}
    for module in network.modules():
        module.__class__ = plain.get(type(module), type(module))
    return network


class PlainViewLoss(DINOLoss):
    """The view loss with all logits stored, in a loop over pairs of views."""

    def _cross_entropy(self, targets: Tensor, student_logits: Tensor) -> Tensor:
        return -(targets * F.log_softmax(student_logits, dim=-1)).sum(dim=-1)

    def _sharpened(self, student: Tensor, teacher: Tensor, center: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        return at_least_float32(student) / self.student_temp, self.teacher_probs(teacher, center, epoch)

    def view_loss(self, student_logits: Any, teacher_logits: Any, epoch: int, sources: Any = None) -> Tensor:
        """Return the view loss, without mixup."""
        student, teacher = self._sharpened(student_logits, teacher_logits, self.center, epoch)
        loss = self.center.new_zeros(())
        for q, targets in enumerate(teacher.chunk(TEACHER_VIEWS)):
            for v, logits in enumerate(student.chunk(self.ncrops)):
                if v != q:
                    loss = loss + self._cross_entropy(targets, logits).mean()
        return loss / self._pairs


class PlainRegionLoss(PlainViewLoss, RegionMatchingLoss):
    """The region loss with targets gathered for each pair of views."""

    def region_loss(
        self, student: MultiCropOutput, teacher: MultiCropOutput, epoch: int, sources: Any = None
    ) -> Tensor:
        """Return the region loss, without mixup."""
        logits = self._sharpened(student.region_logits, teacher.region_logits, self.center_grid, epoch)
        (student_views, teacher_views), (student_features, teacher_features) = (
            [by_view(rows, output) for rows, output in zip(pair, (student, teacher))]
            for pair in (logits, (student.region_features, teacher.region_features))
        )
        loss = self.center_grid.new_zeros(())
        for q, targets_BUK in enumerate(teacher_views):
            for v, logits_BTK in enumerate(student_views):
                if v == q:
                    continue
                features = student_features[v].detach().float(), teacher_features[q].float()
                directions_BTC, directions_BUC = (F.normalize(rows, dim=-1) for rows in features)
                match_BT = (directions_BTC @ directions_BUC.transpose(1, 2)).argmax(dim=2)
                matched_BTK = targets_BUK.gather(1, match_BT[..., None].expand(-1, -1, targets_BUK.shape[2]))
                loss = loss + self._cross_entropy(matched_BTK, logits_BTK).mean()
        return loss / self._pairs


def make_plain_loss(loss: Loss) -> Loss:
    """Replace a loss by the plain one, in place."""
    plain: dict[type[DINOLoss], type[DINOLoss]] = {DINOLoss: PlainViewLoss, RegionMatchingLoss: PlainRegionLoss}
    loss.__class__ = plain[type(loss)]  # type: ignore[assignment]
    return loss


class PlainStep(TrainStep):
    """A step with loops over parameters, and a synchronization for each.

    Args:
        step: the step to replace; its optimizer is not used.
        read: return the value of a scalar tensor; replaced for fake tensors.
    """

    def __init__(self, step: TrainStep, read: Callable[[Tensor], float] = Tensor.item) -> None:
        optimizer = torch.optim.AdamW(optim.param_groups(step.method.student), lr=0.0, foreach=False, fused=False)
        settings = (step.device, step.precision, step.clip_grad, step.freeze_last_layer)
        super().__init__(step.method, optimizer, step.schedules, *settings)
        self.read = read

    def __call__(
        self, micro_batches: Sequence[MicroBatch], iteration: int, epoch: int, watch: bool = False
    ) -> dict[str, Tensor]:
        """Update student and teacher.

        Raises:
            FloatingPointError: a loss that is not finite.
        """
        self._set_schedules(iteration)
        scalars = self._accumulate_gradients(micro_batches, epoch, watch)
        if not math.isfinite(self.read(scalars["loss"])):
            raise FloatingPointError(f"the loss of step {iteration} is not finite")
        self._clip()
        if epoch < self.freeze_last_layer:
            optim.drop_last_layer_gradients(self.method.student)
        self.optimizer.step()
        self._move_teacher(float(self.schedules.momentum[iteration]))
        self.method.criterion.update_center(torch.ones((), dtype=torch.bool, device=self.device))
        return scalars | {"skipped": torch.zeros(())}

    def _accumulate_gradients(
        self, micro_batches: Sequence[MicroBatch], epoch: int, watch: bool = False
    ) -> dict[str, Tensor]:
        (views,) = micro_batches
        assert not callable(views)
        with utils.autocast(self.device, self.precision):
            loss, extra = self.method.compute_loss(views, epoch)
        self.optimizer.zero_grad()
        loss.backward()
        return {name: value.detach() for name, value in {"loss": loss, **extra}.items()}

    @torch.no_grad()
    def _clip(self) -> None:
        for parameter in self.method.student.parameters():
            if parameter.grad is not None and self.clip_grad > 0:
                factor = self.clip_grad / (self.read(parameter.grad.norm(2)) + 1e-6)
                if factor < 1:
                    parameter.grad.mul_(factor)

    @torch.no_grad()
    def _move_teacher(self, momentum: float) -> None:
        for student, teacher in zip(self.method.student.parameters(), self.method.teacher.parameters()):
            teacher.mul_(momentum).add_((1 - momentum) * student)
