"""`--aug_backend` in whole runs: the choice of auto, the logged crops, resume, and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.runs import TINY_RUN, TINY_SWIN, write_images
from PIL import Image
from torch import Tensor

import main_esvit
from checkpoints.serialization import load_file
from training import checkpointing
from utils import UsageError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), 8)


def train(folder: Path, output: Path, *flags: str, overrides: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Return the student after a tiny run."""
    paths = ["--data_path", str(folder), "--output_dir", str(output)]
    args = [*TINY_RUN, *paths, *flags, *TINY_SWIN, *overrides]
    main_esvit.main(main_esvit.get_args_parser().parse_args(args))
    student: dict[str, Tensor] = load_file(output / "checkpoint.pth")["student"]
    return student


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_auto_is_split_and_both_show_normalized_views(folder: Path, tmp_path: Path) -> None:
    students = {name: train(folder, tmp_path / name, "--aug_backend", name) for name in ("auto", "split", "pil")}
    assert same(students["auto"], students["split"])
    assert not same(students["auto"], students["pil"])
    pictures = {name: np.asarray(Image.open(tmp_path / name / "crops.png")).astype(float) for name in students}
    assert np.array_equal(pictures["auto"], pictures["split"])
    assert pictures["pil"].shape == pictures["split"].shape
    # The global views; their normalization is undone in the picture, so their mean is that of the images.
    rows = slice(2, 2 * 34)
    assert pictures["split"][rows].mean() == pytest.approx(pictures["pil"][rows].mean(), abs=25)
    assert 60 < pictures["split"][rows].mean() < 200
    assert pictures["split"][rows].std() > 10


@pytest.mark.slow
def test_resume_is_bit_exact(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a persistent worker in the uninterrupted run and a new one in the resumed run."""
    flags = ("--aug_backend", "split", "--num_workers", "1")
    whole = train(folder, tmp_path / "whole", *flags)
    save = checkpointing.save_run

    def save_and_stop(*args: Any, **settings: Any) -> None:
        save(*args, **settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpointing, "save_run", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train(folder, tmp_path / "halves", *flags)
    monkeypatch.undo()
    assert load_file(tmp_path / "halves" / "checkpoint.pth")["epoch"] == 1
    assert same(train(folder, tmp_path / "halves", *flags), whole)


@pytest.mark.parametrize(
    ("flags", "overrides", "policy", "channels"),
    [
        (("--aug-opt", "deit_aug"), (), "deit_aug", 3),
        ((), ("MODEL.SPEC.IN_CHANS", "1", "INPUT.MEAN", "[0.5]", "INPUT.STD", "[0.2]"), "dino_aug", 1),
    ],
)
def test_split_is_rejected_where_unsupported(
    folder: Path, tmp_path: Path, flags: tuple[str, ...], overrides: tuple[str, ...], policy: str, channels: int
) -> None:
    with pytest.raises(UsageError, match=f"--aug_backend split .* not {policy} with {channels}"):
        train(folder, tmp_path, "--aug_backend", "split", *flags, overrides=overrides)
