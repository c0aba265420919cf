"""Fuzz the command lines: wrong, negative, zero, huge and non-finite values for every flag and config key of every script.

    python -m tools.fuzz_cli                           # all cases, about half an hour
    python -m tools.fuzz_cli --share 0.02 --seed 1     # a random sample
    python -m tools.fuzz_cli --only eval_knn           # one script

A case is a command line on tiny images, run through the script's parser and `main` in a fork of this process. It may finish, run
until --seconds have passed, or end with one line on stderr and code 2 (1 if the training diverged). Anything else is a failure,
shown with its traceback; after one the program ends with code 1. Memory is limited, so that the allocator rejects huge sizes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

import compare_runs
import eval_finetune
import eval_knn
import eval_linear
import eval_logistic
import eval_segmentation
import eval_video
import export
import extract_features
import main_esvit
import main_esvit_mnodes
import main_udi
import run_analysis
from config import arguments
from config.ranges import ABOVE_ZERO, COUNT, SEED, Range, number
from config.schema import SCHEMA, arch_specs
from data import convert
from distributed import launch

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = (
    *("", "x", "nan", "inf", "-inf", "-1", "0", "1", "0.5", "-0.5", "1e-9", "1e30", "1e400", "99999999999", "0x10"),
    *("1" + "0" * 30, "9" * 5000),
)
TEXTS = (
    "", "nonsense", "no/such/place", "/proc/x", "/dev/null", "n" * 5000, "{0..999999999}.tar", "pipe:false", "\udcff",
)  # fmt: skip
CRASHED = 70  # exit code that no script uses
BOOLEANS = ("", "maybe", "2", "on", "off")
YAMLS = (".nan", ".inf", "[]", "{}", "[.nan]", "[[1]]", "null", "true", "2020-99-99", "[" * 900, "{a: " * 900)
SWIN = (
    "MODEL.IMAGE_SIZE", "32", "MODEL.SPEC.DIM_EMBED", "12", "MODEL.SPEC.DEPTHS", "[1,2]", "MODEL.SPEC.NUM_HEADS", "[1,2]",
    "MODEL.SPEC.WINDOW_SIZE", "4",
)  # fmt: skip
VIT = ("MODEL.IMAGE_SIZE", "32", "MODEL.SPEC.DIM_EMBED", "16", "MODEL.SPEC.DEPTH", "2", "MODEL.SPEC.NUM_HEADS", "2")
NETWORKS = {  # by MODEL.NAME: the architecture, and its yaml under experiments/demo
    "swin_transformer": ("swin", "swin_micro"),
    "cvt_v4_transformer": ("cvt_tiny", "cvt_micro"),
    "vision_longformer": ("vil", "vil_micro"),
    "vision_transformer": ("vit", "vit_micro"),
    "resnet": ("resnet18", "resnet_micro"),
}


class Case(NamedTuple):
    """A command line of a script."""

    script: ModuleType
    words: tuple[str, ...]
    tail: tuple[str, ...] = ()  # KEY VALUE pairs, after all flags


# --------------------------------------------------------------------------- command lines on tiny images


def write_inputs(folder: Path) -> None:
    """Write images of two classes, images with masks, a video with its first mask, and the log of a run."""
    rng = np.random.default_rng(0)
    for part in ("images/train/0", "images/train/1", "images/val/0", "images/val/1", "frames"):
        (folder / part).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / part / f"{i}.png")
    mask = np.zeros((40, 48), dtype=np.uint8)
    mask[8:24, 8:24] = 1
    Image.fromarray(mask).save(folder / "mask.png")
    for part in ("train", "val"):
        for kind, content in (("images", pixels), ("masks", mask)):
            (folder / "scenes" / part / kind).mkdir(parents=True)
            Image.fromarray(content).save(folder / "scenes" / part / kind / "0.png")
    (folder / "run").mkdir()
    (folder / "run/log.txt").write_text('{"epoch": 0, "train_loss": 2.5}\n')


def commands(folder: Path) -> dict[ModuleType, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Return the flags and KEY VALUE pairs of a short run by script; OUT is replaced by a new folder."""
    demo = ROOT / "experiments/demo"
    swin = ("--arch", "swin", "--cfg", f"{demo}/swin_micro.yaml")
    out = ("--output_dir", "OUT")
    images = ("--data_path", f"{folder}/images")
    here = ("--device", "cpu")
    loader = ("--num_workers", "0", "--batch_size_per_gpu", "4", *here)
    small = ("--out_dim", "16", "--head_hidden_dim", "8", "--head_bottleneck_dim", "4", "--local_crops_size", "16")
    short = ("--local_crops_number", "1", "--epochs", "1", "--warmup_epochs", "0", "--precision", "fp32")
    frozen = (*swin, "--pretrained_weights", f"{folder}/checkpoint.pth", *here)
    evaluated = (*frozen, *images, *loader)
    tasks = ("--vis_attention", "--vis_correspondence", "--vis_entropy", "--measure_correspondence", "--report")
    esvit = (*swin, "--use_dense_prediction", "on", *small, *short, *loader, *images, *out)
    return {
        main_esvit: (esvit, SWIN),
        main_udi: (
            ("--arch", "vit", "--patch_size", "4", "--cfg", f"{demo}/vit_micro.yaml", "--warmup_teacher_temp_epochs", "0",
             *small, *short, *loader, *images, *out),
            VIT,
        ),
        main_esvit_mnodes: (esvit, SWIN),
        eval_knn: ((*evaluated, "--nb_knn", "1", *out), SWIN),
        eval_linear: ((*evaluated, "--epochs", "1", "--n_last_blocks", "1", *out), SWIN),
        eval_finetune: ((*evaluated, "--epochs", "1", "--warmup_epochs", "0", *out), SWIN),
        eval_logistic: ((*evaluated, "--epochs", "5", *out), SWIN),
        extract_features: ((*evaluated, "--neighbors", "2", "--duplicates", "0.9", "--plot", "pca", *out), SWIN),
        eval_segmentation: (
            (*frozen, "--data_path", f"{folder}/scenes", *loader, "--epochs", "1", "--window", "32", "--nb_knn", "1", *out),
            SWIN,
        ),
        eval_video: (
            (*frozen, "--frames", f"{folder}/frames", "--first_mask", f"{folder}/mask.png", "--image_size", "32", *out),
            SWIN,
        ),
        run_analysis: ((*evaluated, *tasks, "--num_images", "1", *out), SWIN),
        export: ((*swin, "--pretrained_weights", f"{folder}/checkpoint.pth", "--format", "timm", "--output", "OUT.pth"), SWIN),
        convert: ((f"{folder}/images", "OUT", "--to", "shards"), ()),
        compare_runs: ((f"{folder}/run", *out), ()),
    }  # fmt: skip


