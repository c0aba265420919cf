"""Multi-crop augmentation: one image in, global and local views out.

Two policies: `dino_aug`, the photometric recipe of DINO, and `deit_aug`, RandAugment with random erasing as in DeiT.
Images are PIL (1 or 3 channels) or float tensors (C, H, W) for any other number of channels. This is the `pil` backend, each
image for itself in a loader worker; `split` does `dino_aug` of color images faster (data/transforms/crops.py,
data/transforms/photometric.py).

Origin: DINO (Caron et al., ICCV 2021), see data/transforms/recipe.py; DeiT (Touvron et al., ICML 2021) through timm; the
strong view of a
linear probe is that of UDI (Su and Ji, ECCV 2024) after Mugs (Zhou et al., 2022).
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
from data.transforms.recipe import ASPECT, BLUR_RADIUS, FLIP, GRAY, JITTER, View, dino_recipe
from data.transforms.recipe import Crops as Crops
from data.transforms.recipe import check_crops as check_crops
from utils import UsageError

ViewTransform = Callable[[ImageLike], Tensor]
THIN = 16  # times as long as wide


class MultiCrop:
    """Apply each view's transform to the image: two global views, then the local ones by size."""

    def __init__(self, view_transforms: Sequence[ViewTransform]) -> None:
        self.view_transforms = list(view_transforms)

    def __call__(self, image: ImageLike) -> list[Tensor]:
        return [view_transform(image) for view_transform in self.view_transforms]


# --------------------------------------------------------------------------- dino_aug


class GaussianBlur:
    """With probability `p` blur with a radius drawn from `BLUR_RADIUS`."""

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
    """With probability `p` invert everything above half of the range."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: ImageLike) -> ImageLike:
        if random.random() >= self.p:
            return image
        if isinstance(image, Tensor):
            return torch.where(image >= 0.5, 1 - image, image)
        return ImageOps.solarize(image)


class BrightnessContrast:
    """The part of color jitter that makes sense for any number of channels, on float tensors in 0..1."""

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def __call__(self, image: Tensor) -> Tensor:
        brightness, contrast = (random.uniform(1 - self.strength, 1 + self.strength) for _ in range(2))
        image = (image * brightness).clamp(0, 1)
        return (image.mean() + (image - image.mean()) * contrast).clamp(0, 1)


def dino_views(crops: Crops, in_chans: int, mean: Sequence[float], std: Sequence[float], strength: float) -> MultiCrop:
    """DINO's views of images of any number of channels, as data/transforms/recipe.py has them.

    Raises:
        UsageError: a strength of the color jitter outside 0..2.
    """
    recipe = dino_recipe(crops, strength)

    def transform(view: View) -> transforms.Compose:
        bicubic = transforms.InterpolationMode.BICUBIC
        steps: list[Callable] = [
            transforms.RandomResizedCrop(
                view.size, scale=view.scale, ratio=ASPECT, interpolation=bicubic, antialias=True
            ),
            transforms.RandomHorizontalFlip(p=FLIP),
        ]
        jitter = transforms.ColorJitter(*recipe.jitter) if in_chans in (1, 3) else BrightnessContrast(strength)
        steps.append(transforms.RandomApply([jitter], p=JITTER))
        if in_chans == 3:
            steps.append(transforms.RandomGrayscale(p=GRAY))
        steps += [GaussianBlur(view.blur), Solarize(view.solarize), as_tensor, transforms.Normalize(mean, std)]
        return transforms.Compose(steps)

    return MultiCrop([transform(view) for view in recipe.views])


def as_tensor(image: ImageLike) -> Tensor:
    """(C, H, W) in 0..1; a tensor is that already."""
    return image if isinstance(image, Tensor) else TF.to_tensor(image)


# --------------------------------------------------------------------------- deit_aug


def posterized_to_a_bit(view: transforms.Compose) -> transforms.Compose:
    """timm's view, whose strongest posterizing keeps one bit of a color instead of none, which newer Pillows refuse."""
    for step in view.transforms:
        policies = getattr(step, "policy", None) or [getattr(step, "ops", ())]
        for operation in (operation for policy in policies for operation in policy):
            if getattr(operation, "name", "").startswith("Posterize"):
                operation.level_fn = partial(_at_least_a_bit, operation.level_fn)
    return view


