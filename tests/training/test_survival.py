"""Runs that are killed, as a scheduler or a power cut does it."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helpers.runs import TINY_RUN, TINY_SWIN, clean_environment, free_port, run_script, start_script, write_images
from helpers.training_runs import LAYOUTS, assert_identical

from checkpoints import serialization
from data import convert

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("kills", "processes"), [(10, 1), (5, 2)])
def test_kills_lose_nothing(kills: int, processes: int) -> None:
    result = run_script("tests/soak/kill_loop.py", "--kills", str(kills), "--processes", str(processes), timeout=900)
    assert result.returncode == 0, result.stderr
    told = re.search(r"(\d+) kills, (\d+) of them while saving; nothing was lost", result.stdout)
    assert told is not None
    assert int(told[1]) == kills


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGHUP, 129), (signal.SIGINT, 130)]
)
def test_signal_ends_a_run_that_is_saved(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """With its loader's workers, to which a terminal sends it too."""
    images = write_images(tmp_path / "images", 9)
    flags = [*TINY_RUN, "--epochs", "500", "--data_path", str(images), "--output_dir", str(tmp_path / "out")]
    flags += ["--num_workers", "1"]
    process = start_script("main_esvit.py", *flags, *TINY_SWIN, env={})
    while not (tmp_path / "out" / "checkpoint.pth").exists():
        assert process.poll() is None
        time.sleep(0.1)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in (process.pid, *map(int, workers)):
        os.kill(child, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert errors.count("the same command continues the run") == 1
    content = serialization.load_file(tmp_path / "out" / "checkpoint.pth")
    assert 0 < content["epoch"] < 500


def test_second_interrupt_ends_at_once_and_the_folder_is_free_again(tmp_path: Path) -> None:
    """Without saving, where the first waits: here for a step that never ends."""
    images = write_images(tmp_path / "images", 9)
    hanging = tmp_path / "hanging.py"
    hanging.write_text(
        "import sys, time\n"
        f"sys.path[:0] = [{str(ROOT)!r}]\n"
        "import main_esvit\n"
        "from distributed import launch\n"
        "from training.step import TrainStep\n"
        "TrainStep.__call__ = lambda *_, **__: (print('hangs', flush=True), time.sleep(600))\n"
        "launch.run_script(lambda: main_esvit.main(main_esvit.get_args_parser().parse_args()))\n"
    )
    flags = [*TINY_RUN, "--data_path", str(images), "--output_dir", str(tmp_path / "out"), "--epochs", "1"]
    process = start_script(str(hanging), *flags, *TINY_SWIN, env={})
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "hangs\n"
    process.send_signal(signal.SIGINT)
    while "Ctrl-C again" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert "Traceback" not in errors
    result = run_script("main_esvit.py", *flags, *TINY_SWIN)
    assert result.returncode == 0, result.stderr
    assert f"process {process.pid} on" in result.stderr


# Process 1 gets a signal in the second of two epochs, once.
STOPPED = """
import os, pathlib, signal, sys
sys.path[:0] = [ROOT]
import main_esvit
from distributed import collectives, launch
from training import checkpointing
votes, marker, asked = checkpointing.Saver.votes, pathlib.Path(MARKER), []
def signalled(self):
    asked.append(1)
    if collectives.get_rank() == 1 and len(asked) == 7 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGUSR1)
    return votes(self)
checkpointing.Saver.votes = signalled
launch.run_script(lambda: main_esvit.main(main_esvit.get_args_parser().parse_args()))
"""


@pytest.mark.parametrize(("layout", "batch"), [("files", 2), ("zip", 2), ("tsv", 2), ("shards", 1)])
def test_signal_to_one_of_two_processes_saves_both(tmp_path: Path, layout: str, batch: int) -> None:
    """Under torchrun, within an epoch: code 0, and the same command ends as a run that was left alone, to the bit."""
    data = write_images(tmp_path / "images", 5 * batch, classes=2)  # five steps an epoch
    if layout != "files":
        words = [str(data), str(tmp_path / layout), "--to", layout, "--shard_images", "4"]
        convert.main(convert.get_args_parser().parse_args(words))
        data = tmp_path / layout
    stopped = tmp_path / "stopped.py"
    stopped.write_text(STOPPED.replace("ROOT", repr(str(ROOT))).replace("MARKER", repr(str(tmp_path / "marker"))))
    flags = [*TINY_RUN, *LAYOUTS[layout], "--data_path", str(data), "--batch_size_per_gpu", str(batch)]
    flags += ["--num_workers", "1", "--use_mixup", "on" if batch == 2 else "off"]
    for run, script in (("parts", str(stopped)), ("parts", "main_esvit.py"), ("whole", "main_esvit.py")):
        result = run_script(script, *flags, "--output_dir", str(tmp_path / run), *TINY_SWIN, processes=2)
        assert result.returncode == 0, result.stderr
        if script == str(stopped):
            assert result.stderr.count("stopped 1 step into epoch 1 and saved in") == 1
            within = serialization.load_file(tmp_path / run / "checkpoint.pth")
            assert (within["epoch"], within["in_epoch"]["steps"], within["in_epoch"]["images"]) == (1, 1, 2 * batch)
    parts, whole = (serialization.load_file(tmp_path / run / "checkpoint.pth") for run in ("parts", "whole"))
    assert whole["epoch"] == 2
    for key in whole.keys() - {"args"}:
        assert_identical(whole[key], parts[key], key)
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")


def test_signal_to_torchrun_saves(tmp_path: Path) -> None:
    """It passes SIGTERM on to its processes and waits for them; its own code is 1 all the same."""
    images = write_images(tmp_path / "images", 16)
    flags = [
        *TINY_RUN,
        "--epochs",
        "5000",
        "--data_path",
        str(images),
        "--output_dir",
        str(tmp_path / "out"),
        *TINY_SWIN,
    ]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    process = subprocess.Popen([sys.executable, *launch, "main_esvit.py", *flags], cwd=ROOT, env=clean_environment(),
                               stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)  # fmt: skip
    while not (tmp_path / "out" / "checkpoint.pth").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 1
    assert errors.count("the same command continues the run") == 1, errors
    assert "SIGKILL" not in errors
    within = serialization.load_file(tmp_path / "out" / "checkpoint.pth")
    assert 0 < within["epoch"] < 5000


def logged(run: Path) -> list[dict[str, float]]:
    """The lines of `log.txt` without times and sizes."""
    measured = {"seconds", "images_per_s", "waiting_share", "peak_memory_mb"}
    lines = [json.loads(line) for line in (run / "log.txt").open()]
    return [{name: value for name, value in line.items() if name not in measured} for line in lines]


def test_same_seed_gives_the_same_log_in_another_process(tmp_path: Path) -> None:
    """Whatever the number of workers; another seed gives another one."""
    images = write_images(tmp_path / "images", 9)
    for run, extra in (("a", ["--num_workers", "2"]), ("b", ["--num_workers", "0"]), ("c", ["--seed", "1"])):
        flags = [
            *TINY_RUN,
            "--use_mixup",
            "on",
            "--data_path",
            str(images),
            "--output_dir",
            str(tmp_path / run),
            *extra,
        ]
        result = run_script("main_esvit.py", *flags, "--", *TINY_SWIN)
        assert result.returncode == 0, result.stderr
    assert len(logged(tmp_path / "a")) == 2
    assert logged(tmp_path / "a") == logged(tmp_path / "b")
    assert logged(tmp_path / "a") != logged(tmp_path / "c")


def test_two_processes_crop_one_picture_differently(tmp_path: Path) -> None:
    """All images are the same one: what differs between views is how they were cut and colored."""
    (picture,) = write_images(tmp_path / "images", 1).iterdir()
    for i in range(1, 8):
        shutil.copy(picture, picture.with_name(f"{i:03}.png"))
    script = tmp_path / "crops.py"
    script.write_text(
        "import pathlib, sys, torch\n"
        f"sys.path[:0] = [{str(ROOT)!r}]\n"
        "import main_esvit\n"
        "from distributed import collectives, launch\n"
        "from training import setup\n"
        "from data.loader import set_epoch\n"
        "from models import load_arch_config\n"
        "def main():\n"
        "    args = main_esvit.get_args_parser().parse_args()\n"
        "    device = launch.init_processes(args)\n"
        "    config = load_arch_config(args.arch, args.cfg, args.opts)\n"
        "    loader = setup.build_loader(args, config, *main_esvit.build_views(args, config), device)\n"
        "    set_epoch(loader, 0)\n"
        "    views = collectives.all_gather_objects([batch.views_on(device) for batch in loader])\n"
        "    torch.save(views, pathlib.Path(args.output_dir) / f'{collectives.get_rank()}.pth')\n"
        "launch.run_script(main)\n"
    )
    seen = []
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        flags = [*TINY_RUN, "--data_path", str(tmp_path / "images"), "--output_dir", str(tmp_path / run)]
        result = run_script(str(script), *flags, *TINY_SWIN, processes=2)
        assert result.returncode == 0, result.stderr
        seen.append(torch.load(tmp_path / run / "0.pth"))
    first, second = ([view for views in batches for view in views] for batches in seen[0])
    assert [len(views) for views in (first, second)] == [4, 4]
    for ours, theirs in zip(first, second):
        assert ours.shape == theirs.shape
        crops = [*ours, *theirs]
        assert not [pair for pair in itertools.combinations(crops, 2) if torch.equal(*pair)]
    again = [view for batches in seen[1] for views in batches for view in views]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip([*first, *second], again, strict=True))


