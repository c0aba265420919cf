"""Labeled or unlabeled images as samples: what a data path holds, seen through a transform.

    dataset = build_dataset("photos/", "train", transform)                   # class folders, loose files or a text file of paths
    dataset = build_dataset("imagenet/", "train", transform, layout="zip")   # train.zip with train_map.txt
    dataset = build_dataset("imagenet/", "train", transform, layout="tsv")   # train.tsv
    dataset = build_dataset("imagenet/", "train", transform, layout="shards")   # train-000000.tar and others
    sample = dataset[0]                                                      # views, label, index, failures

Reading never ends a run by itself: what fails twice is replaced by another sample and named in `Sample.failures`. An image whose
range nothing declares is a mistake about all of them: it has no replacement, and the run ends (`Refusal`).

Origin: this project's own.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.decode import ImageLike, UndeclaredRange, decode_image
from data.layouts.folders import list_files
from data.layouts.published import list_openimages, list_webvision
from data.layouts.remote import check_here, is_remote
from data.layouts.sources import UNLABELED, Listing, MultiLabels, Source
from data.layouts.tars import holds_shards, list_tars
from data.layouts.tsv import list_tsv
from data.layouts.zips import list_zip
from utils import UsageError, isolated_rng

REPLACEMENT_TRIES = 20

Transform = Callable[[ImageLike], list[Tensor]]
LAYOUTS: dict[str, Callable[[Path, str, bool], Listing]] = {
    "files": list_files,
    "zip": list_zip,
    "tsv": list_tsv,
    "shards": list_tars,
    "webvision1": list_webvision,
    "openimages_v4": list_openimages,
}
COLLECTIONS = ("imagenet1k", "imagenet22k", "webvision1", "openimages_v4")  # names of --dataset that are no folder's


class Sample(NamedTuple):
    """One image, seen through the transform."""

    views: list[Tensor]  # each (C, H, W); empty when no replacement could be read either
    label: int | Tensor  # UNLABELED without classes; (classes,) 0 and 1 where an image has several
    image_index: int  # of the image asked for
    failures: tuple[str, ...]  # "name: reason" (no ": " in it) of every unreadable image on the way


class Refusal(str):
    """A failure for which no other image may stand in: the sentence with which the run ends."""


class SharedEpoch:
    """What has an epoch of which workers that run already learn: it lies in shared memory."""

    def __init__(self) -> None:
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """Of the next pass."""
        return int(self._epoch)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)


class ImageDataset(SharedEpoch, Dataset[Sample]):
    """The images of a source, with labels.

    What a sample looks like depends on (`seed`, `epoch`, index) alone; set `epoch` before each pass.

    Args:
        source: the encoded images.
        labels: one an image, or several.
        classes: the names that labels index; empty without labels.
        transform: image to views.
        in_chans: channels; 1 and 3 give the transform a PIL image, other numbers a float tensor (C, H, W) in 0..1.
        seed: base of every sample's randomness.
        value_range: INPUT.RANGE, see `decode_image`.
    """

    def __init__(
        self,
        source: Source,
        labels: Sequence[int] | np.ndarray | MultiLabels,
        classes: Sequence[str],
        transform: Transform,
        in_chans: int = 3,
        seed: int = 0,
        value_range: Sequence[float] = (),
    ) -> None:
        super().__init__()
        self.source = source
        self.multi_labels = labels if isinstance(labels, MultiLabels) else None
        self.labels = np.asarray([] if isinstance(labels, MultiLabels) else labels, dtype=np.int64)
        self.classes = tuple(classes)
        self.transform = transform
        self.in_chans = in_chans
        self.seed = seed
        self.value_range = tuple(value_range)

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
                    image = self._image(chosen)
                except UndeclaredRange as error:
                    return Sample([], UNLABELED, index, (*failures, Refusal(f"{name} {error}")))
                except Exception as error:  # on damaged bytes decoders raise whatever they stumble over
                    failures.append(f"{name}: {reason_of(error)}")
                    chosen = int(np.random.randint(len(self)))
                    continue
                return Sample(self.transform(image), self._label(chosen), index, tuple(failures))
        return Sample([], UNLABELED, index, tuple(failures))

    def _image(self, index: int) -> ImageLike:
        """Read at the second try where the first one fails, as a disk or network may for a moment."""
        try:
            return decode_image(self.source.read(index), self.in_chans, self.value_range)
        except UndeclaredRange:
            raise
        except Exception:
            return decode_image(self.source.read(index), self.in_chans, self.value_range)

    def _label(self, index: int) -> int | Tensor:
        if self.multi_labels is not None:
            return torch.from_numpy(self.multi_labels[index])
        return int(self.labels[index])


def reason_of(error: Exception) -> str:
    """In one line without ": ", as `Sample.failures` takes it."""
    return " ".join(str(error).replace(": ", " ").split()) or type(error).__name__


def layout_of(args: argparse.Namespace, data_path: str | None = None) -> str:
    """The layout of --data_path, or of another path, as a script's flags name it: a key of `LAYOUTS`.

    Raises:
        UsageError: flags that exclude each other, or a path that may not or cannot be looked at; one that is not there is
            told by whoever opens it.
    """
    path = args.data_path if data_path is None else data_path
    try:
        if not is_remote(path):
            os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise UsageError(f"--data_path {path} cannot be looked at ({error.strerror}); name another") from None
    dataset = getattr(args, "dataset", "")
    flags = [flag for flag, given in (("--zip_mode", args.zip_mode), ("--tsv_mode", args.tsv_mode)) if given]
    flags += [f"--dataset {dataset}"] if dataset in LAYOUTS else []
    if len(flags) > 1:
        raise UsageError(f"{' and '.join(flags)} name different layouts of --data_path; pass one of them")
    if dataset in LAYOUTS:
        return dataset
    if args.zip_mode or args.tsv_mode:
        return "zip" if args.zip_mode else "tsv"
    return "shards" if holds_shards(path) else "files"


def build_dataset(
    data_path: str | Path,
    split: str,
    transform: Transform,
    in_chans: int = 3,
    seed: int = 0,
    need_labels: bool = False,
    layout: str = "files",
    value_range: Sequence[float] = (),
) -> ImageDataset:
    """The images under `data_path`.

    With the layout `files` it may be a folder with a sub-folder named `split` (then that one counts), a folder of class
    folders, a flat or nested folder without classes, or a text file with one path a line, relative to the file itself;
    see data/layouts/folders.py. The other layouts are told in data/layouts/zips.py, data/layouts/tsv.py, data/layouts/tars.py
    and data/layouts/published.py.

    Args:
        split: `train` or `val`.
        need_labels: images without classes are an error.
        layout: a key of `LAYOUTS`.
        value_range: INPUT.RANGE of the config, see `decode_image`.

    Raises:
        UsageError: the path is missing or holds no image, or no class where labels are needed.
    """
    assert layout in LAYOUTS
    root = Path(data_path)
    if not str(data_path):
        raise UsageError("--data_path is needed; it takes a folder of images or a text file of paths")
    check_here(str(data_path))
    if layout != "shards" and not root.exists():
        raise UsageError(
            f"data path '{data_path}' does not exist; --data_path takes a folder of images, a text file of paths or tar shards"
        )
    if layout == "files" and not (root.is_dir() or root.is_file()):
        raise UsageError(
            f"data path '{data_path}' is a pipe, socket or device; --data_path takes a folder of images or a text file"
        )
    listing = LAYOUTS[layout](root, split, need_labels)
    return ImageDataset(*listing, transform, in_chans, seed, value_range)
