"""Exports load in the real mmdet with `init_cfg=dict(type="Pretrained", ...)` and compute the same; its configs train on a small set."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, relative_error
from fill import fill_
from helpers import openmmlab  # noqa: F401 - before mmdet
from mmdet.registry import DATASETS, MODELS
from mmdet.utils import register_all_modules
from mmengine import Config
from mmengine.dataset import pseudo_collate
from mmengine.evaluator import Evaluator
from mmengine.optim import build_optim_wrapper
from PIL import Image
from torch import Tensor, nn

import export
import hubconf
from checkpoints import loading
from config.loading import load_config
from models import Backbone, build_model
from utils import UsageError

register_all_modules(init_default_scope=True)

SIZES = [(224, 224), (200, 264)]  # that of pre-training, and one whose windows need padding
SWIN = {
    "type": "SwinTransformer",
    "embed_dims": 8,
    "num_heads": [1, 2, 2, 4],
    "depths": [2, 2, 3, 2],
    "norm_cfg": {"type": "LN", "eps": 1e-6},
}


def swin(window: int, image_size: int = 224) -> Backbone:
    """A narrow Swin with the stages of the published ones."""
    spec = {"DIM_EMBED": 8, "NUM_HEADS": SWIN["num_heads"], "DEPTHS": SWIN["depths"], "WINDOW_SIZE": window}
    overrides = [word for key, value in spec.items() for word in (f"MODEL.SPEC.{key}", str(value))]
    config = load_config(None, ["MODEL.NAME", "swin_transformer", "MODEL.IMAGE_SIZE", str(image_size), *overrides])
    return filled(build_model("swin", config))


def resnet(arch: str) -> Backbone:
    return filled(build_model(arch, load_config(None, ["MODEL.NAME", "resnet"])))


def filled(network: Backbone) -> Backbone:
    fill_(network.state_dict())
    return network.eval()


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
        nn.init.constant_(untouched[name], float(name.endswith("weight")))  # as initialized by mmdet: the norms of the outputs
    network.eval()
    return network, missing


def names_in(weights: Path) -> set[str]:
    return set(torch.load(weights, weights_only=True)["state_dict"])


def stage_maps(network: Backbone, images: Tensor) -> list[Tensor]:
    """The last tokens (B, C, H, W) of each stage, normalized as a detector does: learned in the last stage only."""
    blocks = network.forward_blocks(images, sum(network.stage_depths))
    maps = []
    for stage, end in enumerate(accumulate(network.stage_depths), start=1):
        tokens_BNC, grid = blocks[end - 1].tokens_BNC, blocks[end - 1].grid
        if stage == len(network.stage_depths):
            tokens_BNC = network.norm(tokens_BNC)
        elif network.has_attention:
            tokens_BNC = F.layer_norm(tokens_BNC, tokens_BNC.shape[-1:], eps=1e-6)
        maps.append(tokens_BNC.transpose(1, 2).unflatten(2, grid))
    return maps


# --------------------------------------------------------------------------- backbones


@torch.no_grad()
@pytest.mark.parametrize(("window", "equal", "unshifted"), [(7, 3, [3]), (14, 2, [2])])
def test_mmdets_swin(
    window: int, equal: int, unshifted: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Stages of several windows are equal; one that a single window covers at pre-training is shifted by mmdet, as the export says."""
    ours = swin(window)
    with caplog.at_level("WARNING"):
        weights = exported(ours, tmp_path)
    assert f"mmdet has windows of {window} in all stages" in caplog.text
    theirs, missing = loaded({**SWIN, "window_size": window}, weights)
    assert missing == {f"norm{stage}.{kind}" for stage in range(3) for kind in ("weight", "bias")}
    assert names_in(weights) <= {f"backbone.{name}" for name in theirs.state_dict()}
    wide = swin(window, 64 * window)  # the same weights in a network whose last stage has several windows
    torch.save(ours.state_dict(), tmp_path / "ours.pth")
    loading.load_backbone(wide, tmp_path / "ours.pth")
    for size in SIZES:
        images = torch.randn(2, 3, *size)
        outputs = theirs(images)
        for output, expected in zip(outputs, stage_maps(wide, images)):
            assert relative_error(output, expected) < 1e-4
        errors = [relative_error(output, expected) for output, expected in zip(outputs, stage_maps(ours, images))]
        assert max(errors[:equal]) < 1e-4
        assert errors[equal] > 1e-3
    for stage in unshifted:
        for block in theirs.stages[stage].blocks:  # type: ignore[union-attr]
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
    ours = resnet(arch)
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
            image = {"id": number, "file_name": f"{number}.jpg", "width": 64, "height": 48}
            Image.new("RGB", (64, 48), category["name"] == "cat" and "teal" or "tan").save(folder / split / f"{number}.jpg")
            images.append(image)
            box = {"bbox": [8, 8, 32, 24], "area": 768, "iscrowd": 0}
            annotations.append({"id": number, "image_id": number, "category_id": category["id"], **box})
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("name", ["swin_tiny", "resnet50"])
def test_the_configs_train_and_score(name: str, objects: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step and a score of the detector, as configured except for the size of the images."""
    weights = exported(getattr(hubconf, f"esvit_{name}")(), tmp_path)
    monkeypatch.setenv("DATA", str(objects))
    monkeypatch.setenv("WEIGHTS", str(weights))
    config = Config.fromfile(ROOT / "experiments" / "detection" / f"mmdet_{name}.py")
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
