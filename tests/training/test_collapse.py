"""The collapse monitor against slow numpy, its warnings on constructed collapses, diagnoses of bad steps, k-NN during training."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers.runs import TINY_RUN, TINY_SWIN, run_script, write_images
from helpers.step_runs import everything, random_views, spoiled, tiny
from torch import Tensor

import main_esvit
from benchmarks import syncs
from losses.distillation import MonitoredLevel, evenly_spaced
from ops.logits import FactoredLogits
from training import collapse
from training.collapse import Monitor
from training.run_log import EpochMeter


def random_level(rows: int = 70, prototypes: int = 40, factored: bool = False) -> MonitoredLevel:
    factors = [FactoredLogits(torch.randn(rows, 6), torch.randn(prototypes, 6)) for _ in range(2)]
    logits = factors if factored else [each.product() for each in factors]
    return MonitoredLevel(
        logits[0], logits[1], torch.randn(1, prototypes), 0.1, 0.5, torch.randn(90, 12) * torch.arange(1.0, 13.0)
    )


@pytest.mark.parametrize("factored", [False, True])
def test_measures_equal_a_slow_reference(factored: bool) -> None:
    level = random_level(factored=factored)
    found = {name: value.item() for name, value in collapse.measure(level).items()}
    student, teacher = (
        np.asarray(each.product() if isinstance(each, FactoredLogits) else each, dtype=np.float64) for each in level[:2]
    )
    entropies, divergences, best = [], [], set()
    for s, t in zip(student, teacher):
        p = np.exp((t - level.center[0].double().numpy()) / 0.5)
        q = np.exp(s / 0.1 - (s / 0.1).max())
        p, q = p / p.sum(), q / q.sum()
        entropies.append(-sum(x * math.log(x) for x in p))
        divergences.append(sum(x * math.log(x / y) for x, y in zip(p, q)))
        best.add(int(p.argmax()))
    features = level.features.double().numpy()
    lengths = features / np.linalg.norm(features, axis=1, keepdims=True)
    assert found["teacher_entropy"] == pytest.approx(np.mean(entropies), rel=1e-4)
    assert found["kl"] == pytest.approx(np.mean(divergences), rel=1e-4)
    assert found["prototypes_used"] == pytest.approx(len(best) / 40)
    assert found["feature_std"] == pytest.approx(lengths.std(axis=0).mean() * math.sqrt(12), rel=1e-5)
    assert found["feature_rank"] == pytest.approx(slow_rank(features), rel=1e-3)


def slow_rank(features: np.ndarray) -> float:
    values = np.linalg.svd(features - features.mean(axis=0), compute_uv=False)
    shares = values[values > 1e-12] / values.sum()
    return math.exp(-sum(x * math.log(x) for x in shares))


@pytest.mark.parametrize(
    ("rows", "channels", "rank"), [(60, 20, 20), (20, 60, 20), (60, 40, 1), (60, 40, 3), (8, 96, 8)]
)
def test_effective_rank_equals_that_of_singular_values(rows: int, channels: int, rank: int) -> None:
    spectrum = torch.logspace(0, -3, rank)
    features = torch.randn(rows, rank) * spectrum @ torch.randn(rank, channels) + 5
    assert collapse.effective_rank(features).item() == pytest.approx(slow_rank(features.double().numpy()), rel=3e-3)


def test_effective_rank_of_equal_rows_is_one_and_of_nan_is_nan() -> None:
    assert collapse.effective_rank(torch.ones(5, 7)) == 1
    assert torch.isnan(collapse.effective_rank(torch.full((5, 7), math.nan)))


def test_evenly_spaced() -> None:
    assert evenly_spaced(10, 5, torch.device("cpu")).tolist() == [0, 2, 4, 6, 8]
    assert evenly_spaced(3, 5, torch.device("cpu")).tolist() == [0, 1, 2]


# --------------------------------------------------------------------------- warnings


def collapsed(cause: str, rows: int = 64, prototypes: int = 32) -> MonitoredLevel:
    teacher, features = torch.randn(rows, prototypes), torch.randn(rows, 12)
    if cause == "entropy":
        teacher = 50 * torch.eye(prototypes)[:1].expand(rows, -1)
    if cause == "std":
        features = torch.randn(1, 12) + 1e-4 * torch.randn(rows, 12)
    if cause == "rank":
        features = torch.randn(rows, 1) @ torch.randn(1, 12)
    return MonitoredLevel(torch.randn(rows, prototypes), teacher, torch.zeros(1, prototypes), 1.0, 1.0, features)


def warnings_of(
    cause: str, readings: int, caplog: pytest.LogCaptureFixture, warmed_up: bool = True
) -> tuple[list[str], Monitor]:
    monitor = Monitor()
    scalars = {name: value.item() for name, value in monitor.measure({"view": collapsed(cause)}).items()}
    scalars |= {"loss": math.log(32) if cause == "plateau" else 2.0, "skipped": 0.0}
    with caplog.at_level(logging.WARNING, "esvit"):
        for i in range(readings):
            monitor.check(scalars, warmed_up, iteration=10 * i + 9)
    return [record.getMessage() for record in caplog.records], monitor


@pytest.fixture(autouse=True)
def _propagated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("esvit"), "propagate", True)


def test_level_is_checked_by_its_own_loss_term(caplog: pytest.LogCaptureFixture) -> None:
    monitor = Monitor()
    measured = monitor.measure({"cls+": collapsed("plateau")._replace(term="g_mcl")})
    scalars = {name: value.item() for name, value in measured.items()} | {
        "loss": 2.0,
        "g_mcl": math.log(32),
        "skipped": 0.0,
    }
    with caplog.at_level(logging.WARNING, "esvit"):
        for _ in range(5):
            monitor.check(scalars, warmed_up=True, iteration=0)
    assert [record.getMessage().partition(" stays")[0] for record in caplog.records] == ["g_mcl 3.466"]


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        ("plateau", "loss 3.466 stays at ln K = 3.466"),
        ("entropy", "entropy of the teacher's view outputs is 0.000"),
        ("std", "view features are nearly constant"),
        ("rank", "view features have lost rank"),
    ],
)
def test_each_collapse_is_reported_alone_with_its_fixes(
    cause: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    """After 5, 10 and 20 readings."""
    warnings, _ = warnings_of(cause, 4, caplog)
    assert not warnings
    warnings, _ = warnings_of(cause, 39, caplog)
    assert len(warnings) == 3
    assert all(message in warning and collapse.FIXES[cause] in warning for warning in warnings)


def rank_readings(ranks: Sequence[float], monitor: Monitor, start: int = 0, warmed_up: bool = True) -> None:
    """Check readings every 10 steps that differ in rank only; bounds of 63 rows and 12 channels."""
    scalars = {name: value.item() for name, value in monitor.measure({"view": collapsed("nothing")}).items()}
    for i, rank in enumerate(ranks, start):
        monitor.check(scalars | {"loss": 2.0, "skipped": 0.0, "view/feature_rank": rank}, warmed_up, 10 * i + 9)


@pytest.mark.parametrize(
    ("first", "then", "warned"),
    [(10.0, 3.9, True), (10.0, 4.1, False), (4.0, 2.5, False), (2.5, 2.5, False), (30.0, 11.0, True)],
)
def test_partial_collapse_is_relative_to_the_first_reading(
    first: float, then: float, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Below 0.4 of its rank; entropy, KL divergence and loss are healthy. It began with the second reading, step 20."""
    with caplog.at_level(logging.WARNING, "esvit"):
        rank_readings([first] + [then] * 5, Monitor())
    messages = [record.getMessage() for record in caplog.records]
    assert ["partial collapse" in message and "since step 20" in message for message in messages] == [True] * warned


