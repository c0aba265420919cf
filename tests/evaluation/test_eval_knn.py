"""The k-NN vote against the published one-hot formula, with any chunks, and the script on small sets."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
import torch.nn.functional as F
from helpers.confusions import assert_confusions_fit, slow_cells
from helpers.runs import TINY_SWIN, write_images
from torch import Tensor

import eval_knn
from config.loading import load_config
from evaluation import features, knn
from evaluation.confusion import class_accuracies
from evaluation.features import LabeledFeatures
from evaluation.knn import KnnScore, Split, knn_scores, nearest
from evaluation.knn_callback import build_knn_callback
from models import build_model
from utils import UsageError


def random_split(train: int, val: int, classes: int, seed: int = 0) -> Split:
    generator = torch.Generator().manual_seed(seed)

    def labeled(count: int) -> LabeledFeatures:
        features = F.normalize(torch.randn(count, 8, generator=generator), dim=-1)
        return LabeledFeatures(features, torch.randint(classes, (count,), generator=generator))

    return Split(labeled(train), labeled(val))


def split_of_ties(train: int, val: int, classes: int) -> Split:
    """Sixteen directions with halves as entries, so that products are exact and most of them are equal to others."""
    generator = torch.Generator().manual_seed(1)

    def labeled(count: int) -> LabeledFeatures:
        signs = torch.randint(2, (count, 4), generator=generator) - 0.5
        return LabeledFeatures(signs, torch.randint(classes, (count,), generator=generator))

    return Split(labeled(train), labeled(val))


def slow_scores(split: Split, k: int, temperature: float, leave_one_out: bool = False) -> KnnScore:
    """The vote one validation image at a time, with one-hot labels; equal similarities in the order of the images."""
    (train_x, train_y), (val_x, val_y) = split
    classes = int(max(train_y.max(), val_y.max())) + 1
    first, five = [], []
    for i, (x, y) in enumerate(zip(val_x.float(), val_y)):
        similarity = train_x.float() @ x
        votes = torch.zeros(classes)
        order = similarity.argsort(descending=True, stable=True)
        order = order[order != i] if leave_one_out else order
        for j in order[:k]:
            votes += F.one_hot(train_y[j], classes) * torch.exp(similarity[j] / temperature)
        ranking = votes.argsort(descending=True, stable=True)[:5].tolist()
        first.append(ranking[0])
        five.append(int(y) in ranking and bool(votes[y] > 0))
    top1 = (torch.tensor(first) == val_y).float() * 100
    return KnnScore(k, top1.mean().item(), 100 * sum(five) / len(five), slow_cells(val_y, first))


def assert_equal_scores(score: KnnScore, expected: KnnScore) -> None:
    assert score[:3] == pytest.approx(expected[:3])
    assert torch.equal(score.confusion_P3, expected.confusion_P3)


@pytest.mark.parametrize("classes", [2, 10, 1200])
def test_vote_equals_the_formula(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(knn.CHUNKS, "cpu", (7, 11))  # no divisors of the 40 and 60 images
    split = random_split(60, 40, classes)
    scores = knn_scores(split, [5, 1, 20, 5], 0.07)
    assert [score.k for score in scores] == [5, 1, 20, 5]
    for score in scores:
        assert_equal_scores(score, slow_scores(split, score.k, 0.07))


@pytest.mark.parametrize("chunks", [(1, 1), (3, 7), (40, 2), (1, 61), (64, 64)], ids=str)
def test_ties_do_not_depend_on_the_chunks(chunks: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(knn.CHUNKS, "cpu", chunks)
    split = split_of_ties(60, 40, 7)
    similarity = split.val.features_NC @ split.train.features_NC.T
    assert len(similarity.unique()) == 5  # 2400 pairs
    for k in (1, 2, 13, 60):
        found = nearest(split.val.features_NC, split.train.features_NC, k, key_chunk=chunks[1])
        expected = similarity.sort(dim=1, descending=True, stable=True)
        assert torch.equal(found.index_Qk, expected.indices[:, :k])
        assert torch.equal(found.similarity_Qk, expected.values[:, :k])
        assert_equal_scores(knn_scores(split, [k], 0.5)[0], slow_scores(split, k, 0.5))


def test_keys_of_increasing_similarity() -> None:
    """Each chunk beats all before it, which is the most there can be to sort."""
    keys = torch.linspace(-1, 1, 501)[:, None]
    found = nearest(torch.tensor([[1.0], [-1.0]]), keys, 3, key_chunk=97)
    assert found.index_Qk.tolist() == [[500, 499, 498], [0, 1, 2]]


def test_top5_counts_classes_with_votes_only() -> None:
    """Labels that no neighbor has are not among the first five, however few classes have votes."""
    train = LabeledFeatures(torch.eye(4), torch.tensor([4, 5, 5, 6]))
    val = LabeledFeatures(torch.tensor([[1.0, 0, 0, 0], [1, 0, 0, 0], [0.8, 0.6, 0, 0]]), torch.tensor([4, 0, 5]))
    one, two = knn_scores(Split(train, val), [1, 2], 0.07)
    assert (one.top1, one.top5) == pytest.approx((100 / 3, 100 / 3))
    assert (two.top1, two.top5) == pytest.approx((100 / 3, 200 / 3))
    faint = knn_scores(Split(train, val), [2], 1e-3)[0]  # the second vote weighs less than float32 can tell
    assert (faint.top1, faint.top5) == pytest.approx((100 / 3, 200 / 3))


@pytest.mark.parametrize("chunks", [(1, 1), (3, 7), (64, 64)], ids=str)
@pytest.mark.parametrize("make", [split_of_ties, random_split])
def test_leave_one_out(make: object, chunks: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(knn.CHUNKS, "cpu", chunks)
    only = make(30, 1, 4).train  # type: ignore[operator]
    for score in knn_scores(Split(only, only), [1, 5, 29], 0.2, leave_one_out=True):
        assert_equal_scores(score, slow_scores(Split(only, only), score.k, 0.2, leave_one_out=True))


def test_leave_one_out_of_a_pair_and_of_one() -> None:
    pair = LabeledFeatures(torch.eye(2), torch.tensor([0, 1]))
    assert knn_scores(Split(pair, pair), [5], 0.07, leave_one_out=True)[0].top1 == 0.0  # each has the other's label
    one = LabeledFeatures(torch.eye(1), torch.tensor([0]))
    with pytest.raises(UsageError, match="two images"):
        knn_scores(Split(one, one), [1], 0.07, leave_one_out=True)


def test_half_precision_equals_rounded_features() -> None:
    split = random_split(60, 40, 10)
    half = Split(*(LabeledFeatures(features.half(), labels) for features, labels in split))
    assert_equal_scores(knn_scores(half, [5], 0.07)[0], slow_scores(half, 5, 0.07))


def photographs(size: int = 4) -> Split:
    """Patches of photographs, many of which come again exactly or as another class: real data with ties and duplicates."""
    pictures = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea(), skimage.data.page()]
    patches, labels = [], []
    for label, picture in enumerate(pictures):
        gray = torch.from_numpy(np.ascontiguousarray(picture if picture.ndim == 2 else picture.mean(axis=2))).float()
        cut = gray[::2, ::2].unfold(0, size, 9).unfold(1, size, 9).reshape(-1, size * size)
        patches.append((cut / 32).round() + 1)  # few gray levels: flat patches are all alike
        labels.append(torch.full((len(cut),), label))
    features, of = F.normalize(torch.cat(patches), dim=-1), torch.cat(labels)
    order = torch.randperm(len(of), generator=torch.Generator().manual_seed(0))[:1000]
    features, of = features[order], of[order]
    features, of = torch.cat([features, features[:300]]), torch.cat([of, (of[:300] + 1) % 4])
    return Split(LabeledFeatures(features[200:], of[200:]), LabeledFeatures(features[:200], of[:200]))


@pytest.mark.parametrize("leave_one_out", [False, True], ids=["split", "leave one out"])
@pytest.mark.parametrize("make", [photographs, lambda: split_of_ties(60, 40, 7), lambda: random_split(60, 40, 10)],
                         ids=["photographs", "ties", "random"])  # fmt: skip
def test_faiss_gives_the_same_votes(leave_one_out: bool, make: Any) -> None:
    pytest.importorskip("faiss")
    split = make()
    split = Split(split.train, split.train) if leave_one_out else split
    ks = [1, 2, 5, 20]
    ks += [100] if len(split.train.labels_N) < 100 else []
    scores = (knn_scores(split, ks, 0.07, leave_one_out, backend) for backend in ("faiss", "torch"))
    for score, expected in zip(*scores, strict=True):
        assert_equal_scores(score, expected)


def test_faiss_gives_the_same_neighbors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of equal ones included; what has no ties is not searched a second time."""
    pytest.importorskip("faiss")
    split = photographs()
    queries, keys = split.val.features_NC, split.train.features_NC
    sorted_similarity = (queries @ keys.T).sort(dim=1, descending=True).values[:, :21]
    tied = (sorted_similarity.diff(dim=1) > -knn.TIE).any(dim=1)
    assert 20 < tied.sum() < 200
    searched: list[int] = []

    def counted(queries_QC: Tensor, *args: Any) -> knn.Neighbors:
        searched.append(len(queries_QC))
        return nearest(queries_QC, *args)

    plain = nearest(queries, keys, 20)
    monkeypatch.setattr(knn, "nearest", counted)
    found = knn.nearest_faiss(queries, keys, 20)
    assert torch.equal(found.index_Qk, plain.index_Qk)
    torch.testing.assert_close(found.similarity_Qk, plain.similarity_Qk, rtol=0, atol=1e-6)
    assert searched == [pytest.approx(int(tied.sum()), abs=5)]


