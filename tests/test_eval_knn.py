"""The k-NN vote against the published one-hot formula, and the script on small sets."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from runs import TINY_SWIN, write_images

import eval_knn
from eval_knn import KnnScore, Split, knn_scores
from features import LabelledFeatures
from utils import UsageError


def random_split(train: int, val: int, classes: int, seed: int = 0) -> Split:
    generator = torch.Generator().manual_seed(seed)

    def labelled(count: int) -> LabelledFeatures:
        features = F.normalize(torch.randn(count, 8, generator=generator), dim=-1)
        return LabelledFeatures(features, torch.randint(classes, (count,), generator=generator))

    return Split(labelled(train), labelled(val))


def slow_scores(split: Split, k: int, temperature: float) -> tuple[float, float]:
    """The vote one validation image at a time, with one-hot labels."""
    (train_x, train_y), (val_x, val_y) = split
    classes = int(max(train_y.max(), val_y.max())) + 1
    top1 = top5 = 0
    for x, y in zip(val_x, val_y):
        similarity = train_x @ x
        votes = torch.zeros(classes)
        for j in similarity.argsort(descending=True)[:k]:
            votes += F.one_hot(train_y[j], classes) * torch.exp(similarity[j] / temperature)
        ranking = votes.argsort(descending=True, stable=True)[:5].tolist()
        top1 += ranking[0] == int(y)
        top5 += int(y) in ranking
    return 100 * top1 / len(val_y), 100 * top5 / len(val_y)


@pytest.mark.parametrize("classes", [2, 10, 1200])
def test_vote_equals_the_formula(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eval_knn, "CHUNK", 7)  # not a divisor of the 40 images
    split = random_split(60, 40, classes)
    scores = knn_scores(split, [1, 5, 20], 0.07)
    for score in scores:
        assert (score.top1, score.top5) == pytest.approx(slow_scores(split, score.k, 0.07))


def test_own_neighbours_are_always_right() -> None:
    train = random_split(30, 1, 30).train
    train = train._replace(labels_N=torch.arange(30))
    assert knn_scores(Split(train, train), [1], 0.07) == [KnnScore(1, 100.0, 100.0)]


def test_k_beyond_the_set_is_clamped_with_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("esvit"), "propagate", True)
    split = random_split(6, 4, 3)
    clamped, whole = knn_scores(split, [200, 6], 0.07)
    assert clamped[1:] == whole[1:]
    assert "k = 200 is more than the 6 training images" in caplog.text


def test_impossible_votes() -> None:
    split = random_split(6, 4, 3)
    empty = LabelledFeatures(torch.zeros(0, 8), torch.zeros(0, dtype=torch.long))
    with pytest.raises(UsageError, match="at least one training and one validation"):
        knn_scores(Split(split.train, empty), [1], 0.07)
    with pytest.raises(UsageError, match="must be positive"):
        knn_scores(split, [0], 0.07)


# --------------------------------------------------------------------------- the script


def run(images: Path, *flags: str) -> None:
    command = ["--arch", "swin", "--cfg", "experiments/demo/swin_micro.yaml", "--device", "cpu", "--num_workers", "0"]
    command += ["--data_path", str(images), "--nb_knn", "1", "2", *flags, "--seed", "0", *TINY_SWIN]
    eval_knn.main(eval_knn.get_args_parser().parse_args(command))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three classes of different colours; fewer than 100 validation images and fewer than five classes."""
    for seed, (split, count) in enumerate((("train", 4), ("val", 2))):
        write_images(tmp_path / "images" / split, count, classes=3, seed=seed)
    return tmp_path / "images"


def test_small_sets_and_baselines(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(images, "--baselines", "--output_dir", str(tmp_path / "out"))
    printed = capsys.readouterr().out
    assert "6 validation among 12 training images, 3 classes" in printed
    assert "network: 1-NN classifier result: Top1: " in printed
    assert ", Top3: 100.00" in printed
    scores = json.loads((tmp_path / "out" / "knn.json").read_text())
    assert scores["mean and deviation of colour"]["1"]["top1"] == 100.0  # the classes are colours
    assert set(scores) == {"network", "raw pixels", "mean and deviation of colour"}


def test_saved_features_give_the_same_scores(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(images, "--dump_features", str(tmp_path / "features"))
    first = capsys.readouterr().out
    run(tmp_path / "nowhere", "--load_features", str(tmp_path / "features"))
    assert capsys.readouterr().out == first


def test_random_weights_are_named(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(images)
    assert "random weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda root: (root / "val").rename(root / "test"), "has no folder 'val'"),
        (lambda root: (root / "val" / "class1").rename(root / "val" / "other"), "classes that train has not: other"),
        (lambda root: write_images(root / "val", 1), "images without a class"),
    ],
    ids=["no val", "classes", "unlabelled"],
)
def test_data_that_cannot_be_scored(images: Path, prepare: object, words: str) -> None:
    prepare(images)  # type: ignore[operator]
    with pytest.raises(UsageError, match=words):
        run(images)


def test_wrong_weights(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'no\.pth' does not exist"):
        run(images, "--pretrained_weights", "no.pth")
    torch.save({"teacher": {"module.body": torch.zeros(2)}}, tmp_path / "other.pth")
    with pytest.raises(UsageError, match="is of another network"):
        run(images, "--pretrained_weights", str(tmp_path / "other.pth"))
