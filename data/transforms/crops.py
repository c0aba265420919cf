"""The workers' half of the split pipeline: one decoded image to uint8 crops, resized and flipped.

    transform, device_transform = split_views(crops, mean, std, strength)      # for the data set, and for batches of its samples

Bicubic interpolation with antialias runs on uint8 as it is, with Pillow's fixed-point weights. A crop costs its own pixels only:
nothing is converted before it is cut out, and what leaves a worker has a quarter of the bytes of float views.

Origin: multi-crop of SwAV (Caron et al., NeurIPS 2020); geometry by torchvision's RandomResizedCrop.
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
from data.transforms.photometric import DRAWS, Photometric
from data.transforms.recipe import ASPECT, FLIP, Crops, ViewSpec, dino_recipe


def split_views(
    crops: Crops, mean: Sequence[float], std: Sequence[float], strength: float
) -> tuple[ByteCrops, Photometric]:
    """DINO's views of color images in two halves; see `data.augment.dino_views` for both in one.

    Raises:
        UsageError: a strength of the color jitter outside 0..2.
    """
    recipe = dino_recipe(crops, strength)
    return ByteCrops(recipe.views), Photometric(recipe, tuple(mean), tuple(std))


class ByteCrops:
    """Image to its crops (3, size, size), uint8, and last a tensor (V, DRAWS) of uniform numbers, which decide their colors.

    Everything is drawn from torch's generator, which the data set has seeded for this image.
    """

    def __init__(self, views: Sequence[ViewSpec]) -> None:
        self.views = tuple(views)

    def __call__(self, image: ImageLike) -> list[Tensor]:
        assert isinstance(image, Image.Image), "the split pipeline is for color images"
        pixels_CHW = TF.pil_to_tensor(image)  # channels last in memory, for which the interpolation is twice as fast
        flips = (torch.rand(len(self.views)) < FLIP).tolist()
        crops = [_random_crop(pixels_CHW, view, flip) for view, flip in zip(self.views, flips)]
        return [*crops, torch.rand(len(self.views), DRAWS)]


def _random_crop(pixels_CHW: Tensor, view: ViewSpec, flip: bool) -> Tensor:
    """One view (3, size, size)."""
    top, left, height, width = RandomResizedCrop.get_params(pixels_CHW, list(view.scale), list(ASPECT))
    box = pixels_CHW[None, :, top : top + height, left : left + width]
    crop = F.interpolate(box, (view.size, view.size), mode="bicubic", antialias=True)[0]
    return crop.flip(-1) if flip else crop
