"""Convert a dataset between folders and layouts of few large files (zip, tsv, tar shards).

Image files are copied unchanged; --max_side N shrinks the larger ones (shrink.py).

    python -m data.convert IMAGENET OUT --to shards         # OUT/train-000000.tar ..., OUT/val-000000.tar ..., OUT/sizes.json
    python -m data.convert IMAGENET OUT --to zip            # OUT/train.zip, OUT/train_map.txt, and the same for val
    python -m data.convert OUT TSV --to tsv --zip_mode      # from zip files; --tsv_mode: from tsv files; shards are detected
    python -m data.convert OUT IMAGENET2 --to files         # to class folders: IMAGENET2/train/CLASS/..., IMAGENET2/val/CLASS/...
    python -m data.convert PHOTOS OUT --to shards --max_side 1000
    python main_esvit.py --data_path OUT ...                # with --zip_mode or --tsv_mode for these layouts

SOURCE is a --data_path of the other scripts; without a split into training and validation images, all are training images. Classes
are numbered in sorted order over both splits, and their names written to classes.txt, from which `--to files` restores them;
classes that are integers keep their number. Existing files are never overwritten, and all files of DEST appear at once.
"""

from __future__ import annotations

from config.arguments.convert import get_args_parser as get_args_parser

if __name__ == "__main__":  # --help and usage errors are answered before torch is imported
    ARGS = get_args_parser().parse_command_line()

import argparse
import base64
import contextlib
import io
import json
import os
import shutil
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from checkpoints import files
from checkpoints.files import read_text
from data.datasets import LAYOUTS, layout_of
from data.decode import open_image
from data.layouts.folder_scan import EXTENSIONS
from data.layouts.remote import require_local
from data.layouts.sources import UNLABELED, Files, Listing, Source, check_inside
from data.layouts.tars import LABEL_SUFFIX, SIZES
from data.layouts.tsv import TsvLines, parse_label_column
from data.layouts.zips import ZipMembers
from data.shrink import Shrinker
from distributed import launch
from utils import UsageError, counted, logger, setup_logging

SPLITS = ("train", "val")
CLASSES = "classes.txt"


class ImageRecord(NamedTuple):
    """An image to be written."""

    name: str  # its path in the source, if it has one, else a number
    suffix: str  # file extension without a dot
    content: bytes
    label: int | None


class Writer(ABC):
    """Writes one split in a layout. Files are written as `.NAME.part` and renamed by `commit`."""

    def __init__(self, folder: Path, split: str) -> None:
        self.folder = folder
        self.split = split
        self.names: list[str] = []  # of the files

    @abstractmethod
    def write(self, record: ImageRecord) -> None:
        """Add an image.

        Raises:
            UsageError: it has no label, or the name of its class is not that of a folder, where the layout needs one.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the files."""

    def new_file(self, name: str) -> Path:
        """Return the temporary path of the file `name`.

        Raises:
            UsageError: it exists.
        """
        if (self.folder / name).exists():
            raise UsageError(f"{self.folder / name} exists and would be overwritten; choose another folder")
        self.names.append(name)
        return self.folder / f".{name}.part"

    def commit(self) -> None:
        """Give the files their final names."""
        for name in self.names:
            os.link(self.folder / f".{name}.part", self.folder / name)  # unlike a rename this never overwrites
        self.discard()

    def discard(self) -> None:
        """Remove the temporary files."""
        for name in self.names:
            (self.folder / f".{name}.part").unlink(missing_ok=True)


class ZipWriter(Writer):
    """Writes `SPLIT.zip` and its map."""

    def __init__(self, folder: Path, split: str) -> None:
        super().__init__(folder, split)
        archive, map_file = self.new_file(f"{split}.zip"), self.new_file(f"{split}_map.txt")
        self.archive = zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED)
        self.map = map_file.open("w", encoding="utf-8")

    def write(self, record: ImageRecord) -> None:
        if record.label is None:
            raise UsageError(f"{record.name} has no label, which --to zip needs for each image; use tsv or shards")
        self.archive.writestr(zipfile.ZipInfo(record.name), record.content)
        self.map.write(f"{self.split}.zip@/{record.name}\t{record.label}\n")

    def close(self) -> None:
        self.archive.close()
        self.map.close()


class TsvWriter(Writer):
    """Writes `SPLIT.tsv` and its index."""

    def __init__(self, folder: Path, split: str) -> None:
        super().__init__(folder, split)
        tsv, index = self.new_file(f"{split}.tsv"), self.new_file(f"{split}.lineidx")
        self.file, self.index = tsv.open("wb"), index.open("w")

    def write(self, record: ImageRecord) -> None:
        self.index.write(f"{self.file.tell()}\n")
        key = " ".join(record.name.split())  # without tabs and newlines
        label = "" if record.label is None else record.label
        self.file.write(f"{key}\t{label}\t".encode("utf-8", "replace") + base64.b64encode(record.content) + b"\n")

    def close(self) -> None:
        self.file.close()
        self.index.close()


