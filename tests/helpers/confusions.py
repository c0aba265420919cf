"""Confusion matrices for tests: counted one image at a time, and read back from a result folder."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor


def slow_cells(true: Iterable[int], predicted: Iterable[int]) -> Tensor:
    """Count one image after the other."""
    counts = Counter(zip(map(int, true), map(int, predicted), strict=True))
    return torch.tensor([[*cell, counts[cell]] for cell in sorted(counts)])


def read_confusions(folder: Path, evaluation: str) -> dict[str, dict[tuple[str, str], int]]:
    """Return the cells of each score in `<evaluation>_confusion.csv`, by the names of true and predicted class."""
    found: dict[str, dict[tuple[str, str], int]] = {}
    with (folder / "results" / f"{evaluation}_confusion.csv").open(newline="") as file:
        for line in csv.DictReader(file):
            cells = found.setdefault(line["score"], {})
            assert (line["true"], line["predicted"]) not in cells
            cells[line["true"], line["predicted"]] = int(line["images"])
    return found


def assert_confusions_fit(folder: Path, evaluation: str) -> dict[str, Any]:
    """Check that the matrices of all scores have every image once and the accuracies of the result file; return that file."""
    record: dict[str, Any] = json.loads((folder / "results" / f"{evaluation}.json").read_text())
    confusions = read_confusions(folder, evaluation)
    assert list(confusions) == list(record["scores"])
    for name, row in record["scores"].items():
        cells = confusions[name]
        assert sum(cells.values()) == record["data"]["val_images"]
        right = {true: images for (true, predicted), images in cells.items() if true == predicted}
        assert row["top1"] == pytest.approx(100 * sum(right.values()) / record["data"]["val_images"])
        for label, accuracy in row["per_class"].items():
            of_class = sum(images for (true, _), images in cells.items() if true == label)
            assert accuracy == pytest.approx(100 * right.get(label, 0) / of_class)
        assert {true for true, _ in cells} == set(row["per_class"])
    return record
