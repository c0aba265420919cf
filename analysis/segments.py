"""Pictures of segmentations: image, mask and prediction side by side, with a legend of the colors.

Shapes: H x W pixels, K classes.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

from analysis import draw
from data.segmentation import VOID

WIDTH = 400  # of an image in pixels
GAP = 8
SWATCH = 14
VOID_COLOR: draw.Color = (0, 0, 0)
MOST_OPACITY = 0.6  # of colors over the image


class Segmented(NamedTuple):
    """An image with its mask and its prediction."""

    name: str
    image: Image.Image
    mask_HW: np.ndarray
    found_HW: np.ndarray


def class_colors(classes: int) -> list[draw.Color]:
    """Return a color for each class: those of matplotlib's tab20, beyond 20 classes evenly spread hues of three values."""
    if classes <= 20:
        order = [*range(0, 20, 2), *range(1, 20, 2)]  # strong colors first
        table = [matplotlib.colormaps["tab20"](order[number])[:3] for number in range(classes)]
    else:
        table = [colorsys.hsv_to_rgb(number / classes, 0.9, (1.0, 0.75, 0.5)[number % 3]) for number in range(classes)]
    return [(round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue in table]


def colored(classes_HW: np.ndarray, colors: Sequence[draw.Color], image: Image.Image) -> Image.Image:
    """Draw the color of each pixel's class over a darkened gray image, and void black."""
    table = np.zeros((256, 3), dtype=np.uint8)
    table[: len(colors)] = colors
    table[VOID] = VOID_COLOR
    layer = Image.fromarray(table[classes_HW])
    opacity = Image.fromarray(np.where(classes_HW == VOID, 255, round(255 * MOST_OPACITY)).astype(np.uint8))
    return Image.composite(layer, image.convert("L").convert("RGB"), opacity)


def legend(names: Sequence[tuple[str, draw.Color]], width: int) -> Image.Image:
    """Draw names beside squares of their color, in as many lines as needed."""
    font, line = draw.font(draw.FONT_SIZE), draw.FONT_SIZE + 10
    places, x, y = [], GAP, 0
    for name, color in names:
        needed = SWATCH + 6 + round(font.getlength(name)) + 14
        if x > GAP and x + needed > width:
            x, y = GAP, y + line
        places.append((x, y, name, color))
        x += needed
    canvas = Image.new("RGB", (width, y + line + GAP), draw.PAPER)
    pen = ImageDraw.Draw(canvas)
    for x, y, name, color in places:
        pen.rectangle((x, y + 3, x + SWATCH, y + 3 + SWATCH), fill=color, outline=draw.INK)
        pen.text((x + SWATCH + 6, y + 1), name, fill=draw.INK, font=font)
    return canvas


def prediction_page(items: Sequence[Segmented], classes: Sequence[str], about: str) -> Image.Image:
    """Draw a row for each image, below the text `about` and above a legend of the classes that occur."""
    colors = class_colors(len(classes))
    rows = []
    for item in items:
        size = (WIDTH, max(1, round(WIDTH * item.image.height / item.image.width)))
        photo = item.image.convert("RGB")
        panels = [photo, colored(item.mask_HW, colors, photo), colored(item.found_HW, colors, photo)]
        captions = [item.name, "mask", "prediction"]
        tiles = [
            draw.captioned(
                panel.resize(size, Image.Resampling.BICUBIC if panel is photo else Image.Resampling.NEAREST), text
            )
            for panel, text in zip(panels, captions)
        ]
        rows.append(draw.tiled(tiles, len(tiles), GAP))
    page = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), draw.PAPER)
    top = 0
    for row in rows:
        page.paste(row, (0, top))
        top += row.height
    shown = set(np.unique(np.concatenate([part.ravel() for item in items for part in item[2:]])).tolist())
    entries = [(name, color) for number, (name, color) in enumerate(zip(classes, colors)) if number in shown]
    entries += [("void", VOID_COLOR)] if VOID in shown else []
    return draw.captioned(draw.stacked(page, legend(entries, page.width)), about, margin=GAP)
