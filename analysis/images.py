"""Images for analysis: read at any size, as networks and as people see them, in two views that can be kept.

Shapes: C channels, H x W pixels.
Origin: this project's own; the views follow DINO (Caron et al., ICCV 2021).
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
from data.datasets import REPLACEMENT_TRIES, reason_of
from data.decode import ImageLike, UndeclaredRange, decode_image
from data.layouts.sources import Files, Source
from data.transforms.augment import THIN, BrightnessContrast, MultiCrop, ViewTransform, as_tensor, middle_of_thin
from models import Backbone
from utils import UsageError, counted, isolated_rng, logger

BICUBIC = transforms.InterpolationMode.BICUBIC
VIEW_SCALE = (0.4, 1.0)


class Picture(NamedTuple):
    """An image resized to whole regions of a network."""

    name: str  # of the file, without its ending; no other picture that is looked at has it
    pixels_CHW: Tensor  # 0..1
    original_size: tuple[int, int]  # height and width of the file
    digest: str  # of the pixels of the file: the same photograph has the same one under every name


class Chosen(NamedTuple):
    """Images to look at, and how many there are to choose from."""

    some: list[Picture]
    of: int


class Scale(NamedTuple):
    """What a network takes: sides of whole regions, and the normalization."""

    shorter_side: int
    region: tuple[int, int]  # height and width of a last-stage region in pixels
    mean: Sequence[float]
    std: Sequence[float]

    def size_for(self, height: int, width: int) -> tuple[int, int]:
        """The sides nearest to an image's shape whose shorter one is as wanted, in whole regions."""
        factor = self.shorter_side / min(height, width)
        sides = [max(1, round(side * factor / step)) * step for side, step in zip((height, width), self.region)]
        return sides[0], sides[1]

    def normalized(self, pixels_CHW: Tensor) -> Tensor:
        """(1, C, H, W) as the network takes it."""
        return TF.normalize(pixels_CHW, list(self.mean), list(self.std)).unsqueeze(0)


@torch.no_grad()
def scale_of(backbone: Backbone, config: CfgNode, shorter_side: int | None, device: torch.device) -> Scale:
    """The scale at which a network looks; a region's size is measured at MODEL.IMAGE_SIZE.

    Raises:
        UsageError: a side below a region's.
    """
    height, width = config.MODEL.IMAGE_SIZE
    blank = torch.zeros(1, config.MODEL.SPEC.IN_CHANS, height, width, device=device)
    rows, columns = backbone.forward_blocks(blank)[-1].grid
    region = (max(1, round(height / rows)), max(1, round(width / columns)))
    side = min(height, width) if shorter_side is None else shorter_side
    if side < max(region):
        raise UsageError(f"--image_size {side} is below one region of this network, {max(region)} pixels")
    return Scale(side, region, config.INPUT.MEAN, config.INPUT.STD)


def as_picture(name: str, image: ImageLike, scale: Scale) -> Picture:
    """An image that is there already, resized.

    Raises:
        ValueError: it is too thin to be shown whole.
    """
    pixels_CHW = as_tensor(image)
    size = pixels_CHW.shape[1], pixels_CHW.shape[2]
    if max(size) > THIN * min(size):
        raise ValueError(f"of {size[1]} x {size[0]} pixels, more than {THIN} times as long as wide")
    digest = hashlib.sha256(f"{tuple(pixels_CHW.shape)}".encode() + pixels_CHW.contiguous().numpy().tobytes())
    resized = TF.resize(image, list(scale.size_for(*size)), interpolation=BICUBIC, antialias=True)
    return Picture(name, as_tensor(resized).clamp(0, 1), size, digest.hexdigest())


