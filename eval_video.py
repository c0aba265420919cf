"""Follow the objects of a video's first frame through all frames, by the similarity of frozen region features (DAVIS 2017).

    python eval_video.py --arch deit_small --pretrained_weights OUT/checkpoint.pth --frames JPEGImages/480p/bike-packing \\
        --first_mask Annotations/480p/bike-packing/00000.png --output_dir OUT/davis/bike-packing
    bash scripts/davis.sh deit_small DAVIS OUT/checkpoint.pth OUT/davis         # every video of the validation set

--frames is a folder of images, in the order of their names (the numbers in them count as numbers); --first_mask an indexed PNG of
the first one's size, each of whose values is an object (0 the background). --output_dir gets an indexed PNG with the same palette
for each frame, which the official davis2017-evaluation scores. Regions are normed tokens of the last block without class tokens,
of any architecture; see analysis/propagation.py for the rule.

Frames are resized to --image_size on their shorter side, the longer one to a multiple of 64 below, and normalised as the network
knows it (DINO's script divides red by 0.228 instead of 0.229).

Origin: the protocol of DINO (Caron et al., ICCV 2021) on DAVIS (Pont-Tuset et al., 2017); UDI (Su and Ji, ECCV 2024) keeps it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF
from tqdm import tqdm

import data
import flags
import utils
from analysis.images import Scale, scale_of
from analysis.propagation import Rule, follow, to_pixels, to_regions
from data.augment import as_tensor
from data.datasets import reason_of
from data.decode import read_image
from data.tree import EXTENSIONS
from features import frozen_backbone
from models import Backbone, load_arch_config
from utils import UsageError, logger

LONGER_SIDE_STEP = 64  # pixels
INDEXED = ("P", "L", "1")  # modes of images whose values are labels


def get_args_parser() -> argparse.ArgumentParser:
    """The command line: names and defaults of DINO's script where it has them."""
    parser = flags.Parser("eval_video.py", description="follow the objects of a video's first frame")
    add = parser.add_argument
    flags.add_network_flags(parser)
    flags.add_weights_flags(parser, random_on_request=True)
    add("--frames", required=True, help="folder with the images of one video")
    add("--first_mask", required=True, help="indexed PNG with the objects of the first image")
    add("--output_dir", required=True, help="folder for an indexed PNG of each image; none of them may be there yet")
    add("--image_size", type=int, default=480, help="shorter side in pixels")
    rule = Rule()
    add(
        "--n_last_frames",
        type=int,
        default=rule.last_frames,
        help="frames before that give labels, beside the first one",
    )
    add("--size_mask_neighborhood", type=int, default=rule.radius, help="how many regions away; 0: any number")
    add("--topk", type=int, default=rule.top, help="regions that give a region its label")
    add("--temperature", type=float, default=rule.temperature, help="of their weights, exp(cosine / temperature)")
    add("--seed", type=int, default=0, help="of random weights")
    add("--device", default="auto", help="auto (cuda, else mps, else cpu), cuda, cuda:N, mps or cpu")
    add("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    parser.set_defaults(token="cls")  # regions are no class tokens
    return parser


def list_frames(folder: str) -> list[Path]:
    """The images of a folder in the order of their names, numbers as numbers.

    Raises:
        UsageError: no such folder, fewer than two images, or two that would be written under one name.
    """
    if not Path(folder).is_dir():
        raise UsageError(f"--frames {folder} is no folder; name the folder of a video's images")
    found = [path for path in Path(folder).iterdir() if path.suffix.lower() in EXTENSIONS]
    found.sort(
        key=lambda path: [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.stem)]
    )
    if len(found) < 2:
        raise UsageError(f"--frames {folder} has {len(found)} images; a video has two or more")
    if len({path.stem for path in found}) < len(found):
        raise UsageError(f"--frames {folder} has several images of one name; keep one kind of file")
    return found


def read_mask(path: str, frame: Image.Image | Tensor, frame_name: Path) -> Image.Image:
    """The indexed image of --first_mask.

    Raises:
        UsageError: no such file, no image of labels, one without objects, or of another size than the first frame.
    """
    try:
        with Image.open(path) as opened:
            mask = opened.copy()
    except (OSError, UnidentifiedImageError) as error:
        raise UsageError(f"--first_mask {path} cannot be read ({reason_of(error)}); name an indexed PNG") from None
    if mask.mode not in INDEXED:
        raise UsageError(
            f"--first_mask {path} has colours (mode {mask.mode}), not a label for each pixel; save it indexed"
        )
    size = _size_of(frame)
    if (mask.height, mask.width) != size:
        raise UsageError(
            f"--first_mask {path} is of {mask.width} x {mask.height} pixels, {frame_name.name} of {size[1]} x {size[0]}; "
            "take the mask of the first frame"
        )
    if len(np.unique(np.asarray(mask))) < 2:
        raise UsageError(f"--first_mask {path} has one value everywhere; it has to mark an object")
    return mask


