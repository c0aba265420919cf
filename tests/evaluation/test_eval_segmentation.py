"""The script: what it learns and writes, resume, several processes, every architecture and what is refused."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.mask_files import write_masks
from helpers.pages import Page
from helpers.runs import TINY_SWIN, run_script
from helpers.small_networks import ARCHITECTURES, SMALL
from PIL import Image

import eval_segmentation
import utils
from analysis import report
from analysis.segments import Segmented, class_colors, prediction_page
from checkpoints import serialization
from config.loading import load_config
from evaluation import feature_loaders, segmentation
from evaluation.features import extract_splits
from evaluation.results import Results, save_results
from evaluation.segmentation import Probe
from utils import Stopped, UsageError

SWIN = ["--arch", "swin", "--cfg", "experiments/demo/swin_micro.yaml", "--random_weights"]
QUICK = ["--device", "cpu", "--num_workers", "0", "--batch_size_per_gpu", "2", "--window", "32", "--seed", "0"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_masks(tmp_path / "images")


def command(images: Path, out: Path, *flags: str) -> list[str]:
    return [*SWIN, *QUICK, "--data_path", str(images), "--output_dir", str(out), *flags, "--log_freq", "5", *TINY_SWIN]


def run(images: Path, out: Path, *flags: str) -> None:
    eval_segmentation.main(eval_segmentation.get_args_parser().parse_args(command(images, out, *flags)))


def results(out: Path, name: str = "segmentation") -> dict[str, Any]:
    return json.loads((out / "results" / f"{name}.json").read_text())


def saved(out: Path) -> dict[str, Any]:
    return serialization.load_file(out / "segmentation.pth")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}


def assert_equal_runs(one: Path, two: Path) -> None:
    torch.testing.assert_close(saved(one)["state_dict"], saved(two)["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(saved(one)["optimizer"]["state"], saved(two)["optimizer"]["state"], rtol=0, atol=0)
    assert saved(one)["epoch"] == saved(two)["epoch"]
    assert results(one) == results(two)
    losses = [[json.loads(line)["train_loss"] for line in (out / "log.txt").open()] for out in (one, two)]
    assert losses[0] == losses[1]


# --------------------------------------------------------------------------- what it learns and writes


def test_colors_are_learned(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    flags = ["--epochs", "20", "--lr", "0.05", "0.0001", "--stages", "1", "2", "--baselines", "--val_freq", "8"]
    run(images, out, *flags, "--stride", "20")
    record = results(out)
    assert list(record["scores"]) == [
        f"{name}, lr {lr}" for name in ("network", "raw pixels") for lr in ("0.05", "0.0001")
    ]
    best = record["scores"]["raw pixels, lr 0.05"]
    assert best["miou"] > 60
    assert best["miou"] == pytest.approx(np.mean(list(best["per_class"].values())))
    assert best["miou"] > record["scores"]["raw pixels, lr 0.0001"]["miou"]
    assert record["data"] == {"data_path": str(images), "train_images": 5, "val_images": 3, "classes": 3}
    assert record["protocol"]["stride"] == 20
    assert_matrices_fit(out, images, record["scores"])
    lines = [json.loads(line) for line in (out / "log.txt").open()]
    assert ["test_miou" in line for line in lines] == [epoch in (7, 15) for epoch in range(20)]
    assert set(lines[7]["test"]) == set(record["scores"])
    with Image.open(out / "predictions.png") as page:
        assert page.width > 1200
    printed = capsys.readouterr().out
    assert f"raw pixels, lr 0.05: mIoU {best['miou']:.2f}, " in printed
    files = contents(out)
    run(images, out, *flags, "--stride", "20")  # finished: only scored again
    assert capsys.readouterr().out == printed
    assert contents(out) == files


def assert_matrices_fit(out: Path, images: Path, scores: dict[str, Any]) -> None:
    """Check that the matrices of all rows have every pixel once and the scores of the result file."""
    lines = list(csv.DictReader((out / "results/segmentation_confusion.csv").open()))
    assert list(dict.fromkeys(line["score"] for line in lines)) == list(scores)
    known = sum(int((np.array(Image.open(path)) != 255).sum()) for path in images.glob("val/masks/*"))
    for name, row in scores.items():
        cells = {(line["true"], line["predicted"]): int(line["pixels"]) for line in lines if line["score"] == name}
        assert sum(cells.values()) == known
        for label, iou in row["per_class"].items():
            union = sum(pixels for cell, pixels in cells.items() if label in cell)
            assert iou == pytest.approx(100 * cells.get((label, label), 0) / union)


def test_report_of_segmentation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The IoU of each class, also of one that occurs nowhere; the matrix of pixels is not taken for one of images."""
    score = segmentation.score_of(torch.tensor([[6, 2, 0], [0, 2, 0], [0, 0, 0]]))
    rows = {"network": score.summary() | {"per_class": dict(zip("abc", score.per_class))}}
    save_results(tmp_path, Results("segmentation", {}, {}, {}, rows), {"network": score.confusion_P3}, "abc", "pixels")
    path = tmp_path / "results/segmentation.json"
    assert path.with_name("segmentation_confusion.csv").read_text().splitlines()[0] == "score,true,predicted,pixels"
    caplog.clear()
    monkeypatch.setattr(utils.logger, "propagate", True)
    words = Page(report.classes(path, json.loads(path.read_text()))).words
    assert words[-4:] == ["b", "50.00", "a", "75.00"]
    assert not caplog.records


