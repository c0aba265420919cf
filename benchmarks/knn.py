"""Time and peak memory of the chunked k-NN vote (evaluation/knn.py) against the published implementation with one-hot votes.

    python benchmarks/knn.py                                                # full size, some minutes
    python benchmarks/knn.py --keys 20000 --queries 500 --classes 100       # smaller; memory is meaningful at full size only

Both sides compute the accuracies of all values of k from the same features: noisy class centers, ordered by class. The plain side
follows the published scripts. For each k it computes the similarities of a hundredth of the queries to all keys, the k best of
them, and votes as a product with a one-hot tensor (queries, k, classes).

Each side runs in its own process. Peak memory is `ru_maxrss` at the end minus the resident memory after loading the features and a
warm-up.

Origin: the plain side follows the protocol of DINO (Caron et al., ICCV 2021), section 4.1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from config.ranges import COUNT
from distributed import launch
from evaluation.features import LabeledFeatures
from evaluation.knn import Split, knn_scores

SIDES = ("plain", "chunked")
PLAIN_CHUNKS = 100  # of the queries, as published
TEMPERATURE = 0.07
TARGETS = (4.0, 0.2)  # times faster, share of the peak memory

Accuracies = list[tuple[float, float]]  # top-1 and top-5 for each k


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser; --side is set by the process that starts both sides."""
    parser = argparse.ArgumentParser(
        "benchmarks/knn.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--keys", type=COUNT, default=200_000)
    parser.add_argument("--queries", type=COUNT, default=5_000)
    parser.add_argument("--width", type=COUNT, default=384)
    parser.add_argument("--classes", type=COUNT, default=1_000)
    parser.add_argument("--nb_knn", type=COUNT, nargs="+", default=[10, 20, 100, 200])
    parser.add_argument("--threads", type=COUNT, default=1)
    parser.add_argument("--side", choices=("both", "data", *SIDES), default="both")
    parser.add_argument("--folder", default=None, help="of the features; default: a temporary one")
    return parser


def make_features(args: argparse.Namespace, folder: Path) -> None:
    """Write random features and labels of keys and queries."""
    torch.manual_seed(0)
    centers = torch.randn(args.classes, args.width)
    for name, count in (("train", args.keys), ("val", args.queries)):
        labels = torch.randint(args.classes, (count,)).sort().values
        features = F.normalize(centers[labels] + 4 * torch.randn(count, args.width), dim=-1)
        np.save(folder / f"{name}feat.npy", features.numpy())
        np.save(folder / f"{name}labels.npy", labels.numpy())


def load_split(folder: Path) -> Split:
    """Load what `make_features` wrote."""
    names = [[folder / f"{part}{kind}.npy" for kind in ("feat", "labels")] for part in ("train", "val")]
    return Split(*(LabeledFeatures(*(torch.from_numpy(np.load(name)) for name in pair)) for pair in names))


def plain(split: Split, ks: list[int], classes: int) -> Accuracies:
    """Return the accuracies as computed by the published scripts."""
    (keys, labels), (all_queries, all_truths) = split
    size = max(len(all_queries) // PLAIN_CHUNKS, 1)
    accuracies = []
    for k in ks:
        top1 = top5 = 0.0
        one_hot = torch.zeros(k, classes)
        for queries, truth in zip(all_queries.split(size), all_truths.split(size)):
            similarity, nearest = (queries @ keys.T).topk(k, largest=True, sorted=True)
            voters = labels.expand(len(queries), -1).gather(1, nearest)
            one_hot.resize_(len(queries) * k, classes).zero_()
            one_hot.scatter_(1, voters.view(-1, 1), 1)
            weight = (similarity / TEMPERATURE).exp()
            votes = (one_hot.view(len(queries), k, classes) * weight.unsqueeze(2)).sum(dim=1)
            correct = votes.sort(dim=1, descending=True).indices == truth[:, None]
            top1 += correct[:, :1].sum().item()
            top5 += correct[:, :5].sum().item()
        accuracies.append((100 * top1 / len(all_queries), 100 * top5 / len(all_queries)))
    return accuracies


def chunked(split: Split, ks: list[int], classes: int) -> Accuracies:
    """Return the accuracies of evaluation/knn.py."""
    return [(score.top1, score.top5) for score in knn_scores(split, ks, TEMPERATURE)]


def resident_mb() -> float:
    """Return the resident memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def run_side(args: argparse.Namespace, folder: Path) -> None:
    """Measure one side and print the results as JSON."""
    vote = {"plain": plain, "chunked": chunked}[args.side]
    split = load_split(folder)
    vote(Split(*(LabeledFeatures(part.features_NC[:300], part.labels_N[:300]) for part in split)), [5], args.classes)
    before = resident_mb()
    start, cpu_start = time.perf_counter(), time.process_time()
    accuracies = vote(split, args.nb_knn, args.classes)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    peak = utils.peak_memory_mb(torch.device("cpu")) - before
    figures = {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mb": peak, "resident_mb": before}
    print(json.dumps(figures | {"accuracies": accuracies}))


def start_side(args: argparse.Namespace, side: str, folder: Path) -> str:
    """Run this program for one side in a new process, and return its output."""
    sizes = [f"--{name}={getattr(args, name)}" for name in ("keys", "queries", "width", "classes", "threads")]
    command = [
        sys.executable,
        __file__,
        *sizes,
        "--side",
        side,
        "--folder",
        str(folder),
        "--nb_knn",
        *map(str, args.nb_knn),
    ]
    threads = {"OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads)}
    return subprocess.run(command, env=os.environ | threads, check=True, stdout=subprocess.PIPE, text=True).stdout


def compare(args: argparse.Namespace) -> None:
    """Run both sides and print their results and ratios."""
    with tempfile.TemporaryDirectory() as folder:
        start_side(args, "data", Path(folder))
        figures = {side: json.loads(start_side(args, side, Path(folder))) for side in SIDES}
    print(
        f"{args.queries} queries among {args.keys} keys of width {args.width}, {args.classes} classes, "
        f"k {' '.join(map(str, args.nb_knn))}, float32, {args.threads} thread(s)"
    )
    for side, figure in figures.items():
        accuracies = "  ".join(f"{top1:.2f}/{top5:.2f}" for top1, top5 in figure["accuracies"])
        print(
            f"{side:8} {figure['seconds']:7.1f} s ({figure['cpu_seconds']:.1f} s of the CPU)   "
            f"peak {figure['peak_mb']:7.1f} MiB above {figure['resident_mb']:.0f} MiB   top-1/top-5 {accuracies}"
        )
    ratio = {key: figures["plain"][key] / figures["chunked"][key] for key in ("seconds", "cpu_seconds", "peak_mb")}
    print(
        f"chunked is {ratio['seconds']:.2f}x faster, by CPU time {ratio['cpu_seconds']:.2f}x (target: {TARGETS[0]}x) "
        f"with {1 / ratio['peak_mb']:.3f} of the peak memory (target: {TARGETS[1]})"
    )


def main(args: argparse.Namespace) -> None:
    """Compare both sides, or run the one that --side names."""
    torch.set_num_threads(args.threads)
    if args.side == "both":
        compare(args)
    elif args.side == "data":
        make_features(args, Path(args.folder))
    else:
        run_side(args, Path(args.folder))


if __name__ == "__main__":
    launch.run_script(lambda: main(get_args_parser().parse_args()))
