"""Images per second of feature extraction (or training) for every published network, and for timm's implementation if it has one.

    python benchmarks/throughput.py                              # small batches: a minute or two on a CPU
    python benchmarks/throughput.py --rows "Swin-T, window 7" --batch 32 256 --precision bf16
    python benchmarks/throughput.py --device cuda --batch 32 256
    python benchmarks/throughput.py --rows "Swin-T, window 7" --backward

Features are extracted as for k-NN: evaluation mode, no gradient, 224 pixels. With --backward the network is trained: forward and
backward to all weights. Both sides have the same weights (ours, exported), and their features are compared first. They take
turns, and the best of --repeats counts; on a CPU the time is CPU time of this process. The last column is the figure of the paper
on a V100 (EsViT, Li et al., ICLR 2022), for orientation.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from benchmarks.rows import ROWS, Row
from config.ranges import COUNT
from distributed import launch
from models import Backbone, build_model, load_arch_config

SIZE = 224


def build_pair(row: Row) -> tuple[Backbone, nn.Module | None]:
    """Return our network with random weights, and timm's with the same weights."""
    torch.manual_seed(0)
    ours = build_model(row.arch, load_arch_config(row.arch, None, list(row.overrides))).eval()
    if row.timm_name is None:
        return ours, None
    theirs = timm.create_model(row.timm_name, num_classes=0).eval()
    theirs.load_state_dict(ours.converters["timm"](ours.state_dict()), strict=False)
    for module in theirs.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6  # EsViT's
    return ours, theirs


def time_call(work: Callable[[], Tensor], device: torch.device) -> float:
    """Return the seconds of one call: CPU time, or wall-clock time until a GPU has finished."""
    if device.type == "cpu":
        start = time.process_time()
        work()
        return time.process_time() - start
    start = time.perf_counter()
    work().sum().item()
    return time.perf_counter() - start


def measure(row: Row, batch: int, args: argparse.Namespace, device: torch.device) -> tuple[float, float | None, float]:
    """Return images per second of ours and timm's, and the largest difference of features relative to the largest feature."""
    networks = [network.to(device) for network in build_pair(row) if network is not None]
    images = torch.randn(batch, 3, SIZE, SIZE, device=device)
    with torch.inference_mode(not args.backward), utils.autocast(device, args.precision):
        features = [network(images).detach().float() for network in networks]  # also warms up
        works = [partial(train if args.backward else nn.Module.__call__, network, images) for network in networks]
        best = [float("inf")] * len(works)
        for _ in range(args.repeats + args.backward):  # the first backward is a warmup
            for i, work in enumerate(works):
                best[i] = min(best[i], time_call(work, device))
    difference = (features[0] - features[-1]).abs().max() / features[0].abs().max()
    return batch / best[0], batch / best[1] if len(best) > 1 else None, difference.item()


def train(network: nn.Module, images: Tensor) -> Tensor:
    """Run forward and backward in training mode, and drop the gradients."""
    features = network.train()(images)
    features.float().square().mean().backward()
    network.zero_grad(set_to_none=True)
    return features.detach()


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(
        "benchmarks/throughput.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS), metavar="ROW")
    add("--batch", type=COUNT, nargs="+", default=[4])
    add("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    add("--repeats", type=COUNT, default=3)
    add("--backward", action="store_true", help="training: forward and backward")
    add("--threads", type=COUNT, default=1)
    add("--device", default="cpu")
    return parser


def main(args: argparse.Namespace) -> None:
    """Measure and print each network."""
    torch.set_num_threads(args.threads)
    device = utils.resolve_device(args.device)
    if device.type == "cpu":
        utils.keep_freed_memory()  # as eval_knn.py does, here for both sides
    for batch in args.batch:
        mode = "forward and backward" if args.backward else "features"
        print(
            f"{mode}, images per second at batch {batch}, {SIZE} pixels, {args.precision}, {device}, {args.threads} thread(s)"
        )
        print(f"  {'row':18} {'ours':>8} {'timm':>8} {'ours/timm':>9}   {'V100, paper':>11}")
        for name in args.rows:
            ours, theirs, difference = measure(ROWS[name], batch, args, device)
            ratio = f"{theirs:8.1f} {ours / theirs:9.2f}" if theirs else f"{'-':>8} {'-':>9}"
            note = f"   features differ by {difference:.1e}" if theirs else ""
            print(f"  {name:18} {ours:8.1f} {ratio}   {ROWS[name].paper or '-':>11}{note}", flush=True)


if __name__ == "__main__":
    launch.run_script(lambda: main(get_args_parser().parse_args()))
