"""Resuming equals never having stopped, and what a run folder holds."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.runs import TINY_RUN, flipped, write_images
from helpers.training_runs import LAYOUTS, assert_identical, train
from tensorboard.backend.event_processing import event_accumulator

import main_esvit
from checkpoints import serialization
from checkpoints.files import TEMPORARY_SUFFIX
from data import convert
from models import Backbone
from training import checkpointing, collapse
from training.step import TrainStep
from utils import UsageError, logger, resolve_precision


class Killed(Exception):
    """The run ends here, as if by a signal."""


def train_until(epochs: int, monkeypatch: pytest.MonkeyPatch, output_dir: Path, images: Path, *extra: str) -> None:
    """Train, and die right after the checkpoint of epoch `epochs` was written."""
    save = checkpointing.save_run

    def save_and_die(path: Path, step: TrainStep, place: checkpointing.RunPosition, *rest: Any) -> str:
        failure = save(path, step, place, *rest)
        if place.epoch == epochs:
            raise Killed
        return failure

    with monkeypatch.context() as patch:
        patch.setattr(checkpointing, "save_run", save_and_die)
        with pytest.raises(Killed):
            train(output_dir, images, *extra)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), 9)


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_stopping_within_an_epoch_changes_nothing(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, workers: str
) -> None:
    """A signal within an epoch: weights, optimizer, centers, random states and `log.txt` are those of one run."""
    data = images
    if layout in {"zip", "tsv", "shards"}:
        data = tmp_path / "data"
        labeled = write_images(tmp_path / "images", 3, classes=3)
        words = [str(labeled), str(data), "--to", layout, "--shard_images", "5"]
        convert.main(convert.get_args_parser().parse_args(words))
    flags = [*LAYOUTS[layout], "--use_mixup", "on", "--num_workers", workers, "--batch_size_per_gpu", "2"]
    train(tmp_path / "whole", data, *flags)
    due = checkpointing.Saver.due

    def signalled(self: checkpointing.Saver, steps: int, moved: bool, votes: Sequence[float]) -> bool:
        if steps == 1 and moved:
            os.kill(os.getpid(), signal.SIGTERM)
            votes = [self.votes()[0], 0.0]
        return due(self, steps, moved, votes)

    with monkeypatch.context() as patch:
        patch.setattr(checkpointing.Saver, "due", signalled)
        train(tmp_path / "parts", data, *flags)
    stopped = serialization.load_file(tmp_path / "parts" / "checkpoint.pth")
    assert (stopped["epoch"], stopped["in_epoch"]["steps"], stopped["in_epoch"]["images"]) == (0, 1, 2)
    train(tmp_path / "parts", data, *flags)
    whole, parts = (serialization.load_file(tmp_path / run / "checkpoint.pth") for run in ("whole", "parts"))
    for key in whole.keys() - {"args"}:
        assert_identical(whole[key], parts[key], key)
    logs = [
        [
            {key: value for key, value in json.loads(line).items() if key.startswith("train_") or key == "epoch"}
            for line in (tmp_path / run / "log.txt").open()
        ]
        for run in ("whole", "parts")
    ]
    assert logs[0] == logs[1]
    assert len(logs[0]) == 2


def test_saving_by_the_clock(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--save_every_minutes 2 where 50 seconds pass before a step: before every third of an epoch's nine, and after the epoch."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    votes, save_run = checkpointing.Saver.votes, checkpointing.save_run
    places: list[tuple[int, int]] = []

    def tick(self: checkpointing.Saver) -> list[float]:
        now[0] += 50
        return votes(self)

    def noted(path: Path, step: TrainStep, place: checkpointing.RunPosition, *rest: Any) -> str:
        places.append((place.epoch, place.steps))
        return save_run(path, step, place, *rest)

    monkeypatch.setattr(checkpointing.Saver, "votes", tick)
    monkeypatch.setattr(checkpointing, "save_run", noted)
    train(tmp_path, images, "--save_every_minutes", "2", "--batch_size_per_gpu", "1", "--saveckp_freq", "0")
    assert places == [(0, 2), (0, 5), (0, 8), (1, 0), (1, 2), (1, 5), (1, 8), (2, 0)]


def test_what_is_drawn_again_is_not_drawn_twice(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that falls back three steps: each step has one point in TensorBoard, and what was before stays."""
    flags = ["--batch_size_per_gpu", "1", "--save_every_steps", "6"]
    train_until(1, monkeypatch, tmp_path, images, *flags)
    (tmp_path / "checkpoint_previous1.pth").replace(tmp_path / "checkpoint.pth")  # of step 6 of 9
    train(tmp_path, images, *flags)
    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("loss/total")] == list(range(1, 19))  # images seen
    assert events.Tags()["images"] == ["views/crops"]


