"""Follow the objects of a video's first frame through all frames, by the similarity of frozen region features (DAVIS 2017).

    python eval_video.py --arch deit_small --pretrained_weights OUT/checkpoint.pth --frames JPEGImages/480p/bike-packing \\
        --first_mask Annotations/480p/bike-packing/00000.png --output_dir OUT/davis/bike-packing
    bash scripts/davis.sh deit_small DAVIS OUT/checkpoint.pth OUT/davis         # every video of the validation set

--frames is a folder of images, in the order of their names (the numbers in them count as numbers); --first_mask an indexed PNG of
the first one's size, each of whose values is an object (0 the background). --output_dir gets an indexed PNG with the same palette
for each frame, which the official davis2017-evaluation scores. Regions are normed tokens of the last block without class tokens,
of any architecture; see analysis/propagation.py for the rule.

Frames are resized to --image_size on their shorter side, the longer one to a multiple of 64 below, and normalized as the network
knows it (DINO's script divides red by 0.228 instead of 0.229).

Origin: the protocol of DINO (Caron et al., ICCV 2021) on DAVIS (Pont-Tuset et al., 2017); UDI (Su and Ji, ECCV 2024) keeps it.
"""

from __future__ import annotations

import argparse
import io
import os
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF
from tqdm import tqdm
from yacs.config import CfgNode

import utils
from analysis.images import Scale, scale_of
from analysis.propagation import Rule, follow, to_pixels, to_regions
from checkpoints import files
from config import arguments
from config.ranges import COUNT, PIXELS, SEED, TEMPERATURE, integer
from data.datasets import reason_of
from data.decode import ImageLike, UndeclaredRange, open_image, read_image
from data.layouts.sources import read_file
from data.layouts.tree import is_image_file
from data.transforms import augment
from data.transforms.augment import as_tensor
from distributed import collectives, launch
from evaluation.features import frozen_backbone, network_config
from models import Backbone
from utils import UsageError, logger

LONGER_SIDE_STEP = 64  # pixels
INDEXED = ("P", "L")  # modes of images whose values are labels


