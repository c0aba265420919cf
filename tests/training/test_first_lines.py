"""What a run says before its first steps: the time on a CPU, compilation, and how a resumed run computes."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.runs import write_images
from helpers.training_runs import assert_identical, train
from torch import Tensor, nn

import main_esvit
from checkpoints import serialization
from distributed import collectives
from models import build_model, load_arch_config
from training import checkpointing, estimate, setup
from utils import logger


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), 9)


# --------------------------------------------------------------------------- the time on a CPU


class Clock(nn.Module):
    """A network whose forward pass of a view takes its number of pixels in seconds, ten times as long at first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.now, self.calls = [0.0], [0]
        monkeypatch.setattr(time, "perf_counter", lambda: self.now[0])

    def __deepcopy__(self, _: object) -> Clock:
        return self

    def forward_features(self, x_BCHW: Tensor) -> None:
        self.now[0] += x_BCHW[0, 0].numel() * (1 if x_BCHW.shape[-1] in self.calls else 10)
        self.calls.append(x_BCHW.shape[-1])


def test_seconds_of_a_training_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Student forward and backward of all views, and the teacher's forward of two, without what a first call costs."""
    sides = [8, 8, 4, 4, 4]
    expected = 3 * (8 * 8 * 2 + 4 * 4 * 3) + 8 * 8 * 2
    assert estimate.seconds_per_image(Clock(monkeypatch), sides, 3, "fp32") == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0.2 seconds"),
        (45, "45 seconds"),
        (150, "2.5 minutes"),
        (3600, "60 minutes"),
        (9000, "2.5 hours"),
        (864_000, "10 days"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert estimate.duration(seconds) == text


def told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, *flags: str, device: str = "cpu") -> str:
    """Return what `log_run` says about a Swin-T and 400 images at one second an image."""
    parser = main_esvit.get_args_parser()
    args = parser.parse_args(["--arch", "swin_tiny", "--batch_size_per_gpu", "40", "--epochs", "9", *flags])
    config = load_arch_config(args.arch, args.cfg, args.opts)
    with torch.device("meta"):
        student = build_model(args.arch, config)
    monkeypatch.setattr(estimate, "seconds_per_image", lambda *_: 1.0)
    loader = type("Loader", (), {"dataset": range(400), "__len__": lambda self: 400 // args.batch_size_per_gpu})()
    method = SimpleNamespace(student=student, tasks="views")
    monkeypatch.setattr(logger, "propagate", True)
    setup.log_run(args, config, method, loader, torch.device(device))  # type: ignore[arg-type]
    return caplog.text


def test_a_full_size_network_on_a_cpu_is_told_its_time_and_the_small_recipe(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = told(caplog, monkeypatch)
    assert (
        "a step of 40 images will take about 40 seconds, an epoch 6.7 minutes and the run of 9 epochs 60 minutes"
        in text
    )
    assert "experiments/demo/swin_micro.yaml" in text
    assert "a step of 80 images will take about 80 seconds" in told(caplog, monkeypatch, "--accum_iter", "2")


@pytest.mark.parametrize(
    ("flags", "device"), [([], "cuda"), (["--compile"], "cpu"), (["--fsdp"], "cpu")], ids=["GPU", "compile", "fsdp"]
)
def test_nothing_is_told_elsewhere(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, flags: list[str], device: str
) -> None:
    assert "will take" not in told(caplog, monkeypatch, *flags, device=device)


def test_training_is_the_same_with_and_without_the_estimate(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A small network is not told; as a full-size one it is, before the first step, and trains to the same bits."""
    train(tmp_path / "small", images)
    assert "will take" not in capsys.readouterr().err
    monkeypatch.setattr(estimate, "FULL_SIZE", 0)
    train(tmp_path / "full", images)
    errors = capsys.readouterr().err
    assert errors.count("will take") == 1
    assert errors.index("will take") < errors.index("step 1/2")
    small, full = (serialization.load_file(tmp_path / name / "checkpoint.pth") for name in ("small", "full"))
    for key in small.keys() - {"args"}:
        assert_identical(small[key], full[key], key)


# --------------------------------------------------------------------------- compilation


def test_compilation_is_told_before_and_after_the_first_step(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled = []

    def stand_in(function: Callable[..., Any], dynamic: bool) -> Callable[..., Any]:
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", stand_in)
    train(tmp_path, images, "--compile")
    assert len(compiled) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("--compile:") or " step " in line]
    starts = [re.split(r"[:\s]", line)[0] for line in lines]
    assert starts == ["--compile", "--compile", "epoch", "epoch", "epoch", "epoch"]
    assert re.search(r"first step took \d", lines[1])


# --------------------------------------------------------------------------- a resumed run


def test_a_resumed_run_tells_its_modes_and_what_was_different(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, images, "--epochs", "1", "--batch_size_per_gpu", "2", "--accum_iter", "2")
    capsys.readouterr()
    train(tmp_path, images, "--epochs", "2", "--precision", "bf16")
    lines = capsys.readouterr().err.splitlines()
    (line,) = (line for line in lines if line.startswith("resuming"))
    modes = "precision bf16 (was fp32), batch_size_per_gpu 4 (was 2), accum_iter 1 (was 2), grad_checkpointing off, fsdp off, "
    assert line == f"resuming {tmp_path}/checkpoint.pth at epoch 1: {modes}compile off, processes 1"
    (others,) = (line for line in lines if line.startswith("arguments differ"))
    assert others.endswith(": epochs 1 -> 2")


def test_modes_of_published_checkpoints_and_other_world_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file without a mode or a number of processes is not said to differ."""
    monkeypatch.setattr(collectives, "get_world_size", lambda: 2)
    now = vars(argparse.Namespace(precision="fp32", fsdp=True))
    assert checkpointing.describe_modes(now, {}, None) == "precision fp32, fsdp on, processes 2"
    assert checkpointing.describe_modes(now, {"fsdp": False}, 4) == (
        "precision fp32, fsdp on (was off), processes 2 (was 4)"
    )
