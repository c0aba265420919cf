"""Loaders: collating, the share of each process, epochs, workers, and the count of unreadable files."""

from __future__ import annotations

import random
import signal
import subprocess
import tarfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import write_images
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

from data.datasets import ImageDataset, Sample, build_dataset
from data.decode import ImageLike
from data.layouts.shards import build_stream
from data.layouts.sources import UNLABELED
from data.loader import Batch, FailureTally, StridedSampler, build_eval_loader, build_train_loader, collate, set_epoch
from data.transforms.crops import split_views
from data.transforms.photometric import DRAWS, Photometric
from data.transforms.recipe import Crops, dino_recipe
from data.workers import usable_workers
from utils import UsageError

IMAGES = 11
CPU = torch.device("cpu")


def value_and_noise(image: ImageLike) -> list[Tensor]:
    """Return two views: the gray value of the image, and numbers from each generator."""
    assert isinstance(image, Image.Image)
    gray = float(np.asarray(image).mean())
    return [
        torch.full((1, 2, 2), gray),
        torch.tensor([random.random(), float(np.random.rand()), float(torch.rand(()))]),
    ]


@pytest.fixture
def dataset(tmp_path: Path) -> ImageDataset:
    """Image i is filled with i and has class i."""
    for i in range(IMAGES):
        (tmp_path / f"{i:02}").mkdir()
        Image.fromarray(np.full((4, 4), i, dtype=np.uint8)).save(tmp_path / f"{i:02}" / "image.png")
    return build_dataset(tmp_path, "train", value_and_noise)


