"""Region matching: of which teacher region a student region learns, in which of the images that its own is mixed from.

Shapes: B images, V student views, T regions of a student view, U regions of a teacher view, C channels of the backbone, P images
that a student image is mixed from, 1 without mixup.
Origin: EsViT (Li et al., ICLR 2022) section 3.2, equation 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.outputs import MultiCropOutput, by_view


class Sources(NamedTuple):
    """The images that each student image is mixed from."""

    images_PB: Tensor  # numbers of teacher images
    weights_VPB: Tensor  # their shares in every view; 0 where an image has fewer than P


class Match(NamedTuple):
    """For the regions of one student view, those of one teacher view in image `source` of `Sources`."""

    student_view: int
    teacher_view: int
    source: int
    images_B: Tensor
    weights_B: Tensor
    regions_BT: Tensor


def unmixed(views: int, batch: int, device: torch.device) -> Sources:
    """Every image by itself."""
    return Sources(torch.arange(batch, device=device)[None], torch.ones(views, 1, batch, device=device))


def mixup_sources(targets_mixup: Sequence[Tensor], mixed_from: int | None = None) -> Sources:
    """What `targets_mixup` (of each view teacher image by student image, (B, B)) says, without waiting for the device.

    P is `mixed_from`, over all views no image may have more, or B.
    """
    weights_VBB = torch.stack([weights_BB.float() for weights_BB in targets_mixup])
    views, batch, _ = weights_VBB.shape
    most = batch if mixed_from is None else min(mixed_from, batch)
    images_PB = (weights_VBB != 0).any(dim=0).float().topk(most, dim=0).indices
    return Sources(images_PB, weights_VBB.gather(1, images_PB.expand(views, -1, -1)))


def match_views(
    student: MultiCropOutput, teacher: MultiCropOutput, sources: Sources, mixed: bool = True
) -> Iterator[Match]:
    """The matches of all pairs of different views, found on backbone features; `mixed`: not every image by itself."""
    student_views, teacher_views = (
        [_directions(view) for view in by_view(output.region_features, output)] for output in (student, teacher)
    )
    for v, student_BTC in enumerate(student_views):
        for q, teacher_BUC in enumerate(teacher_views):
            if q == v:
                continue
            for p, images_B in enumerate(sources.images_PB):
                regions_BT = _nearest(student_BTC, teacher_BUC[images_B] if mixed else teacher_BUC)
                yield Match(v, q, p, images_B, sources.weights_VPB[v, p], regions_BT)


def match_regions(student_features_BTC: Tensor, teacher_features_BUC: Tensor) -> Tensor:
    """(B, T) index of the teacher region with the highest cosine to each student region (EsViT equation 4)."""
    return _nearest(_directions(student_features_BTC), _directions(teacher_features_BUC))


def _directions(features: Tensor) -> Tensor:
    return F.normalize(features.detach().float(), dim=-1)


def _nearest(student_BTC: Tensor, teacher_BUC: Tensor) -> Tensor:
    return (student_BTC @ teacher_BUC.transpose(1, 2)).argmax(dim=-1)
