"""Inputs of the golden losses."""

from __future__ import annotations

from typing import TypeVar

from fill import tensor

from losses.dino import DINOLoss
from models import MultiCropOutput

Loss = TypeVar("Loss", bound=DINOLoss)


def golden_loss(kind: type[Loss]) -> Loss:
    loss = kind(32, 6, 0.04, 0.07, 3, 10)
    for name, center in loss.state_dict().items():
        center.copy_(0.1 * tensor(f"lossA-{name}", 1, 32))
    return loss


def golden_outputs() -> tuple[MultiCropOutput, MultiCropOutput]:
    student = MultiCropOutput(
        tensor("lossA-s_cls", 18, 32).requires_grad_(),
        tensor("lossA-s_reg", 402, 32).requires_grad_(),
        tensor("lossA-s_fea", 402, 16),
        (49, 49, 9, 9, 9, 9),
    )
    teacher = MultiCropOutput(
        tensor("lossA-t_cls", 6, 32), tensor("lossA-t_reg", 294, 32), tensor("lossA-t_fea", 294, 16), (49, 49)
    )
    return student, teacher
