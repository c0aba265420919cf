"""The part `fast` of benchmarks/gpu.py: speed and memory of whole steps in bf16, beside what they are compared with."""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

import utils
from benchmarks.golden import MICRO
from benchmarks.gpu_rows import Bench, Bound, Figures, Row
from benchmarks.memory import GB, fit_peak
from benchmarks.rows import ROWS
from benchmarks.sides import build_step, build_timm, make_crops
from models import load_arch_config

# Networks in order of value.
NETWORKS = (
    "Swin-T, window 7", "Swin-B, window 7", "Swin-T, window 14", "DeiT-S/16", "Swin-S, window 7", "ResNet-50", "ViL, window 7",
    "CvT, window 7",
)  # fmt: skip
BATCHES = (64, 32, 128)  # in order of value
TIMM_GOAL, PLAIN_GOAL, IDLE_GOAL, MEMORY_GOAL = 1.35, 1 / 1.5, 0.05, 0.10
WARM_UP_STEPS, ROUNDS, SECONDS = 3, 3, 0.5  # of a measurement: steps before it, rounds, and time of a round
PROFILED_STEPS = 5
WAITING_CALLS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
COLUMNS = (
    "lean images/s",
    "timm images/s",
    "plain images/s",
    "lean / timm time",
    "lean / plain time",
    "lean GB",
    "plain GB",
)


class Sizes(NamedTuple):
    """Sizes of the measured steps."""

    batches: tuple[int, ...] = BATCHES
    out_dim: int = 65536
    local_crops: int = 8


class Network(NamedTuple):
    """A network for `build_step`, and the one of timm that it is compared with."""

    arch: str
    flags: tuple[str, ...]
    overrides: tuple[str, ...]
    timm_name: str | None
    timm_settings: dict[str, Any]


def sizes(tiny: bool) -> Sizes:
    """Return the sizes of the steps."""
    return Sizes((2,), 64, 2) if tiny else Sizes()