def test_faiss_gets_the_keys_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same memory for every chunk of queries, so that nothing is converted again."""
    pytest.importorskip("faiss")
    monkeypatch.setattr(knn, "FAISS_QUERIES", 7)
    split = random_split(60, 40, 10)
    strided = Split(split.train._replace(features_NC=split.train.features_NC.T.contiguous().T), split.val)
    search, seen = knn.nearest_faiss, []

    def counted(queries_QC: Tensor, keys_NC: Tensor, *args: Any) -> knn.Neighbors:
        seen.append((len(queries_QC), keys_NC.data_ptr(), keys_NC.is_contiguous()))
        return search(queries_QC, keys_NC, *args)

    monkeypatch.setattr(knn, "nearest_faiss", counted)
    assert_equal_scores(knn_scores(strided, [5], 0.07, backend="faiss")[0], knn_scores(split, [5], 0.07)[0])
    assert [count for count, _, _ in seen] == [7, 7, 7, 7, 7, 5]
    assert {place[1:] for place in seen} == {(seen[0][1], True)}


@pytest.mark.parametrize("row", [0, 6, 7, 59])
def test_nonfinite_features_are_found_in_every_chunk(row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "CHECKED_ROWS", 7)
    train, val = random_split(60, 4, 3)
    half = LabeledFeatures(train.features_NC.half(), train.labels_N)
    half.features_NC[row, 3] = torch.inf
    with pytest.raises(UsageError, match="not finite"):
        knn_scores(Split(half, val._replace(features_NC=val.features_NC.half())), [1], 0.07)


def test_identical_sets_score_100_percent() -> None:
    train = random_split(30, 1, 30).train
    train = train._replace(labels_N=torch.arange(30))
    (score,) = knn_scores(Split(train, train), [1], 0.07)
    assert_equal_scores(score, KnnScore(1, 100.0, 100.0, slow_cells(range(30), range(30))))


def test_k_beyond_the_set_is_clamped_with_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("esvit"), "propagate", True)
    split = random_split(6, 4, 3)
    clamped, whole = knn_scores(split, [200, 6], 0.07)
    assert_equal_scores(clamped._replace(k=6), whole)
    assert "using k = 6" in caplog.text


def test_invalid_arguments_of_the_vote() -> None:
    split = random_split(6, 4, 3)
    empty = LabeledFeatures(torch.zeros(0, 8), torch.zeros(0, dtype=torch.long))
    with pytest.raises(UsageError, match="at least one training and one validation"):
        knn_scores(Split(split.train, empty), [1], 0.07)
    with pytest.raises(UsageError, match="must be positive"):
        knn_scores(split, [0], 0.07)
    with pytest.raises(UsageError, match="must be positive"):
        knn_scores(split, [1], float("nan"))
    with pytest.raises(UsageError, match="unknown --backend 'annoy'; choose one of torch, faiss"):
        knn_scores(split, [1], 0.07, backend="annoy")
    infinite = split.train._replace(features_NC=split.train.features_NC / torch.tensor(0.0))
    with pytest.raises(UsageError, match="not finite; check the weights"):
        knn_scores(Split(infinite, split.val), [1], 0.07)


# --------------------------------------------------------------------------- the script


def run(images: Path, *flags: str) -> None:
    command = ["--arch", "swin", "--cfg", "experiments/demo/swin_micro.yaml", "--device", "cpu", "--num_workers", "0"]
    weights = [] if {"--pretrained_weights", "--load_features"} & set(flags) else ["--random_weights"]
    command += ["--data_path", str(images), "--nb_knn", "1", "2", *weights, *flags, "--seed", "0", *TINY_SWIN]
    eval_knn.main(eval_knn.get_args_parser().parse_args(command))


def results(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "results" / "knn.json").read_text())
    return found


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three classes of different colors; fewer than 100 validation images and fewer than five classes."""
    for seed, (split, count) in enumerate((("train", 4), ("val", 2))):
        write_images(tmp_path / "images" / split, count, classes=3, seed=seed)
    return tmp_path / "images"


