"""Turn images into one of the layouts of few large files, zip, tsv or shards, and back. Images stay byte for byte what they are.

    python -m data.convert IMAGENET OUT --to shards         # OUT/train-000000.tar ..., OUT/val-000000.tar ..., OUT/sizes.json
    python -m data.convert IMAGENET OUT --to zip            # OUT/train.zip, OUT/train_map.txt, the same of val
    python -m data.convert OUT TSV --to tsv --zip_mode      # from zip files; --tsv_mode: from tsv files; tars are seen
    python -m data.convert OUT IMAGENET2 --to files         # back: IMAGENET2/train/CLASS/..., IMAGENET2/val/CLASS/...
    python main_esvit.py --data_path OUT ...                # --zip_mode and --tsv_mode as the layout needs

SOURCE is whatever the scripts take: with training and validation images both are converted, else all counts as training.
Classes are numbered in their order over both, and classes.txt says how, which the way back looks up; those that are numbers already
keep them. Labels are written where every image has one. Nothing is overwritten, and files get their names when they are whole.

Origin: this project's own; shards are written by webdataset.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import os
import shutil
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm
from webdataset import TarWriter

from checkpoints import files
from checkpoints.files import read_text
from config import arguments
from config.ranges import COUNT
from data.datasets import LAYOUTS, layout_of
from data.decode import open_image
from data.layouts.remote import check_here
from data.layouts.sources import UNLABELED, Files, Listing, Source, check_inside
from data.layouts.tars import SIZES
from data.layouts.tree import EXTENSIONS
from data.layouts.tsv import TsvLines, label_names
from data.layouts.zips import ZipMembers
from distributed import collectives, launch
from utils import UsageError, counted, logger

SPLITS = ("train", "val")
CLASSES = "classes.txt"


class Item(NamedTuple):
    """An image on its way."""

    name: str  # where the source has one of its own, else a number
    suffix: str  # of the kind of file, without a dot
    content: bytes
    label: int | None


class Writer(ABC):
    """One split in a layout. Files are written as `.NAME.part` and named by `finish`.

    Args:
        folder, split: where, and which.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.folder = folder
        self.split = split
        self.parts: list[str] = []  # names of the files to be

    @abstractmethod
    def write(self, item: Item) -> None:
        """Add an image.

        Raises:
            UsageError: its label is missing, or no name of a folder, where the layout needs one.
        """

    @abstractmethod
    def close(self) -> None:
        """After the last image, or an error."""

    def part(self, name: str) -> Path:
        """Where to write the file that will be `name`.

        Raises:
            UsageError: there is one.
        """
        if (self.folder / name).exists():
            raise UsageError(f"{self.folder / name} is there already; nothing is overwritten, choose another folder")
        self.parts.append(name)
        return self.folder / f".{name}.part"

    def finish(self) -> None:
        """Give the files their names."""
        for name in self.parts:
            os.link(self.folder / f".{name}.part", self.folder / name)  # unlike a renaming it overwrites nothing
        self.discard()

    def discard(self) -> None:
        """Remove what has no name yet."""
        for name in self.parts:
            (self.folder / f".{name}.part").unlink(missing_ok=True)


class ZipWriter(Writer):
    """`SPLIT.zip` with its map."""

    def __init__(self, folder: Path, split: str) -> None:
        super().__init__(folder, split)
        archive, map_file = self.part(f"{split}.zip"), self.part(f"{split}_map.txt")
        self.archive = zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED)
        self.map = map_file.open("w", encoding="utf-8")

    def write(self, item: Item) -> None:
        """See `Writer.write`."""
        if item.label is None:
            raise UsageError(f"{item.name} has no label, which a zip needs for each image; choose --to tsv or shards")
        self.archive.writestr(zipfile.ZipInfo(item.name), item.content)
        self.map.write(f"{self.split}.zip@/{item.name}\t{item.label}\n")

    def close(self) -> None:
        """See `Writer.close`."""
        self.archive.close()
        self.map.close()


class TsvWriter(Writer):
    """`SPLIT.tsv` with its index."""

    def __init__(self, folder: Path, split: str) -> None:
        super().__init__(folder, split)
        tsv, index = self.part(f"{split}.tsv"), self.part(f"{split}.lineidx")
        self.file, self.index = tsv.open("wb"), index.open("w")

    def write(self, item: Item) -> None:
        """See `Writer.write`."""
        self.index.write(f"{self.file.tell()}\n")
        key = " ".join(item.name.split())  # no tab or newline
        label = "" if item.label is None else item.label
        self.file.write(f"{key}\t{label}\t".encode("utf-8", "replace") + base64.b64encode(item.content) + b"\n")

    def close(self) -> None:
        """See `Writer.close`."""
        self.file.close()
        self.index.close()