def test_another_number_of_processes_goes_on_at_the_same_images(tmp_path: Path) -> None:
    """Two processes stop within the epoch together; one goes on where they were, and says so."""
    images = write_images(tmp_path / "images", 32)
    flags = [*TINY_RUN, "--data_path", str(images), "--output_dir", str(tmp_path / "out"), "--save_every_steps", "3"]
    # 32 images: 4 steps of 2 x 4; the file after 3 of them stays, as the one before that of the epoch's end.
    result = run_script("main_esvit.py", *flags, "--epochs", "1", *TINY_SWIN, processes=2)
    assert result.returncode == 0, result.stderr
    within = serialization.load_file(tmp_path / "out" / "checkpoint_previous1.pth")
    assert (within["epoch"], within["in_epoch"]["steps"], within["in_epoch"]["images"]) == (0, 3, 24)
    (tmp_path / "out" / "checkpoint_previous1.pth").replace(tmp_path / "out" / "checkpoint.pth")
    result = run_script("main_esvit.py", *flags, "--epochs", "1", *TINY_SWIN)
    assert result.returncode == 0, result.stderr
    assert "24 images of the epoch are done, 6 steps of 4 images now instead of 3" in result.stderr
    assert "saved by 2 processes and continues with 1;" in result.stderr
    assert [json.loads(line)["epoch"] for line in (tmp_path / "out" / "log.txt").open()] == [0]
