"""scripts/pretrain.sh and compare.sh: the commands they start, caught by a stand-in for python, and their usage errors."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from helpers.runs import caught_recipe

import main_esvit


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
