"""Defaults on short runs and few images: what is adapted, what is told and what is refused, by script, flag and value."""

from __future__ import annotations

import argparse
import logging
import pickle
from types import ModuleType

import numpy as np
import pytest

import eval_finetune
import eval_linear
import main_esvit
import main_udi
from config.arguments import small_runs
from training.optim import cosine_schedule
from utils import UsageError, logger


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Collect what is logged."""
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "handlers", [])
    caplog.set_level(logging.INFO, logger.name)
    return caplog


def parsed(script: ModuleType, *flags: str) -> argparse.Namespace:
    """Parse and check a command line."""
    extra = ("--random_weights",) if script is eval_finetune else ()
    args: argparse.Namespace = script.get_args_parser().parse_args([*flags, *extra])
    script.check_args(args)
    return args


@pytest.mark.parametrize(
    ("script", "flag", "default", "epochs", "fitted"),
    [
        (main_esvit, "warmup_epochs", 10, 8, 2),
        (main_esvit, "warmup_epochs", 10, 1, 0),
        (main_udi, "warmup_teacher_temp_epochs", 30, 20, 5),
        (eval_finetune, "warmup_epochs", 5, 4, 1),
    ],
)
def test_a_default_warmup_longer_than_the_run_is_a_quarter_of_it(
    log: pytest.LogCaptureFixture, script: ModuleType, flag: str, default: int, epochs: int, fitted: int
) -> None:
    args = parsed(script, "--epochs", str(epochs))
    assert getattr(args, flag) == fitted
    (told,) = (line for line in log.messages if line.startswith(f"--{flag} is {fitted}:"))
    assert str(default) in told
    assert f"--epochs {epochs}" in told


@pytest.mark.parametrize(
    ("script", "flag"),
    [(main_esvit, "--warmup_epochs"), (main_udi, "--warmup_teacher_temp_epochs"), (eval_finetune, "--warmup_epochs")],
)
def test_a_given_warmup_longer_than_the_run_is_refused(script: ModuleType, flag: str) -> None:
    with pytest.raises(UsageError, match=f"{flag} 4 is more than --epochs 3"):
        parsed(script, "--epochs", "3", flag, "4")


@pytest.mark.parametrize("script", [main_esvit, main_udi, eval_finetune])
def test_published_schedules_stay_and_are_not_talked_about(log: pytest.LogCaptureFixture, script: ModuleType) -> None:
    """Also as plain numbers, which checkpoints can hold."""
    published = vars(script.get_args_parser().parse_args([])) | {"random_weights": True}
    args = parsed(script)
    flags = ("epochs", "warmup_epochs", "warmup_teacher_temp_epochs", "freeze_last_layer")
    for flag in published.keys() & set(flags):
        assert getattr(args, flag) == published[flag]
        assert type(getattr(args, flag)) is int
    assert not log.messages


def test_fitted_arguments_hold_builtin_types_only() -> None:
    """Checkpoints are read without the classes that mark defaults."""
    content = pickle.dumps(parsed(main_udi, "--epochs", "20"))
    assert b"small_runs" not in content


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--epochs", "10"], "--warmup_epochs 10 with --epochs 10"),
        (["--epochs", "3", "--warmup_epochs", "3"], "--warmup_epochs 3 with --epochs 3"),
        (["--epochs", "1"], "--freeze_last_layer 1 with --epochs 1"),
        (["--epochs", "4", "--freeze_last_layer", "6"], "--freeze_last_layer 6 with --epochs 4"),
        (["--epochs", "20", "--knn_every", "21"], "--knn_every 21 with --epochs 20"),
    ],
)
def test_schedules_that_take_the_whole_run_are_told_and_kept(
    log: pytest.LogCaptureFixture, flags: list[str], told: str
) -> None:
    args = parsed(main_esvit, *flags)
    assert any(line.startswith(told) for line in log.messages)
    flag, value = told.split()[:2]
    assert getattr(args, flag.removeprefix("--")) == int(value)


def test_knn_in_the_last_epoch_is_fine(log: pytest.LogCaptureFixture) -> None:
    parsed(main_esvit, "--epochs", "20", "--knn_every", "20")
    assert not log.messages


# --------------------------------------------------------------------------- few steps


def initial_share(momentum: float, steps: int) -> float:
    """Share of its initial weights in the teacher, from a slow loop over the published schedule."""
    share = 1.0
    for m in cosine_schedule(momentum, 1.0, 1, steps):
        share *= float(m)
    return share


@pytest.mark.parametrize("steps", [40, 600, 1400])
def test_the_momentum_named_for_a_short_run_is_low_enough(log: pytest.LogCaptureFixture, steps: int) -> None:
    share = initial_share(0.996, steps)
    small_runs.warn_slow_teacher(0.996, share, steps)
    (told,) = log.messages
    assert told.startswith("--momentum_teacher 0.996")
    assert f"{100 * share:.0f} %" in told
    named = float(told.split("pass --momentum_teacher ")[1].split()[0])
    assert named < 0.996
    assert initial_share(named, steps) < 1.2 * small_runs.LARGEST_INITIAL_SHARE


def test_a_long_enough_run_is_not_told_about_its_teacher(log: pytest.LogCaptureFixture) -> None:
    small_runs.warn_slow_teacher(0.996, initial_share(0.996, 1600), 1600)
    small_runs.warn_slow_teacher(0.98, initial_share(0.98, 400), 400)
    assert not log.messages


# --------------------------------------------------------------------------- few images


@pytest.mark.parametrize(
    ("flags", "images", "warned"),
    [
        ([], 400, True),
        ([], 1_281_167, False),
        (["--epochs", "300"], 10_000, False),
        (["--lr", "0.0001"], 400, True),
        (["--lr", "0.001", "0.1"], 400, False),
    ],
)
def test_small_learning_rate_of_a_linear_probe(
    log: pytest.LogCaptureFixture, flags: list[str], images: int, warned: bool
) -> None:
    args = eval_linear.get_args_parser().parse_args(flags)
    small_runs.warn_of_small_rate(args.lr, args.epochs, images)
    assert [line.startswith(f"--lr {args.lr[0]:g} ") for line in log.messages] == [True] * warned


@pytest.mark.parametrize(("ks", "large"), [([5, 20, 100], "20 100"), ([1, 10], "")])
def test_k_beyond_the_smallest_class_is_told(log: pytest.LogCaptureFixture, ks: list[int], large: str) -> None:
    small_runs.warn_large_k(ks, 10)
    assert [line.startswith(f"--nb_knn {large} ") for line in log.messages] == ([True] if large else [])


def test_the_default_number_of_neighbors_is_fine_for_imagenet(log: pytest.LogCaptureFixture) -> None:
    small_runs.warn_large_k([10, 20, 100, 200], int(np.array([732, 1300]).min()))
    assert not log.messages
