"""Runs of the released programs, to be continued by this project: files (golden/genuine), inputs and command lines."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import GOLDEN
from torch import Tensor

import main_esvit
import main_udi
from data.transforms.udi_views import Correspondence
from training import checkpointing, setup
from training.step import TrainStep

GENUINE = GOLDEN / "genuine"
NAMES = sorted(path.stem for path in GENUINE.glob("*.pth"))
STEPS = 5  # of an epoch
# Flags under which this project runs what the released programs ran with shrunken heads, on a CPU in float32.
SMALL_HEADS = ["--head_hidden_dim", "64", "--head_bottleneck_dim", "32", "--precision", "fp32", "--device", "cpu"]
VIT = ["--arch", "vit", "--cfg", str(GENUINE / "vit48.yaml"), "--local_crops_size", "32"]


def views(iteration: int, local: int) -> list[Tensor]:
    """Return two global and `local` local views (4, 3, side, side) of a step, as in the released programs."""
    random = np.random.RandomState(1000 + iteration)
    base = random.standard_normal((4, 3, 64, 64))
    crops = [base + 0.3 * random.standard_normal(base.shape) for _ in range(2)]
    for number in range(local):
        crop = base[:, :, 8 * number : 8 * number + 32, 8 * number : 8 * number + 32]
        crops.append(crop + 0.3 * random.standard_normal(crop.shape))
    return [torch.from_numpy(crop.astype(np.float32)) for crop in crops]


def probe_images() -> Tensor:
    """Return the two images whose features are stored."""
    return torch.from_numpy(np.random.RandomState(77).standard_normal((2, 3, 64, 64)).astype(np.float32))


class GenuineRun:
    """A run of a released program, with its numbers, and the same run in this project.

    Args:
        name: Name of the files in golden/genuine.
        further: Additional flags and overrides, the last ones KEY VALUE pairs.
    """

    def __init__(self, name: str, *further: str) -> None:
        self.path = GENUINE / f"{name}.pth"
        with np.load(GENUINE / f"{name}.npz") as arrays:
            self.golden = dict(arrays)
        self.program = str(self.golden["program"])
        self.script: Any = main_udi if self.program == "udi" else main_esvit
        words = str(self.golden["flags"]).split()
        words[words.index("--use_fp16") + 1] = "off"  # the loss scale changes no number
        if "--arch" in words and "--cfg" not in words:
            at = words.index("--arch")
            words[at : at + 2] = VIT + (["--srs_heads", "6"] if self.program == "udi" else [])
        self.args: argparse.Namespace = self.script.get_args_parser().parse_args([*SMALL_HEADS, *further, *words])
        self.config = self.script.load_config(self.args)

    def build_step(self) -> TrainStep:
        """Return the step of a new run."""
        self.script.check_args(self.args)
        method = self.script.build_method(self.args, self.config, torch.device("cpu"))
        return setup.build_step(self.args, method, STEPS, torch.device("cpu"), "fp32")

    def resume_in(self, folder: Path, path: Path | None = None) -> tuple[TrainStep, checkpointing.RunPosition]:
        """Return a step resumed from the program's file, copied to `folder` as checkpoint.pth, and its position."""
        shutil.copy(path or self.path, folder / "checkpoint.pth")
        step = self.build_step()
        return step, checkpointing.resume_run(folder / checkpointing.CHECKPOINT, step.load_state_dict, self.args)

    def batch(self, iteration: int) -> list[Any]:
        """Return the views of a step, for UDI with the positions that its own augmentation sampled."""
        local = sum(self.args.local_crops_number)
        crops = views(iteration, local)
        if self.program != "udi":
            return crops
        keys = ("tokens", "local_tokens", "valid", "target", "local_valid", "local_target")
        g = {key: torch.from_numpy(self.golden[f"geometry/{key}"][iteration]) for key in keys}
        tokens = g["tokens"].long()[:, None].expand(-1, 2, -1)
        local_tokens = g["local_tokens"].long()[:, None].expand(-1, local, -1)
        of_global, of_local = (g["valid"], g["target"]), (g["local_valid"], g["local_target"])
        return [*crops, *Correspondence(tokens, *of_global, local_tokens, *of_local)]

    def train(self, step: TrainStep, epoch: int, epochs: int) -> list[dict[str, float]]:
        """Train to the end of the run and return the scalars of each step."""
        scalars = []
        for number in range(epoch, epochs):
            step.method.start_epoch(number, epochs)
            for iteration in range(number * STEPS, (number + 1) * STEPS):
                scalars.append({k: float(v) for k, v in step([self.batch(iteration)], iteration, number).items()})
        return scalars
