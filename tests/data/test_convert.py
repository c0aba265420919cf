"""Conversion in both directions: unchanged images and labels, nothing overwritten, no partial files."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
from helpers.image_files import whole, write_gray, write_tsv
from helpers.runs import write_images

from data import convert
from data.datasets import LAYOUTS, build_dataset
from utils import UsageError

FLAGS = {"files": [], "zip": ["--zip_mode"], "tsv": ["--tsv_mode"], "shards": []}


def run(source: Path, dest: Path, to: str, layout: str = "files", *more: str) -> Path:
    convert.main(convert.get_args_parser().parse_args([str(source), str(dest), "--to", to, *FLAGS[layout], *more]))
    return dest


def content(root: Path, layout: str, split: str) -> list[tuple[bytes, int]]:
    """Return content and label of each image, sorted."""
    dataset = build_dataset(root, split, whole, need_labels=True, layout=layout)
    labels = [int(dataset.classes[label]) if dataset.classes[0].isdecimal() else int(label) for label in dataset.labels]
    return sorted((dataset.source.read(i), labels[i]) for i in range(len(dataset)))


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Write twelve training images of three classes, and four validation images of the last two."""
    write_images(tmp_path / "folders" / "train", 4, size=8, classes=3)
    for label in (1, 2):
        write_gray(tmp_path / "folders" / "val" / f"class{label}" / "gray.png", label)
        (tmp_path / "folders" / "val" / f"class{label}" / "damaged.jpg").write_bytes(b"no image %d" % label)
    return tmp_path / "folders"


@pytest.mark.parametrize(("first", "second"), itertools.permutations(("zip", "tsv", "shards"), 2))
def test_folder_to_one_layout_to_another(folders: Path, tmp_path: Path, first: str, second: str) -> None:
    """Including damaged images; classes of val are numbered as those of train."""
    one = run(folders, tmp_path / "one", first, "files", "--shard_images", "5")
    two = run(one, tmp_path / "two", second, first, "--shard_images", "3")
    expected = content(folders, "files", "train")
    assert content(one, first, "train") == expected
    assert content(two, second, "train") == expected
    val = sorted((path.read_bytes(), int(path.parent.name[-1])) for path in (folders / "val").rglob("*.*"))
    assert content(one, first, "val") == val
    assert content(two, second, "val") == val
    assert (one / "classes.txt").read_text() == "class0\nclass1\nclass2\n"
    assert not [name for root in (one, two) for name in os.listdir(root) if name.endswith(".part")]


def tree_of(root: Path) -> dict[str, list[bytes]]:
    """Return the file contents of each folder."""
    found: dict[str, list[bytes]] = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        found.setdefault(str(path.parent.relative_to(root)), []).append(path.read_bytes())
    return {name: sorted(contents) for name, contents in found.items()}


@pytest.mark.parametrize("layout", ["zip", "tsv", "shards"])
def test_round_trip(folders: Path, tmp_path: Path, layout: str) -> None:
    """The same class folders; a zip file keeps file names too."""
    there = run(folders, tmp_path / "there", layout, "files", "--shard_images", "5")
    back = run(there, tmp_path / "back", "files", layout)
    assert tree_of(back) == tree_of(folders)
    assert sorted(tree_of(back)) == [
        f"{split}/class{i}" for split, first in (("train", 0), ("val", 1)) for i in range(first, 3)
    ]
    if layout == "zip":
        assert {path.relative_to(back) for path in back.rglob("*.*")} == {
            path.relative_to(folders) for path in folders.rglob("*.*")
        }
    (there / "classes.txt").unlink()
    numbered = run(there, tmp_path / "numbered", "files", layout)
    assert sorted(path.name for path in (numbered / "train").iterdir()) == ["0", "1", "2"]
    assert sorted(content(numbered, "files", "train")) == sorted(content(folders, "files", "train"))


@pytest.mark.parametrize("layout", ["zip", "tsv", "shards"])
def test_class_names_that_are_not_utf8(tmp_path: Path, layout: str) -> None:
    """Folder names are bytes."""
    names = [os.fsdecode(b"caf\xe9"), "tea"]
    for number, name in enumerate(names):
        write_gray(tmp_path / "images/train" / name / "1.png", number)
    there = run(tmp_path / "images", tmp_path / "there", layout)
    back = run(there, tmp_path / "back", "files", layout)
    assert tree_of(back) == tree_of(tmp_path / "images")
    assert sorted(path.name for path in (back / "train").iterdir()) == names


def test_folders_without_labels_and_with_invalid_class_names(tmp_path: Path) -> None:
    png = write_gray(tmp_path / "a.png", 1).read_bytes()
    plain = run(write_tsv(tmp_path / "plain.tsv", [("a", "", png)]), tmp_path / "plain", "files", "tsv")
    assert [str(path.relative_to(plain)) for path in plain.rglob("*.*")] == ["train/000000000.png"]
    named = write_tsv(tmp_path / "named.tsv", [("a", "either/or", png), ("b", "cat", png)])
    with pytest.raises(UsageError, match="class 'either/or' is not a valid folder name"):
        run(named, tmp_path / "named", "files", "tsv")
    assert not (tmp_path / "named").exists()
    (tmp_path / "named" / ".train.part").mkdir(parents=True)
    (tmp_path / "named" / ".train.part" / "left.png").touch()  # by a conversion that was killed
    assert len(list(run(tmp_path / "plain.tsv", tmp_path / "named", "files", "tsv").rglob("*.png"))) == 1
    with pytest.raises(UsageError, match="train exists"):
        run(tmp_path / "plain.tsv", tmp_path / "named", "files", "tsv")


