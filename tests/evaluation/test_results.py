"""Result files: one for each evaluation, with the previous one as `.bak`."""

from __future__ import annotations

import json
import logging
import os
import resource
from pathlib import Path
from typing import Any

import pytest

from evaluation.results import Results, save_results
from evaluation.run_dir import make_run_dir
from utils import UsageError


def results(evaluation: str = "knn", top1: float = 1.0) -> Results:
    return Results(evaluation, {"arch": "swin"}, {"classes": 3}, {"half": False}, {"network": {"top1": top1}})


def content(path: Path) -> Any:
    return json.loads(path.read_text())


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))


def test_schema(tmp_path: Path) -> None:
    save_results(tmp_path, results())
    assert content(tmp_path / "results" / "knn.json") == {
        "evaluation": "knn",
        "network": {"arch": "swin"},
        "data": {"classes": 3},
        "protocol": {"half": False},
        "scores": {"network": {"top1": 1.0}},
    }


def test_only_the_previous_file_of_the_same_evaluation_is_kept(tmp_path: Path) -> None:
    for top1 in (1, 2, 3):
        save_results(tmp_path, results(top1=top1))
    save_results(tmp_path, results("linear"))
    assert names(tmp_path) == ["results/knn.json", "results/knn.json.bak", "results/linear.json"]
    previous, current = (content(tmp_path / "results" / f"knn.json{ending}") for ending in (".bak", ""))
    assert (previous["scores"]["network"]["top1"], current["scores"]["network"]["top1"]) == (2, 3)


def test_a_failed_write_leaves_the_results_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_results(tmp_path, results(top1=1))
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UsageError, match="No space left"):
        save_results(tmp_path, results(top1=2))
    assert names(tmp_path) == ["results/knn.json"]
    assert content(tmp_path / "results" / "knn.json")["scores"]["network"]["top1"] == 1


def test_equal_results_are_not_written_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("esvit"), "propagate", True)
    caplog.set_level(logging.INFO)
    save_results(tmp_path, results())
    path = tmp_path / "results" / "knn.json"
    assert f"wrote {path}" in caplog.text
    assert "unchanged" not in caplog.text
    save_results(tmp_path, results())
    assert f"{path} is unchanged" in caplog.text
    assert names(tmp_path) == ["results/knn.json"]


def test_a_damaged_file_is_replaced_and_kept(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "knn.json").write_text("half a fi")
    save_results(tmp_path, results())
    assert content(tmp_path / "results" / "knn.json")["evaluation"] == "knn"
    assert (tmp_path / "results" / "knn.json.bak").read_text() == "half a fi"


def test_a_failed_write_keeps_the_previous_file(tmp_path: Path) -> None:
    save_results(tmp_path, results(top1=1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, hard))  # bytes of a file
    try:
        with pytest.raises(UsageError, match=rf"--output_dir {tmp_path} .*File too large"):
            save_results(tmp_path, results(top1=2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["results/knn.json"]
    assert content(tmp_path / "results" / "knn.json")["scores"]["network"]["top1"] == 1


def test_a_folder_with_another_kind_of_run_is_refused(tmp_path: Path) -> None:
    assert make_run_dir(tmp_path / "new", "checkpoint.pth", "checkpoint.pth.tar").is_dir()
    (tmp_path / "checkpoint.pth.tar").touch()
    with pytest.raises(UsageError, match=rf"--output_dir {tmp_path} .*checkpoint\.pth\.tar"):
        make_run_dir(tmp_path, "checkpoint.pth", "checkpoint.pth.tar")
    (tmp_path / "checkpoint.pth").touch()
    make_run_dir(tmp_path, "checkpoint.pth", "checkpoint.pth.tar")