class ShardWriter(Writer):
    """Writes `SPLIT-000000.tar`, `SPLIT-000001.tar`, ... of `images` images each."""

    def __init__(self, folder: Path, split: str, images: int) -> None:
        super().__init__(folder, split)
        self.images = images
        self.count = 0
        self.tar: tarfile.TarFile | None = None

    def write(self, record: ImageRecord) -> None:
        if self.count % self.images == 0:
            self.close()
            path = self.new_file(f"{self.split}-{self.count // self.images:06}.tar")
            self.tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 (see close)
        if record.label is not None:
            self._add(LABEL_SUFFIX, str(record.label).encode())
        self._add(record.suffix, record.content)
        self.count += 1

    def _add(self, suffix: str, content: bytes) -> None:
        assert self.tar is not None
        member = tarfile.TarInfo(f"{self.count:09}.{suffix}")
        member.size = len(content)
        self.tar.addfile(member, io.BytesIO(content))

    def close(self) -> None:
        if self.tar is not None:
            self.tar.close()
        self.tar = None

    def sizes(self) -> dict[str, int]:
        """Return the number of images of each shard."""
        return {name: min(self.images, self.count - i * self.images) for i, name in enumerate(self.names)}


class FolderWriter(Writer):
    """Writes `SPLIT/CLASS/NAME`; a class without a name in `classes` uses its number."""

    def __init__(self, folder: Path, split: str, classes: Sequence[str]) -> None:
        super().__init__(folder, split)
        self.root = self.new_file(split)
        self.classes = classes
        shutil.rmtree(self.root, ignore_errors=True)  # left by an interrupted conversion
        self.root.mkdir()

    def write(self, record: ImageRecord) -> None:
        path = record.name
        if record.label is not None:
            folder = self.classes[record.label] if record.label < len(self.classes) else str(record.label)
            if "/" in folder or folder in ("", ".", ".."):
                raise UsageError(f"class '{folder}' is not a valid folder name; use --to zip, tsv or shards")
            path = path if path.startswith(f"{folder}/") else f"{folder}/{path}"
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        with (self.root / path).open("xb") as file:
            file.write(record.content)

    def close(self) -> None:
        pass

    def commit(self) -> None:
        self.root.rename(self.folder / self.split)  # fails if the folder was created meanwhile and is not empty

    def discard(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)


def main(args: argparse.Namespace) -> None:
    """Convert all splits of the source."""
    setup_logging()
    layout = layout_of(args)
    listings = {split: list_split(args.data_path, layout, split) for split in find_splits(args.data_path, layout)}
    labels, classes = merge_classes(list(listings.values()))
    if args.to == "files" and not classes:
        classes = read_classes(Path(args.data_path))
    folder = Path(args.dest)
    shrinker = Shrinker(args.max_side) if args.max_side else None
    with files.lock_folder(folder, "conversion", "DEST"):
        convert(args, listings, labels, classes, shrinker)
    if shrinker:
        shrinker.report()
    for split, listing in listings.items():
        images, names = counted(len(listing.source), "image"), counted(len(listing.classes), "class", "classes")
        logger.info("%s: %s, %s", split, images, names)
    logger.info("use --data_path %s%s", folder, {"zip": " --zip_mode", "tsv": " --tsv_mode"}.get(args.to, ""))


def convert(
    args: argparse.Namespace,
    listings: Mapping[str, Listing],
    labels: Sequence[np.ndarray],
    classes: Sequence[str],
    shrinker: Shrinker | None,
) -> None:
    """Write all splits, their images shrunk if there is a `shrinker`; either all files appear or none.

    Raises:
        UsageError: DEST cannot be written, or see `Writer.write` and `read_records`.
        Stopped: Ctrl-C.
    """
    done = 0
    interrupted = launch.stop_on_interrupt(
        lambda: f"after {counted(done, 'image')}, of which nothing is left in {args.dest}"
    )
    with interrupted, files.disk_errors(args.dest, "DEST"), contextlib.ExitStack() as stack:
        writers: list[Writer] = []
        for (split, listing), label_N in zip(listings.items(), labels):
            writer = make_writer(args, Path(args.dest), split, classes)
            writers.append(writer)
            stack.callback(writer.discard)
            stack.callback(writer.close)
            records = read_records(listing.source, label_N, Path(args.data_path), split)
            for record in tqdm(records, desc=split, total=len(listing.source)):
                writer.write(record._replace(content=shrinker(record.content)) if shrinker else record)
                done += 1
            writer.close()
        if args.to != "files":
            write_metadata(writers, classes)
        for writer in writers:
            writer.commit()


def make_writer(args: argparse.Namespace, folder: Path, split: str, classes: Sequence[str]) -> Writer:
    """Return the writer of the layout --to."""
    if args.to == "shards":
        return ShardWriter(folder, split, args.shard_images)
    if args.to == "files":
        return FolderWriter(folder, split, classes)
    return ZipWriter(folder, split) if args.to == "zip" else TsvWriter(folder, split)


