"""Mixup and cutmix of the images of a batch, view by view, with the matching weights of the teacher's targets.

Origin: mixup (Zhang et al., ICLR 2018) and cutmix (Yun et al., ICCV 2019), from timm, as used in microsoft/esvit. There the
region loss kept unmixed targets; here both losses get mixed ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.data import Mixup
from torch import Tensor

from utils import UsageError


class ViewMixup:
    """Mix the first `num_views` views of a batch, with a new draw for each; further views are not changed.

    Args:
        batch_size: images of a batch on one process, an even number.
        mixup_alpha, cutmix_alpha, cutmix_minmax, prob, switch_prob, mode, smoothing: see timm's `Mixup`.

    Attributes:
        mixed_from: maximum number of images with a nonzero weight in the target of one image: two, which timm pairs from both
            ends of the batch, or the whole batch with label smoothing.

    Raises:
        UsageError: an odd batch size, an unknown mode, or no strength above 0.
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
            raise UsageError(f"--batch_size_per_gpu {batch_size} must be even with --use_mixup, which pairs images")
        if mode not in {"batch", "pair", "elem"}:
            raise UsageError(f"--mixup-mode {mode} must be one of batch, pair, elem")
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
        """Return mixed copies of the views (B, C, H, W), and for each view the weights (teacher image, student image), (B, B)."""
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
