"""One HTML page that tells of a run: curves, scores and pictures, all inside the file.

The page forbids itself every request (its Content-Security-Policy), so it looks the same without a network.

Origin: this project's own.
"""

from __future__ import annotations

import base64
import html
import io
import shlex
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure as MatplotlibFigure
from PIL import Image

from analysis import draw, plots
from checkpoints.files import numbered, parse_json, read_text
from data.decode import open_image
from evaluation.results import newest, read_json
from utils import UsageError, logger

CURVES = {  # title of a plot -> keys of log.txt, and what they are called
    "Loss": {"train_loss": "loss", "train_view_loss": "views", "train_region_loss": "regions"},
    "Learning rate": {"train_lr": "learning rate"},
    "Weight decay": {"train_wd": "weight decay"},
    "Images per second": {"images_per_s": "images/s"},
}
SCORES = {  # file of scores -> heading, where the file does not name its evaluation
    "results.json": "Scores",
    "correspondence.json": "Correspondence under a flip",
    "stereo.json": "Correspondence in a stereo pair",
}
HOLDERS = ("scores", "table")  # keys of a score file that only hold its rows
DETAILS = ("run", "best", "per_class")  # of a score file, that are too long for a page or repeat its table
RANKED = ("top5_is", "acc5_is")  # say that "top-5" is the top 3 of three classes: then labels do
LABELS = {  # keys of score files in words
    "arch": "network",
    "network": "best network",
    "pretrained_weights": "weights",
    "checkpoint_key": "network of the checkpoint",
    "token": "class token",
    "data_path": "data",
    "target_list_path": "list of training images",
    "digest_of_list": "digest of the list",
    "train_images": "training images",
    "val_images": "validation images",
    "image_size": "image size in pixels",
    "crop_ratio": "center crop",
    "half": "half precision",
    "train_aug": "augmentation",
    "finetune_head_layer": "layers of the projection head",
    "adjust_lambd": "lambda divided by the number of images",
    "lambd": "lambda",
    "epoch": "epoch (from 0)",
    "finished_epochs": "epochs",
    "top1": "top-1, %",
    "top5": "top-5, %",
    "best_acc1": "best top-1, %",
    "best_acc5": "best top-5, %",
    "best_epoch": "in epoch (from 0)",
    "last_acc1": "last top-1, %",
    "last_acc5": "last top-5, %",
    "lr": "learning rate",
    "n_last_blocks": "last blocks",
    "within_one": "within one region, %",
    "median_error": "median error, pixels",
    "accuracy": "at the true place, %",
    "distance": "mean error, pixels",
}
WIDTH, GAP = 1240, 16  # pixels of the page, and between figures
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = f"""
:root {{ color-scheme: light; }} body {{ max-width: {WIDTH}px; }}
.figures {{ display: flex; flex-wrap: wrap; gap: {GAP}px; margin-bottom: {GAP}px; }}
"""
STYLE += """
body { font: 16px/1.5 system-ui, sans-serif; color: #1e1e1e; background: #fff; margin: 0 auto; padding: 1em; }
h1, h2 { line-height: 1.2; } h2 { border-bottom: 1px solid #ccc; margin-top: 2em; padding-bottom: .2em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .5em 0; }
th, td { padding: .25em .9em; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
th:first-child, td:first-child { padding-left: 0; }
.facts td { overflow-wrap: anywhere; } .number { white-space: nowrap; }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: #f5f5f5; padding: .8em; overflow-x: auto; font-size: 14px; }
details { margin: 1em 0; } summary { cursor: pointer; }
figure { margin: 0; max-width: 100%; } figcaption { color: #555; font-size: 14px; }
img { display: block; max-width: 100%; height: auto; }
"""


class Figure(NamedTuple):
    """A picture as the page holds it, and what it shows."""

    content: bytes
    media_type: str
    size: tuple[int, int]  # width and height on the page, where there is room
    caption: str


class Section(NamedTuple):
    """A part of the page."""

    heading: str
    words: str
    figures: Sequence[Figure]


def photo(image: Image.Image, caption: str) -> Figure:
    """A picture that may be a photograph."""
    stream = io.BytesIO()
    image.convert("RGB").save(stream, "JPEG", quality=88, subsampling=0)
    return Figure(stream.getvalue(), "image/jpeg", image.size, caption)


def plot(figure: MatplotlibFigure, caption: str) -> Figure:
    """A plot, sharp at every size."""
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    return Figure(plots.as_svg(figure), "image/svg+xml", (width, height), caption)


# --------------------------------------------------------------------------- what a run's folder holds


