"""Pictures drawn over photographs: weights, masks, frames, and lines between regions. Nothing is computed here.

Planes and masks have one value for each region of the image they are laid over. Plots with axes are in `analysis.plots`.

Shapes: h x w grid of regions.
Origin: this project's own; color maps and letters are matplotlib's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import matplotlib
import numpy as np
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from evaluation.results import write_new

Color = tuple[int, int, int]
Size = tuple[int, int]  # height and width
Point = tuple[float, float]  # x and y
Box = tuple[int, int, int, int]  # top, left, bottom and right in regions, the last two not included
Item = TypeVar("Item")

INK, PAPER = (30, 30, 30), (255, 255, 255)
RED, YELLOW = (255, 60, 60), (255, 225, 0)
LETTERS = 14  # points of captions
STAR, BADGE = 20.0, 11.0  # radius, in pixels, of the marks of correspondences


@lru_cache(maxsize=8)
def font(points: int) -> ImageFont.FreeTypeFont:
    """The font that plots have too."""
    return ImageFont.truetype(findfont("DejaVu Sans"), points)


def enlarged(image: Image.Image, shorter_side: float) -> Image.Image:
    """An image whose shorter side is at least `shorter_side`; smooth."""
    factor = max(1.0, shorter_side / min(image.size))
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)


def faded(image: Image.Image, light: float) -> Image.Image:
    """The image in gray, with a share of its brightness."""
    return image.convert("L").point([round(value * light) for value in range(256)]).convert("RGB")


def heat(image: Image.Image, plane_hw: Tensor, strength: float = 0.7) -> Image.Image:
    """Weights of regions in colors over the faded image, brightest where largest; no color where a weight is 0."""
    plane = plane_hw.double().numpy()
    largest = plane.max()
    share = plane / largest if largest > 0 else plane
    colors = Image.fromarray(matplotlib.colormaps["inferno"](share, bytes=True)[..., :3])
    seen = Image.fromarray(np.where(share > 1e-6, round(255 * strength), 0).astype(np.uint8))
    colors, seen = (layer.resize(image.size, Image.Resampling.NEAREST) for layer in (colors, seen))
    return Image.composite(colors, faded(image, 0.6), seen)


def masked(image: Image.Image, mask_hw: Tensor) -> Image.Image:
    """The image where the mask holds, dark and gray elsewhere."""
    keep = Image.fromarray(mask_hw.numpy().astype(np.uint8) * 255).resize(image.size, Image.Resampling.NEAREST)
    return Image.composite(image, faded(image, 0.25), keep)


def on_image(box: Box, grid: Size, size: Size) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a box in pixels of an image of `size`, the last two not included."""
    top, left, bottom, right = box
    y, x = size[0] / grid[0], size[1] / grid[1]
    return round(left * x), round(top * y), round(right * x), round(bottom * y)


def boxed(image: Image.Image, box: Box, grid: Size, color: Color = RED) -> Image.Image:
    """The image with a frame around some regions."""
    image = image.copy()
    left, top, right, bottom = on_image(box, grid, (image.height, image.width))
    draw = ImageDraw.Draw(image)
    draw.rectangle((left, top, right - 1, bottom - 1), outline=PAPER, width=4)
    draw.rectangle((left + 1, top + 1, right - 2, bottom - 2), outline=color, width=2)
    return image


def captioned(image: Image.Image, text: str, margin: int = 1) -> Image.Image:
    """The image below some words, on as many lines as they need."""
    lines = lines_of(text, image.width - 2 * margin)
    height = len(lines) * (LETTERS + 4) + 4
    canvas = Image.new("RGB", (image.width, image.height + height), PAPER)
    ImageDraw.Draw(canvas).text((margin, 2), "\n".join(lines), fill=INK, font=font(LETTERS), spacing=4)
    canvas.paste(image, (0, height))
    return canvas


