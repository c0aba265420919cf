"""The commands of docs/evaluation.md, run in order on small images with a small network."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helpers.mask_files import write_masks
from helpers.runs import TINY_SWIN, write_images
from PIL import Image

from models import build_model, load_arch_config

PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
SCRIPTS = (
    "eval_knn",
    "eval_linear",
    "eval_finetune",
    "eval_logistic",
    "eval_segmentation",
    "eval_video",
    "extract_features",
    "run_analysis",
    "compare_runs",
)
YAML = str(ROOT / "experiments/demo/swin_micro.yaml")
SMALL = {
    "eval_knn": ["--num_workers", "0", "--nb_knn", "1"],
    "eval_linear": ["--num_workers", "0", "--n_last_blocks", "1", "--epochs", "1", "--batch_size_per_gpu", "4"],
    "eval_finetune": [
        *("--num_workers", "0", "--epochs", "1", "--warmup_epochs", "0", "--batch_size_per_gpu", "4"),
        *("--precision", "fp32"),
    ],
    "eval_logistic": ["--num_workers", "0", "--epochs", "5"],
    "eval_segmentation": [
        *("--num_workers", "0", "--epochs", "1", "--stages", "1", "2", "--window", "32", "--batch_size_per_gpu", "2")
    ],
    "eval_video": ["--image_size", "64"],
    "extract_features": ["--num_workers", "0"],
    "run_analysis": ["--num_workers", "0", "--num_images", "1"],
}


def commands() -> list[tuple[str, list[str]]]:
    """Return scripts and flags of all commands, without those under torchrun."""
    found = re.findall(r"^python (\w+)\.py (.*)$", PAGE.replace("\\\n", " "), flags=re.MULTILINE)
    return [(script, shlex.split(line)) for script, line in found]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files that the commands name."""
    for seed, split in enumerate(("train", "val")):
        write_images(tmp_path / "IMAGES" / split, 4, classes=2, seed=seed)
    write_masks(tmp_path / "SCENES")
    write_masks(tmp_path / "CAMVID", void=11)
    (tmp_path / "names.txt").write_text("sky\nroad\ncar\n")
    (tmp_path / "list.txt").write_text("class0/000.png\nclass1/000.png\nclass1/001.png\n")
    write_images(tmp_path / "FRAMES", 2, size=64)
    mask = Image.new("L", (64, 64))
    mask.paste(1, (16, 16, 48, 48))
    mask.save(tmp_path / "MASK.png")
    Image.open(tmp_path / "FRAMES" / "000.png").save(tmp_path / "PHOTO.png")
    (tmp_path / "RUN").mkdir()
    network = build_model("swin", load_arch_config("swin", YAML, TINY_SWIN))
    torch.save({"teacher": network.state_dict(), "student": network.state_dict()}, tmp_path / "RUN" / "checkpoint.pth")
    return tmp_path


def test_commands_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert {script for script, _ in commands()} == set(SCRIPTS)
    for name, flags in commands():
        script = importlib.import_module(name)
        network = ["--arch", "swin", "--cfg", YAML, "--device", "cpu"]
        needs_network = name in SMALL and (name != "extract_features" or "--data_path" in flags)
        small = [*network, *SMALL[name], "--seed", "0", *TINY_SWIN] if needs_network else []
        script.main(script.get_args_parser().parse_args([*flags, *small]))
    written = {str(path.relative_to(folder / "RUN")) for path in (folder / "RUN").rglob("*.*")}
    assert {
        *("results/knn.json", "results/knn.json.bak", "loaded/results/knn.json", "linear/results/linear.json"),
        *("cached/results/linear.json", "finetuned/results/finetune.json", "few/results/finetune.json"),
        *("segmentation/results/segmentation.json", "segmentation/results/segmentation_knn.json"),
        *("segmentation/predictions.png", "segmentation_cached/results/segmentation.json"),
        *("logistic/results/logistic.json", "masks/001.png", "analysis/results/correspondence.json"),
        *("features/features.npy", "features/neighbors.csv", "features/duplicates.csv", "features/plot_tsne.png"),
        *("analysis/results/stereo.json", "analysis/report.html", "comparison/comparison.html"),
    } <= written


def test_flags_and_files_exist() -> None:
    known = {
        flag
        for name in (*SCRIPTS, "main_esvit")
        for flag in importlib.import_module(name).get_args_parser()._option_string_actions
    }
    assert set(re.findall(r"--\w+", PAGE)) - {"--nproc_per_node"} <= known
    for name in re.findall(r"`(\w+/\w+\.sh|\w+\.py)`", PAGE):
        assert (ROOT / name).is_file()
    for name in re.findall(r"\]\((\w+\.md)\)", PAGE):
        assert (ROOT / "docs" / name).is_file()
