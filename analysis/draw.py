"""Pictures of what the other modules compute: colour maps, overlays, lines between regions, plots. Nothing is computed here.

Pillow and numpy draw everything; colour maps are short tables.

Origin: this project's own; the colours of `VIRIDIS` are those of the map of that name (van der Walt and Smith, 2015).
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

VIRIDIS = ((68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141), (39, 173, 129), (92, 200, 99),
           (170, 220, 50), (253, 231, 37))  # fmt: skip
INK, FAINT, PAPER = (30, 30, 30), (210, 210, 210), (255, 255, 255)
QUERY = (255, 60, 60)
Size = tuple[int, int]  # height and width
Point = tuple[float, float]  # x and y


@lru_cache(maxsize=8)
def font(points: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font."""
    return ImageFont.load_default(points)


def coloured(values_hw: np.ndarray) -> np.ndarray:
    """Values in 0..1 as colours (h, w, 3) of the map."""
    table = np.asarray(VIRIDIS, dtype=np.float64)
    at = np.clip(values_hw, 0, 1) * (len(table) - 1)
    low = np.minimum(at.astype(int), len(table) - 2)
    share = (at - low)[..., None]
    return (table[low] * (1 - share) + table[low + 1] * share).round().astype(np.uint8)


def enlarged(image: Image.Image, shorter_side: int) -> Image.Image:
    """An image whose shorter side is at least `shorter_side`; smooth."""
    factor = max(1.0, shorter_side / min(image.size))
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)


def heat(image: Image.Image, plane_hw: Tensor, strength: float = 0.65) -> Image.Image:
    """Weights of regions laid over an image, brightest where largest; the picture alone where all are zero."""
    plane = plane_hw.double().numpy()
    largest = plane.max()
    colours = Image.fromarray(coloured(plane / largest if largest > 0 else plane))
    return Image.blend(image, colours.resize(image.size, Image.Resampling.NEAREST), strength if largest > 0 else 0.0)


