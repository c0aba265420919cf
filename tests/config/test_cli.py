"""Command lines: frozen names and defaults, and one line with exit code 2 for every usage error."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers.runs import TINY_RUN, TINY_SWIN, run_script, write_images

import compare_runs
import eval_finetune
import eval_knn
import eval_linear
import eval_logistic
import eval_segmentation
import eval_video
import export
import extract_features
import main_esvit
import main_esvit_mnodes
import main_udi
import run_analysis
import utils
from config.arguments.shared import existing_path
from data import convert
from distributed.launch import run_script as run_as_script
from utils import UsageError

# The published command line: names and defaults that must never change.
PUBLISHED = {
    "cfg": None, "arch": "deit_small", "patch_size": 16, "out_dim": 65536, "norm_last_layer": True, "momentum_teacher": 0.996,
    "use_bn_in_head": False, "use_dense_prediction": False, "warmup_teacher_temp": 0.04, "teacher_temp": 0.04,
    "warmup_teacher_temp_epochs": 0, "use_fp16": True, "weight_decay": 0.04, "weight_decay_end": 0.4, "clip_grad": 3.0,
    "batch_size_per_gpu": 64, "epochs": 100, "freeze_last_layer": 1, "lr": 0.0005, "warmup_epochs": 10, "min_lr": 1e-6,
    "optimizer": "adamw", "global_crops_scale": (0.4, 1.0), "local_crops_number": (8,), "local_crops_scale": (0.05, 0.4),
    "local_crops_size": (96,), "aug_opt": "dino_aug", "color_jitter": 0.4, "aa": "rand-m9-mstd0.5-inc1",
    "train_interpolation": "bicubic", "reprob": 0.25, "remode": "pixel", "recount": 1, "resplit": False, "use_mixup": False,
    "num_mixup_views": 10, "mixup": 0.8, "cutmix": 1.0, "cutmix_minmax": None, "mixup_prob": 1.0, "mixup_switch_prob": 0.5,
    "mixup_mode": "batch", "smoothing": 0.0, "dataset": "imagenet1k", "zip_mode": False, "tsv_mode": False,
    "sampler": "distributed", "pretrained_weights_ckpt": "", "output_dir": ".", "saveckp_freq": 5, "save_every_steps": 0,
    "save_every_minutes": 0.0,
    "keep_last": 1, "seed": 0,
    "num_workers": 10, "dist_url": "env://", "local_rank": None,
}  # fmt: skip
ADDED = {
    "centering": "mean", "koleo_weight": 0.0,
    "shuffle_buffer": 256, "epoch_images": 0,
    "data_path": "", "head_hidden_dim": 2048, "head_bottleneck_dim": 256, "drop_path": None,
    "grad_checkpointing": False, "compile": False, "fsdp": False, "fsdp_group": 0,
    "precision": "auto", "accum_iter": 1, "global_crops_size": None, "log_freq": 10, "device": "auto", "opts": [],
    "aug_backend": "auto", "decode": "full", "plain_loss": False,
    "init_weights": "",
    "allow_partial": False, "max_bad_steps": 20, "knn_every": 0, "knn_data_path": "", "wandb": "",
}  # fmt: skip
PUBLISHED_UDI = {
    "arch": "vit_small", "patch_size": 16, "out_dim": 65536, "include_patch": True, "number_cls_token": 2, "norm_last_layer": True,
    "use_bn_in_head": False, "momentum_teacher": 0.996, "alpha": 0.5, "warmup_teacher_temp": 0.04, "teacher_temp": 0.07,
    "warmup_teacher_temp_epochs": 30, "use_fp16": True, "weight_decay": 0.04, "weight_decay_end": 0.1, "clip_grad": 3.0,
    "batch_size_per_gpu": 128, "epochs": 300, "freeze_last_layer": 1, "lr": 0.0005, "warmup_epochs": 10, "min_lr": 1e-5,
    "optimizer": "adamw", "drop_path_rate": 0.1, "global_crops_scale": (0.25, 1.0), "local_crops_number": (6,),
    "local_crops_scale": (0.05, 0.25), "global_sampling_window_size": 3, "local_sampling_window_size": 2, "output_dir": ".",
    "saveckp_freq": 20, "seed": 0, "num_workers": 10, "dist_url": "env://", "local_rank": None,
}  # fmt: skip
ADDED_UDI: dict[str, object] = {
    "target_mix": "logits", "global_pair_mode": "overlap", "srs_align": "corners", "local_reference": "intersection",
    "srs_drawing": "image", "srs_heads": 0, "shared_head": True, "local_patch": False, "level_weights": (1.0, 1.0, 1.0),
    "student_temp": 0.1, "center_momentum": 0.9, "flip_prob": 0.5, "global_crops_size": None, "local_crops_size": (96,),
    "color_jitter": 0.4,
    "cfg": None, "dataset": "imagenet1k", "zip_mode": False, "tsv_mode": False, "sampler": "distributed", "shuffle_buffer": 256,
    "epoch_images": 0, "data_path": "", "head_hidden_dim": 2048, "head_bottleneck_dim": 256, "grad_checkpointing": False,
    "fsdp_group": 0,
    "compile": False, "fsdp": False, "precision": "auto", "accum_iter": 1, "log_freq": 10, "device": "auto", "opts": [],
    "aug_backend": "auto", "decode": "full", "plain_loss": False, "pretrained_weights_ckpt": "", "init_weights": "",
    "allow_partial": False, "max_bad_steps": 20, "knn_every": 0, "knn_data_path": "", "wandb": "",
    "save_every_steps": 0, "save_every_minutes": 0.0, "keep_last": 1,
}  # fmt: skip
PUBLISHED_KNN = {
    "cfg": None, "arch": None, "batch_size_per_gpu": 128, "nb_knn": [10, 20, 100, 200], "temperature": 0.07,
    "pretrained_weights": "", "use_cuda": True, "patch_size": None, "checkpoint_key": "teacher", "dump_features": None,
    "load_features": None, "num_workers": 10, "dist_url": "env://", "local_rank": None, "zip_mode": False,
}  # fmt: skip
ADDED_KNN: dict[str, object] = {
    "tsv_mode": False,
    "data_path": "", "image_size": None, "crop_ratio": 0.875, "baselines": False, "output_dir": None, "seed": 0,
    "device": "auto", "opts": [], "random_weights": False,
    "token": "cls", "allow_partial": False, "half": False, "backend": "torch", "leave_one_out": False,
}  # fmt: skip
PUBLISHED_LINEAR = {
    "cfg": None, "arch": None, "n_last_blocks": [4], "avgpool_patchtokens": False, "patch_size": None,
    "pretrained_weights": "", "checkpoint_key": "teacher", "epochs": 100, "lr": [0.001], "batch_size_per_gpu": 128,
    "data_path": "", "num_workers": 10, "val_freq": 1, "output_dir": ".", "zip_mode": False, "num_labels": 1000,
    "dist_url": "env://", "local_rank": None,
}  # fmt: skip
ADDED_LINEAR: dict[str, object] = {
    "tsv_mode": False,
    "random_weights": False,
    "token": "cls", "train_aug": "standard", "lr_min": 0.0, "evaluate": False, "linear_weights": "", "linear_order": "esvit",
    "allow_partial": False, "cache_features": False, "precision": "fp32", "image_size": None, "crop_ratio": 0.875, "seed": 0,
    "log_freq": 20, "device": "auto", "opts": [], "wandb": "",
}  # fmt: skip

FINETUNE: dict[str, object] = {
    "tsv_mode": False,
    "cfg": None, "arch": None, "patch_size": None, "pretrained_weights": "", "checkpoint_key": "teacher",
    "random_weights": False,
    "token": "cls", "finetune_head_layer": 0, "init_scale": 1.0, "target_list_path": None,
    "allow_partial": False, "drop_path": None, "grad_checkpointing": False, "epochs": 100, "warmup_epochs": 5,
    "batch_size_per_gpu": 64, "accum_iter": 1, "lr": 5e-4, "min_lr": 1e-6, "layer_decay": 0.75, "weight_decay": 0.05,
    "clip_grad": 5.0, "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1, "aa": "rand-m9-mstd0.5-inc1", "color_jitter": 0.4,
    "reprob": 0.25, "model_ema": False, "model_ema_decay": 0.9999, "image_size": None, "crop_ratio": 0.875,
    "precision": "auto", "val_freq": 1, "log_freq": 10, "seed": 0, "num_workers": 10, "data_path": "", "output_dir": ".",
    "val_interpolation": "bicubic", "device": "auto", "dist_url": "env://", "local_rank": None, "opts": [], "zip_mode": False,
    "wandb": "",
}  # fmt: skip

LOGISTIC: dict[str, object] = {
    "cfg": None, "arch": None, "patch_size": None, "pretrained_weights": "", "checkpoint_key": "teacher",
    "random_weights": False, "allow_partial": False, "token": "cls", "n_last_blocks": 1, "avgpool_patchtokens": 0,
    "lr_lambd": [0.01, 0.1, 1.0], "adjust_lambd": True, "epochs": 1000, "target_list_path": None,
    "batch_size_per_gpu": 128, "image_size": None, "crop_ratio": 0.875, "output_dir": None, "seed": 0, "num_workers": 10,
    "data_path": "", "zip_mode": False, "tsv_mode": False, "device": "auto", "dist_url": "env://", "local_rank": None,
    "opts": [],
}  # fmt: skip

EXTRACT: dict[str, object] = {
    "cfg": None, "arch": None, "patch_size": None, "pretrained_weights": "", "checkpoint_key": "teacher",
    "random_weights": False, "allow_partial": False, "token": "cls", "data_path": "", "split": "train", "dataset": "imagenet1k",
    "zip_mode": False, "tsv_mode": False, "batch_size_per_gpu": 128, "num_workers": 10, "image_size": None, "crop_ratio": 0.875,
    "regions": False, "half": False, "normalize": False, "neighbors": None, "duplicates": None, "plot": None, "backend": "auto",
    "output_dir": "o", "seed": 0, "device": "auto", "dist_url": "env://", "local_rank": None, "opts": [],
}  # fmt: skip

SEGMENTATION: dict[str, object] = {
    "cfg": None, "arch": None, "patch_size": None, "pretrained_weights": "", "checkpoint_key": "teacher",
    "random_weights": False, "allow_partial": False, "token": "cls", "stages": None, "baselines": False,
    "cache_features": False, "precision": "fp32", "data_path": "", "classes": None, "ignore_index": 255,
    "reduce_zero_label": False, "wandb": "", "image_size": None, "window": None, "stride": None, "batch_size_per_gpu": 16,
    "num_workers": 10, "epochs": 40, "lr": [0.001], "weight_decay": 1e-4, "val_freq": 0, "knn": False, "nb_knn": [20],
    "temperature": 0.07, "knn_regions": 100_000, "output_dir": ".", "num_pictures": 4, "log_freq": 20, "seed": 0,
    "device": "auto", "dist_url": "env://", "local_rank": None, "opts": [],
}  # fmt: skip

PUBLISHED_VIDEO = {
    "arch": None, "patch_size": None, "pretrained_weights": "", "checkpoint_key": "teacher", "n_last_frames": 7,
    "size_mask_neighborhood": 12, "topk": 5,
}  # fmt: skip
ADDED_VIDEO: dict[str, object] = {
    "cfg": None, "allow_partial": False, "random_weights": False, "frames": "f", "first_mask": "m", "output_dir": "o",
    "image_size": 480, "temperature": 0.1, "seed": 0, "device": "auto", "opts": [], "token": "cls",
}  # fmt: skip

PUBLISHED_ANALYSIS = {
    "cfg": None, "arch": None, "use_saved_aug": False, "vis_correspondence": False, "measure_correspondence": False,
    "vis_attention": False, "vis_entropy": False, "seed": 8, "patch_size": None, "pretrained_weights": "",
    "checkpoint_key": "teacher", "learning": "ssl", "image_path": None, "image_path2": None, "output_dir": ".",
    "threshold": 0.6, "batch_size_per_gpu": 32, "data_path": "", "num_workers": 10, "dist_url": "env://", "local_rank": None,
}  # fmt: skip
ADDED_ANALYSIS: dict[str, object] = {
    "measure_stereo": False, "vis_features": False, "report": False, "run_dir": None, "allow_partial": False, "query": None,
    "token": "cls",
    "block": -1, "image_size": None, "num_images": 4, "device": "auto", "opts": [], "zip_mode": False, "tsv_mode": False,
    "random_weights": False,
}  # fmt: skip
COMPARE: dict[str, object] = {"runs": ["run"], "names": None, "output_dir": None}
LAUNCH: dict[str, object] = {"dist_timeout": 30.0}  # added to all of them
NODES = {"num_nodes": 1, "num_gpus_per_node": 8, "node_rank": None}

NEEDED: dict[Any, list[str]] = {
    export: ["--pretrained_weights", "x", "--format", "timm", "--output", "x.pth"],
    eval_video: ["--frames", "f", "--first_mask", "m", "--output_dir", "o"],
    convert: ["source", "dest", "--to", "zip"],
    extract_features: ["--output_dir", "o"],
    compare_runs: ["run"],
}


def parse(*args: str) -> None:
    main_esvit.main(main_esvit.get_args_parser().parse_args([*TINY_RUN, *args, "--device", "cpu", *TINY_SWIN]))


def test_names_and_defaults_are_frozen() -> None:
    assert vars(main_esvit.get_args_parser().parse_args([])) == PUBLISHED | ADDED | LAUNCH
    assert vars(main_esvit_mnodes.get_args_parser().parse_args([])) == PUBLISHED | ADDED | LAUNCH | NODES
    assert vars(main_udi.get_args_parser().parse_args([])) == PUBLISHED_UDI | ADDED_UDI | LAUNCH
    assert vars(eval_knn.get_args_parser().parse_args([])) == PUBLISHED_KNN | ADDED_KNN | LAUNCH
    assert vars(eval_linear.get_args_parser().parse_args([])) == PUBLISHED_LINEAR | ADDED_LINEAR | LAUNCH
    assert vars(run_analysis.get_args_parser().parse_args([])) == PUBLISHED_ANALYSIS | ADDED_ANALYSIS | LAUNCH
    assert vars(eval_finetune.get_args_parser().parse_args([])) == FINETUNE | LAUNCH
    assert vars(eval_video.get_args_parser().parse_args(NEEDED[eval_video])) == PUBLISHED_VIDEO | ADDED_VIDEO
    assert vars(eval_logistic.get_args_parser().parse_args([])) == LOGISTIC | LAUNCH
    assert vars(extract_features.get_args_parser().parse_args(NEEDED[extract_features])) == EXTRACT | LAUNCH
    assert vars(compare_runs.get_args_parser().parse_args(NEEDED[compare_runs])) == COMPARE
    assert vars(eval_segmentation.get_args_parser().parse_args([])) == SEGMENTATION | LAUNCH


def test_published_spellings() -> None:
    args = main_esvit.get_args_parser().parse_args(
        ["--aug-opt", "deit_aug", "--local-rank", "3", "--cutmix-minmax", "0.2", "0.8", "--local_crops_number", "2", "6",
         "--local_crops_size", "96", "64", "--use_fp16", "off", "--zip_mode", "--tsv_mode", "1", "MODEL.SPEC.WINDOW_SIZE", "14"]
    )  # fmt: skip
    assert (args.aug_opt, args.local_rank, args.cutmix_minmax, args.use_fp16) == ("deit_aug", 3, [0.2, 0.8], False)
    assert (args.local_crops_number, args.local_crops_size) == ([2, 6], [96, 64])
    assert (args.zip_mode, args.tsv_mode, args.opts) == (True, True, ["MODEL.SPEC.WINDOW_SIZE", "14"])
    for flag in ("--drop_path_rate", "--drop_path"):  # DINO's, and that of fine-tuning
        assert main_esvit.get_args_parser().parse_args([flag, "0.2"]).drop_path == 0.2
    args = eval_linear.get_args_parser().parse_args(
        ["--lr", "0.01", "--n_last_blocks", "4", "--avgpool_patchtokens", "False", "--num_labels", "1000", "MODEL.NUM_CLASSES", "0"]
    )  # fmt: skip
    assert (args.lr, args.n_last_blocks, args.avgpool_patchtokens, args.opts) == (
        [0.01],
        [4],
        False,
        ["MODEL.NUM_CLASSES", "0"],
    )


SCRIPTS = (
    *(main_esvit, main_udi, eval_knn, eval_linear, eval_logistic, eval_finetune, eval_segmentation, eval_video),
    *(extract_features, run_analysis, export),
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_help_lists_every_flag(script: Any) -> None:
    parser = script.get_args_parser()
    text = parser.format_help()
    for action in parser._actions:
        assert all(option in text for option in action.option_strings)
        assert action.help, action.dest
    assert "default: None" not in text
    assert "default: )" not in text


@pytest.mark.slow
def test_mistake_that_needs_torch_ends_with_one_line_and_code_2() -> None:
    result = run_script("main_esvit.py", *TINY_RUN, "--arch", "swim_tiny", "--seed", "1", *TINY_SWIN)
    assert result.returncode == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("main_esvit.py: error: ")
    assert "unknown arch 'swim_tiny'" in last
    assert "Traceback" not in result.stderr


# Runs a script in this interpreter's place, where importing torch and its relatives is an error.
WITHOUT_TORCH = """
import runpy, sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "timm", "torchvision"}:
            raise RuntimeError(f"{name} was imported")
