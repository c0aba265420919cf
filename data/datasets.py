"""Images on disk: what a data path holds, and how one file becomes pixels.

    dataset = build_dataset("photos/", "train", transform)     # class folders, loose files or a text file of paths
    sample = dataset[0]                                        # views, label, index, failures

Reading never ends a run by itself: an unreadable file is replaced by another sample and named in `Sample.failures`.

Origin: this project's own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from utils import UsageError, isolated_rng

EXTENSIONS = (*IMG_EXTENSIONS, ".npy")
UNLABELLED = -1
REPLACEMENT_TRIES = 20

ImageLike = Image.Image | Tensor
Transform = Callable[[ImageLike], list[Tensor]]


class Sample(NamedTuple):
    """One image, seen through the transform."""

    views: list[Tensor]  # each (C, H, W); empty when no replacement could be read either
    label: int  # UNLABELLED without classes
    image_index: int  # of the image asked for
    failures: tuple[str, ...]  # "path: reason" (no ": " in it) of every unreadable file on the way


class ImageDataset(Dataset[Sample]):
    """A list of image files with labels.

    What a sample looks like depends on (`seed`, `epoch`, index) alone; set `epoch` before each pass.

    Args:
        paths, labels: one entry an image.
        classes: the names that labels index; empty without labels.
        transform: image to views.
        in_chans: channels; 1 and 3 give the transform a PIL image, other numbers a float tensor (C, H, W) in 0..1.
        seed: base of every sample's randomness.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: Sequence[int],
        classes: Sequence[str],
        transform: Transform,
        in_chans: int = 3,
        seed: int = 0,
    ) -> None:
        # Arrays, not lists of objects: forked workers then share their pages instead of copying them.
        self.paths = np.asarray(paths, dtype=np.bytes_ if all(p.isascii() for p in paths) else np.str_)
        self.labels = np.asarray(labels, dtype=np.int64)
        self.classes = tuple(classes)
        self.transform = transform
        self.in_chans = in_chans
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.paths)

    def use_classes(self, classes: Sequence[str]) -> None:
        """Number the labels by `classes`, which must hold all of this data set's own."""
        self.labels = np.asarray([classes.index(self.classes[label]) for label in self.labels], dtype=np.int64)
        self.classes = tuple(classes)

    def path(self, index: int) -> str:
        """The file of an image."""
        stored = self.paths[index]
        return stored.decode() if isinstance(stored, bytes) else str(stored)

    def __getitem__(self, index: int) -> Sample:
        failures: list[str] = []
        with isolated_rng(self.seed, self.epoch, index):
            chosen = index
            for _ in range(REPLACEMENT_TRIES):
                path = self.path(chosen)
                try:
                    image = read_image(path, self.in_chans)
                except Exception as error:  # on damaged bytes decoders raise whatever they stumble over
                    reason = " ".join(str(error).replace(": ", " ").split()) or type(error).__name__
                    failures.append(f"{path}: {reason}")
                    chosen = int(np.random.randint(len(self)))
                    continue
                return Sample(self.transform(image), int(self.labels[chosen]), index, tuple(failures))
        return Sample([], UNLABELLED, index, tuple(failures))


def read_image(path: str, in_chans: int) -> ImageLike:
    """Decode one file.

    Returns:
        for 1 or 3 channels a PIL image of mode L or RGB; otherwise a float tensor (in_chans, H, W), with 0..1 standing for
        the full range of integer files.

    Raises:
        Exception: of any kind, on damaged files.
    """
    if os.path.getsize(path) == 0:
        raise ValueError("the file is empty")
    name = path.lower()
    if name.endswith(".npy"):
        pixels_CHW = _to_tensor(np.load(path, allow_pickle=False), in_chans)
        return _to_pil(pixels_CHW) if in_chans in (1, 3) else pixels_CHW
    if in_chans not in (1, 3) and name.endswith((".tif", ".tiff")):
        return _to_tensor(tifffile.imread(path), in_chans)
    with Image.open(path) as file:
        if in_chans in (1, 3):
            return _eight_bit(file).convert("RGB" if in_chans == 3 else "L")
        return _to_tensor(np.asarray(file), in_chans)


