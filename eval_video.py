"""Video object segmentation with frozen region features: propagate the mask of the first frame to all frames (DAVIS 2017).

    python eval_video.py --pretrained_weights OUT/checkpoint.pth --frames JPEGImages/480p/bike-packing \\
        --first_mask Annotations/480p/bike-packing/00000.png --output_dir OUT/davis/bike-packing
    bash scripts/davis.sh deit_small DAVIS OUT/checkpoint.pth OUT/davis         # every video of the validation set

--frames is a folder of images, ordered by name (numbers in names by value); --first_mask an indexed PNG of the size of the first
image, in which each value is an object and 0 the background. --output_dir gets an indexed PNG with the same palette for each frame,
for the official davis2017-evaluation. Region features are the normalized tokens of the last block without class tokens, of any
architecture; see analysis/propagation.py.

Frames are resized to a shorter side of --image_size and a longer side that is a multiple of 64, and normalized with INPUT.MEAN and
INPUT.STD (DINO's script divides red by 0.228 instead of 0.229).

Origin: the protocol of DINO (Caron et al., ICCV 2021) on DAVIS (Pont-Tuset et al., 2017).
"""

from __future__ import annotations

from config.arguments.eval_video import get_args_parser as get_args_parser

if __name__ == "__main__":  # --help and usage errors are answered before torch is imported
    ARGS = get_args_parser().parse_command_line()

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

import utils
from analysis.images import Scale, scale_of
from analysis.propagation import PropagationConfig, propagate, to_pixels, to_regions
from checkpoints import files
from config import arguments
from data.datasets import format_error
from data.decode import ImageLike, UndeclaredRange, open_image, read_image
from data.layouts.folder_scan import is_image_file
from data.layouts.sources import read_file
from data.transforms import augment
from data.transforms.augment import as_tensor
from distributed import collectives, launch
from evaluation.features import frozen_backbone, network_config
from models import Backbone
from utils import UsageError, logger

LONGER_SIDE_STEP = 64  # pixels
INDEXED = ("P", "L")  # modes of images with labels as values


# --------------------------------------------------------------------------- the video


class Video(NamedTuple):
    """The frames of a video in order, and the mask of the first one."""

    frames: list[Path]
    mask: Image.Image  # of mode P or L, of the size of the frames
    in_chans: int
    value_range: Sequence[float] = ()  # INPUT.RANGE

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the frames."""
        return self.mask.height, self.mask.width


def open_video(frames_folder: str, first_mask: str, in_chans: int, value_range: Sequence[float] = ()) -> Video:
    """Open the images of a folder, ordered by name with numbers by value, and the mask of the first one.

    Raises:
        UsageError: no such folder or mask, fewer than two images, images with equal names, or a mask of another size.
    """
    if not os.path.isdir(frames_folder):
        raise UsageError(f"--frames {frames_folder} is not a folder; name the folder with the images of a video")
    frames = [path for path in Path(frames_folder).iterdir() if is_image_file(path)]
    frames.sort(
        key=lambda path: [part.zfill(20) if part.isdecimal() else part for part in re.split(r"(\d+)", path.stem)]
    )
    if len(frames) < 2:
        raise UsageError(
            f"--frames {frames_folder} has {utils.counted(len(frames), 'image')}; a video needs two or more"
        )
    if len({path.stem for path in frames}) < len(frames):
        raise UsageError(f"--frames {frames_folder} has several images of the same name; keep one file format")
    video = Video(frames, read_mask(first_mask), in_chans, value_range)
    height, width = size_of(read_frame(frames[0], video))
    if video.size != (height, width):
        raise UsageError(
            f"--first_mask {first_mask} has {video.mask.width} x {video.mask.height} pixels, {frames[0].name} has "
            f"{width} x {height}; pass the mask of the first frame"
        )
    return video


def read_mask(path: str) -> Image.Image:
    """Read an image with labels as values.

    Raises:
        UsageError: it cannot be read, is not indexed, or has no objects.
    """
    try:
        with open_image(io.BytesIO(read_file(path))) as opened:
            mask = opened.convert("L") if opened.mode == "1" else opened.copy()
    except (OSError, ValueError) as error:
        raise UsageError(f"--first_mask {path} cannot be read ({format_error(error)}); pass an indexed PNG") from None
    if mask.mode not in INDEXED:
        raise UsageError(
            f"--first_mask {path} is a color image (mode {mask.mode}) without labels; save it as an indexed PNG"
        )
    if len(np.unique(np.asarray(mask))) < 2:
        raise UsageError(f"--first_mask {path} has a single value; mark at least one object")
    return mask


def read_frame(path: Path, video: Video) -> ImageLike:
    """Read a frame.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        return read_image(str(path), video.in_chans, video.value_range)
    except UndeclaredRange:
        raise
    except Exception as error:  # decoders raise errors of any type on damaged files
        raise UsageError(f"cannot read the frame {path} ({format_error(error)}); repair or remove it") from None