def find_splits(data_path: str, layout: str) -> list[str]:
    """Return the splits of the source; `train` alone if it is not divided."""
    root = Path(data_path)
    if not root.is_dir():
        return ["train"]
    has_split = {
        "files": lambda split: (root / split).is_dir(),
        "zip": lambda split: (root / f"{split}_map.txt").is_file(),
        "tsv": lambda split: (root / f"{split}.tsv").is_file() or (root / split).is_dir(),
        "shards": lambda split: (root / split).is_dir() or any(root.glob(f"{split}*.tar")),
    }[layout]
    return [split for split in SPLITS if has_split(split)] or ["train"]


def list_split(data_path: str, layout: str, split: str) -> Listing:
    """List the images of a split, with their labels if they have any.

    Raises:
        UsageError: see the layouts.
    """
    require_local(data_path)
    if layout != "shards" and not Path(data_path).exists():
        raise UsageError(f"SOURCE {data_path} does not exist; pass a folder or file of images")
    listing = LAYOUTS[layout](Path(data_path), split, False)
    if isinstance(listing.source, TsvLines) and parse_label_column(listing.source.read_label(0)[1]):
        return LAYOUTS[layout](Path(data_path), split, True)  # reading the labels of tsv files takes longer
    return listing


def merge_classes(listings: Sequence[Listing]) -> tuple[list[np.ndarray], list[str]]:
    """Return the labels of each listing, numbered by the classes of all, and the names of the classes unless they are integers."""
    names = sorted({name for listing in listings for name in listing.classes})
    as_numbers = all(name.isdecimal() and name == str(int(name)) for name in names)  # not 01, which differs from 1
    number_of = {name: int(name) if as_numbers else number for number, name in enumerate(names)}
    merged = []
    for listing in listings:
        assert isinstance(listing.labels, Sequence | np.ndarray)
        number_of_class = np.array([number_of[name] for name in listing.classes], dtype=np.int64)
        label_N = np.asarray(listing.labels, dtype=np.int64)
        merged.append(number_of_class[label_N] if len(number_of_class) else label_N)
    return merged, [] if as_numbers else names


def read_records(source: Source, label_N: np.ndarray, root: Path, split: str) -> Iterator[ImageRecord]:
    """Yield the images of a source.

    Raises:
        UsageError: one cannot be read.
    """
    names = relative_names(source, root / split if (root / split).is_dir() else root)
    for i in range(len(source)):
        try:
            content = source.read(i)
        except Exception as error:  # see Source.read
            raise UsageError(f"{source.name(i)} cannot be read ({error}); repair or remove it") from None
        suffix = image_suffix(content, source.name(i))
        name = names[i] if names else f"{i:09}.{suffix}"
        yield ImageRecord(name, suffix, content, None if label_N[i] == UNLABELED else int(label_N[i]))


def relative_names(source: Source, root: Path) -> list[str]:
    """Return the paths of the images inside the source; an empty list if they have none, or not all different ones."""
    names = [source.name(i) for i in range(len(source))]
    if isinstance(source, ZipMembers):
        names = [name.partition("@/")[2] for name in names]
    elif isinstance(source, Files):
        folder = os.path.commonpath([os.path.dirname(name) for name in names]) if root.is_file() else str(root)
        names = [os.path.relpath(name, folder).replace(os.sep, "/") for name in names]
    else:
        return []
    try:
        for name in names:
            check_inside(name, "", "")
            name.encode()
    except ValueError:
        return []
    return names if len(set(names)) == len(names) else []


def image_suffix(content: bytes, name: str) -> str:
    """Return the file extension of an image, from its name, else from its content, else jpg."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix in EXTENSIONS:
        return suffix[1:]
    try:
        with open_image(io.BytesIO(content)) as image:
            return {"jpeg": "jpg", "tiff": "tif"}.get(kind := str(image.format).lower(), kind)
    except Exception:  # damaged images are converted too, and reported when they are used
        return "npy" if content.startswith(b"\x93NUMPY") else "jpg"


def read_classes(source: Path) -> list[str]:
    """Return the names of the classes from classes.txt in or beside the source; an empty list without that file.

    Raises:
        UsageError: it cannot be read.
    """
    path = (source if source.is_dir() else source.parent) / CLASSES
    if not path.exists():
        return []
    text = read_text(path, "it must have one class name a line; correct it or move it away", "surrogateescape")
    return text.removesuffix("\n").split("\n") if text else []


def write_metadata(writers: Sequence[Writer], classes: Sequence[str]) -> None:
    """Write classes.txt, if classes have names, and the sizes.json of shards, as files of the last writer."""
    sizes = {name: n for writer in writers if isinstance(writer, ShardWriter) for name, n in writer.sizes().items()}
    if classes:
        writers[-1].new_file(CLASSES).write_bytes(os.fsencode("".join(f"{name}\n" for name in classes)))
    if sizes:
        writers[-1].new_file(SIZES).write_text(json.dumps(sizes, indent=1))


if __name__ == "__main__":
    launch.run_script(partial(main, ARGS))
