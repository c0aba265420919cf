"""Two processes with half the batch each give what one process gives with the whole batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from runs import TINY_RUN, TINY_SWIN, run_script, write_images

import checkpoint

pytestmark = pytest.mark.slow
SAME_RUN = [
    *TINY_RUN,
    "--epochs",
    "2",
    "--clip_grad",
    "0.3",
    "--momentum_teacher",
    "0.9",
    "--optimizer",
    "sgd",
    "--lr",
    "1.0",
]


def losses_of(run: Path) -> list[float]:
    return [json.loads(line)["train_loss"] for line in (run / "log.txt").open()]


@pytest.mark.parametrize("dense", ["on", "off"])
def test_two_processes_equal_one(tmp_path: Path, dense: str) -> None:
    """Losses, centres and weights; the images are read from disk by the real loader, 17 of them so that one is left over.

    SGD, because Adam divides rounding errors of tiny gradients by their own size.
    """
    images = write_images(tmp_path / "images", 17)
    no_drop_path = [*TINY_SWIN[:-1], "0.0"]
    for run, processes, batch in (("one", 0, 8), ("two", 2, 4)):
        flags = ["--use_dense_prediction", dense, "--batch_size_per_gpu", str(batch), "--data_path", str(images)]
        flags += ["--output_dir", str(tmp_path / run)]
        result = run_script("main_esvit.py", *SAME_RUN, *flags, *no_drop_path, processes=processes)
        assert result.returncode == 0, result.stderr
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-5)
    one, two = (checkpoint.load_file(tmp_path / run / "checkpoint.pth") for run in ("one", "two"))
    for part in ("dino_loss", "student", "teacher"):
        assert one[part].keys() == two[part].keys()
        for name, value in one[part].items():
            torch.testing.assert_close(two[part][name], value, rtol=1e-4, atol=1e-5, msg=f"{part} {name}")
    assert len(two["rng"]) == 2
    assert not torch.equal(two["rng"][0]["torch"], two["rng"][1]["torch"])  # each rank draws its own numbers


def test_knn_of_two_processes_equals_one(tmp_path: Path) -> None:
    """Features of an odd number of images, without doubles or losses, in the data set's order."""
    for split, count in (("train", 5), ("val", 3)):
        write_images(tmp_path / "images" / split, count, classes=3, seed=len(split))
    flags = ["--arch", "swin", "--cfg", "experiments/demo/swin_micro.yaml", "--device", "cpu", "--num_workers", "0"]
    flags += ["--data_path", str(tmp_path / "images"), "--batch_size_per_gpu", "4", "--nb_knn", "1", "3"]
    outputs = []
    for run, processes in (("one", 0), ("two", 2)):
        result = run_script(
            "eval_knn.py",
            *flags,
            "--dump_features",
            str(tmp_path / run),
            "--output_dir",
            str(tmp_path / run),
            *TINY_SWIN,
            processes=processes,
        )
        assert result.returncode == 0, result.stderr
        outputs.append([line for line in result.stdout.splitlines() if "Top1" in line])
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == 2
    for name, rows in (("trainfeat", 15), ("testfeat", 9), ("trainlabels", 15), ("testlabels", 9)):
        one, two = (checkpoint.load_file(tmp_path / run / f"{name}.pth")["tensor"] for run in ("one", "two"))
        assert len(one) == rows
        torch.testing.assert_close(one, two)


def test_old_launcher_and_slurm_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--local-rank` of torch.distributed.launch is taken, and a run under srun joins its group."""
    images = write_images(tmp_path / "images", 4)
    flags = [*TINY_RUN, "--epochs", "1", "--data_path", str(images)]
    result = run_script("main_esvit.py", "--local-rank=0", *flags, "--output_dir", str(tmp_path / "launch"), *TINY_SWIN)
    assert result.returncode == 0, result.stderr
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    result = run_script("main_esvit.py", *flags, "--output_dir", str(tmp_path / "slurm"), *TINY_SWIN)
    assert result.returncode == 0, result.stderr
    assert checkpoint.load_file(tmp_path / "slurm" / "checkpoint.pth")["world_size"] == 1
