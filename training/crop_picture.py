"""The picture of a few images in all their views, `crops.png`: what the augmentation makes of them.

Each image has a column. The global views have a row each, and as many local views share a row as fit into the column.

Shapes: B images, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from losses.distillation import TEACHER_VIEWS

IMAGES = 8
LEAST_SIDE = 128  # of a global view on the picture in pixels; smaller ones are enlarged by a whole factor
GAP, MARGIN = 4, 8  # pixels between the views of an image, and around images and labels
FONT_SIZE = 14
INK, PAPER = (30, 30, 30), (232, 232, 232)  # gray, on which white views are seen
NEAREST = Image.Resampling.NEAREST


class Row(NamedTuple):
    """Views of one size that share a row."""

    label: str
    views: list[Image.Image]  # those of the first image, then those of the second, ...
    across: int  # views of each image

    @property
    def side(self) -> int:
        """Side of a view."""
        return self.views[0].width

    @property
    def width(self) -> int:
        """Width of the views of one image."""
        return self.across * (self.side + GAP) - GAP


def draw_crops(views: Sequence[Tensor], mean: Sequence[float], std: Sequence[float]) -> Image.Image:
    """Draw some images in all their views (B, C, H, W), global ones first, without the normalization."""
    images = min(IMAGES, len(views[0]))
    rows = list(_rows([_pictures(view[:images], mean, std) for view in views]))
    font = ImageFont.load_default(FONT_SIZE)
    left = round(max(font.getlength(row.label) for row in rows)) + 2 * MARGIN
    column = max(row.width for row in rows) + MARGIN
    height = sum(row.side + MARGIN for row in rows) + MARGIN
    picture = Image.new("RGB", (left + images * column, height), PAPER)
    draw, top = ImageDraw.Draw(picture), MARGIN
    for row in rows:
        draw.text((MARGIN, top + row.side // 2), row.label, INK, font, anchor="lm")
        for number, view in enumerate(row.views):
            image, place = divmod(number, row.across)
            indent = (column - MARGIN - row.width) // 2
            picture.paste(view, (left + image * column + indent + place * (row.side + GAP), top))
        top += row.side + MARGIN
    return picture


def _pictures(view_BCHW: Tensor, mean: Sequence[float], std: Sequence[float]) -> list[Image.Image]:
    """Undo the normalization of some images, of which one or three channels are shown."""
    shape = (1, -1, 1, 1)
    pixels = view_BCHW.detach().float().cpu() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    pixels = pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)
    return [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in (pixels.clamp(0, 1) * 255).round().byte()]


def _rows(views: Sequence[list[Image.Image]]) -> Iterator[Row]:
    """Divide the views into rows, and enlarge small ones."""
    side = views[0][0].width
    factor = max(1, round(LEAST_SIDE / side))
    enlarged = [[view.resize((factor * view.width, factor * view.height), NEAREST) for view in same] for same in views]
    for number, same in enumerate(enlarged[:TEACHER_VIEWS], start=1):
        yield Row(f"global {number}", same, 1)
    done = 0
    for size, group in groupby(enlarged[TEACHER_VIEWS:], key=lambda same: same[0].width):
        of_size, across = list(group), max(1, round(factor * side / size))
        for first in range(0, len(of_size), across):
            some = of_size[first : first + across]
            label = ", ".join(str(done + number + 1) for number in range(len(some)))
            yield Row(f"local {label}", [view for of_image in zip(*some) for view in of_image], len(some))
            done += len(some)
