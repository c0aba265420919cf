"""A folder of features: one row an image in a numpy file, names and labels in the same order, and what the features were made of.

    features.npy      (N, C) float32 or float16; a row of NaN for an image that cannot be read
    regions.npy       (N, T, C), with --regions
    files.txt         name of each image: path, ARCHIVE@/member, or TSV line NUMBER
    labels.txt        class of each image, where there are classes
    unreadable.csv    row, name and reason of each image that cannot be read, if there are any
    meta.json         network, checksum of the weights, data, preprocessing, shapes

While it is extracted, everything is in the sub-folder `unfinished`, with `done.npy`: one byte an image, set after its rows are on
the disk. A resumed extraction computes the remaining images. Then `unfinished/meta.json` gets the number of unreadable images, and
from then on nothing is computed. The files are moved up, meta.json last: a folder with meta.json is complete, and never changed.

Rows are written by seeking in the file rather than through a memory map: the memory of a process does not grow with the number of
images, and a full disk is an error instead of a signal. Processes write different rows of the same files.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from checkpoints import files
from data.layouts.sources import PackedStrings
from utils import UsageError, counted, flattened, logger

META, DONE = "meta.json", "done.npy"
FEATURES, REGIONS, NAMES, LABELS, UNREADABLE = (
    "features.npy",
    "regions.npy",
    "files.txt",
    "labels.txt",
    "unreadable.csv",
)
CONTENT = (FEATURES, REGIONS, NAMES, LABELS, UNREADABLE)
UNFINISHED = "unfinished"
PLACES = ("network.pretrained_weights", "data.data_path")  # entries that may differ when an extraction is resumed
SYNC_SECONDS = 20.0  # of work that a killed process loses at most


class SavedFeatures(NamedTuple):
    """The content of a finished folder; the features stay on the disk."""

    meta: dict[str, Any]
    features_NC: np.ndarray
    names: PackedStrings
    labels: PackedStrings | None


class RowFile:
    """The rows of an existing .npy file, written in place."""

    def __init__(self, path: Path) -> None:
        mapped = np.lib.format.open_memmap(path, mode="r")
        self.shape, self.dtype, self._offset = mapped.shape, mapped.dtype, mapped.offset
        self._row_bytes = mapped.nbytes // len(mapped)
        self._file = path.open("r+b")

    def write(self, first: int, rows: np.ndarray) -> None:
        """Write consecutive rows, from row `first` on."""
        assert rows.shape[1:] == self.shape[1:]
        self._file.seek(self._offset + first * self._row_bytes)
        self._file.write(np.ascontiguousarray(rows, dtype=self.dtype).data)

    def sync(self) -> None:
        """Wait until the rows are on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class FeatureWriter:
    """Writes the rows of one process; a context manager, which saves what was written also after an error."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        names = (FEATURES, REGIONS)
        self.files = {name: RowFile(folder / name) for name in names if (folder / name).exists()}
        self._done = RowFile(folder / DONE)
        self._written: list[tuple[int, np.ndarray]] = []
        self._synced = time.monotonic()

    def write(self, first: int, rows: Mapping[str, np.ndarray], done_B: np.ndarray) -> None:
        """Write the rows of consecutive images.

        Args:
            first: row of the first image.
            rows: by name of the file.
            done_B: which of them are final; the others are computed again when the extraction is resumed.
        """
        for name, file in self.files.items():
            file.write(first, rows[name])
        self._written.append((first, done_B))
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Save the rows, then mark their images as done."""
        files.check_lock(self._folder.parent)
        for file in self.files.values():
            file.sync()
        for first, done_B in self._written:
            self._done.write(first, done_B)
        self._done.sync()
        self._written.clear()
        self._synced = time.monotonic()

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if not isinstance(error, OSError | UsageError):
                self.sync()
        finally:
            for file in (*self.files.values(), self._done):
                file.close()