def _at_least_a_bit(level_fn: Callable[..., tuple[int]], level: float, hparams: dict[str, Any]) -> tuple[int]:
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
    """DeiT's policy for every view, from timm: RandAugment (or color jitter without it), then random erasing.

    `clean_first_view` leaves the first global view without erasing (the `--resplit` flag).

    Raises:
        UsageError: timm does not know the policy, the interpolation or the erasing mode.
    """

    def view(size: int, scale: tuple[float, float], erase: float) -> ViewTransform:
        try:
            made = create_transform(
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
            return posterized_to_a_bit(made)
        except (KeyError, AssertionError, ValueError) as error:
            raise UsageError(
                f"timm does not take --aa {auto_augment} --train-interpolation {interpolation} --remode {erase_mode} "
                f"({type(error).__name__}: {error}); try --aa rand-m9-mstd0.5-inc1 --train-interpolation bicubic --remode pixel"
            ) from None

    views = [view(crops.global_size, crops.global_scale, 0.0 if clean_first_view else erase_prob)]
    views.append(view(crops.global_size, crops.global_scale, erase_prob))
    for number, size in zip(crops.local_numbers, crops.local_sizes):
        views += [view(size, crops.local_scale, erase_prob) for _ in range(number)]
    return MultiCrop(views)


# --------------------------------------------------------------------------- evaluation


def train_view(size: int, mean: Sequence[float], std: Sequence[float]) -> MultiCrop:
    """What a linear classifier trains on: a random crop of 8 to 100 % resized to `size` (bilinear), flipped half the time."""
    return MultiCrop(
        [
            transforms.Compose(
                [
                    transforms.RandomResizedCrop(size, antialias=True),
                    transforms.RandomHorizontalFlip(),
                    as_tensor,
                    transforms.Normalize(mean, std),
                ]
            )
        ]
    )


def strong_view(size: int, mean: Sequence[float], std: Sequence[float]) -> MultiCrop:
    """What UDI's linear classifier trains on, Mugs' augmentation: flip, RandAugment on the whole image, random crop, erasing."""
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
    return MultiCrop([posterized_to_a_bit(transforms.Compose(steps))])


def middle_of_thin(image: ImageLike) -> ImageLike:
    """What the center crop of a resized image can show of one that is very long or high: `THIN` times its short side.

    All of it would be resized, of 5000 x 2 pixels to 640,000 x 256. Other images stay as they are; of these a pixel of the
    crop moves by less than a pixel of the resized image.
    """
    height, width = image.shape[1:] if isinstance(image, Tensor) else (image.height, image.width)
    most = THIN * min(height, width)
    if max(height, width) <= most:
        return image
    most += (max(height, width) - most) % 2  # so that the middle stays the middle
    return TF.center_crop(image, [min(height, most), min(width, most)])


def eval_view(
    size: int, crop_ratio: float, mean: Sequence[float], std: Sequence[float], interpolation: str = "bicubic"
) -> MultiCrop:
    """The evaluation protocol: resize the short side to size / crop_ratio (256 for 224), center crop, one view."""
    return MultiCrop(
        [
            transforms.Compose(
                [
                    middle_of_thin,
                    transforms.Resize(
                        round(size / crop_ratio),
                        interpolation=transforms.InterpolationMode(interpolation),
                        antialias=True,
                    ),
                    transforms.CenterCrop(size),
                    as_tensor,
                    transforms.Normalize(mean, std),
                ]
            )
        ]
    )


def choose_backend(wanted: str, policy: str, in_chans: int) -> str:
    """`pil` or `split`: `auto` takes `split`, the faster one on a CPU too (benchmarks/augment.py), for whatever it can do.

    Raises:
        UsageError: `split` is wanted for what only `pil` does.
    """
    splittable = policy == "dino_aug" and in_chans == 3
    if wanted == "split" and not splittable:
        raise UsageError(
            f"--aug_backend split does dino_aug on images of 3 channels, not {policy} on images of {in_chans}; "
            "leave it at auto, or use pil"
        )
    return "split" if splittable and wanted != "pil" else "pil"


def check_normalization(mean: Sequence[float], std: Sequence[float], in_chans: int) -> None:
    """Stop unless there is one mean and one positive deviation per channel.

    Raises:
        UsageError: naming the config keys.
    """
    fits = (
        len(mean) == len(std) == in_chans > 0 and all(map(math.isfinite, mean)) and all(0 < s < math.inf for s in std)
    )
    if not fits:
        raise UsageError(
            f"images of {in_chans} channels need {in_chans} values in INPUT.MEAN and {in_chans} positive ones in INPUT.STD, "
            f"not {list(mean)} and {list(std)}; set them in the yaml or as overrides, e.g. INPUT.MEAN '[0.5]' INPUT.STD '[0.25]'"
        )
