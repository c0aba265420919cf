"""Images for analysis: loading at any size, scaling to whole regions, and pairs of views.

Shapes: C channels, H x W pixels.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Sequence
from itertools import chain, takewhile
from pathlib import Path, PurePath
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional as TF
from yacs.config import CfgNode

import data
from checkpoints.files import numbered
from checkpoints.serialization import load_file, write_file
from data.datasets import REPLACEMENT_TRIES, format_error
from data.decode import ImageLike, UndeclaredRange, decode_image
from data.layouts.sources import Files, Source
from data.transforms.augment import (
    MAX_ASPECT_RATIO,
    BrightnessContrast,
    MultiCrop,
    ViewTransform,
    as_tensor,
    limit_aspect_ratio,
)
from data.transforms.recipe import GRAY, JITTER, color_jitter
from models import Backbone
from utils import UsageError, counted, isolated_rng, logger

BICUBIC = transforms.InterpolationMode.BICUBIC
VIEW_SCALE = (0.4, 1.0)


class Picture(NamedTuple):
    """An image resized to whole regions of a network."""

    name: str  # of the file, without extension; unique among the selected pictures
    pixels_CHW: Tensor  # 0..1
    original_size: tuple[int, int]  # height and width of the file
    digest: str  # of the original pixels


class Selection(NamedTuple):
    """Pictures selected from a folder."""

    pictures: list[Picture]
    total: int  # images of the folder


class Scale(NamedTuple):
    """Size and normalization of the images of a network."""

    shorter_side: int
    region: tuple[int, int]  # height and width of a last-stage region in pixels
    mean: Sequence[float]
    std: Sequence[float]

    def size_for(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width to which an image is resized: whole regions, closest to its aspect ratio."""
        factor = self.shorter_side / min(height, width)
        sides = [max(1, round(side * factor / step)) * step for side, step in zip((height, width), self.region)]
        return sides[0], sides[1]

    def normalized(self, pixels_CHW: Tensor) -> Tensor:
        """Return the input (1, C, H, W) of the network."""
        return TF.normalize(pixels_CHW, list(self.mean), list(self.std)).unsqueeze(0)


@torch.no_grad()
def scale_of(backbone: Backbone, config: CfgNode, shorter_side: int | None, device: torch.device) -> Scale:
    """Return the scale of a network; the size of a region is measured at MODEL.IMAGE_SIZE.

    Raises:
        UsageError: `shorter_side` is smaller than a region.
    """
    height, width = config.MODEL.IMAGE_SIZE
    blank = torch.zeros(1, config.MODEL.SPEC.IN_CHANS, height, width, device=device)
    rows, columns = backbone.forward_blocks(blank)[-1].grid
    region = (max(1, round(height / rows)), max(1, round(width / columns)))
    side = min(height, width) if shorter_side is None else shorter_side
    if side < max(region):
        raise UsageError(
            f"--image_size {side} is less than {max(region)}, the size of a region of this network; raise it"
        )
    return Scale(side, region, config.INPUT.MEAN, config.INPUT.STD)


def as_picture(name: str, image: ImageLike, scale: Scale) -> Picture:
    """Resize a decoded image.

    Raises:
        ValueError: its aspect ratio is too large.
    """
    pixels_CHW = as_tensor(image)
    size = pixels_CHW.shape[1], pixels_CHW.shape[2]
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise ValueError(f"of {size[1]} x {size[0]} pixels, more than {MAX_ASPECT_RATIO} times as long as wide")
    digest = hashlib.sha256(f"{tuple(pixels_CHW.shape)}".encode() + pixels_CHW.contiguous().numpy().tobytes())
    resized = TF.resize(image, list(scale.size_for(*size)), interpolation=BICUBIC, antialias=True)
    return Picture(name, as_tensor(resized).clamp(0, 1), size, digest.hexdigest())


