"""The report: what it says, and that a browser shows it without asking for anything else."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers.pages import Page
from helpers.small_networks import SMALL
from PIL import Image

import run_analysis
from analysis import report as pages
from analysis import run_files
from analysis.curves import COLLAPSE, CURVES, draw_curves, titles_of_keys
from evaluation.results import Results, save_results

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def write_photo(folder: Path) -> str:
    """Not square, and no multiple of anything."""
    y, x = np.mgrid[:75, :131]
    pixels = np.stack([x, y * 1.7, 128 + 100 * np.sin(x / 9) * np.cos(y / 7)], axis=2)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "photo.png")
    return str(folder / "photo.png")


def write_run(folder: Path) -> None:
    """What a training run and its evaluations leave behind, the last line of the log cut off by a kill."""
    (folder / "linear").mkdir(parents=True)
    same = {"train_lr": 0.1, "train_wd": 0.04, "images_per_s": 39.0, "train_view/kl": 0.5, "train_region/kl": 0.25}
    lines = [{"epoch": e, "train_loss": 4.0 - e, "knn_top1": 30.0 + e, **same} for e in range(3)]
    (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"epoch": 3, "train_lo')
    knn = {"network, 20-NN": {"top1": 61.25, "top5": 93.5}, "raw pixels, 20-NN": {"top1": 25.0, "top5": 93.0}}
    cells = torch.tensor([[0, 0, 39], [0, 1, 1], [1, 0, 30], [1, 1, 10]])
    confusions = {"network, 20-NN": cells, "raw pixels, 20-NN": cells.flip(0)}
    save_results(folder, Results("knn", {"arch": "swin"}, {"val_images": 80}, {}, knn), confusions, ["cat", "dog"])
    linear = {"lr0.001_n4": {"lr": 0.001, "top1": 71.75}, "lr0.01_n4": {"lr": 0.01, "top1": 70.5}}
    protocol = {"name": "published"}
    save_results(folder / "linear", Results("linear", {"digest": "c0ffee"}, {}, protocol, linear))
    run = {"command": ["main_esvit.py", "--arch", "swin", "--aa", ""], "seed": 7, "packages": {"torch": "2.99"}}
    (folder / "run.json").write_text(json.dumps(run))
    Image.new("RGB", (30, 20), (9, 8, 7)).save(folder / "crops.png")


def make_report(name: str, out: Path, *flags: str) -> Path:
    """The report on a small network with random weights."""
    arch, overrides, patch_size = SMALL[name]
    network = ["--arch", arch, "--cfg", f"experiments/demo/{name}_micro.yaml", "--patch_size", str(patch_size)]
    command = [*network, "--device", "cpu", "--output_dir", str(out), "--report", "--random_weights", *flags]
    command += ["--seed", "8", *overrides]
    run_analysis.main(run_analysis.get_args_parser().parse_args(command))
    return out / "report.html"


@pytest.fixture(scope="module")
def full_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with all parts, for tests that read it."""
    folder = tmp_path_factory.mktemp("report")
    write_run(folder / "run")
    flags = ("--image_size", "64", "--image_path", write_photo(folder), "--run_dir", str(folder / "run"))
    return make_report("swin", folder / "out", "--measure_stereo", *flags)


# --------------------------------------------------------------------------- as text


def test_the_report_has_all_parts(full_report: Path) -> None:
    page = Page(full_report.read_text(encoding="utf-8"))
    for heading in ("Report on run", "Training", "Signs of a collapse", "k-NN",
                    "Linear probe", "Correspondence in a stereo pair", "Attention: photo",
                    "Correspondence of two views: photo", "Region features: photo", "Entropy of attention",
                    "Training images", "Command"):  # fmt: skip
        assert heading in page.words, heading
    words = " ".join(page.words)
    for value in ("61.25", "93.50", "71.75", "70.50", "0.001", "protocol: published", "raw pixels", "chance", "top-1, %",
                  "network, 20-NN", "loss 4 to 2", "2.99"):  # fmt: skip
        assert value in words, value
    assert "python main_esvit.py \\\n    --arch swin \\\n    --aa ''" in page.words
    assert "val images: 80" in words
    assert "self-supervised" in words
    assert f"1 of 1 in {full_report.parent.parent / 'photo.png'}" in page.words
    assert page.words[(found := page.words.index("dog")) : found + 4] == ["dog", "40", "25.00", "cat (30)"]
    assert page.words[(found := page.words.index("cat")) : found + 4] == ["cat", "40", "97.50", "dog (1)"]
    assert "c0ffee" not in words


