"""Published datasets with their own layouts: WebVision-v1 and OpenImages-v4.

    WebVision: DIR/info/train_filelist_google.txt, train_filelist_flickr.txt   `path label` a line, paths relative to DIR
    OpenImages: DIR/train.tsv                                  `key<TAB>label<TAB>base64` a line, see data/layouts/tsv.py
                DIR/train.balance_min1000.lineidx              offsets of the lines to use: a balanced subset with repetitions
                DIR/train.label.verify_20191102.tsv            `key<TAB>JSON list of classes` a line
                DIR/train.label.verify_20191102.6962.tag.labelmap   names of the classes, one a line

ImageNet-22K is a folder of tsv files or of class folders: data/layouts/tsv.py and data/layouts/folders.py.

Origin: the layouts of microsoft/esvit and of WebVision 1.0.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from checkpoints.files import read_text
from data.layouts.index_cache import progress_bar
from data.layouts.sources import Files, Listing, MultiLabels, check_inside, parse_label
from data.layouts.tsv import (
    LINE,
    TsvLines,
    check_offsets,
    class_index,
    parse_label_column,
    read_integers,
    read_labelmap,
)
from utils import UsageError

WEBVISION_LISTS = ("info/train_filelist_google.txt", "info/train_filelist_flickr.txt")
OPENIMAGES_INDEX = "train.balance_min1000.lineidx"
OPENIMAGES_LABELS = "train.label.verify_20191102.tsv"
OPENIMAGES_CLASSES = "train.label.verify_20191102.6962.tag.labelmap"


def list_webvision(root: Path, split: str, need_labels: bool) -> Listing:
    """List the labeled training images of WebVision-v1, from both search engines or from the one whose list is present.

    Raises:
        UsageError: another split, no list, or an invalid line.
    """
    _check_train(split, "webvision1")
    lists = [root / name for name in WEBVISION_LISTS if (root / name).is_file()]
    if not lists:
        raise UsageError(
            f"--dataset webvision1 needs {' or '.join(WEBVISION_LISTS)} in --data_path; {root} has neither"
        )
    paths, labels = [], []
    for file in lists:
        lines = read_text(file, "a line is 'path label'", "surrogateescape").split("\n")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file} line {number}"
            path, space, label = line.strip().rpartition(" ")
            if not space:
                raise UsageError(f"{where} has no label: '{line.strip()}'; write 'path label'")
            labels.append(parse_label(label, where))
            check_inside(path, where, str(root))
            paths.append(f"{root}/{path}")
    if not paths:
        raise UsageError(f"{lists[0]} lists no image; a line is 'path label'")
    return Listing.from_numbers(Files(paths), labels)


def list_openimages(root: Path, split: str, need_labels: bool) -> Listing:
    """List the balanced training images of OpenImages-v4; their labels, several each, are read only if needed.

    Raises:
        UsageError: another split, or a file that is missing or inconsistent with the others.
    """
    _check_train(split, "openimages_v4")
    needed = ["train.tsv", OPENIMAGES_INDEX, *([OPENIMAGES_LABELS, OPENIMAGES_CLASSES] if need_labels else [])]
    missing = [name for name in needed if not (root / name).is_file()]
    if missing:
        raise UsageError(f"--dataset openimages_v4 needs {', '.join(needed)} in --data_path; {root} lacks {missing[0]}")
    offsets = read_integers(root / OPENIMAGES_INDEX)
    if not len(offsets):
        raise UsageError(f"{root / OPENIMAGES_INDEX} is empty; create it again")
    check_offsets(root / "train.tsv", offsets, root / OPENIMAGES_INDEX, complete=False)
    lines = np.zeros(len(offsets), dtype=LINE)
    lines["offset"] = offsets
    source = TsvLines([root / "train.tsv"], lines)
    if not need_labels:
        return Listing.unlabeled(source)
    classes = read_labelmap(root / OPENIMAGES_CLASSES)
    labels_of_key = _verified_labels(root / OPENIMAGES_LABELS, classes)
    labels = []
    for i in progress_bar(range(len(source)), desc="labels"):
        key, _ = source.read_label(i)
        if key not in labels_of_key:
            raise UsageError(f"{source.name(i)} has key '{key}', which is missing from {OPENIMAGES_LABELS}; add it")
        labels.append(labels_of_key[key])
    return Listing(source, MultiLabels(labels, len(classes)), classes)


def _verified_labels(file: Path, classes: list[str]) -> dict[str, list[int]]:
    """Return the class indices of each key."""
    index_of = {name: index for index, name in enumerate(classes)}
    labels_of_key = {}
    with file.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            key, tab, text = line.rstrip("\n").partition("\t")
            where = f"{file} line {number}"
            if not tab:
                raise UsageError(f"{where} has no labels; a line is key<TAB>JSON list of classes")
            labels_of_key[key] = [class_index(name, index_of, where) for name in parse_label_column(text)]
    return labels_of_key


def _check_train(split: str, dataset: str) -> None:
    if split != "train":
        raise UsageError(f"--dataset {dataset} has no split '{split}', only 'train'; evaluate on another dataset")