class ShardsWriter(Writer):
    """`SPLIT-000000.tar` and so on.

    Args:
        images: of a shard.
    """

    def __init__(self, folder: Path, split: str, images: int) -> None:
        super().__init__(folder, split)
        self.images = images
        self.count = 0
        self.tar: TarWriter | None = None

    def write(self, item: Item) -> None:
        """See `Writer.write`."""
        if self.count % self.images == 0:
            self.close()
            self.tar = TarWriter(
                str(self.part(f"{self.split}-{self.count // self.images:06}.tar")), encoder=False, mtime=0
            )
        label = {} if item.label is None else {"cls": str(item.label).encode()}
        assert self.tar is not None
        self.tar.write({"__key__": f"{self.count:09}", item.suffix: item.content, **label})
        self.count += 1

    def close(self) -> None:
        """See `Writer.close`."""
        if self.tar is not None:
            self.tar.close()
        self.tar = None

    def sizes(self) -> dict[str, int]:
        """Images of each shard."""
        return {name: min(self.images, self.count - i * self.images) for i, name in enumerate(self.parts)}


class FolderWriter(Writer):
    """`SPLIT/CLASS/NAME`.

    Args:
        classes: their names; one that has none goes by its number.
    """

    def __init__(self, folder: Path, split: str, classes: Sequence[str]) -> None:
        super().__init__(folder, split)
        self.root = self.part(split)
        self.classes = classes
        shutil.rmtree(self.root, ignore_errors=True)  # of a conversion that was killed
        self.root.mkdir()

    def write(self, item: Item) -> None:
        """See `Writer.write`."""
        path = item.name
        if item.label is not None:
            folder = self.classes[item.label] if item.label < len(self.classes) else str(item.label)
            if "/" in folder or folder in ("", ".", ".."):
                raise UsageError(f"the class '{folder}' cannot name a folder; convert to zip, tsv or shards")
            path = path if path.startswith(f"{folder}/") else f"{folder}/{path}"
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        with (self.root / path).open("xb") as file:
            file.write(item.content)

    def close(self) -> None:
        """See `Writer.close`."""

    def finish(self) -> None:
        """See `Writer.finish`."""
        self.root.rename(self.folder / self.split)  # which fails where a folder that holds anything came meanwhile

    def discard(self) -> None:
        """See `Writer.discard`."""
        shutil.rmtree(self.root, ignore_errors=True)