def test_the_pictures_are_whole_and_inside_the_page(full_report: Path) -> None:
    page = Page(full_report.read_text(encoding="utf-8"))
    images = page.images()
    kinds = [media_type for media_type, _ in images]
    # loss, k-NN, learning rate, weight decay, speed; KL divergence; confusion matrix; entropy
    assert kinds.count("image/svg+xml") == 5 + 1 + 1 + 1
    assert kinds.count("image/png") == 1  # the crops
    assert (
        kinds.count("image/jpeg") == (1 + 1 + 2) + 1 + 3
    )  # color bar, attention of two heads, correspondence, features
    sizes = [attributes for tag, attributes in page.tags if tag == "img"]
    for (media_type, content), attributes in zip(images, sizes):
        assert attributes["alt"]
        if media_type == "image/svg+xml":
            assert any(f">{axis}</text>".encode() in content for axis in ("epoch", "layer", "classified as"))
            continue
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            assert (str(image.width), str(image.height)) == (attributes["width"], attributes["height"])
    loss = next(content for media_type, content in images if media_type == "image/svg+xml").decode()
    assert "2.0</text>" in loss
    assert "4.0</text>" in loss


def test_the_page_has_no_external_resources(full_report: Path) -> None:
    text = full_report.read_text(encoding="utf-8")
    for tag, attributes in Page(text).tags:
        assert tag not in {"script", "link", "iframe", "object"}
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#"))
    assert "://" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert f'http-equiv="Content-Security-Policy" content="{pages.POLICY}"' in text


def test_a_report_without_a_run(tmp_path: Path) -> None:
    photo = write_photo(tmp_path)
    for _ in range(2):
        make_report("resnet", tmp_path / "out", "--image_path", photo)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "report_2.html"]
    words = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8")).words
    assert "Region features: photo" in words
    absent = {"Training", "Signs of a collapse", "k-NN", "Linear probe", "Attention: photo", "Command", "Commands"}
    assert not absent & set(words)


def test_titles_are_escaped(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"command": ["main_esvit.py", "--data_path", "</pre><script>"]}))
    figure = pages.photo(Image.new("RGB", (2, 2)), '"><u>')
    sections = [pages.Section("<s>", "<em>", [figure])]
    text = pages.build_report("<b>", {"a&b": "<i>"}, tmp_path, tmp_path, sections)
    page = Page(text)
    assert page.words.count("<b>") == 2  # title and heading
    for tag, _ in page.tags:
        assert tag not in {"b", "i", "s", "u", "em", "script"}


def test_a_log_of_a_resumed_run_counts_each_epoch_once(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text(
        '{"epoch": 1, "train_loss": 2}\n{"epoch": 0}\n[]\n{"epoch": 1, "train_loss": 1}\n'
    )
    assert run_files.read_log(tmp_path / "log.txt") == [{"epoch": 0}, {"epoch": 1, "train_loss": 1}]
    assert run_files.read_log(tmp_path / "none.txt") == []


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"command": 3, "packages": []}'])
def test_damaged_records_are_omitted(content: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(content)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "knn.json").write_text(content)
    assert pages.run_facts(tmp_path) == {}
    assert pages.commands(pages.history(tmp_path).starts) == []
    assert list(pages.scores(tmp_path, tmp_path)) == []


