"""README.md and docs/: every command parses, those that can run do at tiny size, and files, flags and links exist."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from helpers.image_files import whole
from helpers.runs import TINY_RUN, TINY_SWIN, TINY_UDI, TINY_VIT, caught_recipe, write_images
from PIL import Image
from torch.distributed import run as torchrun

import main_esvit
from data import convert
from data.datasets import build_dataset, layout_of

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DATA_PAGE = ROOT / "docs" / "data.md"
LATER = {"extract_features.py", "compare_runs.py"}  # parsed where they exist
WHOLE_SCRIPTS = {"demo", "demo_udi", "test", "compare"}  # take no flags of ours; too long to run here
# Flags of other programs and of scripts that have no parser.
OTHER_FLAGS = {
    *("--kills", "--processes", "--rivals", "--signal"),  # tests/soak/kill_loop.py
    *("--max-restarts", "--nnodes", "--nproc_per_node", "--shutdown-timeout"),  # torchrun
    "--logdir",  # tensorboard
}  # fmt: skip


def commands_of(page: Path) -> list[str]:
    """Return the command lines of a page: fenced bash blocks, and indented ones."""
    text = page.read_text(encoding="utf-8")
    lines = []
    for block in re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        lines += block.replace("\\\n", " ").splitlines()
    lines += re.findall(
        r"^    (python .*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    return [line.strip() for line in lines if line.strip()]


def words_of(line: str) -> list[str]:
    """Return the words of a command line without comments, environment variables and a trailing `...`."""
    words = shlex.split(line, comments=True)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    return words[:-1] if words[-1] == "..." else words


def parser_of(script: str) -> argparse.ArgumentParser:
    """Return the parser of a script, `eval_knn.py`, or of a module, `data.convert`."""
    name = script.removesuffix(".py").replace("/", ".")
    parser: argparse.ArgumentParser = importlib.import_module(name).get_args_parser()
    return parser


def parse(words: list[str], folder: Path) -> None:
    """Parse a command as the program that it starts does."""
    program, rest = words[0], words[1:]
    if program == "python" and rest[0] == "-m":
        if rest[1] != "venv":
            parser_of(rest[1]).parse_args(rest[2:])
    elif program == "python" and rest[0] in LATER and not (ROOT / rest[0]).exists():
        pass
    elif program == "python":
        parser_of(rest[0]).parse_args(rest[1:])
    elif program == "torchrun":
        launched = torchrun.get_args_parser().parse_args(rest)
        parser_of(launched.training_script).parse_args(launched.training_script_args)
    elif program in {"mpirun", "srun"}:
        parse(rest[rest.index("python") :], folder)
    elif program == "sbatch":
        main_esvit.get_args_parser().parse_args(rest[rest.index("scripts/pretrain_slurm.sh") + 1 :])
    elif program == "bash" and Path(rest[0]).stem in WHOLE_SCRIPTS:
        assert (ROOT / rest[0]).is_file()
    elif program == "bash":
        recipe = Path(rest[0])
        assert (ROOT / recipe).is_file()
        done = caught_recipe(folder, recipe.stem, *rest[1:], GPUS="1")
        assert done.returncode == 0, done.stderr
        script, *flags = done.stdout.splitlines()
        parser_of(Path(script).name).parse_args(flags)
    elif program == "tensorboard":
        assert rest[0] == "--logdir"
    elif program == "pip":
        assert all((ROOT / name).is_file() for name in rest if name.endswith(".txt"))
    else:
        raise AssertionError(f"no rule for {program}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page: Path, tmp_path: Path) -> None:
    for line in commands_of(page):
        try:
            for command in line.split(" && "):
                if not command.startswith("source "):
                    parse(words_of(command), tmp_path)
        except SystemExit:
            pytest.fail(f"{page.name}: {line}")


# Commands that run, by page, and flags that make them small. Each reads the files of the ones before.
RUN = {
    "README.md": ["main_esvit", "eval_knn", "eval_linear", "eval_finetune", "run_analysis", "export"],
    "training.md": ["main_esvit", "main_esvit"],
    "udi.md": ["main_udi", "main_udi"],
    "first_hour.md": ["main_esvit", "run_analysis", "eval_knn", "main_esvit"],
}
TINY = ["--arch", "swin", "--cfg", "experiments/demo/swin_micro.yaml", "--device", "cpu", "--num_workers", "0"]
TINY_FLAGS = {
    "main_esvit": TINY_RUN,
    "main_udi": TINY_UDI,
    "eval_knn": [*TINY, "--nb_knn", "1", "3"],
    "eval_linear": [*TINY, "--n_last_blocks", "1", "--epochs", "1", "--batch_size_per_gpu", "4"],
    "eval_finetune": [*TINY, "--epochs", "1", "--warmup_epochs", "0", "--batch_size_per_gpu", "4"],
    "run_analysis": [*TINY, "--image_size", "64"],
    "export": TINY[:4],
}


def run_tiny(script: str, words: list[str]) -> None:
    """Run a script with further flags and config overrides."""
    end = next((i for i, word in enumerate(words) if re.fullmatch(r"--|[A-Z]+\..*", word)), len(words))
    pairs = [word for word in words[end:] if word != "--"]
    network = TINY_VIT if script == "main_udi" else TINY_SWIN
    module = importlib.import_module(script)
    line = [*words[:end], *TINY_FLAGS[script], "--", *network, *pairs]
    module.main(module.get_args_parser().parse_args(line))


@pytest.mark.parametrize("page", RUN)
def test_commands_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("photos", "imagenet"):
        for split in ("train", "val"):
            write_images(tmp_path / folder / split, 4, classes=2)
    (tmp_path / "scans").mkdir()
    for number in range(4):
        np.save(tmp_path / "scans" / f"{number}.npy", np.full((32, 32, 5), 50 * number, np.uint8))
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "photo.jpg")
    (tmp_path / "IMAGES").symlink_to(tmp_path / "photos")
    (tmp_path / "LABELED").symlink_to(tmp_path / "photos" / "train")
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    ran = []
    (path,) = (path for path in PAGES if path.name == page)
    for words in map(words_of, commands_of(path)):
        script = words[1].removesuffix(".py") if words[0] == "python" else ""
        if script in RUN[page]:
            run_tiny(script, [re.sub(r"^/(my|data|runs)/", f"{tmp_path}/", word) for word in words[2:]])
            ran.append(script)
    assert ran == RUN[page]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_exist(page: Path) -> None:
    scripts = [*(path.name for path in ROOT.glob("*.py") if "get_args_parser" in path.read_text()), "data.convert"]
    scripts += [
        f"benchmarks.{path.stem}"
        for path in (ROOT / "benchmarks").glob("*.py")
        if "def get_args_parser" in path.read_text()
    ]
    known = {flag for script in scripts for flag in parser_of(script)._option_string_actions} | OTHER_FLAGS
    named = {
        flag
        for code in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", code)
    }
    assert named <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        target, _, anchor = link.partition("#")
        linked = page.parent / target if target else page
        assert linked.exists(), link
        titles = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, (
            link
        )
    for name in set(re.findall(r"`((?:[\w*-]+/)+[\w.*-]*|[\w*-]+\.(?:py|sh|md))`", text)):
        if name.split("/")[0] in {path.name for path in ROOT.iterdir()} or "/" not in name:
            assert list(ROOT.glob(name)), name


def test_tree_of_the_readme() -> None:
    (tree,) = re.findall(
        r"^```\n(├──.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    shown = set(re.findall(r"── (\w+)/", tree))
    there = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))}
    assert shown == there - {"output"}


def test_conversions_of_the_data_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        write_images(tmp_path / "imagenet" / split, 2, size=8, classes=2)
    for line in commands_of(DATA_PAGE):
        if line.startswith("python -m data.convert") and "SOURCE" not in line:
            convert.main(convert.get_args_parser().parse_args(words_of(line)[3:]))
    for folder, flags in {
        "imagenet_zip": ["--zip_mode"],
        "imagenet_tsv": ["--tsv_mode"],
        "imagenet_shards": [],
        "BACK": [],
    }.items():
        args = main_esvit.get_args_parser().parse_args(["--data_path", folder, *flags])
        assert len(build_dataset(folder, "val", whole, need_labels=True, layout=layout_of(args))) == 4
        for path in (tmp_path / folder).glob("*.*"):
            assert path.name in DATA_PAGE.read_text(encoding="utf-8")
