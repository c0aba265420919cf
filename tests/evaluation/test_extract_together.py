"""Processes that extract features together, and flags that contradict finished features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from helpers.feature_runs import SMALL, derive, extract, meta
from helpers.runs import TINY_SWIN, run_script, write_images

from data.loader import FailureTally
from evaluation import extraction
from utils import UsageError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Eleven images."""
    return write_images(tmp_path / "images", 11)


@pytest.mark.slow
def test_a_process_that_fails_stops_the_other(images: Path, tmp_path: Path) -> None:
    """The second of two processes fails at once; the first computes 2 of its 6 images, not all while the second waits."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys; from functools import partial\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import extract_features as e; from distributed import launch; from evaluation import extraction\n"
        "extraction.BATCHES_A_VOTE, extract_batch = 2, extraction._extract_batch\n"
        "def failing(args, batch, backbone, writer, device):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise e.UsageError('the features are not finite')\n"
        "    print('batch', batch.first, flush=True)\n"
        "    extract_batch(args, batch, backbone, writer, device)\n"
        "extraction._extract_batch = failing\n"
        "launch.run_script(partial(e.main, e.get_args_parser().parse_args(sys.argv[1:])))\n"
    )
    flags = ["--random_weights", "--data_path", str(images), "--output_dir", str(tmp_path / "out"), "--seed", "0"]
    flags += ["--batch_size_per_gpu", "1"]
    done = run_script(str(program), *SMALL, *flags, *TINY_SWIN, processes=2)
    assert done.returncode != 0
    assert "error: the features are not finite" in done.stderr
    assert done.stdout.split("\n")[:-1] == ["batch 0", "batch 2"]


@pytest.mark.parametrize("batches", [1, 2, 3])
def test_votes_do_not_change_the_features(
    batches: int, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = extract(tmp_path / "whole", images)
    exchange, votes = FailureTally.exchange, 0

    def counted(*args: Any) -> list[float]:
        nonlocal votes
        votes += 1
        return exchange(*args)

    monkeypatch.setattr(extraction, "BATCHES_A_VOTE", batches)
    monkeypatch.setattr(FailureTally, "exchange", counted)
    assert extract(tmp_path / "out", images).tobytes() == expected.tobytes()
    assert votes == -(-3 // batches)


@pytest.mark.parametrize(
    "flags",
    [
        "--arch resnet50",
        "--patch_size 16",
        "--cfg x.yaml",
        "--pretrained_weights x.pth",
        "--checkpoint_key student",
        "--token both",
        "--allow_partial",
        "--dataset cifar",
        "--split val",
        "--zip_mode",
        "--tsv_mode",
        "--image_size 40",
        "--crop_ratio 0.5",
        "--regions",
        "--half",
        "--normalize",
        "MODEL.SPEC.WINDOW_SIZE 14",
    ],
)
def test_flags_that_contradict_a_finished_folder(flags: str, finished: Path) -> None:
    with pytest.raises(UsageError, match=f"{flags}.* cannot change the finished features"):
        derive(finished, *flags.split(), "--neighbors", "2")


def test_flags_that_a_finished_folder_was_made_with(finished: Path) -> None:
    flags = "--arch swin --random_weights --dataset images --split train --image_size 32 --crop_ratio 0.875 --half off"
    derive(finished, *flags.split(), "--patch_size", str(meta(finished)["network"]["patch_size"]), "--neighbors", "2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of finished features."""
    folder = tmp_path_factory.mktemp("finished")
    extract(folder / "out", write_images(folder / "images", 3))
    return folder / "out"
