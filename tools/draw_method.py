"""Draw docs/method.png: how EsViT trains, on one photograph.

    python -m tools.draw_method docs/method.png

The photograph is the cat that scikit-image ships (Stefan van der Walt, CC0).
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle
from PIL import Image, ImageEnhance

from data.decode import open_image

WIDTH, HEIGHT, SCALE = 132, 64, 0.1  # units, inches per unit
STUDENT, TEACHER, LOSS, INK, LINE = "#2f6db5", "#d4761c", "#b23a5a", "#22262b", "#6b7178"
MIDDLE = 32.0  # the line between student and teacher
MATCHES = ("#e0457b", "#18a999", "#f2b705")
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the photograph
GLOBAL_CROPS: tuple[Box, Box] = ((60, 8, 348, 296), (136, 36, 356, 256))
LOCAL_CROPS: tuple[Box, ...] = ((30, 20, 120, 110), (140, 65, 230, 155), (205, 180, 295, 270), (345, 150, 435, 240))
GRID = 6  # regions on a side of a view
LANDMARKS = ((176, 108), (318, 124), (262, 232))  # pixels of the photograph whose regions are matched in the drawing


def load_photograph() -> Image.Image:
    """Return the cat as an RGB image."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise SystemExit("scikit-image is not installed; run pip install -r requirements-demo.txt")
    return open_image(Path(spec.origin).parent / "data" / "chelsea.png").convert("RGB")


def view_of(photograph: Image.Image, box: Box, color: float = 1.0, brightness: float = 1.0) -> Image.Image:
    """Return a crop as an augmented view."""
    view = photograph.crop(box).resize((240, 240), Image.Resampling.BICUBIC)
    return ImageEnhance.Brightness(ImageEnhance.Color(view).enhance(color)).enhance(brightness)


def show(axes: Axes, picture: Image.Image, left: float, bottom: float, width: float, edge: str = INK) -> None:
    """Place a picture, with a frame, at a width in units."""
    height = width * picture.height / picture.width
    axes.imshow(picture, extent=(left, left + width, bottom, bottom + height), interpolation="lanczos", zorder=2)
    axes.add_patch(Rectangle((left, bottom), width, height, fill=False, edgecolor=edge, linewidth=1.6, zorder=3))


def label(axes: Axes, x: float, y: float, text: str, color: str = INK, size: float = 11.5, **style: Any) -> None:
    """Write a text centered at a point."""
    axes.text(x, y, text, color=color, fontsize=size, ha="center", va="center", zorder=6, **style)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str = LINE, **style: Any) -> None:
    """Draw an arrow between two points."""
    look: dict[str, Any] = {
        "arrowstyle": "-|>",
        "mutation_scale": 13,
        "linewidth": 1.5,
        "shrinkA": 0,
        "shrinkB": 0,
        "zorder": 4,
    } | style
    axes.add_patch(FancyArrowPatch(start, end, color=color, **look))


def box(axes: Axes, left: float, bottom: float, width: float, height: float, text: str, color: str) -> None:
    """Draw a rounded box with a text."""
    shape = FancyBboxPatch(
        (left, bottom),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=1.1",
        facecolor=color,
        edgecolor="none",
        zorder=4,
    )
    axes.add_patch(shape)
    label(axes, left + width / 2, bottom + height / 2, text, "white", 11, weight="bold")


def bars(axes: Axes, left: float, bottom: float, color: str, heights: tuple[float, ...]) -> None:
    """Draw the probabilities of a few prototypes as a bar chart."""
    for number, height in enumerate(heights):
        axes.add_patch(Rectangle((left + 1.1 * number, bottom), 0.85, height, color=color, zorder=4))
    axes.plot((left - 0.3, left + 1.1 * len(heights)), (bottom, bottom), color=INK, linewidth=1, zorder=4)


def backbone(axes: Axes, left: float, middle: float, color: str, name: str) -> None:
    """Draw the stages of a network, each with fewer and wider tokens than the one before."""
    for stage, (half, width) in enumerate(((7.0, 2.6), (5.6, 3.2), (4.3, 3.8), (3.1, 4.4))):
        corners = [(left, middle - half), (left, middle + half), (left + width, middle + half - 0.8)]
        corners.append((left + width, middle - half + 0.8))
        axes.add_patch(Polygon(corners, facecolor=color, edgecolor="none", alpha=0.55 + 0.15 * stage, zorder=4))
        left += width + 0.7
    label(axes, left - 8.8, middle + (9.3 if name == "student" else -9.3), name, color, 14, weight="bold")


def region_grid(
    axes: Axes, view: Image.Image, left: float, bottom: float, width: float, crop: Box, edge: str
) -> list[tuple[float, float]]:
    """Draw a view with its regions; return the centers of the regions that hold the landmarks."""
    show(axes, view, left, bottom, width, edge)
    step = width / GRID
    for number in range(1, GRID):
        for line in (
            ((left + number * step,) * 2, (bottom, bottom + width)),
            ((left, left + width), (bottom + number * step,) * 2),
        ):
            axes.plot(*line, color="white", linewidth=0.7, alpha=0.8, zorder=3)
    centers = []
    for (x, y), color in zip(LANDMARKS, MATCHES):
        column = int((x - crop[0]) / (crop[2] - crop[0]) * GRID)
        row = GRID - 1 - int((y - crop[1]) / (crop[3] - crop[1]) * GRID)
        corner = (left + column * step, bottom + row * step)
        axes.add_patch(Rectangle(corner, step, step, fill=False, edgecolor=color, linewidth=2.4, zorder=5))
        centers.append((corner[0] + step / 2, corner[1] + step / 2))
    return centers


