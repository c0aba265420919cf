"""Bad input in every layout: decoded as a person would expect or reported by name; no run ends, nothing turns black.

`hypothesis` damages encoded images, indices, maps and archives at random places.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.image_files import encoded, whole, write_tsv
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from data.datasets import LAYOUTS, ImageDataset, Sample, build_dataset
from data.decode import decode_image
from data.layouts import published
from data.layouts.shards import build_stream
from data.layouts.tsv import index_lines
from data.loader import build_train_loader
from utils import UsageError

GOOD = 200  # gray value of the readable images
FUZZ = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def save(image: Image.Image, kind: str, **options: object) -> bytes:
    return encoded(lambda buffer: image.save(buffer, kind, **options))


def good(number: int) -> bytes:
    return save(Image.new("RGB", (9, 7), (GOOD, GOOD, number)), "PNG")


def write_layout(root: Path, layout: str, images: list[tuple[str, bytes]]) -> Path:
    """Images (name, bytes) of class 0 in a layout."""
    root.mkdir(parents=True, exist_ok=True)
    if layout == "files":
        (root / "train" / "0").mkdir(parents=True)
        for name, content in images:
            (root / "train" / "0" / name).write_bytes(content)
    elif layout == "zip":
        with zipfile.ZipFile(root / "train.zip", "w") as archive:
            for name, content in images:
                archive.writestr(name, content)
        (root / "train_map.txt").write_text("".join(f"train.zip@/{name}\t0\n" for name, _ in images))
    elif layout == "tsv":
        write_tsv(root / "train.tsv", [(name, "0", content) for name, content in images])
    elif layout == "webvision1":
        (root / "info").mkdir()
        for name, content in images:
            (root / name).write_bytes(content)
        (root / published.WEBVISION_LISTS[0]).write_text("".join(f"{name} 0\n" for name, _ in images))
    elif layout == "openimages_v4":
        tsv = write_tsv(root / "train.tsv", [(name, "", content) for name, content in images])
        (root / published.OPENIMAGES_INDEX).write_text("".join(f"{begin}\n" for begin in index_lines(tsv)))
        (root / published.OPENIMAGES_LABELS).write_text("".join(f'{name}\t["0"]\n' for name, _ in images))
        (root / published.OPENIMAGES_CLASSES).write_text("0\n")
    else:
        with tarfile.open(root / "train-0.tar", "w") as tar:
            for name, content in images:
                for member, part in ((name, content), (Path(name).stem + ".cls", b"0")):
                    info = tarfile.TarInfo(member)
                    info.size = len(part)
                    tar.addfile(info, io.BytesIO(part))
    return root


def build(root: Path, layout: str) -> ImageDataset:
    return build_dataset(root, "train", whole, need_labels=True, layout=layout)


def streamed(root: Path) -> list[Sample]:
    """All samples of shards as training reads them, in the order of the images."""
    samples = list(build_stream(str(root), whole))
    assert sorted(sample.image_index for sample in samples) == list(range(len(samples)))
    return sorted(samples, key=lambda sample: sample.image_index)


def color_of(sample: Sample) -> list[int]:
    return [round(float(value)) for value in sample.views[0].mean((1, 2)) * 255]


# --------------------------------------------------------------------------- what a person would expect

RED = (220, 30, 40)


def palette() -> bytes:
    image = Image.new("RGB", (9, 7), RED).convert("P", palette=Image.Palette.ADAPTIVE)
    return save(image, "PNG")


def sixteen_bit() -> bytes:
    return save(Image.fromarray(np.full((7, 9), 32896, dtype=np.uint16)), "PNG")


def transparent(kind: str, mode: str = "RGBA") -> bytes:
    return save(Image.new("RGBA", (9, 7), (0, 0, 0, 0)).convert(mode), kind)


EXPECTED: dict[str, tuple[bytes, tuple[int, int, int], int]] = {  # bytes, color, tolerance
    "cmyk.jpg": (save(Image.new("CMYK", (9, 7), (0, 255, 255, 0)), "JPEG"), (255, 0, 0), 4),
    "palette.png": (palette(), RED, 0),
    "sixteen.png": (sixteen_bit(), (128, 128, 128), 0),
    "gray.jpg": (save(Image.new("L", (9, 7), 77), "JPEG"), (77, 77, 77), 1),
    "bits.png": (save(Image.new("1", (9, 7), 1), "PNG"), (255, 255, 255), 0),
    "alpha.png": (transparent("PNG"), (255, 255, 255), 0),
    "gray_alpha.png": (transparent("PNG", "LA"), (255, 255, 255), 0),
    "half.png": (save(Image.new("RGBA", (9, 7), (0, 0, 0, 128)), "PNG"), (127, 127, 127), 1),
    "opaque.png": (save(Image.new("RGBA", (9, 7), (*RED, 255)), "PNG"), RED, 0),
    "key.png": (save(Image.new("RGB", (9, 7), (0, 0, 0)), "PNG", transparency=(0, 0, 0)), (255, 255, 255), 0),
    "wrong_ending.jpg": (save(Image.new("RGB", (9, 7), RED), "PNG"), RED, 0),
    "wrong_ending.npy": (save(Image.new("RGB", (9, 7), RED), "PNG"), RED, 0),
    "array.png": (encoded(lambda b: np.save(b, np.full((7, 9, 3), 99, dtype=np.uint8))), (99, 99, 99), 0),
    "black.png": (save(Image.new("RGB", (9, 7)), "PNG"), (0, 0, 0), 0),  # where it truly is
    "animated.gif": (save(Image.new("RGB", (9, 7), RED), "GIF"), RED, 0),
    "picture.webp": (save(Image.new("RGB", (9, 7), RED), "WEBP", lossless=True), RED, 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unusual_images_are_what_a_person_sees(tmp_path: Path, layout: str) -> None:
    images = sorted((name, content) for name, (content, _, _) in EXPECTED.items() if not name.endswith(".gif"))
    keys = [(f"{number:03}{Path(name).suffix}", content) for number, (name, content) in enumerate(images)]
    root = write_layout(tmp_path, layout, keys)
    dataset = build(root, layout)
    samples = [dataset[i] for i in range(len(dataset))]
    for found in (samples, streamed(root)) if layout == "shards" else (samples,):
        for sample, (name, _) in zip(found, images, strict=True):
            _, color, tolerance = EXPECTED[name]
            assert sample.failures == (), name
            assert sample.label == 0 or layout == "openimages_v4"
            assert all(abs(a - b) <= tolerance for a, b in zip(color_of(sample), color)), (name, color_of(sample))


@pytest.mark.parametrize("name", sorted(EXPECTED.keys() - {"array.png"}))
@pytest.mark.parametrize("in_chans", [1, 3])
def test_unusual_images_decode_to_the_mode_that_is_wanted(name: str, in_chans: int) -> None:
    image = decode_image(EXPECTED[name][0], in_chans)
    assert isinstance(image, Image.Image)
    assert (image.mode, image.size) == ({1: "L", 3: "RGB"}[in_chans], (9, 7))


UNDO: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: lambda a: np.rot90(a, 3),
}  # fmt: skip
SCENE = np.full((32, 48, 3), 255, dtype=np.uint8)  # upright: a red corner at the top left, wider than high
SCENE[:16, :16] = (255, 0, 0)


def photograph(orientation: int) -> bytes:
    """The scene as a camera stores it that was held in some way, with a note of that."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return save(Image.fromarray(np.ascontiguousarray(UNDO[orientation](SCENE))), "JPEG", exif=exif, quality=95)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_photographs_are_turned_as_their_camera_noted(tmp_path: Path, layout: str) -> None:
    root = write_layout(tmp_path, layout, [(f"{orientation}.jpg", photograph(orientation)) for orientation in UNDO])
    dataset = build(root, layout)
    for sample in [dataset[i] for i in range(8)] + (streamed(root) if layout == "shards" else []):
        pixels = sample.views[0].permute(1, 2, 0).numpy() * 255
        assert pixels.shape == SCENE.shape
        assert np.abs(pixels - SCENE).mean() < 5
        assert sample.failures == ()


