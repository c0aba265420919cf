"""A signal to an evaluation that trains: it saves itself within the epoch and ends cleanly, and goes on to the bit."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from helpers import finetune_runs, linear_runs
from helpers.linear_runs import write_colors
from helpers.runs import TINY_SWIN, run_script
from helpers.training_runs import assert_identical, train

import data
import eval_knn
from checkpoints import serialization
from distributed import launch
from evaluation import feature_loaders, finetune
from training import run_log, stopping
from utils import Stopped, UsageError, setup_logging

Run = Callable[..., None]
SCRIPTS: list[tuple[Run, list[str], str]] = [
    (finetune_runs.run, ["--model_ema"], "checkpoint.pth"),
    (linear_runs.run, ["--epochs", "2"], "checkpoint.pth.tar"),
    (linear_runs.run, ["--epochs", "2", "--cache_features", "--lr", "1", "2"], "checkpoint.pth.tar"),
]
SIGNALS = {signal.SIGTERM: 0, signal.SIGUSR1: 0, signal.SIGHUP: 129, signal.SIGINT: 130}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_colors(tmp_path / "images")


def signalled_at(patch: pytest.MonkeyPatch, epoch: int, number: signal.Signals) -> None:
    """The process gets a signal after the first step of an epoch."""
    update = run_log.EpochMeter.update

    def signalled(self: run_log.EpochMeter, scalars: Any) -> None:
        update(self, scalars)
        if (self.epoch, self.done) == (epoch, 1):
            os.kill(os.getpid(), number)

    patch.setattr(run_log.EpochMeter, "update", signalled)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(("run", "flags", "file"), SCRIPTS, ids=["fine-tuning", "linear probe", "cached features"])
def test_a_signal_saves_the_run_within_the_epoch(
    run: Run, flags: list[str], file: str, number: signal.Signals, images: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In the first epoch, in the second; what was saved is not counted twice, and it ends bit for bit as one left alone."""
    monkeypatch.setattr(feature_loaders, "SIGNAL_CHECK_STEPS", 1)
    before = signal.getsignal(number)
    for epoch in (0, 1):
        with monkeypatch.context() as patch:
            signalled_at(patch, epoch, number)
            sentence = rf"^stopped by a signal 1 step into epoch {epoch}, and saved"
            with pytest.raises(Stopped, match=sentence) as end:
                run(images, tmp_path / "parts", *flags)
            assert end.value.code == SIGNALS[number]
        assert signal.getsignal(number) == before
        saved = serialization.load_file(tmp_path / "parts" / file)
        assert (saved["epoch"], saved["in_epoch"]["steps"]) == (epoch, 1)
    run(images, tmp_path / "parts", *flags)
    run(images, tmp_path / "whole", *flags)
    whole, parts = (serialization.load_file(tmp_path / name / file) for name in ("whole", "parts"))
    for key in whole.keys() - {"args"}:
        assert_identical(whole[key], parts[key], key)
    assert linear_runs.results(tmp_path / "whole") == linear_runs.results(tmp_path / "parts")


