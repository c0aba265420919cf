"""The part `right` of benchmarks/gpu.py: the device computes what the references, or a CPU, compute.

Shapes: B images, N rows, C channels.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import main_esvit
import utils
from benchmarks import golden, gpu_golden
from benchmarks.augment import CROPS, MEAN, STD, STRENGTH
from benchmarks.golden import MICRO, NETWORKS, relative_error
from benchmarks.gpu_golden import FP32
from benchmarks.gpu_rows import Bench, Bound, Figures, Row, largest
from benchmarks.sides import CPU, build_step, make_crops
from checkpoints import serialization
from data.datasets import build_dataset
from data.loader import build_eval_loader
from data.transforms.augment import eval_view
from data.transforms.crops import split_views
from data.transforms.recipe import dino_recipe
from distributed import collectives, fsdp
from evaluation.features import LabeledFeatures, extract_features
from evaluation.knn import Split, knn_scores, nearest
from models import build_model, load_arch_config
from training import setup
from training.checkpointing import CHECKPOINT
from training.step import TrainStep

COLORS = 2e-3  # of normalized colors, whose range is about 5
SHARE_OF_UPDATE = 0.02  # of weights that two ways of computing a step leave apart
STEPS = 50  # of an epoch, so that steps 50 and 51 of two have a learning rate
TINY_SIZES = """
--out_dim 32 --head_hidden_dim 16 --head_bottleneck_dim 8 --local_crops_number 2 --local_crops_size 16 --batch_size_per_gpu 4
--epochs 2 --warmup_epochs 0 --lr 0.01 --use_dense_prediction on --momentum_teacher 0.9 --freeze_last_layer 0
"""
TINY_SWIN = """
MODEL.IMAGE_SIZE 32 MODEL.SPEC.DIM_EMBED 12 MODEL.SPEC.DEPTHS [1,2] MODEL.SPEC.NUM_HEADS [1,2] MODEL.SPEC.WINDOW_SIZE 4
"""
DROP_PATH = "MODEL.SPEC.DROP_PATH_RATE"
TINY_STEP = [*MICRO, *TINY_SIZES.split()]
STILL_SWIN = [*TINY_SWIN.split(), DROP_PATH, "0.0"]


def rows(tiny: bool) -> list[Row]:
    """Return the rows in order of value; tiny leaves out the larger networks."""
    networks = ["deit_small"] if tiny else list(NETWORKS)
    row = partial(Row, "right")
    return [
        *(row(f"golden network {name}", 4, partial(gpu_golden.check_network, name)) for name in networks),
        row("golden losses", 2, gpu_golden.check_losses),
        row("golden trajectory of six steps", 3, gpu_golden.check_trajectory),
        row("golden losses of UDI", 2, gpu_golden.check_udi_losses),
        row("golden epochs of UDI", 4, gpu_golden.check_udi_epochs),
        row("lean step equals plain step", 10, check_plain),
        row("GradScaler skips an overflow", 3, check_overflow),
        row("split augmentation equals the CPU's", 6, check_colors),
        row("4 steps = 2 + resume + 2, deterministic", 15, check_resume),
        row("a step never waits for the device", 4, check_waits, needs_cuda=True),
        row("features and k-NN equal the CPU's", 6, check_features),
        row("process group of one (nccl on CUDA)", 6, check_group),
        row("DistributedDataParallel of one", 5, check_ddp),
        row("SyncBatchNorm of one", 5, check_batch_norm),
        row("FSDP of one", 6, check_fsdp),
    ]


# --------------------------------------------------------------------------- the step


def tiny_step(device: torch.device, *words: str, precision: str = "fp32") -> TrainStep:
    """Return a small step."""
    return golden.build_step([*TINY_STEP, *words, *STILL_SWIN], STEPS, device, precision)[1]


def tiny_views(device: torch.device, seed: int) -> list[Tensor]:
    """Return views of four images, equal on every device."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, size, size, generator=generator).to(device) for size in (32, 32, 16, 16)]


def weights_of(step: TrainStep) -> dict[str, Tensor]:
    """Return the student's weights, whole and on the CPU, under the names of one process."""
    state = step.method.student.state_dict()
    return {name.removeprefix("module."): fsdp.full_tensor(value).cpu().clone() for name, value in state.items()}


def difference(a: dict[str, Tensor], b: dict[str, Tensor], bound: float = 0.0) -> Bound:
    """Return the largest difference of tensors with the same names."""
    if a.keys() != b.keys():
        raise ValueError(f"names differ: {sorted(a.keys() ^ b.keys())[:3]}")
    return largest(((a[name].double() - b[name].double()).abs().max().item() for name in a), bound)


