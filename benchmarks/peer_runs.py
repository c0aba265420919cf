"""The runs of benchmarks/peers.py: each is a process of its own, whose CPU time is measured."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from torchvision.datasets import ImageFolder

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import lightly_dino
from checkpoints import files
from utils import UsageError

ROOT = Path(__file__).resolve().parent.parent
CALIBRATION_BATCHES = 8  # per epoch, of a run of one epoch and a run of three
TINY = ("--batch", "4", "--max_steps", "2")  # of lightly with --tiny

Figures = dict[str, Any]


def cpu_seconds_of(command: list[str], folder: Path, threads: int) -> float:
    """Run a Python program with its output in `folder`/output.txt, and return the CPU time of it and its children.

    Raises:
        UsageError: It fails.
    """
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
    folder.mkdir(parents=True)
    count = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    output = folder / "output.txt"
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *command], env=os.environ | count, stdout=file, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = (output.read_text(errors="replace").splitlines() or [""])[-1]
        raise UsageError(f"{Path(command[0]).name} ended with code {process.returncode} ({last}); see {output}")
    return usage.ru_utime + usage.ru_stime


def our_command(
    args: argparse.Namespace, data_path: Path, folder: Path, seed: int, epochs: int, *more: str
) -> list[str]:
    """Return the command of main_esvit.py with FLAGS, our own flags, and the KEY VALUE pairs of FLAGS."""
    opts = args.ours.opts
    given = args.flags[: len(args.flags) - len(opts)]
    given = given[:-1] if given[-1:] == ["--"] else given
    own = ["--data_path", str(data_path), "--output_dir", str(folder), "--seed", str(seed), "--epochs", str(epochs)]
    return [str(ROOT / "main_esvit.py"), *given, *own, "--device", "cpu", *more, "--", *opts]


def plan_epochs(args: argparse.Namespace, folder: Path) -> int:
    """Return the number of epochs that fit in --minutes, at least 1: a run of one epoch of a few batches, and one of three."""
    images = [Path(path).resolve() for path, _ in ImageFolder(str(Path(args.data_path) / "train")).samples]
    batch = args.ours.batch_size_per_gpu
    batches = min(CALIBRATION_BATCHES, len(images) // batch)
    if not batches:
        raise UsageError(f"{args.data_path} has {len(images)} training images; lower --batch_size_per_gpu {batch}")
    some = folder.with_name(f"{folder.name}.txt")
    some.write_text("".join(f"{path}\n" for path in images[:: len(images) // (batches * batch)][: batches * batch]))
    no_warmups = ("--warmup_epochs", "0", "--warmup_teacher_temp_epochs", "0")
    one, three = (
        cpu_seconds_of(our_command(args, some, folder, 0, epochs, *no_warmups), folder, args.threads)
        for epochs in (1, 3)
    )
    short_epoch = max(three - one, 1e-3) / 2
    epoch = short_epoch * (len(images) // batch) / batches
    return max(1, int((60 * args.minutes - (one - short_epoch)) / epoch))


def run_ours(args: argparse.Namespace, folder: Path, seed: int, epochs: int) -> Figures:
    """Train this project's recipe; return its figures and the last line of its log."""
    command = our_command(args, Path(args.data_path), folder, seed, epochs)
    seconds = cpu_seconds_of(command, folder, args.threads)
    log = files.parse_json((folder / "log.txt").read_text().splitlines()[-1])
    return {"cpu_seconds": seconds, "epochs": epochs, "diverged": False, "log": log}


def run_lightly(args: argparse.Namespace, folder: Path, seed: int, lr: float, cpu_seconds: float) -> Figures:
    """Train lightly's DINO."""
    command = [lightly_dino.__file__, "--data_path", args.data_path, "--output_dir", str(folder), "--seed", str(seed)]
    command += ["--lr", str(lr), "--cpu_seconds", str(cpu_seconds), *(TINY if args.tiny else ()), "--", *args.flags]
    seconds = cpu_seconds_of(command, folder, args.threads)
    figures = files.parse_json((folder / "figures.json").read_text())
    return {"cpu_seconds": seconds, **figures}
