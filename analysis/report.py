"""Report on a run as one HTML page: curves, scores and pictures, all embedded.

Its Content-Security-Policy forbids every request, so the page looks the same offline.
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
from analysis.run_files import read_log, result_files, starts, subfolders
from data.decode import open_image
from utils import logger

CURVES = {  # title of a plot -> keys of log.txt, and what they are called
    "Loss": {"train_loss": "loss", "train_view_loss": "views", "train_region_loss": "regions"},
    "Learning rate": {"train_lr": "learning rate"},
    "Weight decay": {"train_wd": "weight decay"},
    "Images per second": {"images_per_s": "images/s"},
}
HEADINGS = {  # by evaluation; also the order of the sections
    "knn": "k-NN",
    "linear": "Linear probe",
    "finetune": "Fine-tuning",
    "logistic": "Logistic regression",
    "correspondence": "Correspondence under a flip",
    "stereo": "Correspondence in a stereo pair",
}
OMITTED = ("digest", "digest_of_list", "per_class")  # entries of result files that are too long for a page
LABELS = {  # of entries of result files that are not clear by their key
    "pretrained_weights": "weights",
    "token": "class token",
    "data_path": "data",
    "image_size": "image size in pixels",
    "crop_ratio": "center crop",
    "name": "protocol",
    "epoch": "epoch (from 0)",
    "top1": "top-1, %",
    "top5": "top-5, %",
    "last_top1": "last top-1, %",
    "last_top5": "last top-5, %",
    "lr": "learning rate",
    "n_last_blocks": "last blocks",
    "within_one": "within one region, %",
    "median_error": "median error, pixels",
    "accuracy": "at the true position, %",
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
    """A picture of the page and its caption."""

    content: bytes
    media_type: str
    size: tuple[int, int]  # width and height on a page that is wide enough
    caption: str


class Section(NamedTuple):
    """A section of the page."""

    heading: str
    words: str
    figures: Sequence[Figure]


def photo(image: Image.Image, caption: str) -> Figure:
    """Return an image as a JPEG."""
    stream = io.BytesIO()
    image.convert("RGB").save(stream, "JPEG", quality=88, subsampling=0)
    return Figure(stream.getvalue(), "image/jpeg", image.size, caption)


def plot(figure: MatplotlibFigure, caption: str) -> Figure:
    """Return a plot as an SVG."""
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    return Figure(plots.as_svg(figure), "image/svg+xml", (width, height), caption)


# --------------------------------------------------------------------------- the folder of a run


def curves(log: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Return the plots that a log has values for."""
    drawn = []
    for title, keys in CURVES.items():
        series = {
            name: [(epoch["epoch"], float(epoch[key])) for epoch in log if isinstance(epoch.get(key), int | float)]
            for key, name in keys.items()
        }
        series = {name: [p for p in points if abs(p[1]) < float("inf")] for name, points in series.items()}
        series = {name: points for name, points in series.items() if points}
        if series:
            caption = "; ".join(f"{name} {_ends([value for _, value in points])}" for name, points in series.items())
            drawn.append(plot(plots.curve_plot(title, series), caption))
    return drawn


def _ends(values: Sequence[float]) -> str:
    """Return the first and the last value of a curve."""
    return " to ".join(f"{value:.4g}" for value in (values if len(values) == 1 else (values[0], values[-1])))


def crops(run_dir: Path) -> list[Figure]:
    """Return the picture of augmented views of a training run; none, with a warning, if it cannot be read."""
    path = run_dir / "crops.png"
    if not path.is_file():
        return []
    try:
        with open_image(path) as image:
            return [Figure(path.read_bytes(), "image/png", image.size, "augmented views of the training")]
    except Exception as error:  # decoders raise errors of any type on damaged files
        logger.warning("%s cannot be read (%s); the report omits it", path, error)
        return []


def run_facts(run_dir: Path) -> dict[str, str]:
    """Return how a run was made; values that differ between its starts are listed in order."""
    facts: dict[str, list[str]] = {}
    for record in starts(run_dir):
        packages = record.get("packages")
        values = {
            "started": record.get("started"),
            "revision": record.get("git"),
            "seed": record.get("seed"),
            "processes": record.get("world_size"),
            "PyTorch": packages.get("torch") if isinstance(packages, dict) else None,
        }
        for name, value in values.items():
            if value is not None and str(value) not in facts.setdefault(name, []):
                facts[name].append(str(value))
    return {name: ", then ".join(values) for name, values in facts.items() if values}


