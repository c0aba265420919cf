"""Small runs for tests: image folders, command lines of a tiny Swin, and the scripts as a user starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from conftest import ROOT
from PIL import Image

TINY_SWIN = [
    "MODEL.IMAGE_SIZE",
    "32",
    "MODEL.SPEC.DIM_EMBED",
    "12",
    "MODEL.SPEC.DEPTHS",
    "[1,2]",
    "MODEL.SPEC.NUM_HEADS",
    "[1,2]",
    "MODEL.SPEC.WINDOW_SIZE",
    "4",
    "MODEL.SPEC.DROP_PATH_RATE",
    "0.1",
]
TINY_RUN = [
    "--cfg",
    "experiments/demo/swin_micro.yaml",
    "--arch",
    "swin",
    "--device",
    "cpu",
    "--precision",
    "fp32",
    "--num_workers",
    "0",
    "--use_dense_prediction",
    "on",
    "--out_dim",
    "32",
    "--head_hidden_dim",
    "16",
    "--head_bottleneck_dim",
    "8",
    "--local_crops_number",
    "2",
    "--local_crops_size",
    "16",
    "--batch_size_per_gpu",
    "4",
    "--epochs",
    "2",
    "--warmup_epochs",
    "0",
    "--lr",
    "0.01",
    "--log_freq",
    "1",
]
TINY_VIT = [
    *("MODEL.IMAGE_SIZE", "32", "MODEL.SPEC.DIM_EMBED", "16", "MODEL.SPEC.DEPTH", "2", "MODEL.SPEC.NUM_HEADS", "2"),
    *("MODEL.SPEC.MLP_RATIO", "2.0"),
]
TINY_UDI = [
    *("--cfg", "experiments/demo/vit_micro.yaml", "--arch", "vit", "--patch_size", "4", "--device", "cpu"),
    *("--precision", "fp32", "--num_workers", "0", "--out_dim", "32", "--head_hidden_dim", "16"),
    *("--head_bottleneck_dim", "8", "--local_crops_number", "2", "--local_crops_size", "16"),
    *("--batch_size_per_gpu", "4", "--epochs", "2", "--warmup_epochs", "0", "--warmup_teacher_temp_epochs", "1"),
    *("--lr", "0.01", "--log_freq", "1"),
]


def write_images(root: Path, count: int, size: int = 40, classes: int = 0, seed: int = 0) -> Path:
    """Write noisy one-colored PNG files: flat, or `count` in each of `classes` folders with a color of their own."""
    rng = np.random.default_rng(seed)
    for label in range(max(classes, 1)):
        folder = root / f"class{label}" if classes else root
        folder.mkdir(parents=True, exist_ok=True)
        color = np.random.default_rng(label + 100).uniform(40, 215, 3)
        for number in range(count):
            pixels = color + rng.normal(0, 25, (size, size, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:03}.png")
    return root


def zip_folders(
    folders: Path, out: Path, method: int = zipfile.ZIP_STORED, parts: Sequence[str] = ("train", "val")
) -> Path:
    """Write `PART.zip` and `PART_map.txt` for each of the `parts` that are there, classes numbered in their order."""
    out.mkdir(parents=True, exist_ok=True)
    for part in (part for part in parts if (folders / part).is_dir()):
        lines = []
        with zipfile.ZipFile(out / f"{part}.zip", "w", method) as archive:
            for label, folder in enumerate(sorted((folders / part).iterdir())):
                for path in sorted(folder.iterdir()):
                    archive.write(path, f"{folder.name}/{path.name}")
                    if path.suffix == ".png":
                        lines.append(f"{part}.zip@/{folder.name}/{path.name}\t{label}\n")
        (out / f"{part}_map.txt").write_text("".join(lines))
    return out


def flipped(path: Path) -> bytes:
    """A checkpoint with one bit changed, of the largest tensor: elsewhere it may hit what fills the gaps between records."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as records:
        largest = max(records.infolist(), key=lambda record: record.file_size)
        stored = records.read(largest)
    content[content.index(stored) + len(stored) // 2] ^= 1
    return bytes(content)


def free_port() -> int:
    """A port that nothing listens to now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_script(script: str, *args: str, processes: int = 0, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Start a script in a fresh interpreter, under torchrun when `processes` is given."""
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={free_port()}"]
    command = [*launcher, script, *map(str, args)]
    return subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=timeout)


def caught_recipe(folder: Path, recipe: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Start scripts/RECIPE.sh with a stand-in for python that counts 100 images and no GPU, and prints the words of a script."""
    echo = folder / "python"
    echo.write_text('#!/bin/sh\n[ "$1" = -c ] && echo 100 0 1 && exit\nfor word in "$@"; do echo "$word"; done\n')
    echo.chmod(0o755)
    command = ["bash", str(ROOT / f"scripts/{recipe}.sh"), *args]
    return subprocess.run(command, env=os.environ | {"PYTHON": str(echo)} | env, capture_output=True, text=True)


def start_script(script: str, *args: str, env: dict[str, str]) -> subprocess.Popen[str]:
    """Start a script with further environment variables and do not wait for it."""
    command = [sys.executable, script, *args]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=clean_environment() | env, stdout=pipe, stderr=pipe, text=True)


def clean_environment() -> dict[str, str]:
    """This process's environment without a launcher's variables, and with one thread a process."""
    launched = {"RANK", "WORLD_SIZE", "LOCAL_RANK"}
    env = {k: v for k, v in os.environ.items() if k not in launched and not k.startswith("SLURM_")}
    return env | {"OMP_NUM_THREADS": "1"}