def test_partial_collapse_is_relative_to_the_width(caplog: pytest.LogCaptureFixture) -> None:
    """Also of a network whose features have had a low rank from the first reading on: 12 of 200 channels."""
    monitor = Monitor()
    wide = collapsed("nothing", rows=250)._replace(features=torch.randn(250, 12) @ torch.randn(12, 200))
    scalars = {name: value.item() for name, value in monitor.measure({"view": wide}).items()}
    assert 8 < scalars["view/feature_rank"] < 12
    with caplog.at_level(logging.WARNING, "esvit"):
        for i in range(5):
            monitor.check(scalars | {"loss": 2.0, "skipped": 0.0}, True, i)
    assert [collapse.FIXES["partial"] in record.getMessage() for record in caplog.records] == [True]


def test_partial_collapse_needs_consecutive_readings_after_the_warmup(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "esvit"):
        rank_readings([10.0] + 3 * ([3.0] * 4 + [9.0]), Monitor())
        rank_readings([10.0] + [3.0] * 9, Monitor(), warmed_up=False)
    assert not caplog.records


def test_monitor_continues_after_a_resume(caplog: pytest.LogCaptureFixture) -> None:
    """Reference and streak are saved; a run saved before the reference was starts with its next reading."""
    before, after, old = Monitor(), Monitor(), Monitor()
    rank_readings([10.0, 3.0, 3.0], before)
    after.load_state_dict(before.state_dict())
    assert after.state_dict() == before.state_dict()
    with caplog.at_level(logging.WARNING, "esvit"):
        rank_readings([3.0] * 3, after, start=3)
    assert ["since step 20" in record.getMessage() for record in caplog.records] == [True]
    caplog.clear()
    old.load_state_dict({"view/partial": 2, "view/std": 0})
    with caplog.at_level(logging.WARNING, "esvit"):
        rank_readings([3.0] * 3, old, start=3)
    assert not caplog.records


