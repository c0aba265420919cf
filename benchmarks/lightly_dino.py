"""Train a network of this project with lightly's DINO for a given CPU time; benchmarks/peers.py starts it and scores the result.

    python benchmarks/lightly_dino.py --data_path DIR --lr 0.001 --cpu_seconds 1800 --output_dir OUT -- FLAGS

FLAGS are flags of main_esvit.py. They give the network (without stochastic depth, as the example has none), the mean and standard
deviation of the pixels, and the sizes of the crops; the rest of them is ignored. The crops' sizes are the only setting that is
adapted, because lightly's are for larger images. All others are those of lightly's example, whatever FLAGS say: two global and six
local crops with their scales, colors and blur; heads of 512, 64 and 2048 dimensions, the teacher's with random weights of its own;
prototypes frozen for an epoch; temperatures 0.1 and 0.04; Adam with a constant rate; batches of 64; float32.

It trains until the CPU time is used up. Over this time the teacher's momentum rises from 0.996 to 1, at every step as in lightly's
own benchmark; the example raises it once per epoch.

Results in --output_dir: `checkpoint.pth` with student and teacher, for eval_knn.py --arch, unless the loss is no longer finite; and
`figures.json`.
Origin: examples/pytorch/dino.py of lightly-ai/lightly 1.6; DINO (Caron et al., ICCV 2021).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from yacs.config import CfgNode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from checkpoints.serialization import save_file
from config.arguments import main_esvit
from config.ranges import COUNT, FACTOR, MANY, SEED, number
from distributed import launch
from models import build_model, load_arch_config
from training import setup

HEAD = (512, 64, 2048)  # hidden dimension, bottleneck and prototypes
MOMENTUM = (0.996, 1.0)
LOCAL_SHARE = 96 / 224  # of the side of a global crop, where FLAGS have no local crops
CURVE = 20  # values of the loss in figures.json


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(
        "benchmarks/lightly_dino.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data_path", required=True, metavar="DIR", help="folder with train/CLASS/")
    add("--output_dir", required=True, metavar="DIR")
    add("--lr", type=FACTOR, default=0.001)
    add("--batch", type=COUNT, default=64)
    add("--cpu_seconds", type=number(0, MANY), required=True, help="CPU time from the start of the process")
    add("--max_steps", type=COUNT, default=MANY)
    add("--seed", type=SEED, default=0)
    add("flags", nargs="*", metavar="-- FLAGS", help="flags of main_esvit.py")
    return parser


class Setting(NamedTuple):
    """What all calls of `train` share."""

    arch: str
    config: CfgNode
    patch_size: int
    loader: DataLoader[Any]  # yields a list of views, and labels
    lr: float
    seed: int


def build_setting(args: argparse.Namespace) -> Setting:
    """Build the loader, and take the network from the flags of main_esvit.py.

    Raises:
        UsageError: There are fewer images than a batch, or the flags do not fit each other.
    """
    from lightly.transforms.dino_transform import DINOTransform

    ours = main_esvit.get_args_parser().parse_args(args.flags)
    config = load_arch_config(ours.arch, ours.cfg, ours.opts)
    crops = setup.get_crops(ours, config)
    _, size, *local_sizes = crops.sides
    transform = DINOTransform(
        global_crop_size=size,
        local_crop_size=local_sizes[0] if local_sizes else round(LOCAL_SHARE * size),
        normalize={"mean": list(config.INPUT.MEAN), "std": list(config.INPUT.STD)},
    )
    images = ImageFolder(str(Path(args.data_path) / "train"), transform)
    if len(images) < args.batch:
        raise utils.UsageError(f"{args.data_path} has {len(images)} training images, fewer than --batch {args.batch}")
    loader: DataLoader[Any] = DataLoader(images, args.batch, shuffle=True, drop_last=True)
    return Setting(ours.arch, config, ours.patch_size, loader, args.lr, args.seed)


def train(setting: Setting, cpu_seconds: float, max_steps: int) -> tuple[dict[str, nn.Module], list[float]]:
    """Return the backbones of student and teacher, and the loss of each step; stop at one that is not finite.

    Args:
        cpu_seconds: CPU time of this process, since its start, at which no further step begins; the first step always runs.
    """
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.utils.scheduler import cosine_schedule

    utils.seed_everything(setting.seed)
    backbone = build_model(setting.arch, setting.config, is_teacher=True, patch_size=setting.patch_size)
    head = DINOProjectionHead(backbone.num_features, *HEAD, freeze_last_layer=1)
    student = nn.Sequential(backbone, head)
    teacher = nn.Sequential(copy.deepcopy(backbone), DINOProjectionHead(backbone.num_features, *HEAD))
    deactivate_requires_grad(teacher)
    criterion = DINOLoss(output_dim=HEAD[-1], warmup_teacher_temp_epochs=5)
    optimizer = torch.optim.Adam(student.parameters(), lr=setting.lr)

    losses: list[float] = []
    batches = itertools.chain.from_iterable(itertools.repeat(setting.loader))
    for step, (views, _) in enumerate(itertools.islice(batches, max_steps)):
        used = time.process_time()
        if step and used >= cpu_seconds:
            break
        epoch = step // len(setting.loader)
        milliseconds = int(1000 * used), int(1000 * cpu_seconds)  # in place of steps, whose number is not known
        update_momentum(student, teacher, m=cosine_schedule(*milliseconds, *MOMENTUM))
        loss = criterion([teacher(view) for view in views[:2]], [student(view) for view in views], epoch=epoch)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        head.cancel_last_layer_gradients(current_epoch=epoch)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}, {used:.0f} of {cpu_seconds:.0f} s: loss {losses[-1]:.4f}", flush=True)
    return {"student": backbone, "teacher": teacher[0]}, losses


def main(args: argparse.Namespace) -> None:
    """Train, and save both networks."""
    setting = build_setting(args)
    networks, losses = train(setting, args.cpu_seconds, args.max_steps)

    folder = Path(args.output_dir)
    finite = math.isfinite(losses[-1])
    if finite:
        save_file({name: network.state_dict() for name, network in networks.items()}, folder / "checkpoint.pth")
    figures = {
        "steps": len(losses),
        "epochs": len(losses) / len(setting.loader),
        "diverged": not finite,
        "losses": [float(part.mean()) for part in np.array_split(losses, min(CURVE, len(losses)))] if finite else [],
    }
    (folder / "figures.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    launch.run_script(lambda: main(get_args_parser().parse_args()))
