"""The analysis script on every architecture: what it writes, what it refuses, and the report as a page."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import run_script, write_images
from small_networks import ARCHITECTURES, SMALL, small_network

import run_analysis
from analysis import report as pages
from utils import UsageError

PICTURES = ("--vis_attention", "--vis_correspondence", "--vis_features")


def command(name: str, output: Path, *flags: str, extra: Sequence[str] = ()) -> list[str]:
    arch, overrides, patch_size = SMALL[name]
    network = ["--arch", arch, "--cfg", f"experiments/demo/{name}_micro.yaml", "--patch_size", str(patch_size)]
    fixed = ["--device", "cpu", "--num_workers", "0", "--output_dir", str(output)]
    return [*network, *fixed, *flags, "--seed", "8", *overrides, *extra]


def run(name: str, output: Path, *flags: str, extra: Sequence[str] = ()) -> None:
    run_analysis.main(run_analysis.get_args_parser().parse_args(command(name, output, *flags, extra=extra)))


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


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "resnet"])
def test_pictures_of_every_architecture(name: str, photo: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(name, out, *PICTURES, "--image_path", photo, "--learning", "supervised")
    prefix = f"{SMALL[name].arch}_sup_photo"
    files = sorted(path.name for path in out.iterdir())
    pictures = [
        f"{prefix}_{what}" for what in ("attention.png", "attention_heads", "correspondence.png", "features.png")
    ]
    assert files == sorted([*pictures, "views_photo.pth"])
    heads = small_network(name).forward_selfattention(torch.zeros(1, 3, 64, 64))
    assert isinstance(heads, torch.Tensor)
    single = sorted(path.name for path in (out / f"{prefix}_attention_heads").iterdir())
    assert len(single) == 2 * heads.shape[1]
    assert single[0].startswith("rank01_head")
    with Image.open(out / f"{prefix}_attention_heads" / single[0]) as image:
        assert min(image.size) == 224
        assert image.width / image.height == pytest.approx(131 / 75, rel=0.1)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_measures_of_every_architecture(name: str, folder: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    measures = ["--measure_correspondence", "True", "--data_path", folder, "--batch_size_per_gpu", "2"]
    if name == "resnet":
        with pytest.raises(UsageError, match="ResNet has no attention to show"):
            run(name, out, "--vis_entropy", "--data_path", folder)
        run(name, out, *measures)
    else:
        run(name, out, *measures, "--vis_entropy")
        record = json.loads((out / f"{SMALL[name].arch}_ssl_entropy.json").read_text())["bits_by_block_and_head"]
        network = small_network(name)
        assert len(record) == sum(network.stage_depths)
        assert all(0 < bits <= 12 for heads in record for bits in heads)
    score = json.loads((out / "correspondence.json").read_text())
    assert score["images"] == 5
    assert 0 <= score["accuracy"] <= 100
    assert 0 <= score["distance"] <= 64 * 1.5


def test_stereo_beside_its_baselines(photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = small_network("swin")
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    flags = ("--measure_stereo", "--image_size", "128", "--pretrained_weights", str(tmp_path / "weights.pth"))
    run("swin", tmp_path / "out", *flags)
    scores = json.loads((tmp_path / "out" / "stereo.json").read_text())
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


def test_a_second_run_overwrites_nothing_and_can_take_the_saved_views(photo: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("swin", out, "--vis_correspondence", "--image_path", photo)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    run("swin", out, "--vis_correspondence", "--image_path", photo, "--use_saved_aug")
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    assert before.items() <= after.items()
    assert set(after) - set(before) == {"swin_ssl_photo_correspondence_2.png"}
    same = "swin_ssl_photo_correspondence"
    assert after[f"{same}_2.png"] == after[f"{same}.png"]  # the same views and the same network
    run("vit", out, "--vis_correspondence", "--image_path", photo, "--use_saved_aug", "True")
    assert len(list(out.glob("views_*.pth"))) == 1


def test_two_images_and_folders_of_images(photo: str, folder: str, tmp_path: Path) -> None:
    run("swin", tmp_path / "a", "--vis_correspondence", "--image_path", photo, "--image_path2", f"{folder}/000.png")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["swin_ssl_photo_000_correspondence.png"]
    run("swin", tmp_path / "b", "--vis_features", "--image_path", folder, "--num_images", "2")
    names = sorted(path.name for path in (tmp_path / "b").iterdir())
    assert names == ["swin_ssl_images_001_features.png", "swin_ssl_images_003_features.png"]


def test_images_of_other_channels(tmp_path: Path) -> None:
    np.save(tmp_path / "many.npy", np.random.default_rng(0).random((5, 40, 60), dtype=np.float32))
    channels = ["MODEL.SPEC.IN_CHANS", "5", "INPUT.MEAN", str([0.5] * 5), "INPUT.STD", str([0.2] * 5)]
    flags = (*PICTURES, "--measure_correspondence", "--image_path", str(tmp_path / "many.npy"))
    folder = tmp_path / "list.txt"
    folder.write_text("many.npy\n")
    run("swin", tmp_path / "out", *flags, "--data_path", str(folder), extra=channels)
    assert json.loads((tmp_path / "out" / "correspondence.json").read_text())["images"] == 1
    with pytest.raises(UsageError, match="--measure_stereo has pictures of 3 channels, this network takes 5"):
        run("swin", tmp_path / "out", "--measure_stereo", extra=channels)


def test_query_and_block_change_the_picture(photo: str, tmp_path: Path) -> None:
    overviews = []
    for number, flags in enumerate(([], ["--query", "10", "70"], ["--block", "0"], ["--threshold", "0.9"])):
        run("vit", tmp_path / str(number), "--vis_attention", "--image_path", photo, *flags)
        overviews.append((tmp_path / str(number) / "vit_ssl_photo_attention.png").read_bytes())
    assert len(set(overviews)) == 4


@pytest.mark.slow
def test_two_processes_measure_what_one_does(folder: str, tmp_path: Path) -> None:
    flags = ["--measure_correspondence", "--vis_entropy", "--data_path", folder, "--batch_size_per_gpu", "2"]
    run("swin", tmp_path / "one", *flags)
    result = run_script("run_analysis.py", *command("swin", tmp_path / "two", *flags), processes=2)
    assert result.returncode == 0, result.stderr
    one, two = (json.loads((tmp_path / part / "correspondence.json").read_text()) for part in ("one", "two"))
    assert (two.pop("image_size"), two["images"]) == (one.pop("image_size"), 5)
    assert two == pytest.approx(one, rel=1e-5)
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
        (["--vis_features", "--image_path", "no.png"], "data path 'no.png' does not exist"),
        (["--vis_attention", "--image_path", "PHOTO", "--query", "131", "2"], "--query 131 2 is outside the image"),
        (["--vis_attention", "--image_path", "PHOTO", "--block", "9"], r"--block 9 is not there; choose 0\.\.3"),
        (["--vis_attention", "--image_path", "PHOTO", "--threshold", "0"], "--threshold 0.0"),
        (["--vis_features", "--image_path", "PHOTO", "--image_size", "4"], "--image_size 4 is below one region"),
        (["--vis_correspondence", "--image_path", "PHOTO", "--use_saved_aug"], "--use_saved_aug finds no"),
        (["--measure_stereo", "--pretrained_weights", "no.pth"], "'no.pth' does not exist"),
        (["--measure_stereo", "--batch_size_per_gpu", "0"], "--batch_size_per_gpu 0"),
        (["--report", "--run_dir", "/no/run"], "--run_dir /no/run is no folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors(flags: list[str], words: str, photo: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        run("swin", tmp_path / "out", *[photo if flag == "PHOTO" else flag for flag in flags])
    assert "\n" not in str(caught.value)


def test_damaged_images(photo: str, folder: str, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(Path(photo).read_bytes()[:100])
    with pytest.raises(UsageError, match=r"cannot read the image .*bad\.png"):
        run("swin", tmp_path / "out", "--vis_features", "--image_path", str(tmp_path / "bad.png"))
    (Path(folder) / "002.png").write_bytes(b"")
    with pytest.raises(UsageError, match=r"1 of 5 images cannot be read, more than 1 %"):
        run("swin", tmp_path / "out", "--measure_correspondence", "--data_path", folder)


# --------------------------------------------------------------------------- the report


class Page(HTMLParser):
    """Tags, attributes and text of a page; complains where tags do not match."""

    VOID = ("meta", "img", "line", "circle", "polyline")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.opened == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.opened.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.opened.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """What a training run and its evaluations leave behind, the last line of the log cut off by a kill."""
    folder = tmp_path / "run"
    (folder / "linear").mkdir(parents=True)
    lines = [
        {"epoch": e, "train_loss": 4.0 - e, "train_lr": 0.1, "train_wd": 0.04, "images_per_s": 39.0} for e in range(3)
    ]
    (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"epoch": 3, "train_lo')
    knn = {"network": {"20": {"top1": 61.25, "top5": 93.5, "per_class": {"cat": 12.34}}}}
    (folder / "knn.json").write_text(json.dumps(knn))
    linear = {"protocol": "published", "table": [{"lr": 0.001, "best_acc1": 71.75}, {"lr": 0.01, "best_acc1": 70.5}]}
    (folder / "linear" / "results.json").write_text(json.dumps(linear | {"run": {"digest": "c0ffee"}}))
    return folder


def make_report(photo: str, run_dir: Path, out: Path) -> Path:
    flags = ("--report", "--measure_stereo", "--image_size", "64", "--image_path", photo, "--run_dir", str(run_dir))
    run("swin", out, *flags)
    return out / "report.html"


def test_the_report_has_all_parts_and_needs_nothing_else(photo: str, run_dir: Path, tmp_path: Path) -> None:
    text = make_report(photo, run_dir, tmp_path / "out").read_text(encoding="utf-8")
    page = Page(text)
    words = " ".join(page.words)
    for heading in ("Report on run", "Training", "k-NN", "Linear probe", "Correspondence in a stereo pair", "Attention",
                    "Correspondence of two views", "Region features", "Entropy of attention"):  # fmt: skip
        assert heading in page.words, heading
    for value in ("61.25", "93.5", "71.75", "70.5", "protocol: published", "raw pixels", "chance"):
        assert value in words, value
    assert "12.34" not in words  # accuracies of single classes are in the file
    assert "c0ffee" not in words
    tags = [tag for tag, _ in page.tags]
    assert tags.count("img") == 4
    assert tags.count("polyline") == 4  # loss, learning rate, weight decay, speed
    assert tags.count("circle") == 4 * 3  # the damaged line is left out
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe"}
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "://" not in text
    assert "url(" not in text
    assert "@import" not in text


def test_a_report_without_a_run(photo: str, tmp_path: Path) -> None:
    run("resnet", tmp_path / "out", "--report", "--image_path", photo)
    run("resnet", tmp_path / "out", "--report", "--image_path", photo)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "report_2.html"]
    words = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8")).words
    assert "Region features" in words
    assert not {"Training", "k-NN", "Linear probe", "Attention"} & set(words)


def test_charts_place_their_points() -> None:
    chart = pages.line_chart("Loss", {"a": [(0, 0.0), (10, 5.0)], "b": [(5, 2.5)]}, width=500, height=260)
    assert 'points="64.0,224.0 488.0,16.0"' in chart
    assert 'points="276.0,120.0"' in chart
    for flat in ([(0, 0.0)], [(3, 7.0), (4, 7.0)], [(0, -1.0), (1, -2.0)], [(0, 1e-7)]):
        assert "nan" not in pages.line_chart("flat", {"a": flat})


def test_titles_are_escaped(tmp_path: Path) -> None:
    text = pages.build_report("<b>", {"a&b": "<i>"}, tmp_path, tmp_path, {})
    assert Page(text).words.count("<b>") == 2
    assert "<i>" not in text


def test_a_log_of_a_resumed_run_counts_each_epoch_once(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text(
        '{"epoch": 1, "train_loss": 2}\n{"epoch": 0}\n[]\n{"epoch": 1, "train_loss": 1}\n'
    )
    assert pages.read_log(tmp_path / "log.txt") == [{"epoch": 0}, {"epoch": 1, "train_loss": 1}]
    assert pages.read_log(tmp_path / "none.txt") == []


@pytest.mark.slow
def test_a_browser_shows_the_report(photo: str, run_dir: Path, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH: the report was not opened in a browser")
    path = make_report(photo, run_dir, tmp_path / "out")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    shot = tmp_path / "shot.png"
    subprocess.run([browser, *flags, f"--screenshot={shot}", "--window-size=1200,2000", path.as_uri()],
                   check=True, capture_output=True, timeout=120)  # fmt: skip
    with Image.open(shot) as image:
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 1000  # pictures, and not a blank page
