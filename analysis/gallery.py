"""Pictures of many images: queries with their nearest images, and a scatter plot with thumbnails."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from PIL import Image, ImageDraw, ImageOps

from analysis import draw
from analysis.images import printable, to_rgb
from analysis.plots import STYLE
from data.decode import decode_image
from data.layouts.sources import PackedStrings, Source
from utils import counted, logger

TILE = 128  # pixels, in the picture of neighbors
THUMBNAIL = 28  # points, in the scatter plot
MAX_COLORS = 20  # classes with colors of their own
BLANK = (225, 225, 225)


class Thumbnails:
    """Small pictures of a folder's images; gray ones where an image cannot be read.

    Args:
        source: the images; None if they are not there any more.
        names: of the images; an image of another name at the same place is not shown.
        in_chans, value_range: as in `decode_image`.
    """

    def __init__(
        self, source: Source | None, names: PackedStrings, in_chans: int, value_range: Sequence[float]
    ) -> None:
        self._source, self._names = source, names
        self._in_chans, self._value_range = in_chans, value_range
        self._missing: set[int] = set()

    def square(self, row: int, side: int) -> Image.Image:
        """Return the center of an image."""
        try:
            if self._source is None or self._source.name(row) != self._names[row]:
                raise ValueError("the images have changed")
            image = decode_image(self._source.read(row), self._in_chans, self._value_range)
        except Exception:  # decoders raise anything on damaged bytes
            self._missing.add(row)
            return Image.new("RGB", (side, side), BLANK)
        shown = image.convert("RGB") if isinstance(image, Image.Image) else to_rgb(image)
        return ImageOps.fit(shown, (side, side), Image.Resampling.BICUBIC)

    def warn_missing(self) -> None:
        """Warn of the images that are shown in gray."""
        if self._missing:
            first = self._names[min(self._missing)]
            logger.warning("%s not found or readable, and gray in pictures, first %s",
                           counted(len(self._missing), "image is", "images are"), first)  # fmt: skip


# --------------------------------------------------------------------------- neighbors


class Tile(NamedTuple):
    """An image of the folder with the line below it."""

    row: int
    text: str


def caption(name: str, label: str | None, cosine: float | None = None) -> str:
    """Return the cosine similarity and the label of an image, or its file name without one."""
    short = label or PurePath(name).name
    return printable(short) if cosine is None else f"{cosine:.3f} {printable(short)}"


def neighbor_page(rows: Sequence[Sequence[Tile]], thumbnails: Thumbnails, about: str) -> Image.Image:
    """Draw a row for each query: the query in a frame, then its nearest images."""
    tiles = []
    for row in rows:
        for column, tile in enumerate(row):
            image = thumbnails.square(tile.row, TILE)
            if column == 0:
                ImageDraw.Draw(image).rectangle((0, 0, TILE - 1, TILE - 1), outline=draw.RED, width=4)
            tiles.append(draw.stacked(image, _line(tile.text, TILE), gap=2))
    return draw.captioned(draw.tiled(tiles, len(rows[0])), about, margin=9)


def _line(text: str, width: int) -> Image.Image:
    """Draw a line of text, shortened to a width."""
    font = draw.font(draw.FONT_SIZE - 3)
    while font.getlength(text) > width and len(text) > 2:
        text = f"{text[:-2]}…"
    panel = Image.new("RGB", (width, draw.FONT_SIZE), draw.PAPER)
    ImageDraw.Draw(panel).text((0, 0), text, fill=draw.INK, font=font)
    return panel


# --------------------------------------------------------------------------- scatter


def scatter_plot(
    points_N2: np.ndarray,
    axis_names: tuple[str, str],
    rows_N: Sequence[int],
    labels: Sequence[str] | None,
    thumbnails: Thumbnails,
    title: str,
) -> Figure:
    """Plot images at their points: a dot for each, and thumbnails where there is room, framed in the color of their class.

    Args:
        rows_N: rows of the images in the folder.
        labels: of the images; more than `MAX_COLORS` different ones have no colors.
    """
    classes = sorted(set(labels or ()))
    colored = labels is not None and 1 < len(classes) <= MAX_COLORS
    color_of = {name: matplotlib.colormaps["tab20"](i) for i, name in enumerate(classes)} if colored else {}
    colors = [color_of[label] for label in labels] if colored and labels is not None else ["#777777"] * len(points_N2)
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(11, 9), layout="constrained")
        axes = figure.subplots()
        axes.scatter(points_N2[:, 0], points_N2[:, 1], c=colors, s=8, linewidths=0)
        axes.margins(0.05)
        axes.set(title=title, xlabel=axis_names[0], ylabel=axis_names[1], xticks=[], yticks=[])
        if color_of:
            handles = [
                Line2D([], [], marker="o", linestyle="", color=color, label=name) for name, color in color_of.items()
            ]
            figure.legend(handles=handles, loc="outside right upper")
        figure.draw_without_rendering()
        scale = 72 / figure.dpi  # pixels to points
        for i in without_overlap(axes.transData.transform(points_N2) * scale, THUMBNAIL + 4):
            picture = OffsetImage(np.asarray(thumbnails.square(rows_N[i], 2 * THUMBNAIL)), zoom=0.5)
            frame = {"edgecolor": colors[i], "linewidth": 2}
            axes.add_artist(AnnotationBbox(picture, tuple(points_N2[i]), frameon=True, pad=0.1, bboxprops=frame))
    return figure


def without_overlap(points_N2: np.ndarray, side: float) -> list[int]:
    """Return the indices of points whose squares of this side do not overlap, chosen in a random, fixed order."""
    chosen: list[int] = []
    for i in np.random.default_rng(0).permutation(len(points_N2)).tolist():
        if not chosen or (np.abs(points_N2[chosen] - points_N2[i]).max(axis=1) >= side).all():
            chosen.append(i)
    return chosen