def test_votes_of_regions(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--knn", "--nb_knn", "1", "5", "--baselines", "--stages", "1"]
    run(images, tmp_path / "out", *flags)
    scores = results(tmp_path / "out", "segmentation_knn")["scores"]
    assert list(scores) == [f"{name}, {k}-NN" for name in ("network", "raw pixels") for k in (1, 5)]
    assert scores["raw pixels, 5-NN"]["miou"] > 60
    assert (tmp_path / "out/predictions_knn.png").exists()
    assert not (tmp_path / "out/segmentation.pth").exists()
    capsys.readouterr()
    run(images, tmp_path / "few", *flags, "--knn_regions", "40")
    told = capsys.readouterr().err
    assert "of 320 training regions (--knn_regions 40" in told  # 5 images of 8 x 8
    assert results(tmp_path / "few", "segmentation_knn")["scores"] != scores


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(tmp_path: Path, name: str) -> None:
    """Images that are no multiples of a region, larger and smaller than a window."""
    arch, overrides, patch_size = SMALL[name]
    yaml = tmp_path / "small.yaml"
    yaml.write_text(load_config(None, overrides).dump())
    images = write_masks(tmp_path / "images", train=3, val=2)
    stages = ["1"] if name == "vit" else ["1", "2"]
    flags = ["--arch", arch, "--cfg", str(yaml), "--patch_size", str(patch_size), "--data_path", str(images)]
    flags += ["--output_dir", str(tmp_path), *QUICK, "--epochs", "1", "--stages", *stages, "--random_weights"]
    eval_segmentation.main(eval_segmentation.get_args_parser().parse_args(flags))
    (score,) = results(tmp_path)["scores"].values()
    assert 0 <= score["miou"] <= 100


def test_names_of_classes_and_void(images: Path, tmp_path: Path) -> None:
    """CamVid's void is the number after the last class; ADE20K's is 0."""
    names = tmp_path / "names.txt"
    names.write_text("red\n\ngreen\n")
    camvid = write_masks(tmp_path / "scenes", void=2)
    run(camvid, tmp_path / "camvid", "--knn", "--classes", str(names), "--ignore_index", "2")
    (score,) = results(tmp_path / "camvid", "segmentation_knn")["scores"].values()
    assert list(score["per_class"]) == ["red", "green"]
    run(images, tmp_path / "ade", "--knn", "--reduce_zero_label")
    (score,) = results(tmp_path / "ade", "segmentation_knn")["scores"].values()
    assert list(score["per_class"]) == ["1", "2"]


def test_pictures_show_each_class_in_its_color() -> None:
    mask = np.zeros((10, 40), dtype=np.uint8)
    mask[:, 20:], mask[:, 30:] = 1, 255
    item = Segmented("photo.jpg", Image.new("RGB", (40, 10), (255, 255, 255)), mask, 1 - np.minimum(mask, 1))
    page = np.asarray(prediction_page([item], ["a", "b", "unused"], "about")).reshape(-1, 3)
    red, green, _ = class_colors(3)
    for color in (red, green):
        mixed = np.array(color) * round(255 * 0.6) // 255 + 102  # over white
        assert (np.abs(page.astype(int) - mixed).max(axis=1) <= 2).sum() > 400 * 100 // 3
        assert (page == color).all(axis=1).sum() > 100  # in the legend
    assert len(set(class_colors(150))) == 150


# --------------------------------------------------------------------------- resume


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int, number: int | None) -> None:
    """Send a signal within a step, or raise an error if there is no `number`."""
    step, calls = Probe.step, iter(range(1, 1000))

    def stopping(*args: Any) -> Any:
        if next(calls) == steps:
            if number is None:
                raise KeyboardInterrupt
            os.kill(os.getpid(), number)
        return step(*args)

    monkeypatch.setattr(Probe, "step", stopping)