def test_cached_features_are_asked_at_the_start_of_an_epoch(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is shorter than the steps between two questions ends first, and is saved."""
    signalled_at(monkeypatch, 0, signal.SIGTERM)
    with pytest.raises(Stopped, match=r"^stopped by a signal before epoch 1"):
        linear_runs.run(images, tmp_path / "out", "--cache_features")
    assert linear_runs.saved(tmp_path / "out")["epoch"] == 1


@pytest.mark.parametrize("run", [finetune_runs.run, linear_runs.run], ids=["fine-tuning", "linear probe"])
@pytest.mark.parametrize(
    ("saved", "words"), [(0, "starts from the beginning"), (1, "last whole checkpoint in .*/out")], ids=["none", "one"]
)
def test_a_signal_after_a_failed_save_is_no_clean_end(
    run: Run, saved: int, words: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full from the first or the second saving on, and the signal comes one epoch later."""
    out, fsync = tmp_path / "out", os.fsync

    def refuse(descriptor: int) -> None:
        if (out / "log.txt").exists() and len((out / "log.txt").read_text().splitlines()) > saved:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    signalled_at(monkeypatch, saved + 1, signal.SIGTERM)
    with pytest.raises(UsageError, match=rf"the last checkpoint could not be written \(.*No space left.*{words}$"):
        run(images, out, "--epochs", "3")
    assert len(list(out.glob("checkpoint.pth*"))) == saved


def test_a_signal_after_the_last_step_lets_the_run_finish(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate, asked = finetune.FineTuner.validate, []

    def signalled(self: finetune.FineTuner, loader: Any) -> dict[str, finetune.Accuracy]:
        os.kill(os.getpid(), signal.SIGTERM)
        asked.append(signal.SIGTERM)
        return validate(self, loader)

    monkeypatch.setattr(finetune.FineTuner, "validate", signalled)
    finetune_runs.run(images, tmp_path / "out", "--epochs", "1")
    assert len(asked) == 1
    assert finetune_runs.results(tmp_path / "out")["scores"]["best"]["epoch"] == 0


def pretrain_run(images: Path, out: Path, *flags: str) -> None:
    train(out, images / "train", *flags)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("run", [pretrain_run, finetune_runs.run, linear_runs.run])
def test_a_signal_before_the_first_step_ends_at_once(
    run: Run, number: signal.Signals, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here while the images are looked for; nothing is left behind."""

    def signalled(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), number)

    monkeypatch.setattr(data, "build_dataset", signalled)
    with pytest.raises(Stopped, match="before the first step") as end:
        run(images, tmp_path / "out")
    assert end.value.code == SIGNALS[number]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_interrupted_pretraining_is_saved_and_has_a_code_of_its_own(
    number: signal.Signals, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        signalled_at(patch, 0, number)
        with pytest.raises(Stopped) as end:
            pretrain_run(images, tmp_path / "parts")
    assert end.value.code == SIGNALS[number]
    content = serialization.load_file(tmp_path / "parts" / "checkpoint.pth")
    assert (content["epoch"], content["in_epoch"]["steps"]) == (0, 1)
    for name in ("parts", "whole"):
        pretrain_run(images, tmp_path / name)
    whole, parts = (serialization.load_file(tmp_path / name / "checkpoint.pth") for name in ("whole", "parts"))
    for key in whole.keys() - {"args"}:
        assert_identical(whole[key], parts[key], key)


def test_ignored_signals_stay_ignored() -> None:
    """As `nohup` and a script's `&` set them; others are taken, and given back."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.StopSignals() as vote:
            os.kill(os.getpid(), signal.SIGHUP)
            assert vote.votes() == [0.0]
            os.kill(os.getpid(), signal.SIGTERM)
            assert vote.votes() == [1.0]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    "votes", [{0: 1}, {0: 4000}, {129: 1}, {0: 64, 129: 4000}, {130: 1}, {0: 64, 129: 64, 130: 64}]
)
def test_the_sum_of_votes_tells_the_strongest(votes: dict[int, int]) -> None:
    """In float32, as processes add it up."""
    total = torch.zeros(())
    for code, count in votes.items():
        for _ in range(count):
            total += stopping.VOTES[code]
    assert stopping.exit_code(total.item()) == max(votes)


def test_interrupted_features_tell_how_far_they_were(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third of four batches of one image is interrupted."""
    sample, seen = data.ImageDataset.__getitem__, []

    def interrupted(self: data.ImageDataset, index: int) -> Any:
        seen.append(index)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return sample(self, index)

    monkeypatch.setattr(data.ImageDataset, "__getitem__", interrupted)
    command = [
        *linear_runs.SWIN,
        "--device",
        "cpu",
        "--num_workers",
        "0",
        "--batch_size_per_gpu",
        "1",
        "--random_weights",
    ]
    command += ["--data_path", str(images), "--output_dir", str(tmp_path / "out"), *TINY_SWIN]
    with pytest.raises(Stopped, match="2 of 12 batches of train") as end:
        eval_knn.main(eval_knn.get_args_parser().parse_args(command))
    assert end.value.code == 130


def test_interrupt_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as end:
            launch.run_script(interrupted)
    finally:
        signal.signal(signal.SIGINT, before)
    assert end.value.code == 130
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_end_that_was_asked_for_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    def stop() -> None:
        setup_logging()
        raise Stopped("the sentence")

    launch.run_script(stop)  # no exit code
    assert capsys.readouterr().err == "the sentence\n"


def test_the_log_of_a_fine_tuning_that_fails_is_closed(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line of the first epoch, which the disk refused at first, is written at the end."""
    write, step = run_log.RunLog._write_lines, finetune.FineTuner.step
    refused: list[bool] = []

    def refuses_once(self: run_log.RunLog) -> None:
        if not refused:
            refused.append(True)
            raise OSError("no space")
        write(self)

    def diverges(self: finetune.FineTuner, batches: list[Any], iteration: int) -> dict[str, float]:
        if iteration >= self.recipe.steps:
            raise FloatingPointError("the loss is nan")
        return step(self, batches, iteration)

    monkeypatch.setattr(run_log.RunLog, "_write_lines", refuses_once)
    monkeypatch.setattr(finetune.FineTuner, "step", diverges)
    with pytest.raises(FloatingPointError):
        finetune_runs.run(images, tmp_path / "out")
    assert [line["epoch"] for line in linear_runs.log_lines(tmp_path / "out")] == [0]


# Process 1 gets a signal after the first step of the second epoch.
SIGNALLED = """
import os, signal, sys
sys.path[:0] = [ROOT]
import SCRIPT
from distributed import collectives, launch
from training import run_log
update = run_log.EpochMeter.update
def signalled(self, scalars):
    update(self, scalars)
    if collectives.get_rank() == 1 and (self.epoch, self.done) == (1, 1):
        os.kill(os.getpid(), signal.SIGUSR1)
run_log.EpochMeter.update = signalled
launch.run_script(lambda: SCRIPT.main(SCRIPT.get_args_parser().parse_args()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", ["eval_finetune", "eval_linear"])
def test_a_signal_to_one_of_two_processes_ends_both_with_code_0(script: str, images: Path, tmp_path: Path) -> None:
    program = tmp_path / "signalled.py"
    program.write_text(SIGNALLED.replace("ROOT", repr(str(ROOT))).replace("SCRIPT", script))
    common = ["--data_path", str(images), "--output_dir", str(tmp_path / "out"), "--random_weights"]
    flags = finetune_runs.SMALL_RUN if script == "eval_finetune" else [*linear_runs.SWIN, *linear_runs.QUICK]
    command = [
        *flags,
        *common,
        "--batch_size_per_gpu",
        "2",
        "--num_workers",
        "1",
        "--epochs",
        "2",
        "--seed",
        "0",
        *TINY_SWIN,
    ]
    ended = run_script(str(program), *command, processes=2)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("stopped by a signal 1 step into epoch 1, and saved") == 1
    assert "Traceback" not in ended.stderr
    again = run_script(f"{script}.py", *command, processes=2)
    assert again.returncode == 0, again.stderr
    assert "at epoch 1" in again.stderr
    assert [line["epoch"] for line in linear_runs.log_lines(tmp_path / "out")] == [0, 1]