def test_small_sets_and_baselines(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(images, "--baselines", "--output_dir", str(tmp_path / "out"))
    printed = capsys.readouterr().out
    assert "6 validation among 12 training images, 3 classes" in printed
    assert "network: 1-NN classifier result: Top1: " in printed
    assert ", Top3: 100.00" in printed
    record = assert_confusions_fit(tmp_path / "out", "knn")
    assert (record["evaluation"], record["protocol"]["top5_is"]) == ("knn", "top3")
    scores = record["scores"]
    assert scores["mean and deviation of color, 1-NN"]["top1"] == 100.0  # the classes are colors
    assert set(scores) == {
        f"{name}, {k}-NN" for name in ("network", "raw pixels", "mean and deviation of color") for k in (1, 2)
    }
    for row in scores.values():
        assert list(row["per_class"]) == ["class0", "class1", "class2"]
        assert row["top1"] == pytest.approx(sum(row["per_class"].values()) / 3)  # classes of two images each


def test_saved_features_give_the_same_scores(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(images, "--dump_features", str(tmp_path / "features"))
    first = capsys.readouterr().out
    run(tmp_path / "nowhere", "--load_features", str(tmp_path / "features"))
    assert capsys.readouterr().out == first


def test_dtype_of_saved_features(images: Path, tmp_path: Path) -> None:
    run(images, "--dump_features", str(tmp_path / "full"), "--use_cuda", "off")
    run(images, "--dump_features", str(tmp_path / "half"), "--half")
    full, half = (torch.load(tmp_path / name / "trainfeat.pth") for name in ("full", "half"))
    assert (full.dtype, half.dtype) == (torch.float32, torch.float16)
    assert torch.equal(full.half(), half)
    torch.testing.assert_close(full.norm(dim=1), torch.ones(12))


def test_leave_one_out_of_a_folder_without_a_split(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(
        images / "train",
        "--leave_one_out",
        "--dump_features",
        str(tmp_path / "features"),
        "--output_dir",
        str(tmp_path),
    )
    printed = capsys.readouterr().out
    assert "k-NN of 12 images, each among the 11 others, 3 classes:" in printed
    assert sorted(path.name for path in (tmp_path / "features").iterdir()) == ["trainfeat.pth", "trainlabels.pth"]
    only = LabeledFeatures(*(torch.load(tmp_path / "features" / f"train{kind}.pth") for kind in ("feat", "labels")))
    assert only.labels_N.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    scores = results(tmp_path)["scores"]
    for k in (1, 2):
        expected = slow_scores(Split(only, only), k, 0.07, leave_one_out=True)
        assert scores[f"network, {k}-NN"]["top1"] == pytest.approx(expected.top1)
        per_class = class_accuracies(expected.confusion_P3)
        assert list(scores[f"network, {k}-NN"]["per_class"].values()) == pytest.approx([*per_class.values()])
    run(tmp_path / "nowhere", "--leave_one_out", "--load_features", str(tmp_path / "features"))
    assert capsys.readouterr().out == printed


def test_gathered_features_are_in_dataset_order() -> None:
    """Batches in any order, as processes that take turns give them."""
    indices = [torch.tensor([4, 0]), torch.tensor([3]), torch.tensor([1, 2])]
    cpu = torch.device("cpu")
    order = torch.cat(list(features._gather_batches(list(indices), cpu, cpu))).argsort()
    place = torch.empty_like(order).scatter_(0, order, torch.arange(5))
    rows = [torch.stack([i, i * 10], dim=1) for i in indices]
    placed: Tensor = features._reorder(features._gather_batches(rows, cpu, cpu), place)
    assert placed.tolist() == [[i, 10 * i] for i in range(5)]
    assert not rows


def test_missing_faiss(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UsageError, match="pip install faiss-cpu"):
        run(images, "--backend", "faiss")
    monkeypatch.setitem(sys.modules, "faiss", SimpleNamespace())
    with pytest.raises(UsageError, match="--half"):
        run(images, "--backend", "faiss", "--half")


def test_saved_features_are_never_overwritten(images: Path, tmp_path: Path) -> None:
    """Not even one of the four files, and the folder is looked at before any image."""
    (tmp_path / "features").mkdir()
    for name in ("trainfeat.pth", "trainlabels.pth", "testfeat.pth", "testlabels.pth"):
        (tmp_path / "features" / name).write_text("precious")
        for flags in ([], ["--leave_one_out"]):
            with pytest.raises(UsageError, match=f"--dump_features .*{name}"):
                run(tmp_path / "nowhere", "--dump_features", str(tmp_path / "features"), *flags)
        assert (tmp_path / "features" / name).read_text() == "precious"
        (tmp_path / "features" / name).unlink()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"--dump_features .*/file/folder cannot be created"):
        run(images, "--dump_features", str(tmp_path / "file" / "folder"))


def test_result_file(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also for loaded features, of which neither network nor data are known."""
    out = ["--output_dir", str(tmp_path / "out")]
    run(images, "--half", *out, "--dump_features", str(tmp_path / "features"))
    record = results(tmp_path / "out")
    assert {"arch": "swin", "checkpoint_key": "teacher"}.items() <= record["network"].items()
    assert record["data"] == {"data_path": str(images), "train_images": 12, "val_images": 6, "classes": 3}
    assert {"image_size": 32, "crop_ratio": 0.875, "half": True}.items() <= record["protocol"].items()
    assert f"wrote {tmp_path}/out/results/knn.json" in capsys.readouterr().err
    run(images, *out, "--load_features", str(tmp_path / "features"))
    loaded = results(tmp_path / "out")
    assert loaded["network"] == {"features": str(tmp_path / "features")}
    assert loaded["data"]["train_images"] == 12
    assert loaded["protocol"]["half"] is False


def test_nonsquare_config_needs_image_size(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = ["--seed", "0", *TINY_SWIN, "MODEL.IMAGE_SIZE", "[32, 48]"]
    flags = ["--arch", "swin", "--cfg", "experiments/demo/swin_micro.yaml", "--device", "cpu", "--num_workers", "0"]
    flags += ["--data_path", str(images), "--nb_knn", "1", "--random_weights"]
    with pytest.raises(UsageError, match=r"MODEL.IMAGE_SIZE \[32, 48\] is not square.*pass --image_size"):
        eval_knn.main(eval_knn.get_args_parser().parse_args([*flags, *wide]))
    eval_knn.main(eval_knn.get_args_parser().parse_args([*flags, "--image_size", "40", *wide]))
    assert "network: 1-NN classifier result" in capsys.readouterr().out


def test_processes_must_agree_on_the_images(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process counts one image less, or cannot read its data at all."""

    def other_sees_less(value: Any) -> list[Any]:
        return [value, [12, 5] if value == [12, 6] else value]

    monkeypatch.setattr("distributed.collectives.all_gather_objects", other_sees_less)
    with pytest.raises(UsageError, match="different numbers of images"):
        run(images)
    monkeypatch.setattr(
        "distributed.collectives.all_gather_objects", lambda value: [value, "no such disk" if value is None else value]
    )
    with pytest.raises(UsageError, match=r"^no such disk$"):
        run(images)


def test_random_weights_are_named(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(images)
    assert "random weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda root: (root / "val").rename(root / "test"), "no 'val'"),
        (lambda root: (root / "val" / "class1").rename(root / "val" / "other"), "not in train: other"),
        (lambda root: write_images(root / "val", 1), "images without a class"),
        (
            lambda root: [part.rename(root / f"another {part.name}") for part in (root / "train", root / "val")],
            r"the same 18 images for training and validation.*DIR/{train,val}.*--leave_one_out",
        ),
    ],
    ids=["no val", "classes", "unlabeled", "no split"],
)
def test_invalid_data(images: Path, prepare: object, words: str) -> None:
    prepare(images)  # type: ignore[operator]
    with pytest.raises(UsageError, match=words):
        run(images)


def test_wrong_weights(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'no\.pth' does not exist"):
        run(images, "--pretrained_weights", "no.pth")
    torch.save({"teacher": {"module.body": torch.zeros(2)}}, tmp_path / "other.pth")
    with pytest.raises(UsageError, match="does not fit this network"):
        run(images, "--pretrained_weights", str(tmp_path / "other.pth"))


# --------------------------------------------------------------------------- the callback of pre-training


def test_callback_scores_both_networks_and_restores_the_state(images: Path) -> None:
    config = load_config("experiments/demo/swin_micro.yaml", TINY_SWIN)
    teacher, student = (build_model("swin", config, is_teacher=is_teacher) for is_teacher in (True, False))
    args = argparse.Namespace(knn_every=2, knn_data_path=str(images), seed=0, precision="fp32")
    args.batch_size_per_gpu, args.num_workers = 4, 0
    callback = build_knn_callback(args, config, teacher, student, 32, torch.device("cpu"))
    assert callback is not None
    assert callback(0) == {}
    before = torch.get_rng_state()
    scores = callback(1)
    assert set(scores) == {"knn_top1", "knn_top1_student"}
    assert all(0 <= score <= 100 for score in scores.values())
    assert torch.equal(torch.get_rng_state(), before)
    assert student.training
    args.knn_every = 0
    assert build_knn_callback(args, config, teacher, student, 32, torch.device("cpu")) is None
