"""The straightforward step that the benchmarks compare with: the same numbers, nothing done to save time or memory.

Attention is spelled out on windows that are padded, rolled and copied, with shift masks built anew in every forward; losses hold
all logits (`--plain_loss`); gradients are clipped with one reading a parameter; the optimiser goes from tensor to tensor, the
teacher from parameter to parameter; the host reads every loss.

Origin: this project's own; it restates the update of DINO (Caron et al., ICCV 2021) and the windows of Swin Transformer (Liu et
al., ICCV 2021) in their plainest form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import timm.layers
import torch
from torch import Tensor, nn

import engine
import optim
from models.attention import pairwise_bias
from models.heads import WeightNormLinear
from models.mlp import Mlp
from models.swin import SwinBlock, WindowAttention
from models.windows import Cut, cut_windows, join_windows, padded_grid, window_partition


class PlainSwinBlock(SwinBlock):
    """A Swin block whose attention is written down as in the paper; takes the place of another by `make_plain`."""

    def attend(self, x_BHWC: Tensor, attention: bool) -> tuple[Tensor, Tensor | None]:
        """Pad, shift, cut into windows, attend, and all of it back."""
        attn, cut = self.attn, Cut(self.window, self.shift)
        assert isinstance(attn, WindowAttention)
        grid = (x_BHWC.shape[1], x_BHWC.shape[2])
        windows = cut_windows(x_BHWC, cut)  # (B * windows, N, C)
        count, tokens, channels = windows.shape
        q, k, v = attn.qkv(windows).view(count, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        logits = logits + pairwise_bias(attn.relative_position_bias_table, attn.relative_position_index)
        if self.shift:
            mask = plain_shift_mask(padded_grid(grid, self.window), cut).to(x_BHWC.device)
            logits = logits.view(len(x_BHWC), len(mask), *logits.shape[1:]) + mask[:, None]
            logits = logits.flatten(0, 1)
        maps = logits.softmax(dim=-1)
        x = (maps.to(v.dtype) @ v).transpose(1, 2).reshape(count, tokens, channels)
        return join_windows(attn.proj_drop(attn.proj(x)), cut, grid), maps if attention else None


class PlainWeightNorm(WeightNormLinear):
    """Prototypes whose norm is spelled out."""

    def weight(self) -> Tensor:
        """See `WeightNormLinear.weight`."""
        return self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True))


def plain_shift_mask(grid: tuple[int, int], cut: Cut) -> Tensor:
    """(windows, N, N): -100 between tokens that were not neighbours before the shift; made on the host."""
    bands = (slice(0, -cut.window), slice(-cut.window, -cut.shift), slice(-cut.shift, None))
    regions = torch.zeros(1, *grid, 1)
    for number, (rows, columns) in enumerate((rows, columns) for rows in bands for columns in bands):
        regions[:, rows, columns] = number
    region = window_partition(regions, cut.window).squeeze(-1)
    return torch.where(region[:, :, None] == region[:, None, :], 0.0, -100.0)


def make_plain(network: nn.Module) -> nn.Module:
    """Turn the Swin blocks, MLPs and prototypes of a network into plain ones, in place; parameters and their names stay."""
    plain: dict[type[nn.Module], type[nn.Module]] = {
        SwinBlock: PlainSwinBlock,
        Mlp: timm.layers.Mlp,
        WeightNormLinear: PlainWeightNorm,
    }
    for module in network.modules():
        module.__class__ = plain.get(type(module), type(module))
    return network


class PlainStep(engine.TrainStep):
    """An update in which the host decides everything; takes the place of a `TrainStep` on the same method.

    Args:
        step: what to do the plain way; its optimiser is not used.
        read: a number of a tensor; replaced where tensors have no values.
    """

    def __init__(self, step: engine.TrainStep, read: Callable[[Tensor], float] = Tensor.item) -> None:
        optimizer = torch.optim.AdamW(optim.param_groups(step.method.student), lr=0.0, foreach=False, fused=False)
        settings = (step.device, step.precision, step.clip_grad, step.freeze_last_layer)
        super().__init__(step.method, optimizer, step.schedules, *settings)
        self.read = read

    def __call__(
        self, micro_batches: Sequence[engine.MicroBatch], iteration: int, epoch: int, watch: bool = False
    ) -> dict[str, Tensor]:
        """One update.

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
        self.optimizer.zero_grad(set_to_none=True)
        self.method.finish_step(torch.ones((), dtype=torch.bool, device=self.device))
        return scalars | {"skipped": torch.zeros(())}

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