def _to_pil(pixels_CHW: Tensor) -> Image.Image:
    """One or three channels in 0..1 as an 8-bit image."""
    pixels = (pixels_CHW.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey images, and floats in 0..1, scaled to 8 bits; Pillow's own conversion would clip them."""
    if image.mode == "F":
        return Image.fromarray((np.asarray(image).clip(0, 1) * 255).round().astype(np.uint8))
    if image.mode.startswith("I;16") or image.mode == "I":
        pixels = np.asarray(image).astype(np.float64) / 65535 * 255
        return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    return image


def _to_tensor(pixels: np.ndarray, in_chans: int) -> Tensor:
    """(H, W), (H, W, C) or (C, H, W) pixels to a float tensor (C, H, W)."""
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.ndim == 3 and pixels.shape[2] != in_chans and pixels.shape[0] == in_chans:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim != 3 or pixels.shape[2] != in_chans or pixels.size == 0:
        raise ValueError(f"the array has shape {pixels.shape}, {in_chans} channels are wanted")
    if np.issubdtype(pixels.dtype, np.floating) and not np.isfinite(pixels).all():
        raise ValueError("the array holds values that are not finite")
    scale = float(np.iinfo(pixels.dtype).max) if np.issubdtype(pixels.dtype, np.integer) else 1.0
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32) / np.float32(scale))


# --------------------------------------------------------------------------- finding images


def build_dataset(
    data_path: str | Path,
    split: str,
    transform: Transform,
    in_chans: int = 3,
    seed: int = 0,
    need_labels: bool = False,
) -> ImageDataset:
    """The images under `data_path`.

    `data_path` may be a folder with a sub-folder named `split` (then that one counts), a folder of class folders, a flat or
    nested folder without classes, or a text file with one path a line, relative to the file itself.
    Images are labelled when each lies in a sub-folder: the first folder below the root is the class.

    Args:
        split: `train` or `val`.
        need_labels: images without classes are an error.

    Raises:
        UsageError: the path is missing or holds no image, or no class where labels are needed.
    """
    root = Path(data_path)
    if not str(data_path) or not root.exists():
        raise UsageError(
            f"data path '{data_path}' does not exist; --data_path takes a folder of images or a text file of paths"
        )
    if root.is_file():
        paths, relative = _read_path_list(root), []
    else:
        if (root / split).is_dir():
            root = root / split
        elif need_labels and (root / ("val" if split == "train" else "train")).is_dir():
            raise UsageError(
                f"{root} has no folder '{split}' beside the other one; evaluation needs DIR/train and DIR/val"
            )
        relative = _find_images(root)
        paths = [str(root / name) for name in relative]
    if not paths and root.is_file():
        raise UsageError(f"{root} names no path; it takes the path of one image a line")
    if not paths:
        raise UsageError(
            f"no image found under {root}; looked in all sub-folders for files ending in {' '.join(EXTENSIONS)}"
        )
    class_of_path = [name.split(os.sep, 1)[0] for name in relative if os.sep in name]
    if len(class_of_path) < len(paths):
        if need_labels:
            raise UsageError(f"{root} has images without a class; evaluation needs DIR/{{train,val}}/<class>/<image>")
        return ImageDataset(paths, [UNLABELLED] * len(paths), (), transform, in_chans, seed)
    classes = sorted(set(class_of_path))
    index_of_class = {name: i for i, name in enumerate(classes)}
    return ImageDataset(paths, [index_of_class[c] for c in class_of_path], classes, transform, in_chans, seed)


def _find_images(root: Path) -> list[str]:
    """Image files below `root`, relative to it, sorted; links to folders are followed, but not in a circle."""
    found = []
    for folder, subfolders, files in os.walk(root, followlinks=True):
        parents = {os.path.realpath(folder)} | {os.path.realpath(p) for p in Path(folder).parents}
        visible = sorted(name for name in subfolders if not name.startswith("."))
        subfolders[:] = [name for name in visible if os.path.realpath(os.path.join(folder, name)) not in parents]
        found += [os.path.relpath(os.path.join(folder, f), root) for f in files if _is_image_name(f)]
    return sorted(found)


def _is_image_name(name: str) -> bool:
    """By ending; hidden files (`._photo.jpg` of macOS) are no images."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _read_path_list(file: Path) -> list[str]:
    """Paths of a text file, one a line; empty lines and lines starting with # are skipped."""
    try:
        lines = [line.strip() for line in file.read_text().splitlines()]
    except UnicodeDecodeError:
        raise UsageError(f"{file} is not a text file of paths; --data_path takes a folder or a text file") from None
    paths = [str(file.parent / line) for line in lines if line and not line.startswith("#")]
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        raise UsageError(f"{file} names {len(missing)} files that do not exist, the first is {missing[0]}")
    return paths
