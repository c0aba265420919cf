"""Every yaml under experiments/: it loads, and what its header says is so. The published ones load as they are, and ours of their
names say the same.
"""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.run
import yaml
from conftest import ROOT, golden_json
from timm.layers import DropPath

import main_esvit
import main_udi
from config.loading import load_config
from config.schema import arch_specs
from models import build_model, load_arch_config

YAMLS = sorted((ROOT / "experiments").rglob("*.yaml"))
SCRIPTS: dict[str, Any] = {"main_esvit.py": main_esvit, "main_udi.py": main_udi}
TINY = ROOT / "experiments/imagenet/swin/swin_tiny_patch4_window7_224.yaml"


def test_yamls_are_found() -> None:
    assert TINY in YAMLS


@pytest.mark.parametrize("file", YAMLS, ids=lambda file: file.stem)
def test_yaml_loads_and_builds_what_its_header_says(file: Path) -> None:
    arch = re.search(r"--arch (\w+)", file.read_text())
    assert arch is not None, "the comment on top holds a command with --arch"
    patch_size = re.search(r"--patch_size (\d+)", file.read_text())
    with torch.device("meta"):
        network = build_model(arch[1], load_config(file), patch_size=int(patch_size[1]) if patch_size else 16)
    header = re.search(r"([\d.]+)M parameters", file.read_text().splitlines()[0])
    assert header is not None, "the first line says how many parameters the network has"
    decimals = len(header[1].partition(".")[2])
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, decimals) == float(header[1])


IMAGENET_YAMLS = pytest.mark.parametrize(
    "file", [file for file in YAMLS if "imagenet" in file.parts], ids=lambda file: file.stem
)


def header_of(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if line.startswith("#")]


def command_of(file: Path) -> tuple[argparse.Namespace, argparse.Namespace]:
    """What launcher and script make of the command on top of a yaml, whose lines are indented behind the `#`."""
    lines = [line.removeprefix("#   ") for line in header_of(file) if line.startswith("#   ")]
    words = shlex.split("\n".join(lines).replace("\\\n", " "))
    assert words[0] == "torchrun"
    launcher = torch.distributed.run.get_args_parser().parse_args(words[1:])
    script = SCRIPTS[launcher.training_script]
    return launcher, script.get_args_parser().parse_args(launcher.training_script_args)


@IMAGENET_YAMLS
def test_yaml_command_is_one_that_the_scripts_take(file: Path) -> None:
    launcher, args = command_of(file)
    SCRIPTS[launcher.training_script].check_args(args)
    assert ROOT / args.cfg == file
    assert load_arch_config(args.arch, args.cfg, args.opts) == load_config(file, args.opts)
    assert args.warmup_epochs < args.epochs
    assert args.warmup_teacher_temp_epochs < args.epochs


@IMAGENET_YAMLS
def test_yaml_header_tells_batch_and_learning_rate_of_its_command(file: Path) -> None:
    text = "\n".join(header_of(file))
    told = re.search(
        r"(\d+) GPUs? x (\d+) images(?: x (\d+) accumulated)? = batch (\d+), lr ([\d.]+) x (\d+) / 256 = ([\d.]+\d)",
        text,
    )
    assert told is not None, "the header says what makes the batch and the learning rate"
    gpus, images, accumulated, batch, base, scaled_by, lr = told.groups()
    launcher, args = command_of(file)
    assert (launcher.nnodes, launcher.nproc_per_node) == ("1:1", gpus)
    assert (args.batch_size_per_gpu, args.accum_iter) == (int(images), int(accumulated or 1))
    assert int(gpus) * args.batch_size_per_gpu * args.accum_iter == int(batch) == int(scaled_by)
    assert args.lr == float(base)
    assert args.lr * int(batch) / 256 == pytest.approx(float(lr))
    claims = re.search(r"\b(\d+) epochs", header_of(file)[0]) or re.search(r"Paper \((\d+) epochs", text)
    assert claims is None or args.epochs == int(claims[1])


