"""INPUT.RANGE from the command line to the network."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import TINY_RUN, TINY_SWIN, TINY_UDI, TINY_VIT, run_script
from PIL import Image

import eval_knn
import main_esvit
import main_udi
from checkpoints.serialization import load_file
from config.loading import load_config
from utils import UsageError

RANGE = ["INPUT.RANGE", "[0, 4000]"]
FEW = [*TINY_RUN, "--epochs", "1", "--num_workers", "0"]
NETWORK = ["--arch", "swin", "--device", "cpu", "--num_workers", "0", "--batch_size_per_gpu", "4", "--nb_knn", "1"]


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    """Write class folders of int64 arrays, and the same images as 8-bit PNG files."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for number in range(8):
            level = rng.integers(0, 255, (40, 40, 3))
            for kind in ("arrays", "pngs"):
                (tmp_path / kind / part / str(number % 2)).mkdir(parents=True, exist_ok=True)
            name = Path(part, str(number % 2), str(number))
            np.save(tmp_path / "arrays" / name.with_suffix(".npy"), np.round(level / 255 * 4000).astype(np.int64))
            Image.fromarray(level.astype(np.uint8)).save(tmp_path / "pngs" / name.with_suffix(".png"))
    return tmp_path / "arrays"


def train(data: Path, out: Path, *more: str) -> None:
    command = [*FEW, "--data_path", str(data), "--output_dir", str(out), *more, *TINY_SWIN]
    main_esvit.main(main_esvit.get_args_parser().parse_args(command))


def test_error_on_all_processes(arrays: Path, tmp_path: Path) -> None:
    """In one sentence with exit code 2, though only a worker of one process has read the file."""
    for path in sorted((arrays / "train").rglob("*.npy"))[:-1]:
        np.save(path, np.load(path).astype(np.float32) / 4000)
    command = [*FEW, "--num_workers", "1", "--batch_size_per_gpu", "4", "--data_path", str(arrays / "train")]
    done = run_script("main_esvit.py", *command, "--output_dir", str(tmp_path / "out"), *TINY_SWIN, processes=2)
    messages = [line for line in done.stderr.splitlines() if "error" in line and "7.npy has int64 values from" in line]
    assert len(messages) == 2, done.stderr
    assert all("INPUT.RANGE" in line for line in messages)
    assert "Traceback (most recent" not in done.stderr.partition(messages[-1])[0]
    assert done.stderr.count("exitcode  : 2") >= 1
    assert not (tmp_path / "out" / "checkpoint.pth").exists()


def test_evaluation_uses_the_saved_range(arrays: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.npy has int64 values from \d+ to \d+.* set INPUT\.RANGE"):
        train(arrays / "train", tmp_path / "refused")
    train(arrays / "train", tmp_path / "out", *RANGE)
    assert load_config(tmp_path / "out" / "config.yaml").INPUT.RANGE == [0.0, 4000.0]
    weights = ["--pretrained_weights", str(tmp_path / "out" / "checkpoint.pth")]
    for kind in ("arrays", "pngs"):
        dump = ["--dump_features", str(tmp_path / f"{kind}.features")]
        flags = [*NETWORK, *weights, *dump, "--data_path", str(tmp_path / kind), "--output_dir", str(tmp_path / kind)]
        eval_knn.main(eval_knn.get_args_parser().parse_args(flags))
    one, two = (load_features(tmp_path / f"{kind}.features") for kind in ("arrays", "pngs"))
    assert torch.equal(one, two)


def load_features(folder: Path) -> torch.Tensor:
    return torch.cat([torch.load(path, weights_only=True) for path in sorted(folder.glob("*feat*"))])


@pytest.mark.parametrize("backend", ["pil", "split", "udi"])
def test_training_on_a_declared_range(arrays: Path, tmp_path: Path, backend: str) -> None:
    """Equal to training on PNG files with the same values, to the last digit of the log."""
    logs = []
    for kind in ("arrays", "pngs"):
        data, out = tmp_path / kind / "train", tmp_path / f"{kind}_{backend}"
        if backend == "udi":
            command = [
                *TINY_UDI,
                "--epochs",
                "1",
                "--data_path",
                str(data),
                "--output_dir",
                str(out),
                *RANGE,
                *TINY_VIT,
            ]
            main_udi.main(main_udi.get_args_parser().parse_args(command))
        else:
            train(data, out, "--aug_backend", backend, *RANGE)
        logs.append(json.loads((out / "log.txt").read_text()))
        assert load_file(out / "checkpoint.pth")["epoch"] == 1
    assert logs[0]["train_loss"] == logs[1]["train_loss"]
