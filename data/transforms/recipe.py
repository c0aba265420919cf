"""What the views of an image undergo: sizes and scales of the crops, and the published strengths and probabilities of DINO.

The one owner of these numbers; data/transforms/augment.py applies them to PIL images, data/transforms/crops.py and
data/transforms/photometric.py to tensors.

Origin: DINO (Caron et al., ICCV 2021) appendix, following SwAV's multi-crop and BYOL's color recipe.
"""

from __future__ import annotations

from typing import NamedTuple

from utils import UsageError

ASPECT = (3 / 4, 4 / 3)  # width over height of a crop, log-uniform
FLIP = 0.5  # probabilities
JITTER = 0.8
GRAY = 0.2
BLUR_RADIUS = (0.1, 2.0)  # pixels, the deviation of the Gaussian; uniform


class Crops(NamedTuple):
    """Sizes and scales of the views."""

    global_size: int
    global_scale: tuple[float, float]
    local_numbers: tuple[int, ...]  # one entry a local size
    local_sizes: tuple[int, ...]
    local_scale: tuple[float, float]

    @property
    def total(self) -> int:
        """Views of an image: two global ones and all local ones."""
        return 2 + sum(self.local_numbers)


class ViewSpec(NamedTuple):
    """One view of DINO."""

    size: int  # pixels
    scale: tuple[float, float]  # area of the crop, as a share of the image's
    blur: float  # probabilities
    solarize: float


class Jitter(NamedTuple):
    """Ranges of the four factors of color jitter, each uniform; hue in turns of the color circle."""

    brightness: tuple[float, float]
    contrast: tuple[float, float]
    saturation: tuple[float, float]
    hue: tuple[float, float]


class Recipe(NamedTuple):
    """All views of an image, and the color jitter that they share."""

    views: tuple[ViewSpec, ...]
    jitter: Jitter


def dino_recipe(crops: Crops, strength: float) -> Recipe:
    """Blur always on the first global view, sometimes with solarization on the second, half the time on local ones.

    `strength` is the amount of brightness and contrast jitter (published: 0.4); saturation has half of it, hue a quarter.

    Raises:
        UsageError: a strength outside 0..2, where the hue would leave its range.
    """
    if not 0 <= strength <= 2:
        raise UsageError(f"--color-jitter {strength} must lie in 0..2")

    def around_one(amount: float) -> tuple[float, float]:
        return max(0.0, 1 - amount), 1 + amount

    first = ViewSpec(crops.global_size, crops.global_scale, blur=1.0, solarize=0.0)
    second = ViewSpec(crops.global_size, crops.global_scale, blur=0.1, solarize=0.2)
    local = [
        ViewSpec(size, crops.local_scale, blur=0.5, solarize=0.0)
        for number, size in zip(crops.local_numbers, crops.local_sizes)
        for _ in range(number)
    ]
    jitter = Jitter(around_one(strength), around_one(strength), around_one(strength / 2), (-strength / 4, strength / 4))
    return Recipe((first, second, *local), jitter)


def check_crops(crops: Crops) -> None:
    """Stop on sizes, numbers or scales that cannot be cropped.

    Raises:
        UsageError: naming the value.
    """
    if len(crops.local_numbers) != len(crops.local_sizes):
        raise UsageError(
            f"--local_crops_number {list(crops.local_numbers)} and --local_crops_size {list(crops.local_sizes)} "
            "must have the same length, one number for each size"
        )
    if min(crops.local_numbers, default=0) < 0:
        raise UsageError(f"--local_crops_number {list(crops.local_numbers)} must be 0 or more")
    if min(crops.local_sizes, default=1) < 1:
        raise UsageError(f"--local_crops_size {list(crops.local_sizes)} must be 1 or more")
    if crops.global_size < 1:
        raise UsageError(f"--global_crops_size {crops.global_size} must be 1 or more")
    for flag, (low, high) in (("global", crops.global_scale), ("local", crops.local_scale)):
        if not 0 < low <= high <= 1:
            raise UsageError(f"--{flag}_crops_scale {low} {high} must be two numbers with 0 < low <= high <= 1")
