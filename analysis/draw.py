"""Drawing on images: heat maps, masks, frames, and lines between regions.

Planes and masks have one value for each region of the image. Plots with axes are in `analysis.plots`.

Shapes: h x w grid of regions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TypeVar

import matplotlib
import numpy as np
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Color = tuple[int, int, int]
Size = tuple[int, int]  # height and width
Point = tuple[float, float]  # x and y
Box = tuple[int, int, int, int]  # top, left, bottom and right in regions, the last two exclusive
Item = TypeVar("Item")

INK, PAPER = (30, 30, 30), (255, 255, 255)
RED, YELLOW = (255, 60, 60), (255, 225, 0)
FONT_SIZE = 14  # points
STAR, BADGE = 20.0, 11.0  # radius of marks in pixels
HEAT, BAR = "inferno", 14  # colors of weights, and height of their bar in pixels


@lru_cache(maxsize=8)
def font(points: int) -> ImageFont.FreeTypeFont:
    """Load the default font of matplotlib."""
    return ImageFont.truetype(findfont("DejaVu Sans"), points)


def enlarged(image: Image.Image, shorter_side: float) -> Image.Image:
    """Enlarge an image to a shorter side of at least `shorter_side`."""
    factor = max(1.0, shorter_side / min(image.size))
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)


def darkened_gray(image: Image.Image, brightness: float) -> Image.Image:
    """Convert an image to gray with a fraction of its brightness."""
    return image.convert("L").point([round(value * brightness) for value in range(256)]).convert("RGB")


def heat(image: Image.Image, plane_hw: Tensor, largest: float, strength: float = 0.7) -> Image.Image:
    """Draw the weights of regions as colors over a gray image, transparent where a weight is 0.

    Colors follow the square root of the weight, which shows small weights beside one that is as large as `largest`.
    """
    share = np.sqrt(plane_hw.double().numpy() / max(largest, 1e-30))
    colors = Image.fromarray(matplotlib.colormaps[HEAT](share, bytes=True)[..., :3])
    opacity = Image.fromarray(np.where(share > 1e-6, round(255 * strength), 0).astype(np.uint8))
    colors, opacity = (layer.resize(image.size, Image.Resampling.NEAREST) for layer in (colors, opacity))
    return Image.composite(colors, darkened_gray(image, 0.6), opacity)


def color_bar(largest: float, ticks: Mapping[float, str], width: int) -> Image.Image:
    """Draw the colors of `heat`, with labels below some weights; labels that would overlap earlier ones are left out."""
    label, size = font(FONT_SIZE), (width, BAR + FONT_SIZE + 10)
    canvas = Image.new("RGB", size, PAPER)
    ramp = matplotlib.colormaps[HEAT](np.linspace(0, 1, width), bytes=True)[None, :, :3]
    canvas.paste(Image.fromarray(ramp).resize((width, BAR)))
    draw = ImageDraw.Draw(canvas)
    taken: list[tuple[float, float]] = []  # left and right of the labels
    for value, text in ticks.items():
        x, half = (value / largest) ** 0.5 * (width - 1), label.getlength(text) / 2
        start = min(max(x - half, 0), width - 2 * half)
        if all(start + 2 * half + 8 < left or right + 8 < start for left, right in taken):
            draw.line((x, BAR, x, BAR + 4), fill=INK)
            draw.text((start, BAR + 5), text, fill=INK, font=label)
            taken.append((start, start + 2 * half))
    return canvas


def masked(image: Image.Image, mask_hw: Tensor) -> Image.Image:
    """Show the image inside the mask, dark gray elsewhere."""
    keep = Image.fromarray(mask_hw.numpy().astype(np.uint8) * 255).resize(image.size, Image.Resampling.NEAREST)
    return Image.composite(image, darkened_gray(image, 0.25), keep)


def pixel_box(box: Box, grid: Size, size: Size) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom (exclusive) of a box in pixels of an image of `size`."""
    top, left, bottom, right = box
    y, x = size[0] / grid[0], size[1] / grid[1]
    return round(left * x), round(top * y), round(right * x), round(bottom * y)


def boxed(image: Image.Image, box: Box, grid: Size, color: Color = RED) -> Image.Image:
    """Draw a frame around some regions."""
    image = image.copy()
    left, top, right, bottom = pixel_box(box, grid, (image.height, image.width))
    draw = ImageDraw.Draw(image)
    draw.rectangle((left, top, right - 1, bottom - 1), outline=PAPER, width=4)
    draw.rectangle((left + 1, top + 1, right - 2, bottom - 2), outline=color, width=2)
    return image


