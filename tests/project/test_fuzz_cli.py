"""tools/fuzz_cli.py: failures are told apart from usage errors, and a sample of the cases passes."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT
from helpers.runs import clean_environment

import utils
from config import arguments
from config.ranges import SHARE
from tools import fuzz_cli


def behave(args: argparse.Namespace) -> None:
    """Stand in for a script's `main`: end in each way that a script may, and must not."""
    errors = {
        "refuse": utils.UsageError("it is wrong"),
        "diverge": FloatingPointError("not finite"),
        "lack": MemoryError(),
        "crash": KeyError("x"),
        "interrupt": KeyboardInterrupt(),
    }
    if args.how in errors:
        raise errors[args.how]
    if args.how == "sleep":
        time.sleep(60)
    if args.how == "abort":
        os.abort()
    if args.how == "leave":
        sys.exit(2)  # without a message


def script() -> ModuleType:
    module = ModuleType("behave")

    def get_args_parser() -> argparse.ArgumentParser:
        parser = arguments.Parser("behave.py", "")
        parser.add_argument("--how")
        parser.add_argument("--share", type=SHARE)
        return parser

    module.get_args_parser, module.main = get_args_parser, behave  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize(
    ("word", "end"),
    [
        ("--how=run", "ran"),
        ("--how=refuse", "refused"),
        ("--share=2", "refused"),
        ("--how=lack", "refused"),
        ("--how=diverge", "diverged"),
        ("--how=sleep", "stopped"),
        ("--how=crash", "failed"),
        ("--how=interrupt", "failed"),
        ("--how=abort", "failed"),
        ("--how=leave", "failed"),
    ],
)
def test_how_a_case_ends(word: str, end: str, tmp_path: Path) -> None:
    assert fuzz_cli.run_case(fuzz_cli.Case(script(), (word,)), 0.5 if end == "stopped" else 20, tmp_path)[0] == end


def test_sample_of_cases_passes() -> None:
    command = [sys.executable, "-m", "tools.fuzz_cli", "--share", "0.004", "--seed", "1", "--seconds", "30"]
    done = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {end: int(count) for count, end in re.findall(r"(\d+) (ran|refused)", done.stdout)}
    assert counts["refused"] > 10
    assert counts["ran"] > 0
