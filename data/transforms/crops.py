"""The worker part of the `split` backend: from a decoded image to resized and flipped uint8 crops.

    transform, device_transform = split_views(recipe, mean, std)      # for the dataset, and for batches

Antialiased bicubic interpolation runs on uint8. A crop costs only its own pixels, since nothing is converted before it is cut
out, and the worker sends a quarter of the bytes of float views.

With --decode scaled, a JPEG whose crops all have more pixels than their views need is decoded at a fraction of its size
(`ScaledCrops`). The boxes are drawn from the size in its header, so that they are those of --decode full.

Origin: multi-crop of SwAV (Caron et al., NeurIPS 2020); crop boxes of torchvision's RandomResizedCrop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as TF

from data.decode import REDUCTIONS, ImageLike, decode_image, jpeg_size
from data.transforms.geometry import CropBox
from data.transforms.photometric import DRAWS, Photometric
from data.transforms.recipe import ASPECT, FLIP, Recipe, ViewSpec

LOG_ASPECT = tuple(torch.log(torch.tensor(ASPECT)).tolist())  # rounded as in RandomResizedCrop
BOX_TRIES = 10  # of RandomResizedCrop, before it takes a crop at the center


class Placement(NamedTuple):
    """Where the crops of an image are, and which of them are flipped."""

    boxes: list[CropBox]
    flips: list[bool]


class ScaledImage(NamedTuple):
    """A color image, decoded whole or at a fraction of its size."""

    image: ImageLike
    size: tuple[int, int] | None = None  # height and width of the whole image; None: those of `image`
    reduction: int = 1


@runtime_checkable
class CropTransform(Protocol):
    """A transform of color images to crops, which are placed by the size of the image alone."""

    views: tuple[ViewSpec, ...]

    def draw_placement(self, size: tuple[int, int]) -> Placement:
        """Draw the placement in an image of `size` (height, width), with the first random numbers of a sample."""

    def __call__(self, image: ImageLike, size: tuple[int, int] | None = None, reduction: int = 1) -> list[Tensor]:
        """Transform an image, which is decoded at 1 / `reduction` of its `size`; default: whole."""


def split_views(recipe: Recipe, mean: Sequence[float], std: Sequence[float]) -> tuple[ByteCrops, Photometric]:
    """Return the worker part and the device part of the transform to the views of a recipe, for color images."""
    return ByteCrops(recipe.views), Photometric(recipe, tuple(mean), tuple(std))


class ByteCrops:
    """Transform an image to its uint8 crops (3, size, size) and a tensor (V, DRAWS) of uniform numbers, which select their colors.

    All randomness comes from torch's generator, which the dataset seeds for each image.
    """

    def __init__(self, views: Sequence[ViewSpec]) -> None:
        self.views = tuple(views)

    def draw_placement(self, size: tuple[int, int]) -> Placement:
        flips = (torch.rand(len(self.views)) < FLIP).tolist()
        return Placement([random_box(size, view) for view in self.views], flips)

    def __call__(self, image: ImageLike, size: tuple[int, int] | None = None, reduction: int = 1) -> list[Tensor]:
        pixels_CHW = to_pixels(image)
        placement = self.draw_placement(size or (pixels_CHW.shape[1], pixels_CHW.shape[2]))
        return [*cut_crops(pixels_CHW, self.views, placement, reduction), torch.rand(len(self.views), DRAWS)]


class ScaledCrops:
    """A transform whose JPEG images are decoded at the smallest size that upsamples no crop."""

    def __init__(self, crops: CropTransform) -> None:
        self.crops = crops

    def decode(self, content: bytes, value_range: Sequence[float]) -> ScaledImage:
        """Decode an image for the crops that the next call will draw; raises the errors of `decode_image`."""
        size = jpeg_size(content)
        if size is None or min(size) < REDUCTIONS[-1] * max(view.size for view in self.crops.views):
            return ScaledImage(decode_image(content, 3, value_range))
        with torch.random.fork_rng(devices=()):
            boxes = self.crops.draw_placement(size).boxes
        reduction = largest_reduction(boxes, self.crops.views)
        return ScaledImage(decode_image(content, 3, value_range, reduction), size, reduction)

    def __call__(self, scaled: ScaledImage) -> list[Tensor]:
        return self.crops(*scaled)


def largest_reduction(boxes: Sequence[CropBox], views: Sequence[ViewSpec]) -> int:
    """Return the largest of `REDUCTIONS` with which no crop has fewer pixels than its view on a side; 1 if there is none."""
    for reduction in REDUCTIONS:
        reduced = [reduced_box(box, reduction) for box in boxes]
        if all(min(box.height, box.width) >= view.size for box, view in zip(reduced, views)):
            return reduction
    return 1


def reduced_box(box: CropBox, reduction: int) -> CropBox:
    """Return a box in an image decoded at 1 / `reduction` of its size, its edges rounded to pixels."""
    top, bottom, left, right = (
        round(edge / reduction) for edge in (box.top, box.top + box.height, box.left, box.left + box.width)
    )
    return CropBox(top, left, bottom - top, right - left)


def to_pixels(image: ImageLike) -> Tensor:
    """Return the pixels (3, H, W) of a color image, channels last in memory, which doubles the speed of the interpolation."""
    assert isinstance(image, Image.Image), "the split backend is for color images"
    return TF.pil_to_tensor(image)


def random_box(size: tuple[int, int], view: ViewSpec) -> CropBox:
    """Draw the crop box of a view in an image of `size` (height, width).

    Same random numbers and boxes as `RandomResizedCrop.get_params`, in a quarter of the time.
    """
    height, width = size
    for _ in range(BOX_TRIES):
        area = height * width * torch.empty(1).uniform_(*view.scale).item()
        aspect = torch.empty(1).uniform_(*LOG_ASPECT).exp_().item()
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top, left = torch.randint(height - crop_height + 1, (1,)), torch.randint(width - crop_width + 1, (1,))
            return CropBox(int(top), int(left), crop_height, crop_width)
    narrowest, widest = ASPECT
    crop_height, crop_width = min(height, round(width / narrowest)), min(width, round(height * widest))
    return CropBox((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)


def cut_crops(pixels_CHW: Tensor, views: Sequence[ViewSpec], placement: Placement, reduction: int) -> list[Tensor]:
    """Return the crops (3, size, size) of an image decoded at 1 / `reduction` of its size."""
    return [
        resized_crop(pixels_CHW, reduced_box(box, reduction), view.size, flip)
        for box, flip, view in zip(*placement, views)
    ]


def resized_crop(pixels_CHW: Tensor, box: CropBox, size: int, flip: bool) -> Tensor:
    """Return a crop resized to (3, size, size)."""
    cropped = pixels_CHW[None, :, box.top : box.top + box.height, box.left : box.left + box.width]
    crop = F.interpolate(cropped, (size, size), mode="bicubic", antialias=True)[0]
    return crop.flip(-1) if flip else crop
