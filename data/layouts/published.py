"""Published collections that come as files of their own kind: WebVision-v1 and OpenImages-v4.

    WebVision: DIR/info/train_filelist_google.txt, train_filelist_flickr.txt   `path label` a line, paths relative to DIR
    OpenImages: DIR/train.tsv                                  `key<TAB>label<TAB>base64` a line, see data/layouts/tsv.py
                DIR/train.balance_min1000.lineidx              where the lines to use begin: a balanced choice, with repetitions
                DIR/train.label.verify_20191102.tsv            `key<TAB>JSON list of classes` a line
                DIR/train.label.verify_20191102.6962.tag.labelmap   names of the classes, one a line

ImageNet-22K is a folder of tsv files, or of class folders: data/layouts/tsv.py and data/layouts/folders.py.

Origin: layouts of microsoft/esvit and of WebVision 1.0; reading is this project's own.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from checkpoints.files import read_text
from data.layouts.sources import UNLABELED, Files, Listing, MultiLabels, check_inside, parse_label
from data.layouts.tsv import (
    LINE,
    TsvLines,
    check_offsets,
    label_names,
    label_number,
    progress,
    read_labelmap,
    read_numbers,
)
from utils import UsageError

WEBVISION_LISTS = ("info/train_filelist_google.txt", "info/train_filelist_flickr.txt")
OPENIMAGES_INDEX = "train.balance_min1000.lineidx"
OPENIMAGES_LABELS = "train.label.verify_20191102.tsv"
OPENIMAGES_CLASSES = "train.label.verify_20191102.6962.tag.labelmap"


def list_webvision(root: Path, split: str, need_labels: bool) -> Listing:
    """The training images of WebVision-v1, of both search engines or of the one whose list is there; they have labels.

    Raises:
        UsageError: another split, no list, or a line that is wrong, named by its number.
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
        raise UsageError(f"{lists[0]} names no image; a line is 'path label'")
    found, label_N = np.unique(np.array(labels), return_inverse=True)
    return Listing(Files(paths), label_N, [str(label) for label in found])


def list_openimages(root: Path, split: str, need_labels: bool) -> Listing:
    """The balanced training images of OpenImages-v4; their labels, several each, are read only if needed.

    Raises:
        UsageError: another split, a file is missing or does not fit the others.
    """
    _check_train(split, "openimages_v4")
    needed = ["train.tsv", OPENIMAGES_INDEX, *([OPENIMAGES_LABELS, OPENIMAGES_CLASSES] if need_labels else [])]
    missing = [name for name in needed if not (root / name).is_file()]
    if missing:
        raise UsageError(f"--dataset openimages_v4 needs {', '.join(needed)} in --data_path; {root} lacks {missing[0]}")
    offsets = read_numbers(root / OPENIMAGES_INDEX)
    if not len(offsets):
        raise UsageError(f"{root / OPENIMAGES_INDEX} names no line of train.tsv; make it again")
    check_offsets(root / "train.tsv", offsets, root / OPENIMAGES_INDEX, complete=False)
    lines = np.zeros(len(offsets), dtype=LINE)
    lines["offset"] = offsets
    source = TsvLines([root / "train.tsv"], lines)
    if not need_labels:
        return Listing(source, np.full(len(source), UNLABELED), ())
    classes = read_labelmap(root / OPENIMAGES_CLASSES)
    numbers_of_key = _verified_labels(root / OPENIMAGES_LABELS, classes)
    numbers = []
    for i in progress(range(len(source)), "labels"):
        key, _ = source.head(i)
        if key not in numbers_of_key:
            raise UsageError(f"{source.name(i)} has the key '{key}', which {OPENIMAGES_LABELS} has not; complete it")
        numbers.append(numbers_of_key[key])
    return Listing(source, MultiLabels(numbers, len(classes)), classes)


def _verified_labels(file: Path, classes: list[str]) -> dict[str, list[int]]:
    """The numbers of the classes of each key."""
    number_of = {name: number for number, name in enumerate(classes)}
    found = {}
    with file.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            key, tab, text = line.rstrip("\n").partition("\t")
            where = f"{file} line {number}"
            if not tab:
                raise UsageError(f"{where} has no labels; a line is key<TAB>JSON list of classes")
            found[key] = [label_number(name, number_of, where) for name in label_names(text)]
    return found


def _check_train(split: str, dataset: str) -> None:
    if split != "train":
        raise UsageError(
            f"--dataset {dataset} has training images only, '{split}' was asked for; evaluate on another set"
        )
