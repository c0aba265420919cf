"""The network that is evaluated: named by the command line, by the checkpoint, or the published one of --arch."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers.genuine_runs import GENUINE, NAMES, probe_images
from helpers.runs import write_images
from helpers.udi_runs import run as train

import eval_knn
import eval_video
import export
from checkpoints import serialization
from checkpoints.network import SavedNetwork, saved_network
from config.loading import SavedConfig
from evaluation import features
from utils import UsageError


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`images` of two classes, and a run of UDI on them in `run`."""
    folder = tmp_path_factory.mktemp("trained")
    for seed, part in enumerate(("train", "val")):
        write_images(folder / "images" / part, 3, classes=2, seed=seed)
    train(folder / "run", folder / "images" / "train", "--epochs", "1")
    return folder


@pytest.fixture(autouse=True)
def _logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("esvit"), "propagate", True)
    monkeypatch.setattr("utils.setup_logging", lambda *_: None)


def knn(folder: Path, out: Path, *flags: str) -> dict[str, Any]:
    command = ["--device", "cpu", "--num_workers", "0", "--data_path", str(folder / "images"), "--nb_knn", "1"]
    command += ["--pretrained_weights", str(folder / "run" / "checkpoint.pth"), "--output_dir", str(out)]
    eval_knn.main(eval_knn.get_args_parser().parse_args([*command, "--dump_features", str(out / "dump"), *flags]))
    found: dict[str, Any] = json.loads((out / "results" / "knn.json").read_text())
    return found | {"features": torch.load(out / "dump" / "trainfeat.pth")}


def test_network_is_read_from_the_checkpoint(trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without --arch, --patch_size and --cfg the features are equal to those of the run's own yaml."""
    caplog.set_level(logging.INFO)
    told = f"the network is vit of the config inside checkpoint '{trained / 'run' / 'checkpoint.pth'}'"
    found = knn(trained, tmp_path / "found")
    assert caplog.text.count(told) == 1
    flags = ["--arch", "vit", "--patch_size", "4", "--cfg", str(trained / "run" / "config.yaml")]
    named = knn(trained, tmp_path / "named", *flags)
    assert found["network"] == named["network"]
    assert found["network"]["arch"] == "vit"
    assert caplog.text.count(told) == 1
    assert found["protocol"]["image_size"] == named["protocol"]["image_size"] == 32
    assert torch.equal(found["features"], named["features"])


def test_overrides_of_the_config_in_a_checkpoint(trained: Path, tmp_path: Path) -> None:
    found = knn(trained, tmp_path / "out", "--seed", "0", "MODEL.IMAGE_SIZE", "16")
    assert found["protocol"]["image_size"] == 16
    assert found["features"].shape == (6, 16)


@pytest.mark.parametrize("script", [export, eval_video], ids=lambda script: script.__name__)
def test_other_scripts_read_the_config_too(script: Any, trained: Path, tmp_path: Path) -> None:
    weights = ["--pretrained_weights", str(trained / "run" / "checkpoint.pth")]
    needed = {export: ["--format", "backbone", "--output", str(tmp_path / "x.pth")],
              eval_video: ["--frames", "f", "--first_mask", "m", "--output_dir", "o"]}  # fmt: skip
    args = script.get_args_parser().parse_args([*weights, *needed[script]])
    assert features.network_config(args).MODEL.SPEC.NUM_CLS_TOKENS == 2
    if script is export:
        export.main(args)
        assert serialization.load_file(tmp_path / "x.pth")["cls_token"].shape == (1, 2, 16)


def test_checkpoint_of_another_architecture(trained: Path) -> None:
    weights = ["--arch", "swin_tiny", "--pretrained_weights", str(trained / "run" / "checkpoint.pth")]
    args = eval_knn.get_args_parser().parse_args(weights)
    with pytest.raises(UsageError, match=r"--arch swin_tiny: .* was trained with --arch vit"):
        features.network_config(args)
    args = eval_knn.get_args_parser().parse_args([*weights, "--allow_partial"])
    assert features.network_config(args).MODEL.NAME == "swin_transformer"
    assert args.patch_size == 16


def test_architecture_of_another_size(trained: Path) -> None:
    """Of the same family, but not of the size in the checkpoint."""
    weights = ["--arch", "deit_small", "--pretrained_weights", str(trained / "run" / "checkpoint.pth")]
    with pytest.raises(UsageError, match=r"--arch deit_small: .* was trained with --arch vit"):
        features.network_config(eval_knn.get_args_parser().parse_args(weights))
    args = eval_knn.get_args_parser().parse_args([*weights, "--allow_partial"])
    assert features.network_config(args).MODEL.SPEC.DIM_EMBED == 384
    generic = eval_knn.get_args_parser().parse_args(
        ["--arch", "vit", "--pretrained_weights", str(GENUINE / "udi_vit.pth")]
    )
    assert features.network_config(generic).MODEL.SPEC.NUM_CLS_TOKENS == 2


def test_no_architecture_is_named(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "bare.pth")
    for flags in (["--pretrained_weights", str(tmp_path / "bare.pth")], ["--random_weights"]):
        with pytest.raises(UsageError, match=r"pass --arch, one of .*swin_tiny"):
            features.network_config(eval_knn.get_args_parser().parse_args(flags))


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("esvit")])
def test_published_full_checkpoints_name_their_network(name: str) -> None:
    """Arguments in a file of the released program select yaml, overrides and architecture; features are equal to its own."""
    args = eval_knn.get_args_parser().parse_args(
        ["--pretrained_weights", str(GENUINE / f"{name}.pth"), "--device", "cpu"]
    )
    network = features.frozen_backbone(
        args, features.network_config(args), args.pretrained_weights, torch.device("cpu")
    )
    with np.load(GENUINE / f"{name}.npz") as golden:
        np.testing.assert_allclose(network(probe_images()).numpy(), golden["features/teacher"], atol=1e-5)


