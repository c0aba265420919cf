"""Multi-crop augmentation: one image in, global and local views out.

Two policies: `dino_aug`, the photometric recipe of DINO, and `deit_aug`, RandAugment with random erasing as in DeiT.
Images are PIL (1 or 3 channels) or float tensors (C, H, W) for any other number of channels.

Origin: DINO (Caron et al., ICCV 2021) appendix, following SwAV's multi-crop and BYOL's colour recipe; DeiT (Touvron et al.,
ICML 2021) through timm.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from PIL import ImageFilter, ImageOps
from timm.data import create_transform
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional as TF

from data.datasets import ImageLike
from utils import UsageError

ViewTransform = Callable[[ImageLike], Tensor]


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


class MultiCrop:
    """Apply each view's transform to the image: two global views, then the local ones by size."""

    def __init__(self, view_transforms: Sequence[ViewTransform]) -> None:
        self.view_transforms = list(view_transforms)

    def __call__(self, image: ImageLike) -> list[Tensor]:
        return [view_transform(image) for view_transform in self.view_transforms]


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


# --------------------------------------------------------------------------- dino_aug


class GaussianBlur:
    """With probability `p` blur with a radius drawn from 0.1 .. 2 pixels."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, image: ImageLike) -> ImageLike:
        if random.random() >= self.p:
            return image
        radius = random.uniform(0.1, 2.0)
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
    """The part of colour jitter that makes sense for any number of channels, on float tensors in 0..1."""

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def __call__(self, image: Tensor) -> Tensor:
        brightness, contrast = (random.uniform(1 - self.strength, 1 + self.strength) for _ in range(2))
        image = (image * brightness).clamp(0, 1)
        return (image.mean() + (image - image.mean()) * contrast).clamp(0, 1)


def dino_views(crops: Crops, in_chans: int, mean: Sequence[float], std: Sequence[float], strength: float) -> MultiCrop:
    """DINO's views: blur always on the first global view, sometimes with solarisation on the second, half the time on local ones.

    `strength` is the amount of brightness and contrast jitter (published: 0.4); saturation has half of it, hue a quarter.

    Raises:
        UsageError: a strength outside 0..2, where the hue would leave its range.
    """
    if not 0 <= strength <= 2:
        raise UsageError(f"--color-jitter {strength} must lie in 0..2")

    def view(size: int, scale: tuple[float, float], blur: float, solarize: float) -> transforms.Compose:
        steps: list[Callable] = [
            transforms.RandomResizedCrop(
                size, scale=scale, interpolation=transforms.InterpolationMode.BICUBIC, antialias=True
            ),
            transforms.RandomHorizontalFlip(p=0.5),
        ]
        if in_chans in (1, 3):
            jitter = transforms.ColorJitter(strength, strength, strength / 2, strength / 4)
        else:
            jitter = BrightnessContrast(strength)
        steps.append(transforms.RandomApply([jitter], p=0.8))
        if in_chans == 3:
            steps.append(transforms.RandomGrayscale(p=0.2))
        steps += [GaussianBlur(blur), Solarize(solarize), _to_tensor, transforms.Normalize(mean, std)]
        return transforms.Compose(steps)

    first = view(crops.global_size, crops.global_scale, blur=1.0, solarize=0.0)
    second = view(crops.global_size, crops.global_scale, blur=0.1, solarize=0.2)
    local = [
        view(size, crops.local_scale, blur=0.5, solarize=0.0)
        for number, size in zip(crops.local_numbers, crops.local_sizes)
        for _ in range(number)
    ]
    return MultiCrop([first, second, *local])


def _to_tensor(image: ImageLike) -> Tensor:
    return image if isinstance(image, Tensor) else TF.to_tensor(image)


# --------------------------------------------------------------------------- deit_aug


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
    """DeiT's policy for every view, from timm: RandAugment (or colour jitter without it), then random erasing.

    `clean_first_view` leaves the first global view without erasing (the `--resplit` flag).

    Raises:
        UsageError: timm does not know the policy, the interpolation or the erasing mode.
    """

    def view(size: int, scale: tuple[float, float], erase: float) -> ViewTransform:
        try:
            return create_transform(
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
                    _to_tensor,
                    transforms.Normalize(mean, std),
                ]
            )
        ]
    )


def eval_view(size: int, crop_ratio: float, mean: Sequence[float], std: Sequence[float]) -> MultiCrop:
    """The evaluation protocol: resize the short side to size / crop_ratio (256 for 224), bicubic, centre crop, one view."""
    return MultiCrop(
        [
            transforms.Compose(
                [
                    transforms.Resize(
                        round(size / crop_ratio), interpolation=transforms.InterpolationMode.BICUBIC, antialias=True
                    ),
                    transforms.CenterCrop(size),
                    _to_tensor,
                    transforms.Normalize(mean, std),
                ]
            )
        ]
    )


def check_normalisation(mean: Sequence[float], std: Sequence[float], in_chans: int) -> None:
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
