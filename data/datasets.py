"""Map-style datasets of labeled or unlabeled images, in any of the supported layouts.

    dataset = build_dataset("photos/", "train", transform)                     # folders, or a text file of paths
    dataset = build_dataset("imagenet/", "train", transform, layout="zip")     # train.zip with train_map.txt
    dataset = build_dataset("imagenet/", "train", transform, layout="tsv")     # train.tsv
    dataset = build_dataset("imagenet/", "train", transform, layout="shards")  # train-000000.tar, ...
    sample = dataset[0]                                                        # views, label, index, failures

An image that cannot be read in two attempts is replaced by a random other one and listed in `Sample.failures`. An image of an
undeclared value range points to a mistake in the config, which concerns all images: it is not replaced (`FatalFailure`).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.decode import ImageLike, UndeclaredRange, decode_image
from data.layouts.folders import list_files
from data.layouts.published import list_openimages, list_webvision
from data.layouts.remote import is_remote, require_local
from data.layouts.sources import UNLABELED, Listing, MultiLabels, Source
from data.layouts.tars import contains_shards, list_tars
from data.layouts.tsv import list_tsv
from data.layouts.zips import list_zip
from data.transforms.crops import ScaledCrops
from utils import UsageError, isolated_rng

REPLACEMENT_TRIES = 20

Transform = Callable[[ImageLike], list[Tensor]] | ScaledCrops
# By layout: (data path, split, labels needed) -> listing.
LAYOUTS: dict[str, Callable[[Path, str, bool], Listing]] = {
    "files": list_files,
    "zip": list_zip,
    "tsv": list_tsv,
    "shards": list_tars,
    "webvision1": list_webvision,
    "openimages_v4": list_openimages,
}
COLLECTIONS = ("imagenet1k", "imagenet22k", "webvision1", "openimages_v4")  # values of --dataset that are not a folder


class Sample(NamedTuple):
    """One image after the transform."""

    views: list[Tensor]  # each (C, H, W); empty if no replacement could be read either
    label: int | Tensor  # UNLABELED without classes; multi-hot (classes,) for multi-label data
    image_index: int  # that was requested, also where another image replaces it
    failures: tuple[str, ...]  # "name: reason" of each image that could not be read, the reason without ": "


class FatalFailure(str):
    """A failure without replacement, which ends the run with this message."""


class SharedEpoch:
    """Keeps the epoch in shared memory, so that running workers see when it changes."""

    def __init__(self) -> None:
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """Epoch of the next pass."""
        return int(self._epoch)

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)


class Candidate(NamedTuple):
    """An image that may be used for a sample."""

    name: str
    read: Callable[[], bytes]
    label: int | Tensor


def load_sample(
    index: int, candidates: Iterable[Candidate], transform: Transform, in_chans: int, value_range: Sequence[float]
) -> Sample:
    """Load the first candidate that can be read; without one, or after `REPLACEMENT_TRIES`, return a sample without views.

    Each is tried twice, since reading from a disk or network may fail for a moment.
    """
    decode: Callable[..., Any] = partial(decode_image, in_chans=in_chans)
    if isinstance(transform, ScaledCrops):
        decode = transform.decode
    failures: list[str] = []
    for name, read, label in islice(candidates, REPLACEMENT_TRIES):
        for attempt in range(2):
            try:
                image = decode(read(), value_range=value_range)
            except UndeclaredRange as error:
                return Sample([], UNLABELED, index, (*failures, FatalFailure(f"{name} {error}")))
            except Exception as error:  # decoders raise anything on damaged bytes
                failures += [f"{name}: {format_error(error)}"] if attempt else []
            else:
                return Sample(transform(image), label, index, tuple(failures))
    return Sample([], UNLABELED, index, tuple(failures))


class ImageDataset(SharedEpoch, Dataset[Sample]):
    """The images of a source, with labels.

    A sample is a function of (`seed`, `epoch`, index); set `epoch` before each pass.

    Attributes:
        replaces_unreadable: whether a random other image takes the place of one that cannot be read; else its sample has no views.

    Args:
        source: encoded images.
        labels: of each image, as in `Listing`.
        classes: names of the classes; empty without labels.
        transform: from an image to its views.
        in_chans: for 1 and 3 the transform gets a PIL image, otherwise a float tensor (in_chans, H, W) in 0..1.
        seed: of the samples' randomness.
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
        self.replaces_unreadable = True

    def __len__(self) -> int:
        return len(self.source)

    def use_classes(self, classes: Sequence[str]) -> None:
        """Renumber the labels by `classes`, which must contain all classes of this dataset."""
        index_of = {name: index for index, name in enumerate(classes)}
        self.labels = np.array([index_of[name] for name in self.classes], dtype=np.int64)[self.labels]
        self.classes = tuple(classes)

    def __getitem__(self, index: int) -> Sample:
        with isolated_rng(self.seed, self.epoch, index):
            return load_sample(index, self._candidates(index), self.transform, self.in_chans, self.value_range)

    def _candidates(self, index: int) -> Iterator[Candidate]:
        """Yield the image itself, then random replacements."""
        yield self._candidate(index)
        while self.replaces_unreadable:
            yield self._candidate(int(np.random.randint(len(self))))

    def _candidate(self, index: int) -> Candidate:
        return Candidate(self.source.name(index), partial(self.source.read, index), self._label(index))

    def _label(self, index: int) -> int | Tensor:
        if self.multi_labels is not None:
            return torch.from_numpy(self.multi_labels[index])
        return int(self.labels[index])


