"""`results.json`: the scores that an evaluation leaves in its folder, with the evaluation's name so that none overwrites another's.

Origin: this project's own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from analysis.files import newest, read_json, save_json
from utils import UsageError

FILE = "results.json"


def has_other_results(folder: Path, evaluation: str) -> bool:
    """Whether `results.json` is there and not of this evaluation."""
    record = read_json(folder / FILE)
    return (folder / FILE).exists() and not (isinstance(record, dict) and record.get("evaluation") == evaluation)


def refuse_other_results(folder: Path, evaluation: str) -> None:
    """Stop where `results.json` is another evaluation's.

    Raises:
        UsageError: naming the file.
    """
    if has_other_results(folder, evaluation):
        raise UsageError(
            f"{folder / FILE} is of another evaluation and would be overwritten; choose another --output_dir"
        )


def write_results(folder: Path, evaluation: str, record: Mapping[str, Any]) -> None:
    """Write the results of a run, in place of its earlier ones."""
    temporary = folder / f".{FILE}.tmp"
    temporary.write_text(json.dumps({"evaluation": evaluation} | dict(record), indent=2) + "\n")
    os.replace(temporary, folder / FILE)


def add_results(folder: Path, evaluation: str, record: Mapping[str, Any]) -> Path:
    """Write results that belong to no run: under a new number, unless the last ones are the same. Returns the file."""
    whole, last = {"evaluation": evaluation} | dict(record), newest(folder / FILE)
    return last if last is not None and read_json(last) == whole else save_json(whole, folder / FILE)