@IMAGENET_YAMLS
def test_files_that_a_yaml_header_names_exist(file: Path) -> None:
    named = re.findall(r"[\w./-]+\.(?:sh|py|yaml)\b", "\n".join(header_of(file)))
    assert SCRIPTS.keys() & set(named)
    assert all((ROOT / name).is_file() or (file.parent / name).is_file() for name in named), named


# Figures of the published table (linear / k-NN, top-1), and of its further rows.
PUBLISHED_FIGURES = {
    "resnet/resnet50": "75.0 69.1 75.7 71.3",
    "swin/swin_tiny_patch4_window7_224": "77.0 74.2 78.0 75.7",
    "swin/swin_small_patch4_window7_224": "79.2 76.9 79.5 77.7",
    "swin/swin_base_patch4_window7_224": "79.6 77.7 80.4 78.9",
    "swin/swin_tiny_patch4_window14_224": "77.9 75.5 78.7 77.0",
    "swin/swin_small_patch4_window14_224": "79.4 77.3 80.8 79.1",
    "swin/swin_base_patch4_window14_224": "80.5 78.3 81.3 79.3",
    "vil/vil_2262": "77.3 73.9 77.5 74.5",
    "cvt_v4/s1": "77.6 74.8 78.5 76.7",
    "swin/swin_tiny_patch4_window7_224_batch1024": "77.1 73.7",
    "swin/swin_tiny_patch4_window7_224_webvision1": "75.4 69.4",
    "swin/swin_tiny_patch4_window7_224_openimages_v4": "69.6 60.3",
    "swin/swin_tiny_patch4_window7_224_imagenet22k": "73.5 66.1",
    "swin/swin_tiny_patch4_window7_224_100ep_2crops": "65.3 60.3 67.8 62.0",
    "swin/swin_tiny_patch4_window7_224_100ep": "75.3 70.0",
    "vit/deit_small": "73.1 69.0",
    "vil/vil_2262_100ep": "75.4 70.1",
    "cvt_v4/s1_100ep": "75.5 70.6",
}


@pytest.mark.parametrize("name", PUBLISHED_FIGURES)
def test_every_published_row_has_a_yaml_with_its_figures(name: str) -> None:
    """V before V+R in the table; a yaml may name them in any order."""
    paper = next(line for line in header_of(ROOT / f"experiments/imagenet/{name}.yaml") if line.startswith("# Paper"))
    figures = PUBLISHED_FIGURES[name].split()
    found = {
        task: [linear, knn] for task, linear, knn in re.findall(r"(V\+R|V) linear ([\d.]+), k-NN (\d+\.\d)", paper)
    }
    if len(figures) == 4:
        assert found == {"V": figures[:2], "V+R": figures[2:]}
    else:
        assert re.search(r"\(.*\bV[,)]", paper)
        assert re.findall(r"linear ([\d.]+), k-NN (\d+\.\d)", paper) == [tuple(figures)]


@pytest.mark.parametrize("name", ["vil_2262", "vil_2262_100ep"])
def test_published_vil_draws_neighbors_to_the_end(name: str) -> None:
    msvit = load_config(ROOT / f"experiments/imagenet/vil/{name}.yaml").MODEL.SPEC.MSVIT
    assert (msvit.MODE, msvit.VIL_MODE_SWITCH) == (1, 1.0)


# --------------------------------------------------------------------------- the published files

PUBLISHED = golden_json("published_model_keys")
OURS = [name for name in PUBLISHED if (ROOT / name).is_file()]
ARCH_OF = {"swin_transformer": "swin", "cvt_v4_transformer": "cvt", "vision_longformer": "vil"}


