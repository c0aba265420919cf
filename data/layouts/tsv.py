"""Images in tab-separated text, as `--tsv_mode` takes them: few large files that are read at any line.

    DIR/train.tsv  DIR/val.tsv        or a folder of such files, e.g. of ImageNet-22K, with DIR/labelmap_22k_reorder.txt
    DIR/train.lineidx                 the byte at which each line begins, one a line; made when missing
    DIR/train.linelist                optional: the lines to use, counted from 0, one a line

A line is `key<TAB>label<TAB>image in base64`. The label is a number, a name, empty, or JSON that holds one:
`[{"class": "n01440764"}]`, `["n01440764"]`. A labelmap, one name a line, numbers the names; without it they are numbered in their
order. Labels are read only where they are needed, since that takes a look at every line; those of large files are kept in the cache
folder (data/layouts/index_cache.py) until a file changes. The index is 14 bytes an image.

Origin: the layout of microsoft/esvit (and of Microsoft's scene graph benchmark); reading is this project's own.
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from checkpoints.files import parse_json, read_text
from data.layouts.index_cache import arrays_once, cache_file, make_once, state_of
from data.layouts.sources import UNLABELED, Listing, Names, OwnFile, Source
from distributed.collectives import is_main_process
from utils import UsageError, logger

LABELMAP = "labelmap_22k_reorder.txt"
LINE = np.dtype([("file", "<u2"), ("line", "<u4"), ("offset", "<u8")])  # line from 1, 0: not known
COLUMNS = 3  # key, label, image
BLOCK = 2**24  # bytes read at once while an index is made
HEAD = 2**10  # bytes read at once for a label
CHECKED_LINES = 100
KEPT_FROM = 50_000  # lines; the labels of fewer are read each time


class TsvLines(Source):
    """Images in lines of tsv files.

    Args:
        files: the tsv files.
        lines: a `LINE` each image: which file, and where in it.
    """

    def __init__(self, files: Sequence[Path], lines: np.ndarray) -> None:
        self.files = [OwnFile(path) for path in files]
        self.lines = lines

    def __len__(self) -> int:
        return len(self.lines)

    def name(self, index: int) -> str:
        """See `Source.name`."""
        entry = self.lines[index]
        place = f"line {entry['line']}" if entry["line"] else f"at byte {entry['offset']}"
        return f"{self.files[entry['file']].path} {place}"

    def read(self, index: int) -> bytes:
        """See `Source.read`."""
        entry = self.lines[index]
        columns = self.files[entry["file"]].read_line(int(entry["offset"])).split(b"\t")
        if len(columns) < COLUMNS:
            raise ValueError(f"the line has {len(columns)} columns; it takes key, label and image")
        return base64.b64decode(columns[COLUMNS - 1], validate=True)

    def head(self, index: int) -> tuple[str, str]:
        """Key and label of an image, without reading the image.

        Raises:
            UsageError: the line has not got them.
        """
        entry = self.lines[index]
        try:
            line = self.files[entry["file"]].read_line(int(entry["offset"]), block=HEAD, fields=2)
            key, label = line.decode().split("\t")
        except (EOFError, ValueError):
            raise UsageError(f"{self.name(index)} has no key and label; a line is key<TAB>label<TAB>base64") from None
        return key, label


def list_tsv(root: Path, split: str, need_labels: bool) -> Listing:
    """The images of a tsv file, of `split`.tsv in a folder, or of all tsv files of a folder; labels only if needed.

    Raises:
        UsageError: no such file, an index that does not fit, or, where labels are needed, a line without one.
    """
    files = find_tsv(root, split)
    parts = []
    for number, file in enumerate(files):
        offsets = line_offsets(file)
        part = np.zeros(len(offsets), dtype=LINE)
        part["file"], part["line"], part["offset"] = number, np.arange(1, len(offsets) + 1), offsets
        parts.append(chosen_lines(file, part))
    source = TsvLines(files, np.concatenate(parts))
    if not len(source):
        raise UsageError(f"{root} holds no line; a line is key<TAB>label<TAB>base64")
    if not need_labels:
        return Listing(source, np.full(len(source), UNLABELED), ())
    found = _read_labels(source, files)
    names = (
        read_labelmap(files[0].parent / LABELMAP) if (files[0].parent / LABELMAP).is_file() else _sorted_names(found)
    )
    number_of = {name: number for number, name in enumerate(names)}
    labels = [label_number(name, number_of, source.name(i)) for i, name in enumerate(found)]
    return Listing(source, np.array(labels), names)


def _read_labels(source: TsvLines, files: Sequence[Path]) -> Names:
    """The label of each line.

    Raises:
        UsageError: a line has none, or several.
    """

    def read() -> dict[str, np.ndarray]:
        names = Names([_one_label(source, i) for i in progress(range(len(source)), "labels")])
        return {"text": names.text, "ends": names.ends}

    if len(source) < KEPT_FROM:
        return Names.of(**read())
    linelists = [path for file in files if (path := file.with_suffix(".linelist")).is_file()]
    return Names.of(**arrays_once(cache_file(files[0], f".{state_of([*files, *linelists])}.labels.npz"), read))


def find_tsv(root: Path, split: str) -> list[Path]:
    """The tsv files that hold the images of `split`.

    Raises:
        UsageError: none.
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


# --------------------------------------------------------------------------- where lines begin