def format_error(error: Exception) -> str:
    """Return the message of an error in one line without ": ", as `Sample.failures` needs it."""
    return " ".join(str(error).replace(": ", " ").split()) or type(error).__name__


def layout_of(args: argparse.Namespace, data_path: str | None = None) -> str:
    """Return the layout of --data_path, or of `data_path`, that a script's flags select: a key of `LAYOUTS`.

    Raises:
        UsageError: the flags exclude each other, or the path cannot be accessed; a missing path is reported when it is opened.
    """
    path = args.data_path if data_path is None else data_path
    try:
        if not is_remote(path):
            os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise UsageError(f"data path {path} cannot be accessed ({error.strerror}); choose another") from None
    dataset = getattr(args, "dataset", "")
    flags = [flag for flag, given in (("--zip_mode", args.zip_mode), ("--tsv_mode", args.tsv_mode)) if given]
    flags += [f"--dataset {dataset}"] if dataset in LAYOUTS else []
    if len(flags) > 1:
        raise UsageError(f"{' and '.join(flags)} select different layouts of --data_path; pass one of them")
    if dataset in LAYOUTS:
        return dataset
    if args.zip_mode or args.tsv_mode:
        return "zip" if args.zip_mode else "tsv"
    return "shards" if contains_shards(path) else "files"


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
    """Build the dataset of the images under `data_path`.

    Args:
        split: `train` or `val`.
        need_labels: reject images without classes.
        layout: a key of `LAYOUTS`, each described in its module in data/layouts/.
        value_range: INPUT.RANGE of the config, see `decode_image`.

    Raises:
        UsageError: the path is missing or has no image, or no class where labels are needed.
    """
    assert layout in LAYOUTS
    root = Path(data_path)
    if not str(data_path):
        raise UsageError("the data path is empty; pass a folder of images or a text file of paths")
    require_local(str(data_path))
    if layout != "shards" and not root.exists():
        raise UsageError(
            f"data path {data_path} does not exist; pass a folder of images, a text file of paths or tar shards"
        )
    if layout == "files" and not (root.is_dir() or root.is_file()):
        raise UsageError(
            f"data path {data_path} is a pipe, socket or device; pass a folder of images or a text file of paths"
        )
    listing = LAYOUTS[layout](root, split, need_labels)
    return ImageDataset(*listing, transform, in_chans, seed, value_range)