def write_published(root: Path, name: str) -> Path:
    """A published yaml under its own name, with the ones it builds on."""
    content, file = PUBLISHED[name], root / name
    tree: dict[str, Any] = {}
    leaves = dict(content["keys"])
    if content["TRAIN.IMAGE_SIZE"]:
        leaves["TRAIN.IMAGE_SIZE"] = content["TRAIN.IMAGE_SIZE"]
    for dotted, value in leaves.items():
        *path, last = dotted.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    file.parent.mkdir(parents=True, exist_ok=True)
    for base in content["BASE"] or ():
        write_published(root, str(Path(name).parent / base))
    file.write_text(yaml.safe_dump({"BASE": content["BASE"] or [""]} | tree))
    return file


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_yaml_loads_unchanged_and_builds_the_published_network(tmp_path: Path, name: str) -> None:
    """Those too whose MODEL.NAME the published code no longer knows."""
    published, config = PUBLISHED[name], load_config(write_published(tmp_path, name))
    rate = config.MODEL.SPEC.DROP_PATH_RATE
    arch = ARCH_OF[config.MODEL.NAME]
    with torch.device("meta"):
        networks = [build_model(arch, config, is_teacher=is_teacher) for is_teacher in (False, True)]
    rates = [max(m.drop_prob for m in network.modules() if isinstance(m, DropPath)) for network in networks]
    assert rates == pytest.approx([rate, 0.0])
    if published["reference builds it"] is True:
        assert sum(p.numel() for p in networks[0].parameters()) == published["parameters of the backbone"]
        assert rates == pytest.approx([published["largest drop path of the student"], published["of the teacher"]])


def test_which_published_yamls_are_here() -> None:
    """Those that a published command or row names, and the s3 of cvt_small."""
    swin = {f"swin_{size}_patch4_window{window}_224" for size in ("tiny", "small", "base") for window in (7, 14)}
    names = {f"swin/{name}" for name in swin | {"swin_large_patch4_window7_224"}}
    names |= {"cvt_v4/s1", "cvt_v4/s3", "vil/vil_small/base"}
    assert set(OURS) == {f"experiments/imagenet/{name}.yaml" for name in names}


@pytest.mark.parametrize("name", OURS)
def test_our_yaml_has_every_key_of_the_published_one(tmp_path: Path, name: str) -> None:
    ours = load_config(ROOT / name)
    spec = arch_specs()[ours.MODEL.NAME]
    for published_key, expected in PUBLISHED[name]["keys"].items():
        key = spec.key_aliases.get(published_key, published_key)
        if key in spec.fixed_choices:
            continue  # loading the published file checks its value
        value: Any = ours
        for part in key.split("."):
            value = value[part]
        if isinstance(expected, list) and not isinstance(value, list):
            value = [value] * len(expected)
        if isinstance(value, float):
            expected = float(expected)  # yaml 1.1 reads 1e-06 as text
        if key == "MODEL.NAME" and expected in spec.name_aliases:
            expected = spec.name
        assert value == expected, key
    assert load_config(write_published(tmp_path, name)) == ours


@pytest.mark.parametrize("window", [7, 14])
@pytest.mark.parametrize(
    ("size", "dim", "third_stage", "heads"),
    [("tiny", 96, 6, 3), ("small", 96, 18, 3), ("base", 128, 18, 4), ("large", 192, 18, 6)],
)
def test_published_swin_values(size: str, dim: int, third_stage: int, heads: int, window: int) -> None:
    spec = load_config(TINY.with_name(f"swin_{size}_patch4_window{window}_224.yaml")).MODEL.SPEC
    assert (dim, window, 4) == (spec.DIM_EMBED, spec.WINDOW_SIZE, spec.PATCH_SIZE)
    assert [2, 2, third_stage, 2] == spec.DEPTHS
    assert [heads, 2 * heads, 4 * heads, 8 * heads] == spec.NUM_HEADS
    assert (0.1 if size == "tiny" else 0.2) == spec.DROP_PATH_RATE


@torch.no_grad()
def test_demo_network_sees_an_image() -> None:
    config = load_config(ROOT / "experiments/demo/swin_micro.yaml")
    network = build_model("swin", config).eval()
    assert network(torch.zeros(2, 3, *config.MODEL.IMAGE_SIZE)).shape == (2, 4 * config.MODEL.SPEC.DIM_EMBED)
