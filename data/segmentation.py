"""Images with segmentation masks: reading and checking them, and the crops of training and evaluation.

A mask is a one-channel PNG of 8 bits (gray or with a palette) whose values are class numbers, or void for pixels without a class.
In memory void is `VOID` and the classes are 0 .. K - 1.

Shapes: C channels, H x W pixels, K classes.
Origin: the augmentation is the common one of linear segmentation (DINOv2, Oquab et al., 2023, after mmsegmentation) without its
color distortion: scale by a random factor, random crop, random flip.
"""

from __future__ import annotations

import hashlib
import io
import math
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF
from tqdm import tqdm

from data.datasets import FatalFailure, ImageDataset, Sample, format_error
from data.decode import ORIENTATION, ImageLike, UndeclaredRange, decode_image, open_image
from data.integrity import PNG
from data.layouts.masks import Pair
from data.layouts.sources import UNLABELED, Files, read_file
from data.transforms.augment import as_tensor
from distributed import collectives
from utils import UsageError, isolated_rng

VOID = 255
MAX_CLASSES = 255
SCALES = (0.5, 2.0)
FLIP = 0.5

Size = tuple[int, int]  # height and width
PairTransform = Callable[[ImageLike, np.ndarray], tuple[Tensor, Tensor]]  # to (C, H, W) and (H, W)


# --------------------------------------------------------------------------- masks


class MaskCoding(NamedTuple):
    """What the values of masks mean."""

    classes: int
    ignore_index: int = VOID
    reduce_zero_label: bool = False  # 0 is void too, and class numbers start at 1

    def decode(self, values_HW: np.ndarray, path: str) -> np.ndarray:
        """Return class numbers from 0 and `VOID`.

        Raises:
            UsageError: a value is neither a class nor void.
        """
        first = int(self.reduce_zero_label)
        table = np.full(256, -1, dtype=np.int16)
        table[first : first + self.classes] = np.arange(self.classes)[: 256 - first]
        table[self.ignore_index] = VOID
        table[:first] = VOID
        decoded_HW = table[values_HW]
        if (decoded_HW < 0).any():
            void = f"--ignore_index {self.ignore_index}" + (" or 0" if first else "")
            raise UsageError(
                f"{path} has the value {values_HW[decoded_HW < 0][0]}, which is neither a class ({first} to "
                f"{first + self.classes - 1}) nor void ({void}); correct --classes or --ignore_index, or the mask"
            )
        return decoded_HW.astype(np.uint8)


def read_mask(path: str) -> np.ndarray:
    """Return the values (H, W) of a mask as bytes.

    Raises:
        UsageError: it cannot be read, has colors instead of class numbers, or more than 8 bits.
    """
    try:
        content = read_file(path)
        with open_image(io.BytesIO(content)) as image:
            image.load()
            mode, values = image.mode, np.asarray(image)
    except Exception as error:  # decoders raise anything on damaged bytes
        raise UsageError(f"{path} cannot be read ({format_error(error)}); replace or remove it") from None
    if mode not in ("1", "L", "P"):
        kind = "has more than 8 bits" if mode.startswith(("I", "F")) else f"is a color image (mode {mode})"
        raise UsageError(f"{path} {kind}; save masks as one-channel PNG of 8 bits with class numbers as values")
    bits, color = content[24:26] if content.startswith(PNG) else (8, 0)
    if mode == "L" and color == 0 and bits < 8:  # Pillow scales gray of 2 and 4 bits to 0..255
        values = values // (255 // (2**bits - 1))
    return values.astype(np.uint8)


class MaskFacts(NamedTuple):
    """What is known about a mask before training."""

    size: Size
    values: tuple[int, ...]
    digest: str


