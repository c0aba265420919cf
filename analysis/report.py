"""One HTML page that tells of a run: curves, scores and pictures, all inside the file.

Origin: this project's own.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from analysis.draw import nice_step
from analysis.files import newest, read_json

CURVES = {  # title of a chart -> keys of log.txt, and what they are called
    "Loss": {"train_loss": "loss", "train_view_loss": "views", "train_region_loss": "regions"},
    "Learning rate": {"train_lr": "learning rate"},
    "Weight decay": {"train_wd": "weight decay"},
    "Images per second": {"images_per_s": "images/s"},
}
SCORES = {  # heading -> file of the run's folder, as the evaluations name them
    "k-NN": "knn.json",
    "Linear probe": "results.json",
    "Correspondence under a flip": "correspondence.json",
    "Correspondence in a stereo pair": "stereo.json",
}
DETAILS = ("run", "best", "per_class")  # of a score file, that are too long for a page or repeat its table
COLOURS = ("#2563a8", "#d65a28", "#3c8d40", "#8a4fa3")
STYLE = """
body { font: 16px/1.5 sans-serif; color: #1e1e1e; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
h1, h2, h3 { line-height: 1.2; } h2 { border-bottom: 1px solid #ccc; margin-top: 2em; }
table { border-collapse: collapse; margin: 1em 0; } th, td { padding: .25em .9em; border-bottom: 1px solid #ddd;
  text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1em 0; } figcaption { color: #555; }
img, svg { max-width: 100%; height: auto; }
svg text { font: 12px sans-serif; }
.charts { display: flex; flex-wrap: wrap; gap: 1em; }
"""

Points = Sequence[tuple[float, float]]


class Figure(NamedTuple):
    """A picture and what it shows."""

    image: Image.Image
    caption: str


# --------------------------------------------------------------------------- what a run's folder holds


def read_log(path: Path) -> list[dict[str, Any]]:
    """The epochs of a `log.txt`; lines that are not whole are left out, an epoch that comes again replaces the former."""
    epochs: dict[Any, dict[str, Any]] = {}
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("epoch"), int):
            epochs[record["epoch"]] = record
    return [epochs[epoch] for epoch in sorted(epochs)]


def scores(run_dir: Path, output_dir: Path) -> Iterator[tuple[str, Any]]:
    """Headings and records: the last ones of `output_dir`, of `run_dir` and of each folder in that, a file once."""
    for heading, file in SCORES.items():
        places = [output_dir, run_dir, *sorted(path.parent for path in run_dir.glob(f"*/{file}"))]
        found = {path.resolve(): read_json(path) for path in (newest(place / file) for place in places) if path}
        found = {path: record for path, record in found.items() if isinstance(record, dict) and record}
        for path, record in found.items():
            told = str(record.pop("evaluation", ""))
            where = f" ({path.parent.name})" if len(found) > 1 else ""
            yield (told[:1].upper() + told[1:] or heading) + where, record


def rows_of(record: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """A nested record as rows: the way to every innermost dictionary, and its plain values."""
    if isinstance(record, list):
        record = {str(number): value for number, value in enumerate(record, start=1)}
    if not isinstance(record, dict):
        return
    record = {key: value for key, value in record.items() if key not in DETAILS}
    nested = {key: value for key, value in record.items() if isinstance(value, dict) or _is_list_of_rows(value)}
    plain = {key: _plain(value) for key, value in record.items() if key not in nested}
    if plain:
        yield " / ".join(path), plain
    for key, value in nested.items():
        yield from rows_of(value, (*path, str(key)))


def _is_list_of_rows(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)


def _plain(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


# --------------------------------------------------------------------------- parts of the page


def line_chart(title: str, series: Mapping[str, Points], width: int = 500, height: int = 260) -> str:
    """Curves over epochs as SVG."""
    values = [y for points in series.values() for _, y in points]
    epochs = [x for points in series.values() for x, _ in points]
    low, high = min(0.0, *values), max(values)
    step = nice_step(max(high - low, 1e-12))
    low, high = _floor(low / step) * step, max(-_floor(-high / step), _floor(low / step) + 1) * step
    first, last = min(epochs), max(*epochs, min(epochs) + 1)
    left, right, top, bottom = 64, width - 12, 16, height - 36

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (x - first) / (last - first) * (right - left), bottom - (y - low) / (high - low) * (bottom - top)

    parts = []
    for number in range(round((high - low) / step) + 1):
        y = at(first, low + number * step)[1]
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{low + number * step:.6g}</text>')
    for x in sorted({first, last, (first + last) // 2}):
        parts.append(f'<text x="{at(x, low)[0]:.1f}" y="{bottom + 16}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<text x="{(left + right) / 2}" y="{height - 4}" text-anchor="middle">epoch</text>')
    for number, (name, points) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        spots = [at(x, y) for x, y in points]
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        parts.append(f'<polyline points="{corners}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in spots]
        if len(series) > 1:
            label = html.escape(name)
            parts.append(f'<text x="{left + 10 + 90 * number}" y="{bottom - 8}" fill="{colour}">{label}</text>')
    drawing = "".join(parts)
    caption = f"<figcaption>{html.escape(title)}</figcaption>"
    return f'<figure>{caption}<svg viewBox="0 0 {width} {height}" width="{width}" role="img">{drawing}</svg></figure>'


def _floor(value: float) -> int:
    return int(value // 1)


def curves(log: Sequence[Mapping[str, Any]]) -> str:
    """The charts of a log, those that it has numbers for."""
    charts = []
    for title, keys in CURVES.items():
        series = {
            name: [(epoch["epoch"], float(epoch[key])) for epoch in log if isinstance(epoch.get(key), int | float)]
            for key, name in keys.items()
        }
        series = {name: [p for p in points if abs(p[1]) < float("inf")] for name, points in series.items()}
        series = {name: points for name, points in series.items() if points}
        if series:
            charts.append(line_chart(title, series))
    return f'<div class="charts">{"".join(charts)}</div>'


def table(record: Any) -> str:
    """A record of scores, a row for each of its innermost dictionaries; what holds for all rows stands above."""
    rows = list(rows_of(record))
    about = ""
    if len(rows) > 1 and not rows[0][0]:
        about = "<p>" + html.escape("; ".join(f"{key}: {value}" for key, value in rows.pop(0)[1].items())) + "</p>"
    columns = list(dict.fromkeys(key for _, values in rows for key in values))
    named = any(path for path, _ in rows)
    head = "".join(f"<th>{html.escape(str(column))}</th>" for column in ([""] if named else []) + columns)
    body = []
    for path, values in rows:
        cells = [f"<td>{html.escape(path)}</td>"] if named else []
        cells += [_cell(values.get(column)) for column in columns]
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f"{about}<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _cell(value: Any) -> str:
    if value is None:
        return "<td></td>"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"<td>{html.escape(str(value))}</td>"
    text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) and abs(value) >= 0.1 else f"{value:.6g}"
    return f'<td class="number">{text}</td>'


def inlined(figure: Figure) -> str:
    """A picture as part of the page."""
    stream = io.BytesIO()
    figure.image.save(stream, "PNG", optimize=True)
    source = base64.b64encode(stream.getvalue()).decode()
    caption = html.escape(figure.caption)
    size = f'width="{figure.image.width}" height="{figure.image.height}"'
    return (
        f'<figure><img src="data:image/png;base64,{source}" {size} alt="{caption}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


# --------------------------------------------------------------------------- the page


def build_report(
    title: str, facts: Mapping[str, str], run_dir: Path, output_dir: Path, figures: Mapping[str, Sequence[Figure]]
) -> str:
    """The page: facts, training curves, scores of the folders, then the figures under their headings.

    A part that has nothing to show is left out.
    """
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in facts.items())
    parts = [f"<h1>{html.escape(title)}</h1>", f"<table><tbody>{rows}</tbody></table>"]
    log = read_log(run_dir / "log.txt")
    if log:
        parts.append(_section("Training", curves(log)))
    for heading, record in scores(run_dir, output_dir):
        parts.append(_section(heading, table(record)))
    for heading, drawn in figures.items():
        if drawn:
            parts.append(_section(heading, "".join(map(inlined, drawn))))
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _section(heading: str, content: str) -> str:
    return f"<section><h2>{html.escape(heading)}</h2>{content}</section>"
