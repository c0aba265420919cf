"""The worker part of the `split` backend: from a decoded image to resized and flipped uint8 crops.

    transform, device_transform = split_views(recipe, mean, std)      # for the dataset, and for batches

Antialiased bicubic interpolation runs on uint8. A crop costs only its own pixels, since nothing is converted before it is cut
out, and the worker sends a quarter of the bytes of float views.

Origin: multi-crop of SwAV (Caron et al., NeurIPS 2020); crop boxes from torchvision's RandomResizedCrop.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF

from data.decode import ImageLike
from data.transforms.geometry import CropBox
from data.transforms.photometric import DRAWS, Photometric
from data.transforms.recipe import ASPECT, FLIP, Recipe, ViewSpec


def split_views(recipe: Recipe, mean: Sequence[float], std: Sequence[float]) -> tuple[ByteCrops, Photometric]:
    """Return the worker part and the device part of the transform to the views of a recipe, for color images."""
    return ByteCrops(recipe.views), Photometric(recipe, tuple(mean), tuple(std))


class ByteCrops:
    """Transform an image to its uint8 crops (3, size, size) and a tensor (V, DRAWS) of uniform numbers, which select their colors.

    All randomness comes from torch's generator, which the dataset seeds for each image.
    """

    def __init__(self, views: Sequence[ViewSpec]) -> None:
        self.views = tuple(views)

    def __call__(self, image: ImageLike) -> list[Tensor]:
        pixels_CHW = to_pixels(image)
        flips = (torch.rand(len(self.views)) < FLIP).tolist()
        crops = [
            resized_crop(pixels_CHW, random_box(pixels_CHW, view), view.size, flip)
            for view, flip in zip(self.views, flips)
        ]
        return [*crops, torch.rand(len(self.views), DRAWS)]


def to_pixels(image: ImageLike) -> Tensor:
    """Return the pixels (3, H, W) of a color image, channels last in memory, which doubles the speed of the interpolation."""
    assert isinstance(image, Image.Image), "the split backend is for color images"
    return TF.pil_to_tensor(image)


def random_box(pixels_CHW: Tensor, view: ViewSpec) -> CropBox:
    """Draw the crop box of a view."""
    return CropBox(*RandomResizedCrop.get_params(pixels_CHW, list(view.scale), list(ASPECT)))


def resized_crop(pixels_CHW: Tensor, box: CropBox, size: int, flip: bool) -> Tensor:
    """Return a crop resized to (3, size, size)."""
    cropped = pixels_CHW[None, :, box.top : box.top + box.height, box.left : box.left + box.width]
    crop = F.interpolate(cropped, (size, size), mode="bicubic", antialias=True)[0]
    return crop.flip(-1) if flip else crop
