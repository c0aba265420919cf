"""Text lists that choose some images of a data set, as semi-supervised protocols do with 1 or 10 % of ImageNet.

A line names an image by its file (`n01440764_10026.JPEG`, as the lists of SimCLRv2 do) or by its last folders and file
(`n01440764/n01440764_10026.JPEG`) where files of several folders have one name.

Origin: this project's own; the lists are those of SimCLRv2 (Chen et al., NeurIPS 2020).
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path

import numpy as np

from checkpoints.files import read_text
from data.datasets import ImageDataset
from data.layouts.sources import Chosen
from utils import UsageError, counted, logger


def read_list(file: str | Path) -> list[str]:
    """The lines of a list; empty ones do not count.

    Raises:
        UsageError: no such file, one that is not text, or one without lines.
    """
    text = read_text(Path(file), "--target_list_path takes a text that names an image on each line", "surrogateescape")
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        raise UsageError(f"--target_list_path {file} names no image; it names one on each line")
    return lines


def digest_of(file: str | Path) -> str:
    """What tells whether two runs had the same list, wherever it lies and in whatever order."""
    return hashlib.sha256(os.fsencode("\n".join(sorted(read_list(file))))).hexdigest()[:16]


def keep_listed(dataset: ImageDataset, file: str | Path) -> None:
    """Leave out all images of a labeled data set that a list does not name; the classes stay as they are.

    Raises:
        UsageError: see `read_list`; names that no image has, or several have.
    """
    lines = set(read_list(file))
    chosen, found = [], Counter[str]()
    depths = {line.count("/") + 1 for line in lines}
    for index in range(len(dataset)):
        parts = dataset.source.name(index).replace(os.sep, "/").split("/")
        hits = {"/".join(parts[-depth:]) for depth in depths} & lines
        found.update(hits)
        if hits:
            chosen.append(index)
    for problem, names, remedy in (
        ("no image has", sorted(lines - found.keys()), "take the list that belongs to --data_path"),
        ("several images have", sorted(line for line, count in found.items() if count > 1), "name their folders too"),
    ):
        if names:
            raise UsageError(
                f"--target_list_path {file} has {counted(len(names), 'name')} that {problem}, the first is {names[0]}; {remedy}"
            )
    kept = np.array(chosen, dtype=np.int64)
    dataset.source, dataset.labels = Chosen(dataset.source, kept), dataset.labels[kept]
    logger.info("%s chooses %d of %d training images", file, len(kept), len(dataset.source.source))
    missing = len(dataset.classes) - len(np.unique(dataset.labels))
    if missing:
        logger.warning("%s names no image of %d of the %d classes", file, missing, len(dataset.classes))
