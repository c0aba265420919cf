"""Report on a run as one HTML page: curves, scores and pictures, all embedded.

Its Content-Security-Policy forbids every request, so the page looks the same offline.
"""

from __future__ import annotations

import base64
import html
import io
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure as MatplotlibFigure
from PIL import Image

from analysis import class_scores, draw, plots, tables
from analysis.curves import COLLAPSE, CURVES, draw_curves
from analysis.run_files import read_log, result_files, starts, subfolders
from data.decode import open_image
from evaluation.results import confusion_path
from utils import logger

HEADINGS = {  # by evaluation; also the order of the sections
    "knn": "k-NN",
    "linear": "Linear probe",
    "finetune": "Fine-tuning",
    "logistic": "Logistic regression",
    "segmentation": "Linear segmentation",
    "segmentation_knn": "k-NN segmentation",
    "correspondence": "Correspondence under a flip",
    "stereo": "Correspondence in a stereo pair",
}
OMITTED = ("digest", "digest_of_list", "per_class")  # entries of result files that are not shown in their table
CLASSES, MATRIX = 20, 40  # most classes of a table, of which the lowest are shown, and of a drawn confusion matrix
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
RESUMED = " Dotted lines: here the run was resumed."
COLLAPSE_WORDS = (
    "The outputs collapse if the entropy of the teacher goes to 0 or stays at ln K, if few prototypes are in use, or if the "
    "features lose their standard deviation or their rank."
)
WIDTH, GAP = 1240, 16  # pixels of the page, and between figures
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = f"""
:root {{ color-scheme: light; }} body {{ max-width: {WIDTH}px; }}
.figures {{ display: flex; flex-wrap: wrap; gap: {GAP}px; margin-bottom: {GAP}px; }}
"""
STYLE += """
body { font: 16px/1.5 system-ui, sans-serif; color: #1e1e1e; background: #fff; margin: 0 auto; padding: 1em; }
h1, h2, h3 { line-height: 1.2; } h2 { border-bottom: 1px solid #ccc; margin-top: 2em; padding-bottom: .2em; }
a { color: #2563a8; } nav ul { columns: 18em; column-gap: 2.5em; margin: 1.5em 0; padding-left: 1.2em; }
mark { background: #dcefdc; font-weight: 600; padding: 0 .3em; margin: 0 -.3em; } .note { color: #555; font-size: 14px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .5em 0; }
th, td { padding: .25em .9em; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
th:first-child, td:first-child { padding-left: 0; }
.facts td { overflow-wrap: anywhere; } .number { white-space: nowrap; }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: #f5f5f5; padding: .8em; overflow-x: auto; font-size: 14px; }
figure { margin: 0; max-width: 100%; } figcaption { color: #555; font-size: 14px; }
img { display: block; max-width: 100%; height: auto; }
@media print {
  body, figcaption, .note, pre { font-size: 11px; } .figures { zoom: .7; }
  h2, h3 { break-after: avoid; } figure, tr { break-inside: avoid; } nav { break-after: page; }
  mark { print-color-adjust: exact; } pre { white-space: pre-wrap; overflow-wrap: anywhere; } .wide { overflow: visible; }
}
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
    scale: Figure | None = None  # above the others


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


class History(NamedTuple):
    """The epochs and the starts of a run, preceded by those of the run that it continues."""

    log: list[dict[str, Any]]
    starts: list[dict[str, Any]]

    @property
    def resumed(self) -> list[float]:
        """Epochs that were done when the run was started again, without repetitions."""
        return sorted({_epochs_done(start) for start in self.starts} - {0.0})

    @property
    def prototypes(self) -> int | None:
        """Number of prototypes K, if there are any."""
        args = self.starts[-1].get("args") if self.starts else None
        prototypes = args.get("out_dim") if isinstance(args, dict) else None
        return prototypes if isinstance(prototypes, int) and prototypes > 1 else None


def history(run_dir: Path, until: float = float("inf")) -> History:
    """Return the history of a run `until` so many epochs, with that of the run of --pretrained_weights_ckpt."""
    own = History(
        [epoch for epoch in read_log(run_dir / "log.txt") if epoch["epoch"] < until],
        [start for start in starts(run_dir) if _epochs_done(start) < until],
    )
    first = own.starts[0] if own.starts else {}
    args, begin = first.get("args"), _epochs_done(first)
    continued = args.get("pretrained_weights_ckpt") if isinstance(args, dict) else None
    if not continued or not begin or not Path(continued).is_file():
        return own
    before = history(Path(continued).parent, begin)
    return History(before.log + own.log, before.starts + own.starts)


def _epochs_done(start: Mapping[str, Any]) -> float:
    """Return the epochs before a start; 0 in files of earlier versions, which lack the entry."""
    epochs = start.get("epochs_done")
    return float(epochs) if isinstance(epochs, int | float) else 0.0


def commands(run_starts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the commands of the starts of a run, one flag on a line, below when each was given."""
    found: dict[str, list[str]] = {}
    for start in run_starts:
        if isinstance(start.get("command"), list):
            command = shlex.join(["python", *map(str, start["command"])]).replace(" --", " \\\n    --")
            after = f"after {_epochs_done(start):.4g} epochs" if _epochs_done(start) else ""
            when = ", ".join(filter(None, (str(start.get("started", "")), after)))
            found.setdefault(command, []).extend([f"# {when}"] if when else [])
    return ["\n".join([*times, command]) for command, times in found.items()]


