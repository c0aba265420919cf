"""compare_runs.py: what its table, curves and page say about runs, finished or not."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.runs import write_images
from helpers.training_runs import train
from PIL import Image

import compare_runs
from analysis import plots, report, tables
from analysis.comparison import build_curves, build_rows, open_runs
from analysis.tables import Row
from evaluation.results import Results, save_results
from utils import UsageError

LINE = {"train_loss": 4.0, "train_lr": 0.1, "images_per_s": 10.0, "seconds": 30.0, "peak_memory_mb": 100.0}


def write_run(
    folder: Path, losses: Sequence[float | None] = (), args: dict[str, Any] | None = None, **more: Sequence[Any]
) -> Path:
    """The files of a run with epochs of these losses, and of further values of log.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    start = {"command": ["main_esvit.py"], "args": {"epochs": 9, "lr": 0.1, "output_dir": str(folder)} | (args or {})}
    (folder / "run.json").write_text(json.dumps(start))
    lines = [
        LINE | {"epoch": epoch, "train_loss": loss} | {name: values[epoch] for name, values in more.items()}
        for epoch, loss in enumerate(losses)
    ]
    if lines:
        (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write_knn(folder: Path, top1: float, **protocol: Any) -> None:
    scores: dict[str, dict[str, Any]] = {
        "network, 20-NN": {"top1": top1, "top5": 90.0, "per_class": {"cat": 1.0}},
        "raw pixels, 20-NN": {"top1": 30.0},
    }
    data = {"data_path": str(folder), "val_images": 60}
    save_results(folder, Results("knn", {}, data, {"temperature": 0.07, "seed": top1} | protocol, scores))


def rows_of(*folders: Path) -> dict[tuple[str, str], Row]:
    rows = build_rows(open_runs([str(folder) for folder in folders]))
    assert len({(row.section, row.label) for row in rows}) == len(rows)
    return {(row.section, row.label): row for row in rows}


# --------------------------------------------------------------------------- rows


def test_settings_that_differ(tmp_path: Path) -> None:
    """The last start of a run counts; what only one script has is no difference, nor is where the files are."""
    a = write_run(tmp_path / "a", args={"seed": 0, "out_dim": 64, "sizes": [96]})
    (a / "run_2.json").write_text((a / "run.json").read_text().replace('"epochs": 9', '"epochs": 10'))
    b = write_run(tmp_path / "b", args={"seed": 0, "alpha": 0.5, "sizes": [96, 64]})
    for folder, window in ((a, 7), (b, 14)):
        (folder / "config.yaml").write_text(
            yaml.safe_dump({"MODEL": {"SPEC": {"WINDOW": window, "DIM": 96}, "NAME": "x"}})
        )
    settings = {label: row.values for (section, label), row in rows_of(a, b).items() if section.startswith("Settings")}
    assert settings == {"epochs": [10, 9], "sizes": [[96], [96, 64]], "MODEL.SPEC.WINDOW": [7, 14]}


def test_training_and_cost(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", [5.0, 3.0, 4.0], knn_top1=[20.0, None, 40.0], seconds=[60, 60, 3600])
    (a / "log.txt").open("a").write('{"epoch": 3, "train_lo')  # of a run that goes on
    b = write_run(
        tmp_path / "b", [2.0, float("nan")], knn_top1=[50.0, 30.0], skipped_steps=[0, 2], images_per_s=[10, 30]
    )
    rows = rows_of(a, b)
    values = {
        label: [row.values, row.best] for (_, label), row in rows.items() if row.section != "Settings that differ"
    }
    assert values == {
        "epochs done": [["3 of 9", "2 of 9"], set()],
        "loss, last": [[4.0, 2.0], set()],  # a lower loss is not a better network
        "loss, lowest": [[3.0, 2.0], set()],
        "k-NN top-1 of the teacher, last, %": [[40.0, 30.0], {0}],
        "k-NN top-1 of the teacher, highest, %": [[40.0, 50.0], {1}],
        "skipped steps": [[None, 2], set()],
        "time of the epochs": [[3720.0, 60.0], set()],  # of unequal numbers of epochs
        "images/s": [[10.0, 20.0], {1}],
        "peak memory, MiB": [[100.0, 100.0], set()],
    }
    assert rows["Cost", "time of the epochs"].texts() == ["1:02:00", "0:01:00"]


def test_scores_of_another_knn_set_are_not_compared(tmp_path: Path) -> None:
    for name, data in (("a", "x"), ("b", "y")):
        write_run(tmp_path / name, [1.0], {"knn_data_path": data}, knn_top1=[ord(name)])
    assert rows_of(tmp_path / "a", tmp_path / "b")["Training", "k-NN top-1 of the teacher, last, %"].best == set()


def test_before_the_first_epoch(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", [1.0])
    (a / "log.txt").write_text('{"epo')
    assert rows_of(a, b)["Training", "epochs done"].values == ["0 of 9", "1 of 9"]
    assert build_curves(open_runs([str(a), str(b)]))["Loss"] == {"b": [(0, 1.0)]}


def test_damaged_files(tmp_path: Path) -> None:
    """What cannot be read is as if it were not there."""
    a, b = write_run(tmp_path / "a", [1.0]), write_run(tmp_path / "b", [2.0])
    (a / "log.txt").write_text(
        '{"epoch": 0, "train_loss": "x", "seconds": [], "skipped_steps": {}, "peak_memory_mb": "1"}'
    )
    (a / "run.json").write_text('{"args": 3, "command": {}, "packages": [], "git": null}')
    (a / "config.yaml").write_text("a: [")
    (a / "results").mkdir()
    for number, content in enumerate(("{", '{"scores": 3}', '{"scores": {"x": 3}, "data": [], "protocol": 1}')):
        (a / "results" / f"{number}.json").write_text(content)
    found = {label: row.values for (_, label), row in rows_of(a, b).items()}
    assert found == {
        "epochs done": ["1", "1 of 9"],
        **{name: [None, 2.0] for name in ("loss, last", "loss, lowest")},
        **{"time of the epochs": [None, 30.0], "images/s": [None, 10.0], "peak memory, MiB": [None, 100.0]},
    }


def test_winners(tmp_path: Path) -> None:
    """High or low as the score has it; all of equal ones; none where all are equal or nothing is known of the entry."""
    for name, error, top1, new in (("a", 3.0, 70, 1.0), ("b", 2.0, 70, 2.0), ("c", 4.0, 60, 3.0)):
        scores = {"network": {"median_error": error, "top1": top1, "accuracy": 50.0, "unknown": new, "lr": new}}
        (write_run(tmp_path / name) / "analysis").mkdir()
        save_results(tmp_path / name / "analysis", Results("fresh_one", {}, {}, {}, scores))
    rows = rows_of(*(tmp_path / name for name in "abc"))
    found = {label: row.best for (section, label), row in rows.items() if section == "fresh one"}
    assert found == {
        "network, median error, pixels": {1},
        "network, top-1, %": {0, 1},
        "network, at the true position, %": set(),
        "network, unknown": set(),
    }


def test_values_that_look_the_same_are_equally_good() -> None:
    assert Row("", "", [775.4, 775.3, 780.0], ".0f", -1).best == {0, 1}
    assert Row("", "", [775.4, 775.3], ".0f", -1).best == set()


def test_different_protocols_are_told_and_not_marked(tmp_path: Path) -> None:
    for name, top1, size in (("a", 60.0, 224), ("b", 70.0, 224), ("c", 80.0, 96)):
        write_knn(write_run(tmp_path / name), top1, image_size=size, top5_is="top3")
    alike = rows_of(tmp_path / "a", tmp_path / "b")
    assert alike["k-NN", "network, 20-NN, top-1, %"].best == {1}
    assert ("k-NN", "network, 20-NN, top-3, %") in alike
    assert not [label for section, label in alike if section == "k-NN" and "size" in label]
    other = rows_of(tmp_path / "a", tmp_path / "c")
    assert other["k-NN", "network, 20-NN, top-1, %"].values == [60.0, 80.0]
    assert other["k-NN", "network, 20-NN, top-1, %"].best == set()
    assert other["k-NN", "image size in pixels"].values == [224, 96]


def test_results_of_subfolders(tmp_path: Path) -> None:
    """One file of an evaluation is compared wherever it is, several by their folders."""
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    for folder, top1 in ((a, 10.0), (b / "probe", 20.0)):
        folder.mkdir(exist_ok=True)
        write_knn(folder, top1)
    assert rows_of(a, b)["k-NN", "network, 20-NN, top-1, %"].values == [10.0, 20.0]
    (b / "half").mkdir()
    write_knn(b / "half", 30.0)
    rows = rows_of(a, b)
    found = {section: row.values for (section, label), row in rows.items() if label == "network, 20-NN, top-1, %"}
    assert found == {"k-NN": [10.0, None], "k-NN (half)": [None, 30.0], "k-NN (probe)": [None, 20.0]}


def test_what_is_no_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [1.0])
    (tmp_path / "only" / "results").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"only is not .* run.json, .* log.txt .* results/"):
        open_runs([str(run), str(tmp_path / "only")])
    write_knn(tmp_path / "only", 50.0)
    assert [each.name for each in open_runs([str(run), str(tmp_path / "only")])] == ["run", "only"]
    (tmp_path / "link").symlink_to(run)
    with pytest.raises(UsageError, match="link is given twice"):
        open_runs([str(run), str(tmp_path / "link")])


def test_names(tmp_path: Path) -> None:
    paths = [str(write_run(tmp_path / name)) for name in ("x/run", "y/run", "y/other")]
    assert [run.name for run in open_runs(paths)] == ["x/run", "y/run", "y/other"]
    assert [run.name for run in open_runs(paths, ["1", "2", "3"])] == ["1", "2", "3"]
    for names in (["1", "2"], ["1", "2", "2"]):
        with pytest.raises(UsageError, match="--names 1 2"):
            open_runs(paths, names)


# --------------------------------------------------------------------------- tables

WORDS = "a rather long label that needs several lines | and a bar"
ROWS = [
    Row("Settings", "lr", [0.1, 1e-05, None, "words " * 9]),
    Row("Settings", "path", ["/a/" + "b" * 70, "", [1, 2], True]),
    Row("Scores", WORDS, [1.0, 22.25, None, float("nan")], ".2f", 1),
]
NAMES = ["a", "a run with quite a long name", "c|d", "<d>"]


@pytest.mark.parametrize("width", [40, 80, 200])
def test_text_fits_and_says_everything(width: int) -> None:
    text = tables.as_text(NAMES, ROWS, width)
    assert max(map(len, text.splitlines())) <= width
    assert "22.25*" in text
    for value in ("0.1", "1e-05", "[1, 2]", "true", "1.00", "nan"):
        assert re.search(rf"(?<!\S){re.escape(value)}(?!\S)", text), value
    assert sum(line.count("b") for line in text.splitlines() if "bbb" in line) >= 70  # long words are broken, not cut
    assert text.count("words") == 9
    parts = text.split("\n\n\n")
    assert len(parts) == {40: 4, 80: 2, 200: 1}[width]


def test_markdown() -> None:
    lines = tables.as_markdown(NAMES, ROWS).splitlines()
    cells = [re.split(r"(?<!\\)\|", line) for line in lines]
    assert {len(row) for row in cells} == {len(NAMES) + 3}
    assert lines[0].endswith("| a run with quite a long name | c\\|d | \\<d> |")
    assert [cell.strip() for cell in cells[-1][2:-1]] == ["1.00", "**22.25**", "-", "nan"]


def test_csv_has_full_precision() -> None:
    row = Row("s", "x", [1 / 3, 2.0], ".2f", 1)
    read = list(csv.DictReader(io.StringIO(tables.as_csv(["a", "b"], [row, Row("s", "y", [[1, 2], None])]))))
    assert read == [
        {"section": "s", "row": "x", "a": repr(1 / 3), "b": "2.0", "best": "b"},
        {"section": "s", "row": "y", "a": "[1, 2]", "b": "", "best": ""},
    ]


# --------------------------------------------------------------------------- files


def test_curves_look_the_same_in_every_plot() -> None:
    """More runs than colors; a run that a plot lacks does not shift the others."""
    names = [f"run {number}" for number in range(20)]
    loss = {name: [(0.0, 1.0), (1.0, float(i))] for i, name in enumerate(names)}
    rate = {name: [(0.0, 2.0)] for name in names[3:]}
    first, second = plots.curve_grid({"Loss": loss, "Learning rate": rate}).axes
    looks = [(line.get_color(), line.get_linestyle()) for line in first.lines]
    assert len(set(looks)) == 20
    assert [(line.get_color(), line.get_linestyle()) for line in second.lines] == looks[3:]
    assert [np.asarray(line.get_ydata()).tolist() for line in first.lines] == [[1.0, float(i)] for i in range(20)]


def compare(*words: object) -> None:
    compare_runs.main(compare_runs.get_args_parser().parse_args([*map(str, words)]))


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Written again only when a run has gone on, and the previous ones are kept."""
    monkeypatch.setenv("COLUMNS", "80")
    a, b, out = write_run(tmp_path / "a", [1.0]), write_run(tmp_path / "b", [2.0]), tmp_path / "out"
    write_knn(a, 61.25)
    compare(a, b, "--output_dir", out)
    assert "61.25" in capsys.readouterr().out
    names = {"table.md", "table.csv", "curves.png", "comparison.html"}
    assert {path.name for path in out.iterdir()} == names
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    compare(a, b, "--output_dir", out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    write_run(a, [1.0, 0.5])
    compare(a, b, "--output_dir", out)
    for name in names:
        assert (out / f"{name}.bak").read_bytes() == before[name] != (out / name).read_bytes()
    with Image.open(out / "curves.png") as picture:
        picture.load()
    page = (out / "comparison.html").read_text(encoding="utf-8")
    assert page.count("data:image/svg+xml;base64,") == 1
    assert "://" not in page
    assert report.POLICY in page
    assert "61.25" in page


def test_runs_of_main_esvit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    images = write_images(tmp_path / "images", 4)
    train(tmp_path / "one", images, "--epochs", "1", "--lr", "0.02")
    train(tmp_path / "two", images, "--use_dense_prediction", "off")
    capsys.readouterr()
    compare(tmp_path / "one", tmp_path / "two", "--output_dir", tmp_path / "out")
    rows = {row["row"]: row for row in csv.DictReader((tmp_path / "out" / "table.csv").open())}
    settings = {name for name, row in rows.items() if row["section"] == "Settings that differ"}
    assert settings == {"use_dense_prediction", "epochs", "lr"}
    assert [(rows[name]["one"], rows[name]["two"]) for name in ("epochs", "lr")] == [("1", "2"), ("0.02", "0.01")]
    last = json.loads((tmp_path / "two" / "log.txt").read_text().splitlines()[-1])
    assert float(rows["loss, last"]["two"]) == last["train_loss"]
    curves = build_curves(open_runs([str(tmp_path / "one"), str(tmp_path / "two")]))
    assert list(curves["Effective rank of the features: regions"]) == ["one"]
    assert [len(points) for points in curves["Entropy of the teacher, nats: views"].values()] == [1, 2]


def test_nothing_to_compare(tmp_path: Path) -> None:
    """Result files without a number are those of runs, but no row is left."""
    for name in ("a", "b"):
        (tmp_path / name / "results").mkdir(parents=True)
        (tmp_path / name / "results" / "x.json").write_text('{"scores": {"row": {"note": "text"}}}')
    with pytest.raises(UsageError, match=r"a, b have no epoch and no score"):
        compare(tmp_path / "a", tmp_path / "b")
