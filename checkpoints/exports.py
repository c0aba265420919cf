"""Write a backbone in the format of another library, with normalization and image size; give the lines that load it.

The normalization is in the metadata of safetensors and ONNX files, in an extra file of TorchScript's, in `_metadata` of a state
dict, which torch saves with it and readers ignore, under `preprocessing` or `meta` beside the tensors for detectron2 and mmdet, and
in `preprocessor_config.json` for transformers.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from checkpoints import files
from checkpoints.model_card import write_folder
from checkpoints.serialization import write_file
from models import Backbone
from models.base import HEAD_PREFIXES
from models.registry import ROOT
from utils import UsageError, logger

Writer = Callable[[Path], object]
OTHERS = ("backbone", "safetensors", "onnx", "torchscript")  # formats of all networks
OUTPUTS = ["view_features", "region_features"]  # of a graph


def preprocessing(config: CfgNode) -> dict[str, list[Any]]:
    """Return what a network expects of its RGB images: mean and std of channels in 0..1, and (height, width)."""
    mean, std, size = config.INPUT.MEAN, config.INPUT.STD, config.MODEL.IMAGE_SIZE
    return {"mean": list(mean), "std": list(std), "image_size": list(size)}


def write(
    backbone: Backbone,
    target: str,
    output: Path,
    config: CfgNode,
    weights: str | Path | None = None,
    arch: str | None = None,
) -> None:
    """Write a backbone in one of `FORMATS`.

    Args:
        output: the new file, or the new folder of `transformers`.
        weights: the checkpoint that was loaded, for the model card.
        arch: if given, files of this project describe their network (`checkpoints.network.saved_network`).

    Raises:
        UsageError: the library does not have the architecture, a package is missing, or the disk cannot be used.
    """
    images = preprocessing(config)
    if target == "transformers":
        network = backbone.to_transformers(own_state(backbone), config)
        with _disk_errors(output):
            files.write_new_folder(output, lambda folder: write_folder(folder, network, output.name, images, weights))
        return
    if target == "onnx":
        writer = onnx_writer(backbone, config, images)
    elif target == "torchscript":
        writer = torchscript_writer(backbone, config, images)
    else:
        described = arch is not None and target in {"backbone", "safetensors"}
        about = {"arch": arch, "patch_size": backbone.patch_size, "config": config.dump()}
        writer = state_writer(backbone, target, images, {"network": about} if described else {})
    with _disk_errors(output):
        files.write_new([output], writer)


@contextlib.contextmanager
def _disk_errors(output: Path) -> Iterator[None]:
    """Turn errors of the disk, also those that writers in other languages wrap, into one about --output."""
    with files.disk_errors(output, "--output"):
        try:
            yield
        except safetensors.SafetensorError as error:
            raise OSError(str(error)) from error


# --------------------------------------------------------------------------- state dicts


def own_state(backbone: Backbone) -> dict[str, Tensor]:
    """Return a copy of the tensors without heads. No two share memory, which safetensors refuses."""
    state = backbone.state_dict()  # modified in place, because its metadata is saved with it
    for name, tensor in list(state.items()):
        state[name] = tensor.clone(memory_format=torch.contiguous_format)
        if name.startswith(HEAD_PREFIXES) or not tensor.numel():  # empty: all class tokens were dropped
            del state[name]
    return state


def state_writer(
    backbone: Backbone, target: str, images: dict[str, list[Any]], network: dict[str, dict[str, Any]]
) -> Writer:
    """Return the writer of a file of tensors, with the names of `target` and `network` in its metadata."""
    state = own_state(backbone)
    if target not in OTHERS:
        if target not in backbone.converters:
            choices = ", ".join([*OTHERS, *backbone.converters])
            raise UsageError(f"--format {target} does not support {type(backbone).__name__}; choose one of {choices}")
        state = OrderedDict(backbone.converters[target](state))
        if note := backbone.export_note(target):
            logger.warning(note)
    if target == "safetensors":
        return lambda path: safetensors.torch.save_file(state, path, as_strings(images | network))
    if target == "detectron2":
        return lambda path: path.write_bytes(_detectron2_pickle(state, images))
    if target == "mmdet":
        return lambda path: write_file({"state_dict": state, "meta": {"preprocessing": images}}, path)
    metadata: dict[str, Any] = getattr(state, "_metadata", OrderedDict())
    state._metadata = metadata | {"preprocessing": images} | network  # type: ignore[attr-defined]
    return lambda path: write_file(state, path)


def as_strings(images: Mapping[str, Any]) -> dict[str, str]:
    """Return metadata as strings of JSON, for formats that hold nothing else."""
    return {key: json.dumps(value) for key, value in images.items()}


def _detectron2_pickle(state: dict[str, Tensor], images: dict[str, list[Any]]) -> bytes:
    """Return a file of detectron2: numpy arrays, and a request to find the prefix of the backbone by heuristics."""
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    content = {"model": arrays, "__author__": "EsViT", "matching_heuristics": True, "preprocessing": images}
    return pickle.dumps(content)


# --------------------------------------------------------------------------- graphs


class _ViewAndRegions(nn.Module):
    """A module with tuple outputs, for export to a graph."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return view features (B, C') and region features (B, T, C') of images (B, C, H, W)."""
        features = self.backbone.forward_features(images)
        return features.view_BC, features.regions_BTC


