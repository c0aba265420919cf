"""The linear probe against a loop written out by hand, and the script: grids, caching, mistakes, several processes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helpers.confusions import assert_confusions_fit, read_confusions, slow_cells
from helpers.linear_runs import QUICK, SWIN, log_lines, results, run, saved, write_colors
from helpers.runs import TINY_SWIN, run_script, write_images
from helpers.small_networks import ARCHITECTURES, SMALL, small_network
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import data
import eval_linear
from config.loading import load_config
from data.transforms import augment
from evaluation.feature_loaders import CachedFeatureLoader, FeatureLoader
from evaluation.features import LabeledFeatures
from evaluation.linear import Probe, Setting, load_classifier, probe_width, validate
from models import build_model
from training.checkpointing import StopRequest
from training.run_log import EpochMeter
from utils import UsageError

CPU = torch.device("cpu")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_colors(tmp_path / "images")


# --------------------------------------------------------------------------- the protocol, written out


class ByHand:
    """One linear classifier, with softmax, gradient, momentum and cosine written out, in double precision."""

    def __init__(self, width: int, classes: int, lr: float, epochs: int, lr_min: float = 0.0) -> None:
        self.weight = 0.01 * torch.randn(classes, width, generator=torch.Generator().manual_seed(0)).double()
        self.bias = torch.zeros(classes).double()
        self.velocity = [torch.zeros_like(self.weight), torch.zeros_like(self.bias)]
        self.base_lr, self.lr_min, self.epochs = lr, lr_min, epochs

    def lr(self, epoch: int) -> float:
        return self.lr_min + (self.base_lr - self.lr_min) / 2 * (1 + math.cos(math.pi * epoch / self.epochs))

    def probabilities(self, features: Tensor) -> Tensor:
        return torch.softmax(features.double() @ self.weight.T + self.bias, dim=1)

    def loss(self, features: Tensor, labels: Tensor) -> float:
        return -self.probabilities(features)[torch.arange(len(labels)), labels].log().mean().item()

    def step(self, features: Tensor, labels: Tensor, epoch: int) -> float:
        loss = self.loss(features, labels)
        error = self.probabilities(features)
        error[torch.arange(len(labels)), labels] -= 1
        gradients = [error.T @ features.double() / len(labels), error.mean(dim=0)]
        for i, (parameter, gradient) in enumerate(zip((self.weight, self.bias), gradients)):
            self.velocity[i] = 0.9 * self.velocity[i] + gradient
            parameter -= self.lr(epoch) * self.velocity[i]
        return loss


def frozen_features(n: int, images: Path, epoch: int | None) -> tuple[Tensor, Tensor]:
    """Features and labels of a part: random crops of an epoch of the training set, or center crops of all (None)."""
    torch.manual_seed(0)
    config = load_config("experiments/demo/swin_micro.yaml", TINY_SWIN)
    network = build_model("swin", config, is_teacher=True).eval()
    size, mean, std = 32, config.INPUT.MEAN, config.INPUT.STD
    view = augment.eval_view(size, 0.875, mean, std) if epoch is None else augment.train_view(size, mean, std)
    dataset = data.build_dataset(images, "train", view, need_labels=True)
    dataset.epoch = epoch or 0
    samples = [dataset[i] for i in range(len(dataset))]
    with torch.no_grad():
        features = [network.forward_return_n_last_blocks(sample.views[0][None], n) for sample in samples]
    return torch.cat(features), torch.tensor([sample.label for sample in samples])


def order_of(epoch: int, count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(epoch))  # seed 0 + epoch


@pytest.mark.parametrize("cached", [False, True], ids=["published", "cached"])
def test_published_protocol_equals_a_manual_loop(images: Path, tmp_path: Path, cached: bool) -> None:
    """Three epochs over 12 images in batches of 5, 5 and 2: weights, losses, learning rates and accuracies."""
    flags, lr_min = (["--cache_features", "--lr_min", "0.01"], 0.01) if cached else ([], 0.0)
    run(images, tmp_path / "out", "--lr", "2", *flags)
    by_hand = ByHand(2 * 24, 3, lr=2 * 5 / 256, epochs=3, lr_min=lr_min)
    val_features, val_labels = frozen_features(2, images / "val", None)
    lines = log_lines(tmp_path / "out")
    for epoch in range(3):
        features, labels = frozen_features(2, images / "train", None if cached else epoch)
        losses = [by_hand.step(features[i], labels[i], epoch) for i in order_of(epoch, 12).split(5)]
        assert lines[epoch]["epoch"] == epoch
        assert lines[epoch]["train_lr"] == pytest.approx(by_hand.lr(epoch))
        assert lines[epoch]["train_loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)
        assert lines[epoch]["test_loss"] == pytest.approx(by_hand.loss(val_features, val_labels), rel=1e-5)
        hits = (by_hand.probabilities(val_features).argmax(dim=1) == val_labels).double()
        assert lines[epoch]["test_acc1"] == pytest.approx(100 * hits.mean().item())
        assert (lines[epoch]["test_acc5"], lines[epoch]["acc5_is"]) == (100, "top3")
    state = saved(tmp_path / "out")
    assert set(state["state_dict"]) == {"module.linear.weight", "module.linear.bias"}
    torch.testing.assert_close(
        state["state_dict"]["module.linear.weight"].double(), by_hand.weight, rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(state["state_dict"]["module.linear.bias"].double(), by_hand.bias, rtol=1e-4, atol=1e-6)
    assert {"epoch", "optimizer", "scheduler", "best_acc"} <= state.keys()
    assert "classifiers" not in state
    assert state["epoch"] == 3
    assert state["best_acc"] == max(line["test_acc1"] for line in lines)
    assert all(("NOT the published" in line.get("protocol", "")) == cached for line in lines)


def test_colors_are_learned(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(images, tmp_path / "out", "--lr", "20", "--epochs", "8")
    printed = capsys.readouterr().out
    assert "published protocol (random resized crops): 6 validation and 12 training images, 3 classes" in printed
    assert ", Top3: 100.00" in printed
    assert "Top-1 test accuracy: 100.00" in printed


# --------------------------------------------------------------------------- several classifiers


@torch.no_grad()
@pytest.mark.parametrize("avgpool", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_features_of_fewer_blocks_are_the_tail(name: str, avgpool: bool) -> None:
    network, images = small_network(name).eval(), torch.randn(2, 3, 64, 64)
    largest = min(4, sum(network.stage_depths))
    whole = network.forward_return_n_last_blocks(images, largest, avgpool)
    for n in range(1, largest + 1):
        alone = network.forward_return_n_last_blocks(images, n, avgpool)
        assert alone.shape[1] == probe_width(network, n, avgpool)
        torch.testing.assert_close(whole[:, -alone.shape[1] :], alone, rtol=1e-6, atol=1e-7)


def test_classifiers_are_independent(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(images, tmp_path / "grid", "--lr", "0.001", "20", "--n_last_blocks", "1", "3")
    printed, table, grid = capsys.readouterr().out, results(tmp_path / "grid")["scores"], saved(tmp_path / "grid")
    names = ["lr0.001_n1", "lr20.0_n1", "lr0.001_n3", "lr20.0_n3"]
    assert list(grid["classifiers"]) == names
    assert list(table) == names
    for name, row in table.items():
        lr, n = name[2:].split("_n")
        run(images, tmp_path / name, "--lr", lr, "--n_last_blocks", n)
        alone = saved(tmp_path / name)["state_dict"]
        for key, weights in grid["classifiers"][name].items():
            torch.testing.assert_close(weights, alone[f"module.{key}"], rtol=1e-5, atol=1e-7)
        assert row["top1"] == results(tmp_path / name)["scores"][name]["top1"]
        assert f"lr {float(lr)}, last {n} block{'s' if int(n) > 1 else ''}: best Top1: {row['top1']:.2f}" in printed
        losses = [line["classifiers"][name]["train_loss"] for line in log_lines(tmp_path / "grid")]
        assert losses == pytest.approx([line["train_loss"] for line in log_lines(tmp_path / name)], rel=1e-5)
    accuracies = [row["top1"] for row in table.values()]
    best = accuracies.index(max(accuracies))
    assert grid["best_acc"] == accuracies[best]
    assert torch.equal(grid["state_dict"]["module.linear.weight"], grid["classifiers"][names[best]]["linear.weight"])
    last = log_lines(tmp_path / "grid")[-1]
    assert last["classifiers"][names[best]].items() <= last.items()  # the published keys are those of the best


def test_diverged_classifier_does_not_affect_others(images: Path, tmp_path: Path) -> None:
    """Its weights are in no file, and it stays diverged when the run goes on."""
    run(images, tmp_path / "grid", "--cache_features", lr=[1e40, 20.0])
    run(images, tmp_path / "alone", "--lr", "20", "--cache_features")
    diverged, healthy = results(tmp_path / "grid")["scores"].values()
    (alone,) = results(tmp_path / "alone")["scores"].values()
    assert healthy.pop("per_class") == alone.pop("per_class")
    assert healthy == pytest.approx(alone)
    assert diverged["last_top1"] == 0
    assert diverged["last_loss"] is None
    none, some = read_confusions(tmp_path / "grid", "linear").values()
    assert {predicted for _, predicted in none} == {""}  # the outputs are not finite
    assert sum(none.values()) == sum(some.values()) == 6
    assert "NaN" not in (tmp_path / "grid" / "log.txt").read_text()
    with pytest.raises(FloatingPointError, match="lower --lr"):
        run(images, tmp_path / "only", "--cache_features", lr=[1e40])
    grid = saved(tmp_path / "grid")
    names = [f"lr{lr}_n2" for lr in (1e40, 20.0)]
    assert (list(grid["classifiers"]), grid["diverged"]) == ([names[1]], [names[0]])
    assert torch.equal(grid["state_dict"]["module.linear.weight"], grid["classifiers"][names[1]]["linear.weight"])
    labels, width = grid["state_dict"]["module.linear.weight"].shape
    settings, epochs = [Setting(1e40, 2), Setting(20.0, 2)], grid["scheduler"]["T_max"]
    probe = Probe(settings, [width, width], labels, 256, epochs, CPU, seed=0)
    probe.load_state_dict(grid, Path("it"))
    assert all(weights.isnan().all() for weights in probe.classifiers.each[0].parameters())
    assert probe.state_dict(5)["classifiers"].keys() == {names[1]}


# --------------------------------------------------------------------------- validation


class Given(FeatureLoader):
    """Validation batches as they are given."""

    def __init__(self, batches: list[LabeledFeatures]) -> None:
        self.batches, self.steps = batches, 0
        self.validation_images = sum(len(batch.labels_N) for batch in batches)

    def training(self, *_: object) -> Iterator[LabeledFeatures]:
        raise NotImplementedError

    def validation(self) -> Iterator[LabeledFeatures]:
        return iter(self.batches)


@pytest.mark.parametrize("classes", [2, 5, 9])
def test_validation_scores(classes: int) -> None:
    """Batches of different sizes weigh by their images."""
    probe = Probe([Setting(1.0, 1), Setting(1.0, 2)], [3, 5], classes, 256, 1, CPU, seed=0)
    features, labels = torch.randn(11, 5), torch.randint(classes, (11,))
    batches = [LabeledFeatures(f, y) for f, y in zip(features.split(4), labels.split(4))]
    for score, classifier, width in zip(validate(probe, Given(batches)), probe.classifiers.each, (3, 5)):
        assert isinstance(classifier.linear, torch.nn.Linear)
        logits = features[:, 5 - width :] @ classifier.linear.weight.T + classifier.linear.bias
        rank = (logits > logits[torch.arange(11), labels][:, None]).sum(dim=1)
        loss = -torch.log_softmax(logits, dim=1)[torch.arange(11), labels].mean()
        expected = (loss.item(), 100 * (rank < 1).float().mean().item(), 100 * (rank < 5).float().mean().item())
        assert score[:3] == pytest.approx(expected, rel=1e-5)
        assert torch.equal(score.confusion_P3, slow_cells(labels, logits.argmax(dim=1)))


@pytest.mark.parametrize(("images", "world"), [(7, 2), (1, 2), (9, 4), (3, 4)])
def test_cached_shares_cover_the_validation_set_once(images: int, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distributed.collectives.get_world_size", lambda: world)
    some = LabeledFeatures(torch.randn(5, 2), torch.arange(5))
    val = LabeledFeatures(torch.randn(images, 2), torch.arange(images))
    seen = []
    for rank in range(world):
        monkeypatch.setattr("distributed.collectives.get_rank", lambda rank=rank: rank)
        seen += [y for batch in CachedFeatureLoader(some, val, 2, CPU, 0).validation() for y in batch.labels_N.tolist()]
    assert sorted(seen) == list(range(images))


@pytest.mark.parametrize(
    ("images", "batch", "world"), [(7, 2, 2), (9, 1, 4), (1, 2, 2), (3, 2, 4), (8, 2, 2), (8, 3, 1)]
)
def test_shares_of_an_epoch_hold_every_image_once(
    images: int, batch: int, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In steps of `batch` times `world` images, as one process with that batch sees them."""
    monkeypatch.setattr("distributed.collectives.get_world_size", lambda: world)
    some = LabeledFeatures(torch.randn(images, 2), torch.arange(images))
    steps: dict[int, list[int]] = {}
    for rank in range(world):
        monkeypatch.setattr("distributed.collectives.get_rank", lambda rank=rank: rank)
        loader = CachedFeatureLoader(some, some, batch, CPU, seed=0)
        meter = EpochMeter(3, loader.steps, batch * world)
        for step, part in enumerate(loader.training(3, meter, StopRequest(Path("checkpoint.pth.tar")))):
            steps.setdefault(step, []).extend(part.labels_N.tolist())
    assert sorted(label for step in steps.values() for label in step) == list(range(images))
    assert [len(step) for step in steps.values()] == [loader.images_in_step(step) for step in steps]
    whole = order_of(3, images).split(batch * world)
    assert [sorted(step) for step in steps.values()] == [sorted(part.tolist()) for part in whole]