class FeatureFolder:
    """The folder of --output_dir.

    Args:
        path: the folder, which exists.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.unfinished = self.path / UNFINISHED

    @property
    def finished(self) -> bool:
        """Whether the folder has all features."""
        return os.path.exists(self.path / META)  # unlike Path.exists, False for a name that is too long

    # ----------------------------------------------------------------- writing

    def prepare(self, meta: dict[str, Any], names: Sequence[str], labels: Iterable[str] | None) -> None:
        """Create the files of a new extraction, or check that a resumed or finished one has the same settings.

        Args:
            meta: content of meta.json; the digest of the names is added.
            names: of all images.
            labels: of all images.

        Raises:
            UsageError: other settings, other files of these names, not enough space, or a name with a line break.
        """
        meta["data"]["names_sha256"] = _digest(names)
        saved = next((place for place in (self.path, self.unfinished) if (place / META).exists()), None)
        if saved is not None:
            remedy = "" if self.finished else f"pass the flags and images that it was started with, delete {saved}, or "
            _check_same(_read_meta(saved), meta, saved, remedy)
            return
        present = [name for name in (*CONTENT, UNFINISHED) if files.lexists(self.path / name)]
        if present:
            raise UsageError(f"--output_dir {self.path} has {' and '.join(present)} of something else; choose another")
        self._create(meta, names, labels)

    def _create(self, meta: dict[str, Any], names: Sequence[str], labels: Iterable[str] | None) -> None:
        shapes = {name: meta[key] for name, key in ((FEATURES, "features"), (REGIONS, "regions")) if key in meta}
        arrays = {name: (tuple(entry["shape"]), np.dtype(entry["dtype"])) for name, entry in shapes.items()}
        needed = sum(np.prod(shape, dtype=float) * dtype.itemsize for shape, dtype in arrays.values())
        free = shutil.disk_usage(self.path).free
        if needed > free:
            raise UsageError(
                f"--output_dir {self.path} needs {needed / 2**30:.1f} GiB for the features and has {free / 2**30:.1f} GiB free; "
                "choose another disk, pass --half, or leave --regions out"
            )

        def write(folder: Path) -> None:
            for name, (shape, dtype) in (arrays | {DONE: ((len(names),), np.dtype(np.uint8))}).items():
                np.lib.format.open_memmap(folder / name, "w+", dtype, shape)
            _write_lines(folder / NAMES, names)
            if labels is not None:
                _write_lines(folder / LABELS, labels)
            _write_json(folder / META, meta)

        files.write_new_folder(self.unfinished, write)

    def pending_batches(self, batch_size: int) -> np.ndarray:
        """Return the numbers of the batches of consecutive images that have an image to compute; none once `finish` has begun."""
        if "unreadable" in _read_meta(self.unfinished):
            return np.arange(0)
        done_N = np.load(self.unfinished / DONE, mmap_mode="r")
        starts = np.arange(0, len(done_N), batch_size)
        return np.flatnonzero(np.minimum.reduceat(done_N, starts) == 0)

    def writer(self) -> FeatureWriter:
        """Open the files of the extraction."""
        return FeatureWriter(self.unfinished)

    def finish(self, names: Sequence[str], reasons: Mapping[str, str]) -> None:
        """Move the finished files up, meta.json last; may be repeated after it was killed.

        Args:
            names: of all images.
            reasons: why images cannot be read, by name.
        """
        meta = _read_meta(self.unfinished)
        if "unreadable" not in meta:
            meta["unreadable"] = self._list_unreadable(names, reasons)
            _write_json(self.unfinished / META, meta)
        for name in CONTENT:
            if (self.unfinished / name).exists():
                os.replace(self.unfinished / name, self.path / name)
        for path in (self.unfinished / DONE, *self.unfinished.glob(f".*{files.TEMPORARY_SUFFIX}")):
            path.unlink(missing_ok=True)
        others = sorted(path.name for path in self.unfinished.iterdir() if path.name != META)
        if others:
            raise UsageError(
                f"{self.unfinished} has {' and '.join(others)} of something else; move that away and repeat the command"
            )
        os.replace(self.unfinished / META, self.path / META)
        self.unfinished.rmdir()
        logger.info("wrote the features of %s to %s", counted(len(names), "image"), self.path)
        if meta["unreadable"]:
            logger.warning(
                "%s cannot be read: rows of NaN, listed in %s", counted(meta["unreadable"], "image"), UNREADABLE
            )

    def _list_unreadable(self, names: Sequence[str], reasons: Mapping[str, str]) -> int:
        """List the images that are not done, and return their number."""
        unreadable = np.flatnonzero(np.load(self.unfinished / DONE) == 0).tolist()
        (self.unfinished / UNREADABLE).unlink(missing_ok=True)  # of a run that was killed here
        if unreadable:
            rows = ((row, names[row], reasons.get(names[row], "")) for row in unreadable)
            write_csv(self.unfinished / UNREADABLE, ("row", "image", "reason"), rows)
        return len(unreadable)

    # ----------------------------------------------------------------- reading

    def load(self) -> SavedFeatures:
        """Open the features of a finished folder.

        Raises:
            UsageError: a file is missing or damaged, or does not match the others.
        """
        meta = _read_meta(self.path)
        try:
            features_NC = np.load(self.path / FEATURES, mmap_mode="r")
            names = _read_lines(self.path / NAMES)
            labels = _read_lines(self.path / LABELS) if (self.path / LABELS).exists() else None
            lengths = {len(features_NC), len(names), *([] if labels is None else [len(labels)])}
            fits = list(features_NC.shape) == meta["features"]["shape"] and len(lengths) == 1
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"{self.path} has damaged features ({error}); extract them again to another folder"
            ) from None
        if not fits:
            raise UsageError(
                f"{self.path} has features of shape {list(features_NC.shape)}, {len(names)} names and another {META}; "
                "extract them again to another folder"
            )
        return SavedFeatures(meta, features_NC, names, labels)


def _check_same(saved: Mapping[str, Any], wanted: Mapping[str, Any], place: Path, remedy: str) -> None:
    ours = dict(flattened(json.loads(json.dumps(wanted))))
    theirs = {key: value for key, value in flattened(saved) if key != "unreadable"}
    different = [key for key in ours | theirs if ours.get(key) != theirs.get(key) and key not in PLACES]
    if different:
        plain = [key for key in different if not key.endswith("sha256")] or different
        listed = "; ".join(f"{key} {theirs.get(key)!s:.80}, now {ours.get(key)!s:.80}" for key in plain[:3])
        raise UsageError(
            f"{place} has features of other settings or images ({listed}); {remedy}choose another --output_dir"
        )


def _digest(names: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        if "\n" in name or "\r" in name:
            raise UsageError(f"{name!r} has a line break, and {NAMES} has one name a line; rename the file")
        digest.update(os.fsencode(name) + b"\n")
    return digest.hexdigest()


def _read_meta(folder: Path) -> dict[str, Any]:
    try:
        meta = files.parse_json(files.read_text(folder / META))
    except ValueError as error:
        raise UsageError(f"{folder / META} is damaged ({error}); choose another --output_dir") from None
    if not isinstance(meta, dict):
        raise UsageError(f"{folder / META} is not that of features; choose another --output_dir")
    return meta


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with files.atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with path.open("wb") as file:
        file.writelines(os.fsencode(line) + b"\n" for line in lines)


def _read_lines(path: Path) -> PackedStrings:
    text = np.fromfile(path, dtype=np.uint8)
    ends = np.flatnonzero(text == ord("\n"))
    return PackedStrings.from_arrays(text[text != ord("\n")], ends - np.arange(len(ends)))


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write rows to a CSV file; names that are not UTF-8 keep their bytes."""
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