def onnx_writer(backbone: Backbone, config: CfgNode, images: dict[str, list[Any]]) -> Writer:
    """Return the writer of a graph with any number of images, of any size where the network allows it.

    Raises:
        UsageError: onnx or onnxscript is not installed.
    """
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"--format onnx needs the package {package}; install it with pip install onnx onnxscript")
    height, width = config.MODEL.IMAGE_SIZE
    dynamic = {0: "batch"}
    if not backbone.any_grid:
        logger.info(
            "the graph takes images of %d x %d pixels only: its windows or positions are traced for them", height, width
        )
    else:  # traced at another size, so that positions are resized in the graph
        height, width = height + 2 * backbone.patch_size, width + backbone.patch_size
        dynamic |= {2: "height", 3: "width"}
    program = torch.onnx.export(
        _ViewAndRegions(backbone).eval(),
        (torch.zeros(2, config.MODEL.SPEC.IN_CHANS, height, width),),
        input_names=["images"],
        output_names=OUTPUTS,
        dynamic_shapes={"images": dynamic},
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(as_strings(images))
    return program.save


def torchscript_writer(backbone: Backbone, config: CfgNode, images: dict[str, list[Any]]) -> Writer:
    """Return the writer of a trace with any number of images of MODEL.IMAGE_SIZE."""
    example = torch.zeros(2, config.MODEL.SPEC.IN_CHANS, *config.MODEL.IMAGE_SIZE)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # branches on the image size, which is fixed, and the deprecation of TorchScript
        traced = torch.jit.trace(_ViewAndRegions(backbone).eval().requires_grad_(False), example)
        archive = io.BytesIO()
        torch.jit.save(traced, archive, _extra_files={"preprocessing.json": json.dumps(images)})
    return lambda path: path.write_bytes(archive.getvalue())


# --------------------------------------------------------------------------- how to load it


def loading_lines(backbone: Backbone, target: str, output: Path, config: CfgNode) -> tuple[str, str]:
    """Return two lines of Python that load an exported file; those for a detector go into its config."""
    file, images = str(output), preprocessing(config)
    mean_255, std_255 = ([round(255 * value, 3) for value in images[key]] for key in ("mean", "std"))
    if target == "timm":
        model = backbone.in_timm(config)
        assert model is not None
        return "import timm", f"model = {model.call(num_classes=0, checkpoint_path=file)}"
    lines = {
        "transformers": (
            "from transformers import AutoImageProcessor, AutoModel",
            f"model, processor = AutoModel.from_pretrained({file!r}), AutoImageProcessor.from_pretrained({file!r})",
        ),
        "onnx": (
            "import onnxruntime",
            f"view_features, region_features = onnxruntime.InferenceSession({file!r}).run(None, {{'images': images.numpy()}})",
        ),
        "torchscript": ("import torch", f"view_features, region_features = torch.jit.load({file!r})(images)"),
        "detectron2": (
            f"train.init_checkpoint = {file!r}",
            f"model.input_format, model.pixel_mean, model.pixel_std = 'RGB', {mean_255}, {std_255}",
        ),
        "mmdet": (
            f"model['backbone']['init_cfg'] = dict(type='Pretrained', checkpoint={file!r})",
            f"model['data_preprocessor'].update(bgr_to_rgb=True, mean={mean_255}, std={std_255})",
        ),
    }
    own = "import torch", f"backbone = torch.hub.load({str(ROOT)!r}, 'esvit', source='local', weights={file!r})"
    if config.MODEL.SPEC.get("NUM_CLS_TOKENS") and not backbone.num_cls_tokens:  # no network of this project has none
        loaded = f"torch.load({file!r})" if target == "backbone" else f"safetensors.torch.load_file({file!r})"
        own = "import safetensors.torch, torch", f"state = {loaded}"
    return lines.get(target, own)
