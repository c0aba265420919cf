"""Exports load in mmdet itself, where they compute the same, and the configs in experiments/detection train."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, relative_error
from helpers import openmmlab  # noqa: F401 - before mmdet
from helpers.detector_networks import DEPTHS, DIM, NUM_HEADS, filled, load, resnet, stage_maps, swin
from mmdet.registry import DATASETS, MODELS
from mmdet.utils import register_all_modules
from mmengine import Config
from mmengine.dataset import pseudo_collate
from mmengine.evaluator import Evaluator
from mmengine.optim import build_optim_wrapper
from PIL import Image
from torch import nn

import export
import hubconf
from checkpoints.exports import loading_lines
from config.loading import load_config
from models import Backbone
from utils import UsageError

register_all_modules(init_default_scope=True)

SIZES = [(224, 224), (200, 264)]  # that of pre-training, and one whose windows need padding
SWIN = {
    "type": "SwinTransformer",
    "embed_dims": DIM,
    "num_heads": NUM_HEADS,
    "depths": DEPTHS,
    "norm_cfg": {"type": "LN", "eps": 1e-6},
}


def exported(network: Backbone, folder: Path) -> Path:
    export.write(network, "mmdet", folder / "mmdet.pth", load_config(None))
    return folder / "mmdet.pth"


def loaded(model: dict[str, Any], weights: Path) -> tuple[nn.Module, set[str]]:
    """The network of mmdet with the weights of a file, and the names of the tensors that the file left as they were."""
    network = MODELS.build(Config({**model, "init_cfg": {"type": "Pretrained", "checkpoint": str(weights)}}))
    untouched = {name: tensor for name, tensor in network.state_dict().items() if tensor.is_floating_point()}
    for tensor in untouched.values():
        tensor.fill_(torch.nan)
    network.init_weights()
    missing = {name for name, tensor in untouched.items() if tensor.isnan().any()}
    for name in missing:
        nn.init.constant_(
            untouched[name], float(name.endswith("weight"))
        )  # as initialized by mmdet: the norms of the outputs
    network.eval()
    return network, missing


def names_in(weights: Path) -> set[str]:
    return set(torch.load(weights, weights_only=True)["state_dict"])


# --------------------------------------------------------------------------- backbones


@torch.no_grad()
@pytest.mark.parametrize(("window", "equal"), [(7, 3), (14, 2)])
def test_mmdets_swin(window: int, equal: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first `equal` stages are the same. mmdet shifts the next, which one window covers in pre-training: the export says so."""
    ours = swin(window)
    with caplog.at_level("WARNING"):
        weights = exported(ours, tmp_path)
    assert f"mmdet has windows of {window} in all stages" in caplog.text
    theirs, missing = loaded({**SWIN, "window_size": window}, weights)
    assert missing == {f"norm{stage}.{kind}" for stage in range(3) for kind in ("weight", "bias")}
    assert names_in(weights) <= {f"backbone.{name}" for name in theirs.state_dict()}
    wide = swin(window, 64 * window)  # the same weights in a network whose last stage has several windows
    load(wide, ours, tmp_path)
    for size in SIZES:
        images = torch.randn(2, 3, *size)
        outputs = theirs(images)
        for output, expected in zip(outputs, stage_maps(wide, images)):
            assert relative_error(output, expected) < 1e-4
        errors = [relative_error(output, expected) for output, expected in zip(outputs, stage_maps(ours, images))]
        assert max(errors[:equal]) < 1e-4
        assert errors[equal] > 1e-3
    for block in theirs.stages[equal].blocks:  # type: ignore[union-attr, index]
        block.attn.shift_size = 0
    for output, expected in zip(theirs(images)[: equal + 1], stage_maps(ours, images)):
        assert relative_error(output, expected) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize(
    ("arch", "model"),
    [
        ("resnet18", {"type": "ResNet", "depth": 18}),
        ("resnext50_32x4d", {"type": "ResNeXt", "depth": 50, "groups": 32, "base_width": 4}),
    ],
)
def test_mmdets_resnet(arch: str, model: dict[str, Any], tmp_path: Path) -> None:
    ours = filled(resnet(arch))
    weights = exported(ours, tmp_path)
    theirs, missing = loaded(model, weights)
    assert missing == set()
    assert names_in(weights) == theirs.state_dict().keys()
    images = torch.randn(2, 3, 96, 72)
    for output, expected in zip(theirs(images), stage_maps(ours, images)):
        assert relative_error(output, expected) < 1e-4