sys.meta_path.insert(0, NoTorch())
name, sys.argv[1:] = sys.argv[1], sys.argv[2:]
runpy.run_module(name, run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    "script", [*SCRIPTS, main_esvit_mnodes, convert, compare_runs], ids=lambda script: script.__name__
)
def test_help_and_mistakes_do_not_wait_for_torch(script: Any) -> None:
    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", WITHOUT_TORCH, script.__name__, *flags]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

    asked = run("--help")
    assert asked.returncode == 0, asked.stderr
    assert "--help" in asked.stdout
    needed = NEEDED.get(script, [])
    paths = [action for action in script.get_args_parser()._actions if action.type is existing_path]
    assert paths
    path = (
        [*needed, f"{paths[0].option_strings[0]}=/no/such/place"]
        if paths[0].option_strings
        else ["/no/such/place", *needed[1:]]
    )
    for flags, words in ((["--frobnicate", *needed], "--frobnicate"), (path, "'/no/such/place' does not exist")):
        mistaken = run(*flags)
        assert mistaken.returncode == 2, mistaken.stderr
        assert words in mistaken.stderr
        assert mistaken.stderr.count("\n") == 1


def test_paths_are_checked_where_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not addresses and patterns of shards, nor what a run was begun with that resumes from its own checkpoint."""
    parser = main_esvit.get_args_parser()
    flags = ["--output_dir", str(tmp_path), "--data_path"]

    def accepts(*words: str) -> bool:
        monkeypatch.setattr(sys, "argv", ["main_esvit.py", *flags, *words])
        with contextlib.suppress(SystemExit):
            return bool(parser.parse_command_line())
        return False

    assert accepts(str(tmp_path))
    assert not accepts(str(tmp_path / "absent"))
    for shards in ("https://host/a.tar", "pipe:cat a.tar", "a-{000000..000009}.tar"):
        assert accepts(shards)
    for flag in ("--init_weights", "--pretrained_weights_ckpt"):
        assert not accepts(str(tmp_path), flag, "absent.pth")
    (tmp_path / "checkpoint.pth").touch()
    for flag in ("--init_weights", "--pretrained_weights_ckpt"):
        assert accepts(str(tmp_path), flag, "absent.pth")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--arhc", "swin"], "unrecognized arguments: --arhc; did you mean --arch"),
        (["--pretrained_weight=x.pth"], "unrecognized arguments: --pretrained_weight=x.pth; did you mean --pretrained_weights"),
        (["--allow_part"], "unrecognized arguments: --allow_part; did you mean --allow_partial"),
        (["--xyzzyx"], "unrecognized arguments: --xyzzyx; see --help"),
        (["--allow_partial", "MODEL.IMAGE_SIZE", "3"], "is not a boolean; write on/off, true/false or 1/0; put --"),
        (["--patch_size", "eight"], "argument --patch_size: 'eight' is not a whole number from 1 to 1_024"),
    ],
)  # fmt: skip
def test_misspelled_flags_get_a_suggestion(
    script: Any, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Abbreviations are rejected too: a new flag could change their meaning."""
    needed = NEEDED.get(script, [])
    with pytest.raises(SystemExit) as caught:
        script.get_args_parser().parse_args([*needed, *flags])
    assert caught.value.code == 2
    written = capsys.readouterr().err
    assert written.startswith(f"{script.__name__}.py: error: ")
    assert words in written
    assert written.count("\n") == 1
    assert ("put --" in words) == ("put --" in written)


