"""Tiny pre-training runs in this process, and the comparison of what they leave."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import main_esvit
from helpers.runs import TINY_RUN, TINY_SWIN


def train(output_dir: Path, images: Path, *extra: str, overrides: Sequence[str] = ()) -> None:
    folders = ["--data_path", str(images), "--output_dir", str(output_dir)]
    command_line = [*TINY_RUN, *folders, *extra, "--device", "cpu", *TINY_SWIN, *overrides]
    main_esvit.main(main_esvit.get_args_parser().parse_args(command_line))


def assert_identical(a: Any, b: Any, where: str = "") -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_identical(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_identical(x, y, f"{where}/{i}")
    else:
        assert a == b, where


# Two shards and a buffer smaller than what a worker reads; two chunks cannot be had of so few images.
LAYOUTS = {"files": [], "chunk": ["--sampler", "chunk"], "zip": ["--zip_mode"], "tsv": ["--tsv_mode"],
           "shards": ["--shuffle_buffer", "3"]}  # fmt: skip
