"""Features of any images: every layout, resume, unreadable images, and folders that are never changed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers.feature_runs import SMALL, YAML, derive, extract, lines, meta, rows_of, run
from helpers.runs import TINY_SWIN, clean_environment, run_script, write_images, zip_folders
from PIL import Image

import extract_features
from config.loading import load_config
from data import convert
from data.datasets import ImageDataset, build_dataset
from data.layouts.sources import Files, MultiLabels, PackedStrings
from data.transforms.augment import eval_view
from evaluation import extraction, feature_folder
from evaluation.feature_folder import FeatureFolder, RowFile
from models import Backbone, build_model
from utils import UsageError


def network() -> Backbone:
    torch.manual_seed(0)
    return build_model("swin", load_config(YAML, TINY_SWIN), is_teacher=True).eval()


@torch.no_grad()
def slow_features(images: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names, view features and region features, one image at a time."""
    config = load_config(YAML, TINY_SWIN)
    backbone, transform = network(), eval_view(32, 0.875, config.INPUT.MEAN, config.INPUT.STD)
    paths = sorted(str(path) for path in images.rglob("*.png"))
    outputs = [backbone.forward_features(transform(Image.open(path).convert("RGB"))[0][None]) for path in paths]
    return paths, torch.cat([o.view_BC for o in outputs]).numpy(), torch.cat([o.regions_BTC for o in outputs]).numpy()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Eleven images of two classes."""
    write_images(tmp_path / "images", 5, classes=2)
    write_images(tmp_path / "images" / "class1" / "more", 1, seed=9)
    return tmp_path / "images"


# --------------------------------------------------------------------------- the folder


def test_features_names_labels_and_meta(images: Path, tmp_path: Path) -> None:
    features = extract(tmp_path / "out", images, "--regions")
    names, view, regions = slow_features(images)
    np.testing.assert_allclose(features, view, atol=1e-5)
    np.testing.assert_allclose(np.load(tmp_path / "out" / "regions.npy"), regions, atol=1e-5)
    assert lines(tmp_path / "out" / "files.txt") == names
    assert lines(tmp_path / "out" / "labels.txt") == ["class0"] * 5 + ["class1"] * 6
    content = meta(tmp_path / "out")
    assert content["features"] == {"shape": [11, 24], "dtype": "float32", "unit_length": False}
    assert content["regions"] == {"shape": [11, 16, 24], "grid": [4, 4], "dtype": "float32", "unit_length": False}
    assert content["network"]["sha256"] is None
    assert content["network"]["config"]["MODEL"]["SPEC"]["DIM_EMBED"] == 12
    assert content["preprocessing"]["image_size"] == 32
    assert content["preprocessing"]["mean"] == [0.485, 0.456, 0.406]
    assert content["data"]["classes"] == ["class0", "class1"]
    assert content["unreadable"] == 0
    assert not (tmp_path / "out" / "unfinished").exists()


def test_checksum_of_the_weights(images: Path, tmp_path: Path) -> None:
    torch.save({"student": network().state_dict(), "teacher": {}}, tmp_path / "w.pth")
    flags = ["--pretrained_weights", str(tmp_path / "w.pth"), "--checkpoint_key", "student"]
    features = extract(tmp_path / "out", images, *flags, "--image_size", "48", "--half", "--normalize")
    content = meta(tmp_path / "out")
    assert content["network"]["sha256"] == hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()
    assert content["network"]["checkpoint_key"] == "student"
    assert content["preprocessing"]["image_size"] == 48
    assert content["features"] == {"shape": [11, 24], "dtype": "float16", "unit_length": True}
    assert features.dtype == np.float16
    np.testing.assert_allclose(np.linalg.norm(features.astype(np.float32), axis=1), 1, atol=2e-3)


def test_every_layout_gives_the_same_features(images: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (images / "class1" / "more" / "000.png").rename(images / "class1" / "more.png")
    (images / "class1" / "more").rmdir()
    images.rename(tmp_path / "data" / "train")
    source = tmp_path / "data" / "train"
    expected = extract(tmp_path / "folders", source)
    paths = lines(tmp_path / "folders" / "files.txt")

    (tmp_path / "list.txt").write_text("\n".join(reversed(paths)))
    np.testing.assert_allclose(extract(tmp_path / "a", tmp_path / "list.txt"), expected[::-1], atol=1e-6)
    assert not (tmp_path / "a" / "labels.txt").exists()

    flat = tmp_path / "flat"
    flat.mkdir()
    for number, path in enumerate(paths):
        os.link(path, flat / f"{number:03}.png")
    assert extract(tmp_path / "b", flat).tobytes() == expected.tobytes()
    assert not (tmp_path / "b" / "labels.txt").exists()

    assert (
        extract(tmp_path / "c", zip_folders(tmp_path / "data", tmp_path / "zip"), "--zip_mode").tobytes()
        == expected.tobytes()
    )
    assert lines(tmp_path / "c" / "files.txt")[0] == f"{tmp_path}/zip/train.zip@/class0/000.png"
    assert lines(tmp_path / "c" / "labels.txt") == ["0"] * 5 + ["1"] * 6

    for kind, flags in (("tsv", ["--tsv_mode"]), ("shards", [])):
        convert.main(convert.get_args_parser().parse_args([str(tmp_path / "data"), str(tmp_path / kind), "--to", kind]))
        converted = extract(tmp_path / f"{kind}_out", tmp_path / kind, *flags)
        order = [converted[i].tobytes() for i in range(11)]
        assert sorted(order) == sorted(row.tobytes() for row in expected)  # conversions may shuffle
        assert len(set(lines(tmp_path / f"{kind}_out" / "files.txt"))) == 11
        assert len(lines(tmp_path / f"{kind}_out" / "labels.txt")) == 11


def test_the_other_split(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "both" / "train", 3)
    write_images(tmp_path / "both" / "val", 2)
    assert len(extract(tmp_path / "a", tmp_path / "both")) == 3
    assert "--split val" in capsys.readouterr().err
    assert len(extract(tmp_path / "b", tmp_path / "both", "--split", "val")) == 2


def test_tsv_without_labels(images: Path, tmp_path: Path) -> None:
    convert.main(convert.get_args_parser().parse_args([str(images), str(tmp_path / "tsv"), "--to", "tsv"]))
    tsv = tmp_path / "tsv" / "train.tsv"
    columns = [line.split("\t") for line in tsv.read_text().splitlines()]
    tsv.write_text("".join(f"{key}\t\t{image}\n" for key, _, image in columns))
    (tmp_path / "tsv" / "train.lineidx").unlink()
    assert np.isfinite(extract(tmp_path / "out", tmp_path / "tsv", "--tsv_mode")).all()
    assert not (tmp_path / "out" / "labels.txt").exists()


def test_several_labels_an_image() -> None:
    labels = MultiLabels([[0, 2], [], [1]], 3)
    dataset = ImageDataset(Files(["a", "b", "c"]), labels, ["cat", "dog", "bird"], lambda image: [])
    assert list(extraction.label_names(dataset) or ()) == ["cat\tbird", "", "dog"]


# --------------------------------------------------------------------------- unreadable images


def test_unreadable_images_are_rows_of_nan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path / "images", 100, size=8)
    broken = tmp_path / "images" / "050.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:40])
    features = extract(tmp_path / "out", tmp_path / "images", "--regions")
    assert np.flatnonzero(np.isnan(features).any(axis=1)).tolist() == [50]
    assert np.isnan(features[50]).all()
    assert np.isnan(np.load(tmp_path / "out" / "regions.npy")[50]).all()
    (header, row) = rows_of(tmp_path / "out" / "unreadable.csv")
    assert header == ["row", "image", "reason"]
    assert row[:2] == ["50", str(broken)]
    assert row[2]
    assert meta(tmp_path / "out")["unreadable"] == 1
    told = capsys.readouterr().err
    assert f"cannot read {broken}" in told
    assert "its features are NaN" in told
    derive(tmp_path / "out", "--neighbors", "2", "--duplicates", "1")
    assert str(broken) not in {name for row in rows_of(tmp_path / "out" / "neighbors.csv") for name in row}
    assert len(rows_of(tmp_path / "out" / "neighbors.csv")) == 1 + 2 * 99


def test_more_than_one_percent_is_an_error_and_repaired_images_resume(images: Path, tmp_path: Path) -> None:
    expected = extract(tmp_path / "whole", images)
    broken = images / "class0" / "003.png"
    content = broken.read_bytes()
    broken.write_bytes(b"")
    with pytest.raises(UsageError, match=r"1 of 11 images cannot be read, more than 1 %.*003\.png"):
        extract(tmp_path / "out", images)
    assert not (tmp_path / "out" / "features.npy").exists()
    broken.write_bytes(content)
    assert extract(tmp_path / "out", images).tobytes() == expected.tobytes()


def test_undeclared_range_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    np.save(tmp_path / "images" / "a.npy", np.full((32, 32, 3), 300.0))
    with pytest.raises(UsageError, match=r"a\.npy"):
        extract(tmp_path / "out", tmp_path / "images")


# --------------------------------------------------------------------------- resume


class KilledError(Exception):
    """Stands for a kill: the process ends without saving what it has."""


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int, synced: int) -> None:
    """Kill the extraction after some batches, of which some were saved."""
    write, count = feature_folder.FeatureWriter.write, 0

    def killed(self: Any, *args: Any) -> None:
        nonlocal count
        write(self, *args)
        count += 1
        if count == synced:
            self.sync()
        if count == after:
            monkeypatch.setattr(self, "sync", lambda: None)  # nothing more is saved
            raise KilledError

    monkeypatch.setattr(feature_folder.FeatureWriter, "write", killed)


def test_resume_computes_the_rest_and_gives_the_same_bytes(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract(tmp_path / "whole", images, "--regions")
    with monkeypatch.context() as patch:
        interrupt(patch, after=2, synced=1)
        with pytest.raises(KilledError):
            extract(tmp_path / "out", images, "--regions")
    unfinished = tmp_path / "out" / "unfinished"
    assert np.load(unfinished / "done.npy").tolist() == [1] * 4 + [0] * 7
    rows = RowFile(unfinished / "features.npy")
    rows.write(0, np.full((1, 24), 7, np.float32))  # a finished row that a second computation would change
    rows.sync()
    resumed = extract(tmp_path / "out", images, "--regions")
    assert (resumed[0] == 7).all()
    assert resumed[1:].tobytes() == np.load(tmp_path / "whole" / "features.npy")[1:].tobytes()
    for name in ("regions.npy", "files.txt", "labels.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("step", range(1, 7))
def test_killed_while_finishing(step: int, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that is repaired after the kill is computed if finishing had not begun; else it stays listed as unreadable."""
    expected = extract(tmp_path / "whole", images)
    monkeypatch.setattr("data.loader.MAX_FAILED_SHARE", 0.5)
    broken = images / "class0" / "003.png"
    content = broken.read_bytes()
    broken.write_bytes(b"")
    replace, replaced = os.replace, 0

    def killed(source: Any, target: Any) -> None:
        nonlocal replaced
        replaced += Path(source).parent.name == "unfinished"
        if replaced == step:
            raise KilledError
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KilledError):
            extract(tmp_path / "out", images)
    assert not (tmp_path / "out" / "meta.json").exists()
    broken.write_bytes(content)
    finished = extract(tmp_path / "out", images)
    unreadable = [3] if step > 1 else []
    assert np.flatnonzero(np.isnan(finished).any(axis=1)).tolist() == unreadable
    assert meta(tmp_path / "out")["unreadable"] == len(unreadable)
    assert (tmp_path / "out" / "unreadable.csv").exists() == (step > 1)
    readable = [row for row in range(11) if row not in unreadable]
    assert finished[readable].tobytes() == expected[readable].tobytes()
    assert not (tmp_path / "out" / "unfinished").exists()


