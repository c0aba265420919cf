"""Cost of the index of a large dataset in each layout: time until it is ready, memory added by each further worker, and time until
the first batch.

    python benchmarks/dataset.py --entries 100000            # a minute
    python benchmarks/dataset.py                             # 1,000,000 entries: 10 minutes, 5 GB of disk, mostly directories

Images have one pixel. The baseline is a list of (path, label) tuples, as in torchvision's ImageFolder. The memory of a worker is
its private memory (/proc/PID/smaps_rollup) after reading its share of the entries, minus that of a worker without a dataset. Memory
shared with the parent by fork is not counted until it is written to; Python writes to the reference count of every object that it
accesses, so lists of objects are copied page by page, and arrays are not.

The time until the first batch is wall time from nothing to the first batch of a training loader with `--workers`, with the index
cached, and from the end of the first epoch, or of a part of it, to the first batch of the second.
"""

from __future__ import annotations

import argparse
import base64
import io
import multiprocessing
import multiprocessing.connection
import os
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from PIL import Image

from config.ranges import COUNT
from data.datasets import build_dataset
from data.decode import ImageLike
from data.layouts.folder_scan import SETTLE_NS
from data.layouts.index_cache import CACHE_VARIABLE
from data.layouts.shards import build_stream
from data.loader import build_train_loader, set_epoch
from distributed import launch

PER_FOLDER = 1000
TARGET = 50  # MB per worker
TARGET_SECONDS = 2
BATCH, BATCHES = 64, 20  # images of a batch, and batches of the first epoch before the second
ACCESSED = 2000  # maximum number of entries that a worker reads, evenly spaced
STREAMED = 2000  # images that a worker reads from shards


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of this benchmark."""
    parser = argparse.ArgumentParser(
        "benchmarks/dataset.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entries", type=COUNT, default=1_000_000)
    parser.add_argument("--folder", default=None, help="parent of the temporary folder; default: that of the system")
    parser.add_argument("--workers", type=COUNT, default=2)
    parser.add_argument("--layouts", nargs="+", choices=tuple(WRITERS), default=list(WRITERS))
    return parser


def tiny_image() -> bytes:
    """Return a PNG of one pixel."""
    with io.BytesIO() as buffer:
        Image.new("L", (1, 1), 128).save(buffer, "PNG")
        return buffer.getvalue()


def write_files(root: Path, entries: int, image: bytes) -> None:
    """Write class folders of hard links to one file each (the number of links to a file is limited)."""
    for number in range(entries):
        folder = root / "train" / f"n{number // PER_FOLDER:08}"
        if number % PER_FOLDER == 0:
            folder.mkdir(parents=True)
            (folder / "0.png").write_bytes(image)
        else:
            os.link(folder / "0.png", folder / f"n{number // PER_FOLDER:08}_{number:08}.png")


def write_zip(root: Path, entries: int, image: bytes) -> None:
    """Write train.zip and its map."""
    with zipfile.ZipFile(root / "train.zip", "w") as archive, (root / "train_map.txt").open("w") as lines:
        for number in range(entries):
            name = f"n{number // PER_FOLDER:08}/n{number // PER_FOLDER:08}_{number:08}.png"
            archive.writestr(zipfile.ZipInfo(name), image)
            lines.write(f"train.zip@/{name}\t{number // PER_FOLDER}\n")


def write_tsv(root: Path, entries: int, image: bytes) -> None:
    """Write train.tsv without its index."""
    text = base64.b64encode(image).decode()
    with (root / "train.tsv").open("w") as lines:
        for number in range(entries):
            lines.write(f"n{number:08}\t{number // PER_FOLDER}\t{text}\n")


def write_shards(root: Path, entries: int, image: bytes) -> None:
    """Write tar files of 10,000 images without sizes.json."""
    info = tarfile.TarInfo("0.png")
    info.size = len(image)
    for begin in range(0, entries, 10_000):
        with tarfile.open(root / f"train-{begin // 10_000:06}.tar", "w") as tar:
            for number in range(begin, min(begin + 10_000, entries)):
                info.name = f"{number:09}.png"
                tar.addfile(info, io.BytesIO(image))
                tar.members = []  # type: ignore[attr-defined]


WRITERS: dict[str, Callable[[Path, int, bytes], None]] = {
    "files": write_files, "zip": write_zip, "tsv": write_tsv, "shards": write_shards,
}  # fmt: skip


def no_view(image: ImageLike) -> list[torch.Tensor]:
    """Return one empty view."""
    return [torch.empty(0)]


class TupleList:
    """The index of torchvision's ImageFolder."""

    def __init__(self, root: Path) -> None:
        self.samples: list[tuple[str, int]] = []
        for label, folder in enumerate(sorted(os.scandir(root / "train"), key=lambda entry: entry.name)):
            self.samples += [
                (entry.path, label) for entry in sorted(os.scandir(folder.path), key=lambda entry: entry.name)
            ]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        path, label = self.samples[index]
        return Path(path).read_bytes(), label


