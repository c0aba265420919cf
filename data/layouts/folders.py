"""Images that are files: class folders, loose files, or a text file of paths.

Origin: this project's own; class folders are those of torchvision's `ImageFolder`.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from checkpoints.files import read_text
from data.layouts.sources import UNLABELED, Files, Listing
from data.layouts.tree import EXTENSIONS, find_images, is_image_name, tell_passed_over
from utils import UsageError, counted

OTHER_NAMES = "hidden files and files of other endings"
CHECKED_PATHS = 50_000  # of a list, at most about so many: a million would take minutes on a shared disk


def list_files(root: Path, split: str, need_labels: bool) -> Listing:
    """The images of a folder or of a text file of paths, labeled when each lies in a sub-folder: the first one is its class.

    Raises:
        UsageError: no image, or no class where labels are needed.
    """
    if root.is_file():
        return _unlabeled(Files(_read_path_list(root)), root, need_labels)
    root = _folder_of_split(root, split, need_labels)
    names = find_images(root)
    if not len(names):
        raise UsageError(_no_image(root, split))
    source = Files(names, str(root))
    labels = np.zeros(len(names), dtype=np.int64)
    number_of: dict[str, int] = {}
    for i, name in enumerate(names):
        class_name, separator, _ = name.partition(os.sep)
        if not separator:
            return _unlabeled(source, root, need_labels)
        labels[i] = number_of.setdefault(class_name, len(number_of))
    classes = sorted(number_of)
    rank_of = np.empty(len(classes), dtype=np.int64)
    rank_of[[number_of[name] for name in classes]] = np.arange(len(classes))
    return Listing(source, rank_of[labels], classes)


def _unlabeled(source: Files, root: Path, need_labels: bool) -> Listing:
    if need_labels:
        raise UsageError(
            f"{root} has images without a class; evaluation needs DIR/{{train,val}}/<class>/<image>, "
            "or DIR/<class>/<image> where all images are one set"
        )
    return Listing(source, np.full(len(source), UNLABELED), ())


def _no_image(root: Path, split: str) -> str:
    if (root / f"{split}.zip").is_file():
        return f"no image found under {root}, but {split}.zip; pass --zip_mode"
    if any(root.glob("*.tsv")):
        return f"no image found under {root}, but tsv files; pass --tsv_mode"
    return f"no image found under {root}; looked in all sub-folders for files ending in {' '.join(EXTENSIONS)}"


def _folder_of_split(root: Path, split: str, need_labels: bool) -> Path:
    """The sub-folder `split` where there is one, else the folder itself."""
    if (root / split).is_dir():
        return root / split
    if need_labels and (root / ("val" if split == "train" else "train")).is_dir():
        raise UsageError(f"{root} has no folder '{split}' beside the other one; evaluation needs DIR/train and DIR/val")
    return root


def _read_path_list(file: Path) -> list[str]:
    """Paths of a text file, one a line; empty lines and lines starting with # are skipped."""
    text = read_text(file, "--data_path takes a folder, or a text file with one path a line", "surrogateescape")
    lines = [line.strip() for line in text.split("\n")]
    named = [os.path.join(file.parent, line) for line in lines if line and not line.startswith("#")]
    paths = [path for path in named if is_image_name(os.path.basename(path))]
    if not paths:
        raise UsageError(f"{file} names no image; it takes one path a line, of files ending in {' '.join(EXTENSIONS)}")
    tell_passed_over(file, {OTHER_NAMES: len(named) - len(paths)} if len(paths) < len(named) else {})
    checked = paths[:: 1 + len(paths) // CHECKED_PATHS]
    missing = [path for path in checked if not os.path.isfile(path)]
    if missing:
        some = f" ({len(checked)} of {len(paths)} were looked for)" if len(checked) < len(paths) else ""
        raise UsageError(
            f"{file} names {counted(len(missing), 'path that is', 'paths that are')} no file{some}, the first is {missing[0]}; "
            "paths are relative to the text file: repair or remove these lines"
        )
    return paths
