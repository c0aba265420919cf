"""Multi-crop augmentation of the `pil` backend, and the transforms of evaluations.

Policies are the recipes of recipe.py, `dino_aug` and `small_aug`, and `deit_aug`, RandAugment with random erasing. An image is a
PIL image (1 or 3 channels) or a float tensor (C, H, W) of any other number of channels, transformed in a loader worker. For the
recipes the `split` backend is faster on color images (crops.py, photometric.py).

Origin: DINO (Caron et al., ICCV 2021), see recipe.py; DeiT (Touvron et al., ICML 2021), from timm; `strong_view` is that of UDI's
linear probe (Su and Ji, ECCV 2024), after Mugs (Zhou et al., 2022).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from PIL import ImageFilter, ImageOps
from timm.data import create_transform
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional as TF

from data.decode import ImageLike
from data.transforms.recipe import ASPECT, BLUR_RADIUS, FLIP, GRAY, JITTER, RECIPES, Jitter, Recipe, ViewSpec
from data.transforms.recipe import Crops as Crops
from data.transforms.recipe import check_crops as check_crops
from utils import UsageError

ViewTransform = Callable[[ImageLike], Tensor]
MAX_ASPECT_RATIO = 16  # long / short side


class MultiCrop:
    """Apply one transform per view to an image: two global views, then the local ones by size."""

    def __init__(self, view_transforms: Sequence[ViewTransform]) -> None:
        self.view_transforms = list(view_transforms)

    def __call__(self, image: ImageLike) -> list[Tensor]:
        return [view_transform(image) for view_transform in self.view_transforms]


# --------------------------------------------------------------------------- dino_aug


class GaussianBlur:
    """Blur with probability `p`, with a radius drawn from `BLUR_RADIUS`."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: ImageLike) -> ImageLike:
        if random.random() >= self.p:
            return image
        radius = random.uniform(*BLUR_RADIUS)
        if isinstance(image, Tensor):
            return TF.gaussian_blur(image, kernel_size=9, sigma=radius)
        return image.filter(ImageFilter.GaussianBlur(radius))


class Solarize:
    """Invert all values above half of the range, with probability `p`."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: ImageLike) -> ImageLike:
        if random.random() >= self.p:
            return image
        if isinstance(image, Tensor):
            return torch.where(image >= 0.5, 1 - image, image)
        return ImageOps.solarize(image)


class BrightnessContrast:
    """Color jitter without saturation and hue, for float tensors of any number of channels in 0..1."""

    def __init__(self, jitter: Jitter) -> None:
        self.jitter = jitter

    def __call__(self, image: Tensor) -> Tensor:
        brightness, contrast = random.uniform(*self.jitter.brightness), random.uniform(*self.jitter.contrast)
        image = (image * brightness).clamp(0, 1)
        return (image.mean() + (image - image.mean()) * contrast).clamp(0, 1)


def dino_views(recipe: Recipe, in_chans: int, mean: Sequence[float], std: Sequence[float]) -> MultiCrop:
    """Return the transform to the views of a recipe, for any number of channels."""

    def transform(view: ViewSpec) -> transforms.Compose:
        bicubic = transforms.InterpolationMode.BICUBIC
        steps: list[Callable] = [
            transforms.RandomResizedCrop(
                view.size, scale=view.scale, ratio=ASPECT, interpolation=bicubic, antialias=True
            ),
            transforms.RandomHorizontalFlip(p=FLIP),
        ]
        jitter = transforms.ColorJitter(*recipe.jitter) if in_chans in (1, 3) else BrightnessContrast(recipe.jitter)
        steps.append(transforms.RandomApply([jitter], p=JITTER))
        if in_chans == 3:
            steps.append(transforms.RandomGrayscale(p=GRAY))
        steps += [GaussianBlur(view.blur), Solarize(view.solarize), as_tensor, transforms.Normalize(mean, std)]
        return transforms.Compose(steps)

    return MultiCrop([transform(view) for view in recipe.views])


def as_tensor(image: ImageLike) -> Tensor:
    """Return a tensor (C, H, W) in 0..1; a tensor is returned unchanged."""
    return image if isinstance(image, Tensor) else TF.to_tensor(image)


# --------------------------------------------------------------------------- deit_aug


def limit_posterize(view: transforms.Compose) -> transforms.Compose:
    """Make the strongest posterization of a timm transform keep one bit instead of none, which newer Pillow versions reject."""
    for step in view.transforms:
        policies = getattr(step, "policy", None) or [getattr(step, "ops", ())]
        for operation in (operation for policy in policies for operation in policy):
            if getattr(operation, "name", "").startswith("Posterize"):
                operation.level_fn = partial(_at_least_one_bit, operation.level_fn)
    return view


def _at_least_one_bit(level_fn: Callable[..., tuple[int]], level: float, hparams: dict[str, Any]) -> tuple[int]:
    return (max(1, *level_fn(level, hparams)),)


def deit_views(
    crops: Crops,
    mean: Sequence[float],
    std: Sequence[float],
    color_jitter: float,
    auto_augment: str | None,
    interpolation: str,
    erase_prob: float,
    erase_mode: str,
    erase_count: int,
    clean_first_view: bool,
) -> MultiCrop:
    """Return the transform to views with DeiT's augmentation: RandAugment, or color jitter without it, then random erasing.

    Args:
        clean_first_view: do not erase in the first global view (--resplit).

    Raises:
        UsageError: timm rejects the policy, the interpolation or the erasing mode.
    """

    def view(size: int, scale: tuple[float, float], erase: float) -> ViewTransform:
        try:
            transform = create_transform(
                size,
                is_training=True,
                scale=scale,
                color_jitter=color_jitter,
                auto_augment=auto_augment,
                interpolation=interpolation,
                mean=tuple(mean),
                std=tuple(std),
                re_prob=erase,
                re_mode=erase_mode,
                re_count=erase_count,
            )
            return limit_posterize(transform)
        except (KeyError, AssertionError, ValueError) as error:
            raise UsageError(
                f"timm rejects --aa {auto_augment} --train-interpolation {interpolation} --remode {erase_mode} "
                f"({type(error).__name__}: {error}); use --aa rand-m9-mstd0.5-inc1 --train-interpolation bicubic --remode pixel"
            ) from None

    views = [view(crops.global_size, crops.global_scale, 0.0 if clean_first_view else erase_prob)]
    views.append(view(crops.global_size, crops.global_scale, erase_prob))
    for number, size in zip(crops.local_numbers, crops.local_sizes):
        views += [view(size, crops.local_scale, erase_prob) for _ in range(number)]
    return MultiCrop(views)


# --------------------------------------------------------------------------- evaluation


def train_view(size: int, mean: Sequence[float], std: Sequence[float]) -> MultiCrop:
    """Return the training transform of linear classifiers: random crop of 8 to 100 %, bilinear resize, random flip."""
    steps: list[Callable] = [
        transforms.RandomResizedCrop(size, antialias=True),
        transforms.RandomHorizontalFlip(),
        as_tensor,
        transforms.Normalize(mean, std),
    ]
    return MultiCrop([transforms.Compose(steps)])


def strong_view(size: int, mean: Sequence[float], std: Sequence[float]) -> MultiCrop:
    """Return the training transform of UDI's linear classifier, from Mugs: flip, RandAugment, random crop, random erasing."""
    rand_augment = {"translate_const": int(0.45 * size), "img_mean": tuple(round(255 * value) for value in mean)}
    bicubic = transforms.InterpolationMode.BICUBIC
    steps: list[Callable] = [
        transforms.RandomHorizontalFlip(),
        rand_augment_transform("rand-m9-mstd0.5-inc1", rand_augment),
        transforms.RandomResizedCrop(size, interpolation=bicubic, antialias=True),
        as_tensor,
        transforms.Normalize(mean, std),
        RandomErasing(0.25, mode="pixel", device="cpu"),
    ]
    return MultiCrop([limit_posterize(transforms.Compose(steps))])


