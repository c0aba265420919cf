"""Export a backbone to other libraries, and print the two lines that load it there.

    python export.py --pretrained_weights OUT/checkpoint.pth --format timm --output swin_tiny_timm.pth
    python export.py --pretrained_weights OUT/checkpoint.pth --format transformers --output swin_tiny_hub

backbone, safetensors   the published names, for this project, `hubconf.py` and other readers of EsViT files
timm                    for `timm.create_model(NAME, checkpoint_path=FILE, num_classes=0)`
transformers            a folder for `AutoModel.from_pretrained` and `AutoImageProcessor.from_pretrained`, with a model card
detectron2 (.pkl)       for `cfg.MODEL.WEIGHTS` or `train.init_checkpoint`
mmdet                   for `init_cfg=dict(type="Pretrained", checkpoint=FILE)` of the backbone
onnx                    a graph from any number of images to `view_features` and `region_features`
torchscript             the same for `torch.jit.load`

All formats expect RGB images normalized with INPUT.MEAN and INPUT.STD, and carry these values. Graphs take images of
MODEL.IMAGE_SIZE; the ONNX graph of a ViT or ResNet takes any size.

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
import os
from functools import partial

from checkpoints import files
from checkpoints.exports import loading_lines, preprocessing
from checkpoints.exports import write as write
from checkpoints.loading import load_backbone
from distributed import launch
from evaluation.features import network_config
from models import Backbone, build_model
from utils import UsageError, logger, setup_logging


def main(args: argparse.Namespace) -> None:
    """Load, convert, write, and print how to load.

    Raises:
        UsageError: an invalid --output, or weights of another network.
    """
    setup_logging()
    if os.path.lexists(args.output):
        raise UsageError(f"--output {args.output} exists already; choose another name")
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
        write(backbone, args.format, args.output, backbone.resolve_config(config), args.pretrained_weights, args.arch)
        written = [args.output, *args.output.glob("*")]
        size = sum(path.stat().st_size for path in written if path.is_file())
    logger.info("wrote %s (%s, %.1f MB)", args.output, args.format, size / 1e6)
    logger.info("images: RGB, %s", ", ".join(f"{key} {value}" for key, value in preprocessing(config).items()))
    print("\n".join(loading_lines(backbone, args.format, args.output, config)))


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


if __name__ == "__main__":
    launch.run_script(partial(main, ARGS))
