"""Every numeric flag of every parser and every numeric config key has a range, which is enforced."""

from __future__ import annotations

import argparse
import importlib
import math
import re
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT

import eval_finetune
import eval_knn
import eval_linear
import eval_logistic
import eval_segmentation
import eval_video
import extract_features
import main_esvit
import main_esvit_mnodes
import main_udi
import run_analysis
from config.loading import load_config
from config.ranges import Range, integer, number
from config.schema import RANGES, SCHEMA, arch_specs
from tools import fuzz_cli
from utils import UsageError

PARSERS = {
    path.stem: path
    for path in [*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("data/*.py")]
    if re.search(r"def get_args_parser|import get_args_parser", path.read_text())
}
# Required arguments of each script.
NEEDED = {
    "eval_video": ["--frames", "a", "--first_mask", "b", "--output_dir", "c"],
    "export": ["--pretrained_weights", "a", "--format", "timm", "--output", "b"],
    "convert": ["a", "b", "--to", "zip"],
    "extract_features": ["--output_dir", "a"],
    "lightly_dino": ["--data_path", "a", "--output_dir", "b", "--cpu_seconds", "1"],
    "peers": ["--data_path", "a", "--output_dir", "b"],
}


def module(name: str) -> ModuleType:
    return importlib.import_module(".".join(PARSERS[name].relative_to(ROOT).with_suffix("").parts))


def numeric_actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if isinstance(action.type, Range)]


@pytest.mark.parametrize(
    ("value", "inside"),
    [("0", False), ("1e-300", True), ("1", True), ("1.0000001", False), ("nan", False), ("inf", False), ("", False),
     ("-1", False), ("one", False), ("9" * 5000, False)],
)  # fmt: skip
def test_bounds_of_a_range(value: str, inside: bool) -> None:
    share = number(0, 1, above_low=True)
    if inside:
        assert share(value) == float(value)
    else:
        with pytest.raises(argparse.ArgumentTypeError, match="is not a number above 0 and at most 1"):
            share(value)