def start(case: Case) -> None:
    """Run a case as the script does; main_esvit_mnodes only up to its call of torchrun."""
    words = [*case.words, *case.tail]
    if case.script is main_esvit_mnodes:
        main_esvit_mnodes.torchrun_arguments(words, {})
    else:
        case.script.main(case.script.get_args_parser().parse_args(words))


# --------------------------------------------------------------------------- the cases


def values_for(action: argparse.Action) -> Iterator[tuple[str, ...]]:
    """Yield the values for a flag; a flag of several gets the same one for all, and the largest before the smallest."""
    if isinstance(action.type, Range):
        low, high = str(action.type.low), str(action.type.high)
        singles: tuple[str, ...] = (*NUMBERS, low, high)
        if action.nargs is not None:
            yield (high, *[low] * ((action.nargs if isinstance(action.nargs, int) else 2) - 1))
    elif action.choices is not None:
        singles = ("", "nonsense", *map(str, action.choices))
    else:
        singles = BOOLEANS if action.type is arguments.bool_flag else TEXTS
    for value in singles:
        yield (value,) * (action.nargs if isinstance(action.nargs, int) else 1)


def flag_cases(script: ModuleType, words: tuple[str, ...], tail: tuple[str, ...]) -> Iterator[Case]:
    """Yield every flag with every value, each appended to a working command line."""
    known = main_esvit.get_args_parser()._option_string_actions if script is main_esvit_mnodes else {"--help": None}
    for action in script.get_args_parser()._actions:
        if not action.option_strings or action.option_strings[-1] in known:
            continue
        flag = action.option_strings[0]
        if action.nargs == 0:
            yield Case(script, (*words, flag), tail)
            continue
        for values in values_for(action):
            given = (flag, *values, "--") if len(values) > 1 else (f"{flag}={values[0]}",)
            yield Case(script, (*words, *given), tail)


def key_cases(script: ModuleType, words: tuple[str, ...]) -> Iterator[Case]:
    """Yield every config key of every network with every value, also in every place of a list."""
    for name, (arch, yaml) in NETWORKS.items():
        cfg = ROOT / "experiments/demo" / f"{yaml}.yaml"
        network = ("--arch", arch, "--cfg", str(cfg), "--pretrained_weights=", "--random_weights")
        for key, default in [*leaves(arch_specs()[name].defaults, "MODEL.SPEC."), *leaves(SCHEMA)]:
            size = len(default) if isinstance(default, list) else 1
            lists = [f"[{', '.join([value] * size)}]" for value in NUMBERS] if size > 1 else []
            for value in (*NUMBERS, *YAMLS, *TEXTS, *lists):
                yield Case(script, (*words, *network), (key, value))
    for key in ("", "MODEL", "MODEL.", ".", "A" + ".A" * 5000):
        yield Case(script, words, (key, "1"))


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and their values."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def all_cases(folder: Path) -> Iterator[Case]:
    """Yield the cases of all scripts; config keys are tested with eval_knn, which builds and runs a network."""
    for script, (words, tail) in commands(folder).items():
        yield from flag_cases(script, words, tail)
    yield from key_cases(eval_knn, commands(folder)[eval_knn][0])


