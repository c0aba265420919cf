"""training/wandb_mirror.py: what the real wandb records offline, and that it cannot stop a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import wandb
from conftest import ROOT
from helpers import udi_runs
from helpers.runs import write_images
from helpers.training_runs import assert_identical, train
from helpers.wandb_files import history, offline_runs, run_record
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from checkpoints import serialization
from training import wandb_mirror
from utils import UsageError


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), 9)


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    for name, value in wandb_mirror.SETTINGS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # nobody has logged in
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


Curves = dict[str, list[tuple[int, float]]]


def mirrored(paths: Sequence[Path]) -> Curves:
    """The curves in wandb, as images seen and values."""
    curves: Curves = {}
    for row in (row for path in paths for row in history(path)):
        for name, value in row.items():
            if name != "global_step" and not name.startswith(("_", "views/")):
                curves.setdefault(name, []).append((row["global_step"], value))
    return curves


def drawn(folder: Path) -> Curves:
    """The curves in TensorBoard."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_same_curves(mirror: Curves, original: Curves) -> None:
    assert mirror.keys() == original.keys()
    for tag, points in original.items():
        assert [step for step, _ in mirror[tag]] == [step for step, _ in points], tag
        assert [value for _, value in mirror[tag]] == pytest.approx([value for _, value in points], rel=1e-6), tag


def test_curves_config_and_resume(images: Path, tmp_path: Path) -> None:
    """wandb has every point of TensorBoard, in one run though it was resumed, and training is the same without it."""
    for epochs in ("2", "3"):
        train(tmp_path / "mirrored", images, "--wandb", "project", "--epochs", epochs)
        train(tmp_path / "alone", images, "--epochs", epochs)
    paths = offline_runs(tmp_path / "mirrored")
    assert len(paths) == 2
    assert len({path.stem for path in paths}) == 1
    assert_same_curves(mirrored(paths), drawn(tmp_path / "mirrored"))
    assert {"loss/total", "loss/train", "monitor/region/kl", "optim/lr", "speed/seconds"} <= mirrored(paths).keys()
    for path, start in zip(paths, ("run.json", "run_2.json")):
        record = run_record(path)
        config = {item.key: json.loads(item.value_json) for item in record.config.update}
        assert (record.project, record.display_name) == ("project", "mirrored")
        assert json.loads((tmp_path / "mirrored" / start).read_text())["args"].items() <= config.items()
    states = [serialization.load_file(tmp_path / name / "checkpoint.pth") for name in ("mirrored", "alone")]
    for part in ("student", "teacher", "optimizer", "dino_loss", "rng"):
        assert_identical(states[0][part], states[1][part], part)


def test_udi(images: Path, tmp_path: Path) -> None:
    udi_runs.run(tmp_path, images, "--wandb", "project", "--epochs", "1")
    assert_same_curves(mirrored(offline_runs(tmp_path)), drawn(tmp_path))


def test_missing_package(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error before anything is written, also where wandb has left its folder."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match="pip install wandb"):
        train(tmp_path / "out", images, "--wandb", "project")
    assert not (tmp_path / "out").exists()


def test_a_folder_is_not_the_package(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(path for path in sys.path if "site-packages" not in path)])
    with pytest.raises(UsageError, match="pip install wandb"):
        train(tmp_path / "out", images, "--wandb", "project")


def test_rejected_settings(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--wandb a/b"):
        train(tmp_path / "out", images, "--wandb", "a/b")
    monkeypatch.setenv("WANDB_MODE", "online")
    wandb.teardown()  # it has read its environment before
    with pytest.raises(UsageError, match=r"--wandb project: .*wandb login"):
        train(tmp_path / "out", images, "--wandb", "project")
    assert wandb.run is None
    wandb.teardown()


@pytest.mark.parametrize("failing", ["init", "Run.finish"])
def test_failures_are_warnings(
    failing: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionResetError("server is gone")

    owner, _, name = failing.rpartition(".")
    with monkeypatch.context() as patch:
        patch.setattr(getattr(wandb, owner) if owner else wandb, name, fail)
        train(tmp_path, images, "--wandb", "project")
    if wandb.run is not None:
        wandb.run.finish()
    assert capsys.readouterr().err.count("server is gone") == 1
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 2
    assert drawn(tmp_path).keys() >= {"loss/total", "loss/train"}
    assert (tmp_path / "checkpoint.pth").is_file()


# A process whose wandb is killed after its writer is opened, as by a lack of memory.
KILLED = """
import os, signal, subprocess, sys
from pathlib import Path
from torch.utils.tensorboard import SummaryWriter
from training.wandb_mirror import mirror_tensorboard

with mirror_tensorboard("project", Path(sys.argv[1]), {}) as finish:
    SummaryWriter(sys.argv[1])
started = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True).stdout
(pid,) = [line.split()[0] for line in started.splitlines() if "wandb-core" in line]
os.kill(int(pid), signal.SIGKILL)
SummaryWriter(sys.argv[1]).close()
finish()
print("finished")
"""


@pytest.mark.slow
def test_killed_service(tmp_path: Path) -> None:
    """Neither a later writer nor the end of the run needs it."""
    env = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}  # not that of these tests
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "finished\n"), done.stderr
    assert "wandb cannot finish" in done.stderr
