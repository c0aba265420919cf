"""Small linear probes for tests: their images, the script on a tiny Swin, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import eval_linear
from checkpoints import serialization
from helpers.runs import TINY_SWIN, write_images

SWIN = ["--arch", "swin", "--cfg", "experiments/demo/swin_micro.yaml"]
QUICK = ["--device", "cpu", "--num_workers", "0", "--epochs", "3", "--batch_size_per_gpu", "5", "--n_last_blocks", "2"]
QUICK += ["--lr", "0.001"]  # one classifier, which is not the default for few images


def write_colors(root: Path) -> Path:
    """Three classes of different colors: 12 training and 6 validation images."""
    for seed, (split, count) in enumerate((("train", 4), ("val", 2))):
        write_images(root / split, count, classes=3, seed=seed)
    return root


def run(images: Path, out: Path, *flags: str, **changed: Any) -> None:
    """Run the script; `changed` takes the place of arguments, for values that the command line refuses."""
    weights = [] if "--pretrained_weights" in flags else ["--random_weights"]
    command = [*SWIN, *QUICK, "--data_path", str(images), "--output_dir", str(out), *weights, *flags, "--seed", "0"]
    command += TINY_SWIN
    args = eval_linear.get_args_parser().parse_args(command)
    vars(args).update(changed)
    eval_linear.main(args)


def saved(out: Path) -> dict[str, Any]:
    return serialization.load_file(out / "checkpoint.pth.tar")


def log_lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.txt").open()]


def results(out: Path) -> dict[str, Any]:
    (path,) = (out / "results").glob("*.json")
    return json.loads(path.read_text())