def write_starts(folder: Path, *starts: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    for number, start in enumerate(starts, start=1):
        suffix = "" if number == 1 else f"_{number}"
        (folder / f"run{suffix}.json").write_text(json.dumps({"command": ["main_esvit.py"], **start}))


def test_commands_of_a_resumed_run(tmp_path: Path) -> None:
    """Each of them once, with the time of all its starts, and what its starts differ in."""
    settings = [("2", 1, "a", 0.0), ("2", 1, "a", 0.25), ("4", 8, "b", 2.0)]
    write_starts(tmp_path, *({"command": ["main_esvit.py", "--epochs", epochs], "world_size": processes, "git": revision,
                              "seed": 0, "started": f"at {number}", "epochs_done": done}
                             for number, (epochs, processes, revision, done) in enumerate(settings)))  # fmt: skip
    assert pages.commands(pages.history(tmp_path).starts) == [
        "# at 0\n# at 1, after 0.25 epochs\npython main_esvit.py \\\n    --epochs 2",
        "# at 2, after 2 epochs\npython main_esvit.py \\\n    --epochs 4",
    ]
    assert pages.run_facts(tmp_path) == {
        "started": "at 0, then at 1, then at 2", "revision": "a, then b", "seed": "0", "processes": "1, then 8"}  # fmt: skip
    page = pages.build_report("title", {}, tmp_path, tmp_path, [])
    assert page.index("--epochs 2") < page.index("--epochs 4")


def test_a_run_that_continues_another_shows_both(tmp_path: Path) -> None:
    """The other one up to the checkpoint, and neither for a folder that is gone."""
    write_starts(tmp_path / "a", {"seed": 1}, {"seed": 2, "epochs_done": 1.5}, {"seed": 3, "epochs_done": 2.5})
    (tmp_path / "a" / "checkpoint0001.pth").touch()
    source = {"pretrained_weights_ckpt": str(tmp_path / "a" / "checkpoint0001.pth"), "out_dim": 64}
    write_starts(tmp_path / "b", {"seed": 4, "epochs_done": 2.0, "args": source})
    for name, epochs in (("a", range(4)), ("b", range(2, 5))):
        lines = [json.dumps({"epoch": epoch, "train_loss": 1.0 if name == "a" else 2.0}) for epoch in epochs]
        (tmp_path / name / "log.txt").write_text("\n".join(lines))
    found = pages.history(tmp_path / "b")
    assert [start["seed"] for start in found.starts] == [1, 2, 4]
    assert [(epoch["epoch"], epoch["train_loss"]) for epoch in found.log] == [(0, 1), (1, 1), (2, 2), (3, 2), (4, 2)]
    assert (found.resumed, found.prototypes) == ([1.5, 2.0], 64)
    (tmp_path / "a" / "checkpoint0001.pth").unlink()
    assert [start["seed"] for start in pages.history(tmp_path / "b").starts] == [4]


def test_a_run_that_continues_its_own_checkpoint_ends(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pth").touch()
    args = {"pretrained_weights_ckpt": str(tmp_path / "checkpoint.pth")}
    write_starts(tmp_path, {"epochs_done": 2.0, "args": args}, {"epochs_done": 3.0, "args": args})
    assert pages.history(tmp_path).resumed == [2.0, 3.0]


@pytest.mark.parametrize("name", ["crops.png", "log.txt", "run.json", "results/knn.json"])
@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n" + bytes(99), b"\xff\xfe{", b"[" * 10**5, b""])
def test_unreadable_files_are_omitted(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / name).write_bytes(content)
    page = pages.build_report("title", {}, tmp_path, tmp_path, [])
    assert "<h2>" not in page
    assert "<nav" not in page


def test_scores_of_all_folders_have_different_headings(tmp_path: Path) -> None:
    for number, place in enumerate(("knn", "a/knn", "b/knn", "out/stereo", "stereo", "b/new")):
        folder = (tmp_path / place).parent
        folder.mkdir(exist_ok=True)
        save_results(folder, Results(Path(place).name, {}, {}, {}, {"network": {"number": number}}))
    found = list(pages.scores(tmp_path, tmp_path / "out"))
    assert [(heading, record["scores"]["network"]["number"]) for heading, _, record in found] == [
        ("k-NN", 0), ("k-NN (a)", 1), ("k-NN (b)", 2),
        ("Correspondence in a stereo pair", 3), (f"Correspondence in a stereo pair ({tmp_path.name})", 4),
        ("new", 5)]  # fmt: skip


def test_a_result_file_of_an_earlier_version_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("esvit"), "propagate", True)
    (tmp_path / "results.json").write_text('{"evaluation": "k-NN", "scores": {}}')
    assert list(pages.scores(tmp_path, tmp_path)) == []
    assert str(tmp_path / "results.json") in caplog.text


def test_curve_of_segmentation_has_a_plot_of_its_own() -> None:
    log: list[dict[str, Any]] = [{"epoch": 0}, {"epoch": 1, "test_miou": 20.0}, {"epoch": 2, "test_miou": 25.0}]
    assert [curves.caption for curves in draw_curves(log, CURVES)] == ["mIoU 20 to 25"]
    assert titles_of_keys()["test_miou"] == "mIoU, %"  # in a comparison of runs


def test_curves_omit_nonfinite_values() -> None:
    log: list[dict[str, Any]] = [
        {"epoch": 0, "train_loss": float("nan"), "train_lr": None},
        {"epoch": 1, "train_loss": float("inf"), "train_wd": 0.25},
    ]
    assert [curves.caption for curves in draw_curves(log, CURVES)] == ["weight decay 0.25"]


def lines_of(figure: Any) -> tuple[dict[str, list[float]], list[float], list[float]]:
    """The curves by name, the places of vertical lines, and the values of horizontal ones."""
    (axes,) = figure.axes
    named = {line.get_label(): list(map(float, line.get_ydata())) for line in axes.lines if len(line.get_xdata()) != 2}
    ends = [line for line in axes.lines if len(line.get_xdata()) == 2]
    upright = [float(line.get_xdata()[0]) for line in ends if line.get_xdata()[0] == line.get_xdata()[1]]
    return named, upright, [float(line.get_ydata()[0]) for line in ends if line.get_ydata()[0] == line.get_ydata()[1]]


def test_curves_of_the_collapse_monitor_and_of_udi() -> None:
    """Each level and each term is a curve of its own; ln K is a line, and so is each place where the run went on."""
    terms = {f"train_{view}_{level}": number for number, (view, level) in enumerate(
        (view, level) for level in ("cl", "mcl", "pch") for view in "gl")}  # fmt: skip
    keys = ("teacher_entropy", "kl", "prototypes_used", "feature_std", "feature_rank")
    statistics = {f"train_{level}/{key}": 10.0 * number + place for number, level in enumerate(("cls", "cls+", "patch"))
                  for place, key in enumerate(keys)}  # fmt: skip
    log = [{"epoch": epoch, "train_loss": 2.0, "knn_top1": 50.0, "knn_top1_student": 60.0, **terms, **statistics}
           for epoch in range(3)]  # fmt: skip
    loss, of_terms, knn = (lines_of(curves.figure) for curves in draw_curves(log, CURVES, [1.0, 2.25], 64))
    assert loss == ({"loss": [2.0] * 3}, [0.5, 1.75], [pytest.approx(np.log(64))])
    assert sorted(of_terms[0].values()) == [[value] * 3 for value in range(6)]
    assert knn == ({"teacher": [50.0] * 3, "student": [60.0] * 3}, [0.5, 1.75], [])
    drawn = [lines_of(curves.figure) for curves in draw_curves(log, COLLAPSE, [], 64)]
    names = ["class token", "second token", "patches"]
    assert [each[0] for each in drawn] == [
        {name: [10.0 * number + place] * 3 for number, name in enumerate(names)} for place in range(5)
    ]
    assert [each[2] for each in drawn] == [[pytest.approx(np.log(64))], [], [], [], []]


def test_contents_link_to_every_section(full_report: Path) -> None:
    page = Page(full_report.read_text(encoding="utf-8"))
    links = [(attributes["href"] or "").removeprefix("#") for tag, attributes in page.tags if tag == "a"]
    assert links == [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    assert len(set(links)) == len(links) > 5


# --------------------------------------------------------------------------- scores


def marked(scores: dict[str, Any]) -> list[str]:
    """The scores that a table marks, by line."""
    parts = pages.table({"scores": scores}).split("<p class")[0].split("<mark>")[1:]
    return [part.partition("</mark>")[0] for part in parts]


def test_the_best_scores_are_marked() -> None:
    """The largest, or the smallest error; equal ones all; nothing in a column of one value or of settings."""
    rows = {
        "a": {"top1": 70.0, "top5": 90.0, "lr": 1.0},
        "b": {"top1": 80.0, "top5": 90.0, "lr": 2.0},
        "c": {"top1": 80.0},
    }
    assert marked(rows) == ["80.00", "80.00"]
    assert marked({"a": {"within_one": 7.5, "median_error": 3.5}, "b": {"within_one": 2.5, "median_error": 9.5}}) == [
        "7.50", "3.50"]  # fmt: skip
    assert marked({"a": {"miou": 7.5, "class_accuracy": 3.5}, "b": {"miou": 2.5, "class_accuracy": 9.5}}) == [
        "7.50", "9.50"]  # fmt: skip
    assert marked({"a": {"top1": 70.0}}) == marked({"a": {"top1": None}, "b": {"top1": 1.0}}) == []


def test_number_format_of_columns() -> None:
    rows = {"a": {"share": 7.5, "lr": 0.001, "n": 3, "ok": True}, "b": {"share": 10, "lr": 1.0, "words": "<x>"}}
    page = Page(pages.table({"scores": rows}))
    assert page.words == [
        *("share", "learning rate", "n", "ok", "words"),
        *("a", "7.50", "0.001", "3", "yes"),
        *("b", "10.00", "1", "<x>"),
    ]


def test_facts_and_labels_of_a_table() -> None:
    """For fewer than five classes the labels name the actual number."""
    protocol = {"train_aug": None, "crop_ratio": 0.875, "half": False, "image_size": [32, 48], "top5_is": "top3"}
    record = {"data": {"train_images": 1281167}, "protocol": protocol, "scores": {"x": {"last_top5": 50.0}}}
    assert Page(pages.table(record)).words == [
        "train images: 1281167; center crop: 0.875; half: no; image size in pixels: 32, 48",
        *("last top-3, %", "x", "50.00"),
    ]
    assert Page(pages.table({"scores": {"x": {"top5": 1.5}}})).words == ["top-5, %", "x", "1.50"]


def test_figures_are_in_even_rows() -> None:
    """Of 224 pixels five fit beside each other: six are three and three, eleven four, four and three."""
    figures = [pages.photo(Image.new("RGB", (224, 8)), str(number)) for number in range(11)]
    for count, lengths in ((1, [1]), (5, [5]), (6, [3, 3]), (11, [4, 4, 3])):
        text = pages.build_report("", {}, Path("none"), Path("none"), [pages.Section("", "", figures[:count])])
        rows = text.split('<div class="figures">')[1:]
        assert [row.count("<figure ") for row in rows] == lengths
        assert [attributes["alt"] for tag, attributes in Page(text).tags if tag == "img"] == [
            str(number) for number in range(count)
        ]


# --------------------------------------------------------------------------- in a browser


class Shown(NamedTuple):
    """What a browser makes of a page."""

    images: list[list[float]]  # natural width and height, width on the page
    headings: list[str]
    rows: int
    requests: list[str]  # names of all resources that were asked for
    width: int  # of everything on the page, in pixels
    complaints: list[str]  # the console's


LOOK = """<script>
window.addEventListener("load", () => {
  document.documentElement.dataset.found = JSON.stringify({
    images: [...document.images].map(i => [i.naturalWidth, i.naturalHeight, i.getBoundingClientRect().width]),
    headings: [...document.querySelectorAll("h2")].map(heading => heading.textContent),
    rows: document.querySelectorAll("tbody tr").length,
    requests: performance.getEntriesByType("resource").map(entry => entry.name).filter(name => !name.startsWith("data:")),
    width: document.documentElement.scrollWidth,
  });
});
</script>"""


def browse(folder: Path, page: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Open a page in a browser with a new profile and no way to the network."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is on PATH: the report was not opened in a browser")
    (folder / "page.html").write_text(page, encoding="utf-8")
    command = [
        browser,
        *QUIET,
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={folder / 'profile'}",
        *flags,
    ]
    home = os.environ | {"HOME": str(folder)}
    url = (folder / "page.html").as_uri()
    done = subprocess.run([*command, url], env=home, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def shown(folder: Path, page: str, width: int = 1280) -> Shown:
    """Open a copy of a page that tells what it holds, allowed to run this one script."""
    folder.mkdir()
    policy = 'http-equiv="Content-Security-Policy" content="'
    page = page.replace(policy, f"{policy}script-src 'unsafe-inline'; ").replace("</body>", f"{LOOK}</body>")
    flags = ("--dump-dom", "--virtual-time-budget=20000", "--enable-logging=stderr", f"--window-size={width},900")
    done = browse(folder, page, *flags)
    (found,) = [dict(attributes)["data-found"] for tag, attributes in Page(done.stdout).tags if tag == "html"]
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Shown(**json.loads(found or "{}"), complaints=complaints)


@pytest.mark.slow
def test_browser_shows_every_picture_without_requests(full_report: Path, tmp_path: Path) -> None:
    text = full_report.read_text(encoding="utf-8")
    seen = shown(tmp_path / "wide", text)
    assert len(seen.images) == 17
    for (natural, _, _), attributes in zip(seen.images, (a for tag, a in Page(text).tags if tag == "img")):
        assert natural == pytest.approx(int(attributes["width"] or 0), abs=1)
    assert seen.headings[0] == "Training"
    assert len(seen.headings) == 11
    assert (
        seen.rows == 7 + 2 + 2 + 2 + 3
    )  # facts, k-NN, its classes, linear, stereo without an untrained network beside it
    assert seen.requests == []
    assert seen.complaints == []
    assert seen.width == 1280


@pytest.mark.slow
def test_the_report_fits_on_a_narrow_screen(full_report: Path, tmp_path: Path) -> None:
    seen = shown(tmp_path / "narrow", full_report.read_text(encoding="utf-8"), width=500)
    assert seen.width == 500  # wide tables move inside their frames, the page does not
    assert max(width for _, _, width in seen.images) <= 500


@pytest.mark.slow
def test_browser_checks_can_fail(tmp_path: Path) -> None:
    """The checks above can fail."""
    figures = [
        pages.photo(Image.new("RGB", (40, 30)), "whole"),
        pages.Figure(b"no picture", "image/png", (5, 5), "broken"),
    ]
    text = pages.build_report("title", {}, tmp_path, tmp_path, [pages.Section("one", "", figures)])
    asking = text.replace(
        "</section>", '<img src="http://127.0.0.1:9/x.png" alt="x" style="width: 3000px; max-width: none"></section>'
    )
    forbidden = shown(tmp_path / "a", asking)
    assert [natural for natural, _, _ in forbidden.images] == [40, 0, 0]
    assert any("Content Security Policy" in line for line in forbidden.complaints)
    assert forbidden.width > 3000
    allowed = shown(tmp_path / "b", asking.replace("img-src data:", "img-src * data:"))
    assert allowed.requests == ["http://127.0.0.1:9/x.png"]


@pytest.mark.slow
def test_screenshot_is_not_blank(full_report: Path, tmp_path: Path) -> None:
    shot = tmp_path / "shot.png"
    browse(tmp_path, full_report.read_text(encoding="utf-8"), f"--screenshot={shot}", "--window-size=1280,3500")
    with Image.open(shot) as image:
        assert image.size == (1280, 3500)
        pixels = np.asarray(image.convert("RGB")).astype(int)
    colored = (pixels.max(axis=2) - pixels.min(axis=2) > 60).mean()
    assert 0.02 < colored < 0.8  # plots and photographs on white
    assert (pixels[:40] == 255).all()
