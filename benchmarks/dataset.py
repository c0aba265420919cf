"""What the index of a large data set costs in each layout: seconds until it is ready, and memory of each further worker.

    python benchmarks/dataset.py --entries 100000            # a minute
    python benchmarks/dataset.py                             # 1,000,000 entries: 10 minutes, 5 GB of disk, mostly directories

Every entry is a tiny image, so sizes of images play no part. Beside this project's index stands the plain one: a list of
(path, label) tuples, as torchvision's ImageFolder keeps it. Memory of a worker is what the kernel counts as private to it
(/proc/PID/smaps_rollup) after it has read its share of the entries, over that of a worker which reads from no data set: what forked
workers share with their parent does not count until they touch it. Python touches every object it looks at, so lists of objects are
copied page by page, arrays are not.

Origin: this project's own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import multiprocessing.connection
import os
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from config.ranges import COUNT

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import base64
import io
import tarfile

import torch
from PIL import Image

from data.datasets import build_dataset
from data.decode import ImageLike
from data.layouts.folder_scan import SETTLE_NS
from data.layouts.index_cache import CACHE_VARIABLE
from data.layouts.shards import build_stream
from distributed import launch

PER_FOLDER = 1000
TARGET = 50  # MB of each further worker
TOUCHED = 2000  # entries that a worker looks up at most, evenly spread
STREAMED = 2000  # of shards, from the first on


def get_args_parser() -> argparse.ArgumentParser:
    """How many entries, and where."""
    parser = argparse.ArgumentParser(
        "benchmarks/dataset.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--entries", type=COUNT, default=1_000_000)
    parser.add_argument("--folder", default=None, help="where to write; default: a temporary folder")
    parser.add_argument("--layouts", nargs="+", default=["files", "zip", "tsv", "shards"])
    return parser


def tiny_image() -> bytes:
    """A PNG of one pixel."""
    with io.BytesIO() as buffer:
        Image.new("L", (1, 1), 128).save(buffer, "PNG")
        return buffer.getvalue()


def write_files(root: Path, entries: int, image: bytes) -> None:
    """Class folders of hard links to a few files (a file system allows so many links to one)."""
    for number in range(entries):
        folder = root / "train" / f"n{number // PER_FOLDER:08}"
        if number % PER_FOLDER == 0:
            folder.mkdir(parents=True)
            (folder / "0.png").write_bytes(image)
        else:
            os.link(folder / "0.png", folder / f"n{number // PER_FOLDER:08}_{number:08}.png")


def write_zip(root: Path, entries: int, image: bytes) -> None:
    """train.zip and its map."""
    with zipfile.ZipFile(root / "train.zip", "w") as archive, (root / "train_map.txt").open("w") as lines:
        for number in range(entries):
            name = f"n{number // PER_FOLDER:08}/n{number // PER_FOLDER:08}_{number:08}.png"
            archive.writestr(zipfile.ZipInfo(name), image)
            lines.write(f"train.zip@/{name}\t{number // PER_FOLDER}\n")


def write_tsv(root: Path, entries: int, image: bytes) -> None:
    """train.tsv without its index."""
    text = base64.b64encode(image).decode()
    with (root / "train.tsv").open("w") as lines:
        for number in range(entries):
            lines.write(f"n{number:08}\t{number // PER_FOLDER}\t{text}\n")


def write_shards(root: Path, entries: int, image: bytes) -> None:
    """Tars of 10,000 images without sizes.json."""
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
    """Of an image that is looked up only."""
    return []


class Plain:
    """What torchvision's ImageFolder keeps."""

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
    """Memory that this process shares with none."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private")) / 1024


def reader(dataset: Any, part: range, answer: multiprocessing.connection.Connection) -> None:
    """A worker: looks up its part and tells its private memory."""
    for index in part:
        dataset[index]
    if dataset is not None and not part:
        for _ in islice(dataset, STREAMED):
            pass
    answer.send(private_megabytes())


def worker_megabytes(dataset: Any, indexed: bool) -> float:
    """Private memory of a forked worker after it read its entries (or the first of a stream), over that of an idle one."""
    found = []
    for wanted in (None, dataset):
        step = max(1, len(dataset) // TOUCHED)
        part = range(0, len(dataset), step) if indexed and wanted is not None else range(0)
        here, there = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=reader, args=(wanted, part, there))
        process.start()
        there.close()  # so that a worker that dies is noticed
        found.append(here.recv())
        process.join()
    return found[1] - found[0]


def timed(make: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it makes, and the seconds of the CPU and on the wall."""
    cpu, wall = time.process_time(), time.perf_counter()
    made = make()
    return made, time.process_time() - cpu, time.perf_counter() - wall


def report(name: str, make: Callable[[], Any], indexed: bool = True) -> tuple[float, float]:
    """Print a row; returns seconds on the wall and megabytes."""
    dataset, cpu, wall = timed(make)
    megabytes = worker_megabytes(dataset, indexed)
    print(
        f"{name:34} {cpu:7.1f} s of the CPU {wall:7.1f} s on the wall {megabytes:8.1f} MB each further worker",
        flush=True,
    )
    return wall, megabytes


def main(args: argparse.Namespace) -> None:
    """Write each layout, index it twice (the second time from what the first kept), and print what it costs."""
    image, worst, rows = tiny_image(), 0.0, {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        os.environ[CACHE_VARIABLE] = f"{folder}/cache"
        for layout in args.layouts:
            root = Path(folder) / layout
            root.mkdir()
            WRITERS[layout](root, args.entries, image)
        time.sleep(1.5 * SETTLE_NS / 1e9)  # a folder that changed a moment ago is not believed to be the same
        print(f"{args.entries} entries; looked up by a worker: {min(args.entries, TOUCHED)}")
        if "files" in args.layouts:
            rows["plain"] = report("files, list of tuples", lambda: Plain(root=Path(folder) / "files"))
        for layout in args.layouts:
            for start in ("first", "second"):
                root = Path(folder) / layout

                def make(root: Path = root, layout: str = layout) -> Any:
                    if layout == "shards":
                        return build_stream(str(root), no_view)
                    return build_dataset(root, "train", no_view, layout=layout)

                rows[f"{layout} {start}"] = report(f"{layout}, {start} start", make, indexed=layout != "shards")
                worst = max(worst, rows[f"{layout} {start}"][1])
    if "files" in args.layouts:
        print(
            f"files, second start / plain: {rows['files second'][0] / rows['plain'][0]:.2f} of the time, "
            f"{rows['files second'][1] / max(rows['plain'][1], 0.1):.2f} of the memory"
        )
    print(f"most memory of a further worker: {worst:.1f} MB (target: below {TARGET})")


if __name__ == "__main__":
    launch.run_script(lambda: main(get_args_parser().parse_args()))
