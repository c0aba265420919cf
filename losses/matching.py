"""Region matching: the most similar teacher region of each student region, in every image that its image is mixed from.

Shapes: B images, V student views, T regions of a student view, S of all student views, U regions of a teacher view, C channels of
the backbone, P images that a student image is mixed from, 1 without mixup.
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

    images_PB: Tensor  # indices of teacher images
    weights_VPB: Tensor  # their shares in each view; 0 where an image is mixed from fewer than P


class Match(NamedTuple):
    """The regions of one teacher view, of the `source`-th images of `Sources`, that match the student's best."""

    teacher_view: int
    source: int
    images_B: Tensor
    regions_BS: Tensor


def unmixed_sources(views: int, batch: int, device: torch.device) -> Sources:
    """Return the sources without mixup: every image itself."""
    return Sources(torch.arange(batch, device=device)[None], torch.ones(views, 1, batch, device=device))


def mixup_sources(targets_mixup: Sequence[Tensor], mixed_from: int | None = None) -> Sources:
    """Return the sources of mixed images, without a device synchronization.

    Args:
        targets_mixup: For each view the share (B, B) of teacher image (row) in student image (column).
        mixed_from: P, an upper bound of the number of images that one is mixed from over all views; None for B.
    """
    weights_VBB = torch.stack([weights_BB.float() for weights_BB in targets_mixup])
    views, batch, _ = weights_VBB.shape
    most = batch if mixed_from is None else min(mixed_from, batch)
    images_PB = (weights_VBB != 0).any(dim=0).float().topk(most, dim=0).indices
    return Sources(images_PB, weights_VBB.gather(1, images_PB.expand(views, -1, -1)))


def match_views(
    student: MultiCropOutput, teacher: MultiCropOutput, sources: Sources, mixed: bool = True
) -> Iterator[Match]:
    """Yield the matches of all student regions in each teacher view, found on backbone features, also in the same view.

    Not `mixed`: `sources` are unmixed.
    """
    student_BSC = torch.cat(by_view(_directions(student.region_features), student), dim=1)
    for q, teacher_BUC in enumerate(by_view(_directions(teacher.region_features), teacher)):
        for p, images_B in enumerate(sources.images_PB):
            regions_BS = _nearest(student_BSC, teacher_BUC[images_B] if mixed else teacher_BUC)
            yield Match(q, p, images_B, regions_BS)


def match_regions(student_features_BTC: Tensor, teacher_features_BUC: Tensor) -> Tensor:
    """Return (B, T): the index of the teacher region with the highest cosine similarity (EsViT, equation 4)."""
    return _nearest(_directions(student_features_BTC), _directions(teacher_features_BUC))


def _directions(features: Tensor) -> Tensor:
    return F.normalize(features.detach().float(), dim=-1)


def _nearest(student_BTC: Tensor, teacher_BUC: Tensor) -> Tensor:
    return (student_BTC @ teacher_BUC.transpose(1, 2)).argmax(dim=-1)
