"""The files of a training run: `log.txt`, `run.json` and result files, which can be read while the run is in progress."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from checkpoints.files import numbered, parse_json, read_text
from evaluation.results import FOLDER
from utils import UsageError, logger


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the epochs of a `log.txt`, without incomplete lines; the last line of an epoch counts."""
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
    """Return the text of a file; empty, with a warning, if it cannot be read."""
    try:
        return read_text(path, "it is omitted", errors="replace") if path.is_file() else ""
    except UsageError as error:
        logger.warning("%s", error)
        return ""


def read_json(path: Path) -> dict[str, Any]:
    """Return the dictionary in a JSON file; empty if there is none."""
    try:
        content = parse_json(read_text(path)) if path.is_file() else {}
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def starts(run_dir: Path) -> list[dict[str, Any]]:
    """Return the content of `run.json`, `run_2.json`, ..., one for each start of a run."""
    return [record for path in numbered(run_dir / "run.json") if (record := read_json(path))]


def subfolders(run_dir: Path) -> list[Path]:
    """Return the folder of a run and the folders in it, where evaluations write their results."""
    return [run_dir, *sorted(run_dir.glob("*/"))]


def result_files(folders: Iterable[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield path and content of the result files of each folder that have scores."""
    for folder in {path.resolve(): path for path in folders}.values():
        if (folder / "results.json").exists():
            logger.warning("%s is of an earlier version and not shown; evaluate again", folder / "results.json")
        for path in sorted((folder / FOLDER).glob("*.json")):
            record = read_json(path)
            if record.get("scores"):
                yield path, record