def size_of(frame: ImageLike) -> tuple[int, int]:
    """Return height and width."""
    return (frame.shape[1], frame.shape[2]) if isinstance(frame, Tensor) else (frame.height, frame.width)


def resized_size(size: tuple[int, int], scale: Scale) -> tuple[int, int]:
    """Return the height and width to which frames of `size` are resized.

    Raises:
        UsageError: --image_size is not a multiple of the size of a region.
    """
    shorter, region = scale.shorter_side, max(scale.region)
    if any(shorter % side for side in scale.region):
        raise UsageError(
            f"--image_size {shorter} is not a multiple of {region}, the size of a region of this network; change it"
        )
    longer = shorter * max(size) // min(size)
    whole = LONGER_SIDE_STEP % region == 0 and longer >= LONGER_SIDE_STEP
    longer -= longer % (LONGER_SIDE_STEP if whole else region)
    return (shorter, longer) if size[1] > size[0] else (longer, shorter)


# --------------------------------------------------------------------------- propagation


@torch.no_grad()
def region_maps(backbone: Backbone, video: Video, scale: Scale, device: torch.device) -> Iterator[Tensor]:
    """Yield the region features (C, h, w) of each frame.

    Raises:
        UsageError: a frame cannot be read, or differs in size from the first one.
    """
    size = list(resized_size(video.size, scale))
    for path in video.frames:
        frame = read_frame(path, video)
        if size_of(frame) != video.size:
            raise UsageError(
                f"{path} differs in size from the first frame; all frames of a video must have the same size"
            )
        pixels = TF.resize(as_tensor(frame), size, InterpolationMode.BILINEAR, antialias=True)
        yield backbone.forward_feature_maps(scale.normalized(pixels).to(device))[0]


def propagate_masks(
    backbone: Backbone, video: Video, scale: Scale, config: PropagationConfig, device: torch.device
) -> Iterator[Image.Image]:
    """Yield the mask of each frame, beginning with the given one."""
    yield video.mask
    size = resized_size(video.size, scale)
    grid = size[0] // scale.region[0], size[1] // scale.region[1]
    labels_HW = torch.from_numpy(np.array(video.mask))
    values_K = labels_HW.unique()
    first_NK = to_regions(labels_HW, values_K, grid)
    lost = values_K[first_NK.sum(dim=0) == 0].tolist()
    if lost:
        logger.warning("objects %s are smaller than a region and are not segmented", lost)
    for labels_NK in propagate(region_maps(backbone, video, scale, device), first_NK.to(device), config):
        found_HW = values_K[to_pixels(labels_NK, grid, size).cpu()].to(torch.uint8)
        mask = Image.fromarray(found_HW.numpy()).resize(video.mask.size, Image.Resampling.NEAREST)
        if video.mask.mode == "P":
            mask.putpalette(video.mask.getpalette() or [])
        yield mask


# --------------------------------------------------------------------------- the script


def mask_paths(output_dir: Path, frames: Sequence[Path]) -> list[Path]:
    """Return the paths of the masks to write.

    Raises:
        UsageError: one of them exists.
    """
    paths = [output_dir / f"{frame.stem}.png" for frame in frames]
    existing = [path.name for path in paths if path.exists()]
    if existing:
        raise UsageError(f"--output_dir {output_dir} already has {existing[0]}; choose another folder")
    return paths


def write_masks(masks: Iterator[Image.Image], paths: Sequence[Path], output_dir: Path) -> None:
    """Write each mask as soon as it is computed."""
    done = 0
    with launch.stop_on_interrupt(lambda: f"after {done} of {len(paths)} masks, which are in {output_dir}"):
        for path, mask in zip(paths, tqdm(masks, total=len(paths), disable=None)):
            with files.disk_errors(output_dir):
                files.write_new([path], partial(mask.save, format="png"))
            done += 1
    logger.info("wrote %d masks to %s", len(paths), output_dir)


def main(args: argparse.Namespace) -> None:
    """Read the video, load the network, propagate and write the masks."""
    utils.setup_logging(collectives.is_main_process())
    device = utils.resolve_device(args.device)
    arguments.check_weights(args)
    config = network_config(args)
    augment.check_normalization(config.INPUT.MEAN, config.INPUT.STD, config.MODEL.SPEC.IN_CHANS)
    video = open_video(args.frames, args.first_mask, config.MODEL.SPEC.IN_CHANS, config.INPUT.RANGE)
    with files.lock_folder(args.output_dir, "masks"):
        output_dir = files.make_output_dir(args.output_dir)
        paths = mask_paths(output_dir, video.frames)
        backbone = frozen_backbone(args, config, args.pretrained_weights, device)
        scale = scale_of(backbone, config, args.image_size, device)
        propagation = PropagationConfig(args.n_last_frames, args.size_mask_neighborhood, args.topk, args.temperature)
        write_masks(propagate_masks(backbone, video, scale, propagation, device), paths, output_dir)


if __name__ == "__main__":
    launch.run_script(partial(main, ARGS))