def masked(image: Image.Image, mask_hw: Tensor) -> Image.Image:
    """The image where the mask holds, dark and grey elsewhere."""
    keep = Image.fromarray(mask_hw.numpy().astype(np.uint8) * 255).resize(image.size, Image.Resampling.NEAREST)
    grey = image.convert("L").point([value // 4 for value in range(256)]).convert("RGB")
    return Image.composite(image, grey, keep)


def region_box(index_yx: tuple[int, int], grid: Size, image: Image.Image) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a region on an image."""
    (row, column), height, width = index_yx, image.height / grid[0], image.width / grid[1]
    return column * width, row * height, (column + 1) * width - 1, (row + 1) * height - 1


def boxed(image: Image.Image, index_yx: tuple[int, int], grid: Size, colour: tuple[int, int, int]) -> Image.Image:
    """The image with a frame around one region."""
    image = image.copy()
    left, top, right, bottom = region_box(index_yx, grid, image)
    draw = ImageDraw.Draw(image)
    draw.rectangle((left, top, right, bottom), outline=PAPER, width=4)
    draw.rectangle((left + 1, top + 1, right - 1, bottom - 1), outline=colour, width=2)
    return image


def captioned(image: Image.Image, text: str, points: int = 14) -> Image.Image:
    """The image below a line of text, which is cut where it is too long."""
    letters = font(points)
    while len(text) > 1 and letters.getlength(text) > image.width - 2:
        text = text[:-2] + "…" if text.endswith("…") else text[:-1] + "…"
    canvas = Image.new("RGB", (image.width, image.height + points + 8), PAPER)
    ImageDraw.Draw(canvas).text((2, 2), text, fill=INK, font=letters)
    canvas.paste(image, (0, points + 8))
    return canvas


def tiled(images: Sequence[Image.Image], columns: int, gap: int = 8) -> Image.Image:
    """Images in rows of `columns`, on white."""
    columns = min(columns, len(images))
    width, height = max(image.width for image in images), max(image.height for image in images)
    rows = -(-len(images) // columns)
    canvas = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), PAPER)
    for number, image in enumerate(images):
        canvas.paste(image, (gap + number % columns * (width + gap), gap + number // columns * (height + gap)))
    return canvas


# --------------------------------------------------------------------------- correspondence


def rank_colour(rank: int, ranks: int) -> tuple[int, int, int]:
    """A colour of its own for every rank."""
    red, green, blue = colorsys.hsv_to_rgb(0.85 * rank / max(ranks, 1), 0.75, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def paired(
    images: tuple[Image.Image, Image.Image],
    pairs: Sequence[tuple[Point, Point]],
    marks: tuple[Point, Point],
    gap: int = 24,
) -> Image.Image:
    """Two images side by side, ranked pairs of points (x, y in shares of 0..1) joined by lines, and one mark on each.

    The first pair gets rank 1 and is drawn on top.
    """
    first, second = images
    offset = first.width + gap
    canvas = Image.new("RGB", (offset + second.width, max(first.height, second.height)), PAPER)
    canvas.paste(first, (0, 0))
    canvas.paste(second, (offset, 0))
    draw = ImageDraw.Draw(canvas)
    starts = [(x * first.width, y * first.height) for (x, y), _ in pairs]
    ends = [(offset + x * second.width, y * second.height) for _, (x, y) in pairs]
    for rank in reversed(range(len(pairs))):
        draw.line((*starts[rank], *ends[rank]), fill=(0, 0, 0), width=4)
        draw.line((*starts[rank], *ends[rank]), fill=rank_colour(rank, len(pairs)), width=2)
    mark_at = ((marks[0][0] * first.width, marks[0][1] * first.height),)
    for x, y in (*mark_at, (offset + marks[1][0] * second.width, marks[1][1] * second.height)):
        _star(draw, x, y)
    ranks_at: dict[Point, list[int]] = {}
    for rank, points in enumerate(zip(starts, ends)):
        for point in points:
            ranks_at.setdefault(point, []).append(rank)
    for (x, y), ranks in ranks_at.items():
        _badge(draw, x, y, " ".join(str(rank + 1) for rank in ranks), rank_colour(ranks[0], len(pairs)))
    return canvas


def _badge(draw: ImageDraw.ImageDraw, x: float, y: float, text: str, colour: tuple[int, int, int]) -> None:
    reach = max(9.0, font(12).getlength(text) / 2 + 4)
    draw.rounded_rectangle((x - reach, y - 9, x + reach, y + 9), radius=9, fill=colour, outline=(0, 0, 0))
    draw.text((x, y), text, fill=(0, 0, 0), font=font(12), anchor="mm")


def _star(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float = 17) -> None:
    angles = np.arange(10) * np.pi / 5 - np.pi / 2
    reach = np.where(np.arange(10) % 2, 0.55, 1.0) * radius
    corners = [(x + float(r * np.cos(a)), y + float(r * np.sin(a))) for a, r in zip(angles, reach)]
    draw.polygon(corners, fill=(255, 230, 0), outline=(0, 0, 0), width=2)


# --------------------------------------------------------------------------- plots


def dots_by_layer(
    values: Sequence[Sequence[float]], groups: Sequence[int], title: str, unit: str, size: Size = (360, 640)
) -> Image.Image:
    """One dot for each head above its layer, a line through the layers' means; `groups` are the stages' depths."""
    scale = 2  # drawn larger and reduced, which smooths edges
    height, width = size[0] * scale, size[1] * scale
    left, right, top, bottom = 56 * scale, width - 16 * scale, 40 * scale, height - 52 * scale
    canvas = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    small, large = font(12 * scale), font(15 * scale)
    step = nice_step(max(max(layer) for layer in values))
    limit = step * max(1, int(np.ceil(max(max(layer) for layer in values) / step - 1e-9)))

    def place(layer: float, value: float) -> Point:
        return left + (layer + 0.5) * (right - left) / len(values), bottom - value / limit * (bottom - top)

    for number in range(round(limit / step) + 1):
        y = place(0, number * step)[1]
        draw.line((left, y, right, y), fill=FAINT, width=scale)
        draw.text((left - 6 * scale, y), f"{number * step:g}", fill=INK, font=small, anchor="rm")
    first = 0
    for stage, depth in enumerate(groups):
        centre = place(first + (depth - 1) / 2, 0)[0]
        if len(groups) > 1:
            draw.text((centre, height - 18 * scale), f"stage {stage + 1}", fill=INK, font=small, anchor="mm")
        if stage:
            x = place(first - 0.5, 0)[0]
            draw.line((x, top, x, bottom), fill=FAINT, width=scale)
        first += depth
    every = max(1, -(-len(values) // 16))
    for layer, heads in enumerate(values):
        x = place(layer, 0)[0]
        if layer % every == 0:
            draw.text((x, bottom + 12 * scale), str(layer), fill=INK, font=small, anchor="mm")
        for value in heads:
            y = place(layer, value)[1]
            draw.ellipse(
                (x - 4 * scale, y - 4 * scale, x + 4 * scale, y + 4 * scale), fill=(70, 130, 200), outline=PAPER
            )
    means = [place(layer, sum(heads) / len(heads)) for layer, heads in enumerate(values)]
    draw.line([c for point in means for c in point], fill=(214, 90, 40), width=2 * scale)
    draw.text((left, 8 * scale), title, fill=INK, font=large)
    draw.text((6 * scale, top - 6 * scale), unit, fill=INK, font=small, anchor="lb")
    return canvas.resize((size[1], size[0]), Image.Resampling.LANCZOS)


def nice_step(largest: float, steps: int = 5) -> float:
    """A round distance of axis labels (1, 2 or 5 times a power of ten) that gives about `steps` of them."""
    rough = max(largest, 1e-9) / steps
    power = 10.0 ** np.floor(np.log10(rough))
    return float(next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9)))
