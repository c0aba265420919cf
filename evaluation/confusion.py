"""Confusion matrices of classifiers, and the accuracy of each class.

A matrix is kept as its cells that are not zero, which are never more than the validation images, for any number of classes.

Shapes: N images, P cells; a cell is a true class, a predicted class and the number of such images. The predicted class is -1
(`NONE`) for an image whose outputs are not finite.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distributed import collectives

NONE = -1
COLUMNS = ("score", "true", "predicted", "images")  # of the CSV file


def confusion_cells(true_N: Tensor, predicted_N: Tensor) -> Tensor:
    """Return the cells (P, 3) of the confusion matrix of some images, by true and then by predicted class."""
    cells_P2, images_P = torch.stack([true_N, predicted_N], dim=1).cpu().unique(dim=0, return_counts=True)
    return torch.cat([cells_P2, images_P[:, None]], dim=1)


def gather_confusion(true_N: Tensor, predicted_N: Tensor) -> Tensor:
    """Return the cells of the images of all processes, each of which passes its own; a collective operation."""
    parts = collectives.all_gather_objects((true_N.cpu(), predicted_N.cpu()))
    return confusion_cells(*(torch.cat(part) for part in zip(*parts)))


def checked_cells(value: object) -> Tensor | None:
    """Return the cells that a checkpoint holds, None in those of earlier versions.

    Raises:
        TypeError: it is something else.
    """
    if value is None or (isinstance(value, Tensor) and value.shape[1:] == (3,) and not value.is_floating_point()):
        return value
    raise TypeError("a confusion matrix is not three columns of integers")


def top1_accuracy(cells_P3: Tensor) -> float:
    """Return the share of the diagonal in percent."""
    return 100 * int(_correct(cells_P3).sum()) / int(cells_P3[:, 2].sum())


def class_accuracies(cells_P3: Tensor) -> dict[int, float]:
    """Return the top-1 accuracy of each class that occurs, in percent."""
    true_P, _, images_P = cells_P3.T
    images_L = true_P.bincount(images_P).long()
    correct_L = true_P.bincount(_correct(cells_P3)).long()
    return {label: 100 * int(correct_L[label]) / int(images_L[label]) for label in images_L.nonzero()[:, 0].tolist()}


def _correct(cells_P3: Tensor) -> Tensor:
    true_P, predicted_P, images_P = cells_P3.T
    return images_P * (true_P == predicted_P)


def class_name(label: int, classes: Sequence[str]) -> str:
    """Return the name of a class: its number if it has none, nothing for `NONE`."""
    return "" if label == NONE else classes[label] if label < len(classes) else str(label)


def as_csv(confusions: Mapping[str, Tensor], classes: Sequence[str], counted: str = COLUMNS[-1]) -> str:
    """Return confusion matrices, by the name of their score, as CSV: one line for each cell that is not zero."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*COLUMNS[:-1], counted])
    for name, cells_P3 in confusions.items():
        for true, predicted, images in cells_P3.tolist():
            writer.writerow([name, class_name(true, classes), class_name(predicted, classes), images])
    return stream.getvalue()