# --------------------------------------------------------------------------- what is reported


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 40000 x 40000 pixels."""
    content = bytearray(save(Image.new("1", (8, 8)), "PNG"))
    content[16:24] = (40000).to_bytes(4, "big") * 2
    import zlib

    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


NOISE = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
JPEG = save(Image.fromarray(NOISE), "JPEG")
BAD = {
    "truncated.jpg": JPEG[: len(JPEG) // 2],
    "almost.jpg": JPEG[: len(JPEG) * 9 // 10],
    "truncated.png": save(Image.fromarray(NOISE), "PNG")[:-500],
    "zeros.jpg": bytes(5000),
    "empty.png": b"",
    "page.jpg": b"<html>404</html>",
    "bomb.png": bomb(),
    "nan.tif": save(Image.fromarray(np.full((7, 9), np.nan, dtype=np.float32)), "TIFF"),
    "nan.npy": encoded(lambda b: np.save(b, np.full((7, 9, 3), np.nan))),
    "code.npy": encoded(lambda b: np.save(b, np.array([{}], dtype=object), allow_pickle=True)),
}


def place_of(index: int, name: str, root: Path, layout: str) -> str:
    """What the name of an image in a message ends with."""
    if layout == "openimages_v4":
        return f"train.tsv at byte {index_lines(root / 'train.tsv')[index]}"
    return f"train.tsv line {index + 1}" if layout == "tsv" else name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bad_images_are_named_and_replaced(tmp_path: Path, layout: str) -> None:
    bad = sorted(BAD.items())
    images = [(f"{i:03}{Path(name).suffix}", content) for i, (name, content) in enumerate(bad)]
    images += [(f"{i:03}.png", good(i)) for i in range(len(bad), 40)]
    root = write_layout(tmp_path, layout, images)
    dataset = build(root, layout)
    for sample in [dataset[i] for i in range(40)] + (streamed(root) if layout == "shards" else []):
        assert color_of(sample)[:2] == [GOOD, GOOD]
        if sample.image_index < len(bad):
            name, _, reason = sample.failures[0].partition(": ")
            assert name.endswith(place_of(sample.image_index, images[sample.image_index][0], root, layout))
            assert reason.strip()
            assert "0x" not in reason
        else:
            assert sample.failures == ()


PICTURES = {
    kind: save(Image.fromarray(np.clip(NOISE, 60, 255)), kind) for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP")
}


@FUZZ
@given(
    kind=st.sampled_from(sorted(PICTURES)),
    cut=st.floats(0, 1),
    places=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=8),
)
def test_damaged_bytes_end_nothing(kind: str, cut: float, places: list[tuple[float, int]]) -> None:
    """Any damage gives an image that is whole, or an error; a cut file is never filled up with black or gray."""
    content = bytearray(PICTURES[kind])
    for place, value in places:
        content[int(place * len(content))] = value
    whole_length = len(content)
    content = content[: max(1, round(cut * whole_length))]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = decode_image(bytes(content), 3)
    except Exception:  # of any kind: the data set reports it
        return
    assert isinstance(image, Image.Image)
    assert image.mode == "RGB"
    if not places and kind != "TIFF":
        rows = np.asarray(image).reshape(image.height, -1).max(axis=1)
        assert (rows > 0).all()


# --------------------------------------------------------------------------- damaged containers


def check_run(root: Path, layout: str) -> None:
    """The data set opens and every sample has a view, or one sentence says what is wrong."""
    told = ""
    try:
        dataset = build(root, layout)
    except UsageError as error:
        told = str(error)
    if told:
        assert "\n" not in told
        return
    for i in range(len(dataset)):
        sample = dataset[i]
        assert sample.views == [] or color_of(sample)[:2] == [GOOD, GOOD]
        assert sample.failures == () or all(": " in failure for failure in sample.failures)


@pytest.mark.parametrize(
    ("layout", "file"),
    [
        ("zip", "train.zip"),
        ("zip", "train_map.txt"),
        ("tsv", "train.tsv"),
        ("tsv", "train.lineidx"),
        ("shards", "train-0.tar"),
    ],
)
@FUZZ
@given(
    cut=st.floats(0, 1),
    places=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=6),
    more=st.binary(max_size=5),
)
@example(cut=1.0, places=[(0.18359375, 77)], more=b"")  # once gave black rows
def test_damaged_containers_end_no_run(
    layout: str, file: str, cut: float, places: list[tuple[float, int]], more: bytes
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = write_layout(Path(folder), layout, [(f"{i}.png", good(i)) for i in range(4)])
        if file == "train.lineidx":
            build(root, layout)
        content = bytearray((root / file).read_bytes())
        for place, value in places:
            content[int(place * len(content))] = value
        (root / file).write_bytes(bytes(content[: round(cut * len(content))] if cut < 0.9 else content) + more)
        if layout == "shards":
            (root / "sizes.json").write_text(json.dumps({"train-0.tar": 4}))
            samples = streamed(root)
            assert len(samples) == 4
            assert all(sample.views == [] or color_of(sample)[:2] == [GOOD, GOOD] for sample in samples)
        check_run(root, layout)


@FUZZ
@given(label=st.text(max_size=12), layout=st.sampled_from(["zip", "tsv", "shards"]))
def test_any_text_as_label(label: str, layout: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        clean = "".join(c for c in label if c not in "\t\n\r" and not 0xD800 <= ord(c) < 0xE000)
        write_layout(root, layout, [("0.png", good(0))])
        if layout == "zip":
            (root / "train_map.txt").write_text(f"train.zip@/0.png\t{clean}\n")
        elif layout == "tsv":
            write_tsv(root / "train.tsv", [("0.png", clean, good(0))])
        else:
            with tarfile.open(root / "train-0.tar", "w") as tar:
                for member, part in (("0.png", good(0)), ("0.cls", clean.encode())):
                    info = tarfile.TarInfo(member)
                    info.size = len(part)
                    tar.addfile(info, io.BytesIO(part))
        check_run(root, layout)


@pytest.mark.parametrize("name", ["../../outside.png", "/etc/outside.png"])
def test_archive_that_would_lead_outside(tmp_path: Path, name: str) -> None:
    """Zip members with such names are refused; of a tar the bytes are taken, whatever their name. Nothing is written."""
    root = write_layout(tmp_path / "a", "zip", [(name, good(0)), ("1.png", good(1))])
    with pytest.raises(UsageError, match="is not the path of an image"):
        build(root, "zip")
    root = write_layout(tmp_path / "b", "shards", [(name, good(0))])
    assert color_of(streamed(root)[0])[:2] == [GOOD, GOOD]
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(root / "train-0.tar", "a") as tar:
        tar.addfile(link)
    found = streamed(root)
    assert found[0].failures == ()
    assert [failure.partition(": ")[0] for failure in found[1].failures] == [f"{root}/train-0.tar@/link.png"]
    assert not list(tmp_path.rglob("outside.png"))


def test_a_run_goes_on_over_all_of_it(tmp_path: Path) -> None:
    """Through a loader, a hundred good images and the bad ones, which are the ones counted."""
    images = [(f"{i:03}{Path(name).suffix}", content) for i, (name, content) in enumerate(sorted(BAD.items()))]
    images += [(f"{i:03}.png", good(i)) for i in range(len(BAD), 100)]
    for layout in LAYOUTS:
        root = write_layout(tmp_path / layout, layout, images)
        dataset = build_stream(str(root), whole) if layout == "shards" else build(root, layout)
        batches = list(build_train_loader(dataset, 10, 0, pin_memory=False))
        assert len(batches) == 10
        assert all(len(batch.views[0]) == 10 for batch in batches)
        names = {failure.split(": ")[0] for batch in batches for failure in batch.failures}
        assert len(names) == len(BAD)
