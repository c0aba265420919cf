"""Two processes with half the batch each give what one process gives with the whole batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from runs import TINY_RUN, TINY_SWIN, free_port, run_script, start_script, write_images

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
            "--random_weights",
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
        one, two = (checkpoint.load_tensor(tmp_path / run / f"{name}.pth") for run in ("one", "two"))
        assert len(one) == rows
        torch.testing.assert_close(one, two)


def test_accumulation_and_batch_norm_heads_resume_on_two_processes(tmp_path: Path) -> None:
    """Two epochs in one go and with a stop between end with the same weights, bit for bit, on both processes."""
    images = write_images(tmp_path / "images", 17)
    flags = [
        *TINY_RUN,
        "--data_path",
        str(images),
        "--batch_size_per_gpu",
        "2",
        "--accum_iter",
        "2",
        "--use_bn_in_head",
        "on",
    ]
    for run, epochs in (("whole", ["2"]), ("parts", ["1", "2"])):
        for last in epochs:
            # The schedules depend on --epochs: keep them flat, so that a shorter first part is the same run.
            flat = ["--epochs", last, "--lr", "0.1", "--min_lr", str(0.1 * 8 / 256)]
            flat += ["--weight_decay_end", "0.04", "--momentum_teacher", "1"]
            result = run_script(
                "main_esvit.py", *flags, *flat, "--output_dir", str(tmp_path / run), *TINY_SWIN, processes=2
            )
            assert result.returncode == 0, result.stderr
    whole, parts = (checkpoint.load_file(tmp_path / run / "checkpoint.pth") for run in ("whole", "parts"))
    assert all(key.startswith("module.") for key in whole["teacher"])  # wrapped, as published for BatchNorm networks
    for part in ("student", "teacher", "dino_loss"):
        for name, value in whole[part].items():
            assert torch.equal(parts[part][name], value), f"{part} {name}"


def test_mistake_on_two_processes_ends_both(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 17)
    (images / "003.png").write_bytes(b"no image")
    flags = [*TINY_RUN, "--data_path", str(images), "--output_dir", str(tmp_path / "out")]
    result = run_script("main_esvit.py", *flags, *TINY_SWIN, processes=2, timeout=90)
    assert result.returncode != 0
    assert "1 of 17 images cannot be read, more than 1 %" in result.stderr


def test_old_launcher_flag_is_taken(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 4)
    flags = [*TINY_RUN, "--epochs", "1", "--data_path", str(images), "--output_dir", str(tmp_path / "out")]
    result = run_script("main_esvit.py", "--local-rank=0", *flags, *TINY_SWIN)
    assert result.returncode == 0, result.stderr


def test_srun_variables_make_a_group(tmp_path: Path) -> None:
    """Two plain processes with the variables that srun sets."""
    images = write_images(tmp_path / "images", 8)
    flags = [*TINY_RUN, "--epochs", "1", "--data_path", str(images), "--output_dir", str(tmp_path / "out"), *TINY_SWIN]
    shared = {"SLURM_STEP_NUM_TASKS": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in (0, 1)]
    processes = [start_script("main_esvit.py", *flags, env=shared | rank) for rank in ranks]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert checkpoint.load_file(tmp_path / "out" / "checkpoint.pth")["world_size"] == 2
    assert errors[1].count("epoch 1/1") == 0  # only the main process tells


def test_rows_are_gathered_from_processes_without_any(tmp_path: Path) -> None:
    script = tmp_path / "gather.py"
    script.write_text(
        "import argparse, sys, torch\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import utils\n"
        "def main():\n"
        "    utils.init_processes(argparse.Namespace(device='cpu', dist_url='env://', dist_timeout=1, local_rank=None))\n"
        "    rows = torch.zeros(0) if utils.get_rank() else torch.tensor([[1, 2], [3, 4]])\n"
        "    assert torch.cat([part.view(-1, 2) for part in utils.all_gather_rows(rows)]).tolist() == [[1, 2], [3, 4]]\n"
        "    utils.must_agree('numbers', 3)\n"
        "    utils.must_agree('ranks', utils.get_rank())\n"
        "utils.run_script(main)\n"
    )
    result = run_script(str(script), processes=2)
    assert "gather.py: error: the processes see different ranks ([0, 1])" in result.stderr
    assert "gather.py: error (process 1): the processes see different ranks ([0, 1])" in result.stderr
    assert result.returncode == 1  # torchrun's own
    assert "exitcode  : 2" in result.stderr
