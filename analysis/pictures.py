"""One picture for each question about an image: what the computing modules find, put together by `analysis.draw`.

Shapes: C channels, H x W pixels, T regions.
Origin: the questions are those of DINO (Caron et al., ICCV 2021) figures 1 and 3 and of EsViT (Li et al., ICLR 2022) figure 6.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from analysis import attention, correspondence, draw
from analysis.images import Picture, Scale, Views, shown, views_of_size
from models import Backbone

TILE = 224  # shorter side, in pixels, of what is drawn on
COLUMNS = 7
PAIRS = 10


class AttentionPictures(NamedTuple):
    """All heads on one page, and each one alone."""

    overview: Image.Image
    single: dict[str, Image.Image]  # by file name


def attention_pictures(
    backbone: Backbone,
    picture: Picture,
    scale: Scale,
    block: int,
    share: float,
    query: tuple[float, float] | None,
    device: torch.device,
) -> AttentionPictures:
    """Heads ranked by entropy: above the weights on the image, below the regions that hold `share` of the mass."""
    pixels_1CHW = scale.normalised(picture.pixels_CHW).to(device)
    maps = attention.head_maps(backbone, pixels_1CHW, block, share, query, picture.original_size)
    image = draw.enlarged(shown(picture.pixels_CHW), TILE)
    grid = (maps.planes_Hhw.shape[1], maps.planes_Hhw.shape[2])

    def marked(drawn: Image.Image) -> Image.Image:
        return drawn if maps.query_yx is None else draw.boxed(drawn, maps.query_yx, grid, draw.QUERY)

    asked = "class token" if maps.query_yx is None else "query in the red box"
    mean = draw.heat(image, maps.planes_Hhw.mean(dim=0))
    tiles = [
        _stacked(
            draw.captioned(marked(image), f"block {block}, {asked}"), draw.captioned(marked(mean), "mean of heads")
        )
    ]
    single = {}
    columns = zip(maps.heads, maps.entropies_H.tolist(), maps.planes_Hhw, maps.masks_Hhw)
    for rank, (head, bits, plane, mask) in enumerate(columns, start=1):
        heat, kept = draw.heat(image, plane), draw.masked(image, mask)
        single[f"rank{rank:02}_head{head}_heat.png"] = marked(heat)
        single[f"rank{rank:02}_head{head}_mask.png"] = marked(kept)
        above = draw.captioned(marked(heat), f"head {head}: {bits:.2f} bits")
        tiles.append(_stacked(above, draw.captioned(marked(kept), f"top {share:.0%} of its mass")))
    return AttentionPictures(draw.tiled(tiles, COLUMNS), single)


def _stacked(above: Image.Image, below: Image.Image) -> Image.Image:
    return draw.tiled([above, below], columns=1, gap=0)


def correspondence_picture(
    backbone: Backbone, views: Views, scale: Scale, device: torch.device, count: int = PAIRS
) -> tuple[Image.Image, list[float]]:
    """The `count` most similar pairs of regions joined by lines, stars on the regions most like their view; and the cosines."""
    views = views_of_size(views, scale)
    first, second = (
        correspondence.region_features(backbone, scale.normalised(view).to(device)) for view in (views[0], views[1])
    )
    pairs = correspondence.top_pairs(correspondence.nearest(first.regions_BTC[0], second.regions_BTC[0]), count)
    places = [correspondence.centres(features.grid, (1.0, 1.0)).flip(1).tolist() for features in (first, second)]
    lines = [
        (_point(places[0][i]), _point(places[1][j])) for i, j in zip(pairs.first_K.tolist(), pairs.second_K.tolist())
    ]
    marks = [_point(places[side][int(features.most_like_view)]) for side, features in enumerate((first, second))]
    images = [draw.enlarged(shown(view), 2 * TILE) for view in (views[0], views[1])]
    drawn = draw.paired((images[0], images[1]), lines, (marks[0], marks[1]))
    legend = f"{len(lines)} most similar regions of {len(places[0])}; star: the region most like its whole view"
    return draw.captioned(drawn, legend), pairs.similarity_K.tolist()


def _point(xy: list[float]) -> draw.Point:
    return xy[0], xy[1]


def features_picture(backbone: Backbone, picture: Picture, scale: Scale, device: torch.device) -> Image.Image:
    """The image beside its regions in the colours of their three strongest principal components."""
    features = correspondence.region_features(backbone, scale.normalised(picture.pixels_CHW).to(device))
    colours_TC = correspondence.principal_colours(features.regions_BTC[0].cpu())
    image = draw.enlarged(shown(picture.pixels_CHW), TILE)
    regions = shown(_on_grid(colours_TC, features.grid)).resize(image.size, Image.Resampling.NEAREST)
    rows, columns = features.grid
    return draw.tiled(
        [draw.captioned(image, picture.name), draw.captioned(regions, f"{rows} x {columns} regions, PCA")], columns=2
    )


def _on_grid(values_TC: Tensor, grid: tuple[int, int]) -> Tensor:
    return values_TC.T.unflatten(1, grid)