def lines_of(text: str, width: int) -> list[str]:
    """The words of a caption on lines of at most `width` pixels; a longer word has its own."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if lines[-1] and font(LETTERS).getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def tiled(images: Sequence[Image.Image], columns: int, gap: int = 8) -> Image.Image:
    """Images in `even_rows` of at most `columns`, on white."""
    rows = even_rows(images, columns)
    width, height = max(image.width for image in images), max(image.height for image in images)
    canvas = Image.new("RGB", (len(rows[0]) * (width + gap) + gap, len(rows) * (height + gap) + gap), PAPER)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            canvas.paste(image, (gap + x * (width + gap), gap + y * (height + gap)))
    return canvas


def even_rows(items: Sequence[Item], most: int) -> list[Sequence[Item]]:
    """As few rows of at most `most` as there can be, whose numbers differ by one at most: no single item below full rows."""
    parts = np.array_split(np.arange(len(items)), -(-len(items) // most))
    return [items[part[0] : part[-1] + 1] for part in parts]


def stacked(above: Image.Image, below: Image.Image, gap: int = 4) -> Image.Image:
    """Two images of one width, on white."""
    canvas = Image.new("RGB", (above.width, above.height + gap + below.height), PAPER)
    canvas.paste(above, (0, 0))
    canvas.paste(below, (0, above.height + gap))
    return canvas


# --------------------------------------------------------------------------- correspondence


def rank_color(rank: int, ranks: int) -> Color:
    """A color of its own for every rank, counted from 0."""
    red, green, blue = matplotlib.colormaps["turbo"](0.86 - 0.76 * rank / max(ranks - 1, 1))[:3]
    return round(255 * red), round(255 * green), round(255 * blue)


def paired(
    images: tuple[Image.Image, Image.Image],
    pairs: Sequence[tuple[Point, Point]],
    marks: tuple[Point, Point],
    gap: int = 16,
) -> Image.Image:
    """Two images side by side, ranked pairs of points (x, y in shares of 0..1) joined by lines, and one mark on each.

    The first pair gets rank 1 and is drawn on top; a point of several pairs bears all their ranks.
    """
    first, second = images
    offset = first.width + gap
    canvas = Image.new("RGB", (offset + second.width, max(first.height, second.height)), PAPER)
    canvas.paste(first, (0, 0))
    canvas.paste(second, (offset, 0))
    draw = ImageDraw.Draw(canvas)

    def on_first(point: Point) -> Point:
        return point[0] * first.width, point[1] * first.height

    def on_second(point: Point) -> Point:
        return offset + point[0] * second.width, point[1] * second.height

    lines = [(on_first(start), on_second(end)) for start, end in pairs]
    for rank in reversed(range(len(lines))):
        draw.line(lines[rank], fill=(0, 0, 0), width=5)
        draw.line(lines[rank], fill=rank_color(rank, len(lines)), width=3)
    for mark in (on_first(marks[0]), on_second(marks[1])):
        _star(draw, _inside(mark, STAR, STAR, canvas))
    ranks_at: dict[Point, list[int]] = {}
    for rank, points in enumerate(lines):
        for point in points:
            ranks_at.setdefault(point, []).append(rank)
    for point, ranks in ranks_at.items():
        _badge(draw, point, " ".join(str(rank + 1) for rank in ranks), rank_color(ranks[0], len(lines)), canvas)
    return canvas


def _inside(at: Point, reach_x: float, reach_y: float, canvas: Image.Image) -> Point:
    """The nearest point from which a drawing of that reach does not leave the canvas."""
    x, y = (min(max(a, r), side - 1 - r) for a, r, side in zip(at, (reach_x, reach_y), canvas.size))
    return x, y


def _badge(draw: ImageDraw.ImageDraw, at: Point, text: str, color: Color, canvas: Image.Image) -> None:
    """A number on its color."""
    reach = max(BADGE, font(14).getlength(text) / 2 + 6)
    x, y = _inside(at, reach, BADGE, canvas)
    light = (299 * color[0] + 587 * color[1] + 114 * color[2]) / 1000 > 110
    draw.rounded_rectangle(
        (x - reach, y - BADGE, x + reach, y + BADGE), radius=BADGE, fill=color, outline=PAPER, width=2
    )
    draw.text((x, y), text, fill=INK if light else PAPER, font=font(14), anchor="mm")


def _star(draw: ImageDraw.ImageDraw, at: Point) -> None:
    angles = np.arange(10) * np.pi / 5 - np.pi / 2
    reach = np.where(np.arange(10) % 2, 0.5, 1.0) * STAR
    corners = [(at[0] + float(r * np.cos(a)), at[1] + float(r * np.sin(a))) for a, r in zip(angles, reach)]
    draw.polygon(corners, fill=YELLOW, outline=INK, width=2)


def save_image(image: Image.Image, path: Path) -> Path:
    """Write a PNG under an unused name, and return that."""
    return write_new(path, lambda place: image.save(place, format="png"))
