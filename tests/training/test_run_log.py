"""training/run_log.py: meters, the terminal, log.txt, TensorBoard and the picture of the crops."""

from __future__ import annotations

import fcntl
import io
import json
import os
import select
import struct
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training.run_log import GROUPS, EpochMeter, RunLog, tag
from utils import logger

CPU = torch.device("cpu")


def test_means_leave_skipped_steps_out() -> None:
    meter = EpochMeter(epoch=0, steps=3, images_per_step=4)
    meter.update({"loss": 1.0, "skipped": 0.0})
    meter.update({"loss": float("nan"), "skipped": 1.0})
    meter.update({"loss": 3.0, "skipped": 0.0})
    assert meter.means() == {"loss": 2.0, "skipped_steps": 1.0}


def test_scalars_stay_on_the_device_until_they_are_read() -> None:
    """Means, latest values and `read` are the same for tensors and for numbers."""
    losses = torch.randn(5)
    tensors, numbers = (EpochMeter(epoch=0, steps=5, images_per_step=4) for _ in range(2))
    returned = []
    for i, loss in enumerate(losses):
        skipped = float(i == 2)
        tensors.update({"loss": loss, "skipped": torch.tensor(skipped)})
        numbers.update({"loss": loss.item(), "skipped": skipped})
        if i in {2, 3}:
            returned.append(tensors.read())
    assert tensors.means() == numbers.means()
    assert tensors.means()["loss"] == sum(losses[i].item() for i in (0, 1, 3, 4)) / 4
    assert tensors.latest == {"loss": losses[4].item(), "skipped": 0.0}
    assert [[step["loss"] for step in steps] for steps in returned] == [losses[:3].tolist(), losses[3:4].tolist()]
    assert tensors.read() == []


