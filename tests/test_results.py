"""Result files: numbers, other evaluations' files, and what counts as written."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest

from checkpoints.files import numbered, unused
from evaluation import results
from evaluation.results import Written, add_results, newest, save_json, write_results
from utils import UsageError


def content(path: Path) -> Any:
    return json.loads(path.read_text())


def test_numbers_skip_what_exists(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert (unused(path), newest(path)) == (path, None)
    saved = [save_json({"n": n}, path) for n in range(3)]
    assert [p.name for p in saved] == ["a.json", "a_2.json", "a_3.json"]
    assert [content(p)["n"] for p in saved] == [0, 1, 2]
    assert numbered(path) == saved
    saved[1].unlink()
    assert (unused(path), newest(path), numbered(path)) == (saved[1], path, [path])


def test_a_run_replaces_its_own_results_only(tmp_path: Path) -> None:
    """Another evaluation's that came meanwhile keep their name; the run then has one number, whatever often it writes."""
    first = write_results(tmp_path, "one", {"top1": 1})
    assert first == Written(tmp_path / "results.json", changed=True)
    assert not write_results(tmp_path, "one", {"top1": 1}).changed
    (tmp_path / "results.json").write_text('{"evaluation": "other"}')
    for top1 in (2, 3):
        assert write_results(tmp_path, "one", {"top1": top1}) == Written(tmp_path / "results_2.json", changed=True)
    assert content(tmp_path / "results.json") == {"evaluation": "other"}
    assert content(tmp_path / "results_2.json") == {"evaluation": "one", "top1": 3}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "results_2.json"]


def test_damaged_results_are_nobodys_and_kept(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("half a fi")
    assert write_results(tmp_path, "one", {}).path.name == "results_2.json"
    assert (tmp_path / "results.json").read_text() == "half a fi"


def test_results_that_appear_between_looking_and_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def look(path: Path) -> None:
        (tmp_path / "results.json").write_text('{"evaluation": "other"}')

    monkeypatch.setattr(results, "newest", look)
    written = add_results(tmp_path, "one", {"top1": 1})
    assert written == Written(tmp_path / "results_2.json", changed=True)
    assert content(tmp_path / "results.json") == {"evaluation": "other"}


def test_equal_results_are_said_to_be_unchanged(tmp_path: Path) -> None:
    assert str(add_results(tmp_path, "one", {"top1": 1})) == f"wrote {tmp_path / 'results.json'}"
    assert str(add_results(tmp_path, "one", {"top1": 1})).startswith(f"{tmp_path / 'results.json'} is unchanged")
    assert add_results(tmp_path, "one", {"top1": 2}).path.name == "results_2.json"


def test_a_disk_that_refuses_is_told_and_leaves_no_half_file(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, hard))  # bytes of a file
    try:
        with pytest.raises(UsageError, match=rf"--output_dir {tmp_path} cannot be used \(File too large\)"):
            add_results(tmp_path, "one", {"top1": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
    assert add_results(tmp_path, "one", {"top1": 1}).path.name == "results.json"
