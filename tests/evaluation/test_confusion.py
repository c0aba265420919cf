"""evaluation/confusion.py against a slow loop, and the files that it fills."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.confusions import assert_confusions_fit, read_confusions, slow_cells

from evaluation.confusion import NONE, as_csv, class_accuracies, confusion_cells, top1_accuracy
from evaluation.results import Results, save_results


def labels(images: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """True and predicted classes, of which one class never occurs and some images have none."""
    generator = torch.Generator().manual_seed(images)
    true, predicted = torch.randint(classes, (2, images), generator=generator)
    true[true == classes - 1] = 0
    predicted[::7] = NONE
    return true, predicted


@pytest.mark.parametrize(("images", "classes"), [(1, 2), (50, 3), (400, 21_000)])
def test_cells_and_accuracies_equal_a_slow_loop(images: int, classes: int) -> None:
    true, predicted = labels(images, classes)
    cells = confusion_cells(true, predicted)
    assert torch.equal(cells, slow_cells(true, predicted))
    assert int(cells[:, 2].sum()) == images
    assert top1_accuracy(cells) == pytest.approx(100 * (true == predicted).double().mean().item())
    accuracies = class_accuracies(cells)
    assert list(accuracies) == sorted(set(true.tolist()))
    for label, accuracy in accuracies.items():
        assert accuracy == pytest.approx(100 * (predicted[true == label] == label).double().mean().item())


def test_csv_names_the_classes() -> None:
    """A comma in a name, an image without a prediction, and an output beyond the named classes."""
    text = as_csv({"lr 1, last 4": torch.tensor([[0, 0, 5], [0, NONE, 1], [1, 2, 3]])}, ["a,b", "c"])
    assert text.splitlines() == [
        "score,true,predicted,images",
        '"lr 1, last 4","a,b","a,b",5',
        '"lr 1, last 4","a,b",,1',
        '"lr 1, last 4",c,2,3',
    ]


def result(**scores: float) -> Results:
    return Results("knn", {}, {"val_images": 4}, {}, {name: {"top1": top1} for name, top1 in scores.items()})


def test_files_belong_together(tmp_path: Path) -> None:
    """The matrices of earlier results are kept beside those results, and are not taken for those of new ones."""
    first, second = torch.tensor([[0, 0, 3], [1, 0, 1]]), torch.tensor([[0, 1, 3], [1, 1, 1]])
    save_results(tmp_path, result(a=75.0), {"a": first}, ["x", "y"])
    assert_confusions_fit(tmp_path, "knn")
    save_results(tmp_path, result(a=75.0, b=25.0), {"a": first, "b": second}, ["x", "y"])
    record = assert_confusions_fit(tmp_path, "knn")
    assert record["scores"]["b"] == {"top1": 25.0, "per_class": {"x": 0.0, "y": 100.0}}
    assert (tmp_path / "results/knn_confusion.csv.bak").read_text() == "score,true,predicted,images\na,x,x,3\na,y,x,1\n"
    save_results(tmp_path, result(a=75.0, b=25.0), {"a": None, "b": second}, ["x", "y"])
    assert list(read_confusions(tmp_path, "knn")) == ["b"]
    save_results(tmp_path, result(a=75.0))
    names = sorted(path.name for path in (tmp_path / "results").iterdir())
    assert names == ["knn.json", "knn.json.bak", "knn_confusion.csv.bak"]


def test_class_names_that_are_not_utf8(tmp_path: Path) -> None:
    save_results(tmp_path, result(a=100.0), {"a": torch.tensor([[0, 0, 4]])}, ["gr\udcf6\udcdfe"])
    assert read_confusions(tmp_path, "knn") == {"a": {(r"gr\udcf6\udcdfe",) * 2: 4}}
