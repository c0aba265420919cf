"""Scores of classes in the report: from the confusion matrices beside result files, complete or damaged."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from helpers.pages import Page

from analysis import report as pages
from analysis.class_scores import ClassScore, class_scores, matrix, read_confusion
from evaluation.results import Results, save_results


def test_scores_of_classes() -> None:
    cells = {("a", "a"): 3, ("a", "b"): 1, ("b", "a"): 2, ("b", "c"): 2, ("b", ""): 4, ("d", "d"): 1}
    assert class_scores(cells) == [
        ClassScore("b", 8, 0.0, "none (4)"), ClassScore("a", 4, 75.0, "b (1)"), ClassScore("d", 1, 100.0, "")]  # fmt: skip
    true, predicted, counts = matrix(cells)
    assert (true, predicted) == (["a", "b", "d"], ["a", "b", "d", "", "c"])
    assert counts == [[3, 1, 0, 0, 0], [2, 0, 0, 4, 2], [0, 0, 1, 0, 0]]


def test_many_classes_are_cut_and_not_drawn(tmp_path: Path) -> None:
    """The lowest of 50; a result file without a matrix has the accuracies only."""
    cells = torch.tensor([[label, label, label + 1] for label in range(50)] + [[label, 0, 1] for label in range(1, 50)])
    top1 = 100 * int(cells[:50, 2].sum()) / int(cells[:, 2].sum())
    save_results(tmp_path, Results("knn", {}, {}, {}, {"a": {"top1": top1}}), {"a": cells})
    path = tmp_path / "results" / "knn.json"
    record = json.loads(path.read_text())
    text = pages.classes(path, record)
    assert "<img" not in text
    rows = Page(text).words[Page(text).words.index("most often taken for") + 1 :]
    assert len(rows) == 4 * pages.CLASSES
    assert rows[:4] == ["1", "3", "66.67", "0 (1)"]
    (tmp_path / "results" / "knn_confusion.csv").unlink()
    assert Page(pages.classes(path, record)).words[-2:] == ["20", "95.45"]
    assert pages.classes(path, {"scores": {"a": {"top1": 1.0}}}) == ""


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"true,predicted\n", b"score,true,predicted,images\na,x,x,many\n",
                                     b"score,true,predicted,images\na,x\n", b"score,true,predicted,images\na,x,x,4\n"])  # fmt: skip
def test_matrices_that_do_not_fit_are_omitted(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damaged ones, and those of other scores."""
    monkeypatch.setattr(logging.getLogger("esvit"), "propagate", True)
    (tmp_path / "knn_confusion.csv").write_bytes(content)
    assert read_confusion(tmp_path / "knn.json", "a", {"x": 75.0, "y": 50.0}) == {}
    assert str(tmp_path / "knn_confusion.csv") in caplog.text
