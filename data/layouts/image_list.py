"""Text files that select some images of a dataset, as the 1 % and 10 % subsets of semi-supervised protocols.

A line names an image by its file name (`n01440764_10026.JPEG`, as in the lists of SimCLRv2), or by its last folders and file name
(`n01440764/n01440764_10026.JPEG`) where file names repeat.

Origin: the lists are those of SimCLRv2 (Chen et al., NeurIPS 2020).
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path

import numpy as np

from checkpoints.files import read_text
from data.datasets import ImageDataset
from data.layouts.sources import Subset
from utils import UsageError, counted, logger


def read_list(file: str | Path) -> list[str]:
    """Return the lines of a list, except empty ones.

    Raises:
        UsageError: the file is missing, not text, or empty.
    """
    text = read_text(Path(file), "--target_list_path takes a text file with one image a line", "surrogateescape")
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        raise UsageError(f"--target_list_path {file} is empty; write one image a line")
    return lines


def list_digest(file: str | Path) -> str:
    """Return a digest of the lines of a list, independent of their order."""
    return hashlib.sha256(os.fsencode("\n".join(sorted(read_list(file))))).hexdigest()[:16]


def select_listed(dataset: ImageDataset, file: str | Path) -> None:
    """Restrict a labeled dataset to the images of a list; its classes do not change.

    Raises:
        UsageError: a line matches no image, or several.
    """
    lines = set(read_list(file))
    chosen, found = [], Counter[str]()
    depths = {line.count("/") + 1 for line in lines}
    for index in range(len(dataset)):
        parts = dataset.source.name(index).replace(os.sep, "/").split("/")
        matches = {"/".join(parts[-depth:]) for depth in depths} & lines
        found.update(matches)
        if matches:
            chosen.append(index)
    for problem, names, remedy in (
        ("no image has", sorted(lines - found.keys()), "use the list that belongs to --data_path"),
        ("several images have", sorted(line for line, count in found.items() if count > 1), "add their folders"),
    ):
        if names:
            raise UsageError(
                f"--target_list_path {file} has {counted(len(names), 'name')} that {problem}, first {names[0]}; {remedy}"
            )
    indices = np.array(chosen, dtype=np.int64)
    dataset.source, dataset.labels = Subset(dataset.source, indices), dataset.labels[indices]
    logger.info("%s selects %d of %d training images", file, len(indices), len(dataset.source.source))
    missing = len(dataset.classes) - len(np.unique(dataset.labels))
    if missing:
        logger.warning("%s has no image of %d of the %d classes", file, missing, len(dataset.classes))