def captioned(image: Image.Image, text: str, margin: int = 1) -> Image.Image:
    """Add a caption above the image, on as many lines as needed."""
    lines = wrapped(text, image.width - 2 * margin)
    height = len(lines) * (FONT_SIZE + 4) + 4
    canvas = Image.new("RGB", (image.width, image.height + height), PAPER)
    ImageDraw.Draw(canvas).text((margin, 2), "\n".join(lines), fill=INK, font=font(FONT_SIZE), spacing=4)
    canvas.paste(image, (0, height))
    return canvas


def wrapped(text: str, width: int) -> list[str]:
    """Break a text into lines of at most `width` pixels; a longer word has its own line."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if lines[-1] and font(FONT_SIZE).getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def tiled(images: Sequence[Image.Image], columns: int, gap: int = 8) -> Image.Image:
    """Arrange images in rows of at most `columns`, see `even_rows`."""
    rows = even_rows(images, columns)
    width, height = max(image.width for image in images), max(image.height for image in images)
    canvas = Image.new("RGB", (len(rows[0]) * (width + gap) + gap, len(rows) * (height + gap) + gap), PAPER)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            canvas.paste(image, (gap + x * (width + gap), gap + y * (height + gap)))
    return canvas


def even_rows(items: Sequence[Item], most: int) -> list[Sequence[Item]]:
    """Divide items into as few rows of at most `most` items as possible, of lengths that differ by at most one."""
    parts = np.array_split(np.arange(len(items)), -(-len(items) // most))
    return [items[part[0] : part[-1] + 1] for part in parts]


def stacked(above: Image.Image, below: Image.Image, gap: int = 4) -> Image.Image:
    """Place one image above another, both at the left."""
    canvas = Image.new("RGB", (max(above.width, below.width), above.height + gap + below.height), PAPER)
    canvas.paste(above, (0, 0))
    canvas.paste(below, (0, above.height + gap))
    return canvas


# --------------------------------------------------------------------------- correspondence


def rank_color(rank: int, ranks: int) -> Color:
    """Return the color of a rank, from 0."""
    red, green, blue = matplotlib.colormaps["turbo"](0.86 - 0.76 * rank / max(ranks - 1, 1))[:3]
    return round(255 * red), round(255 * green), round(255 * blue)


def paired(
    images: tuple[Image.Image, Image.Image],
    pairs: Sequence[tuple[Point, Point]],
    marks: tuple[Point, Point],
    gap: int = 16,
) -> Image.Image:
    """Draw two images side by side, lines between ranked pairs of points (x and y in 0..1), and a star on each image.

    The first pair has rank 1 and is drawn on top; a point of several pairs is labeled with all their ranks.
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


def _inside(at: Point, radius_x: float, radius_y: float, canvas: Image.Image) -> Point:
    """Return the nearest point where a mark of that radius is inside the canvas."""
    x, y = (min(max(a, r), side - 1 - r) for a, r, side in zip(at, (radius_x, radius_y), canvas.size))
    return x, y


def _badge(draw: ImageDraw.ImageDraw, at: Point, text: str, color: Color, canvas: Image.Image) -> None:
    """Draw a label on a background of its color."""
    radius = max(BADGE, font(FONT_SIZE).getlength(text) / 2 + 6)
    x, y = _inside(at, radius, BADGE, canvas)
    light = (299 * color[0] + 587 * color[1] + 114 * color[2]) / 1000 > 110
    draw.rounded_rectangle(
        (x - radius, y - BADGE, x + radius, y + BADGE), radius=BADGE, fill=color, outline=PAPER, width=2
    )
    draw.text((x, y), text, fill=INK if light else PAPER, font=font(FONT_SIZE), anchor="mm")


def _star(draw: ImageDraw.ImageDraw, at: Point) -> None:
    angles = np.arange(10) * np.pi / 5 - np.pi / 2
    radii = np.where(np.arange(10) % 2, 0.5, 1.0) * STAR
    corners = [(at[0] + float(r * np.cos(a)), at[1] + float(r * np.sin(a))) for a, r in zip(angles, radii)]
    draw.polygon(corners, fill=YELLOW, outline=INK, width=2)