def commands(run_dir: Path) -> list[str]:
    """Return the commands of the starts of a run without consecutive duplicates, one flag on a line."""
    words = [record["command"] for record in starts(run_dir) if isinstance(record.get("command"), list)]
    lines = [shlex.join(["python", *map(str, each)]).replace(" --", " \\\n    --") for each in words]
    return [line for line, _ in groupby(lines)]


def scores(run_dir: Path, output_dir: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield headings and contents of the result files of `output_dir`, of `run_dir` and of the folders in `run_dir`.

    The name of the folder is appended to a heading that occurs again.
    """
    order = [*HEADINGS]
    found = result_files([output_dir, *subfolders(run_dir)])
    used = set()
    for path, record in sorted(
        found, key=lambda each: order.index(each[0].stem) if each[0].stem in order else len(order)
    ):
        heading = HEADINGS.get(path.stem, path.stem)
        yield f"{heading} ({path.parent.parent.name})" if heading in used else heading, record
        used.add(heading)


# --------------------------------------------------------------------------- elements of the page


def table(record: Mapping[str, Any]) -> str:
    """Return the content of a result file as a table of its scores, below a paragraph with its other entries."""
    network, described, protocol, rows = (
        _dictionary(record.get(part)) for part in ("network", "data", "protocol", "scores")
    )
    top5 = str(protocol.pop("top5_is", "top5"))
    facts = {
        _label(key, top5): _text(value, "d" if isinstance(value, int) else ".6g")
        for key, value in (network | described | protocol).items()
    }
    about = html.escape("; ".join(f"{label}: {text}" for label, text in facts.items() if text))
    rows = {name: _dictionary(row) for name, row in rows.items()}
    columns = {key: _texts([row.get(key) for row in rows.values()]) for row in rows.values() for key in row}
    head = "".join(f"<th{number}>{html.escape(_label(key, top5))}</th>" for key, (number, _) in columns.items())
    body = []
    for position, name in enumerate(rows):
        cells = "".join(f"<td{number}>{html.escape(texts[position])}</td>" for number, texts in columns.values())
        body.append(f"<tr><td>{html.escape(name)}</td>{cells}</tr>")
    return (
        f'<p>{about}</p><div class="wide"><table><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _dictionary(value: Any) -> dict[str, Any]:
    return {key: entry for key, entry in value.items() if key not in OMITTED} if isinstance(value, dict) else {}


def _label(key: str, top5: str) -> str:
    return LABELS.get(key, key.replace("_", " ")).replace("top-5", top5.replace("top", "top-"))


def _texts(values: Sequence[Any]) -> tuple[str, list[str]]:
    """Return the class attribute and the cells of a column; its numbers have two decimals unless some are very small."""
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    whole = all(isinstance(v, int) for v in numbers)
    small = any(0 < abs(v) < 0.1 for v in numbers)
    form = "d" if whole else ".6g" if small else ".2f"
    texts = [_text(value, form) for value in values]
    return (' class="number"' if numbers else ""), texts


def _text(value: Any, form: str) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return {None: "", True: "yes", False: "no"}.get(value, str(value))
    return format(value, form)


def inlined(figure: Figure) -> str:
    """Return the element of an embedded picture."""
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
    """Return pictures in rows of equal length, for a page of full width."""
    most = max(1, (WIDTH + GAP) // (max(figure.size[0] for figure in figures) + GAP))
    rows = (f'<div class="figures">{"".join(map(inlined, row))}</div>' for row in draw.even_rows(figures, most))
    return "".join(rows)


# --------------------------------------------------------------------------- the page


def build_report(
    title: str, facts: Mapping[str, str], run_dir: Path, output_dir: Path, sections: Sequence[Section]
) -> str:
    """Return the page: facts, training curves, scores, then `sections`; empty parts are omitted."""
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in facts.items())
    parts = [f"<h1>{html.escape(title)}</h1>", f'<table class="facts"><tbody>{rows}</tbody></table>']
    if drawn := curves(read_log(run_dir / "log.txt")):
        parts.append(_section("Training", _figures(drawn)))
    if lines := commands(run_dir):
        summary = "command of the run" if len(lines) == 1 else "commands of the run, in the order of its starts"
        text = html.escape("\n\n".join(lines))
        parts.append(f"<details><summary>{summary}</summary><pre>{text}</pre></details>")
    for heading, record in scores(run_dir, output_dir):
        parts.append(_section(heading, table(record)))
    for heading, words, figures in sections:
        parts.append(_section(heading, f"<p>{html.escape(words)}</p>{_figures(figures)}"))
    if drawn := crops(run_dir):
        parts.append(_section("Training images", _figures(drawn)))
    return document(title, parts)


def document(title: str, parts: Sequence[str]) -> str:
    """Return a page of these elements that requests nothing."""
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
    )
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"
