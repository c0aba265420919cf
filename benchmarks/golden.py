"""The networks, losses and updates that the golden numbers belong to (tests/golden/README.md), on any device.

Tests compare with them on a CPU, benchmarks/gpu.py on the device that is at hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "golden"))  # fill.py: weights and inputs
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fill import crops as crops
from fill import fill_
from fill import tensor as tensor

import main_esvit
from losses.dino import DINOLoss
from models import Backbone, MultiCropOutput, build_model, load_arch_config
from models.heads import DINOHead
from training import setup
from training.step import TrainStep

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "golden"
Loss = TypeVar("Loss", bound=DINOLoss)


def arrays(name: str, folder: Path = FOLDER) -> dict[str, np.ndarray]:
    """Return the arrays of NAME.npz."""
    with np.load(folder / f"{name}.npz") as file:
        return dict(file)


def settings(name: str, folder: Path = FOLDER) -> Any:
    """Return the content of NAME.json."""
    return json.loads((folder / f"{name}.json").read_text())


def relative_error(ours: Any, golden: Any) -> float:
    """Return the largest absolute difference by the largest absolute golden value; shapes must be equal."""
    a, b = (np.asarray(torch.as_tensor(value).detach().cpu().double()) for value in (ours, golden))
    if a.shape != b.shape:
        raise ValueError(f"shape {a.shape} instead of {b.shape}")
    return float(np.abs(a - b).max() / np.abs(b).max())


# --------------------------------------------------------------------------- networks


class Network(NamedTuple):
    """How a golden network is built here."""

    arch: str
    overrides: tuple[str, ...] = ()


NETWORKS = {
    "swin_tiny_w7": Network("swin_tiny"),
    "swin_tiny_w14": Network("swin_tiny", ("MODEL.SPEC.WINDOW_SIZE", "14")),
    "cvt_tiny": Network("cvt_tiny"),
    "deit_small": Network("deit_small"),
    "resnet50": Network("resnet50"),
    "cvt_s3_stem_w14": Network(
        "cvt_small", ("MODEL.SPEC.RES_STEM", "True", "MODEL.SPEC.WINDOW_SIZE", "[14, 14, 14, 7]")
    ),
    "vil_1281": Network("vil_1281"),
    "vil_2262": Network("vil_2262", ("MODEL.SPEC.MSVIT.MODE", "1", "MODEL.SPEC.MSVIT.VIL_MODE_SWITCH", "0.75")),
}


def golden_network(name: str, dense: bool) -> Backbone:
    """Return a golden network in evaluation mode, with heads if it is dense."""
    arch, overrides = NETWORKS[name]
    network = build_model(arch, load_arch_config(arch, None, overrides), dense=dense)
    if dense:
        network.head = DINOHead(network.num_features, 128)
        network.head_dense = DINOHead(network.num_features, 128)
    fill_(network.state_dict())
    return network.eval()


# --------------------------------------------------------------------------- losses


def golden_loss(kind: type[Loss]) -> Loss:
    """Return a golden loss."""
    loss = kind(32, 6, 0.04, 0.07, 3, 10)
    for name, center in loss.state_dict().items():
        center.copy_(0.1 * tensor(f"lossA-{name}", 1, 32))
    return loss


def golden_outputs(device: torch.device | str = "cpu") -> tuple[MultiCropOutput, MultiCropOutput]:
    """Return the outputs of student and teacher that the golden losses compare."""
    student = MultiCropOutput(
        tensor("lossA-s_cls", 18, 32).to(device).requires_grad_(),
        tensor("lossA-s_reg", 402, 32).to(device).requires_grad_(),
        tensor("lossA-s_fea", 402, 16).to(device),
        (49, 49, 9, 9, 9, 9),
    )
    teacher = MultiCropOutput(
        tensor("lossA-t_cls", 6, 32).to(device),
        tensor("lossA-t_reg", 294, 32).to(device),
        tensor("lossA-t_fea", 294, 16).to(device),
        (49, 49),
    )
    return student, teacher


# --------------------------------------------------------------------------- updates

MICRO = ("--arch", "swin", "--cfg", str(ROOT / "experiments" / "demo" / "swin_micro.yaml"))
TRAJECTORY_FLAGS = """
--use_dense_prediction true --out_dim 64 --norm_last_layer false --epochs 2 --batch_size_per_gpu 4 --local_crops_number 3
--local_crops_size 32 --lr 0.05 --warmup_epochs 1 --min_lr 1e-6 --momentum_teacher 0.9 --warmup_teacher_temp 0.04
--teacher_temp 0.07 --warmup_teacher_temp_epochs 1 --clip_grad 0.3 --freeze_last_layer 1 MODEL.IMAGE_SIZE 64
MODEL.SPEC.DIM_EMBED 24 MODEL.SPEC.DEPTHS [1,2,2,1] MODEL.SPEC.NUM_HEADS [1,2,4,8] MODEL.SPEC.WINDOW_SIZE 7
MODEL.SPEC.DROP_PATH_RATE 0.0
"""
TRAJECTORY = [*MICRO, *TRAJECTORY_FLAGS.split()]
TRAJECTORY_STEPS = 6


def build_step(
    words: Sequence[str], steps: int, device: torch.device, precision: str = "fp32"
) -> tuple[argparse.Namespace, TrainStep]:
    """Return the arguments and the step of main_esvit.py with a command line, for epochs of `steps` steps."""
    args = main_esvit.get_args_parser().parse_args(list(words))
    torch.manual_seed(0)
    method = main_esvit.build_method(args, load_arch_config(args.arch, args.cfg, args.opts), device)
    return args, setup.build_step(args, method, steps * args.accum_iter, device, precision)


def golden_step(device: torch.device) -> TrainStep:
    """Return the step of the golden trajectory."""
    _, step = build_step(TRAJECTORY, TRAJECTORY_STEPS // 2, device)
    fill_(step.method.student.state_dict())
    step.method.teacher.load_state_dict(step.method.student.state_dict())
    return step


def golden_views(iteration: int, device: torch.device) -> list[Tensor]:
    """Return the views of a step of the golden trajectory."""
    sizes = (64, 64, 32, 32, 32)
    return [tensor(f"traj-{iteration}-{v}", 4, 3, size, size).to(device) for v, size in enumerate(sizes)]