def test_a_folder_that_is_called_unfinished(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of the user are kept, before an extraction and when one is finished."""
    precious = tmp_path / "out" / "unfinished" / "features.npy"
    precious.parent.mkdir(parents=True)
    precious.write_text("precious")
    with pytest.raises(UsageError, match="unfinished of something else"):
        extract(tmp_path / "out", images)
    assert precious.read_text() == "precious"
    precious.unlink()
    precious.parent.rmdir()
    with monkeypatch.context() as patch:
        interrupt(patch, after=1, synced=1)
        with pytest.raises(KilledError):
            extract(tmp_path / "out", images)
    notes = tmp_path / "out" / "unfinished" / "notes.txt"
    notes.write_text("precious")
    with pytest.raises(UsageError, match=r"notes\.txt of something else"):
        extract(tmp_path / "out", images)
    assert notes.read_text() == "precious"
    notes.rename(tmp_path / "notes.txt")
    assert extract(tmp_path / "out", images).tobytes() == extract(tmp_path / "whole", images).tobytes()


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        (("--half",), "features.dtype"),
        (("--regions",), "regions.shape"),
        (("--image_size", "40"), "preprocessing.image_size"),
        (("--crop_ratio", "1"), "preprocessing.crop_ratio"),
        (("--normalize",), "features.unit_length"),
        (("--pretrained_weights", "WEIGHTS"), "network.seed"),
        (("--data_path", "OTHER"), "data.classes"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused(
    flags: tuple[str, ...], key: str, finished: bool, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        if not finished:
            interrupt(patch, after=1, synced=1)
        with contextlib.nullcontext() if finished else pytest.raises(KilledError):
            extract(tmp_path / "out", images)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    torch.save(network().state_dict(), tmp_path / "weights.pth")
    write_images(tmp_path / "other", 11)
    words = {"WEIGHTS": str(tmp_path / "weights.pth"), "OTHER": str(tmp_path / "other")}
    with pytest.raises(UsageError, match=rf"{key}.*choose another --output_dir"):
        run(tmp_path / "out", "--data_path", str(images), *(words.get(word, word) for word in flags))
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_finished_folders_are_never_changed(images: Path, tmp_path: Path) -> None:
    extract(tmp_path / "out", images)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    run(tmp_path / "out", "--data_path", str(images))
    derive(tmp_path / "out", "--neighbors", "2")
    derive(tmp_path / "out", "--neighbors", "3")
    assert all(path.read_bytes() == content for path, content in before.items())
    new = {path.name for path in (tmp_path / "out").iterdir()} - {path.name for path in before}
    assert new == {"neighbors.csv", "neighbors_2.csv", "neighbors.png", "neighbors_2.png"}
    with pytest.raises(UsageError, match="--half"):
        derive(tmp_path / "out", "--half", "--plot", "pca")
    with pytest.raises(UsageError, match="--data_path"):
        derive(tmp_path / "nowhere", "--plot", "pca")
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "files.txt").write_text("precious")
    with pytest.raises(UsageError, match=r"files\.txt of something else"):
        extract(tmp_path / "precious", images)
    assert (tmp_path / "precious" / "files.txt").read_text() == "precious"


@pytest.mark.parametrize("name", ["features.npy", "files.txt", "labels.txt", "meta.json"])
def test_damaged_folders(name: str, images: Path, tmp_path: Path) -> None:
    extract(tmp_path / "out", images)
    path = tmp_path / "out" / name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UsageError, match=str(tmp_path / "out")):
        derive(tmp_path / "out", "--neighbors", "2")


def test_too_large_for_the_disk(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(UsageError, match=r"0\.0 GiB for the features.*--half"):
        extract(tmp_path / "out", images)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_told_and_the_rest_resumes(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = extract(tmp_path / "whole", images)
    write, count = RowFile.write, 0

    def full(self: RowFile, *args: Any) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(RowFile, "write", full)
        with pytest.raises(UsageError, match=r"--output_dir .*out cannot be used \(No space left on device\)"):
            extract(tmp_path / "out", images)
    assert extract(tmp_path / "out", images).tobytes() == expected.tobytes()


def test_a_name_with_a_line_break(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 1)
    (tmp_path / "images" / "000.png").rename(tmp_path / "images" / "a\nb.png")
    with pytest.raises(UsageError, match="line break"):
        extract(tmp_path / "out", tmp_path / "images")


def test_nonfinite_features(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 has no values above 65504; NaN is kept for unreadable images."""
    forward = Backbone.forward_features
    monkeypatch.setattr(Backbone, "forward_features", lambda *a: type(forward(*a))(*(x * 1e6 for x in forward(*a))))
    assert np.isfinite(extract(tmp_path / "full", images)).all()
    with pytest.raises(UsageError, match="not finite; leave --half out"):
        extract(tmp_path / "half", images, "--half")


@pytest.mark.slow
def test_two_processes_and_a_real_kill(images: Path, tmp_path: Path) -> None:
    expected = extract(tmp_path / "one", images, "--regions", "--neighbors", "3", "--duplicates", "0.5")
    line = [*SMALL, "--random_weights", "--data_path", str(images), "--regions", "--output_dir", str(tmp_path / "two")]
    program = (
        "import os, sys; from evaluation import feature_folder as f; import extract_features as e\n"
        "f.SYNC_SECONDS = 0; sync = f.FeatureWriter.sync\n"
        "f.FeatureWriter.sync = lambda self: (sync(self), os.kill(os.getpid(), 9))\n"
        "e.main(e.get_args_parser().parse_args(sys.argv[1:]))"
    )
    line += ["--seed", "0", *TINY_SWIN]
    killed = subprocess.run(
        [sys.executable, "-c", program, *line], cwd=ROOT, env=clean_environment(), capture_output=True
    )
    assert killed.returncode == -9
    assert np.load(tmp_path / "two" / "unfinished" / "done.npy").sum() == 4
    more = ["--neighbors", "3", "--duplicates", "0.5", *line]
    done = run_script("extract_features.py", *more, processes=2)
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "two" / "features.npy").tobytes() == expected.tobytes()
    for name in ("regions.npy", "files.txt", "labels.txt", "neighbors.csv", "duplicates.csv"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak memory can be reset on Linux only")
def test_memory_of_a_process_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """128 MiB of rows in batches of 1 MiB; a memory map would count its pages as memory of the process."""

    def peak() -> int:
        return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])

    folder, names = FeatureFolder(tmp_path), PackedStrings([str(i) for i in range(2**15)])
    folder.prepare({"data": {}, "features": {"shape": [2**15, 2**10], "dtype": "float32"}}, list(names), None)
    rows = np.ones((2**8, 2**10), np.float32)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    with folder.writer() as writer:
        for first in range(0, 2**15, 2**8):
            writer.write(first, {"features.npy": rows}, np.ones(2**8, np.uint8))
    assert peak() - before < 2**24
    assert (np.load(tmp_path / "unfinished" / "features.npy", mmap_mode="r")[::999] == 1).all()


