"""The part `fed` of benchmarks/gpu.py: what loader workers deliver, and what the device does with it before a step."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from PIL import Image

from benchmarks.augment import CROPS, MEAN, SIZE, STD, STRENGTH, make_jpegs
from benchmarks.gpu_fast import NETWORKS, cleared, seconds_per_step, sizes, step_name
from benchmarks.gpu_rows import Bench, Figures, Row
from data import convert
from data.datasets import build_dataset
from data.layouts.shards import build_stream
from data.loader import Batch, build_train_loader, set_epoch
from data.transforms.crops import split_views
from data.transforms.recipe import dino_recipe

LAYOUTS = ("files", "zip", "tsv", "shards")
BATCH = 32
COLUMNS = ("images/s of a worker", "workers for the step")


def rows(tiny: bool) -> list[Row]:
    """Return the rows in order of value."""
    row = partial(Row, "fed")
    return [
        *(row(f"JPEG 500 x 375, {layout}", 7, partial(feed, layout), columns=COLUMNS) for layout in LAYOUTS),
        row("uint8 crops to the device, and their colors", 5, send),
    ]


def write_jpegs(folder: Path, images: int) -> None:
    """Write photographs as JPEG files of 500 x 375 pixels, each several times, in class folders."""
    jpegs = make_jpegs(95, 2 if images < 20 else None)
    for number in range(images):
        path = folder / "train" / f"class{number % 4}" / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpegs[number % len(jpegs)])


def batches(layout: str, folder: Path, bench: Bench) -> Iterator[Batch]:
    """Write images in a layout, and iterate over a pass of one worker."""
    batch = 4 if bench.tiny else BATCH
    images = 12 if bench.tiny else 10 * batch
    write_jpegs(folder / "files", images)
    if layout != "files":
        words = [str(folder / "files"), str(folder / layout), "--to", layout]
        convert.main(convert.get_args_parser().parse_args(words))
    crops, device_transform = split_views(dino_recipe(CROPS, STRENGTH), MEAN, STD)
    dataset: Any
    if layout == "shards":
        dataset = build_stream(str(folder / layout), crops)
    else:
        dataset = build_dataset(folder / layout, "train", crops, layout=layout)
    loader = build_train_loader(
        dataset, batch, 1, bench.is_cuda, device_transform=device_transform if bench.is_cuda else None
    )
    set_epoch(loader, 0)
    return iter(loader)


def feed(layout: str, bench: Bench) -> Figures:
    """Measure a worker from its second batch on, and compare it with the measured step."""
    with tempfile.TemporaryDirectory() as folder:
        loader = batches(layout, Path(folder), bench)
        next(loader)
        start, images = time.perf_counter(), 0
        for batch in loader:
            images += len(batch.indices_B)
        rate = images / (time.perf_counter() - start)
        del loader
    yield COLUMNS[0], rate
    step = bench.known.get(step_name(NETWORKS[0], sizes(bench.tiny).batches[0]), {}).get("lean images/s")
    yield COLUMNS[1], step / rate if isinstance(step, float) else "step not measured"


def send(bench: Bench) -> Figures:
    """Measure the copy of the uint8 crops of a batch, and the color operations on them, in ms and as a share of the step."""
    size = sizes(bench.tiny).batches[0]
    crops, device_transform = split_views(dino_recipe(CROPS, STRENGTH), MEAN, STD)
    image = Image.effect_noise(SIZE, 64).convert("RGB")
    samples = [crops(image) for _ in range(size)]
    stacked = [torch.stack(part) for part in zip(*samples)]
    if bench.is_cuda:
        stacked = [tensor.pin_memory() for tensor in stacked]
    with cleared(bench.device):
        copying = seconds_per_step(lambda: [part.to(bench.device, non_blocking=True) for part in stacked], bench)
        whole = seconds_per_step(lambda: device_transform(stacked, bench.device), bench)
    megabytes = sum(tensor.nbytes for tensor in stacked) / 1e6
    yield f"copy of {megabytes:.0f} MB, ms", 1000 * copying
    yield "copy and colors, ms", 1000 * whole
    step = bench.known.get(step_name(NETWORKS[0], size), {}).get("lean images/s")
    if isinstance(step, float):
        yield "share of the step's time", whole * step / size
