"""Pre-training on a stream of WebDataset shards, local or remote, each read sequentially.

    --data_path 'shards/train-{000000..000146}.tar'      or a folder of tar files
    --data_path 'https://HOST/train-{000000..000146}.tar'
    --data_path 'pipe:aws s3 cp s3://BUCKET/train-{000000..000146}.tar -' --epoch_images 1281167

The number of images is counted for local shards. For remote ones it comes from `sizes.json` beside the shards, which
data/convert.py writes, or from --epoch_images, divided equally between the shards.

In each epoch the shards are shuffled, concatenated and divided into one contiguous part for each worker of each process, in whole
batches: an image occurs at most once, and all processes get the same number of batches. A worker shuffles its part in a buffer.
The order is a function of (seed, epoch, processes, workers, batch size). To resume inside an epoch, the stream is read from its
beginning to fill the buffer, and the skipped images are not decoded.

An image that cannot be read is reported, and replaced by another one from the buffer; the same holds for images missing from a
shard. A remote shard that fails is read again after `RETRY_DELAYS`, a local one once.

Origin: WebDataset; the exact division into parts is not part of it.
"""

from __future__ import annotations

import tarfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from typing import IO, NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from data.datasets import Candidate, Sample, SharedEpoch, Transform, format_error, load_sample
from data.layouts.remote import is_remote, open_stream
from data.layouts.sources import UNLABELED, checked_size, parse_label
from data.layouts.tars import (
    LINK,
    SIZES,
    BoundedHeader,
    count_images,
    find_shards,
    is_file,
    listed_sizes,
    sample_members,
    samples_of,
)
from data.workers import SignalSafeLoader
from utils import UsageError, counted, isolated_rng

NUM_RECENT = 16  # images kept after use, as replacements
RETRY_DELAYS = (1.0, 10.0)  # seconds before each further attempt to read a remote shard
MAX_TRIED_SHARDS = 8  # in search of one image that can be read


class Span(NamedTuple):
    """Consecutive images of a shard."""

    shard: int
    start: int
    images: int


class EncodedImage(NamedTuple):
    """An image as it is stored in its shard, or the reason why it cannot be read."""

    name: str
    image_index: int  # in the dataset
    content: bytes
    label: int
    error: str = ""


def plan_spans(
    counts: Sequence[int], batch_size: int, batches: Sequence[int], reader: int, order: np.ndarray
) -> list[Span]:
    """Return the part of an epoch that one reader (a worker of a process) reads.

    Args:
        counts: images of each shard.
        batch_size: images of a batch.
        batches: number of batches of each reader.
        reader: index of the reader.
        order: permutation of the shards.
    """
    begin = sum(batches[:reader]) * batch_size
    end = begin + batches[reader] * batch_size
    spans, position = [], 0
    for shard in order.tolist():
        first, last = max(begin - position, 0), min(end - position, counts[shard])
        if first < last:
            spans.append(Span(shard, first, last - first))
        position += counts[shard]
    return spans