def test_class_tokens_and_patches_of_published_udi() -> None:
    args = eval_knn.get_args_parser().parse_args(["--pretrained_weights", str(GENUINE / "udi_vit.pth")])
    config = features.network_config(args)
    assert (args.arch, args.patch_size) == ("vit_small", 8)
    assert (config.MODEL.SPEC.NUM_CLS_TOKENS, config.MODEL.SPEC.POS_RESIZE) == (2, "scale")


def test_files_without_config_use_the_published_one(trained: Path, tmp_path: Path) -> None:
    """Of this project one without; of others a bare backbone, what a Swin file calls so, a text that names a yaml or is one."""
    content = serialization.load_file(trained / "run" / "checkpoint.pth")
    foreign: list[Any] = [
        {"MODEL": {"TYPE": "swin"}},
        "configs/swin_tiny.yaml",
        "MODEL: {NAME: swin, EMBED: 96}",
        ": [",
    ]
    contents = [content | {"config": None, "args": None}, content["teacher"]]
    contents += [{"model": content["teacher"], "config": config} for config in foreign]
    contents += [{"model": content["teacher"], "args": argparse.Namespace(arch="resmlp", cfg=3, opts=["A"])}]
    for number, other in enumerate(contents):
        torch.save(other, tmp_path / f"{number}.pth")
        assert saved_network(tmp_path / f"{number}.pth") == SavedNetwork()
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)  # cannot be read in place
    old = saved_network(tmp_path / "old.pth")
    assert isinstance(old.config, SavedConfig)
    assert "NUM_CLS_TOKENS: 2" in old.config.text
    args = eval_knn.get_args_parser().parse_args(
        ["--arch", "deit_small", "--pretrained_weights", str(tmp_path / "0.pth")]
    )
    assert features.network_config(args).MODEL.SPEC.NUM_CLS_TOKENS == 1


def test_damaged_config_in_a_checkpoint(trained: Path, tmp_path: Path) -> None:
    for text, words in (("MODEL: [", "is not valid yaml"), ("MODEL: {SPEC: {DEPHT: 2}}", "unknown config key")):
        torch.save({"teacher": {}, "config": text, "rng": [], "world_size": 1}, tmp_path / "x.pth")
        args = eval_knn.get_args_parser().parse_args(["--arch", "vit", "--pretrained_weights", str(tmp_path / "x.pth")])
        with pytest.raises(UsageError, match=words) as caught:
            features.network_config(args)
        assert f"the config inside checkpoint '{tmp_path / 'x.pth'}'" in str(caught.value)
        assert str(caught.value).endswith("; name a yaml with --cfg")


def test_safetensors_have_no_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    safetensors.torch.save_file({"weight": torch.zeros(1)}, tmp_path / "x.safetensors")
    monkeypatch.setattr("safetensors.torch.load_file", None)
    assert saved_network(tmp_path / "x.safetensors") == SavedNetwork()
