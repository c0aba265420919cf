"""Which config builds a network that is evaluated: --cfg, the checkpoint's own, or the published one of --arch."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers.runs import write_images
from helpers.udi_runs import run as train

import eval_knn
import eval_video
import export
from checkpoints import serialization
from evaluation import features
from utils import UsageError

ARCH = ["--arch", "vit", "--patch_size", "4"]


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
    command = [*ARCH, "--device", "cpu", "--num_workers", "0", "--data_path", str(folder / "images"), "--nb_knn", "1"]
    command += ["--pretrained_weights", str(folder / "run" / "checkpoint.pth"), "--output_dir", str(out)]
    eval_knn.main(eval_knn.get_args_parser().parse_args([*command, "--dump_features", str(out / "dump"), *flags]))
    found: dict[str, Any] = json.loads((out / "results" / "knn.json").read_text())
    return found | {"features": torch.load(out / "dump" / "trainfeat.pth")}


def test_config_is_read_from_the_checkpoint(trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Two class tokens, positions and size without --cfg, and said; the features are those of the run's own yaml."""
    caplog.set_level(logging.INFO)
    told = f"the network is built from the config inside checkpoint '{trained / 'run' / 'checkpoint.pth'}'"
    found = knn(trained, tmp_path / "found")
    assert caplog.text.count(told) == 1
    named = knn(trained, tmp_path / "named", "--cfg", str(trained / "run" / "config.yaml"))
    assert caplog.text.count(told) == 1
    assert found["protocol"]["image_size"] == named["protocol"]["image_size"] == 32
    assert torch.equal(found["features"], named["features"])


def test_overrides_of_the_config_in_a_checkpoint(trained: Path, tmp_path: Path) -> None:
    found = knn(trained, tmp_path / "out", "--seed", "0", "MODEL.IMAGE_SIZE", "16")
    assert found["protocol"]["image_size"] == 16
    assert found["features"].shape == (6, 16)


@pytest.mark.parametrize("script", [export, eval_video], ids=lambda script: script.__name__)
def test_other_scripts_read_the_config_too(script: Any, trained: Path, tmp_path: Path) -> None:
    weights = [*ARCH, "--pretrained_weights", str(trained / "run" / "checkpoint.pth")]
    needed = {export: ["--format", "backbone", "--output", str(tmp_path / "x.pth")],
              eval_video: ["--frames", "f", "--first_mask", "m", "--output_dir", "o"]}  # fmt: skip
    args = script.get_args_parser().parse_args([*weights, *needed[script]])
    assert features.network_config(args).MODEL.SPEC.NUM_CLS_TOKENS == 2
    if script is export:
        export.main(args)
        assert serialization.load_file(tmp_path / "x.pth")["cls_token"].shape == (1, 2, 16)


def test_checkpoint_of_another_architecture(trained: Path) -> None:
    weights = ["--arch", "swin_tiny", "--pretrained_weights", str(trained / "run" / "checkpoint.pth")]
    with pytest.raises(UsageError, match=r"'swin_tiny' needs a yaml .*, the config inside .* describes 'vision_transf"):
        features.network_config(eval_knn.get_args_parser().parse_args(weights))


def test_files_without_config_use_the_published_one(trained: Path, tmp_path: Path) -> None:
    """Of this project one without; of others a bare backbone, what a Swin file calls so, a text that names a yaml or is one."""
    content = serialization.load_file(trained / "run" / "checkpoint.pth")
    foreign: list[Any] = [
        {"MODEL": {"TYPE": "swin"}},
        "configs/swin_tiny.yaml",
        "MODEL: {NAME: swin, EMBED: 96}",
        ": [",
    ]
    contents = [content | {"config": None}, content["teacher"]]
    contents += [{"model": content["teacher"], "config": config} for config in foreign]
    for number, other in enumerate(contents):
        torch.save(other, tmp_path / f"{number}.pth")
        assert serialization.saved_config(tmp_path / f"{number}.pth") is None
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)  # cannot be read in place
    old = serialization.saved_config(tmp_path / "old.pth")
    assert old is not None
    assert "NUM_CLS_TOKENS: 2" in old.text
    args = eval_knn.get_args_parser().parse_args(["--pretrained_weights", str(tmp_path / "0.pth")])
    assert features.network_config(args).MODEL.SPEC.NUM_CLS_TOKENS == 1


def test_damaged_config_in_a_checkpoint(trained: Path, tmp_path: Path) -> None:
    for text, words in (("MODEL: [", "is not valid yaml"), ("MODEL: {SPEC: {DEPHT: 2}}", "unknown config key")):
        torch.save({"teacher": {}, "config": text, "rng": [], "world_size": 1}, tmp_path / "x.pth")
        args = eval_knn.get_args_parser().parse_args(["--pretrained_weights", str(tmp_path / "x.pth")])
        with pytest.raises(UsageError, match=words) as caught:
            features.network_config(args)
        assert f"the config inside checkpoint '{tmp_path / 'x.pth'}'" in str(caught.value)
        assert str(caught.value).endswith("; name a yaml with --cfg")


def test_safetensors_have_no_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    safetensors.torch.save_file({"weight": torch.zeros(1)}, tmp_path / "x.safetensors")
    monkeypatch.setattr("safetensors.torch.load_file", None)
    assert serialization.saved_config(tmp_path / "x.safetensors") is None