def private_megabytes() -> float:
    """Return the private memory of this process."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024


def reader(dataset: Any, part: range, answer: multiprocessing.connection.Connection) -> None:
    """Read some entries in a worker, and send its private memory."""
    for index in part:
        dataset[index]
    if dataset is not None and not part:
        for _ in islice(dataset, STREAMED):
            pass
    answer.send(private_megabytes())


def worker_megabytes(dataset: Any, indexed: bool) -> float:
    """Return the private memory of a forked worker that has read entries, minus that of an idle one."""
    found = []
    for wanted in (None, dataset):
        step = max(1, len(dataset) // ACCESSED)
        part = range(0, len(dataset), step) if indexed and wanted is not None else range(0)
        here, there = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=reader, args=(wanted, part, there))
        process.start()
        there.close()  # so that recv fails if the worker dies
        found.append(here.recv())
        process.join()
    return found[1] - found[0]


def timed(make: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return the result of a call, its CPU time and its wall time."""
    cpu, wall = time.process_time(), time.perf_counter()
    made = make()
    return made, time.process_time() - cpu, time.perf_counter() - wall


def report(name: str, make: Callable[[], Any], indexed: bool = True) -> tuple[float, float]:
    """Print a row; return wall time in seconds and memory in megabytes."""
    dataset, cpu, wall = timed(make)
    megabytes = worker_megabytes(dataset, indexed)
    print(f"{name:34} {cpu:7.1f} s CPU time {wall:7.1f} s wall time {megabytes:8.1f} MB per further worker", flush=True)
    return wall, megabytes


def report_first_batch(name: str, make: Callable[[], Any], workers: int) -> float:
    """Print the seconds until the first batch of the first and of the second epoch; return the larger number."""
    start = time.perf_counter()
    loader = build_train_loader(make(), BATCH, workers, pin_memory=False)
    seconds = []
    for epoch in range(2):
        set_epoch(loader, epoch)
        batches = iter(loader)
        next(batches)
        seconds.append(time.perf_counter() - start)
        for _ in islice(batches, BATCHES):
            pass
        start = time.perf_counter()
    print(f"{name:34} first batch after {seconds[0]:.2f} s, of the second epoch after {seconds[1]:.2f} s", flush=True)
    return max(seconds)


def main(args: argparse.Namespace) -> None:
    """Write each layout, index it without and with a cache, and print the cost."""
    image, worst, slowest, rows = tiny_image(), 0.0, 0.0, {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        os.environ[CACHE_VARIABLE] = f"{folder}/cache"
        for layout in args.layouts:
            root = Path(folder) / layout
            root.mkdir()
            WRITERS[layout](root, args.entries, image)
        time.sleep(1.5 * SETTLE_NS / 1e9)  # folders modified just before a scan are not cached
        print(f"{args.entries} entries; read by each worker: {min(args.entries, ACCESSED)}")
        if "files" in args.layouts:
            rows["tuples"] = report("files, list of tuples", lambda: TupleList(root=Path(folder) / "files"))
        for layout in args.layouts:
            for start in ("first", "second"):
                root = Path(folder) / layout

                def make(root: Path = root, layout: str = layout) -> Any:
                    if layout == "shards":
                        return build_stream(str(root), no_view)
                    return build_dataset(root, "train", no_view, layout=layout)

                rows[f"{layout} {start}"] = report(f"{layout}, {start} start", make, indexed=layout != "shards")
                worst = max(worst, rows[f"{layout} {start}"][1])
            slowest = max(slowest, report_first_batch(f"{layout}, {args.workers} workers", make, args.workers))
    if "files" in args.layouts:
        print(
            f"files, second start / list of tuples: {rows['files second'][0] / rows['tuples'][0]:.2f} of the time, "
            f"{rows['files second'][1] / max(rows['tuples'][1], 0.1):.2f} of the memory"
        )
    print(f"maximum memory of a further worker: {worst:.1f} MB (target: below {TARGET})")
    print(f"maximum time until the first batch: {slowest:.2f} s (target: below {TARGET_SECONDS})")


if __name__ == "__main__":
    launch.run_script(lambda: main(get_args_parser().parse_args()))