# --------------------------------------------------------------------------- the script


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(images: Path, tmp_path: Path, name: str) -> None:
    arch, overrides, patch_size = SMALL[name]
    yaml = tmp_path / "small.yaml"
    yaml.write_text(load_config(None, overrides).dump())
    flags = ["--arch", arch, "--cfg", str(yaml), "--patch_size", str(patch_size), "--data_path", str(images)]
    flags += ["--output_dir", str(tmp_path), *QUICK, "--epochs", "1", "--n_last_blocks", "1", "3", "--random_weights"]
    eval_linear.main(eval_linear.get_args_parser().parse_args([*flags, "--avgpool_patchtokens", "on"]))
    network = small_network(name)
    widths = [w["linear.weight"].shape for w in saved(tmp_path)["classifiers"].values()]
    assert widths == [(3, probe_width(network, n, True)) for n in (1, 3)]


def test_files_of_a_run(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path, "--lr", "1", "2", "--val_freq", "2", "--epochs", "4", "--cache_features")
    assert ["test_acc1" in line for line in log_lines(tmp_path)] == [True, False, True, True]  # and the last epoch
    record = results(tmp_path)
    seen = record["data"]["train_images"]
    events = EventAccumulator(str(tmp_path)).Reload()
    for tag in ("score/test_acc1", "score/classifiers/lr2.0_n2/test_acc1"):
        assert [event.step for event in events.Scalars(tag)] == [seen, 3 * seen, 4 * seen]
    assert [event.step for event in events.Scalars("loss/train")] == [seen, 2 * seen, 3 * seen, 4 * seen]
    assert "NOT the published protocol" in record["protocol"]["name"]
    assert record["protocol"]["top5_is"] == "top3"
    assert len(record["scores"]) == 2
    assert json.loads((tmp_path / "run.json").read_text())["args"]["lr"] == [1.0, 2.0]