@pytest.mark.parametrize("cached", [[], ["--cache_features"]], ids=["augmented", "cached"])
@pytest.mark.parametrize(
    ("steps", "number"), [(8, None), (8, signal.SIGTERM)], ids=["killed after 2 epochs", "stopped within an epoch"]
)
def test_resumed_equals_uninterrupted(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: list[str], steps: int, number: int | None
) -> None:
    flags = ["--epochs", "4", "--lr", "0.01", "0.1", *cached]
    run(images, tmp_path / "whole", *flags)
    with monkeypatch.context() as patch:
        stop_after(patch, steps, number)
        if cached and number:
            patch.setattr(feature_loaders, "SIGNAL_CHECK_STEPS", 1)
        with pytest.raises(KeyboardInterrupt if number is None else Stopped):
            run(images, tmp_path / "parts", *flags)
    assert saved(tmp_path / "parts")["epoch"] == 2  # of 3 steps each
    assert saved(tmp_path / "parts").get("in_epoch", {}).get("steps") == (None if number is None else 2)
    assert not (tmp_path / "parts/results").exists()
    if cached:
        monkeypatch.setattr(feature_loaders, "extract_splits", forbidden)  # they are kept
    run(images, tmp_path / "parts", *flags)
    assert_equal_runs(tmp_path / "parts", tmp_path / "whole")
    assert not (tmp_path / "parts" / feature_loaders.CACHE).exists()


def forbidden(*_: object, **__: object) -> None:
    raise AssertionError


