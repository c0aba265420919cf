"""The analysis script on every architecture: what it writes, and what it refuses."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.runs import run_script, write_images, zip_folders
from helpers.small_networks import ARCHITECTURES, SMALL, small_network
from PIL import Image

import run_analysis
from analysis import correspondence, stereo
from analysis.correspondence import RegionFeatures
from analysis.images import Scale
from models import Backbone
from utils import UsageError

PICTURES = ("--vis_attention", "--vis_correspondence", "--vis_features")


def command(name: str, output: Path, *flags: str, extra: Sequence[str] = ()) -> list[str]:
    arch, overrides, patch_size = SMALL[name]
    network = ["--arch", arch, "--cfg", f"experiments/demo/{name}_micro.yaml", "--patch_size", str(patch_size)]
    fixed = ["--device", "cpu", "--num_workers", "0", "--output_dir", str(output)]
    fixed += [] if "--pretrained_weights" in flags else ["--random_weights"]
    return [*network, *fixed, *flags, "--seed", "8", *overrides, *extra]


def run(name: str, output: Path, *flags: str, extra: Sequence[str] = ()) -> None:
    run_analysis.main(run_analysis.get_args_parser().parse_args(command(name, output, *flags, extra=extra)))


def results(output: Path, evaluation: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "results" / f"{evaluation}.json").read_text())
    return found


@pytest.fixture
def photo(tmp_path: Path) -> str:
    """Not square, and no multiple of anything."""
    y, x = np.mgrid[:75, :131]
    pixels = np.stack([x, y * 1.7, 128 + 100 * np.sin(x / 9) * np.cos(y / 7)], axis=2)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(write_images(tmp_path / "images", 5))


# --------------------------------------------------------------------------- what it writes


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_correspondences_and_features_of_every_architecture(name: str, photo: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(name, out, "--vis_correspondence", "--vis_features", "--image_path", photo, "--learning", "supervised")
    prefix = f"{SMALL[name].arch}_sup_photo"
    pictures = [f"{prefix}_{what}" for what in ("correspondence.png", "correspondence.json", "features.png")]
    assert sorted(path.name for path in out.iterdir()) == sorted([*pictures, "views_photo.pth"])
    record = json.loads((out / f"{prefix}_correspondence.json").read_text())
    height, width = record["size_of_views"][0]
    assert (height % 8, width % 8) == (0, 0)
    assert width / height == pytest.approx(131 / 75, rel=0.15)
    pairs = record["pairs"]
    assert [pair["rank"] for pair in pairs] == list(range(1, len(pairs) + 1))
    assert [pair["cosine"] for pair in pairs] == sorted((pair["cosine"] for pair in pairs), reverse=True)
    assert len({tuple(pair["first_xy"]) for pair in pairs}) == len(pairs)
    for x, y in [pair[side] for pair in pairs for side in ("first_xy", "second_xy")] + record["most_like_view_xy"]:
        assert 0 < x < width
        assert 0 < y < height


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "resnet"])
def test_attention_of_every_architecture(name: str, photo: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(name, out, "--vis_attention", "--image_path", photo)
    prefix = f"{SMALL[name].arch}_ssl_photo_attention"
    assert sorted(path.name for path in out.iterdir()) == [f"{prefix}.json", f"{prefix}.png", f"{prefix}_heads"]
    record = json.loads((out / f"{prefix}.json").read_text())
    maps = small_network(name).forward_selfattention(torch.zeros(1, 3, 64, 64))
    assert isinstance(maps, torch.Tensor)
    heads = record["heads"]
    assert sorted(head["head"] for head in heads) == list(range(maps.shape[1]))
    assert [head["bits"] for head in heads] == sorted(head["bits"] for head in heads)
    regions = record["grid"][0] * record["grid"][1]
    assert all(0 < head["regions_kept"] <= math.ceil(0.6 * regions) for head in heads)
    single = sorted(path.name for path in (out / f"{prefix}_heads").iterdir())
    assert single == sorted(
        f"rank{head['rank']:02}_head{head['head']}_{kind}.png" for head in heads for kind in ("heat", "mask")
    )
    with Image.open(out / f"{prefix}_heads" / single[0]) as image:
        assert min(image.size) == 224
        assert image.width / image.height == pytest.approx(131 / 75, rel=0.1)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_measures_of_every_architecture(name: str, folder: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    measures = ["--measure_correspondence", "True", "--data_path", folder, "--batch_size_per_gpu", "2"]
    wide = ["MODEL.IMAGE_SIZE", "[64, 96]"]
    if name == "resnet":
        with pytest.raises(UsageError, match="ResNet has no attention to show"):
            run(name, out, "--vis_entropy", "--data_path", folder)
        run(name, out, *measures, extra=wide)
    else:
        run(name, out, *measures, "--vis_entropy", extra=wide)
        record = json.loads((out / f"{SMALL[name].arch}_ssl_entropy.json").read_text())
        values, uniform = record["bits_by_block_and_head"], record["bits_of_uniform_attention"]
        assert len(values) == len(uniform) == sum(small_network(name).stage_depths)
        assert all(0 < bits <= most + 1e-4 for heads, most in zip(values, uniform) for bits in heads)
        with Image.open(out / f"{SMALL[name].arch}_ssl_entropy.png") as plot:
            assert plot.size == (1024, 576)
    record = results(out, "correspondence")
    score = record["scores"]["network"]
    assert record["data"]["val_images"] == 5
    assert 0 <= score["accuracy"] <= 100
    assert record["protocol"]["image_size"] == [64, 96]
    assert 0 <= score["distance"] < math.hypot(64, 96)


def test_stereo_and_its_baselines(photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = small_network("swin")
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    flags = ("--measure_stereo", "--image_size", "128", "--pretrained_weights", str(tmp_path / "weights.pth"))
    run("swin", tmp_path / "out", *flags)
    scores = results(tmp_path / "out", "stereo")["scores"]
    assert set(scores) == {"network", "untrained network", "raw pixels", "chance"}
    assert len({score["regions"] for score in scores.values()}) == 1
    assert scores["raw pixels"]["within_one"] > 2 * scores["chance"]["within_one"]
    printed = capsys.readouterr().out
    assert f"{scores['raw pixels']['within_one']:.2f} %" in printed


def test_entropies_over_a_folder_do_not_depend_on_the_batches(folder: str, tmp_path: Path) -> None:
    for size in ("2", "5"):
        run("swin", tmp_path / size, "--vis_entropy", "--data_path", folder, "--batch_size_per_gpu", size)
    first, second = (json.loads((tmp_path / s / "swin_ssl_entropy.json").read_text()) for s in ("2", "5"))
    for ours, theirs in zip(first["bits_by_block_and_head"], second["bits_by_block_and_head"]):
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_existing_files_are_kept_and_saved_views_reused(photo: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("swin", out, "--vis_correspondence", "--image_path", photo)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    run("swin", out, "--vis_correspondence", "--image_path", photo, "--use_saved_aug")
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    assert before.items() <= after.items()
    same = "swin_ssl_photo_correspondence"
    assert set(after) - set(before) == {f"{same}_2.png", f"{same}_2.json"}
    for ending in ("png", "json"):
        assert after[f"{same}_2.{ending}"] == after[f"{same}.{ending}"]  # the same views and the same network
    run("vit", out, "--vis_correspondence", "--image_path", photo, "--use_saved_aug", "True")
    assert len(list(out.glob("views_*.pth"))) == 1


def test_two_images_and_folders_of_images(photo: str, folder: str, tmp_path: Path) -> None:
    run("swin", tmp_path / "a", "--vis_correspondence", "--image_path", photo, "--image_path2", f"{folder}/000.png")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == [f"swin_ssl_photo_000_correspondence.{ending}" for ending in ("json", "png")]
    run("swin", tmp_path / "b", "--vis_features", "--image_path", folder, "--num_images", "2")
    names = sorted(path.name for path in (tmp_path / "b").iterdir())
    assert names == ["swin_ssl_001_features.png", "swin_ssl_003_features.png"]
    classes = str(write_images(tmp_path / "classes", 1, classes=2))  # both hold a 000.png
    run("swin", tmp_path / "c", "--vis_features", "--image_path", classes)
    names = sorted(path.name for path in (tmp_path / "c").iterdir())
    assert names == ["swin_ssl_class0_000_features.png", "swin_ssl_class1_000_features.png"]


@pytest.mark.parametrize("name", ["swin", "vil"])
def test_every_region_of_an_image_finds_itself_in_the_same_image(name: str, photo: str, tmp_path: Path) -> None:
    run(name, tmp_path, "--vis_correspondence", "--image_path", photo, "--image_path2", photo)
    record = json.loads((tmp_path / f"{name}_ssl_photo_photo_correspondence.json").read_text())
    assert len(record["pairs"]) == 10
    for pair in record["pairs"]:
        assert pair["first_xy"] == pair["second_xy"]
        assert pair["cosine"] == pytest.approx(1)
    assert record["most_like_view_xy"][0] == record["most_like_view_xy"][1]


def test_images_of_other_channels(tmp_path: Path) -> None:
    np.save(tmp_path / "many.npy", np.random.default_rng(0).random((5, 40, 60), dtype=np.float32))
    channels = ["MODEL.SPEC.IN_CHANS", "5", "INPUT.MEAN", str([0.5] * 5), "INPUT.STD", str([0.2] * 5)]
    flags = (*PICTURES, "--measure_correspondence", "--image_path", str(tmp_path / "many.npy"))
    folder = tmp_path / "list.txt"
    folder.write_text("many.npy\n")
    run("swin", tmp_path / "out", *flags, "--data_path", str(folder), extra=channels)
    assert results(tmp_path / "out", "correspondence")["data"]["val_images"] == 1
    with pytest.raises(UsageError, match="--measure_stereo has pictures of 3 channels, this network takes 5"):
        run("swin", tmp_path / "out", "--measure_stereo", extra=channels)


def test_unreadable_picture_of_a_folder_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the next one that is not shown anyway; a file that is named alone is not."""
    folder = write_images(tmp_path / "images", 6)
    (folder / "001.png").write_bytes(b"")
    Image.new("RGB", (5000, 2)).save(folder / "003.png")
    run("swin", tmp_path / "out", "--vis_features", "--image_path", str(folder), "--num_images", "3")
    told = capsys.readouterr().err
    shown = sorted(path.name for path in (tmp_path / "out").glob("*_features.png"))
    assert shown == [f"swin_ssl_{name}_features.png" for name in ("002", "004", "005")]
    named = [name for name in ("001.png", "003.png", "004.png") if f"cannot read the image {folder / name}" in told]
    assert named == ["001.png", "003.png"]
    for name, words in (("001.png", "the file is empty"), ("003.png", "of 5000 x 2 pixels")):
        with pytest.raises(UsageError, match=f"{name} .{words}"):
            run("swin", tmp_path / "out", "--vis_features", "--image_path", str(folder / name))
    for path in folder.iterdir():
        path.write_bytes(b"")
    with pytest.raises(UsageError, match=r"000\.png .*nor 5 others tried"):
        run("swin", tmp_path / "out", "--vis_features", "--image_path", str(folder))


