"""The demo dataset: disjoint parts, deterministic files, and recovery from interruptions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import demo
from utils import UsageError

FEW = {"train": 3, "val": 2}
DRAWS = 300


def contents(root: Path) -> dict[str, bytes]:
    """Return path and content of each file."""
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


@pytest.fixture(scope="module")
def few() -> Iterator[None]:
    """Use a smaller dataset."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "CROPS", FEW)
        yield


@pytest.fixture(scope="module")
def written(few: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo") / "data"
    demo.write_demo_data(root)
    return root


@pytest.fixture
def one_photograph(few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use one image as the only photograph: red where training crops come from, blue elsewhere."""
    pixels = np.zeros((40, 50, 3), dtype=np.uint8)
    pixels[:, :30, 0] = 255
    pixels[:, 30:, 2] = 255
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    monkeypatch.setattr(demo, "photographs", lambda: {"picture": tmp_path / "picture.png"})
    return tmp_path / "data"


def test_twenty_photographs() -> None:
    found = demo.photographs()
    assert len(found) == 20
    assert len(set(found.values())) == 20
    assert all(path.is_file() for path in found.values())


@pytest.mark.parametrize("name", [*demo.SKIMAGE, *demo.SKLEARN])
def test_parts_share_no_pixel(name: str) -> None:
    with Image.open(demo.photographs()[name]) as image:
        width, height = image.size
    columns = demo.split_columns(width)
    assert columns["train"][0] == 0
    assert columns["train"][1] == columns["val"][0]
    assert columns["val"][1] == width
    assert columns["train"][1] / width == pytest.approx(0.6, abs=0.5 / width)
    rng = np.random.default_rng(0)
    for part, (start, end) in columns.items():
        squares = np.array([demo.random_square(rng, columns[part], (width, height)) for _ in range(DRAWS)])
        left, top, right, bottom = squares.T
        assert (right - left == bottom - top).all()
        assert left.min() >= start
        assert right.max() <= end
        assert top.min() >= 0
        assert bottom.max() <= height
        sides = (right - left) / min(width, height)  # one scale for both parts
        assert sides.min() == pytest.approx(0.2, abs=0.03)
        assert sides.max() == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize(("columns", "height"), [((0, 1), 1), ((3, 5), 1), ((2, 4), 100)])
def test_smallest_squares(columns: tuple[int, int], height: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        left, top, right, bottom = demo.random_square(rng, columns, (columns[1] + 1, height))
        assert columns[0] <= left < right <= columns[1]
        assert 0 <= top < bottom <= height


def test_crops_come_from_their_part_only(one_photograph: Path) -> None:
    demo.write_demo_data(one_photograph)
    for part, color in (("train", (255, 0, 0)), ("val", (0, 0, 255))):
        files = list((one_photograph / part / "picture").iterdir())
        assert len(files) == FEW[part]
        for file in files:
            assert (np.asarray(Image.open(file)) == color).all(), file


def test_layout_and_sizes(written: Path) -> None:
    for part, count in FEW.items():
        assert sorted(folder.name for folder in (written / part).iterdir()) == sorted(demo.photographs())
        for folder in (written / part).iterdir():
            assert sorted(file.name for file in folder.iterdir()) == [f"{number:03}.png" for number in range(count)]
            for file in folder.iterdir():
                with Image.open(file) as image:
                    assert (image.size, image.mode) == ((64, 64), "RGB")


def test_crops_differ(written: Path) -> None:
    files = list(written.rglob("*.png"))
    assert len({file.read_bytes() for file in files}) == len(files) == 20 * sum(FEW.values())


def test_data_are_deterministic(written: Path, tmp_path: Path) -> None:
    demo.write_demo_data(tmp_path)
    assert contents(tmp_path) == contents(written)


def test_complete_dataset_is_not_rewritten(one_photograph: Path) -> None:
    demo.write_demo_data(one_photograph)
    times = {file: file.stat().st_mtime_ns for file in one_photograph.rglob("*")}
    demo.write_demo_data(one_photograph)
    assert {file: file.stat().st_mtime_ns for file in one_photograph.rglob("*")} == times


@pytest.mark.parametrize("record", ['{"made_by": "data.demo", "crops": {"tr', '{"made_by": "data.demo", "seed": 7}'])
def test_incomplete_or_outdated_dataset_is_rewritten(one_photograph: Path, record: str) -> None:
    demo.write_demo_data(one_photograph)
    complete = contents(one_photograph)
    folder = one_photograph / "train" / "picture"
    (folder / "000.png").unlink()
    (folder / "001.png").write_bytes(b"half a file")
    (folder / "999.png").write_bytes(b"of other settings")
    (one_photograph / "demo.json").write_text(record)
    demo.write_demo_data(one_photograph)
    assert contents(one_photograph) == complete


def test_folder_with_other_files_is_rejected(one_photograph: Path) -> None:
    own = one_photograph / "train" / "picture" / "mine.png"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"precious")
    with pytest.raises(UsageError, match="not demo data"):
        demo.write_demo_data(one_photograph)
    assert own.read_bytes() == b"precious"


def test_folder_with_another_record_is_rejected(one_photograph: Path) -> None:
    own = one_photograph / "train" / "picture" / "000.png"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"precious")
    (one_photograph / "demo.json").write_text('{"seed": 7}')
    with pytest.raises(UsageError, match="not demo data"):
        demo.write_demo_data(one_photograph)
    assert own.read_bytes() == b"precious"
