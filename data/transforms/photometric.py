"""The device part of the `split` backend: color augmentation of all crops of a batch, on the training device.

Color jitter, grayscale, blur, solarization and normalization of DINO's views, on the uint8 crops of crops.py. Each operation runs
on all images of one size that it applies to; on a CPU, on a few images at a time that fit its cache. The uniform numbers of each
image come with the batch on the host, where they are turned into parameters and row indices, so nothing waits for the device, and
the colors of an image depend on its own draws only.

Values are floats in 0..255 between the operations, where Pillow rounds to integers after each.

Legend: B images, V views, N images of all views of one size, R uniform numbers of a view (`DRAWS`), C channels, H = W = S pixels.

Origin: the operations are torchvision's ColorJitter and Pillow's GaussianBlur and solarize; the recipe is DINO's (Caron et al.,
ICCV 2021); blur by three box filters: Gwosdek et al., SSVM 2011, as in Pillow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import NamedTuple

import torch
from torch import Tensor

from data.transforms.recipe import BLUR_RADIUS, GRAY, JITTER, Recipe

DRAWS = 10  # per view: jitter or not, its order, four factors, gray or not, blur or not, its radius, solarize or not
CONTRAST, SATURATION, HUE = 1, 2, 3  # brightness is 0
NEUTRAL = torch.tensor([1.0, 1.0, 1.0, 0.0])  # factors without effect
ORDERS = torch.tensor(list(permutations(range(4))))  # (24, 4): all orders of the operations of color jitter
HUE_ROUND = (ORDERS == HUE).int().argmax(dim=1)  # number of other operations before it
BLENDS = ORDERS[ORDERS != HUE].view(-1, 3)  # (24, 3): the other three in order
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601
CACHED_PIXELS = 100_352  # processed at once on a CPU, two crops of 224 pixels, which fit its cache
BOXES = 3  # box filters of a blur
REACH = 2  # pixels on each side of a box filter, enough for radii below 2.4
PIECE = 112  # output pixels of a line per matrix product
CORNER = 4 * BOXES * REACH  # size from which on the middle rows of a blur matrix repeat


class Colors(NamedTuple):
    """Augmentation parameters of images, on the host; leading dimensions as in the draws."""

    order: Tensor  # row of ORDERS
    factors: Tensor  # (..., 4) brightness, contrast, saturation, hue; NEUTRAL without jitter
    gray: Tensor  # bool
    radius: Tensor  # of the blur in pixels; 0: no blur
    solarize: Tensor  # bool


def draw_colors(draws_BVR: Tensor, recipe: Recipe) -> Colors:
    """Turn uniform numbers in 0..1 into the parameters of each view of each image, (B, V)."""
    jittered, order, *_ = draws_BVR.unbind(-1)
    low, high = torch.tensor(recipe.jitter).T
    factors = low + (high - low) * draws_BVR[..., 2:6]
    gray, blurred, radius, solarized = draws_BVR[..., 6:].unbind(-1)
    blur, solarize = torch.tensor([(view.blur, view.solarize) for view in recipe.views]).T
    smallest, largest = BLUR_RADIUS
    return Colors(
        order=(order * len(ORDERS)).long(),
        factors=torch.where((jittered < JITTER)[..., None], factors, NEUTRAL),
        gray=gray < GRAY,
        radius=torch.where(blurred < blur, smallest + (largest - smallest) * radius, 0.0),
        solarize=solarized < solarize,
    )


@dataclass(frozen=True)
class Photometric:
    """Transform stacked samples of `ByteCrops` to normalized float views.

    Args:
        recipe: that of the crops.
        mean, std: per channel, for values in 0..1.
    """

    recipe: Recipe
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, stacked: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        """Transform V uint8 crops (B, 3, S, S) and the draws (B, V, R), on the host, to V views on `device`."""
        *crops, draws_BVR = stacked
        colors = draw_colors(draws_BVR, self.recipe)
        views: list[Tensor] = list(crops)
        for size in {view.size for view in self.recipe.views}:
            members = [v for v, view in enumerate(self.recipe.views) if view.size == size]
            pixels_NCHW = torch.cat([crops[v].to(device, non_blocking=True) for v in members])
            member_colors = Colors(*(field[:, members].transpose(0, 1).flatten(0, 1) for field in colors))
            augmented = self._augment(pixels_NCHW, member_colors).split(len(draws_BVR))
            for v, view in zip(members, augmented):
                views[v] = view
        return views

    def _augment(self, pixels_NCHW: Tensor, colors: Colors) -> Tensor:
        """Augment and normalize images of one size."""
        device, size = pixels_NCHW.device, pixels_NCHW.shape[-1]
        plan = make_plan(colors, device)
        scale, offset = _normalization(self.mean, self.std, device)
        out = torch.empty(pixels_NCHW.shape, device=device)
        at_once = max(CACHED_PIXELS // size**2, 1) if device.type == "cpu" else len(out)
        for start in range(0, len(out), at_once):
            rows = slice(start, start + at_once)
            colored = apply_colors(pixels_NCHW[rows].float(), Plan(*(field[rows] for field in plan)))
            torch.mul(colored, scale, out=out[rows]).add_(offset)
        return out


class Plan(NamedTuple):
    """Parameters in the form that the operations take, one row per image."""

    applied: Tensor  # (N, 7) bool, on the host: hue after 0..3 blends, gray, blur, solarize
    blends: Tensor  # (N, 3 rounds, 3 weights, 1, 1, 1), see `blend`; this and the following on the device
    turn: Tensor  # (N), of the hue
    boxes: Tensor  # (N, 3), see `box_weights`


def make_plan(colors: Colors, device: torch.device) -> Plan:
    """Return the plan for N images; the copies to the device are asynchronous."""
    turn = colors.factors[:, HUE]
    hue_rounds = (HUE_ROUND[colors.order][:, None] == torch.arange(4)) & (turn != 0)[:, None]
    others = torch.stack([colors.gray, colors.radius > 0, colors.solarize], dim=1)
    operation = BLENDS[colors.order]
    own = colors.factors.gather(1, operation)
    weights = torch.stack([own, (1 - own) * (operation == SATURATION), (1 - own) * (operation == CONTRAST)], dim=2)
    numbers = (weights[..., None, None, None], turn, box_weights(colors.radius))
    return Plan(torch.cat([hue_rounds, others], dim=1), *(_send(field, device) for field in numbers))


def _send(host: Tensor, device: torch.device) -> Tensor:
    """Copy to `device` asynchronously: to a GPU from pinned memory, which torch keeps until the copy is done."""
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


def apply_colors(x_NCHW: Tensor, plan: Plan) -> Tensor:
    """Augment images with values 0..255 in place."""
    indices = _send(plan.applied.T.nonzero()[:, 1], x_NCHW.device)
    rows = indices.split(plan.applied.sum(dim=0).tolist())

    def apply(number: int, operation: Callable[..., Tensor], parameters: Tensor | None = None) -> None:
        """Replace the images to which operation `number` applies by its output."""
        selected = rows[number]
        if len(selected):
            own = () if parameters is None else (parameters.index_select(0, selected),)
            x_NCHW.index_copy_(0, selected, operation(x_NCHW.index_select(0, selected), *own))

    for before in range(4):
        apply(before, shift_hue, plan.turn)
        if before < 3:
            blend(x_NCHW, *plan.blends[:, before].unbind(1))
    apply(4, lambda x: luma(x).expand_as(x))
    apply(5, blur, plan.boxes)
    apply(6, solarize)
    return x_NCHW


# --------------------------------------------------------------------------- operations


def luma(x_NCHW: Tensor) -> Tensor:
    """Return the gray level (N, 1, H, W)."""
    red, green, blue = x_NCHW.split(1, dim=1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def blend(x_NCHW: Tensor, own: Tensor, toward_gray: Tensor, toward_mean: Tensor) -> None:
    """Replace each image by a weighted sum of itself, its gray image and the mean of that; weights (N, 1, 1, 1).

    The weights are (f, 0, 0) for brightness f, (f, 1 - f, 0) for saturation and (f, 0, 1 - f) for contrast.
    """
    gray = luma(x_NCHW)
    mean = gray.mean(dim=(1, 2, 3), keepdim=True) * toward_mean
    x_NCHW.mul_(own).add_(gray.mul_(toward_gray).add_(mean)).clamp_(0, 255)


def shift_hue(x_NCHW: Tensor, turn_N: Tensor) -> Tensor:
    """Shift the hue: convert to hue, largest value and chroma, and back (hexcone model).

    Args:
        turn_N: shift in turns of the color circle, -0.5..0.5.
    """
    red, green, blue = x_NCHW.unbind(1)
    high, low = torch.maximum(green, blue), torch.minimum(green, blue)
    largest, middle = torch.maximum(red, high), torch.minimum(red, high)
    smallest = torch.minimum(middle, low)
    six_chroma = (largest - smallest).mul_(6)
    # With sorted channels one formula serves all sextants. swapped: blue > green; not_red: one of them > red.
    swapped, not_red = _less(green, blue), _less(red, high)
    sextant = torch.addcmul(-swapped, not_red, swapped * 2 - 1 / 3)
    hue = (middle - low).div_(six_chroma.clamp(min=1e-5)).add_(sextant).abs_().add_(turn_N[:, None, None])
    # A channel is smallest around the opposite hue, largest around its own hue, and linear in between.
    # The opposite hues are given plus an integer that keeps their sum with `hue` positive.
    opposite = _cached_tensor((2.0, 2 - 1 / 3, 2 - 2 / 3), x_NCHW.device).view(3, 1, 1)
    away = (hue[:, None] + opposite).frac_().sub_(0.5).abs_()
    ramp = torch.addcmul(largest.sub(six_chroma, alpha=1 / 3)[:, None], away, six_chroma[:, None])
    return ramp.clamp_(smallest[:, None], largest[:, None])


def _less(a: Tensor, b: Tensor) -> Tensor:
    """Return a < b as floats 0 and 1, on a CPU much faster than by `torch.where`."""
    return torch.lt(a, b, out=torch.empty_like(a))


def solarize(x_NCHW: Tensor) -> Tensor:
    """Invert all values above half of the range."""
    return torch.minimum(x_NCHW, 255 - x_NCHW)


def blur(x_NCHW: Tensor, boxes_N3: Tensor) -> Tensor:
    """Blur square images along both axes with their own box filters, applied three times.

    The filters are matrices over the positions of a line, which include the repeated border pixels, so that batched products serve
    all radii. The matrices are banded, so long lines are computed in pieces from the pixels within reach.
    """
    size = x_NCHW.shape[-1]
    matrices_NSS = blur_matrices(boxes_N3, size)
    pieces = [slice(start, min(start + PIECE, size)) for start in range(0, size, PIECE)]
    inputs = [slice(max(p.start - BOXES * REACH, 0), min(p.stop + BOXES * REACH, size)) for p in pieces]
    bands = [matrices_NSS[:, p, s] for p, s in zip(pieces, inputs)]
    lines = x_NCHW.flatten(1, 2)
    across = torch.cat([torch.bmm(lines[..., s], band.transpose(1, 2)) for s, band in zip(inputs, bands)], dim=2)
    out = torch.empty_like(x_NCHW)
    for c, channel in enumerate(across.view_as(x_NCHW).unbind(1)):
        for p, s, band in zip(pieces, inputs, bands):
            out[:, c, p] = torch.bmm(band, channel[:, s])
    return out


def box_weights(radius_N: Tensor) -> Tensor:
    """Return the box filter whose three-fold application has variance radius^2: weights (N, 3) of pixels 0, 1 and 2 away.

    Gwosdek et al., section 2: a box of integer radius with fractional ends.
    """
    variance = radius_N.double() ** 2 / BOXES
    whole = ((12 * variance + 1).sqrt() / 2 - 0.5).floor()
    ends = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    inside = 1 / (2 * whole + 1 + 2 * ends)
    away = torch.arange(REACH + 1)
    distance = away - whole[:, None]
    return (inside[:, None] * torch.where(distance <= 0, 1.0, ends[:, None] * (distance == 1))).float()


def blur_matrices(boxes_N3: Tensor, size: int) -> Tensor:
    """Return the three box filters over a line of `size` pixels as one matrix per image, (N, S, S).

    A small matrix is cubed; a larger one has the same corners and repeats the middle row between them.
    """
    corner = min(size, CORNER)
    once = (boxes_N3 @ _box_positions(corner, boxes_N3.device)).view(-1, corner, corner)
    thrice = once @ once @ once
    if size == corner:
        return thrice
    table = torch.nn.functional.pad(thrice.flatten(1), (0, 1))  # a zero at the end
    return table.index_select(1, _enlarged_indices(size, boxes_N3.device)).view(-1, size, size)


@lru_cache(maxsize=32)
def _box_positions(size: int, device: torch.device) -> Tensor:
    """Return how often pixel j contributes to pixel i at each distance, with repeated border pixels: (3, size * size)."""
    i = torch.arange(size)
    counts = torch.zeros(REACH + 1, size, size)
    for shift in range(-REACH, REACH + 1):
        counts[abs(shift), i, (i + shift).clamp(0, size - 1)] += 1
    return counts.flatten(1).to(device)


@lru_cache(maxsize=32)
def _enlarged_indices(size: int, device: torch.device) -> Tensor:
    """Return for each entry of a larger matrix its index in a flat CORNER x CORNER matrix followed by a zero: (size * size)."""
    i, j = torch.arange(size)[:, None], torch.arange(size)[None, :]
    half = CORNER // 2
    row = torch.where(i < half, i, torch.where(i >= size - half, i - size + CORNER, half))
    column = row + j - i
    inside = (j - i).abs() <= BOXES * REACH
    return torch.where(inside, row * CORNER + column, CORNER * CORNER).flatten().to(device)


@lru_cache(maxsize=32)
def _cached_tensor(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)


@lru_cache(maxsize=32)
def _normalization(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return scale and offset (3, 1, 1) that normalize values in 0..255."""
    means, deviations = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
    return (1 / (255 * deviations)).to(device), (-means / deviations).to(device)
