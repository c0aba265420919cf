"""Mixup and cutmix between the images of a batch, view by view, with the targets that the losses take.

Origin: mixup (Zhang et al., ICLR 2018) and cutmix (Yun et al., ICCV 2019) through timm; their use in EsViT follows
microsoft/esvit. The reference mixed images but not the targets of regions; here both losses get the same targets.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.data import Mixup
from torch import Tensor

from utils import UsageError


class ViewMixup:
    """Mix the first `num_views` views of a batch, each with its own draw.

    Args:
        num_views: further views stay as they are.
        batch_size: images of a batch on one process, an even number.
        mixup_alpha, cutmix_alpha, cutmix_minmax, prob, switch_prob, mode, smoothing: as in timm's `Mixup`.

    Attributes:
        mixed_from: how many images of the batch one is mixed from at most: itself and its mirror image in the batch's order,
            or all of them where smoothing gives each a share.

    Raises:
        UsageError: an odd batch, or both alphas zero.
    """

    def __init__(
        self,
        num_views: int,
        batch_size: int,
        mixup_alpha: float,
        cutmix_alpha: float,
        cutmix_minmax: Sequence[float] | None,
        prob: float,
        switch_prob: float,
        mode: str,
        smoothing: float,
    ) -> None:
        if batch_size % 2:
            raise UsageError(f"mixup pairs images, --batch_size_per_gpu {batch_size} must be even")
        if mode not in {"batch", "pair", "elem"}:
            raise UsageError(f"unknown --mixup-mode '{mode}'; choose batch, pair or elem")
        if mixup_alpha <= 0 and cutmix_alpha <= 0 and cutmix_minmax is None:
            raise UsageError("--use_mixup needs --mixup, --cutmix or --cutmix-minmax above 0")
        self.num_views = num_views
        self.mixed_from = batch_size if smoothing else 2
        self.mix = Mixup(
            mixup_alpha=mixup_alpha,
            cutmix_alpha=cutmix_alpha,
            cutmix_minmax=cutmix_minmax,
            prob=prob,
            switch_prob=switch_prob,
            mode=mode,
            label_smoothing=smoothing,
            num_classes=batch_size,
        )

    def __call__(self, views: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Mixed copies of the views (B, C, H, W), and for each the weights (teacher image, student image), (B, B)."""
        mixed_views, weights = [], []
        for i, view in enumerate(views):
            images = torch.arange(len(view), device=view.device)
            if i < self.num_views:
                mixed, weights_of_student = self.mix(view.clone(), images)
                mixed_views.append(mixed)
                weights.append(weights_of_student.to(view.device).T)
            else:
                mixed_views.append(view)
                weights.append(torch.eye(len(view), device=view.device))
        return mixed_views, weights
