"""Drawings of attention, correspondence and region features of an image.

A drawing consists of panels with captions, which `on_one_page` joins to one picture, and of the numbers behind it.

Shapes: C channels, H x W pixels, T regions.
Origin: DINO (Caron et al., ICCV 2021) figures 1 and 3, and EsViT (Li et al., ICLR 2022) figure 6.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor

from analysis import attention, correspondence, draw
from analysis.images import Picture, Scale, Views, to_rgb, views_of_size
from models import Backbone

TILE = 224  # shorter side of a panel in pixels
PAGE = 1250  # width of a page in pixels
BAR_WIDTH = 400  # of a color bar
OPACITY = 0.6  # of features over a photograph
PAIRS = 10
CLASS_TOKENS = ("the class token", "the second class token (cls+)")
ZOOM_BELOW = 0.4  # share of the image; smaller windows are zoomed


class Panel(NamedTuple):
    """Part of a drawing, with its caption."""

    image: Image.Image
    caption: str


class Drawing(NamedTuple):
    """Panels on an image, with an explanation."""

    about: str
    panels: list[Panel]
    record: dict[str, Any]  # the numbers, for JSON
    scale: Panel | None = None  # color bar of the panels


def on_one_page(drawing: Drawing) -> Image.Image:
    """Join all panels and captions below the explanation and the color bar."""
    tiles = [draw.captioned(*panel) for panel in drawing.panels]
    page = draw.tiled(tiles, max(1, PAGE // max(tile.width for tile in tiles)))
    if drawing.scale is not None:
        page = draw.stacked(ImageOps.expand(draw.captioned(*drawing.scale), 8, draw.PAPER), page)
    return draw.captioned(page, drawing.about, margin=9)


# --------------------------------------------------------------------------- attention


def attention_drawing(
    backbone: Backbone,
    picture: Picture,
    scale: Scale,
    block: int,
    share: float,
    query: tuple[float, float] | None,
    device: torch.device,
) -> tuple[Drawing, dict[str, Image.Image]]:
    """Draw the attention of each head, by entropy, and below it the regions with `share` of the attention.

    Returns:
        the drawing, zoomed to the window of the query if that is small, and single pictures of the whole image by file name.
    """
    pixels_1CHW = scale.normalized(picture.pixels_CHW).to(device)
    maps = attention.head_maps(backbone, pixels_1CHW, block, share, query, picture.original_size)
    whole = _Layer(to_rgb(picture.pixels_CHW), (0, 0, *maps.grid), maps.grid, maps.query_yx)
    zoomed = whole.zoomed(maps.window)
    overview = whole.drawn(whole.image)
    if zoomed is not whole:
        overview = draw.boxed(overview, zoomed.box, maps.grid, draw.YELLOW)
    largest = float(maps.planes_Hhw.max())  # of all heads, so that equal colors are equal weights
    mean = zoomed.heat(maps.planes_Hhw.mean(dim=0), largest)
    panels = [
        Panel(draw.stacked(ImageOps.pad(overview, mean.size, color=draw.PAPER), mean), "the image; mean of all heads")
    ]
    single, heads = {}, []
    columns = zip(maps.heads, maps.entropies_H.tolist(), maps.uniform_H, maps.planes_Hhw, maps.masks_Hhw)
    for rank, (head, bits, uniform, plane, mask) in enumerate(columns, start=1):
        single[f"rank{rank:02}_head{head}_heat.png"] = whole.heat(plane, largest)
        single[f"rank{rank:02}_head{head}_mask.png"] = whole.masked(mask)
        caption = f"head {head}: {bits:.2f} bits{', uniform' if uniform else ''}"
        panels.append(Panel(draw.stacked(zoomed.heat(plane, largest), zoomed.masked(mask)), caption))
        heads.append({"rank": rank, "head": head, "bits": bits, "uniform": uniform, "regions_kept": int(mask.sum())})
    class_token = backbone.view_tokens[0] if maps.query_yx is None else None
    origin = "the red box" if class_token is None else CLASS_TOKENS[class_token]
    frame = "; zoomed to the yellow frame" if zoomed is not whole else ""
    most = math.log2(maps.regions)
    about = (
        f"block {block}, query: {origin}; heads by entropy (at most {most:.2f} bits), and below each the regions with "
        f"{share:.0%} of its attention{frame}"
    )
    record = {
        "block": block,
        "query_row_and_column": maps.query_yx,
        "class_token": class_token,
        "grid": maps.grid,
        "threshold": share,
        "largest_weight": largest,
        "bits_of_uniform_attention": most,
        "heads": heads,
    }
    return Drawing(about, panels, record, _color_bar(largest, 1 / maps.regions)), single


def _color_bar(largest: float, uniform: float) -> Panel:
    """Return the scale of weights from 0 to `largest`, with a mark at the weight of `uniform` attention."""
    ticks = {0.0: "0", largest: f"{100 * largest:.3g} %"}
    ticks |= {uniform: f"uniform: {100 * uniform:.3g} %"} if uniform < largest else {}
    ticks |= {largest * part**2: f"{100 * largest * part**2:.2g} %" for part in (0.5, 0.25, 0.75)}
    return Panel(draw.color_bar(largest, ticks, BAR_WIDTH), "attention of a region, one scale for all heads")


class _Layer(NamedTuple):
    """Part of an image, for drawing planes and masks of the whole grid on it."""

    image: Image.Image
    box: draw.Box  # the part, in regions
    grid: draw.Size  # of the whole image
    query_yx: tuple[int, int] | None

    def zoomed(self, window: draw.Box) -> _Layer:
        """Return the part around a window, with a margin of half its size; the whole image if that is not much larger."""
        rows, columns = max(1, (window[2] - window[0]) // 2), max(1, (window[3] - window[1]) // 2)
        top, left = max(0, window[0] - rows), max(0, window[1] - columns)
        bottom, right = min(self.grid[0], window[2] + rows), min(self.grid[1], window[3] + columns)
        if (bottom - top) * (right - left) > ZOOM_BELOW * self.grid[0] * self.grid[1]:
            return self
        box = top, left, bottom, right
        part = self.image.crop(draw.pixel_box(box, self.grid, (self.image.height, self.image.width)))
        return self._replace(image=part, box=box)

    def heat(self, plane_hw: Tensor, largest: float) -> Image.Image:
        """Draw weights from 0 to `largest` over the image."""
        return self.drawn(draw.heat(draw.enlarged(self.image, TILE), self._part(plane_hw), largest))

    def masked(self, mask_hw: Tensor) -> Image.Image:
        """Darken the image outside of a mask."""
        return self.drawn(draw.masked(draw.enlarged(self.image, TILE), self._part(mask_hw)))

    def drawn(self, image: Image.Image) -> Image.Image:
        """Draw a frame around the query."""
        image = draw.enlarged(image, TILE)
        if self.query_yx is None:
            return image
        top, left, bottom, right = self.box
        row, column = self.query_yx[0] - top, self.query_yx[1] - left
        return draw.boxed(image, (row, column, row + 1, column + 1), (bottom - top, right - left))

    def _part(self, plane_hw: Tensor) -> Tensor:
        top, left, bottom, right = self.box
        return plane_hw[top:bottom, left:right]


# --------------------------------------------------------------------------- correspondence


def correspondence_drawing(
    backbone: Backbone, views: Views, scale: Scale, device: torch.device, count: int = PAIRS
) -> Drawing:
    """Draw lines between the `count` most similar pairs of regions, and stars on the regions most similar to their view."""
    views = views_of_size(views, scale)
    first, second = (
        correspondence.region_features(backbone, scale.normalized(view).to(device)) for view in (views[0], views[1])
    )
    pairs = correspondence.top_pairs(correspondence.nearest(first.regions_BTC[0], second.regions_BTC[0]), count)
    shares = [_centers(features.grid, (1.0, 1.0)) for features in (first, second)]
    found = list(zip(pairs.first_K.tolist(), pairs.second_K.tolist(), pairs.similarity_K.tolist()))
    most_like = [int(features.most_like_view) for features in (first, second)]
    image = draw.paired(
        (draw.enlarged(to_rgb(views[0]), 2 * TILE), draw.enlarged(to_rgb(views[1]), 2 * TILE)),
        [(shares[0][i], shares[1][j]) for i, j, _ in found],
        (shares[0][most_like[0]], shares[1][most_like[1]]),
    )
    about = (
        f"the {len(found)} most similar regions of {len(shares[0])}, by rank; star: the region most similar to its view"
    )
    sizes = [(view.shape[1], view.shape[2]) for view in (views[0], views[1])]
    pixels = [_centers(features.grid, size) for features, size in zip((first, second), sizes)]
    record = {
        "views": views.description,
        "size_of_views": sizes,
        "pairs": [
            {"rank": rank, "cosine": cosine, "first_xy": pixels[0][i], "second_xy": pixels[1][j]}
            for rank, (i, j, cosine) in enumerate(found, start=1)
        ],
        "most_like_view_xy": [pixels[0][most_like[0]], pixels[1][most_like[1]]],
    }
    return Drawing(about, [Panel(image, views.description)], record)


def _centers(grid: correspondence.Grid, size: tuple[float, float]) -> list[draw.Point]:
    return [(x, y) for y, x in correspondence.centers(grid, size).tolist()]


# --------------------------------------------------------------------------- features


def features_drawing(backbone: Backbone, picture: Picture, scale: Scale, device: torch.device) -> Drawing:
    """Draw the image, the first three principal components of its region features as colors, and these over the image."""
    features = correspondence.region_features(backbone, scale.normalized(picture.pixels_CHW).to(device))
    colors_TC = correspondence.principal_colors(features.regions_BTC[0].cpu())
    image = draw.enlarged(to_rgb(picture.pixels_CHW), 1.5 * TILE)
    regions = to_rgb(colors_TC.T.unflatten(1, features.grid)).resize(image.size, Image.Resampling.NEAREST)
    rows, columns = features.grid
    about = "the first three principal components of the region features as red, green and blue"
    over = Image.blend(draw.darkened_gray(image, 1.0), regions, OPACITY)
    panels = [(image, picture.name), (regions, f"{rows} x {columns} regions"), (over, "the regions over the image")]
    return Drawing(about, [Panel(*panel) for panel in panels], {})