def test_names_that_are_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(os.fsdecode(bytes(tmp_path / "bilder") + b"\xe4"))
    write_images(folder, 1)
    (folder / "000.png").rename(folder / os.fsdecode(b"gr\xf6\xdfe.png"))
    run("swin", tmp_path / "out", "--report", "--vis_correspondence", "--image_path", str(folder))
    assert r"gr\xf6\xdfe" in capsys.readouterr().out
    assert r"gr\xf6\xdfe" in (tmp_path / "out/report.html").read_text(encoding="utf-8")


def test_query_block_and_threshold_change_the_picture(photo: str, tmp_path: Path) -> None:
    overviews, records = [], []
    for number, flags in enumerate(([], ["--query", "10", "70"], ["--block", "0"], ["--threshold", "0.9"])):
        run("vit", tmp_path / str(number), "--vis_attention", "--image_path", photo, *flags)
        overviews.append((tmp_path / str(number) / "vit_ssl_photo_attention.png").read_bytes())
        records.append(json.loads((tmp_path / str(number) / "vit_ssl_photo_attention.json").read_text()))
    assert len(set(overviews)) == 4
    assert records[0]["grid"] == [8, 14]
    assert [record["query_row_and_column"] for record in records] == [None, [7, 1], None, None]
    assert [record["block"] for record in records] == [2, 2, 0, 2]
    kept = [sum(head["regions_kept"] for head in records[number]["heads"]) for number in (0, 3)]
    assert kept[0] < kept[1]


