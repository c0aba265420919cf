"""Images in tab-separated files (`--tsv_mode`).

    DIR/train.tsv  DIR/val.tsv        or a folder of such files, e.g. of ImageNet-22K, with DIR/labelmap_22k_reorder.txt
    DIR/train.lineidx                 byte offset of each line, one a line; created if missing
    DIR/train.linelist                optional: the lines to use, counted from 0, one a line

A line is `key<TAB>label<TAB>image in base64`. The label is an integer, a name, empty, or JSON with one class:
`[{"class": "n01440764"}]`, `["n01440764"]`. A labelmap, with one name a line, gives the order of the classes; without it they are
sorted. Labels are read only where they are needed, since they take a pass over all lines; those of large files are cached
(data/layouts/index_cache.py). The index takes 14 bytes an image.

Origin: the layout of microsoft/esvit and of Microsoft's scene graph benchmark.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from checkpoints.files import parse_json, read_text
from data.layouts.index_cache import cache_path, create_once, index_arrays, progress_bar
from data.layouts.sources import ForkSafeFile, Listing, PackedStrings, Source
from utils import UsageError, logger

LABELMAP = "labelmap_22k_reorder.txt"
LINE = np.dtype([("file", "<u2"), ("line", "<u4"), ("offset", "<u8")])  # line from 1; 0: unknown
COLUMNS = 3  # key, label, image
INDEX_BLOCK = 2**24  # bytes read at once to build an index
LABEL_BLOCK = 2**10  # bytes read at once for a label
NUM_CHECKED_LINES = 100
MIN_CACHED_LINES = 50_000  # labels of fewer lines are read at each start


class TsvLines(Source):
    """Images in lines of tsv files.

    Args:
        files: paths.
        lines: a `LINE` for each image.
    """

    def __init__(self, files: Sequence[Path], lines: np.ndarray) -> None:
        self.files = [ForkSafeFile(path) for path in files]
        self.lines = lines

    def __len__(self) -> int:
        return len(self.lines)

    def name(self, index: int) -> str:
        entry = self.lines[index]
        position = f"line {entry['line']}" if entry["line"] else f"at byte {entry['offset']}"
        return f"{self.files[entry['file']].path} {position}"

    def read(self, index: int) -> bytes:
        entry = self.lines[index]
        columns = self.files[entry["file"]].read_line(int(entry["offset"])).split(b"\t")
        if len(columns) < COLUMNS:
            raise ValueError(f"the line has {len(columns)} columns; it takes key, label and image")
        return base64.b64decode(columns[COLUMNS - 1], validate=True)

    def read_label(self, index: int) -> tuple[str, str]:
        """Return the columns key and label of an image.

        Raises:
            UsageError: the line does not have them.
        """
        entry = self.lines[index]
        try:
            line = self.files[entry["file"]].read_line(int(entry["offset"]), block=LABEL_BLOCK, fields=2)
            key, label = line.decode().split("\t")
        except (EOFError, ValueError):
            raise UsageError(f"{self.name(index)} has no key and label; a line is key<TAB>label<TAB>base64") from None
        return key, label


def list_tsv(root: Path, split: str, need_labels: bool) -> Listing:
    """List the images of a tsv file, of `split`.tsv in a folder, or of all tsv files of a folder; with labels only if needed.

    Raises:
        UsageError: no tsv file, an index that does not match it, or a line without a label where labels are needed.
    """
    files = find_tsv(root, split)
    parts = []
    for number, file in enumerate(files):
        offsets = load_line_offsets(file)
        part = np.zeros(len(offsets), dtype=LINE)
        part["file"], part["line"], part["offset"] = number, np.arange(1, len(offsets) + 1), offsets
        parts.append(select_lines(file, part))
    source = TsvLines(files, np.concatenate(parts))
    if not len(source):
        raise UsageError(f"{root} is empty; a line is key<TAB>label<TAB>base64")
    if not need_labels:
        return Listing.unlabeled(source)
    labels = _read_labels(source, files)
    labelmap = files[0].parent / LABELMAP
    classes = read_labelmap(labelmap) if labelmap.is_file() else _sorted_classes(labels)
    index_of = {name: index for index, name in enumerate(classes)}
    label_N = np.array([class_index(label, index_of, source.name(i)) for i, label in enumerate(labels)])
    return Listing(source, label_N, classes)


def _read_labels(source: TsvLines, files: Sequence[Path]) -> PackedStrings:
    """Return the label of each line.

    Raises:
        UsageError: a line has none, or several.
    """

    def read() -> dict[str, np.ndarray]:
        labels = []
        for i in progress_bar(range(len(source)), desc="labels"):
            names = parse_label_column(source.read_label(i)[1])
            if len(names) != 1:
                raise UsageError(f"{source.name(i)} has {len(names)} labels, must have one; correct the line")
            labels.append(names[0])
        packed = PackedStrings(labels)
        return {"text": packed.text, "ends": packed.ends}

    linelists = [path for file in files if (path := file.with_suffix(".linelist")).is_file()]
    large = len(source) >= MIN_CACHED_LINES
    return PackedStrings.from_arrays(**index_arrays([*files, *linelists], ".labels.npz", read, large=large))


def find_tsv(root: Path, split: str) -> list[Path]:
    """Return the tsv files with the images of `split`.

    Raises:
        UsageError: there are none.
    """
    if root.is_file():
        return [root]
    if (root / f"{split}.tsv").is_file():
        return [root / f"{split}.tsv"]
    folder = root / split if (root / split).is_dir() else root
    files = sorted(path for path in folder.glob("*.tsv") if ".label" not in path.name)
    other = f"{'val' if split == 'train' else 'train'}.tsv"
    if not files or other in {path.name for path in files}:
        raise UsageError(f"--tsv_mode needs {split}.tsv, or a folder of tsv files, in --data_path; {root} has neither")
    return files


# --------------------------------------------------------------------------- line offsets


def load_line_offsets(tsv: Path) -> np.ndarray:
    """Return the byte offset of each line (N,), from the index beside the file.

    A missing index is created there, else in the cache folder, else in memory.

    Raises:
        UsageError: the index does not match the file.
    """
    built: list[np.ndarray] = []

    def write(file: BinaryIO) -> None:
        built[:] = built or [index_lines(tsv)]
        file.write("".join(f"{offset}\n" for offset in built[0].tolist()).encode())

    state = tsv.stat()
    cached = cache_path(tsv, f".{state.st_size}.{state.st_mtime_ns}.lineidx")
    for path in (tsv.with_suffix(".lineidx"), cached):
        if create_once(path, write):
            offsets = built[0] if built else read_integers(path)
            check_offsets(tsv, offsets, path, complete=True)
            return offsets
    logger.warning(
        "the index of %s can be written neither beside it nor to %s; it is built again at each start", tsv, cached
    )
    return built[0] if built else index_lines(tsv)


def index_lines(tsv: Path) -> np.ndarray:
    """Return the byte offset of each line (N,); an empty last line does not count."""
    size, start = tsv.stat().st_size, 0
    ends = [np.array([-1])]
    bar = progress_bar(total=size, desc=f"lines of {tsv.name}", unit="B", unit_scale=True)
    with tsv.open("rb") as file, bar:
        while block := file.read(INDEX_BLOCK):
            ends.append(np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n")) + start)
            start += len(block)
            bar.update(len(block))
    begins = np.concatenate(ends) + 1
    return begins[begins < start]


def check_offsets(tsv: Path, offsets: np.ndarray, index: Path, *, complete: bool) -> None:
    """Raise UsageError if a sample of the offsets are not starts of lines, or if a `complete` index misses lines."""
    size = tsv.stat().st_size
    valid = not len(offsets) or (offsets.min() >= 0 and offsets.max() < size)
    if complete and valid:
        valid = bool((np.diff(offsets) > 0).all()) and (offsets[0] == 0 if len(offsets) else size == 0)
    if valid:
        with tsv.open("rb") as file:
            for i in np.linspace(0, len(offsets) - 1, min(len(offsets), NUM_CHECKED_LINES), dtype=np.int64):
                file.seek(max(int(offsets[i]) - 1, 0))
                valid = valid and (offsets[i] == 0 or file.read(1) == b"\n")
            if complete and valid and len(offsets):
                file.seek(int(offsets[-1]))
                file.readline()
                valid = file.tell() == size
    if not valid:
        raise UsageError(f"{index} does not match {tsv}, which has changed; move it away to have it created again")


def select_lines(tsv: Path, lines: np.ndarray) -> np.ndarray:
    """Return the lines named by the `.linelist` beside the file, in its order; all without one.

    Raises:
        UsageError: a number is out of range.
    """
    linelist = tsv.with_suffix(".linelist")
    if not linelist.is_file():
        return lines
    numbers = read_integers(linelist)
    if len(numbers) and not (numbers.min() >= 0 and numbers.max() < len(lines)):
        wrong = numbers[(numbers < 0) | (numbers >= len(lines))][0]
        raise UsageError(f"{linelist} names line {wrong}, {tsv} has lines 0 to {len(lines) - 1}; correct the list")
    return lines[numbers]


def read_integers(path: Path) -> np.ndarray:
    """Read a text file with one integer a line.

    Raises:
        UsageError: it has anything else.
    """
    try:
        if not path.stat().st_size:
            return np.zeros(0, dtype=np.int64)
        return np.loadtxt(path, dtype=np.int64, comments=None, ndmin=1, usecols=0, encoding="utf-8-sig")
    except (ValueError, OSError, OverflowError) as error:
        raise UsageError(f"{path} must have one integer a line ({error}); create it again") from None


# --------------------------------------------------------------------------- labels


def parse_label_column(text: str) -> list[str]:
    """Return the classes in a label column: none, one or several, integers as strings."""
    text = text.strip()
    if not text.startswith(("[", "{", '"')):
        return [text] if text else []
    try:
        content = parse_json(text)
    except ValueError:
        return [text]
    entries = content if isinstance(content, list) else [content]
    names = [entry.get("class") if isinstance(entry, dict) else entry for entry in entries]
    return [str(name) for name in names if isinstance(name, (str, int))]


def read_labelmap(path: Path) -> list[str]:
    """Read the names of the classes, one a line; anything after a tab is ignored.

    Raises:
        UsageError: the file is missing, not text, or has a name twice.
    """
    text = read_text(path, "a labelmap has the name of one class a line")
    names = [line.split("\t")[0].strip() for line in text.split("\n") if line.strip()]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"{path} has the class '{twice}' twice; keep each class once")
    return names


def class_index(name: str, index_of: dict[str, int], where: str) -> int:
    """Return the index of a class given by its name or by the index itself.

    Raises:
        UsageError: there is no such class.
    """
    if name in index_of:
        return index_of[name]
    if name.isdecimal() and len(name) < 10 and int(name) < len(index_of):
        return int(name)
    raise UsageError(
        f"{where}: label '{name}' is not one of the {len(index_of)} classes; correct it, or add it to the labelmap"
    )


def _sorted_classes(labels: Iterable[str]) -> list[str]:
    """Return the distinct labels, sorted as numbers if all are."""
    names = set(labels)
    if all(name.isdecimal() for name in names):
        return sorted(names, key=lambda name: (len(name), name))
    return sorted(names)