# --------------------------------------------------------------------------- usage


def test_nonsquare_config_needs_image_size(images: Path, tmp_path: Path) -> None:
    line = [
        *SMALL,
        "--random_weights",
        "--output_dir",
        str(tmp_path / "out"),
        "--data_path",
        str(images),
        "--seed",
        "0",
    ]
    args = extract_features.get_args_parser().parse_args([*line, *TINY_SWIN, "MODEL.IMAGE_SIZE", "[32, 48]"])
    with pytest.raises(UsageError, match=r"not square.*--image_size"):
        extract_features.main(args)


def test_no_weights_and_no_images(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--random_weights"):
        derive(tmp_path / "out", "--data_path", str(images))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no image found"):
        extract(tmp_path / "out", tmp_path / "empty")
    assert not (tmp_path / "out").exists()


def test_output_among_the_images(images: Path) -> None:
    with pytest.raises(UsageError, match=r"--output_dir .* is inside the images"):
        extract(images / "class0" / "features", images)
    assert not (images / "class0" / "features").exists()
    images.rename(images.with_name("train"))
    extract(images.parent / "features", images.parent)  # beside train/, which alone is read


def test_names_are_read_when_needed(images: Path) -> None:
    dataset = build_dataset(images, "train", lambda image: [])
    names = extraction.Names(dataset)
    assert len(names) == 11
    assert list(names) == [dataset.source.name(i) for i in range(11)]


def test_folder_lists_names_that_are_not_utf8(tmp_path: Path) -> None:
    names = ["a\udcff.png", "b, c.png", "ü.png"]
    folder = FeatureFolder(tmp_path)
    folder.prepare({"data": {}, "features": {"shape": [3, 2], "dtype": "float32"}}, names, None)
    with folder.writer() as writer:
        writer.write(0, {"features.npy": np.ones((3, 2), np.float32)}, np.array([1, 0, 1], np.uint8))
    folder.finish(names, {})
    assert list(folder.load().names) == names
    assert b"a\xff.png\n" in (tmp_path / "files.txt").read_bytes()
    assert rows_of(tmp_path / "unreadable.csv")[1] == ["1", "b, c.png", ""]