def test_counts_of_a_collapse_go_on(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """A cause that lasted three readings before a stop is told two readings after it."""
    monkeypatch.setattr(collapse, "LEAST_RANK", 1e9)  # every reading is a collapse
    flags = ["--batch_size_per_gpu", "2", "--use_dense_prediction", "off"]  # four readings an epoch
    counts: list[float] = []
    check = collapse.Monitor.check

    def counted(self: collapse.Monitor, *args: Any, **kwargs: Any) -> None:
        check(self, *args, **kwargs)
        counts.append(self.state_dict()["view/rank"])

    monkeypatch.setattr(collapse.Monitor, "check", counted)
    train_until(1, monkeypatch, tmp_path, images, *flags)
    assert counts == [1, 2, 3, 4]
    assert "have lost rank" not in capsys.readouterr().err
    train(tmp_path, images, *flags)
    assert counts == [1, 2, 3, 4, 5, 6, 7, 8]
    told = capsys.readouterr().err
    assert told.count("the view features have lost rank") == 1
    assert "for 5 consecutive readings" in told
    assert "checkpoint.pth at epoch 1: precision fp32" in told


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_damaged_checkpoint_gives_way_to_the_one_before(images: Path, tmp_path: Path, damage: str) -> None:
    train(tmp_path, images)
    whole = serialization.load_file(tmp_path / "checkpoint.pth")
    content = flipped(tmp_path / "checkpoint.pth")
    broken = {"truncated": content[: len(content) // 2], "flipped": content, "empty": b""}[damage]
    (tmp_path / "checkpoint.pth").write_bytes(broken)
    left, foreign = tmp_path / f".checkpoint.pth{TEMPORARY_SUFFIX}", tmp_path / ".notes.tmp"
    for file in (left, foreign):
        file.write_text("of a saving that did not end; of somebody else")
    train(tmp_path, images)
    assert (left.exists(), foreign.exists()) == (False, True)
    again = serialization.load_file(tmp_path / "checkpoint.pth")
    for key in whole.keys() - {"args"}:
        assert_identical(whole[key], again[key], key)
    assert (tmp_path / "checkpoint.pth.damaged").read_bytes() == broken
    assert [json.loads(line)["epoch"] for line in (tmp_path / "log.txt").open()] == [0, 1]
    assert [json.loads(line)["epoch"] for line in (tmp_path / "log_repeated.txt").open()] == [1]


def test_foreign_bytes_in_the_log_stay_and_stop_nothing(images: Path, tmp_path: Path) -> None:
    train(tmp_path, images)
    foreign = b"a note, gr\xf6\xdfe\n" + bytes(40) + b"\n"
    with (tmp_path / "log.txt").open("ab") as log:
        log.write(foreign)
    (tmp_path / "checkpoint.pth").write_bytes(b"")  # so that an epoch is trained again
    train(tmp_path, images)
    lines = (tmp_path / "log.txt").read_bytes().splitlines(keepends=True)
    assert b"".join(lines[1:-1]) == foreign
    assert [json.loads(lines[i])["epoch"] for i in (0, -1)] == [0, 1]


@pytest.mark.parametrize("network", ["student", "teacher"])
def test_weights_that_are_not_finite_end_the_run_and_the_last_checkpoint_stays(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str
) -> None:
    """At the end of the second epoch; the same command then goes on from the first."""
    save = checkpointing.Saver.save

    def spoil(self: checkpointing.Saver, place: checkpointing.RunPosition) -> None:
        if place.epoch == 2:
            assert isinstance(self.step, TrainStep)
            next(getattr(self.step.method, network).parameters()).data.view(-1)[3] = float("nan")
        save(self, place)

    flags = ("--saveckp_freq", "1")
    with monkeypatch.context() as patch:
        patch.setattr(checkpointing.Saver, "save", spoil)
        with pytest.raises(FloatingPointError, match=rf"{network}\..* is not finite"):
            train(tmp_path, images, *flags)
    assert sorted(file.name for file in tmp_path.glob("*.pth")) == ["checkpoint.pth", "checkpoint0000.pth"]
    assert serialization.load_file(tmp_path / "checkpoint.pth")["epoch"] == 1
    train(tmp_path, images, *flags)
    assert serialization.load_file(tmp_path / "checkpoint.pth")["epoch"] == 2


@pytest.mark.parametrize("what", ["folder", "fifo", "link to nothing", "unreadable"])
def test_checkpoint_that_is_no_file_gives_way_to_the_one_before(
    images: Path, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is kept under another name; without one before, nothing is begun anew in its place."""
    train(tmp_path, images)
    whole = serialization.load_file(tmp_path / "checkpoint.pth")
    path, opened = tmp_path / "checkpoint.pth", Path.open
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "link to nothing":
        path.symlink_to("nowhere")
    else:
        path.write_text("of another user")

    def refuse(self: Path, *args: Any, **options: Any) -> Any:
        if self == path and path.is_file() and path.read_bytes()[:2] == b"of":
            raise PermissionError(13, "Permission denied")
        return opened(self, *args, **options)

    if what == "unreadable":
        monkeypatch.setattr(Path, "read_bytes", lambda self: opened(self, "rb").read())
        monkeypatch.setattr(Path, "open", refuse)
    train(tmp_path, images)
    again = serialization.load_file(path)
    for key in whole.keys() - {"args"}:
        assert_identical(whole[key], again[key], key)
    assert os.path.lexists(tmp_path / "checkpoint.pth.damaged")
    told = capsys.readouterr().err
    assert f"'{path}'" in told
    assert "any more" not in told  # it was moved by the run itself
    path.unlink()
    os.rename(tmp_path / "checkpoint.pth.damaged", path)
    (tmp_path / "checkpoint_previous1.pth").unlink()
    with pytest.raises(UsageError, match=r"every checkpoint .*\(checkpoint\.pth\)"):
        train(tmp_path, images)


def test_full_disk_leaves_the_last_checkpoint(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes on; only an end that is not saved is an error."""
    train(tmp_path, images, "--epochs", "1")
    before = (tmp_path / "checkpoint.pth").read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(serialization, "write_file", full)
        with pytest.raises(UsageError, match=r"last checkpoint could not be written .*No space left"):
            train(tmp_path, images)
    assert (tmp_path / "checkpoint.pth").read_bytes() == before
    train(tmp_path, images)
    assert serialization.load_file(tmp_path / "checkpoint.pth")["epoch"] == 2


def test_kept_checkpoint_that_fails_alone_is_told_alone(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoint0000.pth").mkdir()  # so that no file can get this name
    train(tmp_path, images, "--epochs", "1")
    told = [line for line in capsys.readouterr().err.splitlines() if "cannot" in line]
    assert len(told) == 1
    assert told[0].startswith("cannot keep checkpoint0000.pth (")
    assert serialization.load_file(tmp_path / "checkpoint.pth")["epoch"] == 1


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_kept_checkpoints_stay_what_they_were(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    """Later saves do not change them, whether they are hard links or copies."""
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "no links")))
    train(tmp_path, images, "--saveckp_freq", "1")
    kept = [serialization.load_file(tmp_path / f"checkpoint000{epoch}.pth") for epoch in (0, 1)]
    assert [content["epoch"] for content in kept] == [1, 2]
    assert_identical(kept[0], serialization.load_file(tmp_path / "checkpoint_previous1.pth"))
    assert_identical(kept[1], serialization.load_file(tmp_path / "checkpoint.pth"))


def test_checkpoint_that_is_gone_is_told_and_written_again(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of a mount that is no longer there, whose place is an empty folder."""
    save = checkpointing.save_run

    def save_and_lose(path: Path, step: TrainStep, place: checkpointing.RunPosition, *rest: Any) -> str:
        failure = save(path, step, place, *rest)
        if place.epoch == 1:
            path.unlink()
        return failure

    monkeypatch.setattr(checkpointing, "save_run", save_and_lose)
    train(tmp_path, images)
    assert capsys.readouterr().err.count("checkpoint.pth has disappeared") == 1
    assert serialization.load_file(tmp_path / "checkpoint.pth")["epoch"] == 2


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--use_mixup", "on", "--accum_iter", "2"],
        ["--optimizer", "lars"],
        ["--precision", "bf16"],
        ["--aug-opt", "deit_aug", "--grad_checkpointing", "on"],
        ["--aug_backend", "pil"],
        pytest.param(["--compile"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_two_steps_resume_two_steps_is_four_steps(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    """Bit for bit: weights of both networks, optimizer, centers, random states; and the losses logged."""
    train(tmp_path / "whole", images, *flags)
    train_until(1, monkeypatch, tmp_path / "parts", images, *flags)
    train(tmp_path / "parts", images, *flags)
    whole, parts = (serialization.load_file(tmp_path / run / "checkpoint.pth") for run in ("whole", "parts"))
    assert whole["epoch"] == 2
    for key in whole.keys() - {"args"}:
        assert_identical(whole[key], parts[key], key)
    losses = [
        [json.loads(line)["train_loss"] for line in (tmp_path / run / "log.txt").open()] for run in ("whole", "parts")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


def test_run_folder(images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Everything a run leaves behind, with the published keys; starting it again changes nothing."""
    train(tmp_path, images, "--precision", "auto")
    content = serialization.load_file(tmp_path / "checkpoint.pth")
    assert content["args"].precision == resolve_precision("auto", torch.device("cpu"))
    assert content["args"].aug_backend == "split"  # what auto stood for
    assert {"student", "teacher", "optimizer", "epoch", "args", "dino_loss", "fp16_scaler"} <= content.keys()
    assert all(key.startswith("module.") for key in content["student"])
    assert not any(key.startswith("module.") for key in content["teacher"])
    assert content["student"]["module.head.last_layer.weight_g"].shape == (32, 1)
    assert set(content["dino_loss"]) == {"center", "center_grid"}
    assert content["args"].out_dim == 32
    assert (tmp_path / "checkpoint0000.pth").is_file()

    lines = [json.loads(line) for line in (tmp_path / "log.txt").open()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert {"train_loss", "train_lr", "train_wd", "images_per_s", "waiting_share", "peak_memory_mb"} <= lines[0].keys()
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["seed"] == 0
    assert run["args"]["out_dim"] == 32
    assert {"torch", "timm"} <= run["packages"].keys()
    assert "DIM_EMBED: 12" in (tmp_path / "config.yaml").read_text()
    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [event.value for event in events.Scalars("loss/train")] == pytest.approx(
        [line["train_loss"] for line in lines]
    )
    assert len(events.Scalars("loss/total")) == 4
    assert events.Tags()["images"] == ["views/crops"]

    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    train(tmp_path, images)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_changed_arguments_are_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Also those that the saved run did not have, where it did something else; not how often lines are logged."""
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "handlers", [])
    now = {
        "aug_backend": "split",
        "sampler": "distributed",
        "num_workers": 2,
        "device": "cpu",
        "log_freq": 5,
        "lr": 0.1,
    }
    saved = {"num_workers": 10, "device": "cuda", "log_freq": 10, "lr": 0.1}
    checkpointing._report_changes(now, saved)
    checkpointing._report_changes(now, now | {"log_freq": 1})
    assert caplog.messages == [
        "arguments differ from those of the resumed run: "
        "aug_backend pil -> split; device cuda -> cpu; num_workers 10 -> 2"
    ]


def test_training_improves_on_its_own_start(images: Path, tmp_path: Path) -> None:
    train(tmp_path, images, "--epochs", "6", "--momentum_teacher", "0.9", "--lr", "0.1", "--batch_size_per_gpu", "8")
    losses = [json.loads(line)["train_loss"] for line in (tmp_path / "log.txt").open()]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("in_chans", [1, 5])
def test_gray_and_many_channel_images_train(tmp_path: Path, in_chans: int) -> None:
    (tmp_path / "images").mkdir()
    for i in range(8):
        np.save(tmp_path / "images" / f"{i}.npy", np.random.default_rng(i).random((40, 36, in_chans), dtype=np.float32))
    per_channel = str([0.5] * in_chans)
    overrides = ["MODEL.SPEC.IN_CHANS", str(in_chans), "INPUT.MEAN", per_channel, "INPUT.STD", per_channel]
    train(tmp_path / "run", tmp_path / "images", overrides=overrides)
    content = serialization.load_file(tmp_path / "run" / "checkpoint.pth")
    assert content["teacher"]["patch_embed.proj.weight"].shape == (12, in_chans, 4, 4)
    assert content["epoch"] == 2
    assert (tmp_path / "run" / "crops.png").is_file()


@pytest.mark.parametrize("flags", [["--aug-opt", "deit_aug"], ["--local_crops_number", "0"], ["--local_crops_number", "1", "1",
                                   "--local_crops_size", "16", "12"]], ids=["deit", "no locals", "two sizes"])  # fmt: skip
def test_views_of_every_kind_train(images: Path, tmp_path: Path, flags: list[str]) -> None:
    train(tmp_path, images, *flags)
    losses = [json.loads(line)["train_loss"] for line in (tmp_path / "log.txt").open()]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--out_dim", "16"], "32 prototypes, this run of 16; set --out_dim 32"),
        (["--use_dense_prediction", "off"], "--use_dense_prediction"),
        (["--head_hidden_dim", "8"], "does not fit this network"),
        (["--norm_last_layer", "off"], "--norm_last_layer"),
        (["--optimizer", "sgd"], "--optimizer adamw, not sgd"),
    ],
    ids=["prototypes", "task", "head", "gain", "optimizer"],
)
def test_resuming_another_run_is_refused(images: Path, tmp_path: Path, flags: list[str], words: str) -> None:
    train(tmp_path, images, "--epochs", "1")
    before = (tmp_path / "checkpoint.pth").read_bytes()
    with pytest.raises(UsageError, match=words):
        train(tmp_path, images, *flags)
    assert (tmp_path / "checkpoint.pth").read_bytes() == before


@pytest.mark.parametrize("often", [[], ["--save_every_steps", "1"]], ids=["after an epoch", "within one"])
def test_drawn_neighbors_of_vil_resume_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, often: list[str]
) -> None:
    """Which chunk a call of ViL draws, and when it stops drawing, is as if the run had never ended."""
    images = write_images(tmp_path / "images", 8)
    overrides = [
        *("MODEL.NAME", "vision_longformer", "MODEL.IMAGE_SIZE", "32", "MODEL.SPEC.MSVIT.VIL_MODE_SWITCH", "0.7")
    ]
    overrides += [
        "MODEL.SPEC.MSVIT.MODE",
        "1",
        "MODEL.SPEC.MSVIT.ARCH",
        "l1,h1,d8,n1,s1,g1,p4,f2,a0_l2,h1,d12,n1,s0,g0,p2,f2,a0",
    ]

    def run(folder: str) -> None:
        args = [
            *TINY_RUN,
            "--arch",
            "vil",
            "--cfg",
            "experiments/demo/vil_micro.yaml",
            "--epochs",
            "3",
            "--data_path",
            str(images),
            *often,
        ]
        args += ["--output_dir", str(tmp_path / folder), "--device", "cpu", *overrides]
        main_esvit.main(main_esvit.get_args_parser().parse_args(args))

    run("whole")
    save = checkpointing.save_run

    def save_and_die(*args: Any) -> str:
        save(*args)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpointing, "save_run", save_and_die)
        with pytest.raises(Killed):
            run("halves")
    run("halves")
    whole, halves = (serialization.load_file(tmp_path / folder / "checkpoint.pth") for folder in ("whole", "halves"))
    for network in ("student", "teacher"):
        assert all(torch.equal(value, halves[network][name]) for name, value in whole[network].items())


def test_networks_hear_of_every_epoch_also_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What depends on the progress of training (ViL's switch of modes) follows the epoch, so a resumed run has it."""
    heard: list[tuple[int, int]] = []
    monkeypatch.setattr(Backbone, "start_epoch", lambda self, epoch, epochs: heard.append((epoch, epochs)))
    images = write_images(tmp_path / "images", 8)
    train_until(1, monkeypatch, tmp_path / "run", images)
    assert heard == [(0, 2)] * 2  # student and teacher
    train(tmp_path / "run", images)
    assert heard == [(0, 2)] * 2 + [(1, 2)] * 2
