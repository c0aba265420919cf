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
from collections.abc import Callable, Iterator
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
from benchmarks import golden, golden_udi
from benchmarks.augment import CROPS, MEAN, STD, STRENGTH
from benchmarks.golden import MICRO, NETWORKS, relative_error
from benchmarks.gpu_rows import Bench, Bound, Figures, Row
from benchmarks.sides import CPU, build_step, make_crops
from checkpoints import serialization
from data.datasets import build_dataset
from data.loader import build_eval_loader
from data.transforms.augment import eval_view
from data.transforms.crops import split_views
from distributed import collectives, fsdp
from evaluation.features import LabeledFeatures, extract_features
from evaluation.knn import Split, knn_scores, nearest
from losses.dino import DINOLoss
from losses.region import RegionMatchingLoss
from losses.udi import StudentLevels, TeacherLevels
from models import build_model, load_arch_config
from training import setup
from training.checkpointing import CHECKPOINT
from training.step import TrainStep

FP32 = 1e-4  # largest difference by largest value; TF32 is off
AUTOCAST = {"bf16": 0.03, "fp16": 0.005}  # of network outputs; two to three times what a CPU has
AUTOCAST_LOSS = {"bf16": 3e-3, "fp16": 5e-4}
LAST_LOSS, MEAN_ABS = 2e-3, 2e-3  # of the trajectory
COLORS = 2e-3  # of normalized colors, whose range is about 5
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
        *(row(f"golden network {name}", 4, partial(check_network, name)) for name in networks),
        row("golden losses", 2, check_losses),
        row("golden trajectory of six steps", 3, check_trajectory),
        row("golden losses of UDI", 2, check_udi_losses),
        row("golden epochs of UDI", 4, check_udi_epochs),
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


def largest(errors: Iterator[float] | list[float], bound: float) -> Bound:
    """Return the largest error with its bound; NaN counts as larger than everything."""
    return Bound(float(np.max(list(errors))), bound)


# --------------------------------------------------------------------------- golden networks and losses


@torch.no_grad()
def check_network(name: str, bench: Bench) -> Figures:
    """Compare multi-crop outputs and headless features in float32 and under autocast, and the loss of the outputs."""
    expected, device = golden.arrays(name, bench.golden), bench.device
    dense, headless = (golden.golden_network(name, dense).to(device) for dense in (True, False))
    views = [crop.to(device) for crop in golden.crops()]
    criterion = RegionMatchingLoss(128, len(views), 0.04, 0.04, 0, 1).to(device)
    reference = None
    for precision in ("fp32", *golden_precisions(bench)):
        with utils.autocast(device, precision):
            output = dense(views)
            features = {"backbone_224": headless(views[0]), "backbone_96": headless(views[2])}
            loss = criterion(output, dense(views[:2]), 0)
        found = {
            "cls_logits": output.view_logits,
            "region_logits_every_37th_row": output.region_logits[::37],
            "region_features_every_37th_row": output.region_features[::37],
            **features,
        }
        errors = [relative_error(value.float(), expected[key]) for key, value in found.items()]
        yield precision, largest(errors, FP32 if precision == "fp32" else AUTOCAST[precision])
        if reference is None:
            reference = loss
        else:
            assert loss.dtype == torch.float32
            yield f"{precision} loss", Bound(relative_error(loss, reference.cpu()), AUTOCAST_LOSS[precision])


def golden_precisions(bench: Bench) -> tuple[str, ...]:
    """Return the precisions of autocast that the device computes in; none for tiny runs, since a CPU emulates them."""
    if bench.tiny:
        return ()
    if bench.is_cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        return ("fp16",)
    return ("bf16", "fp16")


def check_losses(bench: Bench) -> Figures:
    """Compare values, gradients and centers of both losses."""
    expected = golden.arrays("loss_a", bench.golden)
    region = golden.golden_loss(RegionMatchingLoss).to(bench.device)
    view = golden.golden_loss(DINOLoss).to(bench.device)
    student, teacher = golden.golden_outputs(bench.device)
    value = region(student, teacher, 1)
    value.backward()
    region.accumulate_center(teacher)
    region.update_center()
    found = {"region_loss": value, "region_grad_cls": student.view_logits.grad}
    found |= {"region_grad_region": student.region_logits.grad}
    found |= {"region_center": region.center, "region_center_grid": region.center_grid}
    yield "view and region loss", largest((relative_error(found[key], expected[key]) for key in found), FP32)

    student, teacher = golden.golden_outputs(bench.device)
    value = view(student.view_logits, teacher.view_logits, 1)
    value.backward()
    mixes = [torch.softmax(3 * golden.tensor(f"lossA-mix{v}", 3, 3), -1).to(bench.device) for v in range(6)]
    mixed = view(student.view_logits, teacher.view_logits, 1, mixes)
    view.accumulate_center(teacher.view_logits)
    view.update_center()
    found = {"view_loss": value, "view_grad": student.view_logits.grad, "view_loss_mixup": mixed}
    found |= {"view_center": view.center}
    yield "view loss, mixup", largest((relative_error(found[key], expected[key]) for key in found), FP32)


