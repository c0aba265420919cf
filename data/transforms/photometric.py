"""The device's half of the split pipeline: colors of all crops of a batch at once, on the device that trains.

Color jitter, gray, blur, solarization and normalization as DINO's views have them, on uint8 crops of
data/transforms/crops.py. Each operation
takes all images of one size that undergo it, on a CPU in pieces of a few images that stay in its cache, and nothing waits for the
device: each image's uniform numbers come with the batch, on the host, where they become parameters and the rows that an operation
works on. So an image's colors depend on its own draws alone, not on its batch.

Values are floats in 0..255 between the operations, where Pillow rounds or truncates to integers after each.

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

DRAWS = 10  # a view: jitter or not, its order, four factors, gray or not, blur or not, its radius, solarized or not
CONTRAST, SATURATION, HUE = 1, 2, 3  # brightness is 0
NEUTRAL = torch.tensor([1.0, 1.0, 1.0, 0.0])  # factors that change nothing
ORDERS = torch.tensor(list(permutations(range(4))))  # (24, 4): the operations of color jitter in every order
HUE_ROUND = (ORDERS == HUE).int().argmax(dim=1)  # how many of the other three come before it
BLENDS = ORDERS[ORDERS != HUE].view(-1, 3)  # (24, 3): those three in their order
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601
CACHED_PIXELS = 100_352  # taken at once on a CPU, two crops of 224 pixels: the passes over them stay in its cache
BOXES = 3  # a blur is as many box filters, none of which reaches farther than REACH while radii stay below 2.4
REACH = 2
PIECE = 112  # pixels of a line that one product makes
CORNER = 4 * BOXES * REACH  # from this size on the middle of a blur's matrix repeats


class Colors(NamedTuple):
    """What images undergo, one entry each, on the host; the leading dimensions are those of the draws."""

    order: Tensor  # of the jitter, a row of ORDERS
    factors: Tensor  # (..., 4) brightness, contrast, saturation, hue; NEUTRAL without jitter
    gray: Tensor  # bool
    radius: Tensor  # of the blur in pixels, 0 for none
    solarize: Tensor  # bool


def draw_colors(draws_BVR: Tensor, recipe: Recipe) -> Colors:
    """Uniform numbers in 0..1 to the parameters of each view of each image, (B, V)."""
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
    """Stacked samples of `ByteCrops` to normalized float views.

    Args:
        recipe: the one whose views were cropped.
        mean, std: of each channel, for values in 0..1.
    """

    recipe: Recipe
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, stacked: Sequence[Tensor], device: torch.device) -> list[Tensor]:
        """V crops (B, 3, S, S), uint8, and the draws (B, V, R) on the host, to V views on `device`."""
        *crops, draws_BVR = stacked
        colors = draw_colors(draws_BVR, self.recipe)
        views: list[Tensor] = list(crops)
        for size in {view.size for view in self.recipe.views}:
            members = [v for v, view in enumerate(self.recipe.views) if view.size == size]
            pixels_NCHW = torch.cat([crops[v].to(device, non_blocking=True) for v in members])
            of_members = Colors(*(field[:, members].transpose(0, 1).flatten(0, 1) for field in colors))
            finished = self._finish(pixels_NCHW, of_members).split(len(draws_BVR))
            for v, view in zip(members, finished):
                views[v] = view
        return views

    def _finish(self, pixels_NCHW: Tensor, colors: Colors) -> Tensor:
        """Images of one size."""
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
    """Colors as the operations take them, one row an image."""

    picks: Tensor  # (N, 7) bool, on the host: hue after 0..3 blends, gray, blur, solarization
    blends: Tensor  # (N, 3 rounds, 3 weights, 1, 1, 1), see `blend`; this and the rest on the device
    turn: Tensor  # (N) of the hue
    boxes: Tensor  # (N, 3), see `box_weights`


def make_plan(colors: Colors, device: torch.device) -> Plan:
    """For N images; goes to the device without waiting for it."""
    turn = colors.factors[:, HUE]
    hue_rounds = (HUE_ROUND[colors.order][:, None] == torch.arange(4)) & (turn != 0)[:, None]
    others = torch.stack([colors.gray, colors.radius > 0, colors.solarize], dim=1)
    operation = BLENDS[colors.order]
    own = colors.factors.gather(1, operation)
    weights = torch.stack([own, (1 - own) * (operation == SATURATION), (1 - own) * (operation == CONTRAST)], dim=2)
    numbers = (weights[..., None, None, None], turn, box_weights(colors.radius))
    return Plan(torch.cat([hue_rounds, others], dim=1), *(_send(field, device) for field in numbers))


def _send(host: Tensor, device: torch.device) -> Tensor:
    """A copy on `device`; a GPU takes it without a wait from pinned memory only, which torch keeps until the copy is done."""
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


def apply_colors(x_NCHW: Tensor, plan: Plan) -> Tensor:
    """Images with values 0..255, changed in place."""
    found = _send(plan.picks.T.nonzero()[:, 1], x_NCHW.device)
    rows = found.split(plan.picks.sum(dim=0).tolist())

    def change(number: int, operation: Callable[..., Tensor], numbers: Tensor | None = None) -> None:
        """Put what `operation` makes of the images that are picked for it, with their `numbers`, in their places."""
        picked = rows[number]
        if len(picked):
            own = () if numbers is None else (numbers.index_select(0, picked),)
            x_NCHW.index_copy_(0, picked, operation(x_NCHW.index_select(0, picked), *own))

    for before in range(4):
        change(before, shift_hue, plan.turn)
        if before < 3:
            blend(x_NCHW, *plan.blends[:, before].unbind(1))
    change(4, lambda x: luma(x).expand_as(x))
    change(5, blur, plan.boxes)
    change(6, solarize)
    return x_NCHW


# --------------------------------------------------------------------------- operations


def luma(x_NCHW: Tensor) -> Tensor:
    """Gray level (N, 1, H, W)."""
    red, green, blue = x_NCHW.split(1, dim=1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def blend(x_NCHW: Tensor, own: Tensor, toward_gray: Tensor, toward_mean: Tensor) -> None:
    """In place: each image weighted by `own` plus its gray image and the mean of that by their weights, all (N, 1, 1, 1).

    Brightness f is (f, 0, 0), contrast (f, 0, 1 - f), saturation (f, 1 - f, 0).
    """
    gray = luma(x_NCHW)
    mean = gray.mean(dim=(1, 2, 3), keepdim=True) * toward_mean
    x_NCHW.mul_(own).add_(gray.mul_(toward_gray).add_(mean)).clamp_(0, 255)


def shift_hue(x_NCHW: Tensor, turn_N: Tensor) -> Tensor:
    """Images with their hue turned: to hue, largest value and chroma, and back (the hexcone model).

    Args:
        turn_N: of the color circle, -0.5..0.5.
    """
    red, green, blue = x_NCHW.unbind(1)
    high, low = torch.maximum(green, blue), torch.minimum(green, blue)
    largest, middle = torch.maximum(red, high), torch.minimum(red, high)
    smallest = torch.minimum(middle, low)
    six_chroma = (largest - smallest).mul_(6)
    # Sorted channels leave one formula for all sextants; 1 where blue is above green, and where one of them is above red.
    swapped, not_red = _less(green, blue), _less(red, high)
    sextant = torch.addcmul(-swapped, not_red, swapped * 2 - 1 / 3)
    hue = (middle - low).div_(six_chroma.clamp(min=1e-5)).add_(sextant).abs_().add_(turn_N[:, None, None])
    # A channel is smallest around the hue opposite to its own, largest around its own, and a ramp leads from one to the other.
    opposite = _tensor((2.0, 2 - 1 / 3, 2 - 2 / 3), x_NCHW.device).view(
        3, 1, 1
    )  # plus a number that keeps `hue` positive
    away = (hue[:, None] + opposite).frac_().sub_(0.5).abs_()
    ramp = torch.addcmul(largest.sub(six_chroma, alpha=1 / 3)[:, None], away, six_chroma[:, None])
    return ramp.clamp_(smallest[:, None], largest[:, None])


def _less(a: Tensor, b: Tensor) -> Tensor:
    """1 where a < b, else 0, as numbers: on a CPU much faster than `torch.where`."""
    return torch.lt(a, b, out=torch.empty_like(a))


def solarize(x_NCHW: Tensor) -> Tensor:
    """Everything from half of the range on inverted."""
    return torch.minimum(x_NCHW, 255 - x_NCHW)


def blur(x_NCHW: Tensor, boxes_N3: Tensor) -> Tensor:
    """Square images blurred along both axes by their own box filters, applied three times.

    The filters are matrices over the positions of a line, so batched products serve images of any radius, and the repeated
    pixels beyond the border are part of them. The matrices are bands: long lines are made in pieces from what each piece sees.
    """
    size = x_NCHW.shape[-1]
    matrices_NSS = blur_matrices(boxes_N3, size)
    pieces = [slice(start, min(start + PIECE, size)) for start in range(0, size, PIECE)]
    seen = [slice(max(p.start - BOXES * REACH, 0), min(p.stop + BOXES * REACH, size)) for p in pieces]
    bands = [matrices_NSS[:, p, s] for p, s in zip(pieces, seen)]
    lines = x_NCHW.flatten(1, 2)
    across = torch.cat([torch.bmm(lines[..., s], band.transpose(1, 2)) for s, band in zip(seen, bands)], dim=2)
    out = torch.empty_like(x_NCHW)
    for c, channel in enumerate(across.view_as(x_NCHW).unbind(1)):
        for p, s, band in zip(pieces, seen, bands):
            out[:, c, p] = torch.bmm(band, channel[:, s])
    return out


def box_weights(radius_N: Tensor) -> Tensor:
    """The box filter of which three in a row have the variance radius^2: weights (N, 3) of a pixel 0, 1 and 2 away.

    Gwosdek et al., section 2: a box of integer radius whose two ends count in part.
    """
    variance = radius_N.double() ** 2 / BOXES
    whole = ((12 * variance + 1).sqrt() / 2 - 0.5).floor()
    ends = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    inside = 1 / (2 * whole + 1 + 2 * ends)
    away = torch.arange(REACH + 1)
    distance = away - whole[:, None]
    return (inside[:, None] * torch.where(distance <= 0, 1.0, ends[:, None] * (distance == 1))).float()


def blur_matrices(boxes_N3: Tensor, size: int) -> Tensor:
    """The three box filters over a line of `size` pixels as one matrix an image, (N, S, S).

    A small matrix is cubed; larger ones have its corners at their ends and repeat its middle row in between.
    """
    corner = min(size, CORNER)
    once = (boxes_N3 @ _box_positions(corner, boxes_N3.device)).view(-1, corner, corner)
    thrice = once @ once @ once
    if size == corner:
        return thrice
    table = torch.nn.functional.pad(thrice.flatten(1), (0, 1))  # a zero last
    return table.index_select(1, _grown(size, boxes_N3.device)).view(-1, size, size)


@lru_cache(maxsize=32)
def _box_positions(size: int, device: torch.device) -> Tensor:
    """How often position j counts for position i at each distance, beyond the border the last pixel: (3, size * size)."""
    i = torch.arange(size)
    counts = torch.zeros(REACH + 1, size, size)
    for shift in range(-REACH, REACH + 1):
        counts[abs(shift), i, (i + shift).clamp(0, size - 1)] += 1
    return counts.flatten(1).to(device)


@lru_cache(maxsize=32)
def _grown(size: int, device: torch.device) -> Tensor:
    """Where in a flat matrix of CORNER x CORNER, with a zero after it, each entry of a larger one lies: (size * size)."""
    i, j = torch.arange(size)[:, None], torch.arange(size)[None, :]
    half = CORNER // 2
    row = torch.where(i < half, i, torch.where(i >= size - half, i - size + CORNER, half))
    column = row + j - i
    inside = (j - i).abs() <= BOXES * REACH
    return torch.where(inside, row * CORNER + column, CORNER * CORNER).flatten().to(device)


@lru_cache(maxsize=32)
def _tensor(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)


@lru_cache(maxsize=32)
def _normalization(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Factor and offset (3, 1, 1) from values 0..255 to normalized ones."""
    means, deviations = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
    return (1 / (255 * deviations)).to(device), (-means / deviations).to(device)
