"""Streams of shards: each image at most once an epoch, failures, and the same images as in folders."""

from __future__ import annotations

import gzip
import json
import shutil
import tarfile
import tracemalloc
from collections import Counter
from pathlib import Path

import braceexpand
import numpy as np
import pytest
import torch
from helpers.image_files import whole
from helpers.runs import TINY_RUN, TINY_SWIN
from helpers.shard_files import COUNTS, IMAGES, gray, indices, loader_of, one_epoch, write_tar
from PIL import Image

import main_esvit
from checkpoints import serialization
from data import convert
from data.datasets import build_dataset
from data.layouts import tars
from data.layouts.remote import is_remote
from data.layouts.shards import Span, build_stream, plan_spans, read_span
from data.layouts.tars import contains_shards, count_expansions, count_images, find_shards, is_image, split_name
from data.loader import Batch, build_train_loader, set_epoch
from utils import UsageError


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Write shards with images 0, 1, ..., filled with their number; the label is the number modulo 3."""
    number = 0
    for shard, count in enumerate(COUNTS):
        members = []
        for _ in range(count):
            members += [(f"k{number:03}.png", gray(number, 32)), (f"k{number:03}.cls", str(number % 3).encode())]
            number += 1
        write_tar(tmp_path / "shards" / f"train-{shard:03}.tar", members)
    return tmp_path / "shards"


def set_world(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    monkeypatch.setattr("data.loader.get_rank", lambda: rank)
    monkeypatch.setattr("data.loader.get_world_size", lambda: world)


# --------------------------------------------------------------------------- the cut


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_readers_share_the_images_without_overlap(world: int, workers: int, batch_size: int) -> None:
    order = np.array([3, 0, 4, 1, 2])
    batches = IMAGES // (world * batch_size)
    parts = [batches // workers + (i < batches % workers) for i in range(workers)] * world
    taken: Counter[tuple[int, int]] = Counter()
    for part, wanted in enumerate(parts):
        spans = plan_spans(COUNTS, batch_size, parts, part, order)
        assert sum(span.images for span in spans) == wanted * batch_size
        for span in spans:
            taken.update((span.shard, place) for place in range(span.start, span.start + span.images))
    assert max(taken.values()) == 1
    assert len(taken) == batches * world * batch_size
    assert all(place < COUNTS[shard] for shard, place in taken)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_every_image_at_most_once_an_epoch(
    shards: Path, monkeypatch: pytest.MonkeyPatch, world: int, workers: int
) -> None:
    """Over all processes and workers, with equally many batches on each."""
    for epoch in (0, 1):
        seen: list[int] = []
        for rank in range(world):
            set_world(monkeypatch, rank, world)
            batches = one_epoch(loader_of(build_stream(str(shards), whole, buffer=4), workers=workers), epoch)
            assert len(batches) == IMAGES // (2 * world)
            for batch in batches:
                assert torch.equal((batch.views[0][:, 0, 0, 0] * 255).round().long(), batch.indices_B)
                assert torch.equal(batch.labels_B, batch.indices_B % 3)
                assert batch.failures == []
            seen += indices(batches)
        assert len(set(seen)) == len(seen) == IMAGES // (2 * world) * 2 * world


def test_epochs_differ_and_repeat(shards: Path) -> None:
    """With persistent workers and with a new loader; seeds differ too."""
    staying = loader_of(build_stream(str(shards), whole, buffer=4), workers=1)
    passes = [indices(one_epoch(staying, epoch)) for epoch in (0, 1)]
    assert passes[0] != passes[1]
    for epoch in (1, 0):
        fresh = loader_of(build_stream(str(shards), whole, buffer=4), workers=1)
        assert indices(one_epoch(fresh, epoch)) == passes[epoch]
    other = loader_of(build_stream(str(shards), whole, buffer=4, seed=1), workers=1)
    assert indices(one_epoch(other, 0)) != passes[0]
    assert passes[0] != sorted(passes[0])


def test_views_are_independent_of_workers(shards: Path) -> None:
    """The randomness of an image is that of (seed, epoch, index)."""

    def noise(image: object) -> list[torch.Tensor]:
        return [torch.rand(2)]

    found = []
    for workers in (0, 2):
        batches = one_epoch(loader_of(build_stream(str(shards), noise, buffer=3), workers=workers), 2)
        found.append({int(i): v.tolist() for batch in batches for i, v in zip(batch.indices_B, batch.views[0])})
    common = found[0].keys() & found[1].keys()
    assert len(common) >= IMAGES - 2
    assert all(found[0][i] == found[1][i] for i in common)


def test_epoch_length(shards: Path) -> None:
    stream = build_stream(str(shards), whole, epoch_images=9)
    assert len(stream) == 9
    seen = [index for epoch in range(6) for index in indices(one_epoch(loader_of(stream), epoch))]
    assert len(seen) == 6 * 8
    assert len(set(seen)) > 15
    with pytest.raises(UsageError, match="has 23 images in 5 shards, fewer than --epoch_images 24"):
        build_stream(str(shards), whole, epoch_images=24)
    with pytest.raises(UsageError, match=r"--batch_size_per_gpu 24 .*23 images"):
        loader_of(build_stream(str(shards), whole), batch_size=24)


def test_pipes(shards: Path) -> None:
    """Without sizes.json each shard gives its share of --epoch_images, and missing images are reported."""
    pattern = f"pipe:cat {shards}/train-00{{0..4}}.tar"
    with pytest.raises(UsageError, match=r"no sizes\.json .* 5 remote shards .*--epoch_images N \(not 0\)"):
        build_stream(pattern, whole)
    stream = build_stream(pattern, whole, epoch_images=12)
    assert len(stream) == 10
    batches = one_epoch(loader_of(stream), 0)
    assert len(indices(batches)) == 10
    failures = {failure for batch in batches for failure in batch.failures}
    assert failures == {f"pipe:cat {shards}/train-001.tar image 2: the shard has fewer than 2 images"}
    assert all(batch.views for batch in batches)


# --------------------------------------------------------------------------- which shards


def test_patterns_and_folders(shards: Path, tmp_path: Path) -> None:
    names = [str(shards / f"train-{i:03}.tar") for i in range(5)]
    assert find_shards(f"{shards}/train-{{000..004}}.tar", "train") == names
    assert find_shards(str(shards), "train") == names
    assert find_shards(names[2], "train") == [names[2]]
    with pytest.raises(UsageError, match=r"names 6 shards, 1 of them missing, first .*train-005\.tar"):
        find_shards(f"{shards}/train-{{000..005}}.tar", "train")
    with pytest.raises(UsageError, match=r"train-\{0\.\.4\.tar is not a valid pattern \(Unbalanced braces"):
        find_shards(f"{shards}/train-{{0..4.tar", "train")
    with pytest.raises(UsageError, match=r"has no tar files of 'val'; name them val-000000\.tar"):
        find_shards(str(shards), "val")
    shutil.copy(names[0], shards / "val-000.tar")
    assert find_shards(str(shards), "val") == [str(shards / "val-000.tar")]
    assert find_shards(str(shards), "train") == names
    shards.rename(tmp_path / "train")
    assert len(find_shards(str(tmp_path), "train")) == 6
    assert contains_shards(str(tmp_path))
    assert contains_shards("https://host/a-{0..3}.tar")
    assert not contains_shards(str(tmp_path / "nowhere"))


def test_file_names_are_never_run_by_a_shell(tmp_path: Path) -> None:
    """A file in a folder may be named like a pipe."""
    folder = tmp_path / "pipe:touch pwned"
    write_tar(folder / "train-0.tar", [("a.png", gray(1))])
    assert not is_remote(str(folder))
    assert [b.failures for b in one_epoch(loader_of(build_stream(str(folder), whole), 1), 0)] == [[]]


def test_split_name() -> None:
    assert split_name("a/b.c.JPG") == ("a/b", "c.jpg")
    assert split_name("x.png") == ("x", "png")
    assert [is_image(suffix) for suffix in ("png", "seg.png", "cls", "json", "", "npy")] == [
        True,
        True,
        False,
        False,
        False,
        True,
    ]


def test_sizes_json(shards: Path) -> None:
    names = find_shards(str(shards), "train")
    assert count_images(names) == list(COUNTS)
    (shards / "sizes.json").write_text(json.dumps({"train-000.tar": 3}))
    assert count_images(names) == [3, *COUNTS[1:]]
    for wrong in ("{", "[]", '{"train-000.tar": -1}', '{"train-000.tar": "5"}'):
        (shards / "sizes.json").write_text(wrong)
        with pytest.raises(UsageError, match=r"sizes\.json .*move it away"):
            count_images(names)


# --------------------------------------------------------------------------- damage


def failures_of(shards: Path, counts: tuple[int, ...] = COUNTS, buffer: int = 4) -> tuple[set[str], list[Batch]]:
    """Return the failures of an epoch with the sizes from before the damage."""
    (shards / "sizes.json").write_text(json.dumps({f"train-{i:03}.tar": n for i, n in enumerate(counts)}))
    batches = one_epoch(loader_of(build_stream(str(shards), whole, buffer=buffer), 1), 0)
    assert len(batches) == IMAGES
    assert sorted(indices(batches)) == list(range(IMAGES))
    assert all(batch.views for batch in batches)
    return {failure for batch in batches for failure in batch.failures}, batches


def test_unreadable_image_is_replaced_and_reported(shards: Path) -> None:
    write_tar(shards / "train-001.tar", [("k005.png", b""), ("k005.cls", b"2")])
    failures, batches = failures_of(shards)
    assert failures == {f"{shards}/train-001.tar@/k005.png: the file is empty"}
    (batch,) = [batch for batch in batches if batch.indices_B.item() == 5]
    shown = int((batch.views[0][0, 0, 0, 0] * 255).round())
    assert shown != 5
    assert int(batch.labels_B) == shown % 3


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "no tar", "short"])
def test_truncated_shard(shards: Path, damage: str) -> None:
    """Its missing images are reported one by one, and the run continues."""
    path = shards / "train-002.tar"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
        path.symlink_to(shards / "nowhere")
    elif damage == "short":
        write_tar(path, [(f"k{i:03}.png", gray(i, 32)) for i in range(6, 9)])
    else:
        path.write_bytes({"empty": b"", "cut": content[: 512 * 9 + 100], "no tar": b"x" * 3000}[damage])
    read_whole = {"short": 3, "cut": 2}.get(damage, 0)
    failures, _ = failures_of(shards)
    names = {failure.split(": ")[0] for failure in failures}
    assert names == {f"{path} image {i + 1}" for i in range(read_whole, 7)}
    assert all(failure.split(": ", 1)[1].strip() for failure in failures)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["images", "shards"])
def test_resumed_pass_gets_the_same_replacements(shards: Path, damage: str, workers: int) -> None:
    """Views, labels and failures of the rest of a pass, with many unreadable images."""
    sizes = json.dumps({f"train-{i:03}.tar": n for i, n in enumerate(COUNTS)})
    for path in sorted(shards.iterdir()):
        number = int(path.stem[-3:])
        if damage == "shards" and number in {2, 3}:
            path.write_bytes(b"x" * 3000)
        elif damage == "images":
            first = sum(COUNTS[:number])
            damaged = {first + i: gray(first + i, 32)[: 20 if (first + i) % 3 else None] for i in range(COUNTS[number])}
            write_tar(path, [(f"k{i:03}.png", content) for i, content in damaged.items()])
    (shards / "sizes.json").write_text(sizes)
    stream = build_stream(str(shards), whole, buffer=3)
    loader = loader_of(stream, 1, workers)
    passed = one_epoch(loader, 5)
    assert any(batch.failures for batch in passed)
    assert all(batch.views for batch in passed)
    for begin in (1, 4, 11, IMAGES - 1):
        set_epoch(loader, 5, skipped_batches=begin)
        left = list(loader)
        assert len(left) == IMAGES - begin
        for ours, theirs in zip(left, passed[begin:]):
            assert torch.equal(ours.views[0], theirs.views[0])
            assert (ours.failures, indices([ours])) == (theirs.failures, indices([theirs]))


def test_invalid_label_is_reported(shards: Path) -> None:
    write_tar(shards / "train-001.tar", [("k005.png", gray(5, 32)), ("k005.cls", b"-7")])
    failures, _ = failures_of(shards)
    (failure,) = failures
    assert failure.startswith(f"{shards}/train-001.tar@/k005.png: NAME.cls label '-7'")


def test_labels_are_optional_and_other_members_ignored(tmp_path: Path) -> None:
    members = [
        ("a.json", b"{}"),
        ("a.png", gray(3)),
        ("b.txt", b"no image"),
        ("d/c.png", gray(4)),
        ("../../e.png", gray(5)),
    ]
    write_tar(tmp_path / "train-0.tar", [*members, ("/abs/f.png", gray(6))])
    stream = build_stream(str(tmp_path), whole)
    assert len(stream) == 4
    batches = one_epoch(loader_of(stream, 1), 0)
    assert sorted(int(b.views[0][0, 0, 0, 0] * 255) for b in batches) == [3, 4, 5, 6]
    assert all(b.labels_B.item() == -1 for b in batches)
    assert not (tmp_path.parent / "e.png").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train-0.tar"]


def test_compressed_shard_with_a_huge_member(tmp_path: Path) -> None:
    """A member of two gigabytes in two compressed megabytes is reported and not decompressed to memory."""
    info = tarfile.TarInfo("a.png")
    info.size = 2**31
    with gzip.open(tmp_path / "train-0.tar.gz", "wb", compresslevel=1) as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        for _ in range(4):
            file.write(bytes(2**24))
    (image,) = read_span(str(tmp_path / "train-0.tar.gz"), Span(0, 0, 1), 0)
    assert image.content == b""
    assert str(2**31) in image.error


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_compressed_shard_with_a_huge_header(tmp_path: Path, kind: bytes) -> None:
    header, info = tarfile.TarInfo("header"), tarfile.TarInfo("a.png")
    header.type, header.size = kind, 2**26
    with gzip.open(tmp_path / "train-0.tar.gz", "wb", compresslevel=1) as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT) + bytes(2**26) + info.tobuf(tarfile.GNU_FORMAT))
    tracemalloc.start()
    (image,) = read_span(str(tmp_path / "train-0.tar.gz"), Span(0, 0, 1), 0)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    assert str(2**26) in image.error


def test_warning_about_compressed_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr("utils.logger.warning", lambda message, *values: messages.append(message % values))
    for name in ("train-0.tar", "train-1.tar.gz", "train-2.tgz"):
        (tmp_path / name).touch()
    assert [find_shards(str(tmp_path), "train") for _ in range(2)] == [[str(tmp_path / "train-0.tar")]] * 2
    assert len(messages) == 1
    assert "1 .tar.gz, 1 .tgz" in messages[0]


def test_huge_image(tmp_path: Path) -> None:
    """The size in the header is enough."""
    info = tarfile.TarInfo("a.png")
    info.size = 2**30 + 1
    with (tmp_path / "train-0.tar").open("wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(512 + 2**30 + 1 + 1024)  # sparse
    with pytest.raises(UsageError, match=r"a\.png .*1073741825 bytes"):
        build_dataset(tmp_path, "train", whole, layout="shards")


def test_sample_without_a_readable_image_has_no_views(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-0.tar", [("a.png", b""), ("b.png", b"")])
    batches = one_epoch(loader_of(build_stream(str(tmp_path), whole), 2), 0)
    assert batches[0].views == []
    assert len(set(batches[0].failures)) == 2


def test_incompatible_flags(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--sampler chunk"):
        build_train_loader(build_stream(str(shards), whole), 2, 0, pin_memory=False, sampler="chunk")
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    command = [*TINY_RUN, "--data_path", str(tmp_path), "--epoch_images", "5", "--output_dir", str(tmp_path / "out")]
    (tmp_path / "shards").rename(tmp_path / "set")
    with pytest.raises(UsageError, match=f"--epoch_images 5 requires tar shards, but {tmp_path} has none"):
        main_esvit.main(main_esvit.get_args_parser().parse_args([*command, *TINY_SWIN]))
    command += ["--dataset", "set", "--batch_size_per_gpu", "24"]  # the folder below decides what it holds
    with pytest.raises(UsageError, match=r"--batch_size_per_gpu 24 .* 5 images"):
        main_esvit.main(main_esvit.get_args_parser().parse_args([*command, *TINY_SWIN]))


@pytest.mark.parametrize("address", ["https://host/train-{0..3}.tar", "pipe:cat a.tar"])
def test_only_training_reads_remote_shards(address: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a local path"):
        build_dataset(address, "val", whole, layout="shards")
    with pytest.raises(UsageError, match="is not a local path"):
        convert.main(convert.get_args_parser().parse_args([address, str(tmp_path / "out"), "--to", "zip"]))
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------- at any place


def test_random_access(shards: Path) -> None:
    dataset = build_dataset(shards, "train", whole, need_labels=True, layout="shards")
    assert len(dataset) == IMAGES
    assert dataset.labels.tolist() == [i % 3 for i in range(IMAGES)]
    assert [round(float(dataset[i].views[0].max()) * 255) for i in range(IMAGES)] == list(range(IMAGES))
    assert dataset.source.name(6) == f"{shards}/train-002.tar@/k006.png"
    write_tar(shards / "train-001.tar", [("k005.png", gray(5, 32))])
    with pytest.raises(UsageError, match=r"train-001\.tar@/k005\.png has no label; evaluation needs"):
        build_dataset(shards, "train", whole, need_labels=True, layout="shards")
    assert build_dataset(shards, "train", whole, layout="shards").labels.tolist() == [-1] * IMAGES
    (shards / "train-001.tar").write_bytes((shards / "train-000.tar").read_bytes()[:700])
    with pytest.raises(UsageError, match=r"train-001\.tar is not a complete, uncompressed tar file"):
        build_dataset(shards, "train", whole, layout="shards")


def test_index_of_large_shards_is_cached(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until a shard changes; errors are raised each time."""
    monkeypatch.setenv("ESVIT_CACHE", str(tmp_path / "cache"))
    listed = build_dataset(shards, "train", whole, need_labels=True, layout="shards")
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(tars, "MIN_CACHED_BYTES", 1)
    names = find_shards(str(shards), "train")
    with pytest.MonkeyPatch.context() as forbid:
        for _ in range(2):
            assert count_images(names) == list(COUNTS)
            again = build_dataset(shards, "train", whole, need_labels=True, layout="shards")
            assert again.labels.tolist() == listed.labels.tolist()
            assert [again.source.name(i) for i in range(IMAGES)] == [listed.source.name(i) for i in range(IMAGES)]
            assert [again.source.read(i) for i in range(IMAGES)] == [listed.source.read(i) for i in range(IMAGES)]
            forbid.setattr(tars, "tar_members", lambda path: pytest.fail("looked through again"))
    write_tar(
        Path(names[1]), [("k005.png", gray(5, 32)), ("k005.cls", b"0"), ("more.png", gray(5)), ("more.cls", b"x")]
    )
    assert count_images(names) == [COUNTS[0], 2, *COUNTS[2:]]
    for _ in range(2):
        with pytest.raises(UsageError, match=r"train-001\.tar@/more\.png: label 'x'"):
            build_dataset(shards, "train", whole, layout="shards")
    assert not [path for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".npz")]


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE], ids=["hard", "symbolic"])
def test_links_are_reported_and_hidden_files_ignored(tmp_path: Path, kind: bytes) -> None:
    """When counting, streaming and reading at random."""
    write_tar(tmp_path / "train-0.tar", [("._a.png", b"of macOS"), ("a.png", gray(3)), ("a.cls", b"1")])
    with tarfile.open(tmp_path / "train-0.tar", "a") as tar:
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = kind, "a.png"
        tar.addfile(link)
        folder = tarfile.TarInfo("folder.png")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    assert count_images([str(tmp_path / "train-0.tar")]) == [2]
    dataset = build_dataset(tmp_path, "train", whole, layout="shards")
    batches = one_epoch(loader_of(build_stream(str(tmp_path), whole), 1), 0)
    streamed_failures = {failure for batch in batches for failure in batch.failures}
    read_failures = {failure for i in range(2) for failure in dataset[i].failures}
    (failure,) = streamed_failures
    assert failure.startswith(f"{tmp_path}/train-0.tar@/b.png: it is a link")
    assert read_failures == streamed_failures
    assert len(dataset) == 2