def test_no_warning_for_healthy_outputs_and_during_warmup(caplog: pytest.LogCaptureFixture) -> None:
    assert not warnings_of("nothing", 50, caplog)[0]
    assert not warnings_of("plateau", 50, caplog, warmed_up=False)[0]


# --------------------------------------------------------------------------- in a step


@pytest.mark.parametrize(
    "flags", [(), ("--use_dense_prediction", "off"), ("--use_mixup", "on"), ("--plain_loss", "on")]
)
def test_monitor_changes_no_bit_of_a_step(flags: tuple[str, ...]) -> None:
    (method, step), (watched_method, watched) = tiny(*flags), tiny(*flags)
    for one, watch in ((step, False), (watched, True)):
        torch.manual_seed(3)
        np.random.seed(3)
        losses = [one([random_views(4, i), random_views(4, 9 + i)], i, 1, monitor=watch) for i in range(2)]
        levels = {name.split("/")[0] for name in losses[-1] if "/" in name}
        assert levels == (({"view"} if "off" in flags else {"view", "region"}) if watch else set())
        if watch:
            assert all(math.isfinite(value) for value in losses[-1].values())
    expected, found = everything(method, step), everything(watched_method, watched)
    assert not [name for name in expected if not torch.equal(expected[name], found[name])]


def test_monitored_step_does_not_synchronize() -> None:
    _, step = tiny()
    meter = EpochMeter(0, 2, 4)
    meter.update(step([random_views(4, 0)], 0, 1, monitor=True))
    views = random_views(4, 1)
    assert not syncs.count(lambda: meter.update(step([views], 1, 1, monitor=True))).waits
    assert sum(syncs.count(lambda: step.check(meter.read(), 1)).waits.values()) == 1


def test_monitored_regions_are_matched_pairs() -> None:
    """Student regions of the second view, each with the most similar teacher region of the first view of its image."""
    method, _ = tiny("--plain_loss", "on")
    views = random_views(4, 0)
    student, teacher = method.student(views), method.teacher(views[:2])
    features: dict[str, Tensor] = {"view": torch.zeros(8, 3), "region": torch.zeros(8, 3)}
    level = method.criterion.monitored_levels(student, teacher, 0, features)["region"]
    first, second = student.regions_per_view[:2]
    rows = [4 * first + i for i in range(4 * second)]
    matches = []
    for row in range(4 * second):
        image = row // second
        candidates = teacher.region_features[image * first : (image + 1) * first]
        cosines = torch.cosine_similarity(student.region_features[rows[row]][None], candidates)
        matches.append(image * first + int(cosines.argmax()))
    assert isinstance(level.student_logits, Tensor)
    assert isinstance(level.teacher_logits, Tensor)
    assert torch.equal(level.student_logits, student.region_logits.detach()[rows])
    assert torch.equal(level.teacher_logits, teacher.region_logits[matches])