def inspect_pairs(pairs: Sequence[Pair], threads: int, label: str) -> list[MaskFacts]:
    """Read every mask once, a share on each process; a collective operation.

    Args:
        threads: of this process.
        label: of the progress bar.

    Raises:
        UsageError: a mask cannot be used, or differs in size from its image.
    """
    rank, world = collectives.get_rank(), collectives.get_world_size()
    with collectives.failing_together(), ThreadPoolExecutor(max(threads, 1)) as pool:
        own = pairs[rank::world]
        quiet = None if collectives.is_main_process() else True
        facts = list(tqdm(pool.map(_inspect, own), total=len(own), desc=label, disable=quiet, leave=False))
    parts = collectives.all_gather_objects(facts)
    return [parts[index % world][index // world] for index in range(len(pairs))]


def _inspect(pair: Pair) -> MaskFacts:
    values_HW = read_mask(pair.mask)
    size = values_HW.shape[0], values_HW.shape[1]
    check_sizes(pair, _header_size(pair.image) or size, size)
    digest = hashlib.sha256(repr(size).encode() + values_HW.tobytes()).hexdigest()
    return MaskFacts(size, tuple(np.unique(values_HW).tolist()), digest)


def _header_size(path: str) -> Size | None:
    """Return the size of an upright image from its header; None if Pillow cannot read it (compared after decoding)."""
    try:
        with open_image(path) as image:
            turned = image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
            return (image.width, image.height) if turned else (image.height, image.width)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        return None


def check_sizes(pair: Pair, image: Size, mask: Size) -> None:
    """Raise UsageError if an image and its mask differ in size."""
    if image != mask:
        raise UsageError(
            f"{pair.mask} has {mask[1]} x {mask[0]} pixels, {pair.image} has {image[1]} x {image[0]}; "
            "masks must have the size of their image"
        )


# --------------------------------------------------------------------------- dataset


class SegmentationDataset(ImageDataset):
    """Images and masks. A sample has one view (C, H, W), and as its label the mask (H, W) in bytes.

    Unlike in other data sets an unreadable image is not replaced, and ends the run.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        coding: MaskCoding,
        classes: Sequence[str],
        transform: PairTransform,
        in_chans: int = 3,
        seed: int = 0,
        value_range: Sequence[float] = (),
    ) -> None:
        unlabeled = np.full(len(pairs), UNLABELED)
        super().__init__(
            Files([pair.image for pair in pairs]), unlabeled, classes, whole_view, in_chans, seed, value_range
        )
        self.pairs, self.coding, self.pair_transform = list(pairs), coding, transform

    def __getitem__(self, index: int) -> Sample:
        with isolated_rng(self.seed, self.epoch, index):
            try:
                image_CHW, mask_HW = self.pair_transform(*self.load(index))
            except UsageError as error:
                return Sample([], UNLABELED, index, (FatalFailure(str(error)),))
            return Sample([image_CHW], mask_HW, index, ())

    def load(self, index: int) -> tuple[ImageLike, np.ndarray]:
        """Return an image, and the classes of its pixels.

        Raises:
            UsageError: one of them cannot be read, or their sizes differ.
        """
        pair = self.pairs[index]
        try:
            image = decode_image(self.source.read(index), self.in_chans, self.value_range)
        except UndeclaredRange as error:
            raise UndeclaredRange(f"{pair.image} {error}") from None
        except Exception as error:  # decoders raise anything on damaged bytes
            raise UsageError(f"{pair.image} cannot be read ({format_error(error)}); replace or remove it") from None
        mask_HW = self.coding.decode(read_mask(pair.mask), pair.mask)
        check_sizes(pair, size_of(image), (mask_HW.shape[0], mask_HW.shape[1]))
        return image, mask_HW


def whole_view(image: ImageLike) -> list[Tensor]:
    """Return an image as the only view."""
    return [as_tensor(image)]


# --------------------------------------------------------------------------- transforms


def size_of(image: ImageLike) -> Size:
    """Return height and width."""
    return (image.shape[1], image.shape[2]) if isinstance(image, Tensor) else (image.height, image.width)


def resized(size: Size, shorter_side: int | None, factor: float = 1.0) -> Size:
    """Return the size of an image that is resized to a shorter side (None keeps its size), and then by a factor."""
    factor *= shorter_side / min(size) if shorter_side else 1.0
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


class WholeImage:
    """The whole image, resized to a shorter side, and its mask at full resolution.

    Args:
        shorter_side: None keeps the size.
        mean, std: normalization.
    """

    def __init__(self, shorter_side: int | None, mean: Sequence[float], std: Sequence[float]) -> None:
        self.shorter_side, self.mean, self.std = shorter_side, list(mean), list(std)

    def __call__(self, image: ImageLike, mask_HW: np.ndarray) -> tuple[Tensor, Tensor]:
        scaled = _resize_image(image, resized(size_of(image), self.shorter_side))
        return TF.normalize(as_tensor(scaled), self.mean, self.std), torch.from_numpy(mask_HW)


class CropPair:
    """A crop of fixed size of an image and its mask, padded with the mean color and void on the right and at the bottom.

    Args:
        crop: its size.
        shorter_side: of the image before the crop; None keeps its size.
        mean, std: normalization.
        augment: scale by a random factor, crop at a random position and flip; else crop the center.
    """

    def __init__(
        self, crop: Size, shorter_side: int | None, mean: Sequence[float], std: Sequence[float], augment: bool
    ) -> None:
        self.crop, self.shorter_side, self.mean, self.std = crop, shorter_side, list(mean), list(std)
        self.augment = augment

    def __call__(self, image: ImageLike, mask_HW: np.ndarray) -> tuple[Tensor, Tensor]:
        factor = random.uniform(*SCALES) if self.augment else 1.0
        size = resized(size_of(image), self.shorter_side, factor)
        pixels = TF.normalize(as_tensor(_resize_image(image, size)), self.mean, self.std)
        labels = np.asarray(Image.fromarray(mask_HW).resize((size[1], size[0]), Image.Resampling.NEAREST))
        room = [max(0, side - length) for side, length in zip(size, self.crop)]
        top, left = (random.randint(0, free) if self.augment else free // 2 for free in room)
        rows, columns = slice(top, top + self.crop[0]), slice(left, left + self.crop[1])
        pixels, mask = pixels[:, rows, columns], torch.from_numpy(labels[rows, columns].copy())
        below, right = self.crop[0] - mask.shape[0], self.crop[1] - mask.shape[1]
        pixels = torch.nn.functional.pad(pixels, (0, right, 0, below))
        mask = torch.nn.functional.pad(mask, (0, right, 0, below), value=VOID)
        if self.augment and random.random() < FLIP:
            pixels, mask = pixels.flip(-1), mask.flip(-1)
        return pixels, mask


def _resize_image(image: ImageLike, size: Size) -> ImageLike:
    if size == size_of(image):
        return image
    return TF.resize(image, list(size), InterpolationMode.BILINEAR, antialias=True)


def crop_size(sizes: Sequence[Size], window: int, multiple: int) -> Size:
    """Return the size of training crops: `window`, but on no axis more than the largest image rounded up to `multiple`."""
    largest = [max(size[axis] for size in sizes) for axis in (0, 1)]
    height, width = (min(window, multiple * math.ceil(side / multiple)) for side in largest)
    return height, width