def compare_steps(one: TrainStep, other: TrainStep, views: Sequence[Sequence[Tensor]]) -> Figures:
    """Compare losses and weights of equal networks after a step for each of the views.

    AdamW divides gradients by their size, so that rounding may turn the sign of a tiny one: means are compared.
    """
    start = weights_of(one)
    yield "weights at the start", difference(start, weights_of(other))
    losses = [[step([v], i, 0)["loss"].item() for i, v in enumerate(views, 50)] for step in (one, other)]
    yield "losses", largest((relative_error(a, b) for a, b in zip(*losses)), FP32)
    ours, theirs = weights_of(one), weights_of(other)
    moved = sum((ours[name].double() - start[name].double()).abs().sum().item() for name in start)
    apart = sum((ours[name].double() - theirs[name].double()).abs().sum().item() for name in start)
    yield "weights, share of the update", Bound(apart / moved, SHARE_OF_UPDATE)


def check_plain(bench: Bench) -> Figures:
    """Compare the step with the plain one, which holds all logits and explicit attention maps."""
    sizes = argparse.Namespace(batch=2, out_dim=64 if bench.tiny else 65536, local_crops=2)
    network: dict[str, Any] = {"overrides": (DROP_PATH, "0.0")}
    if bench.tiny:
        network = {"arch": "swin", "flags": (*MICRO[2:], "--head_hidden_dim", "16"), "overrides": tuple(STILL_SWIN)}
    plain, lean = (build_step(side, sizes, device=bench.device, **network) for side in ("plain", "lean"))
    torch.manual_seed(0)
    yield from compare_steps(plain, lean, [make_crops(2, 2, bench.device) for _ in range(2)])


def check_overflow(bench: Bench) -> Figures:
    """Make the scaled gradients of an fp16 step overflow: it changes nothing and halves the scale; the next one trains."""
    step = tiny_step(bench.device, precision="fp16")
    views = tiny_views(bench.device, 0)
    step([views], 0, 0)  # creates the scale on the device
    step.scaler.update(2.0**120)
    before = weights_of(step)
    skipped = step([views], 1, 0)["skipped"].item()
    yield "not skipped", Bound(1 - skipped, 0)
    yield "changed", difference(before, weights_of(step))
    yield "scale, in halves", Bound(abs(step.scaler.get_scale() / 2.0**119 - 1), 0)
    step.scaler.update(1.0)  # small enough for the large gradients of tiny heads
    yield "then skipped", Bound(step([views], 2, 0)["skipped"].item(), 0)
    yield "then unchanged", Bound(float(difference(before, weights_of(step)).holds), 0)