# --------------------------------------------------------------------------- bad steps


def test_diagnosis_of_nonfinite_steps_names_terms_tensors_and_images(tmp_path: Path) -> None:
    _, step = tiny("--max_bad_steps", "2", "--output_dir", str(tmp_path))
    for number in ("", "_2"):
        meter = EpochMeter(0, 2, 4)
        views = spoiled(random_views(4, 0))
        for i in range(2):
            meter.update(step([views], i, 1))
        with pytest.raises(FloatingPointError) as caught:
            step.check(meter.read(), 1, partial(list, views))
        message = str(caught.value)
        assert "2 steps in a row" in message
        assert "view_loss" in message
        assert "lr " in message
        assert "images of process 0 contain such values" in message
        kept = torch.load(tmp_path / f"bad_step{number}.pth", weights_only=True)
        bad = [name for name, norm in kept["gradient_norms"].items() if not math.isfinite(norm)]
        assert bad
        assert f"({len(bad)} of {len(kept['gradient_norms'])})" in message
        assert bad[0] in message
        assert [view["not_finite"] for view in kept["view_statistics"][0]] == [0, 0, 1, 0]
        assert torch.equal(kept["views"][0], views[0])
        assert [one["iteration"] for one in kept["steps"]] == [0, 1]
        step.nonfinite.in_a_row, step.nonfinite._recent = 0, []


@pytest.mark.slow
@pytest.mark.parametrize("what", ["images", "a term"])
def test_two_processes_fail_together(tmp_path: Path, what: str) -> None:
    """Only the second process has bad images or a term that overflows; both raise the diagnosis, and it writes its batch."""
    script = tmp_path / "end.py"
    script.write_text(
        "import argparse, sys\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "from distributed import collectives, launch\n"
        "from training.run_log import EpochMeter\n"
        "from helpers.step_runs import random_views, spoiled, tiny\n"
        "def main():\n"
        "    launch.init_processes(argparse.Namespace(device='cpu', dist_url='env://', local_rank=None, dist_timeout=1))\n"
        f"    method, step = tiny('--max_bad_steps', '2', '--output_dir', {str(tmp_path)!r})\n"
        "    meter = EpochMeter(0, 2, 4)\n"
        "    views = random_views(4, collectives.get_rank())\n"
        "    if collectives.get_rank() and sys.argv[1] == 'images':\n"
        "        views = spoiled(views)\n"
        "    elif collectives.get_rank():\n"
        "        terms = method.criterion.terms\n"
        "        method.criterion.terms = lambda *a: terms(*a) | {'region_loss': terms(*a)['region_loss'] * float('inf')}\n"
        "    for i in range(2):\n"
        "        meter.update(step([views], i, 1, monitor=i == 1))\n"
        "    step.check(meter.read(), 1, lambda: views)\n"
        "launch.run_script(main)\n"
    )
    result = run_script(str(script), what, processes=2, timeout=60)
    assert result.returncode != 0
    for rank in ("error: 2 steps", "error (process 1): 2 steps"):
        assert rank in result.stderr
    kept = torch.load(tmp_path / "bad_step.pth", weights_only=True)
    assert kept["process"] == 1
    assert torch.equal(kept["views"][0], random_views(4, 1)[0])
    finite = [all(math.isfinite(value) for value in scalars.values()) for scalars in kept["scalars"]]
    assert finite == [True, False]
    if what == "images":
        assert "images of process 1 contain such values" in result.stderr
        assert kept["view_statistics"][1][2]["not_finite"] == 1
    else:
        assert "not finite were loss, region_loss of process 1 (loss inf)" in result.stderr
        assert "resume with --precision fp32, a lower --lr" in result.stderr