@pytest.mark.parametrize("value", ["1.5", "1e3", "0", "1001", "nan", "", "9" * 5000])
def test_integers(value: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number from 1 to 1_000"):
        integer(1, 1000)(value)
    assert [integer(1, 1000)(good) for good in ("1", "1000")] == [1, 1000]


@pytest.mark.parametrize("name", PARSERS)
def test_every_numeric_flag_has_a_range_with_its_default(name: str) -> None:
    parser = module(name).get_args_parser()
    for action in parser._actions:
        assert action.type not in (int, float) or action.choices, action.dest
        default = parser.get_default(action.dest)
        if isinstance(action.type, Range):
            assert -math.inf < action.type.low < action.type.high < math.inf
            for value in default if isinstance(default, list | tuple) else [default]:
                assert value is None or value in action.type, action.dest
        else:
            assert isinstance(default, bool) or not isinstance(default, int | float) or action.choices, action.dest


@pytest.mark.parametrize("name", PARSERS)
def test_every_flag_enforces_its_range(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With code 2 and one line that names flag, value and range; bounds are accepted."""
    parser = module(name).get_args_parser()
    for action in numeric_actions(parser):
        flag, kind = action.option_strings[0], action.type
        assert isinstance(kind, Range)
        count = action.nargs if isinstance(action.nargs, int) else 1
        step = 1 if kind.kind is int else 1e-6
        for value in ("nan", "inf", "-inf", str(kind.low - step), str(kind.high * 1.1 + step)):
            given = [flag, *[value] * count] if not value.startswith("-") else [f"{flag}={value}"]
            with pytest.raises(SystemExit) as caught:
                parser.parse_args([*NEEDED.get(name, []), *given])
            assert caught.value.code == 2
            text = capsys.readouterr().err.splitlines()[-1]
            assert flag in text
            assert count > 1 or (value in text and str(kind) in text)
        if not kind.below_high and kind.kind is int:
            args = parser.parse_args([*NEEDED.get(name, []), flag, *[str(kind.high)] * count])
            assert getattr(args, action.dest) in (kind.high, [kind.high] * count, [kind.high])


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (eval_knn, "--temperature nan"),
        (main_esvit, "--lr nan"),
        (main_esvit, "--lr=-0.1"),
        (main_esvit, "--min_lr=-1e-6"),
        (main_esvit, "--weight_decay nan"),
        (main_esvit, "--teacher_temp inf"),
        (main_esvit, "--mixup nan"),
        (main_esvit, "--smoothing 5"),
        (main_esvit, "--cutmix-minmax 0.9 0.1"),
        (main_esvit, "--global_crops_scale 0.9 0.3"),
        (main_udi, "--local_crops_scale 0.9 0.3"),
        (main_esvit, "--local_crops_scale 0 0.3"),
        (main_esvit, "--recount=-1"),
        (main_esvit, "--out_dim 99999999999"),
        (main_esvit, "--batch_size_per_gpu 1000000000000"),
        (main_esvit, "--batch_size_per_gpu 0"),
        (main_esvit, "--momentum_teacher 1.5"),
        (main_esvit, "--drop_path 1.5"),
        (main_udi, "--srs_heads=-1"),
        (main_udi, "--alpha 1.5"),
        (main_udi, "--student_temp 0"),
        (main_udi, "--center_momentum 2"),
        (main_udi, "--flip_prob 2"),
        (main_udi, "--local_sampling_window_size 0"),
        (eval_knn, "--nb_knn 10 0"),
        (eval_linear, "--lr 0.1 0"),
        (eval_linear, "--crop_ratio 1.5"),
        (eval_finetune, "--layer_decay 0"),
        (eval_finetune, "--smoothing 1"),
        (eval_logistic, "--lr_lambd 0.1 0"),
        (eval_segmentation, "--lr 0.1 0"),
        (eval_segmentation, "--stages 1 0"),
        (eval_segmentation, "--ignore_index 256"),
        (eval_video, "--temperature 0"),
        (extract_features, "--duplicates 0"),
        (extract_features, "--neighbors 0"),
        (run_analysis, "--threshold 0"),
        (main_esvit_mnodes, "--num_nodes 0"),
        (main_esvit_mnodes, "--num_gpus_per_node 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_out_of_range(script: ModuleType, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    needed = NEEDED.get(script.__name__, [])
    with pytest.raises(SystemExit) as caught:
        script.get_args_parser().parse_args([*needed, *words.split()])
    assert caught.value.code == 2
    names = capsys.readouterr().err.partition("error: argument ")[2].partition(": ")[0]
    assert words.replace("=", " ").split()[0] in names.split("/")  # which has all spellings of the flag


def test_help_shows_the_range(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main_esvit.get_args_parser().parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 65536; N >= 1)" in text
    assert "(default: 0.0; 0 <= X < 1)" in text


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


KEYS = {key: default for tree, prefix in [*((spec.defaults, "MODEL.SPEC.") for spec in arch_specs().values()), (SCHEMA, "")]
        for key, default in fuzz_cli.leaves(tree, prefix)
        if is_number(default) or (isinstance(default, list) and default and is_number(default[0]))}  # fmt: skip
NAMES = {key: name for name, spec in arch_specs().items() for key, _ in fuzz_cli.leaves(spec.defaults, "MODEL.SPEC.")}


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "99999999999", "-2000000", "1" + "0" * 400])
def test_every_numeric_config_key_enforces_its_range(key: str, value: str) -> None:
    ranges = RANGES | dict(arch_specs()[NAMES[key]].ranges if key in NAMES else {})
    default = KEYS[key]
    whole = isinstance(default[0] if isinstance(default, list) else default, int)
    text = f"[{', '.join([value] * len(default))}]" if isinstance(default, list) else value
    name = ["MODEL.NAME", NAMES[key]] if key in NAMES else []
    with pytest.raises(UsageError, match=key.replace(".", r"\.")) as caught:
        load_config(None, [*name, key, text])
    assert "\n" not in str(caught.value)
    assert whole is (ranges[key.rsplit(".", 1)[-1]].kind is int)


@pytest.mark.parametrize("text", ["[" * 900, "{a: " * 900, "A: " + "9" * 5000, "A: 2020-99-99"])
def test_yaml_beyond_the_limits_of_python(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"a\.yaml"):
        load_config(path)
    with pytest.raises(UsageError):
        load_config(None, ["MODEL.SPEC.DROP_RATE", text])
    with pytest.raises(UsageError, match="no key has as many"):
        load_config(None, ["A" + ".A" * 5000, "1"])