def scores(run_dir: Path, output_dir: Path) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """Yield headings, paths and contents of the result files of `output_dir`, of `run_dir` and of the folders in `run_dir`.

    The name of the folder is appended to a heading that occurs again.
    """
    order = [*HEADINGS]
    found = sorted(
        result_files([output_dir, *subfolders(run_dir)]),
        key=lambda each: order.index(each[0].stem) if each[0].stem in order else len(order),
    )
    used = set()
    for path, record in found:
        heading = HEADINGS.get(path.stem, path.stem)
        yield f"{heading} ({path.parent.parent.name})" if heading in used else heading, path, record
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
    values = {key: [row.get(key) for row in rows.values()] for row in rows.values() for key in row}
    columns = {key: (*_texts(column), _best(key, column)) for key, column in values.items()}
    head = "".join(f"<th{number}>{html.escape(_label(key, top5))}</th>" for key, (number, _, _) in columns.items())
    body = []
    for position, name in enumerate(rows):
        cells = [
            f"<td{number}>{'<mark>' * best[position]}{html.escape(texts[position])}{'</mark>' * best[position]}</td>"
            for number, texts, best in columns.values()
        ]
        body.append(f"<tr><td>{html.escape(name)}</td>{''.join(cells)}</tr>")
    marked = any(any(best) for _, _, best in columns.values())
    legend = '<p class="note"><mark>marked</mark>: the best of a column</p>' if marked else ""
    return (
        f'<p>{about}</p><div class="wide"><table><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>{legend}"
    )


def _best(key: str, column: Sequence[Any]) -> list[bool]:
    """Return which scores of a column are the best; none if all are equal."""
    numbers = [value for value in column if isinstance(value, int | float)]
    if not tables.better(key) or len(set(numbers)) < 2:
        return [False] * len(column)
    return [value == max(numbers, key=lambda number: tables.better(key) * number) for value in column]


