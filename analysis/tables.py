"""Tables with a column for each run: for a terminal, as Markdown, CSV and HTML."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

FEWEST_CHARACTERS, MOST_CHARACTERS = 14, 22  # of a column in a terminal, if it needs them; longer texts are wrapped
GAP = "  "
HIGHER, LOWER = r"top\d|acc|iou|within", r"error|distance|loss"  # entries of scores
LEGEND = "best value of the row; of scores only where data and protocol are the same"


def better(key: str) -> int:
    """Return 1 if high values of an entry of scores are better, -1 if low ones are, 0 if neither."""
    return 1 if re.search(HIGHER, key) else -1 if re.search(LOWER, key) else 0


class Row(NamedTuple):
    """A value of each run; None where a run has none."""

    section: str
    label: str
    values: Sequence[Any]
    form: str = ""  # of numbers, as for `format`; `time` for seconds
    better: int = 0  # 1 if high values are, -1 if low ones are, 0 if neither

    @property
    def best(self) -> set[int]:
        """Positions of the best values, also of those that look the same; empty if all do."""
        values = {i: v for i, v in enumerate(self.values) if v is not None and math.isfinite(v)} if self.better else {}
        texts = self.texts()
        if len({texts[i] for i in values}) < 2:
            return set()
        winner = max(values, key=lambda i: self.better * values[i])
        return {i for i in values if texts[i] == texts[winner]}

    def texts(self) -> list[str]:
        """Return the values as text."""
        return [_text(value, self.form) for value in self.values]


def _text(value: Any, form: str) -> str:
    if value is None:
        return "-"
    if form == "time":
        minutes, seconds = divmod(round(value), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
    if form and isinstance(value, int | float):
        return format(value, form)
    return value if isinstance(value, str) and value else json.dumps(value, default=str)


def as_text(names: Sequence[str], rows: Sequence[Row], width: int) -> str:
    """Return a table of at most `width` (at least 40) characters, if necessary in several parts with some of the runs each."""
    width = max(width, 40)
    cells = [[f"{text}{'*' if i in row.best else ' '}" for i, text in enumerate(row.texts())] for row in rows]
    label_width = min(max(len(row.label) + 2 for row in rows), max(20, width * 2 // 5))
    available = width - label_width
    parts = math.ceil(len(names) / max(1, available // (FEWEST_CHARACTERS + len(GAP))))
    columns = math.ceil(len(names) / parts)
    most = min(MOST_CHARACTERS, available // columns - len(GAP))
    widths = [min(most, max(map(len, [f"{name} ", *column]))) for name, *column in zip(names, *cells)]
    blocks = []
    for first in range(0, len(names), columns):
        part = slice(first, first + columns)
        lines = [*_wrapped("", [f"{name} " for name in names[part]], label_width, widths[part])]
        for section, group in groupby(zip(rows, cells), key=lambda pair: pair[0].section):
            lines += ["", *textwrap.wrap(section, width)]
            for row, texts in group:
                lines += _wrapped(row.label, texts[part], label_width, widths[part])
        blocks.append("\n".join(line.rstrip() for line in lines))
    legend = ["", *textwrap.wrap(f"* {LEGEND}", width)] if any(row.best for row in rows) else []
    return "\n".join(["\n\n\n".join(blocks), *legend])


def _wrapped(label: str, texts: Sequence[str], label_width: int, widths: Sequence[int]) -> Iterator[str]:
    """Yield the lines of a row: labels to the left and indented, values to the right."""
    columns = [textwrap.wrap(label, label_width - 2, subsequent_indent="  ")]
    for text, width in zip(texts, widths):
        marked = text[-1] if text else " "
        columns.append([f"{line}{marked}" for line in textwrap.wrap(text[:-1], width - 1)])
    for number in range(max(map(len, columns))):
        first, *others = (column[number] if number < len(column) else "" for column in columns)
        padded = (f"{GAP}{text:>{width}}" for text, width in zip(others, widths))
        yield f"{'  ' + first:<{label_width}}" + "".join(padded)


def as_markdown(names: Sequence[str], rows: Sequence[Row]) -> str:
    """Return a table whose best values are bold."""
    lines = [["", *map(_escaped, names)], ["---", *("---:" for _ in names)]]
    for section, group in groupby(rows, key=lambda row: row.section):
        lines.append([f"**{_escaped(section)}**", *("" for _ in names)])
        for row in group:
            texts = [_escaped(text) for text in row.texts()]
            lines.append([_escaped(row.label), *(f"**{t}**" if i in row.best else t for i, t in enumerate(texts))])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _escaped(text: str) -> str:
    """Return a text that Markdown shows as it is."""
    return "".join(f"\\{c}" if c in "\\|*_`<[" else c for c in text.replace("\n", " "))


def as_csv(names: Sequence[str], rows: Sequence[Row]) -> str:
    """Return section, label, the values of the runs at full precision, and the names of the best runs."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["section", "row", *names, "best"])
    for row in rows:
        values = [json.dumps(v) if isinstance(v, list | dict) else v for v in row.values]
        writer.writerow([row.section, row.label, *values, "; ".join(names[i] for i in sorted(row.best))])
    return stream.getvalue()


def as_html(names: Sequence[str], rows: Sequence[Row]) -> str:
    """Return a table element whose best values have the class `best`."""
    head = "".join(f'<th class="number">{html.escape(name)}</th>' for name in names)
    body = []
    for section, group in groupby(rows, key=lambda row: row.section):
        body.append(f'<tr class="section"><th colspan="{len(names) + 1}">{html.escape(section)}</th></tr>')
        for row in group:
            cells = "".join(
                f'<td class="number{" best" if i in row.best else ""}">{html.escape(text)}</td>'
                for i, text in enumerate(row.texts())
            )
            body.append(f"<tr><td>{html.escape(row.label)}</td>{cells}</tr>")
    return (
        f'<div class="wide"><table class="runs"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )
