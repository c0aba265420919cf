"""Pre-training on WebDataset shards, read from their beginning to their end: from slow disks, or from elsewhere.

    --data_path 'shards/train-{000000..000146}.tar'      or a folder of tars
    --data_path 'https://HOST/train-{000000..000146}.tar'
    --data_path 'pipe:aws s3 cp s3://BUCKET/train-{000000..000146}.tar -' --epoch_images 1281167

How many images there are is counted on this disk, and told elsewhere: by `sizes.json` beside the shards, which data/convert.py
writes, or by --epoch_images, of which each shard then gives its equal share.

Each epoch lays the shards in a new order end to end and cuts them into one part for each process, and that into one for each of its
workers, in whole batches: every image comes at most once, and all processes get as many batches. A worker mixes what it reads
in a buffer. What comes when depends on (seed, epoch, processes, workers, batch size) alone.

A pass that begins later in its epoch reads the stream from its beginning, for what the buffer would hold, and decodes none:
it costs the reading of the images that are passed by, once. Another number of workers or processes reads in another order.

An image that cannot be read is named, and another one of the buffer takes its place; so are images that a shard lacks. A connection
that is lost is tried again (`PAUSES`), from the beginning of the shard; a shard on this disk is tried once more.

Origin: the method is WebDataset's; the exact cut is this project's own.
"""

from __future__ import annotations

import tarfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import IO, NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from data.datasets import REPLACEMENT_TRIES, Refusal, Sample, SharedEpoch, Transform, reason_of
from data.decode import UndeclaredRange, decode_image
from data.layouts.remote import PIPE, is_remote, open_stream
from data.layouts.sources import UNLABELED, checked_size, parse_label
from data.layouts.tars import (
    LINK,
    SIZES,
    BoundedHeader,
    count_images,
    find_shards,
    is_file,
    parse_sizes,
    parts_of,
    samples_of,
)
from data.workers import SteadyLoader
from utils import UsageError, counted, isolated_rng, logger

RECENT = 16  # images that are kept to stand in for others
PAUSES = (1.0, 10.0)  # seconds before each further try of a shard that lies elsewhere
TRIED_SHARDS = 8  # in search of a first image that can be read


class Span(NamedTuple):
    """Consecutive images of a shard."""

    shard: int
    start: int
    images: int


class Encoded(NamedTuple):
    """An image as its shard holds it."""

    name: str
    number: int  # among all images
    content: bytes
    label: int
    error: str = ""  # why there is no content


def plan_spans(
    counts: Sequence[int], batch_size: int, parts: Sequence[int], part: int, order: np.ndarray
) -> list[Span]:
    """What one reader reads in an epoch.

    Args:
        counts: images of each shard.
        batch_size: images of a batch.
        parts: batches of each reader.
        part: which reader.
        order: of the shards.
    """
    begin = sum(parts[:part]) * batch_size
    end = begin + parts[part] * batch_size
    spans, place = [], 0
    for shard in order.tolist():
        first, last = max(begin - place, 0), min(end - place, counts[shard])
        if first < last:
            spans.append(Span(shard, first, last - first))
        place += counts[shard]
    return spans


