"""Shared by all tests: golden files and how to read them."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.summary.writer import event_file_writer

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"
sys.path.insert(0, str(GOLDEN))  # fill.py: deterministic weights and inputs

# TensorBoard reads files of one second in the order of their numbers, as text: with equally many digits that is theirs.
event_file_writer._global_uid = event_file_writer.AtomicCounter(10**6)

# Whatever started the tests may ignore these (nohup, a job in the background); programs under test then would too.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # the networks are tiny, and several tests run side by side


def python_files() -> list[Path]:
    """Every Python file of the project."""
    made = {"output", "build"}
    found = (path for path in sorted(ROOT.rglob("*.py")) if not made & set(path.relative_to(ROOT).parts))
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)]


def golden_arrays(name: str) -> dict[str, np.ndarray]:
    """The arrays of golden/NAME.npz."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def golden_json(name: str) -> Any:
    """golden/NAME.json."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def relative_error(ours: Any, golden: Any) -> float:
    """Largest absolute difference over the largest absolute golden value; shapes must be equal."""
    a, b = np.asarray(torch.as_tensor(ours).detach()), np.asarray(golden)
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    """Each test starts from the same random state."""
    torch.manual_seed(0)
    np.random.seed(0)
