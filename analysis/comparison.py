"""Comparison of runs: settings that differ, scores, cost and curves, from the files of each run.

Scores are read from the result files of all evaluations by their one schema (evaluation/results.py), so that a new evaluation
appears without a change here.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from analysis.curves import finite_points, titles_of_keys
from analysis.plots import Points
from analysis.report import HEADINGS, LABELS
from analysis.run_files import read_log, result_files, starts, subfolders
from analysis.tables import Row, better
from checkpoints.files import numbered, read_text
from evaluation.results import FOLDER
from utils import UsageError, flattened

OMITTED = {
    "output_dir",
    "opts",
    "dist_url",
    "dist_timeout",
    "local_rank",
    "wandb",
}  # settings that no number depends on
NOT_SCORES = {  # entries of scores that describe them or are of little interest
    *("lr", "n_last_blocks", "epoch", "lambd", "iterations", "regions", "images", "last_loss", "last_top5")
}
SETTINGS = "Settings that differ"
SAME_DATA = ("train_images", "val_images", "classes")


class Run(NamedTuple):
    """The content of the folder of a run."""

    name: str
    folder: Path
    log: list[dict[str, Any]]  # epochs
    start: dict[str, Any]  # content of the last run.json
    config: dict[str, Any]  # of the network, with dotted names
    results: dict[tuple[str, str], dict[str, Any]]  # content of result files by evaluation and folder

    @property
    def args(self) -> dict[str, Any]:
        """Arguments of the last start."""
        args = self.start.get("args")
        return args if isinstance(args, dict) else {}


# --------------------------------------------------------------------------- reading


def open_runs(folders: Sequence[str], names: Sequence[str] | None = None) -> list[Run]:
    """Read runs, named by their folders unless names are given.

    Raises:
        UsageError: A folder is not that of a run or is given twice, or the names do not fit.
    """
    paths = [Path(folder) for folder in folders]
    for number, path in enumerate(paths):
        if path.resolve() in {other.resolve() for other in paths[:number]}:
            raise UsageError(f"the run {path} is given twice; give each folder once")
    if names is not None and (len(names) != len(paths) or len(set(names)) < len(names)):
        raise UsageError(f"--names {' '.join(names)} are not {len(paths)} different names, one for each run")
    return [_open_run(path, name) for path, name in zip(paths, names or _short_names(paths))]


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Return the last parts of the paths, as many as make them different."""
    parts = [path.resolve().parts for path in paths]
    length = next(n for n in range(1, 1 + max(map(len, parts))) if len({p[-n:] for p in parts}) == len(parts))
    return [os.path.join(*p[-length:]) for p in parts]


def _open_run(folder: Path, name: str) -> Run:
    """Read a run.

    Raises:
        UsageError: The folder has none of the files of a run.
    """
    log, run_starts = read_log(folder / "log.txt"), starts(folder)
    if not (log or run_starts or any(result_files([folder]))):
        raise UsageError(
            f"{folder} is not the folder of a run: it has no run.json, no log.txt with an epoch and no {FOLDER}/*.json with "
            "scores; give the --output_dir of a training or evaluation"
        )
    results = {}
    for path, record in result_files(subfolders(folder)):
        inside = path.parent.parent.relative_to(folder).as_posix()
        results[path.stem, "" if inside == "." else inside] = record
    return Run(name, folder, log, run_starts[-1] if run_starts else {}, _read_config(folder), results)


def _read_config(folder: Path) -> dict[str, Any]:
    """Return the last config of a run, with dotted names; empty if it has none that can be read."""
    paths = numbered(folder / "config.yaml")
    try:
        content = yaml.safe_load(read_text(paths[-1])) if paths else {}
    except (UsageError, yaml.YAMLError):
        return {}
    return dict(flattened(content)) if isinstance(content, dict) else {}


# --------------------------------------------------------------------------- the table


def build_rows(runs: Sequence[Run]) -> list[Row]:
    """Return the rows of the comparison; those in which no run has a value are omitted."""
    rows = [*setting_rows(runs), *training_rows(runs), *score_rows(runs), *cost_rows(runs)]
    return [row for row in rows if any(value is not None for value in row.values)]


def setting_rows(runs: Sequence[Run]) -> Iterator[Row]:
    """Yield the settings that differ between runs; one that a run does not have differs from none."""
    yield from _differing(SETTINGS, [_settings(run) for run in runs])


def _settings(run: Run) -> dict[str, Any]:
    command, packages, revision = (run.start.get(name) for name in ("command", "packages", "git"))
    about = {
        "script": Path(str(command[0])).name if isinstance(command, list) and command else None,
        "processes": run.start.get("world_size"),
        "revision": revision[:12] if isinstance(revision, str) else None,
        "PyTorch": packages.get("torch") if isinstance(packages, dict) else None,
    }
    known = {name: value for name, value in about.items() if value is not None}
    return known | {name: value for name, value in run.args.items() if name not in OMITTED} | run.config


