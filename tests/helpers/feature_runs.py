"""Small runs of extract_features.py for tests."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from conftest import ROOT

import extract_features
from helpers.runs import TINY_SWIN

YAML = str(ROOT / "experiments/demo/swin_micro.yaml")
SMALL = ["--arch", "swin", "--cfg", YAML, "--device", "cpu", "--num_workers", "0", "--batch_size_per_gpu", "4"]


def run(out: Path, *flags: str) -> None:
    weights = [] if {"--pretrained_weights", "--random_weights"} & set(flags) else ["--random_weights"]
    line = [*SMALL, *weights, "--output_dir", str(out), *flags, "--seed", "0", *TINY_SWIN]
    extract_features.main(extract_features.get_args_parser().parse_args(line))


def derive(out: Path, *flags: str) -> None:
    line = ["--output_dir", str(out), "--device", "cpu", *flags]
    extract_features.main(extract_features.get_args_parser().parse_args(line))


def extract(out: Path, images: Path | str, *flags: str) -> np.ndarray:
    run(out, "--data_path", str(images), *flags)
    features: np.ndarray = np.load(out / "features.npy")
    return features


def meta(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "meta.json").read_text())
    return content


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def rows_of(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))