def set_world(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    monkeypatch.setattr("data.loader.get_rank", lambda: rank)
    monkeypatch.setattr("data.loader.get_world_size", lambda: world)


def one_epoch(dataset: ImageDataset, epoch: int, batch_size: int = 4, num_workers: int = 0) -> list[Batch]:
    loader = build_train_loader(dataset, batch_size, num_workers, pin_memory=False)
    set_epoch(loader, epoch)
    batches = list(loader)
    assert len(batches) == len(loader)
    return batches


def indices(batches: list[Batch]) -> list[int]:
    return [int(index) for batch in batches for index in batch.indices_B]


def equal(first: list[Batch], second: list[Batch]) -> bool:
    """Return whether two passes gave the same images in the same order with the same views."""
    return indices(first) == indices(second) and all(
        torch.equal(a, b) for one, other in zip(first, second) for a, b in zip(one.views, other.views)
    )


# --------------------------------------------------------------------------- collate


def sample(index: int, views: int = 2, failures: tuple[str, ...] = ()) -> Sample:
    return Sample([torch.full((3, 4 - v, 4 - v), 10.0 * index + v) for v in range(views)], index + 100, index, failures)


def test_collate_stacks_view_by_view() -> None:
    batch = collate(
        [sample(2), sample(0, failures=("a.png: gone", "b.png: empty")), sample(1, failures=("a.png: gone",))]
    )
    assert [view.shape for view in batch.views] == [(3, 3, 4, 4), (3, 3, 3, 3)]
    assert batch.views[0][:, 0, 0, 0].tolist() == [20, 0, 10]
    assert batch.views[1][:, 0, 0, 0].tolist() == [21, 1, 11]
    assert batch.labels_B.tolist() == [102, 100, 101]
    assert batch.indices_B.tolist() == [2, 0, 1]
    assert batch.failures == ["a.png: gone", "b.png: empty", "a.png: gone"]


def test_collate_with_an_incomplete_sample() -> None:
    unread = Sample([], UNLABELED, 7, ("a.png: gone",))
    batch = collate([sample(0), unread])
    assert batch.views == []
    assert batch.labels_B.tolist() == [100, UNLABELED]
    assert batch.indices_B.tolist() == [0, 7]
    assert batch.failures == ["a.png: gone"]


# --------------------------------------------------------------------------- batches that are finished later


def split_samples(count: int = 4) -> tuple[list[Sample], Photometric]:
    crops, device_transform = split_views(
        dino_recipe(Crops(16, (0.4, 1.0), (2,), (8,), (0.05, 0.4)), 0.4), (0.5,) * 3, (0.25,) * 3
    )
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    return [Sample(crops(image), i, i, ()) for i in range(count)], device_transform


def test_device_transform_runs_where_the_batch_is_used() -> None:
    samples, device_transform = split_samples()
    later = collate(samples, device_transform)
    assert [(view.dtype, view.shape) for view in later.views[:-1]] == [
        (torch.uint8, (4, 3, size, size)) for size in (16, 16, 8, 8)
    ]
    assert later.views[-1].shape == (4, 4, DRAWS)
    here = collate(samples, device_transform, apply_now=True)
    assert here.device_transform is None
    assert [view.shape for view in here.views] == [(4, 3, size, size) for size in (16, 16, 8, 8)]
    assert all(torch.equal(a, b) for a, b in zip(here.views, later.views_on(CPU), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(here.views, here.views_on(CPU), strict=True))


def test_device_transform_with_an_incomplete_sample() -> None:
    samples, device_transform = split_samples()
    for here in (False, True):
        batch = collate([*samples, Sample([], UNLABELED, 7, ("a.png: gone",))], device_transform, here)
        assert batch.views == []
        assert batch.views_on(CPU) == []


def test_pinning_keeps_the_device_transform(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the pin-memory thread does for CUDA; a copy stands in for pinned memory."""
    samples, device_transform = split_samples()
    batch = collate(samples, device_transform)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self, device=None: self.clone())
    pinned = pin_memory(batch)
    assert isinstance(pinned, Batch)
    assert pinned.views[0].data_ptr() != batch.views[0].data_ptr()
    assert all(torch.equal(a, b) for a, b in zip(pinned.views_on(CPU), batch.views_on(CPU), strict=True))


@pytest.fixture
def split_dataset(tmp_path: Path) -> tuple[ImageDataset, Photometric]:
    crops, device_transform = split_views(
        dino_recipe(Crops(16, (0.4, 1.0), (1,), (8,), (0.05, 0.4)), 0.4), (0.5,) * 3, (0.25,) * 3
    )
    return build_dataset(write_images(tmp_path, IMAGES), "train", crops), device_transform


def split_epoch(split_dataset: tuple[ImageDataset, Photometric], epoch: int, workers: int, later: bool) -> list[Batch]:
    dataset, device_transform = split_dataset
    loader = build_train_loader(dataset, 4, workers, pin_memory=False, device_transform=device_transform)
    if later:
        loader = DataLoader(
            dataset,  # type: ignore[arg-type]  # as in build_train_loader
            batch_size=4,
            sampler=loader.sampler,
            num_workers=workers,
            drop_last=True,
            collate_fn=partial(collate, device_transform=device_transform),
        )
    set_epoch(loader, epoch)
    return [batch._replace(views=batch.views_on(CPU), device_transform=None) for batch in loader]


def test_device_transform_gives_the_same_views_everywhere(split_dataset: tuple[ImageDataset, Photometric]) -> None:
    """In workers or in the training process, bit for bit."""
    passes = [split_epoch(split_dataset, 2, workers, later) for workers in (0, 2) for later in (False, True)]
    assert all(equal(passes[0], other) for other in passes[1:])
    assert not equal(passes[0], split_epoch(split_dataset, 1, 0, False))


def test_processes_draw_different_crops(
    split_dataset: tuple[ImageDataset, Photometric], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of different images, each as on one process."""
    everything = split_epoch(split_dataset, 1, 0, False)
    of_image = {int(i): [view[row] for view in b.views] for b in everything for row, i in enumerate(b.indices_B)}
    shares = []
    for rank in range(2):
        set_world(monkeypatch, rank, 2)
        shares.append(split_epoch(split_dataset, 1, 0, False))
    assert not set(indices(shares[0])) & set(indices(shares[1]))
    assert not torch.equal(shares[0][0].views[0], shares[1][0].views[0])
    compared = 0
    for batch in (batch for share in shares for batch in share):
        for row, i in enumerate(batch.indices_B.tolist()):
            if i in of_image:
                compared += 1
                assert all(torch.equal(view[row], alone) for view, alone in zip(batch.views, of_image[i], strict=True))
    assert compared >= 5


# --------------------------------------------------------------------------- training


def test_train_loader_drops_the_last_batch(dataset: ImageDataset) -> None:
    batches = one_epoch(dataset, 0)
    assert [len(batch.indices_B) for batch in batches] == [4, 4]
    assert len(set(indices(batches))) == 8


@pytest.mark.parametrize("world", [1, 2])
def test_every_image_of_an_epoch_without_drop_last(
    dataset: ImageDataset, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    """On two processes with equal batches, also with less than one batch of images."""
    monkeypatch.setattr("data.loader.get_world_size", lambda: world)
    for batch_size in (4, 1000):
        sizes, seen = [], []
        for rank in range(world):
            monkeypatch.setattr("data.loader.get_rank", lambda rank=rank: rank)
            loader = build_train_loader(dataset, batch_size, 0, pin_memory=False, drop_last=False)
            batches = [batch.indices_B.tolist() for batch in loader]
            sizes.append([len(batch) for batch in batches])
            seen += [index for batch in batches for index in batch]
        assert sizes[0] == sizes[-1]
        assert set(seen) == set(range(len(dataset)))
        assert len(seen) - len(dataset) == -len(dataset) % world


def test_batches_match_their_indices(dataset: ImageDataset) -> None:
    for batch in one_epoch(dataset, 0, batch_size=IMAGES):
        assert sorted(batch.indices_B.tolist()) == list(range(IMAGES))
        assert torch.equal(batch.labels_B, batch.indices_B)
        assert torch.equal(batch.views[0][:, 0, 0, 0], batch.indices_B.float())


def test_epochs_differ_and_repeat(dataset: ImageDataset) -> None:
    first = one_epoch(dataset, 0)
    second = one_epoch(dataset, 1)
    assert indices(first) != indices(second)
    noise = [{int(i): view for b in epoch for i, view in zip(b.indices_B, b.views[1])} for epoch in (first, second)]
    assert all(not torch.equal(noise[0][i], noise[1][i]) for i in noise[0].keys() & noise[1].keys())
    assert equal(first, one_epoch(dataset, 0))
    assert equal(second, one_epoch(dataset, 1))


def test_seeds_differ(dataset: ImageDataset) -> None:
    first = one_epoch(dataset, 0)
    dataset.seed = 1
    assert indices(first) != indices(one_epoch(dataset, 0))


@pytest.mark.parametrize("epoch", [0, 3])
def test_batches_are_independent_of_workers(dataset: ImageDataset, epoch: int) -> None:
    assert equal(one_epoch(dataset, epoch, num_workers=0), one_epoch(dataset, epoch, num_workers=2))


def test_one_loader_over_several_epochs_with_workers(dataset: ImageDataset) -> None:
    loader = build_train_loader(dataset, 4, num_workers=1, pin_memory=False)
    passes = []
    for epoch in (0, 1):
        set_epoch(loader, epoch)
        passes.append(list(loader))
    for epoch in (0, 1):
        assert equal(passes[epoch], one_epoch(dataset, epoch))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pass_draws_no_global_random_number(dataset: ImageDataset, workers: int) -> None:
    """So that a resumed run, which starts workers again, equals an uninterrupted one."""
    loader = build_train_loader(dataset, 4, workers, pin_memory=False)
    before = torch.get_rng_state()
    for epoch in (0, 1):
        set_epoch(loader, epoch)
        list(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_persistent_workers_after_an_abandoned_pass(dataset: ImageDataset) -> None:
    loader = build_train_loader(dataset, 2, 1, pin_memory=False)
    assert loader.persistent_workers
    for epoch in (0, 3):
        set_epoch(loader, epoch)
        next(iter(loader))
    set_epoch(loader, 1)
    assert equal(list(loader), one_epoch(dataset, 1, batch_size=2))


def test_batches_are_independent_of_global_generators(dataset: ImageDataset) -> None:
    first = one_epoch(dataset, 0)
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    assert equal(first, one_epoch(dataset, 0))


def test_processes_share_an_epoch(dataset: ImageDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []
    for rank in range(3):
        set_world(monkeypatch, rank, 3)
        shares.append(indices(one_epoch(dataset, 5, batch_size=1)))
    assert [len(share) for share in shares] == [3, 3, 3]
    assert len({index for share in shares for index in share}) == 9


@pytest.mark.parametrize(("batch_size", "world"), [(12, 1), (6, 2), (4, 3)])
def test_batch_larger_than_the_data(
    dataset: ImageDataset, monkeypatch: pytest.MonkeyPatch, batch_size: int, world: int
) -> None:
    set_world(monkeypatch, 0, world)
    with pytest.raises(UsageError, match=f"--batch_size_per_gpu {batch_size} on {world} process.* 11 images"):
        build_train_loader(dataset, batch_size, 0, pin_memory=False)


def test_batch_of_the_whole_dataset(dataset: ImageDataset) -> None:
    assert len(build_train_loader(dataset, IMAGES, 0, pin_memory=False)) == 1


def test_workers_are_limited_to_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 5}, raising=False)
    assert [usable_workers(wanted) for wanted in (0, 2, 3, 10)] == [0, 2, 3, 3]


# --------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("length", [0, 1, 2, 3, 10, 11, 12])
def test_strided_sampler_covers_each_index_once(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    shares = []
    for rank in range(3):
        set_world(monkeypatch, rank, 3)
        sampler = StridedSampler(length)
        shares.append(list(sampler))
        assert len(sampler) == len(shares[-1])
        assert all(index % 3 == rank for index in shares[-1])
    assert sorted(index for share in shares for index in share) == list(range(length))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_eval_loader_is_in_order_and_complete(dataset: ImageDataset) -> None:
    batches = list(build_eval_loader(dataset, 4, num_workers=0, pin_memory=False))
    assert [len(batch.indices_B) for batch in batches] == [4, 4, 3]
    assert indices(batches) == list(range(IMAGES))


# --------------------------------------------------------------------------- unreadable files


def failures_of(*numbers: int) -> list[str]:
    return [f"{number}.png: the file is empty" for number in numbers]


def test_tally_counts_each_path_once(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr("utils.logger.warning", lambda message, *values: warnings.append(message % values))
    tally = FailureTally(images=200)
    for _ in range(5):
        tally.exchange(failures_of(1, 2, 1), CPU)
        tally.exchange([], CPU)
    assert tally.seen == {"1.png": "the file is empty", "2.png": "the file is empty"}
    assert len(warnings) == 2
    assert "1.png (the file is empty)" in warnings[0]
    assert "2.png (the file is empty)" in warnings[1]


@pytest.mark.parametrize("percents", [1, 2, 3, 7, 29, 57])
def test_tally_stops_above_one_percent_not_at_it(percents: int) -> None:
    tally = FailureTally(images=100 * percents)
    tally.exchange(failures_of(*range(percents)), CPU)
    with pytest.raises(UsageError, match=f"{percents + 1} of {100 * percents} images cannot be read, more than 1 %"):
        tally.exchange(failures_of(percents), CPU)


def test_tally_stops_at_the_first_failure_of_a_small_set() -> None:
    with pytest.raises(UsageError, match=r"1 of 99 images cannot be read.*0\.png \(the file is empty\)"):
        FailureTally(images=99).exchange(failures_of(0), CPU)


def test_tally_lists_what_failed() -> None:
    with pytest.raises(UsageError) as caught:
        FailureTally(images=100).exchange(failures_of(3, 5), CPU)
    assert str(caught.value).endswith("3.png (the file is empty); 5.png (the file is empty)")
    with pytest.raises(UsageError, match=r"9\.png \(the file is empty\); and 3 more$") as caught:
        FailureTally(images=100).exchange(failures_of(*range(13)), CPU)
    assert "10.png" not in str(caught.value)


def test_tally_knows_files_apart_whose_folder_has_a_colon(tmp_path: Path) -> None:
    folder = tmp_path / "holiday: beach"
    folder.mkdir()
    for name in ("1.png", "2.png"):
        (folder / name).touch()
    unreadable = build_dataset(tmp_path, "train", value_and_noise)
    with pytest.raises(UsageError, match=r"2 of 150 images.*1\.png.*2\.png"):
        FailureTally(images=150).exchange(collate([unreadable[0], unreadable[1]]).failures, CPU)


def test_tally_counts_those_of_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each failure is logged once; the count restarts with each pass."""
    warnings: list[str] = []
    monkeypatch.setattr("utils.logger.warning", lambda message, *values: warnings.append(message % values))
    tally = FailureTally(images=100, seen={"0.png": "gone"})
    for epoch in range(1, 5):
        tally.start_pass()
        tally.exchange(failures_of(epoch % 3), CPU)
        assert tally.seen == {f"{epoch % 3}.png": "the file is empty"}
    assert len(warnings) == 2  # that of 0.png came in the run's earlier part


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), ValueError("the first bytes were lost")])
def test_second_attempt_after_a_transient_error(
    dataset: ImageDataset, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    read, failed = dataset.source.read, set()

    def fail_once(index: int) -> bytes:
        if index not in failed:
            failed.add(index)
            raise error
        return read(index)

    monkeypatch.setattr(dataset.source, "read", fail_once)
    for batch in build_eval_loader(dataset, 4, 0, pin_memory=False):
        assert batch.failures == []
        assert torch.equal(batch.views[0][:, 0, 0, 0], batch.indices_B.float())
    assert failed == set(range(IMAGES))


@pytest.mark.parametrize("layout", ["files", "shards"])
@pytest.mark.parametrize("workers", [0, 1])
def test_undeclared_range_ends_the_run(tmp_path: Path, workers: int, layout: str) -> None:
    """It is not replaced, whatever the share of such images."""
    for number in range(4):
        np.save(tmp_path / f"{number}.npy", np.full((4, 4), 100 + number, dtype=np.int64))
    loader: DataLoader[Batch]
    if layout == "shards":
        with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
            for number in range(4):
                tar.add(tmp_path / f"{number}.npy", f"{number}.npy")
        loader = build_train_loader(build_stream(str(tmp_path), value_and_noise), 2, workers, pin_memory=False)
    else:
        loader = build_eval_loader(build_dataset(tmp_path, "train", value_and_noise), 2, workers, pin_memory=False)
    batch = next(iter(loader))
    assert batch.views == []
    with pytest.raises(UsageError, match=r"^[^ ]*\d\.npy has int64 values from 10\d to 10\d.*INPUT\.RANGE"):
        FailureTally(10**6).exchange(batch.failures, CPU, not batch.views)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_workers_ignore_signals_to_the_process_group(
    dataset: ImageDataset, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All batches arrive even if each worker gets the signal at its start; a SIGTERM of the main process ends them."""
    monkeypatch.setattr(torch, "set_num_threads", lambda _: time.sleep(0.5))  # the first thing that a worker does
    train = build_train_loader(dataset, 1, 2, pin_memory=False)
    set_epoch(train, 0)
    for loader in (build_eval_loader(dataset, 1, 2, pin_memory=False), train):
        batches = iter(loader)
        workers = batches._workers  # type: ignore[attr-defined]
        subprocess.run(["kill", f"-{number.value}", *(str(worker.pid) for worker in workers)], check=True)
        assert sorted(int(batch.indices_B) for batch in batches) == list(range(IMAGES))
    assert all(worker.is_alive() for worker in workers)
    for worker in workers:
        worker.terminate()
        worker.join(timeout=10)
    assert not any(worker.is_alive() for worker in workers)
