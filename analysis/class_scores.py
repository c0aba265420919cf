"""Scores of single classes, from the confusion matrices beside a result file."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints.files import read_text
from evaluation.confusion import COLUMNS
from evaluation.results import confusion_path
from utils import UsageError, logger

Confusion = dict[tuple[str, str], int]  # images by true and predicted class, as far as there are any
TOLERANCE = 1e-6  # of accuracies in percent


class ClassScore(NamedTuple):
    """Accuracy of a class in percent, and the class that most of its other images are taken for, with their number."""

    name: str
    images: int
    top1: float
    mistakes: str  # empty if all are right


def best_score(scores: Mapping[str, Any]) -> str | None:
    """Return the name of the score with the best top-1 accuracy (or mIoU) among those with scores of single classes."""
    rows = {
        name: row for name, row in scores.items() if isinstance(row, dict) and isinstance(row.get("per_class"), dict)
    }
    return max(rows, key=lambda name: rows[name].get("top1") or rows[name].get("miou") or 0.0, default=None)


def read_confusion(path: Path, name: str, accuracies: Mapping[str, float]) -> Confusion:
    """Return the confusion matrix of a score of the result file `path`; empty, with a warning, if it is not of these accuracies."""
    file = confusion_path(path)
    if not file.is_file():
        return {}
    try:
        lines = list(csv.reader(io.StringIO(read_text(file), newline="")))
        if tuple(lines[0]) != COLUMNS:
            raise ValueError("other columns")
        cells = {(true, predicted): int(images) for score, true, predicted, images in lines[1:] if score == name}
    except (UsageError, ValueError, IndexError, csv.Error) as error:
        logger.warning("%s cannot be read (%s); the report omits it", file, error)
        return {}
    if not cells:
        return {}
    found = {score.name: score.top1 for score in class_scores(cells)}
    if found.keys() != accuracies.keys() or any(abs(found[each] - accuracies[each]) > TOLERANCE for each in found):
        logger.warning("%s is not of the scores in %s; evaluate again", file, path.name)
        return {}
    return cells


def class_scores(cells: Confusion) -> list[ClassScore]:
    """Return the scores of all classes, the lowest accuracy first."""
    scores = []
    for name in dict.fromkeys(true for true, _ in cells):
        row = {predicted: images for (true, predicted), images in cells.items() if true == name}
        images, right = sum(row.values()), row.pop(name, 0)
        most = max(row, key=lambda predicted: row[predicted], default=None)
        mistakes = "" if most is None else f"{most or 'none'} ({row[most]})"
        scores.append(ClassScore(name, images, 100 * right / images, mistakes))
    return sorted(scores, key=lambda score: score.top1)


def matrix(cells: Confusion) -> tuple[list[str], list[str], list[list[int]]]:
    """Return the true classes, the predicted classes and the matrix; both in the order of the file, the true ones first."""
    true = list(dict.fromkeys(true for true, _ in cells))
    predicted = true + sorted({predicted for _, predicted in cells} - set(true))
    return true, predicted, [[cells.get((row, column), 0) for column in predicted] for row in true]
