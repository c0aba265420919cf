"""benchmarks/peers.py: what is compared is what was measured, and lightly's loss is the one of losses/dino.py."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helpers.runs import TINY_RUN, TINY_SWIN, write_images

from benchmarks import lightly_dino, peer_runs, peers
from config.arguments import main_esvit
from distributed import launch
from losses.dino import DINOLoss
from utils import UsageError

needs_lightly = pytest.mark.skipif(
    importlib.util.find_spec("lightly") is None, reason="requirements-peers.txt is not installed"
)


def parsed(tmp_path: Path, *own: str, flags: list[str] | None = None) -> argparse.Namespace:
    line = ["--data_path", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out"), *own, "--"]
    args = peers.get_args_parser().parse_args([*line, *(flags or [*TINY_RUN, *TINY_SWIN])])
    args.ours = main_esvit.get_args_parser().parse_args(args.flags)
    return args


def run_of(choose: float, report: float) -> dict[str, object]:
    half = {"choose": {"1-NN": 0.0, "20-NN": choose}, "report": {"1-NN": 1.0, "20-NN": report}}
    nothing = {"choose": {"1-NN": 0.0, "20-NN": 0.0}, "report": {"1-NN": 0.0, "20-NN": 0.0}}
    return {"diverged": False, "epochs": 2, "cpu_seconds": 60, "scores": {"student": half, "teacher": nothing}}


def record_of(tmp_path: Path, **runs: dict[str, object]) -> peers.Record:
    record = peers.Record(tmp_path / "peers.json", {"minutes": 1})
    record.put(runs={peers.run_name(method, 0): run for method, run in runs.items()})
    return record


def test_missing_lightly_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lightly", None)
    with pytest.raises(SystemExit) as caught:
        launch.run_script(lambda: peers.main(parsed(tmp_path)))
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install -r requirements-peers.txt" in line
    assert not list(tmp_path.iterdir())


def test_halves_alternate_within_each_class() -> None:
    labels = torch.tensor([0, 0, 1, 0, 1, 2, 0, 1])
    found = peers.halves(labels)
    seen: dict[int, int] = {}
    expected: dict[int, list[int]] = {0: [], 1: []}
    for i, label in enumerate(labels.tolist()):
        expected[seen.get(label, 0) % 2].append(i)
        seen[label] = seen.get(label, 0) + 1
    assert [half.tolist() for half in found.values()] == list(expected.values())


def test_the_rate_is_chosen_on_one_half_and_reported_on_the_other(tmp_path: Path) -> None:
    """The rate that is best where it is reported is not the one that is chosen, and one that diverged is not either."""
    diverged = {"diverged": True, "epochs": 1, "cpu_seconds": 60, "scores": {}}
    record = record_of(tmp_path, small=run_of(30, 20), large=run_of(20, 30), huge=diverged, ours=run_of(0, 26))
    rates = ["small", "large", "huge"]
    assert peers.best_of(record, rates) == ("small", "student")
    rows = list(peers.rows_of(record, [*rates, "ours"], seeds=2))
    assert "huge: diverged" in [row["name"] for row in rows]
    verdict = peers.verdict_of(rows, "ours, student", "small, student")
    assert verdict["points_ahead"] == {"1-NN": 0.0, "20-NN": 6.0}
    with pytest.raises(UsageError, match="huge"):
        peers.best_of(record, ["huge"])


def test_a_record_is_continued_with_its_own_settings_only(tmp_path: Path) -> None:
    record_of(tmp_path, ours=run_of(1, 2))
    assert peers.Record(tmp_path / "peers.json", {"minutes": 1}).runs == {"ours, seed 0": run_of(1, 2)}
    with pytest.raises(UsageError, match="minutes 1, not 2"):
        peers.Record(tmp_path / "peers.json", {"minutes": 2})
    (tmp_path / "peers.json").write_text('{"settings"')
    with pytest.raises(UsageError, match="damaged"):
        peers.Record(tmp_path / "peers.json", {"minutes": 1})


def test_cpu_time_includes_children_and_not_waiting(tmp_path: Path) -> None:
    burn = "import time\nwhile time.process_time() < 0.5: pass"
    script = tmp_path / "child.py"
    script.write_text(f"import subprocess, sys, time\nsubprocess.run([sys.executable, '-c', {burn!r}])\ntime.sleep(1)")
    assert 0.5 <= peer_runs.cpu_seconds_of([str(script)], tmp_path / "run", 1) < 1
    script.write_text("print('first'); raise SystemExit('the reason')")
    with pytest.raises(UsageError, match="the reason"):
        peer_runs.cpu_seconds_of([str(script)], tmp_path / "run", 1)


@pytest.mark.parametrize("minutes", ["0.05", "1", "7.5"])
def test_planned_epochs_fit_in_the_time_and_one_more_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minutes: str
) -> None:
    """A run that starts in 2 seconds and takes 0.3 seconds a batch; 41 images are 10 batches of 4."""
    for name in ("a", "b"):
        write_images(tmp_path / "data" / "train" / name, 20 + (name == "b"))
    args = parsed(tmp_path, "--minutes", minutes)
    parse = main_esvit.get_args_parser().parse_args

    def seconds(command: list[str], folder: Path, threads: int) -> float:
        run = parse(command[1:])
        listed = Path(run.data_path).read_text().split()
        assert len(set(listed)) == len(listed) == 32
        assert run.warmup_epochs == run.warmup_teacher_temp_epochs == 0
        return 2 + 0.3 * run.epochs * (len(listed) // run.batch_size_per_gpu)

    monkeypatch.setattr(peer_runs, "cpu_seconds_of", seconds)
    (tmp_path / "out").mkdir()
    epochs = peer_runs.plan_epochs(args, tmp_path / "out" / "calibration")
    budget = 60 * float(minutes)
    assert epochs == 1 or 2 + 3 * epochs <= budget + 1e-6
    assert 2 + 3 * (epochs + 1) > budget


@pytest.mark.parametrize("opts", [[], TINY_SWIN, ["--", *TINY_SWIN]], ids=["none", "pairs", "after --"])
def test_our_flags_replace_given_ones_and_leave_the_pairs(tmp_path: Path, opts: list[str]) -> None:
    args = parsed(tmp_path, flags=["--data_path", "elsewhere", "--epochs", "9", "--out_dim", "32", *opts])
    command = peer_runs.our_command(args, tmp_path, tmp_path / "out", 3, 2)
    run = main_esvit.get_args_parser().parse_args(command[1:])
    assert (run.data_path, run.output_dir, run.seed, run.epochs) == (str(tmp_path), str(tmp_path / "out"), 3, 2)
    assert (run.out_dim, run.device, run.opts) == (32, "cpu", [word for word in opts if word != "--"])


@needs_lightly
@pytest.mark.parametrize("views", [2, 5])
def test_the_loss_of_lightly_is_ours(views: int) -> None:
    """Loss and gradient with a center that is not zero, and the center after the step."""
    from lightly.loss import DINOLoss as TheirLoss

    batch, prototypes = 6, 40
    ours = DINOLoss(prototypes, views, 0.04, 0.04, 0, 1)
    theirs = TheirLoss(prototypes, teacher_temp=0.04)
    ours.center.copy_(torch.randn(1, prototypes))
    theirs.center.copy_(ours.center)
    teacher, student = torch.randn(2 * batch, prototypes), torch.randn(views * batch, prototypes, requires_grad=True)
    loss = ours(student, teacher, 0)
    other = theirs(list(teacher.split(batch)), list(student.split(batch)))
    torch.testing.assert_close(loss, other, rtol=1e-5, atol=0)
    gradients = [torch.autograd.grad(one, student)[0] for one in (loss, other)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)
    ours.accumulate_center(teacher)
    ours.update_center()
    torch.testing.assert_close(ours.center, theirs.center[0], rtol=1e-5, atol=1e-6)


@needs_lightly
@pytest.mark.parametrize(("seconds", "max_steps", "steps"), [(5, 99, 5), (5, 3, 3), (0.5, 99, 1)])
def test_lightly_trains_until_its_cpu_time_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, max_steps: int, steps: int
) -> None:
    """With a clock that advances by a second a step."""
    write_images(tmp_path / "train", 4, classes=2)
    command = ["--data_path", str(tmp_path), "--output_dir", str(tmp_path), "--cpu_seconds", "1", "--batch", "4"]
    args = lightly_dino.get_args_parser().parse_args([*command, "--", *TINY_RUN, *TINY_SWIN])
    setting = lightly_dino.build_setting(args)
    monkeypatch.setattr("time.process_time", itertools.count().__next__)
    assert len(lightly_dino.train(setting, seconds, max_steps)[1]) == steps


@needs_lightly
@pytest.mark.slow
def test_a_tiny_comparison_and_its_continuation(tmp_path: Path) -> None:
    """The table is that of the file; lightly gets the time of our run; a second start has nothing to do."""
    for split in ("train", "val"):
        write_images(tmp_path / "data" / split, 12, classes=2, seed=len(split))
    args = ["--data_path", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out"), "--tiny", "--lrs", "0.001"]
    flags = [*TINY_RUN, "--epochs", "1", *TINY_SWIN]
    command = [sys.executable, str(ROOT / "benchmarks/peers.py"), *args, "--", *flags]
    first, second = (
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout for _ in range(2)
    )
    content = json.loads((tmp_path / "out" / "peers.json").read_text())
    lightly = content["runs"]["lightly, lr 0.001, seed 0"]
    assert len(lightly["losses"]) == lightly["steps"] == 2
    assert all(math.isfinite(loss) for loss in lightly["losses"])
    printed = {line[2:30].strip(): line[30:].split() for line in first.splitlines()}
    for row in content["table"]:
        assert printed[row["name"]][:2] == [f"{row[key]:.2f}" for key in ("1-NN", "20-NN")]
    by_name = {row["name"]: row for row in content["table"]}
    ours, theirs = (by_name[content["verdict"][side]]["20-NN"] for side in ("ours", "theirs"))
    assert content["verdict"]["points_ahead"]["20-NN"] == ours - theirs
    assert second == first[first.index("\n  top-1") :]