def read_log(path: Path) -> list[dict[str, Any]]:
    """The epochs of a `log.txt`; lines that are not whole are left out, an epoch that comes again replaces the former."""
    epochs: dict[Any, dict[str, Any]] = {}
    for line in _read_text(path).split("\n"):
        try:
            record = parse_json(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("epoch"), int):
            epochs[record["epoch"]] = record
    return [epochs[epoch] for epoch in sorted(epochs)]


def _read_text(path: Path) -> str:
    """The text of a file; empty, and told, where it cannot be read."""
    try:
        return read_text(path, "the report goes without it", errors="replace") if path.is_file() else ""
    except UsageError as error:
        logger.warning("%s", error)
        return ""


def curves(log: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """The plots of a log, those that it has numbers for."""
    drawn = []
    for title, keys in CURVES.items():
        series = {
            name: [(epoch["epoch"], float(epoch[key])) for epoch in log if isinstance(epoch.get(key), int | float)]
            for key, name in keys.items()
        }
        series = {name: [p for p in points if abs(p[1]) < float("inf")] for name, points in series.items()}
        series = {name: points for name, points in series.items() if points}
        if series:
            told = "; ".join(f"{name} {_course([value for _, value in points])}" for name, points in series.items())
            drawn.append(plot(plots.curve_plot(title, series), told))
    return drawn


def _course(values: Sequence[float]) -> str:
    """Where a curve begins and ends."""
    return " to ".join(f"{value:.4g}" for value in (values if len(values) == 1 else (values[0], values[-1])))


def crops(run_dir: Path) -> list[Figure]:
    """The picture of views that a training run leaves behind, if it did; one that cannot be read is told and left out."""
    path = run_dir / "crops.png"
    if not path.is_file():
        return []
    try:
        with open_image(path) as image:
            return [Figure(path.read_bytes(), "image/png", image.size, "augmented views, as training makes them")]
    except Exception as error:  # of any kind, from damaged bytes
        logger.warning("the report goes without %s, which cannot be read (%s)", path, error)
        return []


def starts(run_dir: Path) -> list[dict[str, Any]]:
    """What `run.json`, and `run_2.json` and so on of a continued run, tell of each start."""
    return [record for path in numbered(run_dir / "run.json") if isinstance(record := read_json(path), dict)]


def run_facts(run_dir: Path) -> dict[str, str]:
    """How a run was made; of a continued one all values that its starts had, in their order."""
    facts: dict[str, list[str]] = {}
    for record in starts(run_dir):
        packages = record.get("packages")
        told = {
            "started": record.get("started"),
            "revision": record.get("git"),
            "seed": record.get("seed"),
            "processes": record.get("world_size"),
            "PyTorch": packages.get("torch") if isinstance(packages, dict) else None,
        }
        for name, value in told.items():
            if value is not None and str(value) not in facts.setdefault(name, []):
                facts[name].append(str(value))
    return {name: ", then ".join(values) for name, values in facts.items() if values}


def commands(run_dir: Path) -> list[str]:
    """The commands of a run's starts, those that differ from the one before, each flag on a line of its own."""
    words = [record["command"] for record in starts(run_dir) if isinstance(record.get("command"), list)]
    lines = [shlex.join(["python", *map(str, each)]).replace(" --", " \\\n    --") for each in words]
    return [line for line, _ in groupby(lines)]


def scores(run_dir: Path, output_dir: Path) -> Iterator[tuple[str, Any]]:
    """Headings and records: the last ones of `output_dir`, of `run_dir` and of each folder in that, a file once.

    Where a heading comes again, the folder's name follows it.
    """
    seen = set()
    for file, heading in SCORES.items():
        places = [output_dir, run_dir, *sorted(path.parent for path in run_dir.glob(f"*/{file}"))]
        found = {path.resolve(): read_json(path) for path in (newest(place / file) for place in places) if path}
        for path, record in found.items():
            if not isinstance(record, dict) or not record:
                continue
            told = str(record.pop("evaluation", heading))
            told = told if told == "k-NN" else told[:1].upper() + told[1:]
            yield f"{told} ({path.parent.name})" if told in seen else told, record
            seen.add(told)


def rows_of(record: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """A nested record as rows: the way to every innermost dictionary, and its plain values.

    Keys that are numbers are the k of k-NN.
    """
    if isinstance(record, list):
        record = {f"{number}.": value for number, value in enumerate(record, start=1)}
    if not isinstance(record, dict):
        return
    record = {key: value for key, value in record.items() if key not in DETAILS}
    nested = {key: value for key, value in record.items() if isinstance(value, dict) or _is_list_of_rows(value)}
    plain = {key: _plain(value) for key, value in record.items() if key not in nested}
    if plain:
        yield ", ".join(path), plain
    for key, value in nested.items():
        name = f"k\u00a0=\u00a0{key}" if key.isdigit() else key
        yield from rows_of(value, path if key in HOLDERS else (*path, name))


def _is_list_of_rows(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)


def _plain(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


# --------------------------------------------------------------------------- parts of the page


def table(record: Any) -> str:
    """A record of scores, a row for each of its innermost dictionaries; what holds for all rows stands above, if it is set."""
    top5 = next((record[key] for key in RANKED if record.get(key)), "top5")
    rows = list(rows_of({key: value for key, value in record.items() if key not in RANKED}))
    about = ""
    if len(rows) > 1 and not rows[0][0]:
        facts = rows.pop(0)[1].items()
        told = {_label(key, top5): _text(value, "d" if isinstance(value, int) else ".6g") for key, value in facts}
        about = f"<p>{html.escape('; '.join(f'{label}: {text}' for label, text in told.items() if text))}</p>"
    columns = {key: _texts([values.get(key) for _, values in rows]) for _, values in rows for key in values}
    named = any(path for path, _ in rows)
    head = "<th></th>" if named else ""
    head += "".join(f"<th{number}>{html.escape(_label(key, top5))}</th>" for key, (number, _) in columns.items())
    body = []
    for row, (path, _) in enumerate(rows):
        cells = f"<td>{html.escape(path)}</td>" if named else ""
        cells += "".join(f"<td{number}>{html.escape(texts[row])}</td>" for number, texts in columns.values())
        body.append(f"<tr>{cells}</tr>")
    return f'{about}<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _label(key: str, top5: str) -> str:
    return LABELS.get(key, key.replace("_", " ")).replace("top-5", top5.replace("top", "top-"))


def _texts(values: Sequence[Any]) -> tuple[str, list[str]]:
    """A column's class attribute and cells: figures of one column get as many decimals, unless some are very small."""
    figures = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    whole = all(isinstance(v, int) for v in figures)
    small = any(0 < abs(v) < 0.1 for v in figures)
    form = "d" if whole else ".6g" if small else ".2f"
    texts = [_text(value, form) for value in values]
    return (' class="number"' if figures else ""), texts


def _text(value: Any, form: str) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return {None: "", True: "yes", False: "no"}.get(value, str(value))
    return format(value, form)


def inlined(figure: Figure) -> str:
    """A picture as part of the page."""
    source = base64.b64encode(figure.content).decode()
    caption = html.escape(figure.caption)
    width, height = figure.size
    return (
        f'<figure><img src="data:{figure.media_type};base64,{source}" width="{width}" height="{height}" alt="{caption}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _section(heading: str, content: str) -> str:
    return f"<section><h2>{html.escape(heading)}</h2>{content}</section>"


def _figures(figures: Sequence[Figure]) -> str:
    """In even rows where the page is as wide as it wants to be."""
    most = max(1, (WIDTH + GAP) // (max(figure.size[0] for figure in figures) + GAP))
    rows = (f'<div class="figures">{"".join(map(inlined, row))}</div>' for row in draw.even_rows(figures, most))
    return "".join(rows)


# --------------------------------------------------------------------------- the page


def build_report(
    title: str, facts: Mapping[str, str], run_dir: Path, output_dir: Path, sections: Sequence[Section]
) -> str:
    """The page: facts, training curves, scores of the folders, then the sections.

    A part that has nothing to show is left out.
    """
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in facts.items())
    parts = [f"<h1>{html.escape(title)}</h1>", f'<table class="facts"><tbody>{rows}</tbody></table>']
    if drawn := curves(read_log(run_dir / "log.txt")):
        parts.append(_section("Training", _figures(drawn)))
    if told := commands(run_dir):
        blank_line = "\n\n"
        summary = "command of the run" if len(told) == 1 else "commands of the run, in the order of its starts"
        parts.append(f"<details><summary>{summary}</summary><pre>{html.escape(blank_line.join(told))}</pre></details>")
    for heading, record in scores(run_dir, output_dir):
        parts.append(_section(heading, table(record)))
    for heading, words, figures in sections:
        parts.append(_section(heading, f"<p>{html.escape(words)}</p>{_figures(figures)}"))
    if drawn := crops(run_dir):
        parts.append(_section("What the network was trained on", _figures(drawn)))
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
    )
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"
