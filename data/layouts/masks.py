"""Images with segmentation masks: pairs of files in the layouts of segmentation data sets.

    DIR/{train,val}/{images,masks}                 images/a/1.jpg belongs to masks/a/1.png
    DIR/{images,masks}/{train,val}                 or, as ADE20K, DIR/{images,annotations}/{training,validation}
    DIR/{JPEGImages,SegmentationClass}             Pascal VOC, images listed in DIR/ImageSets/Segmentation/{train,val}.txt

Every image needs a mask of the same name and every mask an image, except in Pascal VOC, where the list selects both.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from checkpoints.files import read_text
from data.layouts.folder_scan import find_images
from data.layouts.sources import check_inside
from utils import UsageError, counted

SPLITS = {"train": ("train", "training"), "val": ("val", "validation")}  # names of folders
MASK_FOLDERS = ("masks", "annotations")
VOC_IMAGES, VOC_MASKS, VOC_LISTS = "JPEGImages", "SegmentationClass", "ImageSets/Segmentation"
MASK_EXTENSION = ".png"
LAYOUTS = "DIR/{train,val}/{images,masks}, DIR/{images,masks}/{train,val} or Pascal VOC"


class Pair(NamedTuple):
    """Paths of an image and of its mask."""

    image: str
    mask: str


def find_pairs(root: str | Path, split: str) -> list[Pair]:
    """Return the images and masks of a split, sorted by name.

    Args:
        split: `train` or `val`.

    Raises:
        UsageError: no known layout, an image without mask or a mask without image, or no image at all.
    """
    root = Path(root)
    pairs = _listed_pairs(root, split) if (root / VOC_IMAGES).is_dir() else None
    for images, masks in _folders(root, split) if pairs is None else ():
        if images.is_dir() and masks.is_dir():
            pairs = _pairs_by_name(images, masks)
            break
    if pairs is None:
        raise UsageError(f"{root} has no images with masks for {split}; arrange them as {LAYOUTS} (docs/evaluation.md)")
    return pairs


def _folders(root: Path, split: str) -> Iterator[tuple[Path, Path]]:
    """Yield the folders in which images and masks of a split may be."""
    for part in SPLITS[split]:
        for masks in MASK_FOLDERS:
            yield root / part / "images", root / part / masks
            yield root / "images" / part, root / masks / part


def _pairs_by_name(images: Path, masks: Path) -> list[Pair]:
    """Pair the images below one folder with the masks below another, by relative path without extension."""
    image_of, mask_of = _by_stem(images), _by_stem(masks)
    if not image_of:
        raise UsageError(f"{images} has no images; put them there, with a mask of the same name in {masks}")
    for name in mask_of.values():
        if not name.lower().endswith(MASK_EXTENSION):
            raise UsageError(f"{masks / name} is no PNG, and other formats may change class numbers; save it as PNG")
    if bare := sorted(image_of.keys() - mask_of.keys()):
        raise UsageError(
            f"{counted(len(bare), 'image has', 'images have')} no mask, first {images / image_of[bare[0]]}; "
            f"add {masks / bare[0]}{MASK_EXTENSION}, or remove the image"
        )
    if left := sorted(mask_of.keys() - image_of.keys()):
        raise UsageError(
            f"{counted(len(left), 'mask has', 'masks have')} no image, first {masks / mask_of[left[0]]}; "
            f"add an image of that name to {images}, or remove the mask"
        )
    return [Pair(str(images / image_of[stem]), str(masks / mask_of[stem])) for stem in sorted(image_of)]


def _by_stem(folder: Path) -> dict[str, str]:
    """Return the files below a folder by their name without extension.

    Raises:
        UsageError: two have the same name.
    """
    found: dict[str, str] = {}
    for name in find_images(folder):
        stem = str(Path(name).with_suffix(""))
        if stem in found:
            raise UsageError(
                f"{folder} has both {found[stem]} and {name}, which are the same without extension; keep one of them"
            )
        found[stem] = name
    return found


def _listed_pairs(root: Path, split: str) -> list[Pair]:
    """Return the images that a list of Pascal VOC names, with their masks."""
    path = root / VOC_LISTS / f"{split}.txt"
    text = read_text(path, "it should hold the name of an image of JPEGImages without extension on each line")
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names:
        raise UsageError(f"{path} is empty; write the name of an image of {VOC_IMAGES} without extension on each line")
    pairs = []
    for number, name in enumerate(names, start=1):
        check_inside(name, f"{path}, line {number}", str(root / VOC_IMAGES))
        pair = Pair(str(root / VOC_IMAGES / f"{name}.jpg"), str(root / VOC_MASKS / f"{name}{MASK_EXTENSION}"))
        for file in pair:
            if not Path(file).is_file():
                raise UsageError(f"{path}, line {number}: {file} does not exist; add it, or remove the line")
        pairs.append(pair)
    return pairs
