"""utils.py: counts with nouns, and memory kept by glibc."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from utils import counted

FAULTS = """
import resource, sys
import torch, utils
if sys.argv[1] == "keep":
    utils.keep_freed_memory()
for _ in range(10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(2**24).fill_(1.0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_reused() -> None:
    """A tensor of 64 MiB causes hardly any page faults, except the first few; by default every tensor faults on each page."""
    root = Path(__file__).parents[2]
    faults = {}
    for way in ("keep", "default"):
        command = [sys.executable, "-c", FAULTS, way]
        faults[way] = int(subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout)
    pages = 2**26 // resource.getpagesize()
    assert faults["keep"] < pages / 100 < faults["default"]


def test_counted() -> None:
    assert [counted(count, "image") for count in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
    assert [counted(count, "batch", "batches") for count in (1, 21)] == ["1 batch", "21 batches"]