def get_args_parser() -> argparse.ArgumentParser:
    """The command line: names and defaults of DINO's script where it has them."""
    parser = arguments.Parser("eval_video.py", description="follow the objects of a video's first frame")
    add = parser.add_argument
    arguments.add_network_flags(parser)
    arguments.add_weights_flags(parser)
    add("--frames", required=True, help="folder with the images of one video")
    add("--first_mask", required=True, help="indexed PNG with the objects of the first image")
    add("--output_dir", required=True, help="folder for an indexed PNG of each image; none of them may be there yet")
    add("--image_size", type=PIXELS, default=480, help="shorter side in pixels")
    rule = Rule()
    add(
        "--n_last_frames",
        type=integer(0),
        default=rule.last_frames,
        help="frames that give labels, beside the first one",
    )
    add("--size_mask_neighborhood", type=integer(0), default=rule.radius, help="how many regions away; 0: any number")
    add("--topk", type=COUNT, default=rule.top, help="regions that give a region its label")
    add("--temperature", type=TEMPERATURE, default=rule.temperature, help="of their weights, exp(cosine / temperature)")
    add("--seed", type=SEED, default=0, help="of random weights")
    add("--device", default="auto", help="auto (cuda, else mps, else cpu), cuda, cuda:N, mps or cpu")
    add("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    parser.set_defaults(token="cls")  # regions are no class tokens
    return parser


# --------------------------------------------------------------------------- the video


class Video(NamedTuple):
    """Frames in their order, and the objects of the first one."""

    frames: list[Path]
    mask: Image.Image  # of mode P or L, as large as the frames
    in_chans: int
    value_range: Sequence[float] = ()  # INPUT.RANGE

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the frames."""
        return self.mask.height, self.mask.width


def open_video(frames_folder: str, first_mask: str, in_chans: int, value_range: Sequence[float] = ()) -> Video:
    """The images of a folder in the order of their names, numbers as numbers, and the mask that goes with the first.

    Raises:
        UsageError: no such folder or mask, fewer than two images, two that would be written under one name, or a mask of another
            size.
    """
    if not os.path.isdir(frames_folder):
        raise UsageError(f"--frames {frames_folder} is no folder; name the folder of a video's images")
    frames = [path for path in Path(frames_folder).iterdir() if is_image_file(path)]
    frames.sort(
        key=lambda path: [part.zfill(20) if part.isdecimal() else part for part in re.split(r"(\d+)", path.stem)]
    )
    if len(frames) < 2:
        raise UsageError(f"--frames {frames_folder} has {utils.counted(len(frames), 'image')}; a video has two or more")
    if len({path.stem for path in frames}) < len(frames):
        raise UsageError(f"--frames {frames_folder} has several images of one name; keep one kind of file")
    video = Video(frames, read_mask(first_mask), in_chans, value_range)
    height, width = size_of(read_frame(frames[0], video))
    if video.size != (height, width):
        raise UsageError(
            f"--first_mask {first_mask} is of {video.mask.width} x {video.mask.height} pixels, {frames[0].name} of "
            f"{width} x {height}; take the mask of the first frame"
        )
    return video


def read_mask(path: str) -> Image.Image:
    """An image whose values are labels.

    Raises:
        UsageError: no such file, one with colors, or one without objects.
    """
    try:
        with open_image(io.BytesIO(read_file(path))) as opened:
            mask = opened.convert("L") if opened.mode == "1" else opened.copy()
    except (OSError, ValueError) as error:
        raise UsageError(f"--first_mask {path} cannot be read ({reason_of(error)}); name an indexed PNG") from None
    if mask.mode not in INDEXED:
        raise UsageError(
            f"--first_mask {path} has colors (mode {mask.mode}), not a label for each pixel; save it indexed"
        )
    if len(np.unique(np.asarray(mask))) < 2:
        raise UsageError(f"--first_mask {path} has one value everywhere; it has to mark an object")
    return mask


def read_frame(path: Path, video: Video) -> ImageLike:
    """A frame as it is stored.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        return read_image(str(path), video.in_chans, video.value_range)
    except UndeclaredRange:
        raise
    except Exception as error:  # on damaged bytes decoders raise whatever they stumble over
        raise UsageError(f"cannot read the frame {path} ({reason_of(error)}); repair or remove it") from None


def size_of(frame: ImageLike) -> tuple[int, int]:
    """Height and width."""
    return (frame.shape[1], frame.shape[2]) if isinstance(frame, Tensor) else (frame.height, frame.width)


def resized_size(size: tuple[int, int], scale: Scale) -> tuple[int, int]:
    """Height and width that frames of `size` are resized to.

    Raises:
        UsageError: a shorter side that is no multiple of a region.
    """
    shorter, region = scale.shorter_side, max(scale.region)
    if any(shorter % side for side in scale.region):
        raise UsageError(
            f"--image_size {shorter} is no multiple of this network's regions of {region} pixels; change it"
        )
    longer = shorter * max(size) // min(size)
    whole = LONGER_SIDE_STEP % region == 0 and longer >= LONGER_SIDE_STEP
    longer -= longer % (LONGER_SIDE_STEP if whole else region)
    return (shorter, longer) if size[1] > size[0] else (longer, shorter)


# --------------------------------------------------------------------------- following


@torch.no_grad()
def region_maps(backbone: Backbone, video: Video, scale: Scale, device: torch.device) -> Iterator[Tensor]:
    """Region features (C, h, w) of one frame after the other.

    Raises:
        UsageError: a frame cannot be read, or is of another size than the first one.
    """
    size = list(resized_size(video.size, scale))
    for path in video.frames:
        frame = read_frame(path, video)
        if size_of(frame) != video.size:
            raise UsageError(f"{path} is of another size than the first frame; frames of a video are of one size")
        pixels = TF.resize(as_tensor(frame), size, InterpolationMode.BILINEAR, antialias=True)
        yield backbone.forward_feature_maps(scale.normalized(pixels).to(device))[0]


def follow_objects(
    backbone: Backbone, video: Video, scale: Scale, rule: Rule, device: torch.device
) -> Iterator[Image.Image]:
    """A mask for each frame, like the first one's, which comes first."""
    yield video.mask
    size = resized_size(video.size, scale)
    grid = size[0] // scale.region[0], size[1] // scale.region[1]
    labels_HW = torch.from_numpy(np.array(video.mask))
    values_K = labels_HW.unique()
    first_NK = to_regions(labels_HW, values_K, grid)
    lost = values_K[first_NK.sum(dim=0) == 0].tolist()
    if lost:
        logger.warning("too small for one region and not followed: the objects %s", lost)
    for labels_NK in follow(region_maps(backbone, video, scale, device), first_NK.to(device), rule):
        found_HW = values_K[to_pixels(labels_NK, grid, size).cpu()].to(torch.uint8)
        mask = Image.fromarray(found_HW.numpy()).resize(video.mask.size, Image.Resampling.NEAREST)
        if video.mask.mode == "P":
            mask.putpalette(video.mask.getpalette() or [])
        yield mask


# --------------------------------------------------------------------------- the script


def claim_outputs(folder: str, frames: Sequence[Path]) -> list[Path]:
    """Where the masks go, in a folder that is created.

    Raises:
        UsageError: it cannot be, or holds one of them.
    """
    place = files.make_output_dir(folder)
    written = [place / f"{frame.stem}.png" for frame in frames]
    there = [path.name for path in written if path.exists()]
    if there:
        raise UsageError(f"--output_dir {folder} holds {there[0]} already; choose another folder")
    return written


def main(args: argparse.Namespace) -> None:
    """Read, follow, write."""
    collectives.setup_logging()
    device = utils.resolve_device(args.device)
    arguments.check_weights(args)
    config = network_config(args)
    augment.check_normalization(config.INPUT.MEAN, config.INPUT.STD, config.MODEL.SPEC.IN_CHANS)
    video = open_video(args.frames, args.first_mask, config.MODEL.SPEC.IN_CHANS, config.INPUT.RANGE)
    with files.lock_folder(args.output_dir, "masks"):
        write_masks(args, config, video, device)


def write_masks(args: argparse.Namespace, config: CfgNode, video: Video, device: torch.device) -> None:
    """Follow the objects of a video, and write the mask of each frame as soon as it is found."""
    written = claim_outputs(args.output_dir, video.frames)
    backbone = frozen_backbone(args, config, args.pretrained_weights, device)
    if not args.pretrained_weights:
        logger.warning("--random_weights: objects are followed by an untrained network")
    scale = scale_of(backbone, config, args.image_size, device)
    rule = Rule(args.n_last_frames, args.size_mask_neighborhood, args.topk, args.temperature)
    masks = follow_objects(backbone, video, scale, rule, device)
    done = 0
    with launch.stop_on_interrupt(lambda: f"after {done} of {len(written)} masks, which {args.output_dir} has"):
        for path, mask in zip(written, tqdm(masks, total=len(written), disable=None)):
            with files.disk_errors(args.output_dir):
                files.write_new([path], partial(mask.save, format="png"))
            done += 1
    logger.info("wrote %d masks to %s", len(written), args.output_dir)


if __name__ == "__main__":
    launch.run_script(lambda: main(get_args_parser().parse_args()))