def load_pictures(
    path: str, count: int, scale: Scale, in_chans: int, layout: str = "files", value_range: Sequence[float] = ()
) -> Selection:
    """Load an image, or `count` images spread evenly over a folder (or its part `val`).

    An image of a folder that cannot be read is replaced by the next one, with a warning.

    Args:
        layout: of the folder, see data/datasets.py.
        value_range: INPUT.RANGE.

    Raises:
        UsageError: no images, or too many of them cannot be read.
    """
    if Path(path).is_file() and Path(path).suffix.lower() != ".txt":
        source: Source = Files([path])
    else:
        source = data.build_dataset(path, "val", lambda image: [], in_chans, layout=layout).source
    count = min(count, len(source))
    selected = [(2 * i + 1) * len(source) // (2 * count) for i in range(count)]
    found: dict[int, Picture] = {}
    failures: dict[int, str] = {}
    for index in selected:
        others = (i % len(source) for i in range(index + 1, index + len(source)))
        for candidate in chain([index], (other for other in others if other not in selected)):
            if len(failures) >= REPLACEMENT_TRIES or candidate in found or candidate in failures:
                continue
            try:
                image = decode_image(source.read(candidate), in_chans, value_range)
                found[candidate] = as_picture("", image, scale)
                break
            except UndeclaredRange as error:
                raise UndeclaredRange(f"{source.name(candidate)} {error}") from None
            except Exception as error:  # decoders raise errors of any type on damaged files
                failures[candidate] = f"cannot read the image {source.name(candidate)} ({format_error(error)})"
                if len(source) > 1:
                    logger.warning("%s; using another one", failures[candidate])
    if not found:
        more = f", nor {counted(len(failures) - 1, 'other')} tried" if len(failures) > 1 else ""
        raise UsageError(f"{next(iter(failures.values()))}{more}; choose other images")
    names = unique_names([printable(source.name(index)) for index in found])
    return Selection([found[index]._replace(name=name) for index, name in zip(found, names)], len(source))


def printable(name: str) -> str:
    """Return the name of a file as valid text, with escapes for bytes that are not UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def unique_names(files: Sequence[str]) -> list[str]:
    """Return a unique name for each file, as short as possible: without folders and extension, with them, or with a number."""
    paths = [PurePath(file) for file in files]
    folders = [path.parent.parts for path in paths]
    shared = sum(1 for _ in takewhile(lambda parts: len(set(parts)) == 1, zip(*folders)))
    whole = ["_".join([*path.parts[shared:-1], path.stem]) for path in paths]
    attempts = [
        [path.stem for path in paths] if len(set(folders)) == 1 else [],
        [f"{path.parent.name}_{path.stem}" for path in paths] if all(folders) else [],
        whole,
        [f"{name}_{path.suffix[1:]}" for name, path in zip(whole, paths)],
    ]
    unique = (names for names in attempts if len(set(names)) == len(files))
    return next(unique, [f"{number}_{name}" for number, name in enumerate(whole)])


# --------------------------------------------------------------------------- views


class RandomColors:
    """Color jitter and random grayscale; only brightness and contrast for images that are neither gray nor RGB."""

    def __init__(self, in_chans: int, strength: float = 0.4) -> None:
        ranges = color_jitter(strength)
        jitter = transforms.ColorJitter(*ranges) if in_chans in (1, 3) else BrightnessContrast(ranges)
        steps = [transforms.RandomApply([jitter], p=JITTER)]
        self.steps = transforms.Compose(steps + [transforms.RandomGrayscale(p=GRAY)] if in_chans == 3 else steps)

    def __call__(self, image: ImageLike) -> Tensor:
        return self.steps(image).clamp(0, 1)


class Views(NamedTuple):
    """Two images to compare, in 0..1."""

    first_CHW: Tensor
    second_CHW: Tensor
    description: str
    digest: str = ""  # of the original picture


def random_views(picture: Picture, seed: int) -> Views:
    """Return two random crops of a picture, resized to its size, with random flips and colors."""
    with isolated_rng(seed):
        views, boxes = [], []
        for _ in range(2):
            size = (picture.pixels_CHW.shape[1], picture.pixels_CHW.shape[2])
            box = transforms.RandomResizedCrop.get_params(
                picture.pixels_CHW, list(VIEW_SCALE), [0.75 * size[1] / size[0], 1.33 * size[1] / size[0]]
            )
            view = TF.resized_crop(picture.pixels_CHW, *box, size=list(size), interpolation=BICUBIC, antialias=True)
            flipped = random.random() < 0.5
            view = RandomColors(len(view))(TF.hflip(view) if flipped else view)
            views.append(view.clamp(0, 1))
            top, left, height, width = box
            boxes.append(f"rows {top}-{top + height}, columns {left}-{left + width}{', flipped' if flipped else ''}")
    return Views(views[0], views[1], f"{picture.name}, seed {seed}: {boxes[0]}; {boxes[1]}", picture.digest)


def save_views(views: Views, path: Path) -> None:
    """Save two views, to use them with another network."""
    content = {"first": views.first_CHW, "second": views.second_CHW, "made": views.description, "digest": views.digest}
    write_file(content, path)


def load_views(path: Path, in_chans: int) -> Views:
    """Load what `save_views` saved.

    Raises:
        UsageError: the file is missing or damaged, or the images have another number of channels.
    """
    content = load_file(path)
    first, second = content.get("first"), content.get("second")
    remedy = "leave --use_saved_aug out to make new ones"
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        raise UsageError(f"{path} has no saved views; {remedy}")
    if len(first) != in_chans or len(second) != in_chans:
        raise UsageError(f"the views in {path} have {len(first)} channels, this network takes {in_chans}; {remedy}")
    return Views(first, second, str(content.get("made", "")), str(content.get("digest", "")))


def saved_views(path: Path, picture: Picture, in_chans: int) -> Views:
    """Load the latest views of this picture among `path` and its numbered names.

    Raises:
        UsageError: there are none, they are of other pictures, or they cannot be read.
    """
    files = numbered(path)
    if not files:
        raise UsageError(
            f"--use_saved_aug needs {path}, which does not exist; run --vis_correspondence without it first"
        )
    for views in (load_views(file, in_chans) for file in reversed(files)):
        if views.digest == picture.digest:
            return views
    raise UsageError(
        f"{path} has views of another picture than {picture.name}; leave out --use_saved_aug to make new ones, or choose "
        "another --output_dir"
    )


def views_of_size(views: Views, scale: Scale) -> Views:
    """Resize both views to whole regions of a network, if needed."""
    sides = [scale.size_for(view.shape[1], view.shape[2]) for view in views[:2]]
    resized = [
        view if tuple(view.shape[1:]) == side else TF.resize(view, list(side), BICUBIC, antialias=True).clamp(0, 1)
        for view, side in zip(views[:2], sides)
    ]
    return views._replace(first_CHW=resized[0], second_CHW=resized[1])


def flip_views(size: tuple[int, int], in_chans: int, mean: Sequence[float], std: Sequence[float]) -> MultiCrop:
    """Return the transform to a center crop of `size` (height, width) and its horizontal flip with random colors."""

    def view(extra: list[ViewTransform]) -> ViewTransform:
        return transforms.Compose([FillAndCrop(size), as_tensor, *extra, transforms.Normalize(mean, std)])

    return MultiCrop([view([]), view([TF.hflip, RandomColors(in_chans)])])


def plain_view(size: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> MultiCrop:
    """Return the transform to a center crop of `size` (height, width)."""
    return MultiCrop([transforms.Compose([FillAndCrop(size), as_tensor, transforms.Normalize(mean, std)])])


class FillAndCrop:
    """Resize an image to cover `size` (height, width), and crop its center."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, image: ImageLike) -> ImageLike:
        image = limit_aspect_ratio(image)
        height, width = image.shape[1:] if isinstance(image, Tensor) else (image.height, image.width)
        factor = max(self.size[0] / height, self.size[1] / width)
        sides = [max(target, round(side * factor)) for target, side in zip(self.size, (height, width))]
        return TF.center_crop(TF.resize(image, sides, interpolation=BICUBIC, antialias=True), list(self.size))


def to_rgb(pixels_CHW: Tensor) -> Image.Image:
    """Convert pixels in 0..1 to an image: the first three channels as RGB, or the first one as gray."""
    pixels = pixels_CHW[:3] if len(pixels_CHW) >= 3 else pixels_CHW[:1].expand(3, -1, -1)
    return TF.to_pil_image(pixels.clamp(0, 1).cpu())
