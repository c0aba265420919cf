"""What README and docs/data.md show is there: files, flags, choices, and commands that do what they say."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT
from image_files import whole
from runs import write_images

import main_esvit
from benchmarks import dataset
from data import convert
from data.datasets import build_dataset, layout_of
from data.layouts.folder_scan import EXTENSIONS
from data.layouts.shards import RETRY_DELAYS

README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")


def commands(script: str) -> list[list[str]]:
    """The arguments of each command of the guide that starts so."""
    lines = [line.strip() for line in GUIDE.splitlines() if line.startswith(f"    python {script} ")]
    return [shlex.split(line, comments=True)[1 + len(script.split()) :] for line in lines]


def test_flags_and_extensions_of_the_guide_exist() -> None:
    known = {
        flag
        for parser in (main_esvit.get_args_parser(), convert.get_args_parser(), dataset.get_args_parser())
        for flag in parser._option_string_actions
    }
    assert set(re.findall(r"--\w+", GUIDE)) <= known
    (endings,) = re.findall(r"Extensions of images: (.*?), in lower", GUIDE)
    assert [f".{ending}" for ending in endings.split(", ")] == list(EXTENSIONS)
    assert "after {:.0f} and {:.0f} seconds".format(*RETRY_DELAYS) in GUIDE


def test_training_commands_are_parsed() -> None:
    lines = commands("main_esvit.py")
    assert len(lines) == 12
    for line in lines:
        assert line.pop() == "..."
        args = main_esvit.get_args_parser().parse_args(line)
        assert args.data_path == line[1]
        assert not args.opts


def test_conversions_do_what_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in its turn, on a small imagenet/; and what they make is what the trees show."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        write_images(tmp_path / "imagenet" / split, 2, size=8, classes=2)
    for line in commands("-m data.convert"):
        if "SOURCE" not in line:
            convert.main(convert.get_args_parser().parse_args(line))
    for folder, flag in {
        "imagenet_zip": "--zip_mode",
        "imagenet_tsv": "--tsv_mode",
        "imagenet_shards": "",
        "BACK": "",
    }.items():
        args = main_esvit.get_args_parser().parse_args(["--data_path", folder, *filter(None, [flag])])
        assert len(build_dataset(folder, "val", whole, need_labels=True, layout=layout_of(args))) == 4
        for path in (tmp_path / folder).glob("*.*"):
            assert path.name in GUIDE


def test_commands_of_the_readme_are_parsed() -> None:
    found = re.findall(r"^python (\w+)\.py (.*)$", README.replace("\\\n", " "), flags=re.MULTILINE)
    assert {script for script, _ in found} >= {
        "main_esvit",
        "eval_knn",
        "eval_linear",
        "eval_finetune",
        "export",
        "run_analysis",
    }
    for script, line in found:
        importlib.import_module(script).get_args_parser().parse_args(shlex.split(line, comments=True))


def test_files_of_the_readme_are_there() -> None:
    """Whatever is named with a known ending and not made by a run; recipes go by their names alone."""
    made = {"config.yaml"}
    named = {name for name in re.findall(r"`([\w./*-]+\.(?:py|sh|md|yaml))`", README) if name not in made}
    assert len(named) > 50
    missing = {name for name in named if not any(list((ROOT / folder).glob(name)) for folder in ("", "scripts"))}
    assert not missing