def check_trajectory(bench: Bench) -> Figures:
    """Compare six updates of the whole rule: losses, and both networks and centers at the end."""
    expected = golden.settings("trajectory_region_adamw", bench.golden)
    step = golden.golden_step(bench.device)
    steps_per_epoch = golden.TRAJECTORY_STEPS // 2
    losses = [
        step([golden.golden_views(i, bench.device)], i, i // steps_per_epoch)["loss"].item()
        for i in range(golden.TRAJECTORY_STEPS)
    ]
    yield "first loss", Bound(relative_error(losses[0], expected["losses"][0]), FP32)
    yield "losses", largest((relative_error(a, b) for a, b in zip(losses, expected["losses"], strict=True)), LAST_LOSS)
    method = step.method
    for name, network in (("student", method.student), ("teacher", method.teacher)):
        means = {key: value.abs().mean() for key, value in network.state_dict().items() if value.is_floating_point()}
        wanted = expected[f"{name}_mean_abs"]
        yield name, largest((relative_error(means[key], wanted[key]) for key in wanted), MEAN_ABS)
    centers = {f"{name}_mean_abs": value.abs().mean() for name, value in method.criterion.state_dict().items()}
    yield "centers", largest((relative_error(centers[key], expected[key]) for key in centers), MEAN_ABS)


def check_udi_losses(bench: Bench) -> Figures:
    """Compare terms, gradients and centers of UDI's loss, in float32."""
    expected = golden.arrays("udi_a", bench.golden)
    for name, case in golden_udi.CASES["loss"].items():
        loss, errors = golden_udi.golden_loss(name).float().to(bench.device), []
        for i in range(case["steps"]):
            prefix = f"loss/{name}/{i}"
            inputs = golden_udi.loss_inputs(name, i)
            x = {
                key: (value if value.dtype == torch.bool else value.float()).to(bench.device)
                for key, value in inputs.items()
            }
            for center, row_K in zip(golden_udi.CENTERS, x["center"] if i == 0 else ()):
                getattr(loss, center).copy_(row_K[None])
            logits = {key: x[key].requires_grad_() for key in x if key.startswith("s_")}
            student = StudentLevels(*(logits[f"s_{key}"] for key in ("cls", "cls_loc", "plus", "plus_loc", "pat")))
            teacher = TeacherLevels(x["t_cls"], x["t_pat"], x["V"], x["t_loc"], x["W"])
            terms = loss.terms(student, teacher, case["epoch"])
            total = loss.total(terms)
            values = torch.stack([total, *(terms[key] for key in golden_udi.TERMS)])
            errors.append(relative_error(values, expected[f"{prefix}/terms"]))
            gradients = torch.autograd.grad(total, list(logits.values()))
            errors += [relative_error(g, expected[f"{prefix}/grad_{key}"]) for key, g in zip(logits, gradients)]
            loss.accumulate_center(teacher)
            loss.update_center()
            errors.append(relative_error(golden_udi.centers_of(loss), expected[f"{prefix}/center"]))
        yield f"case {name}", largest(errors, FP32)


def check_udi_epochs(bench: Bench) -> Figures:
    """Compare two epochs of UDI, in the float64 of their golden numbers: means of the losses, centers, norms of weights."""
    case = golden_udi.build_case(golden.arrays("udi_a", bench.golden), bench.device)
    steps = golden_udi.CASES["net"][case.name]["steps"]
    step = setup.build_step(case.args, case.method, steps, bench.device, "fp32")
    for epoch in range(2):
        scalars = []
        for i in range(steps):
            crops, found = case.batch(i)
            views = [tensor.to(bench.device) for tensor in (*crops, *found)]
            scalars.append(step([views], epoch * steps + i, epoch))
        names = ("loss", *golden_udi.TERMS)
        means = torch.stack([torch.stack([s[key].double() for s in scalars]).mean() for key in names])
        yield f"losses of epoch {epoch}", Bound(relative_error(means, case.golden(f"epoch{epoch}/means")), FP32)
        centers = golden_udi.centers_of(case.method.criterion)
        yield f"centers of epoch {epoch}", Bound(relative_error(centers, case.golden(f"epoch{epoch}/center")), FP32)


# --------------------------------------------------------------------------- the step


def tiny_step(device: torch.device, *words: str, precision: str = "fp32") -> TrainStep:
    """Return a small step."""
    return golden.build_step([*TINY_STEP, *words, *STILL_SWIN], 4, device, precision)[1]


def tiny_views(device: torch.device, seed: int) -> list[Tensor]:
    """Return views of four images, equal on every device."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, size, size, generator=generator).to(device) for size in (32, 32, 16, 16)]


def weights_of(step: TrainStep) -> dict[str, Tensor]:
    """Return the student's weights, whole and on the CPU, under the names of one process."""
    state = fsdp.full_state_dict(step.method.student)
    return {name.removeprefix("module."): value.cpu().clone() for name, value in state.items()}


def difference(a: dict[str, Tensor], b: dict[str, Tensor], bound: float) -> Bound:
    """Compare tensors by name."""
    if a.keys() != b.keys():
        raise ValueError(f"names differ: {sorted(a.keys() ^ b.keys())[:3]}")
    return largest(((a[name].double() - b[name].double()).abs().max().item() for name in a), bound)


def check_plain(bench: Bench) -> Figures:
    """Compare the step with the plain one, which holds all logits and explicit attention maps."""
    sizes = argparse.Namespace(batch=2, out_dim=64 if bench.tiny else 65536, local_crops=2)
    network: dict[str, Any] = {"overrides": (DROP_PATH, "0.0")}
    if bench.tiny:
        network = {"arch": "swin", "flags": (*MICRO[2:], "--head_hidden_dim", "16"), "overrides": tuple(STILL_SWIN)}
    torch.manual_seed(0)
    crops = make_crops(2, 2)
    losses, weights = [], []
    for side in ("plain", "lean"):
        step = build_step(side, sizes, device=bench.device, **network)
        views = [crop.to(bench.device) for crop in crops]
        losses.append([step([views], i, 0)["loss"].item() for i in (50, 51)])
        weights.append(weights_of(step))
    yield "losses", largest((relative_error(a, b) for a, b in zip(*losses)), FP32)
    yield "weights", difference(weights[0], weights[1], 2e-4)


def check_overflow(bench: Bench) -> Figures:
    """Make the scaled gradients of an fp16 step overflow: it changes nothing and halves the scale; the next one trains."""
    step = tiny_step(bench.device, precision="fp16")
    views = tiny_views(bench.device, 0)
    step([views], 0, 0)  # creates the scale on the device
    step.scaler.update(2.0**120)
    before = weights_of(step)
    skipped = step([views], 1, 0)["skipped"].item()
    yield "not skipped", Bound(1 - skipped, 0)
    yield "changed", difference(before, weights_of(step), 0)
    yield "scale, in halves", Bound(abs(step.scaler.get_scale() / 2.0**119 - 1), 0)
    step.scaler.update(1.0)  # small enough for the large gradients of tiny heads
    yield "then skipped", Bound(step([views], 2, 0)["skipped"].item(), 0)
    yield "then unchanged", Bound(float(difference(before, weights_of(step), 0).holds), 0)


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
    crops, device_transform = split_views(CROPS, MEAN, STD, STRENGTH)
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
        yield key, difference(whole[key], resumed[key], 0)
    yield "untrained", Bound(float(difference(whole["student"], first["student"], 0).holds), 0)


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
    keys, queries, classes = (500, 100, 5) if bench.tiny else (100_000, 5_000, 100)
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
    losses: list[list[float]] = []
    with group_of_one(bench.device):
        wrapped = wrap(built) if wrap else tiny_step(bench.device, *words)
        yield "student", type(wrapped.method.student).__name__
        for step in (plain, wrapped):
            losses.append([step([tiny_views(bench.device, i)], i, 0)["loss"].item() for i in range(2)])
        yield "losses", largest((relative_error(a, b) for a, b in zip(*losses)), 1e-5)
        yield "weights", difference(weights_of(plain), weights_of(wrapped), 1e-5)


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
        return setup.build_step(main_esvit.get_args_parser().parse_args(words), method, 4, bench.device, "fp32")

    yield from compare_wrapped(bench, shard)
