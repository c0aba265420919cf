"""benchmarks/gpu.py on a CPU: its rows and their values, and what becomes of rows that fail, crash, hang or have no time."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import golden, gpu, gpu_fast, gpu_fed, gpu_right, gpu_rows
from benchmarks.gpu_rows import Bench, Bound, Figures, Row
from utils import UsageError

NEED_CUDA = {"a step never waits for the device", "profile of Swin-T, window 7, batch 2", "memory of Swin-T, window 7"}


def parsed(folder: Path, *words: str) -> argparse.Namespace:
    line = ["--device", "cpu", "--tiny", "--output", str(folder / "gpu.json"), *words]
    return gpu.get_args_parser().parse_args(line)


def run(folder: Path, *words: str, rows: Sequence[Row] = ()) -> dict[str, Any]:
    """Run some rows, or all, and return the record by name."""
    with pytest.MonkeyPatch.context() as patch:
        if rows:
            patch.setattr(gpu, "plan", lambda only, tiny: list(rows))
        gpu.main(parsed(folder, *words))
    return by_name(folder)


def by_name(folder: Path) -> dict[str, Any]:
    return {row["name"]: row for row in json.loads((folder / "gpu.json").read_text())["rows"]}


def row_of(name: str) -> Row:
    return next(row for row in gpu.plan(list(gpu_rows.PARTS), True) if row.name == name)


@pytest.mark.slow
def test_everything_that_a_cpu_can_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(tmp_path)
    planned = [*gpu_right.rows(True), *gpu_fast.rows(True)[0], *gpu_fed.rows(True)]
    assert list(rows) == [row.name for row in planned]
    for name, row in rows.items():
        expected = ("not run", "needs CUDA") if name in NEED_CUDA else ("ok", "")
        assert (row["result"], row["reason"]) == expected, row
    for row in rows.values():
        bounds = [figure for figure in row["figures"].values() if isinstance(figure, dict)]
        assert all(figure["value"] <= figure["at_most"] for figure in bounds)
        assert bounds or row["part"] != "right" or row["name"] in NEED_CUDA
    assert 0 < rows["golden network deit_small"]["figures"]["fp32"]["value"] < 1e-5
    assert rows["FSDP of one"]["figures"]["student"].startswith("FSDP")
    step = rows["Swin-T, window 7, batch 2"]["figures"]
    assert step["lean / plain time"] == pytest.approx(step["plain images/s"] / step["lean images/s"])
    assert step["lean / timm time"] == pytest.approx(step["timm images/s"] / step["lean images/s"])
    for layout in gpu_fed.LAYOUTS:
        worker, needed = rows[f"JPEG 500 x 375, {layout}"]["figures"].values()
        assert needed == pytest.approx(step["lean images/s"] / worker)
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["environment"]["torch"] == torch.__version__
    assert all(sentence in printed for sentence in record["verdict"])
    assert len(record["verdict"]) == 3
    assert all(f"| {name} | " in printed for name in rows)


def test_full_plan_has_every_network_and_batch() -> None:
    names = [row.name for row in gpu.plan(list(gpu_rows.PARTS), False)]
    assert len(set(names)) == len(names)
    assert {f"golden network {name}" for name in golden.NETWORKS} <= set(names)
    steps = {gpu_fast.step_name(name, batch) for name in gpu_fast.NETWORKS for batch in (32, 64, 128)}
    assert steps <= set(names)
    assert gpu.plan(["fed", "right"], False)[0].part == "right"


@pytest.mark.parametrize(("array", "fails"), [("region_center", True), ("view_grad", True), (None, False)])
def test_a_wrong_golden_number_fails_its_row_alone(tmp_path: Path, array: str | None, fails: bool) -> None:
    shutil.copytree(golden.FOLDER, tmp_path / "golden")
    arrays = golden.arrays("loss_a")
    if array:
        arrays[array] = arrays[array] * 1.001
    np.savez(tmp_path / "golden" / "loss_a.npz", **arrays)  # type: ignore[arg-type]
    rows = [row_of("golden losses"), row_of("golden losses of UDI")]
    if fails:
        with pytest.raises(SystemExit) as error:
            run(tmp_path, "--golden", str(tmp_path / "golden"), rows=rows)
        assert error.value.code == 1
    else:
        run(tmp_path, "--golden", str(tmp_path / "golden"), rows=rows)
    found = by_name(tmp_path)
    assert found["golden losses"]["result"] == ("failed" if fails else "ok")
    assert found["golden losses of UDI"]["result"] == "ok"


def test_checks_of_steps_see_a_difference() -> None:
    """Another learning rate, another temperature; a head with BatchNorm has other names."""
    cpu = torch.device("cpu")
    views = [gpu_right.tiny_views(cpu, i) for i in range(2)]

    def holds(*words: str) -> list[bool]:
        steps = gpu_right.tiny_step(cpu), gpu_right.tiny_step(cpu, *words)
        return [figure.holds for _, figure in gpu_right.compare_steps(*steps, views) if isinstance(figure, Bound)]

    assert holds() == [True, True, True]
    assert holds("--lr", "0.0102") == [True, False, False]
    assert holds("--teacher_temp", "0.05", "--warmup_teacher_temp", "0.05") == [True, False, False]
    with pytest.raises(ValueError, match="names differ"):
        holds("--use_bn_in_head", "on")


@pytest.mark.slow
def test_check_of_resume_sees_random_states_that_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stochastic depth then drops other blocks."""
    monkeypatch.setattr("utils.set_rng_state", lambda state: None)
    figures = dict(gpu_right.check_resume(Bench(torch.device("cpu"), True, golden.FOLDER)))
    found = {name: figure.holds for name, figure in figures.items() if isinstance(figure, Bound)}
    assert found == {"student": False, "teacher": False, "dino_loss": False, "untrained": True}