# --------------------------------------------------------------------------- running them


def run_case(case: Case, seconds: float, out: Path) -> tuple[str, str]:
    """Run a case and return how it ended (ran, stopped, refused, diverged or failed) and what it wrote to stderr."""
    words, tail = (tuple(word.replace("OUT", str(out)) for word in part) for part in (case.words, case.tail))
    written = io.StringIO()
    try:
        with contextlib.redirect_stderr(written):
            case.script.get_args_parser().parse_args([*words, *tail])
    except SystemExit as ended:
        one_line = ended.code == 2 and written.getvalue().count("\n") == 1
        return "refused" if one_line else "failed", written.getvalue()
    except Exception:
        return "failed", traceback.format_exc()
    with tempfile.TemporaryFile("w+", errors="backslashreplace") as stderr:
        child = os.fork()
        if child == 0:
            os.setsid()  # with its loader's processes
            os.dup2(os.open(os.devnull, os.O_RDWR), 0)
            os.dup2(0, 1)
            os.dup2(stderr.fileno(), 2)
            sys.stderr = os.fdopen(2, "w", errors="backslashreplace", closefd=False)
            os._exit(exit_code(Case(case.script, words, tail)))
        status = wait_for(child, seconds)
        stderr.seek(0)
        text = stderr.read()
    if status is None:
        return "stopped", text
    code, lines = os.waitstatus_to_exitcode(status), text.splitlines() or [""]
    if code and not (code in (1, 2) and ": error: " in lines[-1] and "Traceback" not in text):
        return "failed", f"{text}\ncode {code}"
    return {0: "ran", 1: "diverged", 2: "refused"}[code], text


def exit_code(case: Case) -> int:
    """Run a case and return the exit code of the script."""
    try:
        launch.run_script(lambda: start(case))
    except SystemExit as ended:
        return int(ended.code or 0)
    except BaseException:  # a finding
        traceback.print_exc()
        return CRASHED
    finally:
        sys.stderr.flush()
    return 0


def wait_for(child: int, seconds: float) -> int | None:
    """Return the exit status of a process, or None after killing it if it runs longer than `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.005)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def limit_memory(gibibytes: float) -> None:
    """Limit the address space of this process to its present size plus `gibibytes`."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + int(gibibytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


def fuzz(cases: Sequence[Case], seconds: float, folder: Path, show: Callable[[str], None] = print) -> Counter[str]:
    """Run the cases with `folder` as working directory, show the failures, and return the number of cases by ending."""
    ends: Counter[str] = Counter()
    back = os.getcwd()
    os.chdir(folder)
    try:
        for index, case in enumerate(cases):
            end, output = run_case(case, seconds, folder / f"out{index}")
            ends[end] += 1
            if end == "failed":
                words = " ".join(word if len(word) < 200 else f"{word[:50]}..." for word in (*case.words, *case.tail))
                show(f"FAILED {case.script.__name__} {words!a}\n{output}")
    finally:
        os.chdir(back)
    return ends


def prepare(folder: Path) -> None:
    """Write the images, and train the network that the evaluations load.

    Raises:
        RuntimeError: the training fails.
    """
    write_inputs(folder)
    words, tail = commands(folder)[main_esvit]
    end, output = run_case(Case(main_esvit, words, tail), 600, folder / "trained")
    if end != "ran":
        raise RuntimeError(output)
    os.replace(folder / "trained/checkpoint.pth", folder / "checkpoint.pth")


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of tools/fuzz_cli.py."""
    parser = arguments.Parser("python -m tools.fuzz_cli", "Fuzz the command lines of all scripts.")
    parser.add_argument("--share", type=ABOVE_ZERO, default=1.0, help="fraction of the cases to run, drawn by --seed")
    parser.add_argument("--seed", type=SEED, default=0, help="random seed of the sample")
    parser.add_argument("--only", default="", help="run only the cases of this script")
    parser.add_argument("--seconds", type=COUNT, default=5, help="stop a case after this time")
    parser.add_argument("--memory", type=number(0.5, 1000), default=4.0, help="memory limit in GiB")
    return parser


def main(args: argparse.Namespace) -> None:
    """Run the cases and print how many ended in which way."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        limit_memory(args.memory)
        cases = [case for case in all_cases(folder) if args.only in case.script.__name__]
        cases = random.Random(args.seed).sample(cases, max(1, round(args.share * len(cases))))
        ends = fuzz(cases, args.seconds, folder)
    print(f"{len(cases)} cases: " + ", ".join(f"{count} {end}" for end, count in sorted(ends.items())))
    sys.exit(bool(ends["failed"]))


if __name__ == "__main__":
    main(get_args_parser().parse_args())