@pytest.mark.slow
def test_two_processes_equal_one(folder: str, tmp_path: Path) -> None:
    flags = ["--measure_correspondence", "--vis_entropy", "--data_path", folder, "--batch_size_per_gpu", "2"]
    run("swin", tmp_path / "one", *flags)
    result = run_script("run_analysis.py", *command("swin", tmp_path / "two", *flags), processes=2)
    assert result.returncode == 0, result.stderr
    one, two = (results(tmp_path / part, "correspondence") for part in ("one", "two"))
    assert two["data"]["val_images"] == 5
    assert two["scores"]["network"] == pytest.approx(one["scores"]["network"], rel=1e-5)
    one, two = (json.loads((tmp_path / part / "swin_ssl_entropy.json").read_text()) for part in ("one", "two"))
    for ours, theirs in zip(one["bits_by_block_and_head"], two["bits_by_block_and_head"]):
        assert ours == pytest.approx(theirs, rel=1e-5)


# --------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "nothing to do; pass at least one of --vis_entropy"),
        (["--vis_attention"], "no image is named"),
        (["--vis_entropy"], "no folder of images is named"),
        (["--report", "--measure_stereo"], "no image is named"),
        (["--vis_features", "--image_path", "no.png"], "data path no.png does not exist"),
        (["--vis_attention", "--image_path", "PHOTO", "--query", "131", "2"], "--query 131 2 is outside the image"),
        (["--vis_attention", "--image_path", "PHOTO", "--block", "9"], r"--block 9 .*choose 0\.\.3"),
        (["--vis_features", "--image_path", "PHOTO", "--image_size", "4"], "--image_size 4 is less than 8"),
        (["--vis_correspondence", "--image_path", "PHOTO", "--use_saved_aug"], "--use_saved_aug"),
        (["--measure_stereo", "--pretrained_weights", "no.pth"], "'no.pth' does not exist"),
        (["--report", "--run_dir", "/no/run"], "--run_dir /no/run"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors(flags: list[str], words: str, photo: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        run("swin", tmp_path / "out", *[photo if flag == "PHOTO" else flag for flag in flags])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flags", [[], ["--vis_features"], ["--measure_correspondence"], ["--report"]])
def test_missing_flags_are_found_before_weights_are_read(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_yet(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(run_analysis, "build_context", not_yet)
    with pytest.raises(UsageError, match=r"nothing to do|is named; pass"):
        run("swin", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_the_report_has_the_number_of_images(folder: str, tmp_path: Path) -> None:
    run("swin", tmp_path / "out", "--report", "--data_path", folder, "--num_images", "2")
    assert f"<td>2 of 5 in {folder}</td>" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_damaged_images(photo: str, folder: str, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(Path(photo).read_bytes()[:100])
    with pytest.raises(UsageError, match=r"cannot read the image .*bad\.png"):
        run("swin", tmp_path / "out", "--vis_features", "--image_path", str(tmp_path / "bad.png"))
    (Path(folder) / "002.png").write_bytes(b"")
    with pytest.raises(UsageError, match=r"1 of 5 images cannot be read, more than 1 %"):
        run("swin", tmp_path / "out", "--measure_correspondence", "--data_path", folder)


# --------------------------------------------------------------------------- stereo with a known answer


def shifted_pair(size: tuple[int, int], disparity: float) -> stereo.StereoPair:
    """A picture without repetition, and what it shows moved to the left by so many pixels, known everywhere."""
    y, x = np.mgrid[: size[0], : size[1]].astype(float)

    def picture(x: np.ndarray) -> Image.Image:
        waves = [np.sin(x / 7 + x**2 / 4000 + y / 9), np.sin(x / 11 - y / 5), np.cos(x / 5 + x**2 / 3000)]
        return Image.fromarray((128 + 100 * np.stack(waves, axis=2)).round().astype(np.uint8))

    return stereo.StereoPair(picture(x), picture(x + disparity), torch.full(size, disparity))


@pytest.mark.parametrize(
    ("region", "size", "seen", "overrides"),
    [
        (8, (101, 157), (104, 160), ()),
        (32, (85, 169), (96, 160), ("MODEL.SPEC.DEPTHS", "[1,1,1,1]", "MODEL.SPEC.NUM_HEADS", "[1,1,1,1]")),
    ],
)
def test_stereo_pictures_are_resized_once(
    region: int,
    size: tuple[int, int],
    seen: tuple[int, int],
    overrides: Sequence[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of sizes that a second time would give others; raw pixels find what has moved by exactly one region."""
    scale = Scale(min(size), (region, region), (), ())
    assert scale.size_for(*size) == seen
    assert scale.size_for(*seen) != seen
    pair = shifted_pair(size, region * size[1] / seen[1])
    monkeypatch.setattr(stereo, "load_stereo", lambda: pair)
    shapes = []

    def region_features(network: Backbone, image_1CHW: torch.Tensor) -> RegionFeatures:
        shapes.append(tuple(image_1CHW.shape[2:]))
        return find_regions(network, image_1CHW)

    find_regions = correspondence.region_features
    monkeypatch.setattr(correspondence, "region_features", region_features)
    run("swin", tmp_path, "--measure_stereo", extra=overrides)
    assert shapes == [seen, seen]
    scores = results(tmp_path, "stereo")["scores"]
    rows, columns = seen[0] // region, seen[1] // region
    assert {score["regions"] for score in scores.values()} == {rows * (columns - 1)}
    assert scores["raw pixels"]["within_one"] == 100
    assert scores["raw pixels"]["median_error"] < 1e-3
    assert scores["chance"]["within_one"] < 100


# --------------------------------------------------------------------------- images in other layouts, and two of them


def test_a_folder_in_a_zip_is_measured_as_the_files(folder: str, tmp_path: Path) -> None:
    classes = tmp_path / "classes"
    (classes / "val").mkdir(parents=True)
    Path(folder).rename(classes / "val" / "a")
    zip_folders(classes, tmp_path / "zips")
    for name, flags in (("files", []), ("zips", ["--zip_mode"])):
        path = str(tmp_path / ("classes" if name == "files" else name))
        run("swin", tmp_path / f"of {name}", "--measure_correspondence", "--data_path", path, *flags)
    one, two = (results(tmp_path / f"of {name}", "correspondence") for name in ("files", "zips"))
    assert one["scores"] == two["scores"]
    assert one["data"]["val_images"] == 5


def test_a_second_image_is_compared_with_one(photo: str, folder: str, tmp_path: Path) -> None:
    run("swin", tmp_path / "out", "--vis_correspondence", "--image_path", photo, "--image_path2", photo)
    record = json.loads((tmp_path / "out" / "swin_ssl_photo_photo_correspondence.json").read_text())
    assert all(pair["first_xy"] == pair["second_xy"] for pair in record["pairs"])
    for flags, words in (
        (["--image_path", folder, "--image_path2", photo], "--image_path names 4 images"),
        (["--image_path", photo, "--image_path2", folder], "--image_path2 names 4 images"),
        (["--image_path", photo, "--image_path2", photo, "--use_saved_aug"], "--use_saved_aug and --image_path2"),
    ):
        with pytest.raises(UsageError, match=words):
            run("swin", tmp_path / "refused", "--vis_correspondence", *flags)