@pytest.mark.slow
def test_monitor_of_two_processes(tmp_path: Path) -> None:
    """Means over rows equal those of one process with both batches; other scalars are averaged over processes."""
    script = tmp_path / "watch.py"
    script.write_text(
        "import argparse, json, pathlib, sys\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "from distributed import collectives, launch\n"
        "from helpers.step_runs import random_views, tiny\n"
        "def main():\n"
        "    launch.init_processes(argparse.Namespace(device='cpu', dist_url='env://', local_rank=None, dist_timeout=1))\n"
        "    _, step = tiny()\n"
        "    scalars = step([random_views(4, collectives.get_rank())], 0, 1, monitor=True)\n"
        f"    path = pathlib.Path({str(tmp_path)!r}) / f'{{collectives.get_rank()}}.json'\n"
        "    path.write_text(json.dumps({name: value.item() for name, value in scalars.items()}))\n"
        "launch.run_script(main)\n"
    )
    result = run_script(str(script), processes=2)
    assert result.returncode == 0, result.stderr
    found, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert found == other

    def alone(views: list[Tensor]) -> dict[str, float]:
        return {name: value.item() for name, value in tiny()[1]([views], 0, 1, monitor=True).items()}

    halves = [random_views(4, rank) for rank in (0, 1)]
    union, each = alone([torch.cat(pair) for pair in zip(*halves)]), [alone(half) for half in halves]
    assert {name.split("/")[0] for name in found if "/" in name} == {"view", "region"}
    for name, value in found.items():
        assert value == pytest.approx(sum(half[name] for half in each) / 2, rel=1e-4, abs=1e-6), name
        if name.endswith(("loss", "teacher_entropy", "kl")):
            assert value == pytest.approx(union[name], rel=1e-4), name


# --------------------------------------------------------------------------- whole runs


def run(tmp_path: Path, name: str, *flags: str) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Train, and return the log without times and the weights."""
    out = tmp_path / name
    images = tmp_path / "images"
    if not images.exists():
        write_images(images, 8, classes=2)
    command = [*TINY_RUN, "--data_path", str(images), "--output_dir", str(out), *flags, *TINY_SWIN]
    main_esvit.main(main_esvit.get_args_parser().parse_args(command))
    timed = {"seconds", "images_per_s", "waiting_share", "peak_memory_mb"}
    lines = [json.loads(line) for line in (out / "log.txt").open()]
    state = torch.load(out / "checkpoint.pth", weights_only=False)
    return [{k: v for k, v in line.items() if k not in timed} for line in lines], state["student"] | state["teacher"]


def test_same_seed_gives_the_same_log_and_probes_change_nothing(tmp_path: Path) -> None:
    """A folder without a split is scored leave-one-out; colors separate its two classes."""
    (first, weights), (second, _) = run(tmp_path, "a"), run(tmp_path, "b")
    assert first == second
    assert first != run(tmp_path, "c", "--seed", "1")[0]
    scored, scored_weights = run(tmp_path, "d", "--knn_every", "2", "--knn_data_path", str(tmp_path / "images"))
    assert not [name for name in weights if not torch.equal(weights[name], scored_weights[name])]
    assert "knn_top1" not in scored[0]
    scores = [scored[1].pop(name) for name in ("knn_top1", "knn_top1_student")]
    assert scored == first
    assert all(50 <= score <= 100 for score in scores)
    assert first[0]["train_region/feature_rank"] >= 1


@pytest.mark.slow
def test_two_processes_probe_and_draw_different_crops(tmp_path: Path) -> None:
    for part, seed in (("train", 0), ("val", 1)):
        write_images(tmp_path / "images" / part, 6, classes=2, seed=seed)
    flags = ["--data_path", str(tmp_path / "images"), "--knn_every", "1", "--knn_data_path", str(tmp_path / "images")]
    logs = {}
    for name, knn in (("with", flags), ("without", flags[:2])):
        result = run_script(
            "main_esvit.py", *TINY_RUN, *knn, "--output_dir", str(tmp_path / name), *TINY_SWIN, processes=2
        )
        assert result.returncode == 0, result.stderr
        logs[name] = [json.loads(line) for line in (tmp_path / name / "log.txt").open()]
    assert all(line["knn_top1"] >= 50 for line in logs["with"])
    assert [line["train_loss"] for line in logs["with"]] == [line["train_loss"] for line in logs["without"]]
    state = torch.load(tmp_path / "with" / "checkpoint.pth", weights_only=False)
    assert not torch.equal(*(rng["torch"] for rng in state["rng"]))