class ShardStream(SharedEpoch, IterableDataset[Sample]):
    """The images of shards as a stream; set `batch_size`, `rank` and `world` once, and `epoch` before each pass.

    Args:
        shards: paths, URLs or `pipe:` commands.
        counts: images of each shard; further ones are not read.
        transform, in_chans, seed, value_range: as in `ImageDataset`.
        buffer: images in the shuffle buffer of a worker.
        length: images of an epoch; default: the sum of `counts`.
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
        """Number of batches at the start of the next pass that each process leaves out."""
        return int(self._skipped)

    @skipped_batches.setter
    def skipped_batches(self, batches: int) -> None:
        self._skipped.fill_(batches)

    def __len__(self) -> int:
        """Return the number of images of an epoch, over all processes."""
        return self.length

    @property
    def batches(self) -> int:
        """Number of batches of an epoch on each process."""
        return self.length // (self.batch_size * self.world)

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        skipped = self.skipped_batches
        worker = (worker + skipped) % workers  # batches come from the workers in turn; start with the next one's part
        reader = self.rank * workers + worker
        batches = [self.batches // workers + (i < self.batches % workers) for i in range(workers)]
        generator = np.random.default_rng([self.seed % 2**64, self.epoch])
        order = generator.permutation(len(self.shards))
        spans = plan_spans(self.counts, self.batch_size, batches * self.world, reader, order)
        generator = np.random.default_rng([self.seed % 2**64, self.epoch, reader])
        fallback = [Span(shard, 0, NUM_RECENT) for shard in order[:MAX_TRIED_SHARDS].tolist()]
        skipped_here = -(-(skipped - worker) // workers) if skipped > worker else 0
        yield from self._samples(self._read(spans), fallback, generator, skipped_here * self.batch_size)

    def _read(self, spans: Sequence[Span]) -> Iterator[EncodedImage]:
        for span in spans:
            shard = self.shards[span.shard]
            delays = RETRY_DELAYS if is_remote(shard) else (0.0,)
            yield from read_span(shard, span, int(self.starts[span.shard]), delays)

    def _samples(
        self, images: Iterator[EncodedImage], fallback: Sequence[Span], generator: np.random.Generator, skipped: int
    ) -> Iterator[Sample]:
        """Shuffle the images, and load all but the first `skipped`.

        The replacements at hand depend on what was read, not on what could be decoded, so skipping does not change them.
        """
        buffer: list[EncodedImage] = []  # up to twice its size, since images without content take no memory
        recent: deque[EncodedImage] = deque(maxlen=NUM_RECENT)
        readable = 0
        while True:
            while (
                readable < self.buffer and len(buffer) < 2 * self.buffer and (image := next(images, None)) is not None
            ):
                buffer.append(image)
                readable += not image.error
            if not buffer:
                return
            position = int(generator.integers(len(buffer)))
            buffer[position], buffer[-1] = buffer[-1], buffer[position]
            image = buffer.pop()
            readable -= not image.error
            if skipped:
                skipped -= 1
            else:
                yield self._load(image, replacements(buffer, recent, self._read(fallback)))
            recent.extend([] if image.error else [image])

    def _load(self, image: EncodedImage, others: Iterator[EncodedImage]) -> Sample:
        candidates = (Candidate(other.name, _reader_of(other), other.label) for other in chain([image], others))
        with isolated_rng(self.seed, self.epoch, image.image_index):
            return load_sample(image.image_index, candidates, self.transform, self.in_chans, self.value_range)


def _reader_of(image: EncodedImage) -> Callable[[], bytes]:
    def read() -> bytes:
        if image.error:
            raise ValueError(image.error)
        return image.content

    return read


def replacements(
    buffer: Sequence[EncodedImage], recent: Sequence[EncodedImage], fallback: Iterator[EncodedImage]
) -> Iterator[EncodedImage]:
    """Yield random images of the buffer and the recent ones, endlessly; if there are none, those of `fallback`."""
    others = [image for image in (*buffer, *recent) if not image.error]
    while others:
        yield others[int(np.random.randint(len(others)))]
    yield from (image for image in fallback if not image.error)


def read_span(shard: str, span: Span, first_index: int, delays: Sequence[float] = ()) -> Iterator[EncodedImage]:
    """Yield the images of a span; those that cannot be read, even after the delays, with their error.

    Args:
        first_index: index of the first image of the shard in the dataset.
        delays: seconds before each further attempt.
    """
    position, end = span.start, span.start + span.images
    reason = ""
    for delay in (0.0, *delays):
        time.sleep(delay)
        try:
            with open_stream(shard) as stream:
                for name, content, label in islice(samples_of(_contents(stream)), position, end):
                    error = LINK if content is None else ""
                    image = EncodedImage(f"{shard}@/{name}", first_index + position, content or b"", UNLABELED, error)
                    yield _with_label(image, label)
                    position += 1
            reason = f"the shard has fewer than {counted(end, 'image')}"
            break
        except tarfile.TarError as error:
            reason = f"it is not a complete tar file ({str(error).splitlines()[0].rstrip(':')})"
        except Exception as error:  # a lost connection or a command may raise anything
            reason = format_error(error)
        if position == end:
            return
    for missing in range(position, end):
        yield EncodedImage(f"{shard} image {missing + 1}", first_index + missing, b"", UNLABELED, reason)


def _contents(stream: IO[bytes]) -> Iterator[tuple[str, bytes | None]]:
    """Yield name and content of the images and labels of a tar file; None for links."""
    with tarfile.open(fileobj=stream, mode="r|*", tarinfo=BoundedHeader) as tar:
        for name, info in sample_members(tar):
            file = tar.extractfile(info) if is_file(info) else None
            yield name, file.read(checked_size(info.size)) if file else None


def _with_label(image: EncodedImage, label: bytes | None) -> EncodedImage:
    if label is None:
        return image
    try:
        return image._replace(label=parse_label(label.decode("ascii", "replace"), "NAME.cls"))
    except UsageError as error:
        return image._replace(error=str(error))


class ShardLoader(SignalSafeLoader):
    """A loader whose length is the number of batches of this process."""

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
    """Build the stream of the training images of shards.

    Args:
        data_path: a folder of tar files, a tar file or a pattern of them, local or remote.
        epoch_images: images of an epoch; 0: all.
        value_range: INPUT.RANGE of the config, see `decode_image`.

    Raises:
        UsageError: no shards, damaged or unreachable ones, or fewer images than `epoch_images`.
    """
    shards = find_shards(data_path, "train")
    if any(is_remote(shard) for shard in shards):
        check_reachable(shards)
        sizes = listed_sizes(shards)
    else:
        sizes = list(count_images(shards))
    counts = [size for size in sizes if size is not None]
    if len(counts) < len(shards):
        unknown = shards[sizes.index(None)]
        if epoch_images < len(shards):
            raise UsageError(
                f"no {SIZES} beside the {len(shards)} remote shards gives the number of images of {unknown}; "
                f"pass --epoch_images N (not {epoch_images}), the number of images in all shards"
            )
        counts, epoch_images = [epoch_images // len(shards)] * len(shards), 0
    if epoch_images > sum(counts) or not sum(counts):
        problem = f"fewer than --epoch_images {epoch_images}; lower it" if epoch_images else "none to train on"
        raise UsageError(
            f"{data_path} has {counted(sum(counts), 'image')} in {counted(len(shards), 'shard')}, {problem}"
        )
    return ShardStream(shards, counts, transform, in_chans, seed, buffer, epoch_images or None, value_range)


def check_reachable(shards: Sequence[str]) -> None:
    """Raise UsageError if no image can be read from any of a few shards, spread evenly over all."""
    count = min(MAX_TRIED_SHARDS, len(shards))
    reasons = []
    for i in range(count):
        shard = shards[i * len(shards) // count]
        image = next(read_span(shard, Span(0, 0, 1), 0))
        if not image.error:
            return
        reasons.append(f"{shard} ({image.error})")
    others = f", nor from {counted(count - 1, 'other shard')}" if count > 1 else ""
    raise UsageError(f"no image can be read from {reasons[0]}{others}; check --data_path")
