"""Short fine-tuning runs of a small Swin, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import eval_finetune
from helpers.runs import TINY_SWIN

NETWORK = ["--arch", "swin", "--cfg", "experiments/demo/swin_micro.yaml"]
PLAIN = ["--mixup", "0", "--cutmix", "0", "--smoothing", "0", "--aa", "", "--color_jitter", "0", "--reprob", "0"]
SMALL_RUN = [*NETWORK, "--device", "cpu", "--precision", "fp32", "--num_workers", "0", "--batch_size_per_gpu", "4",
             "--epochs", "2", "--warmup_epochs", "1", "--lr", "0.05", "--log_freq", "1"]  # fmt: skip


def command(images: Path, output_dir: Path, *extra: str) -> list[str]:
    weights = [] if "--pretrained_weights" in extra else ["--random_weights"]
    paths = ["--data_path", str(images), "--output_dir", str(output_dir)]
    return [*SMALL_RUN, *paths, *weights, *extra, "--seed", "0", *TINY_SWIN]


def run(images: Path, output_dir: Path, *extra: str, **changed: Any) -> None:
    """Run the script; `changed` takes the place of arguments, for values that the command line refuses."""
    args = eval_finetune.get_args_parser().parse_args(command(images, output_dir, *extra))
    vars(args).update(changed)
    eval_finetune.main(args)


def results(output_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output_dir / "results" / "finetune.json").read_text())
    return found
