"""scripts/pretrain.sh, pretrain_small.sh, compare.sh: the commands they start, caught by a stand-in for python; usage errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from helpers.runs import caught_recipe, write_images

import main_esvit
from models import load_arch_config


@pytest.mark.parametrize(
    ("gpus", "per_gpu", "batch", "accum"), [(8, 64, 512, 1), (2, 64, 512, 4), (1, 32, 256, 8), (4, 128, 1024, 2)]
)
def test_batch_size_on_any_number_of_gpus(tmp_path: Path, gpus: int, per_gpu: int, batch: int, accum: int) -> None:
    sizes = {"GPUS": str(gpus), "PER_GPU": str(per_gpu), "BATCH": str(batch)}
    done = caught_recipe(tmp_path, "pretrain", "swin_tiny", "/data", "/out", "--epochs", "100", **sizes)
    words = done.stdout.splitlines()
    if gpus == 1:
        assert words[0] == str(ROOT / "main_esvit.py")  # no launcher
    else:
        assert words[:2] == ["-m", "torch.distributed.run"]
        assert f"--nproc_per_node={gpus}" in words
    args = main_esvit.get_args_parser().parse_args(words[words.index(str(ROOT / "main_esvit.py")) + 1 :])
    assert gpus * args.batch_size_per_gpu * args.accum_iter == batch
    assert args.accum_iter == accum
    assert (args.arch, args.data_path, args.output_dir, args.epochs) == ("swin_tiny", "/data", "/out", 100)
    assert (args.teacher_temp, args.warmup_teacher_temp_epochs, args.norm_last_layer) == (0.07, 30, False)


@pytest.mark.parametrize(
    ("args", "env", "words"),
    [
        (["swin_tiny"], {}, "ARCH IMAGENET OUT are needed, 1 were given"),
        (["a", "b", "c"], {"GPUS": "3"}, "GPUS x PER_GPU = 192"),
        (["a", "b", "c"], {"GPUS": "none"}, "GPUS=none "),
    ],
)
def test_usage_errors(tmp_path: Path, args: list[str], env: dict[str, str], words: str) -> None:
    done = caught_recipe(tmp_path, "pretrain", *args, **env)
    assert done.returncode == 2
    assert words in done.stderr


@pytest.mark.parametrize("words", [[], ["seeds"]])
def test_compare_rejects_other_words(words: list[str]) -> None:
    done = subprocess.run(["bash", str(ROOT / "scripts/compare.sh"), *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"'{''.join(words)}'" in done.stderr


@pytest.mark.parametrize(
    ("network", "images", "env", "epochs", "sizes"),
    [
        ("swin_32", 40, {"PROCESSES": "1"}, 6250, (32, 16)),
        ("vit_64", 40, {"PROCESSES": "1"}, 2000, (64, 32)),
        ("cvt_64", 40, {"PROCESSES": "2", "PASSES": "410"}, 10, (64, 32)),
        ("swin_128", 3, {"PROCESSES": "4", "PASSES": "1"}, 1, (128, 64)),
        ("swin_128", 3, {"PROCESSES": "1", "EPOCHS": "7"}, 7, (128, 64)),
    ],
)
def test_small_recipe(
    tmp_path: Path, network: str, images: int, env: dict[str, str], epochs: int, sizes: tuple[int, int]
) -> None:
    """Epochs follow from the number of images, sizes from the network; batch and flags are accepted by main_esvit.py."""
    write_images(tmp_path / "images", images, classes=1)
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] && exec "{sys.executable}" "$@"\nfor word in "$@"; do echo "$word"; done\n'
    )
    python.chmod(0o755)
    command = [
        "bash",
        str(ROOT / "scripts/pretrain_small.sh"),
        network,
        str(tmp_path / "images"),
        "/out",
        "--lr",
        "0.5",
    ]
    environment = os.environ | {"PYTHON": str(python)} | env
    words = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    args = main_esvit.get_args_parser().parse_args(words[words.index(str(ROOT / "main_esvit.py")) + 1 :])
    config = load_arch_config(args.arch, args.cfg)
    assert (args.epochs, args.lr, args.output_dir) == (epochs, 0.5, "/out")
    assert args.batch_size_per_gpu * int(env["PROCESSES"]) == 64
    assert (args.arch, args.aug_opt, args.use_dense_prediction) == (network.partition("_")[0], "small_aug", True)
    assert (list(config.MODEL.IMAGE_SIZE), args.local_crops_size) == ([sizes[0]] * 2, [sizes[1]])
    assert args.patch_size == sizes[0] // 8  # of a ViT; the others ignore it


@pytest.mark.parametrize(
    ("args", "env", "words"),
    [
        (["swin_33", "images", "/out"], {}, "NETWORK=swin_33 is not one of cvt_32"),
        (["swin_32", "nothing", "/out"], {}, "data path nothing does not exist"),
        (["swin_32", "images", "/out"], {"EPOCHS": "some"}, "EPOCHS=some "),
        (["swin_32", "images", "/out"], {"PASSES": "0"}, "PASSES=0 "),
        (["swin_32", "images", "/out"], {"PROCESSES": "65"}, "PER_GPU=0 "),
        (["swin_32", "images"], {}, "NETWORK IMAGES OUT are needed, 2 were given"),
    ],
)
def test_small_recipe_usage_errors(tmp_path: Path, args: list[str], env: dict[str, str], words: str) -> None:
    write_images(tmp_path / "images", 2, classes=1)
    environment = os.environ | {"PYTHON": sys.executable} | env
    command = ["bash", str(ROOT / "scripts/pretrain_small.sh"), *args]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert words in done.stderr
