"""The recipes for evaluation and analysis, at demo size: they leave what the script leaves that they start, and refuse mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers.mask_files import write_masks
from helpers.runs import TINY_SWIN, clean_environment, write_images
from PIL import Image

import eval_finetune
import eval_knn
import eval_linear
import eval_segmentation
import run_analysis
from models import build_model, load_arch_config

YAML = "experiments/demo/swin_micro.yaml"
SMALL = ["--cfg", str(ROOT / YAML), "--device", "cpu", "--num_workers", "0", "--seed", "0"]


def start(
    recipe: str, *args: str, cwd: Path, python: str = sys.executable, **env: str
) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "scripts" / f"{recipe}.sh"), *args]
    environment = clean_environment() | {"PYTHON": python} | env
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`images` with 12 and 6 images of three classes, `scenes` with masks, and a `checkpoint.pth` of random weights."""
    root = tmp_path_factory.mktemp("recipes")
    for seed, (split, count) in enumerate((("train", 4), ("val", 2))):
        write_images(root / "images" / split, count, classes=3, seed=seed)
    write_masks(root / "scenes")
    torch.manual_seed(1)
    network = build_model("swin", load_arch_config("swin", str(ROOT / YAML), TINY_SWIN))
    torch.save({"teacher": network.state_dict(), "student": {}}, root / "checkpoint.pth")
    return root


