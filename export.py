"""Export a backbone to other libraries.

    python export.py --arch swin_tiny --pretrained_weights OUT/checkpoint.pth --format timm --output swin_tiny_timm.pth

backbone, safetensors   the published names; read by this project, `hubconf.py` and whatever knows EsViT files
timm                    timm's names; `timm.create_model(NAME, num_classes=0)`, then `load_state_dict`
detectron2 (.pkl)       `cfg.MODEL.WEIGHTS` or `train.init_checkpoint`; its matching finds the prefix
mmdet                   `init_cfg=dict(type="Pretrained", checkpoint=FILE)` of the backbone
onnx                    a graph from images of MODEL.IMAGE_SIZE, any number, to `view_features` and `region_features`

Networks with two class tokens (UDI) keep both. To timm that is a class and a register token: `timm.create_model(NAME, reg_tokens=1,
no_embed_class=False, num_classes=0)`. For programs that know one, or none as detectors do, `--class_tokens first` and `none` drop
the others with their positions, (1, 1 + N, C) or (1, N, C) for a grid of N patches; this is not function-preserving, for patches
attended to all class tokens in training.

Names are changed and tensors written as they are: all of it is the CPU's work, there is no --device.

All of them want images in RGB order, normalized as INPUT.MEAN and INPUT.STD say. timm's Swin has a LayerNorm eps of 1e-5, these
networks 1e-6; for equal features to the last digit pass `norm_layer=partial(torch.nn.LayerNorm, eps=1e-6)` to `create_model`.

Origin: this project's own.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from checkpoints import files
from checkpoints.loading import load_backbone
from checkpoints.serialization import write_file
from config import arguments
from distributed import collectives, launch
from evaluation.features import network_config
from models import Backbone, build_model
from models.base import HEADS
from utils import UsageError, logger

CLASS_TOKENS = {"all": None, "first": 1, "none": 0}
FORMATS = ("backbone", "safetensors", "timm", "detectron2", "mmdet", "onnx")


def get_args_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = arguments.Parser("export.py", description="Export a backbone, on the CPU: there is no --device")
    add = parser.add_argument
    arguments.add_network_flags(parser)
    arguments.add_weights_flags(parser, required=True)
    add("--format", required=True, choices=FORMATS, help="what to write")
    add(
        "--class_tokens",
        choices=list(CLASS_TOKENS),
        default="all",
        help="which of them to keep; see the top of export.py",
    )
    add("--output", type=Path, required=True, help="file to write; it must not exist yet")
    add("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    return parser


def main(args: argparse.Namespace) -> None:
    """Load, convert, write.

    Raises:
        UsageError: an output that exists, has no folder or another ending than the format, or a network that does not fit.
    """
    collectives.setup_logging()
    if os.path.lexists(args.output):
        raise UsageError(f"--output {args.output} exists already and is not overwritten; name another file")
    if not os.path.isdir(args.output.parent):
        raise UsageError(f"--output {args.output}: the folder {args.output.parent} does not exist; create it first")
    if (args.output.suffix == ".safetensors") != (args.format == "safetensors"):
        raise UsageError(
            f"--output {args.output}: --format safetensors and the ending .safetensors go together; change one"
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
    """Drop all class tokens but the first `kept`, where that is not None; tell what that does to the features.

    Raises:
        UsageError: see `Backbone.keep_class_tokens`.
    """
    if kept is None:
        return
    before = backbone.num_cls_tokens
    backbone.keep_class_tokens(kept)
    if kept < before:
        logger.warning(
            "class tokens kept: %d of %d. The export is not function-preserving: in training the patches attended to every class "
            "token in every block, so all features change; keep all where the program that reads the file can",
            kept,
            before,
        )


def write(backbone: Backbone, target: str, output: Path, config: CfgNode) -> None:
    """Write a backbone in one of `FORMATS`.

    Raises:
        UsageError: the library has no such architecture, or onnx is not installed.
    """
    if target == "onnx":
        write_onnx(backbone, output, tuple(config.MODEL.IMAGE_SIZE), config.MODEL.SPEC.IN_CHANS)
        return
    state = backbone.state_dict()  # kept as torch made it: its metadata goes into the file
    for name, tensor in list(state.items()):
        state[name] = tensor.clone(memory_format=torch.contiguous_format)
        if name.startswith(HEADS) or not tensor.numel():  # empty: class tokens of which none was kept
            del state[name]
    if target in {"timm", "detectron2", "mmdet"}:
        if target not in backbone.converters:
            able = ", ".join(["backbone", "safetensors", "onnx", *backbone.converters])
            raise UsageError(f"{target} has no {type(backbone).__name__}; choose --format {able}")
        state = backbone.converters[target](state)
    writers: dict[str, Callable[[Path], object]] = {
        "safetensors": lambda path: safetensors.torch.save_file(state, path),
        "detectron2": lambda path: path.write_bytes(_detectron2_pickle(state)),
        "mmdet": lambda path: write_file({"state_dict": state}, path),
    }
    _write_new(output, writers.get(target, lambda path: write_file(state, path)))


def _detectron2_pickle(state: dict[str, Tensor]) -> bytes:
    """detectron2's converted files hold numpy arrays; the heuristics find the prefix of the detector's backbone."""
    arrays = {name: tensor.numpy() for name, tensor in state.items()}
    return pickle.dumps({"model": arrays, "__author__": "EsViT", "matching_heuristics": True})


def _write_new(output: Path, writer: Callable[[Path], object]) -> None:
    """Write the file whole, if it has not come meanwhile.

    Raises:
        UsageError: it has, or the disk refuses.
    """
    with files.disk_errors(output, "--output"):
        try:
            files.write_new([output], writer)
        except safetensors.SafetensorError as error:  # which it makes of what the disk says
            raise OSError(str(error)) from error


class _ViewAndRegions(nn.Module):
    """Plain outputs for a graph."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) to the view features (B, C') and the region features (B, T, C')."""
        features = self.backbone.forward_features(images)
        return features.view_BC, features.regions_BTC


def write_onnx(backbone: Backbone, output: Path, image_size: tuple[int, ...], in_chans: int) -> None:
    """Write a graph from images (B, C, H, W) to `view_features` and `region_features`, B free.

    Raises:
        UsageError: onnx or onnxscript is not installed.
    """
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"--format onnx needs the package {package}; run pip install onnx onnxscript")
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
    launch.run_script(lambda: main(get_args_parser().parse_args()))