class Clock:
    """Replace `time.perf_counter`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


def test_waiting_is_the_time_for_batches_only(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def batches() -> Iterator[int]:
        for i in range(3):
            clock.now += 0.25
            yield i

    meter = EpochMeter(epoch=0, steps=3, images_per_step=4)
    passed_on = []
    for batch in meter.timed(batches()):
        passed_on.append(batch)
        meter.update({"loss": 0.0})
        clock.now += 0.75
    assert passed_on == [0, 1, 2]
    assert (meter.seconds, meter.waiting_share, meter.images_per_second) == (3.0, 0.25, 4.0)


def test_time_after_the_last_step_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    meter = EpochMeter(epoch=0, steps=1, images_per_step=1)
    meter.update({"loss": 0.0})
    clock.now += 2
    meter.stop()
    clock.now += 5
    assert (meter.seconds, meter.images_per_second) == (2.0, 0.5)


def test_epoch_of_skipped_steps_alone_has_no_means(tmp_path: Path) -> None:
    """Its line has the usual keys, with null for the means."""
    log = RunLog(tmp_path, epochs=1, log_freq=2, mean=[0.5], std=[0.5], device=CPU, images=12)
    meter = EpochMeter(epoch=0, steps=2, images_per_step=4)
    for _ in range(2):
        meter.update({"loss": torch.tensor(float("nan")), "skipped": torch.tensor(1.0)})
    log.finish_epoch(meter)
    log.close()
    record = json.loads((tmp_path / "log.txt").read_text())
    assert (record["train_loss"], record["skipped_steps"]) == (None, 2)
    assert meter.means() == {"loss": None, "skipped_steps": 2}


def test_epoch_line_and_step_lines(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "handlers", [])
    caplog.set_level("INFO", logger="esvit")
    log = RunLog(tmp_path, epochs=2, log_freq=2, mean=[0.5], std=[0.5], device=CPU, images=12)
    meter = EpochMeter(epoch=1, steps=3, images_per_step=4)
    with log.epoch(meter) as show:
        for i in range(3):
            meter.update({"loss": float(i), "skipped": 0.0})
            show(lr=0.1 * i, wd=0.5)
    log.finish_epoch(meter, unreadable_images=7, knn_top1=12.345)
    log.close()
    assert capsys.readouterr().err == ""  # the progress bar is for terminals
    assert [line for line in caplog.messages if line.startswith("epoch 1/2  step")] == [
        line for line in caplog.messages if "  step 2/3  loss 1.0000" in line or "  step 3/3  loss 2.0000" in line
    ]
    record = json.loads((tmp_path / "log.txt").read_text())
    line = caplog.messages[-1]
    assert line.startswith("epoch 1/2 done  loss 1.0000  lr 2.00e-01  ")  # the epoch is counted as in the file
    assert "images/s  k-NN 12.35  00:00 left" in line
    assert (record["train_loss"], record["train_lr"], record["train_wd"], record["epoch"]) == (1.0, 0.2, 0.5, 1)
    assert record["unreadable_images"] == 7
    assert record["peak_memory_mb"] > 0


def test_bar_and_time_left_of_the_run_fit_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    terminal, stderr = os.openpty()
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    monkeypatch.setattr(sys, "stderr", os.fdopen(stderr, "w"))
    log = RunLog(tmp_path, epochs=300, log_freq=1, mean=[0.5], std=[0.5], device=CPU, images=12)
    meter = EpochMeter(epoch=100, steps=12_502, images_per_step=1024)
    with log.epoch(meter) as show:
        clock.now += 1.0
        time.sleep(0.15)  # tqdm redraws every 0.1 seconds
        meter.update({"loss": 10.12345})
        show(lr=0.1)
    log.close()
    output = b""
    while select.select([terminal], [], [], 0.5)[0]:  # what was written arrives a little later
        output += os.read(terminal, 10_000)
    bars = [bar for bar in output.decode().split("\r") if bar.strip()]
    assert [bar for bar in bars if len(bar.rstrip("\n")) > 80] == []
    assert "1/12502, loss 10.1235  694:33:19 left  1024 images/s" in bars[-1]  # 200 epochs, at one second a step


def test_terminal_shows_some_epochs_and_the_last(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "handlers", [])
    caplog.set_level("INFO", logger="esvit")
    log = RunLog(tmp_path, epochs=12, log_freq=1, mean=[0.5], std=[0.5], device=CPU, images=1, epoch_freq=5)
    for epoch in range(12):
        meter = EpochMeter(epoch, steps=1, images_per_step=1)
        with log.epoch(meter) as show:
            meter.update({"loss": 1.0})
            show(lr=0.1)
        log.finish_epoch(meter)
    log.close()
    shown = [[line for line in caplog.messages if line.startswith(f"epoch {epoch}/")] for epoch in range(12)]
    assert [len(lines) for lines in shown] == [2 if epoch in {0, 5, 10, 11} else 0 for epoch in range(12)]
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 12


def test_tensorboard_counts_images(tmp_path: Path) -> None:
    """The x axis stays continuous if a run resumes with another batch size: 10 images, batch 2 for 7 steps, then 4."""
    for batch, first, seen, epochs in ((2, 0, 0, (5, 3)), (4, 1, 14, (2, 2))):
        log = RunLog(tmp_path, epochs=3, log_freq=1, mean=[0.5], std=[0.5], device=CPU, images=10, seen=seen)
        for epoch, steps in enumerate(epochs, first):
            meter = EpochMeter(epoch, steps=10 // batch, images_per_step=batch)
            if epoch == first and seen:
                meter.resume({}, (seen - 10) // batch)
            with log.epoch(meter) as show:
                while meter.done < steps:
                    meter.update({"loss": 0.0})
                    show(lr=0.5)
            log.finish_epoch(meter)
        log.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    steps_shown = {tag: [point.step for point in events.Scalars(tag)] for tag in ("loss/total", "loss/train")}
    assert steps_shown["loss/total"] == [2, 4, 6, 8, 10, 12, 14, 18, 24, 28]  # the step to 16 is made again, and hidden
    assert steps_shown["loss/train"] == [10, 20, 30]


@pytest.mark.parametrize(
    ("group", "names"),
    [
        (
            "loss",
            {
                "loss": "total",
                "train_loss": "train",
                "train_region_loss": "train_region",
                "test_loss": "test",
                "g_mcl": "g_mcl",
                "train_l_pch": "train_l_pch",
                "loss/network, lr 0.003": "network, lr 0.003",
                "train_loss/network, lr 0.003": "train/network, lr 0.003",
            },
        ),
        ("monitor", dict.fromkeys(["view/kl", "cls+/feature_rank"])),
        ("optim", dict.fromkeys(["lr", "wd", "train_lr"])),
        ("other", dict.fromkeys(["skipped", "unreadable_images"])),
        ("score", dict.fromkeys(["knn_top1", "knn_top1_student", "test_acc5", "val/network/top1"])),
        (
            "score",
            dict.fromkeys(["test_miou", "test/network, lr 0.1/miou", "test/a/pixel_accuracy", "test/a/class_accuracy"]),
        ),
        ("speed", dict.fromkeys(["images_per_s", "waiting_share", "seconds", "peak_memory_mb"])),
    ],
)
def test_tensorboard_groups(group: str, names: dict[str, str | None]) -> None:
    assert {name: tag(name) for name in names} == {name: f"{group}/{short or name}" for name, short in names.items()}
    assert sorted(GROUPS)[0] == "loss"  # TensorBoard sorts them


def test_mappings_and_unknown_numbers_of_an_epoch(tmp_path: Path) -> None:
    """log.txt gets everything, TensorBoard the numbers; without weight decay there is no train_wd."""
    log = RunLog(tmp_path, epochs=1, log_freq=1, mean=[0.5], std=[0.5], device=CPU, images=12)
    meter = EpochMeter(epoch=0, steps=1, images_per_step=1)
    with log.epoch(meter) as show:
        meter.update({"loss": 1.0})
        show(lr=0.5)
    more = {"each": {"a": {"loss": 2.0}, "b": {"loss": None}}, "note": "words"}
    log.finish_epoch(meter, **more)
    log.close()
    record = json.loads((tmp_path / "log.txt").read_text())
    assert more.items() <= record.items()
    assert "train_wd" not in record
    tags = EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"]
    assert set(tags) == {
        *("loss/each/a/total", "loss/total", "loss/train", "optim/lr", "other/skipped_steps"),
        *("speed/images_per_s", "speed/peak_memory_mb", "speed/seconds", "speed/waiting_share"),
    }


def test_picture_of_the_crops(tmp_path: Path) -> None:
    """The file and TensorBoard have the same picture, without the normalization; a run that has one keeps it."""
    log = RunLog(tmp_path, epochs=1, log_freq=1, mean=[0.5, 0.0, 0.0], std=[0.5, 1.0, 1.0], device=CPU, images=2)
    large = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(2, 3, 8, 8)
    log.save_crops([large, large[:, :, :4, :4]])
    log.close()
    (logged,) = EventAccumulator(str(tmp_path)).Reload().Images("views/crops")
    for source in (tmp_path / "crops.png", io.BytesIO(logged.encoded_image_string)):
        with Image.open(source) as picture:
            colors = dict((color, count) for count, color in picture.convert("RGB").getcolors(10**6) or ())
            assert colors[255, 0, 0] == 2 * (128**2 + 64**2)
    before = (tmp_path / "crops.png").stat().st_mtime_ns
    RunLog(tmp_path, 1, 1, [0.0] * 3, [1.0] * 3, CPU, images=2).save_crops([large])
    assert (tmp_path / "crops.png").stat().st_mtime_ns == before
