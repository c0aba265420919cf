"""Runs that are killed, as a scheduler or a power cut does it."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import pytest
import torch.distributed.run
from runs import TINY_RUN, TINY_SWIN, free_port, run_script, start_script, write_images

import checkpoint

pytestmark = pytest.mark.slow


def test_fifty_kills_lose_nothing() -> None:
    result = run_script("tests/kill_loop.py", "--kills", "50", timeout=900)
    assert result.returncode == 0, result.stderr
    told = re.search(r"(\d+) kills, (\d+) of them while saving; nothing was lost", result.stdout)
    assert told is not None
    assert int(told[1]) == 50
    assert int(told[2]) > 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_ends_a_run_with_code_0(tmp_path: Path, number: signal.Signals) -> None:
    images = write_images(tmp_path / "images", 9)
    flags = [*TINY_RUN, "--epochs", "500", "--data_path", str(images), "--output_dir", str(tmp_path / "out")]
    process = start_script("main_esvit.py", *flags, *TINY_SWIN, env={})
    while not (tmp_path / "out" / "checkpoint.pth").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert errors.count("the same command continues the run") == 1
    content = checkpoint.load_file(tmp_path / "out" / "checkpoint.pth")
    assert 0 < content["epoch"] < 500


def test_signal_to_torchrun_saves_the_run(tmp_path: Path) -> None:
    """It passes SIGTERM on, waits for its processes, and ends with its own traceback and code."""
    images = write_images(tmp_path / "images", 16)
    flags = [
        *TINY_RUN,
        "--epochs",
        "500",
        "--data_path",
        str(images),
        "--output_dir",
        str(tmp_path / "out"),
        *TINY_SWIN,
    ]
    launch = [torch.distributed.run.__file__, "--nproc_per_node=2", f"--master_port={free_port()}", "main_esvit.py"]
    process = start_script(*launch, *flags, env={})
    while not (tmp_path / "out" / "checkpoint.pth").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert "got signal: 15" in errors
    stopped = re.search(r"stopped (\d+) steps into epoch (\d+) and saved", errors)
    assert stopped is not None, errors
    content = checkpoint.load_file(tmp_path / "out" / "checkpoint.pth")
    steps = content["in_epoch"]["steps"] if "in_epoch" in content else 0
    assert (steps, content["epoch"] + 1) == (int(stopped[1]), int(stopped[2]))


def test_another_number_of_processes_goes_on_at_the_same_images(tmp_path: Path) -> None:
    """Two processes stop within the epoch together; one goes on where they were, and says so."""
    images = write_images(tmp_path / "images", 32)
    flags = [*TINY_RUN, "--data_path", str(images), "--output_dir", str(tmp_path / "out"), "--save_every_steps", "3"]
    # 32 images: 4 steps of 2 x 4; the file after 3 of them stays, as the one before that of the epoch's end.
    result = run_script("main_esvit.py", *flags, "--epochs", "1", *TINY_SWIN, processes=2)
    assert result.returncode == 0, result.stderr
    within = checkpoint.load_file(tmp_path / "out" / "checkpoint_previous1.pth")
    assert (within["epoch"], within["in_epoch"]["steps"], within["in_epoch"]["images"]) == (0, 3, 24)
    (tmp_path / "out" / "checkpoint_previous1.pth").replace(tmp_path / "out" / "checkpoint.pth")
    result = run_script("main_esvit.py", *flags, "--epochs", "1", *TINY_SWIN)
    assert result.returncode == 0, result.stderr
    assert "24 images of the epoch are seen, which are 6 steps of 4 images now, not 3" in result.stderr
    assert "saved by 2 processes, now there are 1" in result.stderr
    assert [json.loads(line)["epoch"] for line in (tmp_path / "out" / "log.txt").open()] == [0]
