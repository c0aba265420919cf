"""Images that are files: class folders, loose files, or a text file of paths.

Origin: this project's own; class folders are those of torchvision's `ImageFolder`.
"""

from __future__ import annotations

import os
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from data.sources import UNLABELLED, Files, Listing
from utils import UsageError

EXTENSIONS = (*IMG_EXTENSIONS, ".npy")


def list_files(root: Path, split: str, need_labels: bool) -> Listing:
    """The images of a folder or of a text file of paths, labelled when each lies in a sub-folder: the first one is its class.

    Raises:
        UsageError: no image, or no class where labels are needed.
    """
    if root.is_file():
        paths, relative = _read_path_list(root), []
    else:
        root = _folder_of_split(root, split, need_labels)
        relative = _find_images(root)
        paths = [str(root / name) for name in relative]
    if not paths and (root / f"{split}.zip").is_file():
        raise UsageError(f"no image found under {root}, but {split}.zip; pass --zip_mode")
    if not paths:
        raise UsageError(
            f"no image found under {root}; looked in all sub-folders for files ending in {' '.join(EXTENSIONS)}"
        )
    class_of_path = [name.split(os.sep, 1)[0] for name in relative if os.sep in name]
    if len(class_of_path) < len(paths):
        if need_labels:
            raise UsageError(f"{root} has images without a class; evaluation needs DIR/{{train,val}}/<class>/<image>")
        return Listing(Files(paths), [UNLABELLED] * len(paths), ())
    classes = sorted(set(class_of_path))
    index_of_class = {name: i for i, name in enumerate(classes)}
    return Listing(Files(paths), [index_of_class[name] for name in class_of_path], classes)


def _folder_of_split(root: Path, split: str, need_labels: bool) -> Path:
    """The sub-folder `split` where there is one, else the folder itself."""
    if (root / split).is_dir():
        return root / split
    if need_labels and (root / ("val" if split == "train" else "train")).is_dir():
        raise UsageError(f"{root} has no folder '{split}' beside the other one; evaluation needs DIR/train and DIR/val")
    return root


def _find_images(root: Path) -> list[str]:
    """Image files below `root`, relative to it, sorted; links to folders are followed, but not in a circle."""
    found = []
    for folder, subfolders, files in os.walk(root, followlinks=True):
        parents = {os.path.realpath(folder)} | {os.path.realpath(p) for p in Path(folder).parents}
        visible = sorted(name for name in subfolders if not name.startswith("."))
        subfolders[:] = [name for name in visible if os.path.realpath(os.path.join(folder, name)) not in parents]
        found += [os.path.relpath(os.path.join(folder, f), root) for f in files if _is_image_name(f)]
    return sorted(found)


def _is_image_name(name: str) -> bool:
    """By ending; hidden files (`._photo.jpg` of macOS) are no images."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _read_path_list(file: Path) -> list[str]:
    """Paths of a text file, one a line; empty lines and lines starting with # are skipped."""
    try:
        lines = [line.strip() for line in file.read_text().splitlines()]
    except UnicodeDecodeError:
        raise UsageError(f"{file} is not a text file of paths; --data_path takes a folder or a text file") from None
    paths = [str(file.parent / line) for line in lines if line and not line.startswith("#")]
    if not paths:
        raise UsageError(f"{file} names no path; it takes the path of one image a line")
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        raise UsageError(f"{file} names {len(missing)} files that do not exist, the first is {missing[0]}")
    return paths