class ShardStream(SharedEpoch, IterableDataset[Sample]):
    """The images of shards, as a stream; set `epoch` before each pass and `batch_size`, `rank` and `world` before the first.

    Args:
        shards: paths, or URLs and pipes as the webdataset library opens them.
        counts: images of each; those beyond are not read.
        transform, in_chans, seed, value_range: as of `ImageDataset`.
        buffer: images that a worker mixes.
        length: images of an epoch, at most the sum of `counts`; as many by default.
    """

    def __init__(
        self,
        shards: Sequence[str],
        counts: Sequence[int],
        transform: Transform,
        in_chans: int = 3,
        seed: int = 0,
        buffer: int = 256,
        length: int | None = None,
        value_range: Sequence[float] = (),
    ) -> None:
        super().__init__()
        self.shards = tuple(shards)
        self.counts = tuple(counts)
        self.starts = np.cumsum([0, *counts])
        self.length = int(self.starts[-1]) if length is None else length
        self.transform = transform
        self.in_chans = in_chans
        self.seed = seed
        self.buffer = buffer
        self.value_range = tuple(value_range)
        self.batch_size, self.rank, self.world = 1, 0, 1
        self._skipped = torch.zeros((), dtype=torch.int64).share_memory_()  # see SharedEpoch

    @property
    def skipped_batches(self) -> int:
        """How many batches of the next pass, on each process, are left out."""
        return int(self._skipped)

    @skipped_batches.setter
    def skipped_batches(self, batches: int) -> None:
        self._skipped.fill_(batches)

    def __len__(self) -> int:
        """Images of an epoch, over all processes."""
        return self.length

    @property
    def batches(self) -> int:
        """Of an epoch, on each process."""
        return self.length // (self.batch_size * self.world)

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        skipped = self.skipped_batches
        worker = (worker + skipped) % workers  # batches come from the workers in turns: who would be next begins
        reader = self.rank * workers + worker
        each = [self.batches // workers + (i < self.batches % workers) for i in range(workers)]
        generator = np.random.default_rng([self.seed % 2**64, self.epoch])
        order = generator.permutation(len(self.shards))
        spans = plan_spans(self.counts, self.batch_size, each * self.world, reader, order)
        generator = np.random.default_rng([self.seed % 2**64, self.epoch, reader])
        elsewhere = [Span(shard, 0, RECENT) for shard in order[:TRIED_SHARDS].tolist()]
        of_this_worker = -(-(skipped - worker) // workers) if skipped > worker else 0
        yield from self._samples(self._read(spans), elsewhere, generator, of_this_worker * self.batch_size)

    def _read(self, spans: Sequence[Span]) -> Iterator[Encoded]:
        for span in spans:
            shard = self.shards[span.shard]
            yield from read_span(shard, span, int(self.starts[span.shard]), PAUSES if is_remote(shard) else (0.0,))

    def _samples(
        self, images: Iterator[Encoded], elsewhere: Sequence[Span], generator: np.random.Generator, skipped: int
    ) -> Iterator[Sample]:
        """Mix the images, decode them but for the first `skipped`, and let others stand in for those that cannot be read.

        Which others are at hand follows from what was read alone, never from what could be decoded: it is the same after a skip.
        """
        mixed: list[Encoded] = []  # as many without content, which take no memory, come on top of the buffer's
        recent: deque[Encoded] = deque(maxlen=RECENT)
        readable = 0
        while True:
            while readable < self.buffer and len(mixed) < 2 * self.buffer and (image := next(images, None)) is not None:
                mixed.append(image)
                readable += not image.error
            if not mixed:
                return
            place = int(generator.integers(len(mixed)))
            mixed[place], mixed[-1] = mixed[-1], mixed[place]
            wanted = mixed.pop()
            readable -= not wanted.error
            if skipped:
                skipped -= 1
            else:
                yield self._view(wanted, stand_ins(mixed, recent, self._read(elsewhere)))
            recent.extend([] if wanted.error else [wanted])

    def _view(self, wanted: Encoded, others: Iterator[Encoded]) -> Sample:
        """The views of the wanted image, or of one of the others."""
        failures: list[str] = []
        with isolated_rng(self.seed, self.epoch, wanted.number):
            for chosen in islice(chain([wanted], others), REPLACEMENT_TRIES):
                try:
                    if chosen.error:
                        raise ValueError(chosen.error)
                    image = decode_image(chosen.content, self.in_chans, self.value_range)
                except UndeclaredRange as error:
                    return Sample([], UNLABELED, wanted.number, (*failures, Refusal(f"{chosen.name} {error}")))
                except Exception as error:  # see ImageDataset
                    failures.append(f"{chosen.name}: {reason_of(error)}")
                    continue
                return Sample(self.transform(image), chosen.label, wanted.number, tuple(failures))
        return Sample([], UNLABELED, wanted.number, tuple(failures))


def stand_ins(mixed: Sequence[Encoded], recent: Sequence[Encoded], elsewhere: Iterator[Encoded]) -> Iterator[Encoded]:
    """Images that may be readable: drawn with numpy's generator, of those at hand, or the first of all shards if there are none."""
    others = [image for image in (*mixed, *recent) if not image.error]
    while others:
        yield others[int(np.random.randint(len(others)))]
    yield from (image for image in elsewhere if not image.error)


def read_span(shard: str, span: Span, first_index: int, pauses: Sequence[float] = ()) -> Iterator[Encoded]:
    """As many images as the span says; those that the shard does not give, not even after the pauses, carry an error."""
    place, end = span.start, span.start + span.images
    reason = ""
    for pause in (0.0, *pauses):
        time.sleep(pause)
        try:
            with open_stream(shard) as stream:
                for name, content, label in islice(samples_of(_contents(stream)), place, end):
                    error = LINK if content is None else ""
                    image = Encoded(f"{shard}@/{name}", first_index + place, content or b"", UNLABELED, error)
                    yield _labeled(image, label)
                    place += 1
            reason = f"the shard has fewer than {counted(end, 'image')}"
            break
        except Exception as error:  # whatever a damaged tar or a lost connection makes the libraries raise
            reason = _why(error)
        if place == end:
            return
    for missing in range(place, end):
        yield Encoded(f"{shard} image {missing + 1}", first_index + missing, b"", UNLABELED, reason)


def _contents(stream: IO[bytes]) -> Iterator[tuple[str, bytes | None]]:
    """Name and content of the images and labels of a tar; no content of links."""
    with tarfile.open(fileobj=stream, mode="r|*", tarinfo=BoundedHeader) as tar:
        for name, info in parts_of(tar):
            file = tar.extractfile(info) if is_file(info) else None
            yield name, file.read(checked_size(info.size)) if file else None


def _why(error: Exception) -> str:
    if isinstance(error, tarfile.TarError):
        return f"it is no whole tar file ({str(error).splitlines()[0].rstrip(':')})"
    return reason_of(error)


def _labeled(image: Encoded, label: bytes | None) -> Encoded:
    if label is None:
        return image
    try:
        return image._replace(label=parse_label(label.decode("ascii", "replace"), "its label"))
    except UsageError as error:
        return image._replace(error=str(error))


class ShardLoader(SteadyLoader):
    """A loader whose length is that of this process's share, not of all shards."""

    def __len__(self) -> int:
        assert isinstance(self.dataset, ShardStream)
        return self.dataset.batches


def build_stream(
    data_path: str,
    transform: Transform,
    in_chans: int = 3,
    seed: int = 0,
    buffer: int = 256,
    epoch_images: int = 0,
    value_range: Sequence[float] = (),
) -> ShardStream:
    """The training images of shards.

    Args:
        data_path: a folder of tars, a tar, or a pattern of them; here or elsewhere.
        epoch_images: images of an epoch; 0: all.
        value_range: INPUT.RANGE of the config, see `decode_image`.

    Raises:
        UsageError: no shards, damaged or unreachable ones, or a number of images that they do not hold.
    """
    shards = find_shards(data_path, "train")
    remote = any(is_remote(shard) for shard in shards)
    if remote:
        check_reachable(shards)
    told = _told_counts(shards) if remote else list(zip(shards, count_images(shards)))
    counts = [count for _, count in told if count is not None]
    if len(counts) < len(shards):
        unknown = next(shard for shard, count in told if count is None)
        if epoch_images < len(shards):
            raise UsageError(
                f"pass --epoch_images N (not {epoch_images}) to say how many images the {len(shards)} shards hold: "
                f"they lie elsewhere, and no {SIZES} beside them tells it of {unknown}"
            )
        counts, epoch_images = [epoch_images // len(shards)] * len(shards), 0
    if epoch_images > sum(counts) or not sum(counts):
        asked = f"fewer than --epoch_images {epoch_images}; lower it" if epoch_images else "none to train on"
        raise UsageError(
            f"{data_path} holds {counted(sum(counts), 'image')} in {counted(len(shards), 'shard')}, {asked}"
        )
    return ShardStream(shards, counts, transform, in_chans, seed, buffer, epoch_images or None, value_range)


def _told_counts(shards: Sequence[str]) -> list[tuple[str, int | None]]:
    """Each shard with the number of its images, where `sizes.json` beside it says one."""
    sizes: dict[str, dict[str, int]] = {}
    told = []
    for shard in shards:
        folder, _, name = shard.rpartition("/")
        if folder not in sizes:
            sizes[folder] = {} if folder.startswith(PIPE) else _fetch_sizes(f"{folder}/{SIZES}")
        told.append((shard, sizes[folder].get(name)))
    return told


def _fetch_sizes(address: str) -> dict[str, int]:
    try:
        with open_stream(address) as stream:
            content = stream.read()
    except Exception:  # of any kind: it need not be there
        return {}
    try:
        return parse_sizes(content)
    except ValueError as error:
        logger.warning("%s is not used: %s", address, error)
        return {}


def check_reachable(shards: Sequence[str]) -> None:
    """Stop before a run in which nothing can be read; some shards, spread over all, are tried until one can.

    Raises:
        UsageError: none can.
    """
    count = min(TRIED_SHARDS, len(shards))
    reasons = []
    for i in range(count):
        shard = shards[i * len(shards) // count]
        image = next(read_span(shard, Span(0, 0, 1), 0))
        if not image.error:
            return
        reasons.append(f"{shard} ({image.error})")
    others = f", nor from {counted(count - 1, 'other shard')}" if count > 1 else ""
    raise UsageError(f"no image can be read from {reasons[0]}{others}; check --data_path")