def get_args_parser() -> argparse.ArgumentParser:
    """From where to where."""
    parser = arguments.Parser("python -m data.convert", description="images into zip, tsv or shards, and back")
    parser.add_argument("data_path", metavar="SOURCE", help="as --data_path of the scripts")
    parser.add_argument("dest", metavar="DEST", help="folder; made when missing")
    parser.add_argument("--to", required=True, choices=("zip", "tsv", "shards", "files"), help="layout of DEST")
    parser.add_argument("--shard_images", type=COUNT, default=5000, help="images of a shard")
    arguments.add_layout_flags(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Convert all splits of the source."""
    collectives.setup_logging()
    layout = layout_of(args)
    listings = {split: list_split(args.data_path, layout, split) for split in find_splits(args.data_path, layout)}
    numbers, names = number_classes(list(listings.values()))
    if args.to == "files" and not names:
        names = read_classes(Path(args.data_path))
    folder = Path(args.dest)
    with files.lock_folder(folder, "conversion", "DEST"):
        convert(args, listings, numbers, names)
    for split, listing in listings.items():
        images, classes = counted(len(listing.source), "image"), counted(len(listing.classes), "class", "classes")
        logger.info("%s: %s, %s", split, images, classes)
    logger.info("use them with --data_path %s%s", folder, {"zip": " --zip_mode", "tsv": " --tsv_mode"}.get(args.to, ""))


def convert(
    args: argparse.Namespace, listings: Mapping[str, Listing], numbers: Sequence[np.ndarray], names: Sequence[str]
) -> None:
    """Write all splits, of which either all files appear or none.

    Raises:
        UsageError: the disk refuses, or see `Writer.write` and `items_of`.
        Stopped: Ctrl-C.
    """
    done = 0
    interrupted = launch.stop_on_interrupt(
        lambda: f"after {counted(done, 'image')}, of which nothing is left in {args.dest}"
    )
    with interrupted, files.disk_errors(args.dest, "DEST"), contextlib.ExitStack() as stack:
        writers: list[Writer] = []
        for (split, listing), label_N in zip(listings.items(), numbers):
            writers.append(make_writer(args, Path(args.dest), split, names))
            stack.callback(writers[-1].discard)
            stack.callback(writers[-1].close)
            items = items_of(listing.source, label_N, Path(args.data_path), split)
            for item in tqdm(items, desc=split, total=len(listing.source)):
                writers[-1].write(item)
                done += 1
            writers[-1].close()
        if args.to != "files":
            write_small_files(writers, names)
        for writer in writers:
            writer.finish()


def make_writer(args: argparse.Namespace, folder: Path, split: str, classes: Sequence[str]) -> Writer:
    """The writer that --to names."""
    if args.to == "shards":
        return ShardsWriter(folder, split, args.shard_images)
    if args.to == "files":
        return FolderWriter(folder, split, classes)
    makers: dict[str, Callable[[Path, str], Writer]] = {"zip": ZipWriter, "tsv": TsvWriter}
    return makers[args.to](folder, split)


def find_splits(data_path: str, layout: str) -> list[str]:
    """`train`, and `val` where the source has it apart."""
    root = Path(data_path)
    if not root.is_dir():
        return ["train"]
    apart = {
        "files": lambda split: (root / split).is_dir(),
        "zip": lambda split: (root / f"{split}_map.txt").is_file(),
        "tsv": lambda split: (root / f"{split}.tsv").is_file() or (root / split).is_dir(),
        "shards": lambda split: (root / split).is_dir() or any(root.glob(f"{split}*.tar")),
    }[layout]
    return [split for split in SPLITS if apart(split)] or ["train"]


def list_split(data_path: str, layout: str, split: str) -> Listing:
    """The images of a split, with their labels if they have any.

    Raises:
        UsageError: see the layouts.
    """
    check_here(data_path)
    if layout != "shards" and not Path(data_path).exists():
        raise UsageError(f"'{data_path}' does not exist; SOURCE is a folder or file of images")
    listing = LAYOUTS[layout](Path(data_path), split, False)
    if isinstance(listing.source, TsvLines) and label_names(listing.source.head(0)[1]):
        return LAYOUTS[layout](Path(data_path), split, True)  # reads labels, which takes longer
    return listing


def number_classes(listings: Sequence[Listing]) -> tuple[list[np.ndarray], list[str]]:
    """The labels of each listing, numbered alike, and the names of the classes where they were no numbers before."""
    names = sorted({name for listing in listings for name in listing.classes})
    as_numbers = all(name.isdecimal() and name == str(int(name)) for name in names)  # 01 is a name: it might meet a 1
    number_of = {name: int(name) if as_numbers else number for number, name in enumerate(names)}
    numbers = []
    for listing in listings:
        assert isinstance(listing.labels, Sequence | np.ndarray)
        numbers_of_class = np.array([number_of[name] for name in listing.classes], dtype=np.int64)
        labels = np.asarray(listing.labels, dtype=np.int64)
        numbers.append(numbers_of_class[labels] if len(numbers_of_class) else labels)
    return numbers, [] if as_numbers else names


def items_of(source: Source, label_N: np.ndarray, root: Path, split: str) -> Iterator[Item]:
    """The images of a source, one after the other.

    Raises:
        UsageError: one cannot be read.
    """
    names = own_names(source, root / split if (root / split).is_dir() else root)
    for i in range(len(source)):
        try:
            content = source.read(i)
        except Exception as error:  # of any kind: see Source
            raise UsageError(f"{source.name(i)} cannot be read ({error}); repair or remove it") from None
        suffix = kind_of(content, source.name(i))
        name = names[i] if names else f"{i:09}.{suffix}"
        yield Item(name, suffix, content, None if label_N[i] == UNLABELED else int(label_N[i]))


def own_names(source: Source, root: Path) -> list[str]:
    """The images' names inside the source, if they are paths below it and all different; else none."""
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


def kind_of(content: bytes, name: str) -> str:
    """The suffix of an image file: its own, else what its bytes say, else jpg."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix in EXTENSIONS:
        return suffix[1:]
    try:
        with open_image(io.BytesIO(content)) as image:
            return {"jpeg": "jpg", "tiff": "tif"}.get(kind := str(image.format).lower(), kind)
    except Exception:  # damaged images are converted too, and named when they are used
        return "npy" if content.startswith(b"\x93NUMPY") else "jpg"


def read_classes(source: Path) -> list[str]:
    """The names of classes in classes.txt of a folder, or beside a file or pattern; none without it.

    Raises:
        UsageError: it is there and cannot be read.
    """
    path = (source if source.is_dir() else source.parent) / CLASSES
    if not path.exists():
        return []
    text = read_text(path, "it has the name of one class a line; repair it or move it away", "surrogateescape")
    return text.removesuffix("\n").split("\n") if text else []


def write_small_files(writers: Sequence[Writer], names: Sequence[str]) -> None:
    """classes.txt, where classes have names, and sizes.json of shards; they become files of the last writer."""
    sizes = {name: n for writer in writers if isinstance(writer, ShardsWriter) for name, n in writer.sizes().items()}
    if names:
        writers[-1].part(CLASSES).write_bytes(os.fsencode("".join(f"{name}\n" for name in names)))
    if sizes:
        writers[-1].part(SIZES).write_text(json.dumps(sizes, indent=1))


if __name__ == "__main__":
    launch.run_script(lambda: main(get_args_parser().parse_args()))
