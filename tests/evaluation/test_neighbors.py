"""Neighbors and duplicates against all similarities, and their pictures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.feature_runs import derive, extract, rows_of, run
from helpers.runs import write_images
from PIL import Image

import extract_features
from analysis import embedding, gallery
from data.datasets import build_dataset
from data.layouts.sources import PackedStrings
from evaluation import knn, neighbors
from utils import UsageError

CPU = torch.device("cpu")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Eleven images of two classes."""
    write_images(tmp_path / "images", 5, classes=2)
    write_images(tmp_path / "images" / "class1" / "more", 1, seed=9)
    return tmp_path / "images"


# --------------------------------------------------------------------------- neighbors and duplicates


def unit(count: int, width: int = 6, seed: int = 0) -> tuple[np.ndarray, PackedStrings]:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(count, width)).astype(np.float32)
    features[5] = np.nan
    return features, PackedStrings([f"image {i}, {i}" for i in range(count)])


def cosines(features: np.ndarray) -> np.ndarray:
    matrix = features.astype(np.float64)
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    return np.asarray(matrix @ matrix.T)


@pytest.mark.parametrize("backend", ["torch", "faiss"])
@pytest.mark.parametrize("chunk", [(128, 2048), (4, 7)])
def test_neighbors_against_all_similarities(
    backend: str, chunk: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(knn.CHUNKS, "cpu", chunk)
    monkeypatch.setattr(neighbors, "FAISS_QUERIES", chunk[0])
    features, names = unit(40)
    rows = list(neighbors.neighbor_rows(neighbors.unit_features(features, CPU), names, 4, backend))
    similarity = cosines(features)
    np.fill_diagonal(similarity, -np.inf)
    expected = []
    for i in (i for i in range(40) if i != 5):
        order = sorted((j for j in range(40) if j not in (i, 5)), key=lambda j: (-similarity[i, j], j))[:4]
        expected += [(names[i], rank, names[j]) for rank, j in enumerate(order, start=1)]
    assert [row[:3] for row in rows] == expected
    for name, _, other, cosine in rows:
        i, j = (int(text.rpartition(" ")[2]) for text in (name, other))
        assert float(cosine) == pytest.approx(similarity[i, j], abs=2e-6)


@pytest.mark.parametrize("chunk", [(128, 2048), (4, 7), (1, 1)])
@pytest.mark.parametrize("threshold", [1.0, 0.7, 0.01])
def test_duplicates_against_all_similarities(
    threshold: float, chunk: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(knn.CHUNKS, "cpu", chunk)
    features, names = unit(40)
    features[7] = 2 * features[2]
    similarity = cosines(features)
    found = list(neighbors.duplicate_rows(neighbors.unit_features(features, CPU), names, threshold))
    expected = [
        (names[i], names[j]) for i in range(40) for j in range(i + 1, 40) if similarity[i, j] >= threshold - knn.TIE
    ]
    assert [row[:2] for row in found] == expected
    assert (names[2], names[7], "1.000000") in found


@pytest.mark.parametrize("chunk", [(128, 2048), (4, 7)])
def test_too_many_duplicates(chunk: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(knn.CHUNKS, "cpu", chunk)
    features, names = unit(40)
    loaded = neighbors.unit_features(features, CPU)
    count = len(list(neighbors.duplicate_rows(loaded, names, 0.3)))
    monkeypatch.setattr(neighbors, "MAX_PAIRS", count)
    assert len(list(neighbors.duplicate_rows(loaded, names, 0.3))) == count
    monkeypatch.setattr(neighbors, "MAX_PAIRS", count - 1)
    with pytest.raises(UsageError, match=rf"--duplicates 0\.3 has at least {count} pairs.*higher T"):
        list(neighbors.duplicate_rows(loaded, names, 0.3))


def test_too_many_duplicates_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search of a chunk of queries stops at the first chunk of keys that exceeds the number."""
    monkeypatch.setattr(neighbors, "MAX_PAIRS", 20)
    features = torch.ones(1000, 1)
    with pytest.raises(UsageError, match="at least 30 pairs"):  # 10 with the first five keys, 20 with the next
        neighbors.pairs_above(features, torch.arange(4), 0.5, key_chunk=5)


def test_unit_features_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors, "CHECKED_ROWS", 7)
    features, _ = unit(40)
    loaded = neighbors.unit_features(features.astype(np.float16), CPU)
    assert loaded.rows_M.tolist() == [i for i in range(40) if i != 5]
    expected = F.normalize(torch.from_numpy(features.astype(np.float16)[loaded.rows_M]).float(), dim=1)
    torch.testing.assert_close(loaded.features_MC, expected)


def test_nearest_images_are_of_the_same_color(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same file under two names is the nearest one and a duplicate; a large K is clamped."""
    copy = images / "class0" / "copy.png"
    copy.write_bytes((images / "class0" / "001.png").read_bytes())
    run(tmp_path / "out", "--data_path", str(images), "--neighbors", "100", "--duplicates", "1")
    header, *rows = rows_of(tmp_path / "out" / "neighbors.csv")
    assert header == ["image", "rank", "neighbor", "cosine"]
    assert len(rows) == 12 * 11
    assert [str(images / "class0" / "001.png"), "1", str(copy), "1.000000"] in rows
    assert rows_of(tmp_path / "out" / "duplicates.csv")[1:] == [
        [str(images / "class0" / "001.png"), str(copy), "1.000000"]
    ]
    assert "using 11" in capsys.readouterr().err


def test_one_image_has_no_neighbors(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 1)
    with pytest.raises(UsageError, match="two readable images"):
        run(tmp_path / "out", "--data_path", str(tmp_path / "images"), "--neighbors", "1")
    with pytest.raises(UsageError, match="--plot needs"):
        derive(tmp_path / "out", "--plot", "pca")


# --------------------------------------------------------------------------- pictures


def test_page_of_neighbors_shows_the_images(tmp_path: Path) -> None:
    for number, color in enumerate(("red", "lime", "blue")):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (20, 30), color).save(tmp_path / "images" / f"{number}.png")
    source = build_dataset(tmp_path / "images", "train", lambda image: []).source
    names = PackedStrings([source.name(i) for i in range(3)])
    rows = [[gallery.Tile(0, "query"), gallery.Tile(1, "0.9 a"), gallery.Tile(2, "0.8 b")]]
    page = gallery.neighbor_page(rows, gallery.Thumbnails(source, names, 3, ()), "about")
    colors = {color for _, color in page.getcolors(10**6) or ()}
    assert {(255, 0, 0), (0, 255, 0), (0, 0, 255)} <= colors
    moved = gallery.Thumbnails(source, PackedStrings(["x", *(names[i] for i in (1, 2))]), 3, ())
    assert moved.square(0, 8).getcolors() == [(64, gallery.BLANK)]
    assert gallery.Thumbnails(None, names, 3, ()).square(1, 8).getcolors() == [(64, gallery.BLANK)]
    assert moved.square(1, 8).getcolors() == [(64, (0, 255, 0))]


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_projections_keep_clusters_apart(method: str) -> None:
    rng = np.random.default_rng(0)
    centers = np.eye(3, 8)[np.arange(60) % 3]
    features = F.normalize(torch.from_numpy(centers + 0.05 * rng.normal(size=(60, 8))).float(), dim=1).numpy()
    first, again = (embedding.project(features, method, 0).points_N2 for _ in range(2))
    assert np.array_equal(first, again)
    distance = np.linalg.norm(first[:, None] - first[None], axis=2)
    same = (np.arange(60)[:, None] - np.arange(60)) % 3 == 0
    assert distance[same].max() < distance[~same].min() or method == "tsne"
    nearest_N = np.where(np.eye(60, dtype=bool), np.inf, distance).argmin(axis=1)
    assert (nearest_N % 3 == np.arange(60) % 3).all()


def test_projections_of_few_images() -> None:
    features = np.eye(embedding.MIN_IMAGES, 9, dtype=np.float32)
    for method in ("pca", "tsne"):
        assert embedding.project(features, method, 0).points_N2.shape == (embedding.MIN_IMAGES, 2)
        with pytest.raises(UsageError, match="--plot needs"):
            embedding.project(features[1:], method, 0)


def test_thumbnails_do_not_overlap() -> None:
    points = np.random.default_rng(1).uniform(0, 100, (300, 2))
    chosen = points[gallery.without_overlap(points, 10)]
    apart = np.abs(chosen[:, None] - chosen[None]).max(axis=2)
    np.fill_diagonal(apart, np.inf)
    assert apart.min() >= 10
    assert all(np.abs(chosen - point).max(axis=1).min() < 10 for point in points)  # no room for another


def test_plots_and_samples(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extract_features, "MAX_PLOTTED", 8)
    titles = []
    plot = gallery.scatter_plot

    def caught(*args: Any) -> Any:
        titles.append(args[-1])
        return plot(*args)

    monkeypatch.setattr(gallery, "scatter_plot", caught)
    run(tmp_path / "out", "--data_path", str(images), "--plot", "pca")
    assert titles == ["PCA of the features of 8 of 11 images"]
    assert "--plot shows 8 of 11 images" in capsys.readouterr().err
    with Image.open(tmp_path / "out" / "plot_pca.png") as picture:
        assert picture.width > 1000


def test_images_that_are_gone_are_told(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extract(tmp_path / "out", images)
    images.rename(tmp_path / "moved")
    derive(tmp_path / "out", "--neighbors", "2")
    assert "the pictures show no images" in capsys.readouterr().err
    assert len(rows_of(tmp_path / "out" / "neighbors.csv")) == 1 + 2 * 11


def test_umap_and_faiss_are_optional(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(UsageError, match="pip install umap-learn"):
        run(tmp_path / "out", "--data_path", str(images), "--plot", "umap")
    assert not (tmp_path / "out").exists()
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UsageError, match="pip install faiss-cpu"):
        run(tmp_path / "out", "--data_path", str(images), "--neighbors", "1", "--backend", "faiss")
    assert neighbors.choose_backend("auto", CPU) == "torch"