def _differing(section: str, entries: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """Yield a row for each entry that has different values."""
    for name in _union(entries):
        values = [entry.get(name) for entry in entries]
        if len({json.dumps(each.get(name), default=str) for each in entries if name in each}) > 1:
            yield Row(section, name if section == SETTINGS else _label(name), values)


def training_rows(runs: Sequence[Run]) -> Iterator[Row]:
    """Yield progress, loss and the k-NN scores of `--knn_every`.

    A loss is never marked: it is lower with fewer prototypes, a sharper teacher or collapsed outputs as well.
    """
    section = "Training"
    yield Row(section, "epochs done", [_progress(run) for run in runs])
    losses = [finite_points(run.log, "train_loss") for run in runs]
    yield Row(section, "loss, last", [points[-1][1] if points else None for points in losses], ".4f")
    yield Row(section, "loss, lowest", [min((y for _, y in points), default=None) for points in losses], ".4f")
    data = {json.dumps(run.args.get("knn_data_path")) for run in runs if finite_points(run.log, "knn_top1")}
    better = 1 if len(data) == 1 else 0
    for key, network in (("knn_top1", "teacher"), ("knn_top1_student", "student")):
        scores = [finite_points(run.log, key) for run in runs]
        last = [points[-1][1] if points else None for points in scores]
        yield Row(section, f"k-NN top-1 of the {network}, last, %", last, ".2f", better)
        highest = [max((y for _, y in points), default=None) for points in scores]
        yield Row(section, f"k-NN top-1 of the {network}, highest, %", highest, ".2f", better)
    skipped = [sum(int(steps) for _, steps in finite_points(run.log, "skipped_steps")) or None for run in runs]
    yield Row(section, "skipped steps", skipped, "d")


def _progress(run: Run) -> str | None:
    done = run.log[-1]["epoch"] + 1 if run.log else 0
    total = run.args.get("epochs")
    return f"{done} of {total}" if total else str(done) if run.log else None


def score_rows(runs: Sequence[Run]) -> Iterator[Row]:
    """Yield the scores of all evaluations; the best is marked where data and protocol are the same, else what differs is shown."""
    order = [*HEADINGS]
    names = [name for name, _ in _union(run.results for run in runs)]
    for evaluation in sorted(dict.fromkeys(names), key=lambda name: order.index(name) if name in order else len(order)):
        heading = HEADINGS.get(evaluation, evaluation.replace("_", " "))
        for folder, records in _aligned(runs, evaluation).items():
            section = f"{heading} ({folder})" if folder else heading
            described = [
                {key: value for key, value in _part(record, "data").items() if key in SAME_DATA}
                | {key: value for key, value in _part(record, "protocol").items() if key != "seed"}
                for record in records
            ]
            differing = [*_differing(section, described)]
            yield from differing
            top5 = {str(each["top5_is"]) for each in described if "top5_is" in each}
            scores = [_part(record, "scores") for record in records]
            yield from _score_rows(section, scores, "/".join(sorted(top5)) or "top5", marked=not differing)


def _aligned(runs: Sequence[Run], evaluation: str) -> dict[str, list[dict[str, Any]]]:
    """Return the result files of an evaluation, one for each run, by their folder; "" if no run has several."""
    by_run = [{folder: record for (name, folder), record in run.results.items() if name == evaluation} for run in runs]
    if all(len(records) < 2 for records in by_run):
        return {"": [next(iter(records.values()), {}) for records in by_run]}
    return {folder: [records.get(folder, {}) for records in by_run] for folder in _union(by_run)}


def _score_rows(section: str, scores: Sequence[Mapping[str, Any]], top5: str, marked: bool) -> Iterator[Row]:
    """Yield a row for each number of each row of a result file; `top5` is what that accuracy is with few classes."""
    for row in _union(scores):
        of_runs = [_part(each, row) for each in scores]
        for key in (key for key in _union(of_runs) if key not in NOT_SCORES):
            values = [_number(each.get(key)) for each in of_runs]
            label = _label(key).replace("top-5", top5.replace("top", "top-"))  # "top-3/top-5" if the runs differ
            direction = better(key)
            yield Row(section, f"{row}, {label}", values, ".2f" if direction else ".6g", direction if marked else 0)


def cost_rows(runs: Sequence[Run]) -> Iterator[Row]:
    """Yield time, speed and memory of the training."""
    section = "Cost"
    epochs = [[{key: _number(value) or 0 for key, value in epoch.items()} for epoch in run.log] for run in runs]
    seconds = [math.fsum(epoch.get("seconds", 0) for epoch in log) or None for log in epochs]
    equally_long = len({len(log) for log in epochs}) == 1
    yield Row(section, "time of the epochs", seconds, "time", -1 if equally_long else 0)
    images = [math.fsum(epoch.get("images_per_s", 0) * epoch.get("seconds", 0) for epoch in log) for log in epochs]
    speed = [total / time if total and time else None for total, time in zip(images, seconds)]
    yield Row(section, "images/s", speed, ".1f", 1)
    memory = [max((epoch.get("peak_memory_mb", 0) for epoch in log), default=0) or None for log in epochs]
    yield Row(section, "peak memory, MiB", memory, ".0f", -1)


def _union(mappings: Iterable[Mapping[Any, Any]]) -> list[Any]:
    """Return the keys of all mappings, in the order of their first appearance."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def _part(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    part = record.get(name)
    return part if isinstance(part, dict) else {}


def _label(key: str) -> str:
    return LABELS.get(key, key.replace("_", " "))


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


# --------------------------------------------------------------------------- curves


def build_curves(runs: Sequence[Run]) -> dict[str, dict[str, Points]]:
    """Return the curves of the runs by the title of their plot."""
    curves: dict[str, dict[str, Points]] = {}
    for key, title in titles_of_keys().items():
        for run in runs:
            if points := finite_points(run.log, key):
                curves.setdefault(title, {})[run.name] = points
    return curves
