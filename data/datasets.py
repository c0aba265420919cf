"""Labelled or unlabelled images as samples: what a data path holds, seen through a transform.

    dataset = build_dataset("photos/", "train", transform)                   # class folders, loose files or a text file of paths
    dataset = build_dataset("imagenet/", "train", transform, layout="zip")   # train.zip with train_map.txt
    sample = dataset[0]                                                      # views, label, index, failures

Reading never ends a run by itself: an unreadable image is replaced by another sample and named in `Sample.failures`.

Origin: this project's own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.decode import ImageLike, decode_image
from data.folders import list_files
from data.sources import UNLABELLED, Listing, Source
from data.zips import list_zip
from utils import UsageError, isolated_rng

REPLACEMENT_TRIES = 20

Transform = Callable[[ImageLike], list[Tensor]]
LAYOUTS: dict[str, Callable[[Path, str, bool], Listing]] = {"files": list_files, "zip": list_zip}


class Sample(NamedTuple):
    """One image, seen through the transform."""

    views: list[Tensor]  # each (C, H, W); empty when no replacement could be read either
    label: int  # UNLABELLED without classes
    image_index: int  # of the image asked for
    failures: tuple[str, ...]  # "name: reason" (no ": " in it) of every unreadable image on the way


class ImageDataset(Dataset[Sample]):
    """The images of a source, with labels.

    What a sample looks like depends on (`seed`, `epoch`, index) alone; set `epoch` before each pass.

    Args:
        source: the encoded images.
        labels: one an image.
        classes: the names that labels index; empty without labels.
        transform: image to views.
        in_chans: channels; 1 and 3 give the transform a PIL image, other numbers a float tensor (C, H, W) in 0..1.
        seed: base of every sample's randomness.
    """

    def __init__(
        self,
        source: Source,
        labels: Sequence[int] | np.ndarray,
        classes: Sequence[str],
        transform: Transform,
        in_chans: int = 3,
        seed: int = 0,
    ) -> None:
        self.source = source
        self.labels = np.asarray(labels, dtype=np.int64)
        self.classes = tuple(classes)
        self.transform = transform
        self.in_chans = in_chans
        self.seed = seed
        self._epoch = torch.zeros(
            (), dtype=torch.int64
        ).share_memory_()  # so that workers that run already see it change

    @property
    def epoch(self) -> int:
        """Of the next pass."""
        return int(self._epoch)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.source)

    def use_classes(self, classes: Sequence[str]) -> None:
        """Number the labels by `classes`, which must hold all of this data set's own."""
        number_of = {name: number for number, name in enumerate(classes)}
        self.labels = np.array([number_of[name] for name in self.classes], dtype=np.int64)[self.labels]
        self.classes = tuple(classes)

    def __getitem__(self, index: int) -> Sample:
        failures: list[str] = []
        with isolated_rng(self.seed, self.epoch, index):
            chosen = index
            for _ in range(REPLACEMENT_TRIES):
                name = self.source.name(chosen)
                try:
                    image = decode_image(self.source.read(chosen), name, self.in_chans)
                except Exception as error:  # on damaged bytes decoders raise whatever they stumble over
                    reason = " ".join(str(error).replace(": ", " ").split()) or type(error).__name__
                    failures.append(f"{name}: {reason}")
                    chosen = int(np.random.randint(len(self)))
                    continue
                return Sample(self.transform(image), int(self.labels[chosen]), index, tuple(failures))
        return Sample([], UNLABELLED, index, tuple(failures))


def layout_of(args: argparse.Namespace) -> str:
    """The layout that a script's flags name."""
    return "zip" if args.zip_mode else "files"


def build_dataset(
    data_path: str | Path,
    split: str,
    transform: Transform,
    in_chans: int = 3,
    seed: int = 0,
    need_labels: bool = False,
    layout: str = "files",
) -> ImageDataset:
    """The images under `data_path`.

    With the layout `files` it may be a folder with a sub-folder named `split` (then that one counts), a folder of class
    folders, a flat or nested folder without classes, or a text file with one path a line, relative to the file itself;
    see data/folders.py. With `zip` it is a folder with zip files; see data/zips.py.

    Args:
        split: `train` or `val`.
        need_labels: images without classes are an error.
        layout: a key of `LAYOUTS`.

    Raises:
        UsageError: the path is missing or holds no image, or no class where labels are needed.
    """
    root = Path(data_path)
    if not str(data_path):
        raise UsageError("--data_path is needed; it takes a folder of images or a text file of paths")
    if not root.exists():
        raise UsageError(
            f"data path '{data_path}' does not exist; --data_path takes a folder of images or a text file of paths"
        )
    listing = LAYOUTS[layout](root, split, need_labels)
    return ImageDataset(*listing, transform, in_chans, seed)
