"""Result files: numbered names, so that nothing is overwritten, and `results.json`, the scores that an evaluation leaves.

`results.json` holds the evaluation's name, so that none takes another's place.

Origin: this project's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints import files
from checkpoints.files import numbered, numbered_names
from utils import UsageError

FILE = "results.json"


def newest(path: Path) -> Path | None:
    """The last of the `numbered` names."""
    return next(iter(reversed(numbered(path))), None)


def write_new(path: Path, write: Callable[[Path], object]) -> Path:
    """Let `write` write a file under the first of a path's names that does not exist, also of those that appear meanwhile.

    Returns:
        that name.

    Raises:
        OSError: the disk refuses; then nothing is left there.
    """
    return files.write_new(numbered_names(path), write)


def save_json(record: Mapping[str, Any], path: Path) -> Path:
    """Write JSON as `write_new` does."""
    text = json.dumps(record, indent=2) + "\n"
    return write_new(path, lambda place: place.write_text(text))


def read_json(path: Path | None) -> Any:
    """The content of a JSON file; None without a file or where it is damaged."""
    try:
        return None if path is None else files.parse_json(files.read_text(path))
    except ValueError:  # of which a UsageError is one
        return None


# --------------------------------------------------------------------------- results.json


class Written(NamedTuple):
    """A result file, and whether it was written now; else it held the same before."""

    path: Path
    changed: bool

    def __str__(self) -> str:
        return f"wrote {self.path}" if self.changed else f"{self.path} is unchanged: it holds these results already"


def _is_of(path: Path, evaluation: str) -> bool:
    record = read_json(path)
    return isinstance(record, dict) and record.get("evaluation") == evaluation


def has_other_results(folder: Path, evaluation: str) -> bool:
    """Whether `results.json` is there and not of this evaluation."""
    return (folder / FILE).exists() and not _is_of(folder / FILE, evaluation)


def claim_folder(folder: str | Path, evaluation: str) -> Path:
    """Make the folder of --output_dir for an evaluation's results.

    Raises:
        UsageError: it cannot be made or written to, or its `results.json` is another evaluation's.
    """
    place = files.make_output_dir(folder)
    if has_other_results(place, evaluation):
        raise UsageError(
            f"{place / FILE} is of another evaluation and would be overwritten; choose another --output_dir"
        )
    return place


def write_results(folder: Path, evaluation: str, record: Mapping[str, Any]) -> Written:
    """Write the results of a run, in place of its earlier ones; under a new number where another evaluation's came meanwhile."""
    whole = {"evaluation": evaluation} | dict(record)
    path = next(p for p in numbered_names(folder / FILE) if not p.exists() or _is_of(p, evaluation))
    if not path.exists():
        return Written(save_json(whole, path), changed=True)
    if read_json(path) == whole:
        return Written(path, changed=False)
    with files.atomic_write(path) as temporary:
        temporary.write_text(json.dumps(whole, indent=2) + "\n")
    return Written(path, changed=True)


def add_results(folder: Path, evaluation: str, record: Mapping[str, Any]) -> Written:
    """Write results that belong to no run: under a new number, unless the last ones are the same.

    Raises:
        UsageError: the disk refuses, see `files.disk_errors`.
    """
    whole, last = {"evaluation": evaluation} | dict(record), newest(folder / FILE)
    if last is not None and read_json(last) == whole:
        return Written(last, changed=False)
    with files.disk_errors(folder):
        return Written(save_json(whole, folder / FILE), changed=True)
