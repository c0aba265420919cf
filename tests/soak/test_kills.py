"""Long kill loops; run them with `pytest -m soak`."""

from __future__ import annotations

import pytest
from helpers.runs import run_script

pytestmark = [pytest.mark.soak, pytest.mark.slow]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("signal", ["KILL", "INT"])
def test_fifty_kills_lose_nothing(processes: int, signal: str) -> None:
    flags = ["--kills", "50", "--processes", str(processes), "--signal", signal]
    result = run_script("tests/soak/kill_loop.py", *flags, timeout=1800)
    assert result.returncode == 0, result.stderr
