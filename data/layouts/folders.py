"""Images that are files: class folders, as for torchvision's `ImageFolder`, loose files, or a text file of paths."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from checkpoints.files import read_text
from data.layouts.folder_scan import EXTENSIONS, find_images, is_image_name, warn_skipped
from data.layouts.sources import Files, Listing, PackedStrings
from utils import UsageError, counted

SKIPPED_NAMES = "hidden files and files with other extensions"
MAX_CHECKED_PATHS = 50_000  # of a list; checking a million would take minutes on a shared disk


def list_files(root: Path, split: str, need_labels: bool) -> Listing:
    """List the images of a folder, or of a text file of paths.

    They are labeled if each image lies in a sub-folder; the first level of sub-folders are the classes.

    Raises:
        UsageError: no image, or no class where labels are needed.
    """
    if root.is_file():
        return _unlabeled(Files(_read_path_list(root)), root, need_labels)
    root = _split_folder(root, split, need_labels)
    names = find_images(root)
    if not len(names):
        raise UsageError(_no_image_message(root, split))
    source = Files(names, str(root))
    runs = []
    for name, count in class_runs(names):
        if not name:
            return _unlabeled(source, root, need_labels)
        runs.append((name, count))
    classes = sorted(name for name, _ in runs)  # the order of the sorted paths may differ
    index_of = {name: index for index, name in enumerate(classes)}
    return Listing(source, np.repeat([index_of[name] for name, _ in runs], [count for _, count in runs]), classes)


def class_runs(names: PackedStrings) -> Iterator[tuple[str, int]]:
    """Yield the first folder of sorted paths, empty for a path without one, and the number of consecutive paths in it.

    The end of a folder is found by doubling steps and bisection: decoding a million paths takes a second.
    """
    start, total = 0, len(names)
    while start < total:
        folder, separator, _ = names[start].partition(os.sep)
        if not separator:
            yield "", 1
            start += 1
            continue
        end = _end_of_prefix(names, start, folder + separator)
        yield folder, end - start
        start = end


def _end_of_prefix(names: PackedStrings, start: int, prefix: str) -> int:
    """Return the index after the last of the sorted names from `start` on that begin with `prefix`."""
    step = 1
    while start + step < len(names) and names[start + step].startswith(prefix):
        step *= 2
    end = min(start + step, len(names))
    return bisect_left(range(len(names)), True, start + step // 2, end, key=lambda i: not names[i].startswith(prefix))


def _unlabeled(source: Files, root: Path, need_labels: bool) -> Listing:
    if need_labels:
        raise UsageError(
            f"{root} has images without a class; evaluation needs DIR/{{train,val}}/<class>/<image>, or DIR/<class>/<image> for a "
            "single set; for images without labels use extract_features.py"
        )
    return Listing.unlabeled(source)


def _no_image_message(root: Path, split: str) -> str:
    if (root / f"{split}.zip").is_file():
        return f"no image found under {root}, but {split}.zip; pass --zip_mode"
    if any(root.glob("*.tsv")):
        return f"no image found under {root}, but tsv files; pass --tsv_mode"
    return f"no image found under {root} or its sub-folders; extensions of images are {' '.join(EXTENSIONS)}"


def _split_folder(root: Path, split: str, need_labels: bool) -> Path:
    """Return the sub-folder `split` if there is one, else `root`."""
    if (root / split).is_dir():
        return root / split
    other = "val" if split == "train" else "train"
    if need_labels and (root / other).is_dir():
        raise UsageError(f"{root} has a folder '{other}' but no '{split}'; evaluation needs DIR/train and DIR/val")
    return root


def _read_path_list(file: Path) -> list[str]:
    """Read a text file with one path a line, which may be quoted; empty lines and lines starting with # are skipped."""
    text = read_text(file, "--data_path takes a folder, or a text file with one path a line", "surrogateescape")
    lines = [line.strip() for line in text.split("\n")]
    listed = [os.path.join(file.parent, _unquoted(line)) for line in lines if line and not line.startswith("#")]
    paths = [path for path in listed if is_image_name(os.path.basename(path))]
    if not paths:
        raise UsageError(
            f"{file} lists no image; write one path a line, extensions of images are {' '.join(EXTENSIONS)}"
        )
    warn_skipped(file, {SKIPPED_NAMES: len(listed) - len(paths)} if len(paths) < len(listed) else {})
    checked = paths[:: 1 + len(paths) // MAX_CHECKED_PATHS]
    missing = [path for path in checked if not os.path.isfile(path)]
    if missing:
        some = f" ({len(checked)} of {len(paths)} were checked)" if len(checked) < len(paths) else ""
        raise UsageError(
            f"{file} lists {counted(len(missing), 'missing file')}{some}, first {missing[0]}; "
            "correct or remove these lines, paths are relative to the text file"
        )
    return paths


def _unquoted(line: str) -> str:
    """Return a line without the quotes around it."""
    return line[1:-1] if len(line) > 1 and line[0] == line[-1] and line[0] in "\"'" else line