def test_cached_features_are_those_of_center_crops(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def remembered(*args: Any, **kwargs: Any) -> Any:
        calls.append(extract_splits(*args, **kwargs))
        return calls[-1]

    monkeypatch.setattr(feature_loaders, "extract_splits", remembered)
    run(images, tmp_path / "out", "--epochs", "3", "--cache_features")
    ((split,),) = calls
    maps, masks = split["network"]
    assert maps.shape == (5, 24, 4, 4)
    assert masks.shape == (5, 32, 32)
    middle = np.array(Image.open(images / "train/masks/004.png"))
    assert middle.shape == (46, 32)
    assert np.array_equal(masks[4].numpy(), middle[7:39])


def test_cached_features_that_do_not_fit_are_refused(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 maps of 24 x 4 x 4 numbers of 4 bytes fit into as much memory, and no less."""
    needed = 5 * 24 * 4 * 4 * 4
    monkeypatch.setattr(utils, "main_memory", lambda: needed)
    run(images, tmp_path / "out", "--epochs", "1", "--cache_features")
    monkeypatch.setattr(utils, "main_memory", lambda: needed - 1)
    monkeypatch.setattr(feature_loaders, "extract_splits", forbidden)
    with pytest.raises(UsageError, match=r"--cache_features needs .* for 5 images .*--stages.*--image_size"):
        run(images, tmp_path / "refused", "--epochs", "1", "--cache_features")
    run(images, tmp_path / "augmented", "--epochs", "1")


def test_votes_keep_the_features_of_an_interrupted_run(images: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / feature_loaders.CACHE).write_bytes(b"features")
    run(images, tmp_path / "out", "--knn")
    assert (tmp_path / "out" / feature_loaders.CACHE).read_bytes() == b"features"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lr", "0.5"], r"--lr \[0.001\] -> \[0.5\]"),
        (["--stages", "1"], r"--stages None -> \[1\]"),
        (["--epochs", "2"], "--epochs 1 -> 2"),
        (["--window", "16"], r"size of crops \[32, 32\] -> \[16, 16\]"),
        (["--weight_decay", "0"], "--weight_decay"),
    ],
    ids=str,
)
def test_folder_of_another_run_is_refused_and_left_alone(
    images: Path, tmp_path: Path, flags: list[str], words: str
) -> None:
    run(images, tmp_path / "out", "--epochs", "1")
    files = contents(tmp_path / "out")
    with pytest.raises(UsageError, match=f"belongs to another run .*{words}"):
        run(images, tmp_path / "out", "--epochs", "1", *flags)
    assert contents(tmp_path / "out") == files


def test_other_masks_are_another_run(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path / "out", "--epochs", "1")
    path = images / "val/masks/000.png"
    mask = np.array(Image.open(path))
    mask[5, 5] = (mask[5, 5] + 1) % 3
    Image.fromarray(mask).save(path)
    with pytest.raises(UsageError, match="digest of masks"):
        run(images, tmp_path / "out", "--epochs", "1")


@pytest.mark.parametrize("key", ["state_dict", "optimizer", "run"])
def test_damaged_fields_are_named(images: Path, tmp_path: Path, key: str) -> None:
    run(images, tmp_path / "out", "--epochs", "1")
    content = saved(tmp_path / "out")
    for wrong in ({}, {"each.0.weight": torch.zeros(1)}):
        torch.save(content | {key: wrong}, tmp_path / "out/segmentation.pth")
        if key != "run":
            with pytest.raises(UsageError, match=r"segmentation\.pth"):
                run(images, tmp_path / "out", "--epochs", "1")
    del content[key]
    torch.save(content, tmp_path / "out/segmentation.pth")
    with pytest.raises(UsageError, match=f"it has no {key}"):
        run(images, tmp_path / "out", "--epochs", "1")


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--stages", "3"], "--stages 3: swin has 2 stages; choose from 1 to 2"),
        (["--stages", "1", "1"], "--stages .* twice"),
        (["--lr", "1", "1"], "--lr .* twice"),
        (["--window", "20"], "--window 20 .* multiple of 8.* 16 or 24"),
        (["--window", "7"], "choose 8 or 8|--window 7"),
        (["--window", "16", "--stride", "17"], "--stride 17 .*--window 16"),
        (["--classes", "2"], r"masks/000\.png has the value 2, .*0 to 1.*--classes"),
        (["--classes", "0"], "--classes 0 gives 0 classes"),
        (["--classes", "99999999999999"], "choose from 2 to 255"),
        (["--classes", "no.txt"], "no.txt"),
        (["--classes", "1"], "--classes 1 gives 1 class; choose from 2"),
        (["--ignore_index", "1"], "value 255"),
        (["--ignore_index", "0"], "the value 255, .*--ignore_index 255.*--classes"),
        (["--knn", "--cache_features"], "--cache_features .*--knn"),
        (["--data_path", "/"], "no images with masks"),
        (["--pretrained_weights", "x.pth"], "exclude each other"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors(images: Path, tmp_path: Path, flags: list[str], words: str) -> None:
    if flags == ["--ignore_index", "1"]:
        flags = [*flags, "--classes", "3"]
    with pytest.raises(UsageError, match=words):
        run(images, tmp_path / "out", "--epochs", "1", *flags)


def test_masks_of_void_only(images: Path, tmp_path: Path) -> None:
    for path in (images / "val/masks").iterdir():
        Image.fromarray(np.full_like(np.array(Image.open(path)), 255)).save(path)
    with pytest.raises(UsageError, match=r"val masks of .* void everywhere"):
        run(images, tmp_path / "out")


@pytest.mark.parametrize("flags", [[], ["--classes", "2"]], ids=str)
def test_binary_masks_of_0_and_255(images: Path, tmp_path: Path, flags: list[str]) -> None:
    """With 255 as void they have a single class, of which every prediction would be right."""
    for path in images.glob("*/masks/*"):
        Image.fromarray(np.where(np.array(Image.open(path)) == 1, 255, 0).astype(np.uint8)).save(path)
    with pytest.raises(UsageError, match=r"values 0, 255, of which only 0 is a class.*255 is void .*recode"):
        run(images, tmp_path / "out", *flags)


def test_images_that_cannot_be_read_end_the_run(images: Path, tmp_path: Path) -> None:
    path = images / "train/images/003.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UsageError, match=r"images/003\.png cannot be read"):
        run(images, tmp_path / "out", "--epochs", "1")


def test_folder_of_another_kind_of_run(images: Path, tmp_path: Path) -> None:
    for name in ("checkpoint.pth", "checkpoint.pth.tar"):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).touch()
        with pytest.raises(UsageError, match=f"has the {name} of another kind of run"):
            run(images, tmp_path / "out", "--epochs", "1")
        (tmp_path / "out" / name).unlink()


def test_a_loss_that_is_not_finite(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Probe.step
    monkeypatch.setattr(Probe, "step", lambda *args: step(*args) * torch.tensor([1.0, float("nan")]))
    with pytest.raises(FloatingPointError, match="'network, lr 2' is not finite in epoch 0"):
        run(images, tmp_path / "out", "--epochs", "1", "--lr", "1", "2")


# --------------------------------------------------------------------------- several processes


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["augmented", "cached", "knn"])
def test_two_processes_equal_one(tmp_path: Path, mode: str) -> None:
    """5 training and 3 validation images: in the last step one process has no image."""
    images = write_masks(tmp_path / "images")
    more = {"augmented": [], "cached": ["--cache_features"], "knn": ["--knn", "--knn_regions", "40"]}[mode]
    outputs = []
    for name, processes, batch in (("one", 0, "4"), ("two", 2, "2")):
        flags = command(images, tmp_path / name, "--epochs", "2", "--lr", "0.01", "0.1", *more)
        flags[flags.index("--batch_size_per_gpu") + 1] = batch
        done = run_script("eval_segmentation.py", *flags, processes=processes)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1]
    if mode == "knn":
        assert results(tmp_path / "one", "segmentation_knn") == results(tmp_path / "two", "segmentation_knn")
        return
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two")
    torch.testing.assert_close(two["state_dict"], one["state_dict"], rtol=1e-3, atol=1e-5)
    assert one["run"] == two["run"]
    losses: Iterator[Any] = zip(
        *((json.loads(line) for line in (tmp_path / n / "log.txt").open()) for n in ("one", "two"))
    )
    for mine, other in losses:
        assert other["train_loss"] == pytest.approx(mine["train_loss"], rel=1e-4)


@pytest.mark.slow
def test_a_bad_mask_on_one_process_ends_both(images: Path, tmp_path: Path) -> None:
    Image.new("RGB", (41, 34)).save(images / "train/masks/001.png")
    done = run_script("eval_segmentation.py", *command(images, tmp_path / "out"), processes=2)
    assert done.returncode != 0
    assert "train/masks/001.png is a color image" in done.stderr
    assert segmentation.CHECKPOINT not in str(list((tmp_path / "out").glob("*")))
