"""Exports have the names of detectron2's networks, and compute what these did (tests/golden/detectron2.npz)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import golden_arrays, relative_error
from fill import fill_
from fill import tensor as golden_input
from helpers.detector_networks import load, resnet, stage_maps, swin
from helpers.small_networks import small_network
from torch import nn


@torch.no_grad()
@pytest.mark.parametrize("name", ["swin", "resnet", "vit"])
def test_detectron2s_numbers(name: str) -> None:
    """Networks of detectron2 (golden/README.md) have the exported names, and computed this from the weights of each name."""
    golden = golden_arrays("detectron2")
    if name == "vit":
        network = small_network("vit").eval()
        network.keep_class_tokens(0)
        images, outputs = (1, 3, 64, 64), ["last_feat"]
    elif name == "swin":
        network, images, outputs = swin(7, 448), (1, 3, 72, 100), ["p0", "p1", "p2", "p3"]
    else:
        network, images, outputs = resnet("resnet50"), (1, 3, 32, 32), ["res2", "res3", "res4", "res5"]
    state = network.converters["detectron2"](network.state_dict())  # the same tensors under other names
    theirs = json.loads(str(golden[f"{name}/keys"]))
    output_norms = [key for key in theirs if key.startswith(("norm0", "norm1", "norm2"))]  # which no pre-training has
    assert {key: list(value.shape) for key, value in state.items()} == {
        key: shape for key, shape in theirs.items() if key not in output_norms
    }
    fill_(state)
    if name == "vit":
        network.norm = nn.Identity()
        maps = [network.forward_feature_maps(golden_input("detectron2", *images))]
    else:
        maps = stage_maps(network, golden_input("detectron2", *images))
    for output, ours in zip(outputs, maps, strict=True):
        assert relative_error(ours, golden[f"{name}/{output}"]) < 1e-5


@pytest.mark.parametrize("target", ["mmdet", "detectron2"])
def test_a_detectors_swin_has_one_window(target: str, tmp_path: Path) -> None:
    """Tables of smaller windows are resized as for a network whose stages all have the larger one."""
    ours, wide = swin(14), swin(14, 896)
    load(wide, ours, tmp_path)
    tables, expected = (network.converters[target](network.state_dict()) for network in (ours, wide))
    assert tables.keys() == expected.keys()
    assert len({len(table) for name, table in tables.items() if name.endswith("bias_table")}) == 1
    assert all(torch.equal(table, expected[name]) for name, table in tables.items())


@pytest.mark.parametrize("target", ["mmdet", "detectron2", "timm"])
@pytest.mark.parametrize(
    ("window", "image_size", "stages"), [(7, 224, "stage 4,"), (14, 224, "stages 3 and 4,"), (7, 448, "")]
)
def test_the_stages_that_a_detector_shifts_are_told(target: str, window: int, image_size: int, stages: str) -> None:
    note = swin(window, image_size).export_note(target)
    if target == "timm" or not stages:
        assert note is None
    else:
        assert note is not None
        assert f"in {stages}" in note
