"""Parameters of multi-crop augmentation: sizes and scales of the crops, and DINO's strengths and probabilities.

The `pil` backend (augment.py) and the `split` backend (crops.py, photometric.py) both read them from here.

Origin: DINO (Caron et al., ICCV 2021), appendix, after SwAV's multi-crop and BYOL's color augmentation.
"""

from __future__ import annotations

from typing import NamedTuple

from utils import UsageError

ASPECT = (3 / 4, 4 / 3)  # width / height of a crop, log-uniform
FLIP = 0.5  # probability
JITTER = 0.8  # probability
GRAY = 0.2  # probability
BLUR_RADIUS = (0.1, 2.0)  # standard deviation of the Gaussian in pixels, uniform


class Crops(NamedTuple):
    """Sizes (pixels) and scales (share of the image area) of the views."""

    global_size: int
    global_scale: tuple[float, float]
    local_numbers: tuple[int, ...]  # number of local views of each size
    local_sizes: tuple[int, ...]
    local_scale: tuple[float, float]

    @property
    def total(self) -> int:
        """Number of views of an image: two global ones and all local ones."""
        return len(self.sides)

    @property
    def sides(self) -> list[int]:
        """Size of each view in pixels, the global ones first."""
        locals_ = [size for number, size in zip(self.local_numbers, self.local_sizes) for _ in range(number)]
        return [self.global_size, self.global_size, *locals_]


class ViewSpec(NamedTuple):
    """Parameters of one view."""

    size: int  # pixels
    scale: tuple[float, float]  # of the crop area, as a share of the image area
    blur: float  # probability
    solarize: float  # probability


class Jitter(NamedTuple):
    """Uniform ranges of the four factors of color jitter; hue in turns of the color circle."""

    brightness: tuple[float, float]
    contrast: tuple[float, float]
    saturation: tuple[float, float]
    hue: tuple[float, float]


def color_jitter(strength: float) -> Jitter:
    """Return the ranges of DINO's color jitter.

    Args:
        strength: of brightness and contrast (published: 0.4); saturation gets half of it, hue a quarter.

    Raises:
        UsageError: a strength outside 0..2, which would exceed the range of the hue.
    """
    if not 0 <= strength <= 2:
        raise UsageError(f"--color-jitter {strength} must be in 0..2")

    def around_one(amount: float) -> tuple[float, float]:
        return max(0.0, 1 - amount), 1 + amount

    return Jitter(around_one(strength), around_one(strength), around_one(strength / 2), (-strength / 4, strength / 4))


class Recipe(NamedTuple):
    """All views of an image, and their common color jitter."""

    views: tuple[ViewSpec, ...]
    jitter: Jitter


def dino_recipe(crops: Crops, strength: float) -> Recipe:
    """Return DINO's recipe: blur on the first global view, rarely and with solarization on the second, sometimes on local ones.

    Raises:
        UsageError: an invalid strength of the color jitter.
    """
    first = ViewSpec(crops.global_size, crops.global_scale, blur=1.0, solarize=0.0)
    second = ViewSpec(crops.global_size, crops.global_scale, blur=0.1, solarize=0.2)
    local = [
        ViewSpec(size, crops.local_scale, blur=0.5, solarize=0.0)
        for number, size in zip(crops.local_numbers, crops.local_sizes)
        for _ in range(number)
    ]
    return Recipe((first, second, *local), color_jitter(strength))


def small_recipe(crops: Crops, strength: float) -> Recipe:
    """Return DINO's recipe without blur and solarization, which leave little of small images (Chen et al., ICML 2020, B.9)."""
    recipe = dino_recipe(crops, strength)
    return recipe._replace(views=tuple(view._replace(blur=0.0, solarize=0.0) for view in recipe.views))


RECIPES = {"dino_aug": dino_recipe, "small_aug": small_recipe}


def check_crops(crops: Crops) -> None:
    """Raise UsageError if sizes, numbers or scales of the crops are invalid."""
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
    for kind, (low, high) in (("global", crops.global_scale), ("local", crops.local_scale)):
        if not 0 < low <= high <= 1:
            raise UsageError(f"--{kind}_crops_scale {low} {high} must be two numbers with 0 < low <= high <= 1")
