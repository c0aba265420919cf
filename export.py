"""Export a backbone to other libraries.

    python export.py --arch swin_tiny --pretrained_weights OUT/checkpoint.pth --format timm --output swin_tiny_timm.pth

backbone, safetensors   the published names, for this project, `hubconf.py` and other readers of EsViT files
timm                    for `timm.create_model(NAME, num_classes=0)` and `load_state_dict`
detectron2 (.pkl)       for `cfg.MODEL.WEIGHTS` or `train.init_checkpoint`
mmdet                   for `init_cfg=dict(type="Pretrained", checkpoint=FILE)` of the backbone
onnx                    a graph from images of MODEL.IMAGE_SIZE, in any number, to `view_features` and `region_features`

All formats expect RGB images normalized with INPUT.MEAN and INPUT.STD. timm's Swin has LayerNorm with eps 1e-5, these networks
1e-6: for equal features pass `norm_layer=partial(torch.nn.LayerNorm, eps=1e-6)` to `create_model`.

Networks with two class tokens (UDI) keep both. In timm they are a class and a register token: `timm.create_model(NAME,
reg_tokens=1, no_embed_class=False, num_classes=0)`. For programs that support one class token or none, as detectors, pass
`--class_tokens first` or `none`, which also drops the positions of the others. This changes all features: patches attended to
all class tokens in training.
"""

from __future__ import annotations

from config.arguments.export import CLASS_TOKENS
from config.arguments.export import get_args_parser as get_args_parser

if __name__ == "__main__":  # --help and usage errors are answered before torch is imported
    ARGS = get_args_parser().parse_command_line()

import argparse
import importlib.util
import os
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from checkpoints import files
from checkpoints.loading import load_backbone
from checkpoints.serialization import write_file
from distributed import launch
from evaluation.features import network_config
from models import Backbone, build_model
from models.base import HEAD_PREFIXES
from utils import UsageError, logger, setup_logging


def main(args: argparse.Namespace) -> None:
    """Load, convert, write.

    Raises:
        UsageError: an invalid --output, or weights of another network.
    """
    setup_logging()
    if os.path.lexists(args.output):
        raise UsageError(f"--output {args.output} exists already; choose another file")
    if not os.path.isdir(args.output.parent):
        raise UsageError(f"--output {args.output}: the folder {args.output.parent} does not exist; create it first")
    if (args.output.suffix == ".safetensors") != (args.format == "safetensors"):
        raise UsageError(
            f"--output {args.output} and --format {args.format} do not match: the suffix of safetensors files is .safetensors"
        )
    config = network_config(args)
    backbone = build_model(args.arch, config, is_teacher=True, patch_size=args.patch_size).eval()
    report = load_backbone(backbone, args.pretrained_weights, args.checkpoint_key, allow_partial=args.allow_partial)
    logger.info("%s: %s", args.pretrained_weights, report)
    drop_class_tokens(backbone, CLASS_TOKENS[args.class_tokens])
    with files.disk_errors(args.output, "--output"):
        write(backbone, args.format, args.output, config)
    logger.info("wrote %s (%s, %.1f MB)", args.output, args.format, args.output.stat().st_size / 1e6)


def drop_class_tokens(backbone: Backbone, kept: int | None) -> None:
    """Keep the first `kept` class tokens, or all if it is None, and warn if any are dropped."""
    if kept is None:
        return
    before = backbone.num_cls_tokens
    backbone.keep_class_tokens(kept)
    if kept < before:
        logger.warning(
            "kept %d of %d class tokens: this changes all features, because patches attended to every class token in training; "
            "keep all class tokens if the program that reads the file supports them",
            kept,
            before,
        )


def write(backbone: Backbone, target: str, output: Path, config: CfgNode) -> None:
    """Write a backbone in one of `FORMATS`.

    Raises:
        UsageError: the library does not have the architecture, or onnx is not installed.
    """
    if target == "onnx":
        write_onnx(backbone, output, tuple(config.MODEL.IMAGE_SIZE), config.MODEL.SPEC.IN_CHANS)
        return
    state = backbone.state_dict()  # modified in place, because its metadata is saved with it
    for name, tensor in list(state.items()):
        state[name] = tensor.clone(memory_format=torch.contiguous_format)
        if name.startswith(HEAD_PREFIXES) or not tensor.numel():  # empty: all class tokens were dropped
            del state[name]
    if target in {"timm", "detectron2", "mmdet"}:
        if target not in backbone.converters:
            choices = ", ".join(["backbone", "safetensors", "onnx", *backbone.converters])
            raise UsageError(f"--format {target} does not support {type(backbone).__name__}; choose one of {choices}")
        state = backbone.converters[target](state)
        if note := backbone.export_note(target):
            logger.warning(note)
    writers: dict[str, Callable[[Path], object]] = {
        "safetensors": lambda path: safetensors.torch.save_file(state, path),
        "detectron2": lambda path: path.write_bytes(_detectron2_pickle(state)),
        "mmdet": lambda path: write_file({"state_dict": state}, path),
    }
    _write_new(output, writers.get(target, lambda path: write_file(state, path)))


def _detectron2_pickle(state: dict[str, Tensor]) -> bytes:
    """Return a file of detectron2: numpy arrays, and a request to find the prefix of the backbone by heuristics."""
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    return pickle.dumps({"model": arrays, "__author__": "EsViT", "matching_heuristics": True})


def _write_new(output: Path, writer: Callable[[Path], object]) -> None:
    """Write a new file atomically; raise UsageError if it exists or cannot be written."""
    with files.disk_errors(output, "--output"):
        try:
            files.write_new([output], writer)
        except safetensors.SafetensorError as error:  # wraps an error of the disk
            raise OSError(str(error)) from error


class _ViewAndRegions(nn.Module):
    """A module with tuple outputs, for export to a graph."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return view features (B, C') and region features (B, T, C') of images (B, C, H, W)."""
        features = self.backbone.forward_features(images)
        return features.view_BC, features.regions_BTC


def write_onnx(backbone: Backbone, output: Path, image_size: tuple[int, ...], in_chans: int) -> None:
    """Write a graph from images (B, C, H, W) to `view_features` and `region_features`, with dynamic B.

    Raises:
        UsageError: onnx or onnxscript is not installed.
    """
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"--format onnx needs the package {package}; install it with pip install onnx onnxscript")
    program = torch.onnx.export(
        _ViewAndRegions(backbone).eval(),
        (torch.zeros(2, in_chans, *image_size),),
        input_names=["images"],
        output_names=["view_features", "region_features"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    _write_new(output, lambda path: program.save(path))


if __name__ == "__main__":
    launch.run_script(partial(main, ARGS))
