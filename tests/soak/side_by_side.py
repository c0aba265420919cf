"""Train architectures with DDP and with --fsdp, and compare losses, weights, statistics of BatchNorm and features.

    torchrun --nproc_per_node=2 tests/soak/side_by_side.py
    torchrun --nproc_per_node=4 tests/soak/side_by_side.py --group 2 swin cvt      # --fsdp_group 2, only these cases

With mixup, two micro-batches per step, and a step that is nonfinite in the last process only. Prints a line for each case; the
first difference ends all processes with code 1.
"""

from __future__ import annotations

import argparse
import copy
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from helpers.runs import TINY_RUN  # noqa: E402
from helpers.small_networks import SMALL  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._pytree import tree_map_only  # noqa: E402

import main_esvit  # noqa: E402
import utils  # noqa: E402
from checkpoints import loading  # noqa: E402
from config.loading import load_config  # noqa: E402
from distributed import collectives, fsdp, launch  # noqa: E402
from models import Backbone  # noqa: E402
from training import setup  # noqa: E402
from training.step import Method  # noqa: E402

CPU = torch.device("cpu")
assert_close = partial(torch.testing.assert_close, equal_nan=True)
FLAGS = [*TINY_RUN, "--local_crops_number", "1"]
FLAGS += ["--batch_size_per_gpu", "2", "--epochs", "1"]
FLAGS += ["--accum_iter", "2", "--use_mixup", "on", "--freeze_last_layer", "0", "--clip_grad", "0.3"]
FLAGS += ["--momentum_teacher", "0.9", "--optimizer", "sgd", "--lr", "10"]
DROP_PATH = ("MODEL.SPEC.DROP_PATH_RATE", "0.1")


class Case(NamedTuple):
    """A network of `SMALL`, the precision, further flags, overrides of its config, size of the local crops, and tolerance."""

    network: str
    precision: str = "fp32"
    flags: tuple[str, ...] = ()
    overrides: tuple[str, ...] = DROP_PATH
    local_size: int = 32
    tolerance: float = 1e-5


CASES = {
    "swin": Case("swin"),
    "vit, fp16": Case("vit", "fp16"),
    "vil": Case("vil", overrides=(*DROP_PATH, "MODEL.SPEC.MSVIT.MODE", "1")),  # one random neighbor of nine
    "cvt": Case("cvt"),
    "cvt, recomputed": Case("cvt", flags=("--grad_checkpointing", "on"), overrides=()),
    # BatchNorm over few values divides rounding errors by their spread.
    "resnet": Case("resnet", flags=("--lr", "0.01"), overrides=(), local_size=64, tolerance=1e-2),
    "swin, BatchNorm in heads": Case("swin", flags=("--use_bn_in_head", "on")),
    "swin, LARS": Case("swin", flags=("--optimizer", "lars")),
}
GOOD, BAD = 0.0, 1.0
SCALE = 1.0  # of fp16: the gradients of a small head are large


def random_views(local_size: int, nonfinite: bool) -> list[Tensor]:
    """Return a micro-batch."""
    views = [torch.randn(2, 3, size, size) for size in (64, 64, local_size)]
    if nonfinite and collectives.get_rank() == collectives.get_world_size() - 1:
        views[0][0, 0, 0, 0] = torch.nan
    return views


def train(case: Case, *flags: str) -> tuple[list[dict[str, float]], dict[str, Any], list[Tensor]]:
    """Return scalars of three steps, the final state, and features of both networks after two steps."""
    small = SMALL[case.network]
    line = [*FLAGS, "--arch", small.arch, "--patch_size", str(small.patch_size), *case.flags, *flags]
    line += ["--local_crops_size", str(case.local_size), "--"]
    args = main_esvit.get_args_parser().parse_args([*line, *small.overrides, *case.overrides])
    utils.seed_everything(0)
    method = main_esvit.build_method(args, load_config(None, args.opts), CPU)
    step = setup.build_step(args, method, 6, CPU, case.precision)
    step.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=step.scaler.is_enabled())
    method.start_epoch(0, 1)
    scalars, features = [], []
    for iteration, expected in enumerate((GOOD, BAD, GOOD)):
        utils.seed_everything(100 * iteration + collectives.get_rank())
        views = [random_views(case.local_size, nonfinite=expected == BAD and part == 1) for part in range(2)]
        result = step(views, iteration, 0, monitor=True)
        scalars.append({name: value.item() for name, value in result.items()})
        scalars[-1]["scale"] = step.scaler.get_scale()
        assert scalars[-1]["skipped"] == expected, scalars[-1]
        if iteration == 1:
            features = features_of(method)
    fsdp_state = getattr(loading.unwrap(method.teacher), "_get_fsdp_state", lambda: None)()
    assert fsdp_state is None or not fsdp_state._comm_ctx.post_forward_order
    saved = tree_map_only(Tensor, fsdp.full_tensor, step.state_dict())
    state = {part: copy.deepcopy(saved[part]) for part in ("student", "teacher", "dino_loss")}
    moments = saved["optimizer"]["state"].items()
    state["optimizer"] = {f"{key} of {number}": value for number, one in moments for key, value in one.items()}
    return scalars, state, features


def features_of(method: Method) -> list[Tensor]:
    """Return features of both networks; process r computes them r + 1 times."""
    found = []
    for network in (loading.unwrap(method.student), loading.unwrap(method.teacher)):
        assert isinstance(network, Backbone)
        with fsdp.unsharded(network), torch.no_grad():
            network.eval()
            for _ in range(collectives.get_rank() + 1):
                features = network.forward_features(torch.ones(1, 3, 64, 64)).view_BC
            network.train()
            found.append(features)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--group", default="0")
    parser.add_argument("cases", nargs="*", metavar="CASE")
    chosen = parser.parse_args()
    launch.init_processes(main_esvit.get_args_parser().parse_args(["--device", "cpu"]))
    for name, case in ((name, CASES[name]) for name in chosen.cases or CASES):
        whole, shards = train(case), train(case, "--fsdp", "--fsdp_group", chosen.group)
        close = partial(assert_close, rtol=case.tolerance, atol=case.tolerance)
        for one, two in zip(whole[0], shards[0], strict=True):
            assert one.keys() == two.keys()
            close(torch.tensor([*two.values()]), torch.tensor([*one.values()]))
        close(shards[2], whole[2])
        if collectives.is_main_process():
            for part, tensors in whole[1].items():
                assert tensors.keys() == shards[1][part].keys()
                for key, value in tensors.items():
                    close(shards[1][part][key], value, msg=f"{name}: {part} {key}")
            print(f"{name}: equal", flush=True)


if __name__ == "__main__":
    launch.run_script(main)