def _size_of(frame: Image.Image | Tensor) -> tuple[int, int]:
    return (frame.shape[1], frame.shape[2]) if isinstance(frame, Tensor) else (frame.height, frame.width)


def resized_size(size: tuple[int, int], scale: Scale) -> tuple[int, int]:
    """Height and width that frames of `size` are resized to.

    Raises:
        UsageError: a shorter side that is no multiple of a region.
    """
    shorter = scale.shorter_side
    if any(shorter % side for side in scale.region):
        raise UsageError(
            f"--image_size {shorter} is no multiple of this network's regions of {scale.region} pixels; change it"
        )
    longer = shorter * max(size) // min(size)
    step = (
        LONGER_SIDE_STEP
        if LONGER_SIDE_STEP % max(scale.region) == 0 and longer >= LONGER_SIDE_STEP
        else max(scale.region)
    )
    longer = longer // step * step
    return (shorter, longer) if size[1] > size[0] else (longer, shorter)


@torch.no_grad()
def region_maps(
    backbone: Backbone, frames: list[Path], in_chans: int, scale: Scale, device: torch.device
) -> Iterator[Tensor]:
    """Region features (C, h, w) of one frame after the other.

    Raises:
        UsageError: a frame cannot be read, or is of another size than the first one.
    """
    sizes: set[tuple[int, int]] = set()
    for path in frames:
        frame = read_frame(path, in_chans)
        sizes.add(_size_of(frame))
        if len(sizes) > 1:
            raise UsageError(f"{path} is of another size than the frames before it; frames of a video are of one size")
        pixels = TF.resize(
            as_tensor(frame), list(resized_size(_size_of(frame), scale)), InterpolationMode.BILINEAR, antialias=True
        )
        yield backbone.forward_feature_maps(scale.normalised(pixels).to(device))[0]


def read_frame(path: Path, in_chans: int) -> Image.Image | Tensor:
    """A frame as it is stored.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        return read_image(str(path), in_chans)
    except Exception as error:  # on damaged bytes decoders raise whatever they stumble over
        raise UsageError(f"cannot read the frame {path} ({reason_of(error)}); repair or remove it") from None


def check_args(args: argparse.Namespace) -> None:
    """Stop on values that no part of the program would refuse by itself.

    Raises:
        UsageError: naming the flag.
    """
    flags.check_weights(args)
    flags.check_at_least(args, 1, ["topk", "image_size"])
    flags.check_at_least(args, 0, ["n_last_frames", "size_mask_neighborhood"])
    if not args.temperature > 0:
        raise UsageError(f"--temperature {args.temperature} must be positive")


def main(args: argparse.Namespace) -> None:
    """Read, follow, write."""
    utils.setup_logging()
    device = utils.resolve_device(args.device)
    check_args(args)
    config = load_arch_config(args.arch, args.cfg, args.opts)
    data.augment.check_normalisation(config.INPUT.MEAN, config.INPUT.STD, config.MODEL.SPEC.IN_CHANS)
    in_chans = config.MODEL.SPEC.IN_CHANS
    frames = list_frames(args.frames)
    first = read_frame(frames[0], in_chans)
    mask = read_mask(args.first_mask, first, frames[0])
    folder = utils.make_output_dir(args.output_dir)
    written = [folder / f"{frame.stem}.png" for frame in frames]
    there = [path for path in written if path.exists()]
    if there:
        raise UsageError(f"--output_dir {folder} holds {there[0].name} already; choose another folder")
    backbone = frozen_backbone(args, config, args.pretrained_weights, device)
    if not args.pretrained_weights:
        logger.warning("--random_weights: objects are followed by an untrained network")
    scale = scale_of(backbone, config, args.image_size, device)
    size = resized_size(_size_of(first), scale)
    grid = (size[0] // scale.region[0], size[1] // scale.region[1])
    labels_HW = torch.from_numpy(np.array(mask.convert("L") if mask.mode == "1" else mask))
    values = labels_HW.unique()
    first_NK = to_regions(labels_HW, values, grid)
    lost = values[first_NK.sum(dim=0) == 0].tolist()
    if lost:
        logger.warning("too small for one region and not followed: the objects %s of %s", lost, args.first_mask)
    rule = Rule(args.n_last_frames, args.size_mask_neighborhood, args.topk, args.temperature)
    maps = region_maps(backbone, frames, in_chans, scale, device)
    mask.save(written[0])
    for path, labels_NK in zip(
        written[1:], tqdm(follow(maps, first_NK.to(device), rule), total=len(frames) - 1, disable=None)
    ):
        found = values[to_pixels(labels_NK, grid, size).cpu()].to(torch.uint8)
        image = Image.fromarray(found.numpy()).resize(mask.size, Image.Resampling.NEAREST)
        if mask.mode == "P":
            image.putpalette(mask.getpalette() or [])
        image.save(path)
    logger.info("wrote %d masks to %s", len(written), folder)


if __name__ == "__main__":
    utils.run_script(lambda: main(get_args_parser().parse_args()))