def draw_inputs(axes: Axes, photograph: Image.Image, views: tuple[Image.Image, Image.Image]) -> None:
    """Draw the photograph with its crops, and the views of each network."""
    left, bottom, width = 1.0, 24.5, 22.0
    show(axes, photograph, left, bottom, width)
    unit = width / photograph.width
    for crops, line in ((GLOBAL_CROPS, 2.2), (LOCAL_CROPS, 1.6)):
        for crop in crops:
            corner = (left + crop[0] * unit, bottom + (photograph.height - crop[3]) * unit)
            size = (crop[2] - crop[0]) * unit
            style = "solid" if crops is GLOBAL_CROPS else (0, (3, 1.5))
            axes.add_patch(
                Rectangle(corner, size, size, fill=False, edgecolor="white", linewidth=line, linestyle=style, zorder=4)
            )
    label(axes, left + width / 2, bottom - 2.0, "image and its crops")
    for number, view in enumerate(views):
        show(axes, view, 29 + 7.6 * number, 48.5, 7, STUDENT)
        show(axes, view, 29 + 7.6 * number, 8.5, 7, TEACHER)
    for number, crop in enumerate(LOCAL_CROPS):
        show(axes, view_of(photograph, crop, 0.7, 1.1), 29 + 3.7 * number, 43.6, 3.3, STUDENT)
    label(axes, 36.3, 57.6, "global and local views")
    label(axes, 36.3, 6.2, "global views only")
    arrow(axes, (18, 40), (27.6, 48), connectionstyle="arc3,rad=-0.15")
    arrow(axes, (18, 20.6), (27.6, 13), connectionstyle="arc3,rad=0.15")


def draw_networks(axes: Axes, views: tuple[Image.Image, Image.Image]) -> None:
    """Draw student and teacher up to their heads, and the matching between their regions."""
    centers = []
    for name, color, view, crop, sign in (
        ("student", STUDENT, views[0], GLOBAL_CROPS[0], 1),
        ("teacher", TEACHER, views[1], GLOBAL_CROPS[1], -1),
    ):
        middle, outer, inner = (MIDDLE + sign * distance for distance in (18, 23, 10))
        backbone(axes, 46.5, middle, color, name)
        arrow(axes, (44.2, middle), (46.2, middle))
        centers.append(region_grid(axes, view, 68.5, inner - 6.5, 13, crop, color))
        arrow(axes, (63.8, middle + sign * 1.2), (85.6, outer), connectionstyle="arc3,rad=0")
        arrow(axes, (63.8, middle - sign * 1.2), (68.2, inner + sign * 4.2))
        arrow(axes, (81.7, inner), (85.6, inner))
        box(axes, 86, outer - 2.2, 12, 4.4, "view head", color)
        box(axes, 86, inner - 2.2, 12, 4.4, "region head", color)
        label(axes, 73.5, outer + sign * 1.2, "view feature", size=11)
    for start, end, color in zip(*centers, MATCHES):
        arrow(axes, start, end, color, linewidth=2.2, mutation_scale=14, zorder=7)
    label(axes, 91.5, MIDDLE, "regions are matched\nby cosine similarity\nof their features", size=11.5)
    arrow(axes, (55, MIDDLE + 10), (55, MIDDLE - 10), TEACHER, linewidth=2.2, linestyle=(0, (4, 2)))
    axes.text(54, MIDDLE, "EMA of\nthe weights", color=TEACHER, fontsize=11, ha="right", va="center", weight="bold")


def draw_losses(axes: Axes) -> None:
    """Draw the probabilities over prototypes, and the losses that compare them."""
    for color, sign, formula, heights in (
        (STUDENT, 1, "softmax of\nlogits / $\\tau_s$", ((2.0, 3.4, 1.4, 1.0, 0.7), (0.9, 1.3, 3.2, 1.7, 1.0))),
        (
            TEACHER,
            -1,
            "softmax of\n(logits $-$ center) / $\\tau_t$",
            ((0.9, 4.2, 0.6, 0.3, 0.2), (0.3, 0.5, 4.0, 0.8, 0.3)),
        ),
    ):
        outer, inner = MIDDLE + sign * 23, MIDDLE + sign * 10
        for middle, values in ((outer, heights[0]), (inner, heights[1])):
            arrow(axes, (98.4, middle), (101.6, middle))
            bars(axes, 102.5, middle - 2.1, color, values)
        label(axes, 106, outer + sign * 5.4, formula, color, 11)
        arrow(axes, (105, inner - sign * 3.2), (108, MIDDLE + sign * 2.6), LOSS)
        arrow(axes, (108.6, outer), (124.5, MIDDLE + sign * 2.6), LOSS, connectionstyle=f"arc3,rad={-0.35 * sign}")
    box(axes, 102, MIDDLE - 2.2, 12.5, 4.4, "region loss", LOSS)
    box(axes, 119, MIDDLE - 2.2, 11.5, 4.4, "view loss", LOSS)
    label(axes, 116.7, MIDDLE, "+", LOSS, 14, weight="bold")


def main(output: Path) -> None:
    """Write the drawing."""
    figure = Figure(figsize=(WIDTH * SCALE, HEIGHT * SCALE), dpi=150, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    photograph = load_photograph()
    views = (view_of(photograph, GLOBAL_CROPS[0], 1.3), view_of(photograph, GLOBAL_CROPS[1], 0.35, 1.1))
    draw_inputs(axes, photograph, views)
    draw_networks(axes, views)
    draw_losses(axes)
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT), aspect="equal")
    axes.set_axis_off()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    picture.quantize(256, Image.Quantize.MEDIANCUT, kmeans=2, dither=Image.Dither.NONE).save(output, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