def test_number_of_classes(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = "--num_labels is 3"
    run(images, tmp_path / "a", "--epochs", "1", "--num_labels", "3")
    assert said not in capsys.readouterr().err
    run(images, tmp_path / "b", "--epochs", "1")
    assert said in capsys.readouterr().err
    with pytest.raises(UsageError, match="--num_labels 2 is less than the 3 classes"):
        run(images, tmp_path / "c", "--num_labels", "2")
    assert saved(tmp_path / "b")["args"].num_labels == 3
    for number in (4, 1000):  # also what is the default where it is not given
        run(images, tmp_path / str(number), "--epochs", "1", "--num_labels", str(number))
        assert saved(tmp_path / str(number))["state_dict"]["module.linear.weight"].shape == (number, 48)
        assert results(tmp_path / str(number))["protocol"]["top5_is"] == f"top{min(number, 5)}"
    with pytest.raises(UsageError, match=r"belongs to another run .*--num_labels 4 -> 1000"):
        run(images, tmp_path / "4", "--epochs", "1", "--num_labels", "1000")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--zip_mode"], r"--zip_mode needs train\.zip and train_map\.txt"),
        (["--n_last_blocks", "9"], r"--n_last_blocks 9 must be in 1\.\.3"),
        (["--lr", "0.1", "0.1"], "has a value twice"),
        (["--evaluate", "--n_last_blocks", "1", "2"], r"one --n_last_blocks, not \[1, 2\]"),
        (["--linear_weights", "a.pth"], "need --evaluate"),
        (["--evaluate"], "--evaluate needs .*checkpoint.pth.tar"),
        (["--evaluate", "--linear_weights", "no.pth"], r"'no\.pth' does not exist"),
        (["--evaluate", "--linear_order", "dino"], "--linear_order dino needs --n_last_blocks 1 --avgpool_patchtokens"),
        (["--precision", "fp16"], "needs a CUDA device"),
        (["--pretrained_weights", "no.pth"], r"'no\.pth' does not exist"),
        (["--data_path", "/no/such/folder"], "does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors(images: Path, tmp_path: Path, flags: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        run(images, tmp_path / "out", *flags)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------- a trained classifier


def evaluated(capsys: pytest.CaptureFixture[str]) -> list[float]:
    """Top-1, top-5 and loss that were printed."""
    first, second = capsys.readouterr().out.splitlines()
    words = first.split()
    assert second == f"Accuracy of the network on the 6 test images: {float(words[2]):.1f}%"
    return [float(words[i]) for i in (2, 4, 6)]


def test_evaluate_gives_the_scores_of_the_last_epoch(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also of val alone, whose classes are then those that the classifier was trained on; nothing is written."""
    run(images, tmp_path / "out", "--lr", "20")
    last = log_lines(tmp_path / "out")[-1]
    expected = pytest.approx([last["test_acc1"], last["test_acc5"], last["test_loss"]], abs=1e-3)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    capsys.readouterr()
    run(images, tmp_path / "out", "--evaluate")
    assert evaluated(capsys) == expected
    (images / "train").rename(tmp_path / "elsewhere")
    run(images, tmp_path / "no", "--evaluate", "--linear_weights", str(tmp_path / "out" / "checkpoint.pth.tar"))
    assert evaluated(capsys) == expected
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    assert not (tmp_path / "no").exists()
    (images / "val" / "class1").rename(images / "val" / "zebra")
    with pytest.raises(UsageError, match="zebra"):
        run(images, tmp_path / "out", "--evaluate")


def test_evaluate_of_a_published_file(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """1000 outputs, numbered by the classes of val."""
    (images / "train").rename(tmp_path / "elsewhere")
    weight, bias = torch.randn(1000, 48), torch.randn(1000)
    bias[:3] += 100
    torch.save({"state_dict": {"module.linear.weight": weight, "module.linear.bias": bias}}, tmp_path / "linear.pth")
    run(images, tmp_path / "no", "--evaluate", "--linear_weights", str(tmp_path / "linear.pth"))
    features, labels = frozen_features(2, images / "val", None)
    logits = features @ weight.T + bias
    ranking = logits.argsort(dim=1, descending=True)[:, :5] == labels[:, None]
    loss = torch.nn.functional.cross_entropy(logits, labels)
    expected = [100 * ranking[:, 0].float().mean().item(), 100 * ranking.any(dim=1).float().mean().item(), loss.item()]
    assert evaluated(capsys) == pytest.approx(expected, abs=2e-3)
    for flags, words in (
        (["--num_labels", "3"], "--num_labels 3 differs from the 1000 outputs"),
        (["--n_last_blocks", "1"], "takes 48 features, .* gives 24"),
    ):
        with pytest.raises(UsageError, match=words):
            run(images, tmp_path / "no", "--evaluate", "--linear_weights", str(tmp_path / "linear.pth"), *flags)
    torch.save({"state_dict": {"weight": weight}}, tmp_path / "linear.pth")
    with pytest.raises(UsageError, match="linear classifier"):
        run(images, tmp_path / "no", "--evaluate", "--linear_weights", str(tmp_path / "linear.pth"))


def test_inputs_of_dino_classifiers_are_reordered(tmp_path: Path) -> None:
    token, mean = torch.randn(2, 5), torch.randn(2, 5)
    weight, bias = torch.randn(3, 10), torch.randn(3)
    torch.save({"state_dict": {"module.linear.weight": weight, "module.linear.bias": bias}}, tmp_path / "linear.pth")
    theirs = torch.cat([token.unsqueeze(-1), mean.unsqueeze(-1)], dim=-1).reshape(2, -1) @ weight.T + bias
    found = load_classifier(tmp_path / "linear.pth", 5)
    torch.testing.assert_close(torch.cat([token, mean], dim=1) @ found.weight_KC.T + found.bias_K, theirs)
    with pytest.raises(UsageError, match="takes 10 features, not 4 "):
        load_classifier(tmp_path / "linear.pth", 4)


def test_folder_of_a_pre_training_run_is_refused(images: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pth").write_text("precious")
    with pytest.raises(UsageError, match=rf"--output_dir {tmp_path} .*checkpoint\.pth"):
        run(images, tmp_path)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["checkpoint.pth"]
    assert (tmp_path / "checkpoint.pth").read_text() == "precious"


def test_missing_results_of_a_finished_run_are_written_again(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path, "--epochs", "1")
    before = results(tmp_path)
    (tmp_path / "results" / "linear.json").unlink()
    run(images, tmp_path, "--epochs", "1")
    assert results(tmp_path) == before


@pytest.mark.parametrize("part", ["train", "val"])
def test_unreadable_images_end_the_run(images: Path, tmp_path: Path, part: str) -> None:
    (images / part / "class1" / "001.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match="images cannot be read, more than 1 %"):
        run(images, tmp_path / "out")


# --------------------------------------------------------------------------- as a user starts it


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True], ids=["published", "cached"])
def test_two_processes_equal_one(tmp_path: Path, cached: bool) -> None:
    """Weights, losses and accuracies; odd numbers of images, of which a process has one more (or all)."""
    write_images(tmp_path / "images" / "train", 3, classes=3, seed=0)
    write_images(tmp_path / "images" / "val", 1 if cached else 3, classes=1 if cached else 3, seed=1)
    outputs = []
    for name, processes, batch in (("one", 0, 4), ("two", 2, 2)):
        flags = ["--data_path", str(tmp_path / "images"), "--output_dir", str(tmp_path / name), "--lr", "1", "20"]
        flags += [
            "--batch_size_per_gpu",
            str(batch),
            *(["--cache_features"] if cached else []),
            "--seed",
            "0",
            *TINY_SWIN,
        ]
        result = run_script("eval_linear.py", *SWIN, *QUICK, "--random_weights", *flags, processes=processes)
        assert result.returncode == 0, result.stderr
        outputs.append(result.stdout)
    assert outputs[0] == outputs[1]
    for name in ("one", "two"):
        assert_confusions_fit(tmp_path / name, "linear")
    assert read_confusions(tmp_path / "one", "linear") == read_confusions(tmp_path / "two", "linear")
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two")
    torch.testing.assert_close(two["classifiers"], one["classifiers"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(two["state_dict"], one["state_dict"], rtol=1e-4, atol=1e-6)
    for mine, other in zip(log_lines(tmp_path / "one"), log_lines(tmp_path / "two")):
        for key in ("train_loss", "train_lr", "test_loss", "test_acc1", "test_acc5"):
            assert other[key] == pytest.approx(mine[key], rel=1e-5)
    # What one process began, two may finish: the batch over all processes is what counts.
    assert one["run"] == two["run"]


@pytest.mark.slow
def test_mistake_on_two_processes_ends_both(images: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoint.pth.tar").write_bytes(b"damaged")
    flags = ["--data_path", str(images), "--output_dir", str(tmp_path / "out"), "--seed", "0", *TINY_SWIN]
    result = run_script("eval_linear.py", *SWIN, *QUICK, "--random_weights", *flags, processes=2)
    assert result.returncode != 0
    assert "eval_linear.py: error: " in result.stderr
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT) not in result.stderr
    assert (tmp_path / "out" / "checkpoint.pth.tar").read_bytes() == b"damaged"
