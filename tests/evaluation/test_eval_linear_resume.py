"""A linear probe that goes on: stopped, finished, published and foreign folders, and features that outlive it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.confusions import assert_confusions_fit, read_confusions
from helpers.linear_runs import log_lines, results, run, saved, write_colors
from helpers.runs import TINY_SWIN, flipped

from config.loading import load_config
from evaluation import feature_loaders, linear
from evaluation.feature_loaders import FeatureLoader
from evaluation.features import extract_splits
from evaluation.linear import Probe, Score, validate
from models import build_model
from utils import UsageError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_colors(tmp_path / "images")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}


def stop_in_epoch(monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    """Kill the run in the validation of an epoch."""
    validations = iter(range(100))

    def killed(probe: Probe, loader: FeatureLoader) -> list[Score]:
        if next(validations) == epoch:
            raise KeyboardInterrupt
        return validate(probe, loader)

    monkeypatch.setattr(linear, "validate", killed)


@pytest.mark.parametrize("flags", [["--lr", "20"], ["--lr", "1", "20", "--cache_features"]], ids=["one", "cached grid"])
def test_resumed_equals_uninterrupted(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    run(images, tmp_path / "whole", *flags)
    with monkeypatch.context() as patch:
        stop_in_epoch(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run(images, tmp_path / "parts", *flags)
    assert saved(tmp_path / "parts")["epoch"] == 2
    assert not (tmp_path / "parts" / "results").exists()
    run(images, tmp_path / "parts", *flags)
    whole, parts = saved(tmp_path / "whole"), saved(tmp_path / "parts")
    assert [line["epoch"] for line in log_lines(tmp_path / "parts")] == [0, 1, 2]
    for key in ("state_dict", "classifiers"):
        torch.testing.assert_close(parts.get(key), whole.get(key), rtol=0, atol=0)
    for key in ("epoch", "best_acc", "table", "scheduler", "run"):
        assert parts[key] == whole[key]
    torch.testing.assert_close(parts["optimizer"]["state"], whole["optimizer"]["state"], rtol=0, atol=0)
    assert results(tmp_path / "parts") == results(tmp_path / "whole")
    assert_confusions_fit(tmp_path / "parts", "linear")
    assert read_confusions(tmp_path / "parts", "linear") == read_confusions(tmp_path / "whole", "linear")


def test_damaged_checkpoint_falls_back_to_the_previous_one(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last epoch is trained again to the same bits; the damaged file and the line of that epoch are kept aside."""
    out = tmp_path / "out"
    run(images, out, "--lr", "1", "20")
    whole, scores = saved(out), results(out)
    content = flipped(out / "checkpoint.pth.tar")
    (out / "checkpoint.pth.tar").write_bytes(content)
    capsys.readouterr()
    run(images, out, "--lr", "1", "20")
    assert f"resuming {out}/checkpoint.pth_previous1.tar at epoch 2" in capsys.readouterr().err
    again = saved(out)
    torch.testing.assert_close(again["classifiers"], whole["classifiers"], rtol=0, atol=0)
    assert (again["epoch"], again["table"], results(out)) == (3, whole["table"], scores)
    assert (out / "checkpoint.pth.tar.damaged").read_bytes() == content
    assert [line["epoch"] for line in log_lines(out)] == [0, 1, 2]
    assert len((out / "log_repeated.txt").read_text().splitlines()) == 1