def line_offsets(tsv: Path) -> np.ndarray:
    """(N,) the byte at which each line begins, from the index beside the file, which is made when missing.

    Where that folder cannot be written it is made in the cache folder, else in memory.

    Raises:
        UsageError: the index does not fit the file.
    """
    beside = tsv.with_suffix(".lineidx")
    made: list[np.ndarray] = []

    def write(file: BinaryIO) -> None:
        made[:] = made or [index_lines(tsv)]
        file.write("".join(f"{offset}\n" for offset in made[0].tolist()).encode())

    state = tsv.stat()
    aside = cache_file(tsv, f".{state.st_size}.{state.st_mtime_ns}.lineidx")
    for place in (beside, aside):
        if make_once(place, write):
            offsets = made[0] if made else read_numbers(place)
            check_offsets(tsv, offsets, place, complete=True)
            return offsets
    logger.warning("the index of %s can be written neither beside it nor to %s; it is made anew each time", tsv, aside)
    return made[0] if made else index_lines(tsv)


def index_lines(tsv: Path) -> np.ndarray:
    """(N,) the byte at which each line begins; an empty last line is none."""
    size, start = tsv.stat().st_size, 0
    ends = [np.array([-1])]
    bar = tqdm(total=size, desc=f"lines of {tsv.name}", unit="B", unit_scale=True, disable=_quiet(), leave=False)
    with tsv.open("rb") as file, bar:
        while block := file.read(BLOCK):
            ends.append(np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n")) + start)
            start += len(block)
            bar.update(len(block))
    begins = np.concatenate(ends) + 1
    return begins[begins < start]


def check_offsets(tsv: Path, offsets: np.ndarray, index: Path, *, complete: bool) -> None:
    """Look whether offsets begin lines of the file: some of them; and all lines of a `complete` index.

    Raises:
        UsageError: they do not.
    """
    size = tsv.stat().st_size
    fits = not len(offsets) or (offsets.min() >= 0 and offsets.max() < size)
    if complete and fits:
        fits = bool((np.diff(offsets) > 0).all()) and (offsets[0] == 0 if len(offsets) else size == 0)
    if fits:
        with tsv.open("rb") as file:
            for place in np.linspace(0, len(offsets) - 1, min(len(offsets), CHECKED_LINES), dtype=np.int64):
                file.seek(max(int(offsets[place]) - 1, 0))
                fits = fits and (offsets[place] == 0 or file.read(1) == b"\n")
            if complete and fits and len(offsets):
                file.seek(int(offsets[-1]))
                file.readline()
                fits = file.tell() == size
    if not fits:
        raise UsageError(f"{index} does not fit {tsv}, which was changed since; move it away, it is made anew then")


def chosen_lines(tsv: Path, lines: np.ndarray) -> np.ndarray:
    """Those lines that the linelist beside the file names, in its order; all without one.

    Raises:
        UsageError: a number that is no line.
    """
    linelist = tsv.with_suffix(".linelist")
    if not linelist.is_file():
        return lines
    numbers = read_numbers(linelist)
    if len(numbers) and not (numbers.min() >= 0 and numbers.max() < len(lines)):
        wrong = numbers[(numbers < 0) | (numbers >= len(lines))][0]
        raise UsageError(f"{linelist} names line {wrong}, {tsv} has lines 0 to {len(lines) - 1}; make the list again")
    return lines[numbers]


def read_numbers(path: Path) -> np.ndarray:
    """(N,) the whole numbers of a text file, one a line.

    Raises:
        UsageError: it holds anything else.
    """
    try:
        if not path.stat().st_size:
            return np.zeros(0, dtype=np.int64)
        return np.loadtxt(path, dtype=np.int64, comments=None, ndmin=1, usecols=0, encoding="utf-8-sig")
    except (ValueError, OSError, OverflowError) as error:
        raise UsageError(f"{path} is no list of whole numbers, one a line ({error}); make it again") from None


# --------------------------------------------------------------------------- labels


def label_names(text: str) -> list[str]:
    """The classes that a label column names: none, one, or several; numbers are names too."""
    text = text.strip()
    if not text.startswith(("[", "{", '"')):
        return [text] if text else []
    try:
        content = parse_json(text)
    except ValueError:
        return [text]
    entries = content if isinstance(content, list) else [content]
    named = [entry.get("class") if isinstance(entry, dict) else entry for entry in entries]
    return [str(name) for name in named if isinstance(name, (str, int))]


def read_labelmap(path: Path) -> list[str]:
    """Names of classes, one a line; what follows a tab is skipped.

    Raises:
        UsageError: it is missing, no text, or names a class twice.
    """
    text = read_text(path, "a labelmap numbers the classes, the name of one a line")
    names = [line.split("\t")[0].strip() for line in text.split("\n") if line.strip()]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"{path} names the class '{twice}' twice; a labelmap has each class once")
    return names


def label_number(name: str, number_of: dict[str, int], where: str) -> int:
    """The number of a class, which a label gives by its name or as the number itself.

    Raises:
        UsageError: there is no such class.
    """
    if name in number_of:
        return number_of[name]
    if name.isdecimal() and len(name) < 10 and int(name) < len(number_of):
        return int(name)
    raise UsageError(f"{where}: the label '{name}' is none of the {len(number_of)} classes; repair it or the labelmap")


def progress(items: Sequence[int], what: str) -> Iterable[int]:
    """The items, with a progress bar on the main process's terminal."""
    return tqdm(items, desc=what, disable=_quiet(), leave=False)


def _quiet() -> bool:
    return not (is_main_process() and sys.stderr.isatty())


def _one_label(source: TsvLines, index: int) -> str:
    names = label_names(source.head(index)[1])
    if len(names) != 1:
        raise UsageError(f"{source.name(index)} has {len(names)} labels, one is needed; repair the line")
    return names[0]


def _sorted_names(found: Iterable[str]) -> list[str]:
    """Numbers in their order, names in theirs."""
    names = set(found)
    if all(name.isdecimal() for name in names):
        return sorted(names, key=lambda name: (len(name), name))
    return sorted(names)