def classes(path: Path, record: Mapping[str, Any]) -> str:
    """Return the scores of single classes of the best score of a result file, with its confusion matrix; empty without them."""
    name = class_scores.best_score(record["scores"])
    if name is None:
        return ""
    row = record["scores"][name]
    cells = {} if "miou" in row else class_scores.read_confusion(path, name, row["per_class"])  # of images, not pixels
    found = class_scores.class_scores(cells)
    rows = [(score.name, str(score.images), f"{score.top1:.2f}", score.mistakes) for score in found]
    if not rows:
        known = {label: value for label, value in row["per_class"].items() if isinstance(value, int | float)}
        rows = [(label, "", f"{value:.2f}", "") for label, value in sorted(known.items(), key=lambda each: each[1])]
    lines = [
        f'<tr><td>{html.escape(label)}</td><td class="number">{images}</td><td class="number">{top1}</td>'
        f"<td>{html.escape(mistaken)}</td></tr>"
        for label, images, top1, mistaken in rows[:CLASSES]
    ]
    which = (
        f"the {CLASSES} of {len(rows)} classes with the lowest accuracy"
        if len(rows) > CLASSES
        else "lowest accuracy first"
    )
    score_name = "IoU, %" if "miou" in row else "top-1, %"
    heads = (
        f'<th>class</th><th class="number">images</th><th class="number">{score_name}</th><th>most often taken for</th>'
    )
    drawn = ""
    if 1 < len(found) <= MATRIX:
        figure = plots.confusion_plot(*class_scores.matrix(cells))
        drawn = inlined(plot(figure, f"{name}; all matrices: {confusion_path(path).name}"))
    return (
        f'<h3>Classes</h3><p>{html.escape(name)}, {which}.</p><div class="figures"><div class="wide"><table><thead><tr>{heads}'
        f"</tr></thead><tbody>{''.join(lines)}</tbody></table></div>{drawn}</div>"
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
        f'<figure style="width: {width}px"><img src="data:{figure.media_type};base64,{source}" width="{width}" '
        f'height="{height}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
    )


def _figures(figures: Sequence[Figure]) -> str:
    """Return pictures in rows of equal length, for a page of full width."""
    if not figures:
        return ""
    most = max(1, (WIDTH + GAP) // (max(figure.size[0] for figure in figures) + GAP))
    rows = (f'<div class="figures">{"".join(map(inlined, row))}</div>' for row in draw.even_rows(figures, most))
    return "".join(rows)


# --------------------------------------------------------------------------- the page


def build_report(
    title: str, facts: Mapping[str, str], run_dir: Path, output_dir: Path, sections: Sequence[Section]
) -> str:
    """Return the page: facts, contents, training curves, scores, then `sections`; empty parts are omitted."""
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in facts.items())
    content = [each for each in _content(run_dir, output_dir, sections) if each[1]]
    links = "".join(
        f'<li><a href="#section{number}">{html.escape(heading)}</a></li>' for number, (heading, _) in enumerate(content)
    )
    parts = [f"<h1>{html.escape(title)}</h1>", f'<table class="facts"><tbody>{rows}</tbody></table>']
    parts += [f'<nav aria-label="contents"><ul>{links}</ul></nav>'] if links else []
    parts += [
        f'<section id="section{number}"><h2>{html.escape(heading)}</h2>{part}</section>'
        for number, (heading, part) in enumerate(content)
    ]
    return document(title, parts)


def document(title: str, parts: Sequence[str]) -> str:
    """Return a page of these elements that requests nothing."""
    head = (
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
    )
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _content(run_dir: Path, output_dir: Path, sections: Sequence[Section]) -> Iterator[tuple[str, str]]:
    """Yield the headings and contents of all sections; the contents of missing parts are empty."""
    run = history(run_dir)
    yield "Training", _curves(run, CURVES)
    yield "Signs of a collapse", _curves(run, COLLAPSE, COLLAPSE_WORDS)
    for heading, path, record in scores(run_dir, output_dir):
        yield heading, table(record) + classes(path, record)
    for heading, words, figures, scale in sections:
        above = _figures([scale]) if scale else ""
        yield heading, f"<p>{html.escape(words)}</p>{above}{_figures(figures)}"
    yield "Training images", _figures(crops(run_dir))
    lines = commands(run.starts)
    text = html.escape("\n\n".join(lines))
    yield "Commands" if len(lines) > 1 else "Command", f"<pre>{text}</pre>" if text else ""


def _curves(run: History, titles: Mapping[str, Mapping[str, str]], words: str = "") -> str:
    drawn = [plot(*curves) for curves in draw_curves(run.log, titles, run.resumed, run.prototypes)]
    words += RESUMED if run.resumed else ""
    return f"<p>{html.escape(words)}</p>{_figures(drawn)}" if drawn else ""