def test_pairs_after_a_flag_of_several_values(capsys: pytest.CaptureFixture[str]) -> None:
    parser = eval_knn.get_args_parser()
    with pytest.raises(SystemExit):
        parser.parse_args(["--nb_knn", "10", "20", "MODEL.IMAGE_SIZE", "32"])
    text = capsys.readouterr().err
    assert "'MODEL.IMAGE_SIZE' is not a whole number from 1 to 1_000_000_000; put -- before KEY VALUE pairs" in text
    args = parser.parse_args(["--nb_knn", "10", "20", "--", "MODEL.IMAGE_SIZE", "32"])
    assert (args.nb_knn, args.opts) == ([10, 20], ["MODEL.IMAGE_SIZE", "32"])
    with pytest.raises(SystemExit):
        parser.parse_args(["--seed", "0", "MODEL.IMAGE_SIZE", "32", "--temperature", "1", "MODEL.NUM_CLASSES", "0"])
    assert "MODEL.NUM_CLASSES 0; KEY VALUE pairs must be together" in capsys.readouterr().err


@pytest.fixture
def images(tmp_path: Path) -> str:
    return str(write_images(tmp_path / "images", 6))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--arch", "swim_tiny"], "unknown arch 'swim_tiny'.*did you mean 'swin_tiny'"),
        (["--arch", "swin", "--cfg", "no.yaml"], "no.yaml does not exist"),
        (["--batch_size_per_gpu", "7"], "--batch_size_per_gpu 7 .*6 images"),
        (["--accum_iter", "4"], "--accum_iter 4"),
        (["--warmup_epochs", "3"], "--warmup_epochs 3"),
        (["--local_crops_number", "2", "3"], "must have the same length"),
        (["--precision", "fp16"], "needs a CUDA device"),
        (["--zip_mode"], r"--zip_mode needs train\.zip and train_map\.txt"),
        (["--tsv_mode"], r"--tsv_mode needs train\.tsv, or a folder of tsv files"),
        (["--tsv_mode", "--zip_mode"], "--zip_mode and --tsv_mode select different layouts"),
        (["--dataset", "imagenet22k", "--tsv_mode"], r"--tsv_mode needs train\.tsv"),
        (["--dataset", "webvision1"], "--dataset webvision1 needs info/train_filelist_google.txt"),
        (["--dataset", "openimages_v4"], "--dataset openimages_v4 needs train.tsv, train.balance_min1000.lineidx"),
        (
            ["--dataset", "openimages_v4", "--tsv_mode"],
            "--tsv_mode and --dataset openimages_v4 select different layouts",
        ),
        (["--dataset", "birds"], "birds does not exist"),
        (["--dataset", "n" * 300], r"data path .*n cannot be accessed \(File name too long\)"),
        (["--output_dir", "a\udcff"], "--output_dir .* is not UTF-8"),
        (["--pretrained_weights_ckpt", "no.pth"], "'no.pth' does not exist"),
        (["--use_mixup", "on", "--batch_size_per_gpu", "3"], "must be even"),
        (["--use_mixup", "on", "--smoothing", "0.1"], "--smoothing"),
        (["--use_mixup", "on", "--cutmix-minmax", "0.32", "0.36"], "--cutmix-minmax 0.32 0.36 .* views of 16 pixels"),
        (["--local_crops_size", "3"], "3 pixels are smaller than a patch of 4"),
        (["--aug-opt", "deit_aug", "--train-interpolation", "sinc"], "sinc"),
        (["--decode", "scaled", "--aug_backend", "pil"], "--decode scaled needs .* --aug_backend split"),
        (["--decode", "scaled", "--aug-opt", "deit_aug"], "--decode scaled needs .* dino_aug"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors(images: str, tmp_path: Path, flags: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        parse("--data_path", images, "--output_dir", str(tmp_path / "out"), *flags)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "script", [eval_knn, eval_linear, eval_finetune, extract_features, run_analysis], ids=lambda script: script.__name__
)
def test_random_weights_need_a_flag(script: Any, images: str, tmp_path: Path) -> None:
    command = ["--device", "cpu", "--data_path", images, "--output_dir", str(tmp_path / "out")]
    command += ["--vis_entropy"] if script is run_analysis else []
    for flags in ([], ["--pretrained_weights", "a.pth", "--random_weights"]):
        with pytest.raises(UsageError, match=r"pass --pretrained_weights FILE, or --random_weights with --arch"):
            script.main(script.get_args_parser().parse_args([*command, *flags]))
    assert not (tmp_path / "out").exists()


def test_yaml_of_another_architecture(images: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"arch 'vit' needs .*'vision_transformer', .* describes 'swin_transformer'"):
        parse("--data_path", images, "--arch", "vit")
    yaml = tmp_path / "cvt.yaml"
    yaml.write_text("MODEL: {NAME: resnet_of_tomorrow}\n")
    with pytest.raises(UsageError, match=r"resnet_of_tomorrow.*valid names: .*swin_transformer"):
        parse("--data_path", images, "--cfg", str(yaml))


def test_checkpoint_of_another_network(images: str, tmp_path: Path) -> None:
    parse("--data_path", images, "--output_dir", str(tmp_path / "a"), "--epochs", "1")
    weights = str(tmp_path / "a" / "checkpoint.pth")
    command = [
        *TINY_RUN,
        "--data_path",
        images,
        "--output_dir",
        str(tmp_path / "b"),
        "--pretrained_weights_ckpt",
        weights,
    ]
    wider = [*TINY_SWIN, "MODEL.SPEC.DIM_EMBED", "24"]
    with pytest.raises(UsageError, match=r"has shape .* check --arch and --cfg"):
        main_esvit.main(main_esvit.get_args_parser().parse_args([*command, "--seed", "0", *wider]))


def test_usage_error_of_a_script_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise UsageError("the sentence")

    with pytest.raises(SystemExit) as caught:
        run_as_script(fail)
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith("error: the sentence\n")


@pytest.mark.parametrize(
    "ask",
    [lambda: torch.empty(10**16), lambda: torch.empty(2**62), lambda: np.zeros(10**16), lambda: bytearray(10**17)],
)
def test_out_of_memory_is_a_usage_error(ask: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """As raised by torch, numpy and Python; any other error keeps its traceback."""
    with pytest.raises(SystemExit) as caught:
        run_as_script(ask)
    assert caught.value.code == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert "not enough memory" in text

    def multiply() -> None:
        torch.zeros(2) @ torch.zeros(3, 3)

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        run_as_script(multiply)


def test_devices_and_precision() -> None:
    cpu = torch.device("cpu")
    assert utils.resolve_device("cpu") == cpu
    with pytest.raises(UsageError, match="unknown device 'gpu'"):
        utils.resolve_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="0 CUDA devices"):
            utils.resolve_device("cuda")
    assert utils.resolve_precision("bf16", cpu) == "bf16"
    assert utils.resolve_precision("auto", cpu) in {"fp32", "bf16"}
    with pytest.raises(UsageError, match="unknown precision 'int8'"):
        utils.resolve_precision("int8", cpu)