def load_pictures(
    path: str, count: int, scale: Scale, in_chans: int, layout: str = "files", value_range: Sequence[float] = ()
) -> Chosen:
    """The file itself, or `count` images spread evenly over a folder (or its part `val`), under names of their own.

    Of a folder the next image takes the place of one that cannot be read, which is named.

    Args:
        layout: of the folder, see data/datasets.py.
        value_range: INPUT.RANGE, see `decode_image`.

    Raises:
        UsageError: nothing is there, the one image that is named cannot be read, or too many cannot.
    """
    if Path(path).is_file() and Path(path).suffix.lower() != ".txt":
        source: Source = Files([path])
    else:
        source = data.build_dataset(path, "val", lambda image: [], in_chans, layout=layout).source
    count = min(count, len(source))
    wanted = [(2 * i + 1) * len(source) // (2 * count) for i in range(count)]
    found: dict[int, Picture] = {}
    failures: dict[int, str] = {}
    for index in wanted:
        others = (i % len(source) for i in range(index + 1, index + len(source)))
        for candidate in chain([index], (other for other in others if other not in wanted)):
            if len(failures) >= REPLACEMENT_TRIES or candidate in found or candidate in failures:
                continue
            try:
                image = decode_image(source.read(candidate), in_chans, value_range)
                found[candidate] = as_picture("", image, scale)
                break
            except UndeclaredRange as error:
                raise UndeclaredRange(f"{source.name(candidate)} {error}") from None
            except Exception as error:  # on damaged bytes decoders raise whatever they stumble over
                failures[candidate] = f"cannot read the image {source.name(candidate)} ({reason_of(error)})"
                if len(source) > 1:
                    logger.warning("%s; another one takes its place", failures[candidate])
    if not found:
        more = f", nor {counted(len(failures) - 1, 'other')} tried" if len(failures) > 1 else ""
        raise UsageError(f"{next(iter(failures.values()))}{more}; name another one")
    names = unique_names([printable(source.name(index)) for index in found])
    return Chosen([found[index]._replace(name=name) for index, name in zip(found, names)], len(source))


def printable(name: str) -> str:
    """The name of a file as text that can be written and shown, also where it is not UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def unique_names(files: Sequence[str]) -> list[str]:
    """A name for each file, as short as tells them apart: without folders and ending, with them, or with a number."""
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
    told_apart = (names for names in attempts if len(set(names)) == len(files))
    return next(told_apart, [f"{number}_{name}" for number, name in enumerate(whole)])


# --------------------------------------------------------------------------- views


class RandomColors:
    """Color jitter and sometimes gray; brightness and contrast only where channels are no colors."""

    def __init__(self, in_chans: int, strength: float = 0.4) -> None:
        colors = transforms.ColorJitter(strength, strength, strength / 2, strength / 4)
        jitter = colors if in_chans in (1, 3) else BrightnessContrast(strength)
        steps = [transforms.RandomApply([jitter], p=0.8)]
        self.steps = transforms.Compose(steps + [transforms.RandomGrayscale(p=0.2)] if in_chans == 3 else steps)

    def __call__(self, image: ImageLike) -> Tensor:
        return self.steps(image).clamp(0, 1)


class Views(NamedTuple):
    """Two images to compare, in 0..1, and how they were made."""

    first_CHW: Tensor
    second_CHW: Tensor
    made: str
    digest: str = ""  # of the picture that both were cut from


def random_views(picture: Picture, seed: int) -> Views:
    """Two random crops of a picture, of its size, with a flip and colors; `seed` decides everything."""
    with isolated_rng(seed):
        views, told = [], []
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
            told.append(f"rows {top}-{top + height}, columns {left}-{left + width}{', flipped' if flipped else ''}")
    return Views(views[0], views[1], f"{picture.name}, seed {seed}: {told[0]}; {told[1]}", picture.digest)


def save_views(views: Views, path: Path) -> None:
    """Keep two views for another network; see `serialization.write_file`."""
    content = {"first": views.first_CHW, "second": views.second_CHW, "made": views.made, "digest": views.digest}
    write_file(content, path)


def load_views(path: Path, in_chans: int) -> Views:
    """What `save_views` kept.

    Raises:
        UsageError: the file is missing, damaged or of images with other channels.
    """
    content = load_file(path)
    first, second = content.get("first"), content.get("second")
    remedy = "leave --use_saved_aug out to make new ones"
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        raise UsageError(f"{path} holds no saved views; {remedy}")
    if len(first) != in_chans or len(second) != in_chans:
        raise UsageError(f"the views in {path} have {len(first)} channels, this network takes {in_chans}; {remedy}")
    return Views(first, second, str(content.get("made", "")), str(content.get("digest", "")))


def saved_views(path: Path, picture: Picture, in_chans: int) -> Views:
    """Of the views kept under `path` and its numbered names the last ones of this picture.

    Raises:
        UsageError: none are there, those that are show another picture, or they cannot be read.
    """
    files = numbered(path)
    if not files:
        raise UsageError(f"--use_saved_aug finds no {path}; run --vis_correspondence without it first")
    for views in (load_views(file, in_chans) for file in reversed(files)):
        if views.digest == picture.digest:
            return views
    raise UsageError(
        f"--use_saved_aug finds views of another picture than {picture.name} in {path}; "
        "leave it out to make new ones, or name another --output_dir"
    )


def views_of_size(views: Views, scale: Scale) -> Views:
    """Both views resized to whole regions of a network; one that fits stays as it is."""
    sides = [scale.size_for(view.shape[1], view.shape[2]) for view in views[:2]]
    resized = [
        view if tuple(view.shape[1:]) == side else TF.resize(view, list(side), BICUBIC, antialias=True).clamp(0, 1)
        for view, side in zip(views[:2], sides)
    ]
    return views._replace(first_CHW=resized[0], second_CHW=resized[1])


def flip_views(size: tuple[int, int], in_chans: int, mean: Sequence[float], std: Sequence[float]) -> MultiCrop:
    """The image, cut to `size` (height, width) from its center, and its horizontal flip with jittered colors or gray."""

    def view(extra: list[ViewTransform]) -> ViewTransform:
        return transforms.Compose([FillAndCrop(size), as_tensor, *extra, transforms.Normalize(mean, std)])

    return MultiCrop([view([]), view([TF.hflip, RandomColors(in_chans)])])


def plain_view(size: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> MultiCrop:
    """The image, cut to `size` (height, width) from its center."""
    return MultiCrop([transforms.Compose([FillAndCrop(size), as_tensor, transforms.Normalize(mean, std)])])


class FillAndCrop:
    """Resize an image so that it just covers `size` (height, width), and cut its center."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, image: ImageLike) -> ImageLike:
        image = middle_of_thin(image)
        height, width = image.shape[1:] if isinstance(image, Tensor) else (image.height, image.width)
        factor = max(self.size[0] / height, self.size[1] / width)
        sides = [max(wanted, round(side * factor)) for wanted, side in zip(self.size, (height, width))]
        return TF.center_crop(TF.resize(image, sides, interpolation=BICUBIC, antialias=True), list(self.size))


def shown(pixels_CHW: Tensor) -> Image.Image:
    """An image of any number of channels as a person may look at it."""
    pixels = pixels_CHW[:3] if len(pixels_CHW) >= 3 else pixels_CHW[:1].expand(3, -1, -1)
    return TF.to_pil_image(pixels.clamp(0, 1).cpu())
