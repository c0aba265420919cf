"""torch.hub: the network that a checkpoint names, beside a user's own modules of any name."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from helpers.runs import clean_environment
from helpers.small_networks import ARCHITECTURES, SMALL, small_network
from torch import Tensor

import models
from config.loading import load_config


def checkpoint(folder: Path, name: str, **changes: Any) -> Path:
    """A file as pre-training writes it, of the small network of an architecture."""
    arch, overrides, patch_size = SMALL[name]
    args = argparse.Namespace(arch=arch, patch_size=patch_size)
    content = {
        "teacher": small_network(name, is_teacher=True).state_dict(),
        "student": {f"module.{key}": value + 1 for key, value in small_network(name).state_dict().items()},
        "args": args,
        "config": load_config(None, overrides).dump(),
        "world_size": 1,
    }
    path = folder / f"{name}.pth"
    torch.save({key: value for key, value in (content | changes).items() if value is not None}, path)
    return path


def load(entry: str = "esvit", **kwargs: Any) -> Any:
    return torch.hub.load(str(ROOT), entry, source="local", **kwargs)


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_network_that_a_checkpoint_names(name: str, tmp_path: Path) -> None:
    """Family, sizes, and what the config does not have: the depth of a ResNet and the patch size of a ViT."""
    torch.manual_seed(1)
    path = checkpoint(tmp_path, name)
    torch.manual_seed(1)
    expected = small_network(name, is_teacher=True).eval()
    images = torch.randn(2, 3, 64, 64)
    backbone = load(weights=str(path))
    assert not backbone.training
    assert torch.equal(backbone(images), expected(images))


def test_the_student_and_own_arguments(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "vit")
    teacher, student = load(weights=path), load(weights=path, checkpoint_key="student")
    assert not torch.equal(teacher.norm.weight, student.norm.weight)
    bare = checkpoint(tmp_path, "vit", args=None, config=None, world_size=None)
    yaml = tmp_path / "vit.yaml"
    yaml.write_text(load_config(None, SMALL["vit"].overrides).dump())
    again = load(weights=bare, arch="vit", cfg=str(yaml), patch_size=8)
    assert torch.equal(again.pos_embed, torch.load(bare)["teacher"]["pos_embed"])


@pytest.mark.parametrize(
    ("changes", "arguments", "words"),
    [
        ({"args": None, "config": None}, {}, "pass arch.*esvit_swin_tiny.*udi_vit_small"),
        ({"args": None}, {}, "pass arch"),
        ({"config": None}, {}, "pass arch"),
        ({}, {"arch": "resnet18"}, "resnet18"),
        ({}, {"arch": "swin_small"}, "arch 'swin_small'.*trained with 'swin'"),
        ({}, {"checkpoint_key": "nobody"}, "nobody"),
    ],
    ids=["published", "no arguments", "no config", "another network", "another size", "no such key"],
)
def test_errors_are_one_sentence(
    changes: dict[str, Any], arguments: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        load(weights=checkpoint(tmp_path, "swin", **changes), **arguments)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------- beside the user's modules

USER = """
import copy, importlib, io, pathlib, sys
NAMES = {names}
for name in NAMES[::2]:
    importlib.import_module(name)
import torch

def check_own():
    for name in NAMES:
        module = importlib.import_module(name)
        assert module.OWNER == "user", name
        assert pathlib.Path(module.__file__).is_relative_to(pathlib.Path.cwd()), name

path = list(sys.path)
backbone = torch.hub.load({root!r}, "esvit", source="local", weights={weights!r})
assert sys.path == path
check_own()
from models.swin import anything
images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    view = backbone(images)
    assert torch.equal(copy.deepcopy(backbone)(images), view)
    buffer = io.BytesIO()
    torch.save(backbone, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(images), view)
    # imports inside of functions, and everything else of the checkout, find the checkout's modules
    config = sys.modules["esvit_hub.config.schema"]
    assert "swin_transformer" in config.arch_specs()
    data = importlib.import_module("esvit_hub.data")
    assert data.build_dataset.__module__ == "esvit_hub.data.datasets"
    traced = torch.jit.trace(backbone, images, check_trace=False)
    assert torch.equal(traced(images), view)
try:
    torch.hub.load({root!r}, "esvit_swin_tiny", source="local", weights="nowhere.pth")
except ValueError as error:
    assert type(error).__name__ == "UsageError" and "does not exist" in str(error)
assert torch.hub.load({root!r}, "esvit_resnet50", source="local")(images).shape == (2, 2048)
check_own()
torch.save(view, "view.pth")
"""


@pytest.mark.slow
def test_beside_modules_of_the_same_names(tmp_path: Path) -> None:
    """A program whose modules have the names of this project's, half of them imported before the backbone is loaded."""
    weights = checkpoint(tmp_path, "swin")
    names = [path.parent.name for path in ROOT.glob("*/__init__.py")]
    assert {"models", "data", "config"} <= set(names)
    for name in names:
        (tmp_path / "user" / name).mkdir(parents=True)
        (tmp_path / "user" / name / "__init__.py").write_text("OWNER = 'user'\n")
    (tmp_path / "user" / "utils.py").write_text("OWNER = 'user'\n")
    (tmp_path / "user" / "models" / "swin.py").write_text("anything = 1\n")
    program = USER.format(names=["utils", *names], root=str(ROOT), weights=str(weights))
    (tmp_path / "user" / "main.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "main.py"], cwd=tmp_path / "user", env=clean_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    content: dict[str, dict[str, Tensor]] = torch.load(weights, weights_only=False)
    network = small_network("swin", is_teacher=True).eval()
    network.load_state_dict(content["teacher"])
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "user" / "view.pth"), network(images))


def test_this_process_keeps_its_modules() -> None:
    before = dict(sys.modules)
    backbone = load("esvit_deit_small")
    assert sys.modules["models"] is before["models"] is models
    assert not isinstance(backbone, models.Backbone)  # a copy of its own


def test_two_checkouts_in_one_process_are_refused(tmp_path: Path) -> None:
    load("esvit_deit_small")
    other = tmp_path / "other"
    other.mkdir()
    (other / "hubconf.py").write_text((ROOT / "hubconf.py").read_text())
    with pytest.raises(ImportError, match="another checkout"):
        torch.hub.load(str(other), "esvit_deit_small", source="local")