def check_waits(bench: Bench) -> Figures:
    """Count what waits for the device in a step after the first, which fills caches."""
    step = tiny_step(bench.device)
    views = tiny_views(bench.device, 0)
    step([views], 0, 0)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step([views], 1, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [
        f"{Path(warning.filename).name}:{warning.lineno}" for warning in caught if "synchroniz" in str(warning.message)
    ]
    yield "where", ", ".join(dict.fromkeys(waits)) or "nowhere"
    yield "synchronizations", Bound(len(waits), 0)


# --------------------------------------------------------------------------- data and resume


def write_images(folder: Path, count: int, size: int = 40) -> None:
    """Write PNG files with noise around a color, in two class folders."""
    rng = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"class{number % 2}" / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.uniform(40, 215, 3) + rng.normal(0, 25, (size, size, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


def check_colors(bench: Bench) -> Figures:
    """Give the same crops and draws to the device part of the split augmentation on the device and on a CPU."""
    utils.seed_everything(0)
    images, size = (4, 96) if bench.tiny else (64, 256)
    crops, device_transform = split_views(dino_recipe(CROPS, STRENGTH), MEAN, STD)
    noise = F.interpolate(255 * torch.rand(images, 3, 24, 24), (size, size), mode="bilinear").byte()
    samples = [crops(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in noise]
    stacked = [torch.stack(part) for part in zip(*samples)]
    ours, expected = ([view.cpu() for view in device_transform(stacked, device)] for device in (bench.device, CPU))
    yield "pixels", largest(((a - b).abs().max().item() for a, b in zip(ours, expected)), COLORS)
    for name, statistic in (("means", torch.mean), ("standard deviations", torch.std)):
        errors = [
            (statistic(a, (0, 2, 3)) - statistic(b, (0, 2, 3))).abs().max().item() for a, b in zip(ours, expected)
        ]
        yield name, largest(errors, FP32)


def check_resume(bench: Bench) -> Figures:
    """Run main_esvit.py for two epochs of two steps, and again from the checkpoint between them: the same, bit for bit."""
    with tempfile.TemporaryDirectory() as name, deterministic():
        folder = Path(name)
        write_images(folder / "images", 9)
        words = [*TINY_STEP, "--data_path", str(folder / "images"), "--num_workers", "2", "--saveckp_freq", "1"]
        words += ["--device", str(bench.device), "--precision", "auto", "--log_freq", "1"]

        def train(run: str) -> dict[str, Any]:
            line = [*words, "--output_dir", str(folder / run), *TINY_SWIN.split(), DROP_PATH, "0.1"]
            main_esvit.main(main_esvit.get_args_parser().parse_args(line))
            return serialization.load_file(folder / run / CHECKPOINT)

        whole = train("whole")
        (folder / "resumed").mkdir()
        shutil.copy(folder / "whole" / "checkpoint0000.pth", folder / "resumed" / CHECKPOINT)
        resumed = train("resumed")
        first = serialization.load_file(folder / "whole" / "checkpoint0000.pth")
    for key in ("student", "teacher", "dino_loss"):
        yield key, difference(whole[key], resumed[key])
    yield "untrained", Bound(float(difference(whole["student"], first["student"]).holds), 0)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Use deterministic algorithms only, inside the block; those that have none raise an error."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@torch.no_grad()
def check_features(bench: Bench) -> Figures:
    """Compare features that the device extracts, and the neighbors that it finds, with those of a CPU."""
    torch.manual_seed(0)
    backbone = build_model("swin", load_arch_config("swin", MICRO[3], STILL_SWIN)).eval()
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), 12)
        dataset = build_dataset(folder, "train", eval_view(32, 1.0, MEAN, STD), need_labels=True)
        loader = build_eval_loader(dataset, 5, 1, pin_memory=bench.is_cuda)
        found = [
            extract_features(loader, {"features": backbone.to(device)}, device, CPU, "images")["features"]
            for device in (bench.device, CPU)
        ]
    yield "features", Bound(relative_error(*(part.features_NC for part in found)), FP32)
    keys, queries, classes = (500, 100, 5) if bench.tiny else (50_000, 2_000, 100)
    centers_LC, splits = torch.randn(classes, 256), []
    for count in (keys, queries):
        labels_N = torch.arange(count) % classes
        features_NC = F.normalize(centers_LC[labels_N] + 3 * torch.randn(count, 256), dim=-1)
        splits.append(LabeledFeatures(features_NC, labels_N))
    on_device = [LabeledFeatures(*(tensor.to(bench.device) for tensor in part)) for part in splits]
    scores = [knn_scores(Split(*parts), [1, 20], 0.07) for parts in (on_device, splits)]
    yield "top-1 difference in points", largest((abs(a.top1 - b.top1) for a, b in zip(*scores)), 100 / queries)
    few = splits[1].features_NC[:100]
    ours, expected = (
        nearest(few.to(bench.device), on_device[0].features_NC, 20),
        nearest(few, splits[0].features_NC, 20),
    )
    yield "similarities", Bound(relative_error(ours.similarity_Qk, expected.similarity_Qk), FP32)
    yield "other neighbors", Bound((ours.index_Qk.cpu() != expected.index_Qk).double().mean().item(), 0.01)


# --------------------------------------------------------------------------- processes


@contextlib.contextmanager
def group_of_one(device: torch.device) -> Iterator[None]:
    """Join a process group of this process alone, with the backends of launch.py."""
    with tempfile.TemporaryDirectory() as folder:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def check_group(bench: Bench) -> Figures:
    """Run every collective operation; with one process each returns its input."""
    rows_NC = torch.arange(12.0, device=bench.device).view(4, 3)
    with group_of_one(bench.device):
        yield "backend", str(dist.get_backend())
        results = {
            "sum": collectives.all_reduce_sum(rows_NC.clone()),
            "maximum": collectives.all_reduce_max(rows_NC.clone()),
            "asynchronous sum": collectives.start_all_reduce_sum(rows_NC.clone())(),
            "gathered rows": torch.cat(collectives.all_gather_rows(rows_NC)),
        }
        for name, result in results.items():
            yield name, Bound((result - rows_NC).abs().max().item(), 0)


def compare_wrapped(
    bench: Bench, wrap: Callable[[TrainStep], TrainStep] | None = None, words: tuple[str, ...] = ()
) -> Figures:
    """Compare two steps in a process group with two steps without one.

    Args:
        wrap: Returns the step for the group; by default it is built inside, where networks are wrapped.
    """
    plain = tiny_step(bench.device, *words)
    built = tiny_step(bench.device, *words)
    with group_of_one(bench.device):
        wrapped = wrap(built) if wrap else tiny_step(bench.device, *words)
        yield "student", type(wrapped.method.student).__name__
        yield from compare_steps(plain, wrapped, [tiny_views(bench.device, i) for i in range(2)])


def check_ddp(bench: Bench) -> Figures:
    """Compare DistributedDataParallel with the network alone."""
    yield from compare_wrapped(bench)


def check_batch_norm(bench: Bench) -> Figures:
    """Compare heads with BatchNorm, which share their statistics, with heads of a network alone; SyncBatchNorm on CUDA only."""
    yield from compare_wrapped(bench, words=("--use_bn_in_head", "on"))


def check_fsdp(bench: Bench) -> Figures:
    """Compare sharded networks, each shard whole, with whole networks."""

    def shard(step: TrainStep) -> TrainStep:
        mesh = init_device_mesh(bench.device.type, (1,))
        method: Any = step.method
        for network in (method.student, method.teacher):
            for unit in (*fsdp.units(network), network):
                fully_shard(unit, mesh=mesh, reshard_after_forward=True)
        words = [*TINY_STEP, *STILL_SWIN]
        return setup.build_step(main_esvit.get_args_parser().parse_args(words), method, STEPS, bench.device, "fp32")

    yield from compare_wrapped(bench, shard)