def limit_aspect_ratio(image: ImageLike) -> ImageLike:
    """Center-crop an image to an aspect ratio of `MAX_ASPECT_RATIO`; other images are returned unchanged.

    Before a resize of the short side and a center crop this changes the result by less than a pixel, and avoids resizing an
    image of 5000 x 2 pixels to 640,000 x 256.
    """
    height, width = image.shape[1:] if isinstance(image, Tensor) else (image.height, image.width)
    limit = MAX_ASPECT_RATIO * min(height, width)
    if max(height, width) <= limit:
        return image
    limit += (max(height, width) - limit) % 2  # keeps the center
    return TF.center_crop(image, [min(height, limit), min(width, limit)])


def eval_view(
    size: int, crop_ratio: float, mean: Sequence[float], std: Sequence[float], interpolation: str = "bicubic"
) -> MultiCrop:
    """Return the evaluation transform: resize the short side to size / crop_ratio (256 for 224), then center crop."""
    mode = transforms.InterpolationMode(interpolation)
    resize = transforms.Resize(round(size / crop_ratio), interpolation=mode, antialias=True)
    normalize = transforms.Normalize(mean, std)
    steps: list[Callable] = [limit_aspect_ratio, resize, transforms.CenterCrop(size), as_tensor, normalize]
    return MultiCrop([transforms.Compose(steps)])


def choose_backend(wanted: str, policy: str, in_chans: int) -> str:
    """Return `pil` or `split`; `auto` selects `split`, which is faster (benchmarks/augment.py), wherever it is supported.

    Raises:
        UsageError: `split` is requested but not supported.
    """
    splittable = policy in RECIPES and in_chans == 3
    if wanted == "split" and not splittable:
        raise UsageError(
            f"--aug_backend split supports {' and '.join(RECIPES)} with 3 channels, not {policy} with {in_chans}; use auto or pil"
        )
    return "split" if splittable and wanted != "pil" else "pil"


def check_normalization(mean: Sequence[float], std: Sequence[float], in_chans: int) -> None:
    """Raise UsageError unless there is one mean and one positive standard deviation per channel."""
    fits = (
        len(mean) == len(std) == in_chans > 0 and all(map(math.isfinite, mean)) and all(0 < s < math.inf for s in std)
    )
    if not fits:
        raise UsageError(
            f"INPUT.MEAN {list(mean)} and INPUT.STD {list(std)} must have {in_chans} finite values each, one per channel, those of "
            "INPUT.STD positive; set them in the yaml or as overrides, e.g. INPUT.MEAN '[0.5]' INPUT.STD '[0.25]'"
        )