def test_finished_run_reports_again(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(images, tmp_path / "out", "--epochs", "1")
    first, files = capsys.readouterr().out, contents(tmp_path / "out")
    assert first.splitlines()[-1].startswith("Top-1 test accuracy: ")

    def not_again(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(linear, "train", not_again)
    run(images, tmp_path / "out", "--epochs", "1")
    assert capsys.readouterr().out == first
    assert contents(tmp_path / "out") == files


def test_checkpoint_without_confusions_is_resumed(images: Path, tmp_path: Path) -> None:
    """As earlier versions saved it: the best epoch has no matrix unless a later one is better."""
    run(images, tmp_path, "--epochs", "1")
    before = results(tmp_path)
    content = saved(tmp_path)
    del content["confusions"]
    torch.save(content, tmp_path / "checkpoint.pth.tar")
    run(images, tmp_path, "--epochs", "1")
    assert not (tmp_path / "results" / "linear_confusion.csv").exists()
    (old,), (new,) = before["scores"].values(), results(tmp_path)["scores"].values()
    assert new == {name: value for name, value in old.items() if name != "per_class"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lr", "0.5"], r"--lr \[0.001\] -> \[0.5\]"),
        (["--epochs", "2"], "--epochs 1 -> 2"),
        (["--lr_min", "0.1"], "--lr_min 0.0 -> 0.1"),
        (["--cache_features"], "--cache_features False -> True"),
        (["--batch_size_per_gpu", "4"], "times processes 5 -> 4"),
        (["--patch_size", "8", "--image_size", "48"], "--image_size None -> 48"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_folder_of_another_run_is_refused_and_left_alone(
    images: Path, tmp_path: Path, flags: list[str], words: str
) -> None:
    run(images, tmp_path / "out", "--epochs", "1")
    files = contents(tmp_path / "out")
    with pytest.raises(UsageError, match=f"belongs to another run .*{words}"):
        run(images, tmp_path / "out", "--epochs", "1", *flags)
    assert contents(tmp_path / "out") == files


def test_weights_are_identified_by_value(images: Path, tmp_path: Path) -> None:
    config = load_config("experiments/demo/swin_micro.yaml", TINY_SWIN)
    for name, fill in (("a", 0.01), ("moved", 0.01), ("b", 0.02)):
        network = build_model("swin", config, is_teacher=True)
        state = {
            key: torch.full_like(t, fill) if t.is_floating_point() else t for key, t in network.state_dict().items()
        }
        torch.save(state, tmp_path / f"{name}.pth")
    run(images, tmp_path / "out", "--epochs", "1", "--pretrained_weights", str(tmp_path / "a.pth"))
    run(images, tmp_path / "out", "--epochs", "1", "--pretrained_weights", str(tmp_path / "moved.pth"))
    with pytest.raises(UsageError, match="digest of weights"):
        run(images, tmp_path / "out", "--epochs", "1", "--pretrained_weights", str(tmp_path / "b.pth"))


def test_published_checkpoints_are_resumed(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only the five published keys; damaged and foreign ones are refused in words."""
    run(images, tmp_path / "out", "--epochs", "2")
    published = {"epoch", "state_dict", "optimizer", "scheduler", "best_acc"}
    content = saved(tmp_path / "out")
    path = tmp_path / "theirs" / "checkpoint.pth.tar"
    path.parent.mkdir()
    torch.save({key: content[key] for key in published} | {"best_acc": 98.5}, path)
    run(images, path.parent, "--epochs", "2")
    assert "Top-1 test accuracy: 98.50" in capsys.readouterr().out
    with pytest.raises(UsageError, match="--epochs 2, not 5"):
        run(images, path.parent, "--epochs", "5")
    torch.save({key: content[key] for key in published - {"scheduler"}}, path)
    with pytest.raises(UsageError, match="it has no scheduler"):
        run(images, path.parent, "--epochs", "2")
    torch.save({key: content[key] for key in published}, path)
    with pytest.raises(UsageError, match="other classifiers"):
        run(images, path.parent, "--epochs", "2", "--n_last_blocks", "1")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UsageError, match="damaged"):
        run(images, path.parent)


@pytest.mark.parametrize("best", [100.0, 0.0], ids=["theirs stays best", "ours is better"])
def test_the_last_epoch_of_a_published_file(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], best: float
) -> None:
    """Only its best accuracy is known: the epoch that was left is trained as by one who was never stopped."""
    run(images, tmp_path / "whole", "--epochs", "2", "--lr", "20")
    with monkeypatch.context() as patch:
        stop_in_epoch(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            run(images, tmp_path / "theirs", "--epochs", "2", "--lr", "20")
    content = {key: saved(tmp_path / "theirs")[key] for key in ("epoch", "state_dict", "optimizer", "scheduler")}
    assert content["epoch"] == 1
    torch.save(content | {"best_acc": best}, tmp_path / "theirs" / "checkpoint.pth.tar")
    capsys.readouterr()
    run(images, tmp_path / "theirs", "--epochs", "2", "--lr", "20")
    printed, found = capsys.readouterr().out, results(tmp_path / "theirs")["scores"]["lr20.0_n2"]
    whole = saved(tmp_path / "whole")
    torch.testing.assert_close(saved(tmp_path / "theirs")["state_dict"], whole["state_dict"], rtol=0, atol=0)
    last = results(tmp_path / "whole")["scores"]["lr20.0_n2"]["last_top1"]
    assert found["last_top1"] == last > 0
    if best:
        assert f"best Top1: 100.00 (before this run was resumed); last Top1: {last:.2f}, Top3: 100.00" in printed
        assert (found["top1"], found["top5"], found["epoch"]) == (100.0, None, None)
    else:
        assert f"best Top1: {last:.2f}, Top3: 100.00 (epoch 1); last Top1: {last:.2f}" in printed
        assert (found["top1"], found["epoch"]) == (last, 1)


def test_other_classes_or_labels_are_another_run(images: Path, tmp_path: Path) -> None:
    """As many images and classes as before."""
    run(images, tmp_path / "out", "--epochs", "1")
    for part in ("train", "val"):
        (images / part / "class1").rename(images / part / "other")
    with pytest.raises(UsageError, match="digest of classes and labels"):
        run(images, tmp_path / "out", "--epochs", "1")
    for part in ("train", "val"):
        (images / part / "other").rename(images / part / "class1")
    (images / "train" / "class1" / "000.png").rename(images / "train" / "class2" / "moved.png")
    with pytest.raises(UsageError, match="digest of classes and labels"):
        run(images, tmp_path / "out", "--epochs", "1")


def test_cached_features_are_reused_after_a_kill(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are computed once; again where flags differ or the file is damaged, and leave with the end of the run."""
    extracted, extract = [], extract_splits

    def counted(*args: Any, **kwargs: Any) -> Any:
        extracted.append("features")
        return extract(*args, **kwargs)

    monkeypatch.setattr(feature_loaders, "extract_splits", counted)
    run(images, tmp_path / "whole", "--cache_features", "--lr", "20")
    assert extracted == ["features"]
    file = tmp_path / "parts" / "cached_features.pth"

    def killed(flags: list[str], epoch: int) -> int:
        extracted.clear()
        with monkeypatch.context() as patch:
            stop_in_epoch(patch, epoch)
            with pytest.raises(KeyboardInterrupt):
                run(images, tmp_path / "parts", "--cache_features", *flags)
        assert file.exists()
        return len(extracted)

    assert killed(["--lr", "20", "--crop_ratio", "1"], 0) == 1  # before the first checkpoint
    assert killed(["--lr", "20"], 0) == 1
    assert killed(["--lr", "20"], 0) == 0
    file.write_bytes(file.read_bytes()[:2000])
    assert killed(["--lr", "20"], 1) == 1
    assert killed(["--lr", "20"], 0) == 0
    run(images, tmp_path / "parts", "--cache_features", "--lr", "20")
    assert not extracted
    assert not file.exists()
    torch.testing.assert_close(
        saved(tmp_path / "parts")["state_dict"], saved(tmp_path / "whole")["state_dict"], rtol=0, atol=0
    )


WRONG_OF_PROBES: dict[str, Callable[[dict[str, Any]], object]] = {
    "momentum_buffer of lr1.0_n2.linear.weight": lambda c: c["optimizer"]["state"][0].update(
        momentum_buffer=torch.ones(3)
    ),
    "'optimizer'": lambda c: c["optimizer"].update(param_groups=5),
    "'scheduler'": lambda c: c["scheduler"].update(base_lrs="x"),
    "'table'": lambda c: c.update(table=[{}]),
    "'confusions'": lambda c: c.update(confusions=[torch.ones(3)]),
    "other classifiers": lambda c: c.update(state_dict={"linear.weight": 3}),
    "'epoch'": lambda c: c.update(epoch="1"),
}


@pytest.mark.parametrize("named", WRONG_OF_PROBES)
def test_wrong_values_are_named_and_the_file_stays(images: Path, tmp_path: Path, named: str) -> None:
    run(images, tmp_path / "out", "--epochs", "1", "--lr", "1")
    content = saved(tmp_path / "out")
    WRONG_OF_PROBES[named](content)
    torch.save(content, tmp_path / "out" / "checkpoint.pth.tar")
    before = contents(tmp_path / "out")
    with pytest.raises(UsageError, match=named):
        run(images, tmp_path / "out", "--epochs", "1", "--lr", "1")
    assert contents(tmp_path / "out") == before