def test_mmdet_has_no_wide_resnet(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="mmdet has no Wide ResNet"):
        exported(resnet("wide_resnet50_2"), tmp_path)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------- configs


@pytest.fixture
def objects(tmp_path: Path) -> Path:
    """A set in COCO's format: in each split two images, one with an object of each of two classes."""
    folder = tmp_path / "objects"
    (folder / "annotations").mkdir(parents=True)
    categories = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]
    for split in ("train", "val"):
        (folder / split).mkdir()
        images, annotations = [], []
        for number, category in enumerate(categories, start=1):
            Image.new("RGB", (64, 48), "teal").save(folder / split / f"{number}.jpg")
            images.append({"id": number, "file_name": f"{number}.jpg", "width": 64, "height": 48})
            box = {"bbox": [8, 8, 32, 24], "area": 768, "iscrowd": 0}
            annotations.append({"id": number, "image_id": number, "category_id": category["id"], **box})
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("name", ["swin_tiny", "resnet50"])
def test_the_configs_train_and_score(name: str, objects: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step and a score of the detector, as configured except for the size of the images."""
    network = getattr(hubconf, f"esvit_{name}")()
    weights = exported(network, tmp_path)
    monkeypatch.setenv("DATA", str(objects))
    monkeypatch.setenv("WEIGHTS", str(weights))
    config = Config.fromfile(ROOT / "experiments" / "detection" / f"mmdet_{name}.py")
    printed = copy.deepcopy(config.model)  # the lines that the export prints, on a config that needs them
    printed.backbone.init_cfg = None
    printed.data_preprocessor.update(mean=[0, 0, 0], std=[1, 1, 1], bgr_to_rgb=False)
    exec("\n".join(loading_lines(network, "mmdet", weights, load_config(None))), {"model": printed})
    assert printed == config.model
    detector = MODELS.build(config.model)
    detector.init_weights()
    backbone = {name: tensor.clone() for name, tensor in detector.backbone.state_dict().items()}
    for key, tensor in torch.load(weights, weights_only=True)["state_dict"].items():
        assert torch.equal(backbone[key.removeprefix("backbone.")], tensor), key

    for loader in (config.train_dataloader, config.val_dataloader):
        for step in loader.dataset.pipeline:
            if step.type == "Resize":
                step.scale = (96, 72)
    train, val = (DATASETS.build(loader.dataset) for loader in (config.train_dataloader, config.val_dataloader))
    assert tuple(train.metainfo["classes"]) == ("cat", "dog")
    assert [int(sample["data_samples"].gt_instances.labels) for sample in train] == [0, 1]
    assert detector.bbox_head.num_classes == 2
    optimizer = build_optim_wrapper(detector, config.optim_wrapper)
    losses = detector.train_step(pseudo_collate(list(train)), optimizer)
    assert all(value.isfinite() for value in losses.values())
    last = next(name for name, _ in reversed([*detector.backbone.named_parameters()]))
    assert not torch.equal(detector.backbone.state_dict()[last], backbone[last])

    detector.eval()
    detector.bbox_head.test_cfg.score_thr = 0.0  # keeps the boxes of a detector that has seen nothing
    evaluator = Evaluator(config.val_evaluator)
    evaluator.dataset_meta = val.metainfo
    with torch.no_grad():
        for sample in val:
            evaluator.process(detector.val_step(pseudo_collate([sample])))
    assert 0 <= evaluator.evaluate(len(val))["coco/bbox_mAP"] <= 1