# --------------------------------------------------------------------------- rows that come to no good end


def fine(bench: Bench) -> Figures:
    yield "process", float(os.getpid())
    yield "seen", ", ".join(bench.known)


def wrong(bench: Bench) -> Figures:
    yield "error", Bound(2.0, 1.0)


def undefined(bench: Bench) -> Figures:
    yield "error", Bound(float("nan"), 1.0)


def broken(bench: Bench) -> Figures:
    yield "before", 1.0
    raise ValueError("no such kernel")


def corrupting(bench: Bench) -> Figures:
    yield "process", float(os.getpid())
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def crashing(bench: Bench) -> Figures:
    yield "before", 1.0
    os.kill(os.getpid(), signal.SIGKILL)


def hungry(bench: Bench) -> Figures:
    yield "before", 1.0
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80.00 GiB")


def hanging(bench: Bench) -> Figures:
    yield "process", float(os.getpid())
    time.sleep(600)


ENDS: dict[Callable[[Bench], Figures], tuple[str, str]] = {
    wrong: ("failed", "error"),
    undefined: ("failed", "error"),
    broken: ("failed", "ValueError: no such kernel"),
    corrupting: ("failed", "RuntimeError: CUDA error: an illegal memory access was encountered"),
    crashing: ("failed", "the process ended with code -9"),
    hungry: ("failed", "out of memory"),
    hanging: ("failed", "stopped after 3 s"),
}


@pytest.mark.parametrize("work", ENDS, ids=lambda work: work.__name__)
def test_a_row_never_ends_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: Callable[[Bench], Figures]
) -> None:
    """The row keeps its figures, the next one runs, in a process that a corrupted context does not reach."""
    if work is hanging:
        monkeypatch.setattr(gpu_rows, "LEAST_LIMIT", 3.0)
    rows = [Row("right", "first", 0.0, fine), Row("right", "bad", 0.0, work), Row("right", "last", 0.0, fine)]
    with pytest.raises(SystemExit):
        run(tmp_path, rows=rows)
    found = by_name(tmp_path)
    assert (found["bad"]["result"], found["bad"]["reason"]) == ENDS[work]
    assert found["bad"]["figures"]
    assert found["first"]["result"] == found["last"]["result"] == "ok"
    assert found["last"]["figures"]["seen"] == "first, bad"
    same_process = found["first"]["figures"]["process"] == found["last"]["figures"]["process"]
    assert same_process is (work not in {corrupting, crashing, hanging})
    for row in found.values():  # no process is left
        assert not Path(f"/proc/{row['figures'].get('process', 0):.0f}").exists()