# recipe -> script, what it is given after ARCH, its environment, further flags, and what the script is given for that
EVALUATIONS: dict[str, tuple[Any, dict[str, str], list[str], list[str]]] = {
    "eval_knn": (
        eval_knn, {"GPUS": "2"}, ["--nb_knn", "1", "3"],
        ["--nb_knn", "1", "3", "--batch_size_per_gpu", "5"],
    ),
    "eval_linear": (
        eval_linear, {"GPUS": "1", "BATCH": "8"}, ["--epochs", "2", "--n_last_blocks", "3"],
        ["--epochs", "2", "--n_last_blocks", "3", "--lr", "0.001", "--batch_size_per_gpu", "8"],
    ),
    "eval_finetune": (
        eval_finetune, {"GPUS": "1", "PER_GPU": "2", "BATCH": "4"},
        ["--epochs", "2", "--warmup_epochs", "1", "--precision", "fp32"],
        ["--batch_size_per_gpu", "2", "--accum_iter", "2", "--epochs", "2", "--precision", "fp32", "--warmup_epochs", "1"],
    ),
    "eval_finetune_beit": (
        eval_finetune, {"GPUS": "1", "PER_GPU": "4", "BATCH": "4"},
        ["--epochs", "1", "--warmup_epochs", "0", "--precision", "fp32"],
        ["--batch_size_per_gpu", "4", "--epochs", "1", "--precision", "fp32", "--warmup_epochs", "0", "--lr", "0.00025",
         "--layer_decay", "0.55", "--clip_grad", "0", "--drop_path", "0.1", "--init_scale", "0.001",
         "--val_interpolation", "bilinear"],
    ),
    "eval_segmentation": (
        eval_segmentation, {"GPUS": "1", "BATCH": "4"},
        ["--epochs", "1", "--stages", "1", "2", "--image_size", "32", "--window", "32", "--stride", "20", "--classes", "2"],
        ["--epochs", "1", "--stages", "1", "2", "--image_size", "32", "--window", "32", "--stride", "20", "--classes", "2",
         "--reduce_zero_label", "--lr", "0.001", "--batch_size_per_gpu", "4"],
    ),
    "eval_semi_supervised": (
        eval_finetune, {"GPUS": "1", "PER_GPU": "4", "BATCH": "4"},
        ["--epochs", "1", "--warmup_epochs", "0", "--precision", "fp32", "--finetune_head_layer", "0"],
        ["--batch_size_per_gpu", "4", "--epochs", "1", "--precision", "fp32", "--warmup_epochs", "0", "--lr", "0.0000025",
         "--layer_decay", "1", "--clip_grad", "0", "--drop_path", "0.1"],
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("recipe", EVALUATIONS)
def test_evaluation_recipes_equal_their_script(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    """Started from another folder, with paths relative to it."""
    script, env, given, expected = EVALUATIONS[recipe]
    out, images = tmp_path / "out", "scenes" if recipe == "eval_segmentation" else "images"
    done = start(
        recipe, "swin", images, "checkpoint.pth", str(out), *SMALL, *given, "--", *TINY_SWIN, cwd=folder, **env
    )
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(folder)
    flags = ["--arch", "swin", "--data_path", images, "--pretrained_weights", "checkpoint.pth"]
    flags += ["--output_dir", str(tmp_path / "direct"), *SMALL, *expected, "--", *TINY_SWIN]
    script.main(script.get_args_parser().parse_args(flags))
    results = [
        {path.name: path.read_bytes() for path in (folder / "results").iterdir()}
        for folder in (out, tmp_path / "direct")
    ]
    assert results[0] == results[1]
    assert [Path(name).suffix for name in sorted(results[0])] == [".json", ".csv"]


ANALYSES = {
    "analysis_attention": ["--vis_attention", "--image_path", "images/val/class1/000.png"],
    "analysis_correspondence": ["--vis_correspondence", "--image_path", "images/val/class1/000.png"],
    "analysis_entropy": ["--vis_entropy", "--data_path", "images"],
    "analysis_measure_correspondence": ["--measure_correspondence", "--data_path", "images"],
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ANALYSES)
def test_analysis_recipes_equal_their_script(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    expected, out, direct = ANALYSES[recipe], tmp_path / "out", tmp_path / "direct"
    tail = [*SMALL, "--", *TINY_SWIN]
    done = start(recipe, "swin", "checkpoint.pth", expected[-1], str(out), *tail, cwd=folder, GPUS="1")
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(folder)
    flags = ["--arch", "swin", "--pretrained_weights", "checkpoint.pth", *expected, "--output_dir", str(direct), *tail]
    run_analysis.main(run_analysis.get_args_parser().parse_args(flags))
    names = sorted(str(path.relative_to(direct)) for path in direct.rglob("*.*"))
    assert names == sorted(str(path.relative_to(out)) for path in out.rglob("*.*"))
    compared = 0
    for name in names:
        if name.endswith(".png"):
            with Image.open(out / name) as one, Image.open(direct / name) as other:
                assert np.array_equal(np.asarray(one), np.asarray(other)), name
            compared += 1
        if name.endswith(".json"):
            assert json.loads((out / name).read_text()) == json.loads((direct / name).read_text()), name
            compared += 1
    assert compared


@pytest.mark.parametrize("recipe", [*EVALUATIONS, *ANALYSES, "pretrain"])
def test_missing_arguments_end_with_the_usage_and_code_2(tmp_path: Path, recipe: str) -> None:
    done = start(recipe, "swin", "--epochs", "3", "4", "5", "6", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"{recipe}.sh: error: ARCH ")
    assert f" are needed, 1 were given; usage: bash scripts/{recipe}.sh ARCH " in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("recipe", "env", "words"),
    [
        ("eval_knn", {"GPUS": "0"}, "GPUS=0 "),
        ("eval_linear", {"GPUS": "3"}, "GPUS=3"),
        ("eval_segmentation", {"GPUS": "3"}, "GPUS=3"),
        ("eval_linear", {"GPUS": "2", "BATCH": "many"}, "BATCH=many "),
        ("eval_finetune", {"GPUS": "5"}, "GPUS x PER_GPU = 320"),
    ],
)
def test_numbers_that_do_not_fit(tmp_path: Path, recipe: str, env: dict[str, str], words: str) -> None:
    done = start(recipe, "swin", "a", "b", "c", cwd=tmp_path, python="false", **env)
    assert done.returncode == 2
    assert words in done.stderr


def test_every_recipe_is_tested() -> None:
    """What tests/project/test_scripts.py and this file start, and what sets up, shows and compares."""
    found = {path.stem for path in (ROOT / "scripts").glob("*.sh")}
    assert {*EVALUATIONS, *ANALYSES, "pretrain"} <= found
    assert all(name.startswith(("eval_", "analysis_")) is (name in {*EVALUATIONS, *ANALYSES}) for name in found)