def network(name: str, tiny: bool) -> Network:
    """Return a published network, or a micro Swin in its place."""
    if not tiny:
        row = ROWS[name]
        return Network(row.arch, (), row.overrides, row.timm_name, {})
    small = {"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2)}
    overrides = ("MODEL.SPEC.DIM_EMBED", "12", "MODEL.SPEC.DEPTHS", "[1,1]", "MODEL.SPEC.NUM_HEADS", "[1,2]")
    flags = (*MICRO[2:], "--head_hidden_dim", "16", "--head_bottleneck_dim", "8")
    return Network("swin", flags, overrides, ROWS[name].timm_name, small)


def step_name(name: str, batch: int) -> str:
    """Return the name of the row of a whole step."""
    return f"{name}, batch {batch}"


def rows(tiny: bool) -> tuple[list[Row], list[Row]]:
    """Return the rows in order of value: those that must not be missed, and those that follow if time is left."""
    row, batches = partial(Row, "fast"), sizes(tiny).batches
    names = NETWORKS[:1] if tiny else NETWORKS

    def step(name: str, batch: int) -> Row:
        return row(step_name(name, batch), 14, partial(measure_steps, name, batch), columns=COLUMNS)

    first = [
        step(names[0], batches[0]),
        row(f"profile of {step_name(names[0], batches[0])}", 12, profile_step, needs_cuda=True),
        row(f"memory of {names[0]}", 45, partial(compare_memory, names[0]), needs_cuda=True),
        *(step(name, batches[0]) for name in names[1:]),
    ]
    later = [
        row(f"{step_name(names[0], batches[0])}, --compile", 90, partial(measure_compiled, names[0], batches[0])),
        *(step(name, batch) for batch in batches[1:] for name in names),
        *(row(f"memory of {name}", 60, partial(compare_memory, name), needs_cuda=True) for name in names[1:]),
        *(
            row(f"{step_name(name, batches[0])}, --compile", 120, partial(measure_compiled, name, batches[0]))
            for name in names[1:]
        ),
    ]
    return first, later[1:] if tiny else later


# --------------------------------------------------------------------------- one side


def build_side(side: str, name: str, bench: Bench, batch: int = 32) -> Callable[[list[Tensor]], object]:
    """Return a function that runs a step of a side on crops: lean, plain, compiled or timm."""
    net, size = network(name, bench.tiny), sizes(bench.tiny)
    if side == "timm":
        assert net.timm_name
        spec = load_arch_config(net.arch, net.flags[1] if net.flags else None, list(net.overrides)).MODEL.SPEC
        drop_path = float(spec.get("DROP_PATH_RATE", 0.0))
        return build_timm(precision_of(bench), drop_path, net.timm_name, bench.device, **net.timm_settings)
    args = argparse.Namespace(batch=batch, out_dim=size.out_dim, local_crops=size.local_crops)
    flags = (*net.flags, *(("--compile", "on") if side == "compiled" else ()))
    step = build_step(
        "plain" if side == "plain" else "lean", args, arch=net.arch, precision=precision_of(bench), flags=flags,
        overrides=net.overrides, device=bench.device,
    )  # fmt: skip
    return lambda crops: step([crops], 0, 0)


def crops_of(batch: int, bench: Bench) -> list[Tensor]:
    """Return random crops on the device."""
    return make_crops(batch, sizes(bench.tiny).local_crops, bench.device)


def precision_of(bench: Bench) -> str:
    """Return the precision of the steps: bf16 unless it would be emulated."""
    return utils.resolve_precision("auto", bench.device)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_per_step(work: Callable[[], object], bench: Bench) -> float:
    """Return the time of a step: the best round of as many steps as fit in `SECONDS`."""

    def round_of(steps: int) -> float:
        synchronize(bench.device)
        start = time.perf_counter()
        for _ in range(steps):
            work()
        synchronize(bench.device)
        return (time.perf_counter() - start) / steps

    if bench.tiny:
        return min(round_of(1) for _ in range(2))
    round_of(WARM_UP_STEPS - 1)
    steps = max(int(SECONDS / round_of(1)), 1)
    return min(round_of(steps) for _ in range(ROUNDS))


@contextmanager
def cleared(device: torch.device) -> Iterator[None]:
    """Free what the block leaves on a GPU, and reset the peak of memory before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        yield
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measure(side: str, name: str, batch: int, bench: Bench) -> tuple[float, float | None] | None:
    """Return seconds and peak gigabytes (on a GPU) of a side, None if the memory is not enough."""
    try:
        with cleared(bench.device):
            run, crops = build_side(side, name, bench, batch), crops_of(batch, bench)
            seconds = seconds_per_step(lambda: run(crops), bench)
            peak = torch.cuda.max_memory_allocated(bench.device) / GB if bench.is_cuda else None
    except Exception as error:
        if utils.lack_of_memory(error) is None:
            raise
        return None
    return seconds, peak


# --------------------------------------------------------------------------- rows


def measure_steps(name: str, batch: int, bench: Bench) -> Figures:
    """Measure the lean step, timm's backbone if it has the network, and the plain step."""
    seconds: dict[str, float] = {}
    for side in ("lean", *(("timm",) if network(name, bench.tiny).timm_name else ()), "plain"):
        found = measure(side, name, batch, bench)
        if found is None:
            yield f"{side} images/s", "out of memory"
            continue
        seconds[side], peak = found
        yield f"{side} images/s", batch / seconds[side]
        if peak is not None:
            yield f"{side} GB", peak
        for other, goal in (("timm", TIMM_GOAL), ("plain", PLAIN_GOAL)):
            if side == other and "lean" in seconds:
                ratio = seconds["lean"] / seconds[other]
                yield f"lean / {other} time", Bound(ratio, goal) if bench.is_cuda else ratio


def measure_compiled(name: str, batch: int, bench: Bench) -> Figures:
    """Measure the lean step with --compile."""
    run, crops = build_side("compiled", name, bench, batch), crops_of(batch, bench)
    start = time.perf_counter()
    run(crops)
    synchronize(bench.device)
    yield "first step s", time.perf_counter() - start
    seconds = seconds_per_step(lambda: run(crops), bench)
    yield "images/s", batch / seconds
    lean = bench.known.get(step_name(name, batch), {}).get("lean images/s")
    if isinstance(lean, float):
        yield "compiled / lean time", seconds * lean / batch


def profile_step(bench: Bench) -> Figures:
    """Profile lean and plain steps of the first network: idle share of the GPU, kernels and waits of the host."""
    kernels = {}
    for side in ("lean", "plain"):
        with cleared(bench.device):
            run, crops = build_side(side, NETWORKS[0], bench), crops_of(sizes(bench.tiny).batches[0], bench)
            for _ in range(WARM_UP_STEPS):
                run(crops)
            synchronize(bench.device)
            activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
            with torch.profiler.profile(activities=activities) as profile:
                for _ in range(PROFILED_STEPS):
                    run(crops)
                synchronize(bench.device)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "trace.json"
                profile.export_chrome_trace(str(path))
                events = json.loads(path.read_text())["traceEvents"]
        found = summarize(events, PROFILED_STEPS)
        kernels[side] = found.kernels
        yield f"{side} idle", Bound(found.idle, IDLE_GOAL) if side == "lean" else found.idle
        yield f"{side} kernels", found.kernels
        yield f"{side} waits", found.waits
        if side == "lean":
            yield "where the time goes", ", ".join(f"{name} {share:.0%}" for name, share in found.largest)
    yield "lean / plain kernels", Bound(kernels["lean"] / kernels["plain"], 0.5)


class Profile(NamedTuple):
    """What a trace says about a step."""

    idle: float  # share of the time between the first and the last kernel in which none runs
    kernels: float  # with copies and fills
    waits: float  # calls of the host that wait for the device
    largest: list[tuple[str, float]]  # kernels with the largest shares of the busy time


def summarize(events: Sequence[dict[str, Any]], steps: int) -> Profile:
    """Summarize a Chrome trace of `steps` steps, which end with one wait that is not theirs."""
    on_device = [e for e in events if e.get("cat") in {"kernel", "gpu_memcpy", "gpu_memset"} and e.get("ph") == "X"]
    if not on_device:
        raise ValueError("the trace has no kernels")
    spans = sorted((float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in on_device)
    busy, end = 0.0, spans[0][0]
    for first, last in spans:  # kernels of several streams may overlap
        busy += max(last - max(first, end), 0.0)
        end = max(end, last)
    waits = sum(e.get("cat") in {"cuda_runtime", "cuda_driver"} and e["name"] in WAITING_CALLS for e in events)
    times: Counter[str] = Counter()
    for event in on_device:
        times[event["name"].split("<")[0][:40]] += event["dur"]
    total = sum(times.values())
    largest = [(name, time_of / total) for name, time_of in times.most_common(5)]
    return Profile(1 - busy / (end - spans[0][0]), len(on_device) / steps, max(waits - 1, 0) / steps, largest)


# --------------------------------------------------------------------------- memory


def compare_memory(name: str, bench: Bench) -> Figures:
    """Compare the peaks and the largest batch that the simulation predicts (benchmarks/memory.py) with those of the device."""
    net, size = network(name, bench.tiny), sizes(bench.tiny)
    args = argparse.Namespace(out_dim=size.out_dim, local_crops=size.local_crops, precision=precision_of(bench))
    predicted = fit_peak(args, "lean", arch=net.arch, flags=net.flags, overrides=net.overrides)
    for batch in sorted(size.batches):
        known = bench.known.get(step_name(name, batch), {}).get("lean GB")
        found = measure("lean", name, batch, bench) if known is None else (0.0, known)
        if found is None or not isinstance(found[1], float):
            yield f"GB at batch {batch}", "out of memory"
            continue
        yield f"GB at batch {batch}", found[1]
        yield f"predicted GB at batch {batch}", predicted.at(batch) / GB
        yield f"error at batch {batch}", Bound(abs(predicted.at(batch) / GB / found[1] - 1), MEMORY_GOAL)
    with cleared(bench.device):
        free, _ = torch.cuda.mem_get_info(bench.device)
        guess = predicted.largest_batch(free)
        yield f"predicted largest batch in {free / GB:.1f} GB", float(guess)
        run = build_side("lean", name, bench)
        largest = largest_batch(lambda batch: fits(run, batch, bench), guess)
    yield "largest batch", float(largest)
    yield "error of the largest batch", Bound(abs(guess / max(largest, 1) - 1), MEMORY_GOAL)


def fits(run: Callable[[list[Tensor]], object], batch: int, bench: Bench) -> bool:
    """Run two steps, and return whether the memory is enough."""
    try:
        with cleared(bench.device):
            crops = crops_of(batch, bench)
            for _ in range(2):
                run(crops)
            synchronize(bench.device)
    except Exception as error:
        if utils.lack_of_memory(error) is None:
            raise
        return False
    return True


def largest_batch(fitting: Callable[[int], bool], guess: int, tolerance: float = 0.02) -> int:
    """Return the largest batch below twice the guess that fits, to a tolerance: first 10 % around the guess, then by halves."""
    low, high, batch = 0, 2 * guess, guess
    while high - low > max(tolerance * guess, 1):
        if fitting(batch):
            low, batch = batch, round(1.1 * guess)
        else:
            high, batch = batch, round(0.9 * guess)
        if not low < batch < high:
            batch = (low + high) // 2
    return low