def test_order_and_names(folders: Path, tmp_path: Path) -> None:
    source = build_dataset(folders, "train", whole).source
    for layout in ("zip", "tsv", "shards"):
        root = run(folders, tmp_path / layout, layout)
        dataset = build_dataset(root, "train", whole, layout=layout)
        assert [dataset.source.read(i) for i in range(12)] == [source.read(i) for i in range(12)]
    zipped = build_dataset(tmp_path / "zip", "train", whole, layout="zip")
    assert zipped.source.name(5) == f"{tmp_path}/zip/train.zip@/class1/001.png"
    assert (tmp_path / "tsv" / "train.tsv").read_text().startswith("class0/000.png\t0\t")
    names = sorted(os.listdir(tmp_path / "shards"))
    assert names == ["classes.txt", "sizes.json", "train-000000.tar", "val-000000.tar"]


def test_written_index_and_sizes_are_correct(folders: Path, tmp_path: Path) -> None:
    from data.layouts.tars import count_images, find_shards
    from data.layouts.tsv import index_lines

    tsv = run(folders, tmp_path / "tsv", "tsv") / "train.tsv"
    assert tsv.with_suffix(".lineidx").read_text() == "".join(f"{n}\n" for n in index_lines(tsv))
    shards = run(folders, tmp_path / "shards", "shards", "files", "--shard_images", "5")
    written = count_images(find_shards(str(shards), "train"))
    (shards / "sizes.json").unlink()
    assert count_images(find_shards(str(shards), "train")) == written == [5, 5, 2]


def test_conversion_is_deterministic(folders: Path, tmp_path: Path) -> None:
    for layout in ("zip", "tsv", "shards"):
        one, two = (run(folders, tmp_path / f"{layout}{i}", layout) for i in range(2))
        assert sorted(os.listdir(one)) == sorted(os.listdir(two))
        assert all((one / name).read_bytes() == (two / name).read_bytes() for name in os.listdir(one))


def test_images_without_labels(tmp_path: Path) -> None:
    write_images(tmp_path / "flat", 3, size=8)
    for layout in ("tsv", "shards"):
        root = run(tmp_path / "flat", tmp_path / layout, layout)
        assert len(build_dataset(root, "train", whole, layout=layout)) == 3
        with pytest.raises(UsageError, match="label"):
            build_dataset(root, "train", whole, need_labels=True, layout=layout)
    with pytest.raises(UsageError, match=r"000\.png has no label"):
        run(tmp_path / "flat", tmp_path / "zip", "zip")
    assert not (tmp_path / "zip").exists()


def test_integer_classes_keep_their_numbers(tmp_path: Path) -> None:
    """Labels 7 and 900 are not renumbered."""
    png = write_gray(tmp_path / "a.png", 1).read_bytes()
    tsv = write_tsv(tmp_path / "tsv" / "train.tsv", [("a", "900", png), ("b", "7", png)])
    for layout in ("zip", "shards"):
        assert content(run(tsv, tmp_path / layout, layout, "tsv"), layout, "train") == [(png, 7), (png, 900)]
        assert not (tmp_path / layout / "classes.txt").exists()


def test_names_that_look_like_numbers(tmp_path: Path) -> None:
    for name in ("1", "01", "10"):
        write_gray(tmp_path / "folders" / "train" / name / "a.png", int(name) * 20)
    there = run(tmp_path / "folders", tmp_path / "there", "tsv")
    assert (there / "classes.txt").read_text() == "01\n1\n10\n"
    assert tree_of(run(there, tmp_path / "back", "files", "tsv")) == tree_of(tmp_path / "folders")


@pytest.mark.parametrize(("to", "name"), [("zip", "train_map.txt"), ("tsv", "val.lineidx"), ("shards", "sizes.json")])
def test_nothing_is_overwritten(folders: Path, tmp_path: Path, to: str, name: str) -> None:
    dest = tmp_path / "dest"
    dest.mkdir()
    (dest / name).write_text("mine")
    with pytest.raises(UsageError, match=f"{name} exists"):
        run(folders, dest, to)
    assert (dest / name).read_text() == "mine"
    assert os.listdir(dest) == [name]


def test_unreadable_image_leaves_no_files(folders: Path, tmp_path: Path) -> None:
    (folders / "train" / "class1" / "gone.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"class1/gone\.png cannot be read"):
        run(folders, tmp_path / "dest", "zip")
    assert not (tmp_path / "dest").exists()


def test_missing_source(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"SOURCE .* does not exist"):
        run(tmp_path / "nowhere", tmp_path / "dest", "zip")
    assert set(FLAGS) <= set(LAYOUTS)