def test_missed_goals_and_failures_elsewhere_are_no_error(tmp_path: Path) -> None:
    found = run(tmp_path, rows=[Row("fast", "slow", 0.0, wrong), Row("fed", "bad", 0.0, broken)])
    assert [row["result"] for row in found.values()] == ["goal missed", "failed"]


def test_rows_without_time_are_named(tmp_path: Path) -> None:
    """A row whose estimate is longer than what is left is not started, a shorter one is; one that is cut is not failed."""
    long, short = Row("right", "long", 100.0, fine), Row("right", "short", 0.01, fine)
    found = run(tmp_path, "--minutes", "0.05", rows=[long, short, Row("right", "cut", 1e-3, hanging)])
    assert [(row["result"], row["reason"]) for row in found.values()] == [
        ("not run", "time"),
        ("ok", ""),
        ("not run", "time"),
    ]
    assert found["cut"]["figures"]


def test_a_killed_program_leaves_its_figures_and_no_process(tmp_path: Path) -> None:
    rows = [Row("right", "first", 0.0, fine), Row("right", "second", 100.0, hanging)]
    process = multiprocessing.get_context("fork").Process(target=run, args=(tmp_path,), kwargs={"rows": rows})
    process.start()
    while not (tmp_path / "gpu.json").exists() or not by_name(tmp_path).get("second", {}).get("figures"):
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    found = by_name(tmp_path)
    assert (found["first"]["result"], found["second"]["result"]) == ("ok", "running")
    child = Path(f"/proc/{found['second']['figures']['process']:.0f}")
    until = time.monotonic() + 10
    while child.exists() and "Z" not in (child / "stat").read_text().split()[2]:
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--output", "there.json"], "there.json"),
        (["--output", "no/where.json"], "no"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--device", "tpu"], "tpu"),
    ],
)
def test_bad_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], named: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.json").write_text("precious")
    with pytest.raises(UsageError, match=named):
        gpu.main(parsed(tmp_path, *words))
    assert [path.name for path in tmp_path.iterdir()] == ["there.json"]
    assert (tmp_path / "there.json").read_text() == "precious"


# --------------------------------------------------------------------------- what only a GPU would run


def test_profile_of_a_trace() -> None:
    """Two steps of 100 us: kernels on two streams overlap, 30 us are idle; one of three waits is the last one."""

    def event(category: str, name: str, start: float, duration: float) -> dict[str, Any]:
        return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration}

    events = [
        event("kernel", "gemm<float>", 100, 50),
        event("kernel", "softmax", 120, 40),  # overlaps
        event("gpu_memcpy", "Memcpy HtoD", 190, 10),  # after 30 idle
        event("kernel", "gemm<half>", 200, 100),
        event("cpu_op", "aten::mm", 0, 500),
        event("cuda_runtime", "cudaLaunchKernel", 0, 5),
        *(event("cuda_runtime", "cudaStreamSynchronize", start, 5) for start in (10, 20)),
        event("cuda_runtime", "cudaDeviceSynchronize", 300, 5),
        {"ph": "M", "name": "process_name"},
    ]
    found = gpu_fast.summarize(events, steps=2)
    assert found.idle == pytest.approx(30 / 200)
    assert (found.kernels, found.waits) == (2, 1)
    assert found.largest[0] == ("gemm", pytest.approx(150 / 200))
    with pytest.raises(ValueError, match="no kernels"):
        gpu_fast.summarize(events[4:], steps=2)


@pytest.mark.parametrize("guess", [1, 7, 100, 480])
@pytest.mark.parametrize("factor", [0.0, 0.3, 0.95, 1.0, 1.02, 1.3, 1.9])
def test_search_for_the_largest_batch(guess: int, factor: float) -> None:
    """Within 2 % or one image of the truth, with few tries."""
    truth, tried = int(guess * factor), []

    def fitting(batch: int) -> bool:
        tried.append(batch)
        return batch <= truth

    found = gpu_fast.largest_batch(fitting, guess)
    assert found <= truth <= found + max(0.02 * guess, 1)
    assert len(tried) <= 9
