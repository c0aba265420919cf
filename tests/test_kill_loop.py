"""A run that is killed again and again ends as one that is left alone; see tests/kill_loop.py."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from conftest import ROOT
from runs import clean_environment


@pytest.mark.slow
def test_fifty_kills_lose_nothing() -> None:
    command = [sys.executable, str(ROOT / "tests" / "kill_loop.py"), "--kills", "50"]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    told = re.search(r"(\d+) kills, (\d+) of them while saving; nothing was lost", done.stdout)
    assert told is not None
    assert int(told[1]) == 50
    assert int(told[2]) > 0
