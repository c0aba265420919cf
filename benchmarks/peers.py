"""Features of this project's recipe for small data beside those of lightly's DINO: same images, same network, same CPU time.

    pip install -r requirements-peers.txt
    python benchmarks/peers.py --data_path DIR --output_dir OUT --minutes 30 --seeds 3 -- FLAGS

DIR holds train/<class>/ and val/<class>/. FLAGS are those of main_esvit.py, for example of a recipe in experiments/small/. With
--minutes, the number of epochs is the largest that fits in this CPU time; without it, the epochs are those of FLAGS.

Each run is a process of its own on a CPU, and its CPU time is that of this process and its loader workers, from start to end. A run
of lightly gets the CPU time that this project's run of the same seed took. benchmarks/lightly_dino.py lists its settings.

The scores are k-NN top-1 accuracies on whole images, computed as by eval_knn.py --crop_ratio 1, on the images at odd positions of
each validation class. Those at even positions choose lightly's learning rate (all --lrs are trained with seed 0, the best one with
the other seeds) and, for each side, student or teacher. Marked rows are compared.

Results: `peers.json` in --output_dir, written after each run; the same command continues where it was stopped.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.peer_runs import Figures, plan_epochs, run_lightly, run_ours
from checkpoints import files
from config.arguments import main_esvit
from config.ranges import ABOVE_ZERO, COUNT, PIXELS, number
from distributed import launch
from eval_knn import extract as extract_features
from eval_knn import get_args_parser as knn_parser
from evaluation.features import NETWORK, UNTRAINED, LabeledFeatures
from evaluation.knn import Split, knn_scores
from utils import UsageError

OURS = "this project"
NETWORKS = ("student", "teacher")
KS, TEMPERATURE = (1, 20), 0.07
CHOSEN_BY = "20-NN"
TARGET = 3  # points ahead
CPU = torch.device("cpu")

Scores = dict[str, dict[str, float]]  # top-1 by half of the validation images and k


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(
        "benchmarks/peers.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data_path", required=True, metavar="DIR", help="folder with train/CLASS/ and val/CLASS/")
    add("--output_dir", required=True, metavar="OUT", help="folder of the runs and of peers.json")
    add("--minutes", type=number(0.01, 100_000), default=None, help="CPU time of a run; default: epochs of FLAGS")
    add("--seeds", type=COUNT, default=1, help="number of seeds, from 0")
    add("--lrs", type=ABOVE_ZERO, nargs="+", default=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2], help="of lightly")
    add("--image_size", type=PIXELS, default=None, help="of the scored images; default: MODEL.IMAGE_SIZE")
    add("--threads", type=COUNT, default=1, help="of each run")
    add("--jobs", type=COUNT, default=1, help="runs at a time")
    add("--tiny", action="store_true", help="two steps of lightly per run, to try the program")
    add("flags", nargs="*", metavar="-- FLAGS", help="flags of main_esvit.py")
    return parser


# --------------------------------------------------------------------------- the figures


class Record:
    """Settings, scores of the baselines and figures of all runs, in a file that is replaced at each change.

    Raises:
        UsageError: The file is damaged, or has other settings.
    """

    def __init__(self, path: Path, settings: Figures) -> None:
        self.path = path
        self.content: Figures = {"settings": settings, "baselines": {}, "runs": {}}
        if path.exists():
            try:
                self.content = files.parse_json(files.read_text(path))
                found = self.content["settings"]
            except (ValueError, KeyError, TypeError):
                raise UsageError(f"{path} is damaged; move it away, or choose another --output_dir") from None
            different = [name for name in settings if found.get(name) != settings[name]]
            if different:
                name = different[0]
                raise UsageError(
                    f"{path} has {name} {found.get(name)}, not {settings[name]}; choose another --output_dir"
                )

    def put(self, **parts: Any) -> None:
        """Add or replace parts of the file."""
        self.content |= parts
        with files.disk_errors(self.path.parent), files.atomic_write(self.path) as temporary:
            temporary.write_text(json.dumps(self.content, indent=2) + "\n")

    @property
    def runs(self) -> dict[str, Figures]:
        """Figures by the name of the run."""
        return self.content["runs"]


def run_name(method: str, seed: int) -> str:
    """Return the name of a run, which is also that of its folder."""
    return f"{method}, seed {seed}"


# --------------------------------------------------------------------------- scores


def halves(labels_N: Tensor) -> dict[str, Tensor]:
    """Return the images at even positions of each class, and those at odd ones."""
    position_N = torch.empty_like(labels_N)
    for label in labels_N.unique():
        of_class = labels_N == label
        position_N[of_class] = torch.arange(int(of_class.sum()))
    return {"choose": (position_N % 2 == 0).nonzero()[:, 0], "report": (position_N % 2 == 1).nonzero()[:, 0]}


def score(split: Split) -> Scores:
    """Return the k-NN accuracies on both halves of the validation images."""
    features_NC, labels_N = split.val
    parts = {name: LabeledFeatures(features_NC[half], labels_N[half]) for name, half in halves(labels_N).items()}
    return {
        name: {f"{found.k}-NN": found.top1 for found in knn_scores(Split(split.train, part), KS, TEMPERATURE)}
        for name, part in parts.items()
    }


def score_network(args: argparse.Namespace, *weights: str) -> dict[str, Scores]:
    """Return the scores of all features that eval_knn.py extracts with the flags `weights`."""
    ours = args.ours
    line = ["--data_path", args.data_path, "--arch", ours.arch, "--patch_size", str(ours.patch_size)]
    line += ["--cfg", ours.cfg] if ours.cfg else []
    line += ["--image_size", str(args.image_size)] if args.image_size else []
    line += ["--crop_ratio", "1", "--num_workers", "0", "--nb_knn", *map(str, KS), *weights, "--", *ours.opts]
    found = extract_features(knn_parser().parse_args(line), CPU, CPU, torch.float32)
    return {name: score(split) for name, split in found.splits.items()}


def score_run(args: argparse.Namespace, folder: Path) -> dict[str, Scores]:
    """Return the scores of student and teacher of a run."""
    weights = ("--pretrained_weights", str(folder / "checkpoint.pth"), "--checkpoint_key")
    return {network: score_network(args, *weights, network)[NETWORK] for network in NETWORKS}


# --------------------------------------------------------------------------- runs


def run_all(args: argparse.Namespace, record: Record, runs: Mapping[str, Callable[[Path], Figures]]) -> None:
    """Start the runs that the record lacks, --jobs at a time, and record each with its scores."""
    folders = {name: Path(args.output_dir) / name.replace(", ", "_").replace(" ", "_") for name in runs}
    missing = [name for name in runs if name not in record.runs]
    with ThreadPoolExecutor(args.jobs) as pool:
        for name, figures in zip(missing, pool.map(lambda name: runs[name](folders[name]), missing)):
            figures["scores"] = {} if figures["diverged"] else score_run(args, folders[name])
            record.put(runs=record.runs | {name: figures})
            print(f"{name}: {figures['cpu_seconds'] / 60:.2f} CPU minutes, {figures['epochs']:.1f} epochs", flush=True)


# --------------------------------------------------------------------------- the comparison


def best_of(record: Record, methods: list[str]) -> tuple[str, str]:
    """Return the method and the network with the best score on the choosing half, for seed 0.

    Raises:
        UsageError: All of them have diverged.
    """
    found = {
        (method, network): scores["choose"][CHOSEN_BY]
        for method in methods
        for network, scores in record.runs[run_name(method, 0)]["scores"].items()
    }
    if not found:
        raise UsageError(f"all of {'; '.join(methods)} diverged; choose smaller --lrs")
    return max(found, key=lambda key: found[key])


def rows_of(record: Record, methods: list[str], seeds: int) -> Iterator[Figures]:
    """Yield the rows of the table: means over the seeds of the scores on the reporting half."""
    for name, scores in record.content["baselines"].items():
        yield {"name": name, **scores["report"]}
    for method in methods:
        names = [run_name(method, seed) for seed in range(seeds)]
        runs = [record.runs[name] for name in names if name in record.runs]
        cost = {"epochs": mean_of(runs, "epochs"), "cpu_minutes": mean_of(runs, "cpu_seconds") / 60}
        if any(run["diverged"] for run in runs):
            yield {"name": f"{method}: diverged", **cost}
            continue
        for network in NETWORKS:
            scores = [run["scores"][network]["report"] for run in runs]
            means = {key: mean_of(scores, key) for key in scores[0]}
            yield {"name": f"{method}, {network}", **means, **cost, "by_seed": [one[CHOSEN_BY] for one in scores]}


def mean_of(figures: list[Figures], key: str) -> float:
    """Return the mean of one figure."""
    return float(np.mean([one[key] for one in figures]))


def verdict_of(rows: list[Figures], ours: str, theirs: str) -> Figures:
    """Return the difference of two rows of the table in points."""
    named = {row["name"]: row for row in rows}
    ahead = {f"{k}-NN": named[ours][f"{k}-NN"] - named[theirs][f"{k}-NN"] for k in KS}
    return {"ours": ours, "theirs": theirs, "points_ahead": ahead, "target": TARGET}


def report(rows: list[Figures], verdict: Figures) -> None:
    """Print the table and the verdict."""
    columns = {"1-NN": 7, "20-NN": 7, "epochs": 8, "cpu_minutes": 9}
    titles = "".join(f"{key.replace('cpu_minutes', 'CPU min'):>{width}}" for key, width in columns.items())
    print(f"\n{'  top-1, mean over seeds':30}{titles}   {CHOSEN_BY} by seed")
    for row in rows:
        mark = "*" if row["name"] in {verdict["ours"], verdict["theirs"]} else " "
        cells = "".join(f"{row[key]:{width}.2f}" if key in row else " " * width for key, width in columns.items())
        print(f"{mark} {row['name']:28}{cells}   {' '.join(f'{one:.1f}' for one in row.get('by_seed', []))}".rstrip())
    ahead = verdict["points_ahead"][CHOSEN_BY]
    print(
        f"{CHOSEN_BY}: {verdict['ours']} is {abs(ahead):.2f} points {'ahead of' if ahead >= 0 else 'behind'} {verdict['theirs']} "
        f"(target: {TARGET} ahead)"
    )


def compare(args: argparse.Namespace, record: Record) -> None:
    """Run and score both sides; print and record the table and the verdict."""
    if not record.content["baselines"]:
        baselines = score_network(args, "--random_weights", "--baselines")
        baselines[UNTRAINED] = baselines.pop(NETWORK)
        record.put(baselines=baselines, versions=files.package_versions(), git=files.git_revision())
    if "epochs" not in record.content:
        record.put(
            epochs=plan_epochs(args, Path(args.output_dir) / "calibration") if args.minutes else args.ours.epochs
        )
    seeds = range(args.seeds)
    ours = {run_name(OURS, seed): partial(run_ours, args, seed=seed, epochs=record.content["epochs"]) for seed in seeds}
    run_all(args, record, ours)

    def lightly(lr: float, seed: int) -> Callable[[Path], Figures]:
        seconds = record.runs[run_name(OURS, seed)]["cpu_seconds"]
        return partial(run_lightly, args, seed=seed, lr=lr, cpu_seconds=seconds)

    lrs = {f"lightly, lr {lr:g}": lr for lr in args.lrs}
    run_all(args, record, {run_name(method, 0): lightly(lr, 0) for method, lr in lrs.items()})
    best = best_of(record, list(lrs))
    run_all(args, record, {run_name(best[0], seed): lightly(lrs[best[0]], seed) for seed in seeds})
    rows = list(rows_of(record, [*lrs, OURS], args.seeds))
    verdict = verdict_of(rows, ", ".join(best_of(record, [OURS])), ", ".join(best))
    record.put(table=rows, verdict=verdict)
    report(rows, verdict)


def check_args(args: argparse.Namespace) -> None:
    """Raise a UsageError without lightly or without images that it reads."""
    if importlib.util.find_spec("lightly") is None:
        raise UsageError(
            "the comparison needs lightly, which is not installed; run pip install -r requirements-peers.txt"
        )
    for part in ("train", "val"):
        if not (Path(args.data_path) / part).is_dir():
            raise UsageError(f"--data_path {args.data_path} has no folder {part}; put images in {part}/CLASS/")


def main(args: argparse.Namespace) -> None:
    """Check the arguments, and compare."""
    args.ours = main_esvit.get_args_parser().parse_args(args.flags)
    check_args(args)
    torch.set_num_threads(args.threads)
    names = ("data_path", "minutes", "image_size", "threads", "tiny", "flags")
    with files.lock_folder(args.output_dir, "comparison"):
        record = Record(Path(args.output_dir) / "peers.json", {name: getattr(args, name) for name in names})
        compare(args, record)


if __name__ == "__main__":
    launch.run_script(lambda: main(get_args_parser().parse_args()))
