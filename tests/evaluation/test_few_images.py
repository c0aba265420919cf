"""Evaluations of few images with default flags: what is told before features are extracted, and what is adapted."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.runs import TINY_SWIN, write_images

import eval_knn

TINY = ["--arch", "swin", "--cfg", "experiments/demo/swin_micro.yaml", "--device", "cpu", "--num_workers", "0"]
TINY += ["--random_weights", "--image_size", "32"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Five training images of one class, four of another."""
    for seed, split in enumerate(("train", "val")):
        write_images(tmp_path / "images" / split, 5, classes=2, seed=seed)
    (tmp_path / "images" / "train" / "class1" / "004.png").unlink()
    return tmp_path / "images"


class Extracted(Exception):
    """Features would be extracted now."""


def extract(*_: object, **__: object) -> None:
    raise Extracted


@pytest.mark.parametrize(
    ("flags", "large", "fitting"),
    [
        ([], "10 20 100 200", 4),
        (["--nb_knn", "1", "5"], "5", 4),
        (["--leave_one_out", "--nb_knn", "1", "4"], "4", 3),
        (["--nb_knn", "1", "4"], "", 4),
    ],
)
def test_k_larger_than_the_smallest_class_is_told_before_extraction(
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    large: str,
    fitting: int,
) -> None:
    monkeypatch.setattr(eval_knn, "extract_splits", extract)
    folder = images / "train" if "--leave_one_out" in flags else images
    command = [*TINY, "--data_path", str(folder), *flags, "--seed", "0", *TINY_SWIN]
    with pytest.raises(Extracted):
        eval_knn.main(eval_knn.get_args_parser().parse_args(command))
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("--nb_knn")]
    assert [line.startswith(f"--nb_knn {large} ") and f"--nb_knn {fitting} " in line for line in told] == [True] * bool(
        large
    )