@pytest.mark.parametrize(
    "pattern",
    ["a-{0..999999999}.tar", "a-{0..999}-{0..999}-{0..999}.tar", f"a-{{0..{'9' * 500}}}.tar", "{a,b,c}" * 30 + ".tar",
     "pipe:cat a-{000000000..999999999}.tar", "a-{999999999..0}.tar", "a-{{0..999999},{0..999999}}.tar"],
)  # fmt: skip
def test_pattern_of_too_many_shards(pattern: str) -> None:
    with pytest.raises(UsageError, match="shards, at most 1000000"):
        find_shards(pattern, "train")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [("a", 1), ("{a,b}{c,d,e}", 6), ("{000..146}", 147), ("{0..9..3}", 4), ("{5..2}", 4), ("{-1..1}x{a}", 3)],
)
def test_count_expansions(pattern: str, names: int) -> None:
    assert count_expansions(pattern) == names == len(list(braceexpand.braceexpand(pattern)))


@pytest.mark.parametrize(
    "content", [f'{{"train-0.tar": {10**14}}}', "[" * 10**5, '{"train-0.tar": true}', "[1]", "9" * 5000]
)
def test_invalid_sizes_json(tmp_path: Path, content: str) -> None:
    write_tar(tmp_path / "train-0.tar", [("a.png", gray(3))])
    (tmp_path / "sizes.json").write_text(content)
    with pytest.raises(UsageError, match=r"sizes\.json is invalid") as caught:
        build_stream(str(tmp_path), whole)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------- the script


def test_pretraining_is_reproducible(shards: Path, tmp_path: Path) -> None:
    """Two runs give the same network; one damaged image in a hundred does not end them."""
    students = []
    for name in ("a", "b"):
        command = [*TINY_RUN, "--data_path", f"{shards}/train-{{000..004}}.tar", "--output_dir", str(tmp_path / name)]
        main_esvit.main(main_esvit.get_args_parser().parse_args([*command, "--epochs", "1", "--seed", "0", *TINY_SWIN]))
        students.append(serialization.load_file(tmp_path / name / "checkpoint.pth")["student"])
    torch.testing.assert_close(students[1], students[0], rtol=0, atol=0)
