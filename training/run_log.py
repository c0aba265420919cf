"""Logging of a run: the terminal, `log.txt` and TensorBoard, written by the main process alone.

`log.txt` has one JSON object per epoch, with the published keys (train_loss, train_lr, train_wd, epoch) and more. Epochs count from
0, as in DINO.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from checkpoints.files import atomic_write, check_lock
from distributed.collectives import is_main_process
from distributed.launch import stop_on_interrupt
from training.crop_picture import draw_crops
from utils import UsageError, counted, logger, peak_memory_mb

SCORES = {"knn_top1": "k-NN", "test_acc1": "top-1", "test_miou": "mIoU"}  # keys of log.txt that the terminal shows too
BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
GROUPS = {  # of TensorBoard, which shows them in alphabetical order, and the names that belong to them; the first match counts
    "loss": r"loss$|^(train_)?loss/|[gl]_(cl|mcl|pch)$",  # UDI's terms have names of their own
    "optim": r"(lr|wd)$",
    "score": r"(top|acc)[15]|(miou|pixel_accuracy|class_accuracy)$",
    "speed": r"(images_per_s|waiting_share|seconds|peak_memory_mb)$",
    "monitor": r"/",
    "other": r"",
}


@contextlib.contextmanager
def tracked(loader: DataLoader[Any], label: str) -> Iterator[Iterator[Any]]:
    """Yield an iterator over the batches of an evaluation, with a progress bar on a terminal.

    Raises:
        Stopped: on Ctrl-C, naming the number of finished batches.
    """
    done = 0

    def batches() -> Iterator[Any]:
        nonlocal done
        for batch in tqdm(loader, desc=label, disable=None if is_main_process() else True, leave=False):
            yield batch
            done += 1

    with stop_on_interrupt(lambda: f"after {done} of {len(loader)} batches of {label}; nothing is saved"):
        yield batches()


class EpochMeter:
    """Running means of an epoch's scalars, its speed, and the share of time spent waiting for data.

    Scalars on a device are not read until a number is needed.

    Args:
        epoch: index of the epoch.
        steps: optimizer steps of the epoch.
        images_per_step: over all processes and micro-batches.
    """

    def __init__(self, epoch: int, steps: int, images_per_step: int) -> None:
        self.epoch = epoch
        self.steps = steps
        self.images_per_step = images_per_step
        self.done = 0
        self._unread: list[Mapping[str, Tensor | float]] = []
        self._latest: dict[str, float] = {}
        self._sums: dict[str, tuple[float, int]] = {}
        self._waited = 0.0
        self._started = time.perf_counter()
        self._stopped: float | None = None

    def state(self) -> dict[str, Any]:
        """Return the measurements so far, for an epoch that is resumed in another process."""
        self.read()
        sums = {name: list(pair) for name, pair in self._sums.items()}
        return {"sums": sums, "waited": self._waited, "seconds": self.seconds}

    def resume(self, state: Mapping[str, Any], done: int) -> None:
        """Continue from the `state` of an epoch after `done` steps."""
        self.done = done
        self._sums = {name: (float(total), int(count)) for name, (total, count) in state.get("sums", {}).items()}
        self._waited = float(state.get("waited", 0.0))
        self._started -= float(state.get("seconds", 0.0))

    def stop(self) -> None:
        """Stop the clock after the last step: evaluation and saving do not count for the speed."""
        self._stopped = time.perf_counter()

    def timed(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Iterate over `batches` and measure the time spent waiting for them."""
        iterator = iter(batches)
        while True:
            before = time.perf_counter()
            batch = next(iterator, None)
            self._waited += time.perf_counter() - before
            if batch is None:
                return
            yield batch

    def update(self, scalars: Mapping[str, Tensor | float]) -> None:
        """Count a finished step; its scalars (0-dim tensors on one device, or numbers) are not read yet."""
        self.done += 1
        self._unread.append(scalars)

    def read(self) -> list[dict[str, float]]:
        """Return the scalars of all steps since the last reading, at the cost of one synchronization with the device."""
        tensors = [value for scalars in self._unread for value in scalars.values() if isinstance(value, Tensor)]
        numbers = iter(torch.stack(tensors).tolist() if tensors else [])
        steps = [
            {name: next(numbers) if isinstance(value, Tensor) else value for name, value in scalars.items()}
            for scalars in self._unread
        ]
        self._unread.clear()
        for scalars in steps:
            self._add(scalars)
        return steps

    def _add(self, scalars: dict[str, float]) -> None:
        """Add a step to the sums; of a skipped step only that it was skipped."""
        self._latest = scalars
        skipped = bool(scalars.get("skipped"))
        for name, value in scalars.items():
            total, count = self._sums.get(name, (0.0, 0))
            if name == "skipped" or not skipped:
                total, count = total + value, count + 1
            self._sums[name] = (total, count)

    @property
    def latest(self) -> dict[str, float]:
        """Scalars of the last step."""
        self.read()
        return self._latest

    def means(self) -> dict[str, float | None]:
        """Return the mean of each scalar (None if all steps were skipped) and the number of `skipped_steps`."""
        self.read()
        means = {
            name: total / count if count else None for name, (total, count) in self._sums.items() if name != "skipped"
        }
        return means | {"skipped_steps": self.skipped_steps}

    @property
    def skipped_steps(self) -> int:
        """Number of skipped steps among those that were read."""
        return int(self._sums.get("skipped", (0.0, 0))[0])

    @property
    def seconds(self) -> float:
        """Time since the start of the epoch, until `stop` if it was called."""
        return (self._stopped or time.perf_counter()) - self._started

    @property
    def seconds_with_evaluation(self) -> float:
        """Time since the start of the epoch, also after `stop`."""
        return time.perf_counter() - self._started

    @property
    def images_per_second(self) -> float:
        """Throughput over all processes."""
        return self.done * self.images_per_step / self.seconds

    @property
    def waiting_share(self) -> float:
        """Fraction of the time in which no batch was ready, 0..1."""
        return self._waited / self.seconds


class RunLog:
    """Write a run's progress to the terminal, `log.txt` and TensorBoard.

    A full disk or a lost mount does not end the run: lines of `log.txt` are written when the disk works again.

    Args:
        output_dir: folder of `log.txt`, `crops.png` and the TensorBoard files.
        epochs: epochs of the whole run, for the time left.
        log_freq: steps between log lines and TensorBoard points.
        mean, std: normalization of the images, undone in `crops.png`.
        device: device whose peak memory is reported.
        images: images of an epoch. TensorBoard's steps count images, so that curves continue if the batch size changes.
        seen: images that the run has seen before; TensorBoard points beyond are hidden.
        epoch_freq: epochs between those that the terminal shows; the last one is always shown.
        after_close: called after TensorBoard is closed.
    """

    def __init__(
        self,
        output_dir: Path,
        epochs: int,
        log_freq: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        images: int,
        seen: int = 0,
        epoch_freq: int = 1,
        after_close: Callable[[], None] = lambda: None,
    ) -> None:
        try:
            str(output_dir).encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"--output_dir {output_dir} is not UTF-8, which TensorBoard requires; choose another"
            ) from None
        self.output_dir = output_dir
        self.epochs = epochs
        self.log_freq = log_freq
        self.epoch_freq = epoch_freq
        self.mean, self.std = mean, std
        self.device = device
        self.images = images
        self._rates: dict[str, float] = {}
        self._after_close = after_close
        self._step_names: set[str] = set()  # of the values of single steps in TensorBoard
        self.writer: SummaryWriter | None = None
        if is_main_process():
            threading.excepthook = _ignore_disk_errors
            self.writer = SummaryWriter(str(output_dir), purge_step=seen + 1)
        self._warned = False  # of a disk error
        self._writer_failed = False  # in this epoch; the next one gets a new writer
        self._unwritten: list[str] = []  # lines of log.txt
        self._crops_saved = (output_dir / "crops.png").exists()

    def close(self) -> None:
        """Write the remaining lines, and close TensorBoard."""
        if self.writer is None:
            return
        if self._unwritten:
            with self.best_effort():
                self._write_lines()
        if self._unwritten:
            logger.warning("%s of log.txt could not be written", counted(len(self._unwritten), "line"))
        with self._tensorboard() as writer:
            writer.close()
        self._after_close()

    @contextlib.contextmanager
    def best_effort(self) -> Iterator[None]:
        """Ignore disk errors inside the block, with one warning per run."""
        try:
            yield
        except OSError as error:
            if not self._warned:
                logger.warning(
                    "cannot write to %s (%s); the run continues, log.txt is completed when the disk works again",
                    self.output_dir,
                    error,
                )
            self._warned = True

    @contextlib.contextmanager
    def _tensorboard(self) -> Iterator[SummaryWriter]:
        """Yield the TensorBoard writer; after an error it cannot be used again."""
        assert self.writer is not None
        with self.best_effort():
            try:
                yield self.writer
            except OSError:
                self._writer_failed = True
                raise

    def _write_lines(self) -> None:
        """Append the pending lines to `log.txt`, all or none."""
        check_lock(self.output_dir)
        path = self.output_dir / "log.txt"
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("a") as file:
                file.writelines(self._unwritten)
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(path, size)
            raise
        self._unwritten.clear()

    def due(self, meter: EpochMeter, ahead: int = 0) -> bool:
        """Return whether the last step, or the one `ahead` steps later, ends a log interval."""
        done = meter.done + ahead
        return done % self.log_freq == 0 or done == meter.steps

    @contextlib.contextmanager
    def epoch(self, meter: EpochMeter) -> Iterator[Callable[..., None]]:
        """Yield the function that shows a step: in a progress bar on a terminal, elsewhere in a line every `log_freq` steps."""
        shown = self._shows(meter.epoch)
        terminal = shown and sys.stderr.isatty()
        label = f"epoch {meter.epoch}/{self.epochs}"
        settings = {"bar_format": BAR, "dynamic_ncols": True, "leave": False, "disable": not terminal}
        with tqdm(total=meter.steps, initial=meter.done, desc=label, **settings) as bar:  # type: ignore[call-overload]

            def show(lr: float, wd: float | None = None) -> None:
                due = self.due(meter)
                if due and terminal:
                    bar.set_postfix_str(self._brief(meter), refresh=False)
                bar.update()
                if not due:
                    return
                if shown and not terminal:
                    logger.info("%s  step %d/%d  %s", label, meter.done, meter.steps, self._describe(meter, lr))
                rates = {"lr": lr} if wd is None else {"lr": lr, "wd": wd}
                points = meter.latest | rates
                points |= {"images_per_s": meter.images_per_second, "waiting_share": meter.waiting_share}
                self._step_names.update(points)
                self._add_points(
                    points, meter.epoch * self.images + min(meter.done * meter.images_per_step, self.images)
                )
                self._rates = {f"train_{name}": value for name, value in rates.items()}

            yield show

    def _add_points(self, points: Mapping[str, float], seen: int) -> None:
        """Write a point of each curve to TensorBoard, after so many images."""
        if self.writer is not None:
            with self._tensorboard() as writer:
                for name, value in points.items():
                    writer.add_scalar(tag(name), value, seen)

    def _shows(self, epoch: int) -> bool:
        """Return whether the terminal shows this epoch."""
        return is_main_process() and (epoch % self.epoch_freq == 0 or epoch == self.epochs - 1)

    def _time_left(self, meter: EpochMeter) -> str:
        """Return the time left for the whole run, at the speed of this epoch's steps."""
        steps_left = (self.epochs - meter.epoch) * meter.steps - meter.done
        return f"{tqdm.format_interval(steps_left * meter.seconds / meter.done)} left"

    def _brief(self, meter: EpochMeter) -> str:
        """Describe the last step beside a progress bar, so that both fit in 80 columns."""
        loss = meter.latest.get("loss", math.nan)
        return f"loss {loss:.4f}  {self._time_left(meter)}  {meter.images_per_second:.0f} images/s"

    def _describe(self, meter: EpochMeter, lr: float) -> str:
        losses = "  ".join(
            f"{name} {value:.4f}" for name, value in meter.latest.items() if name != "skipped" and "/" not in name
        )
        return (
            f"{losses}  lr {lr:.2e}  {meter.images_per_second:.1f} images/s  waiting {meter.waiting_share:.0%}  "
            f"memory {peak_memory_mb(self.device):.0f} MiB  {self._time_left(meter)}"
        )

    def _describe_epoch(self, meter: EpochMeter, record: Mapping[str, Any]) -> str:
        loss = record.get("train_loss")
        parts = ["no finite loss" if loss is None else f"loss {loss:.4f}"]
        if "train_lr" in record:
            parts.append(f"lr {record['train_lr']:.2e}")
        parts.append(f"{meter.images_per_second:.1f} images/s")
        parts += [f"{name} {record[key]:.2f}" for key, name in SCORES.items() if record.get(key) is not None]
        if meter.skipped_steps:
            parts.append(counted(meter.skipped_steps, "skipped step"))
        seconds_left = (self.epochs - meter.epoch - 1) * meter.seconds_with_evaluation
        return "  ".join([*parts, f"{tqdm.format_interval(seconds_left)} left"])

    def finish_epoch(self, meter: EpochMeter, **more: Any) -> None:
        """Append the epoch, with `more` numbers and mappings of numbers, to `log.txt` and TensorBoard, and log one line."""
        means = meter.means()
        record: dict[str, Any] = {f"train_{k}": v for k, v in means.items() if k != "skipped_steps"}
        record |= self._rates | {"epoch": meter.epoch, "skipped_steps": meter.skipped_steps}
        record |= {
            "images_per_s": round(meter.images_per_second, 2),
            "waiting_share": round(meter.waiting_share, 4),
            "seconds": round(meter.seconds, 2),
            "peak_memory_mb": round(peak_memory_mb(self.device), 1),
            **more,
        }
        if self.writer is None:
            return
        self._unwritten.append(json.dumps(record) + "\n")
        with self.best_effort():
            self._write_lines()
        if self._writer_failed:
            with self.best_effort():
                self.writer, self._writer_failed = SummaryWriter(str(self.output_dir)), False
        shown = self._step_names | {"epoch"}  # of these only the losses are worth a second curve, of their means
        points = {
            name: value
            for name, value in _numbers(record)
            if tag(name).startswith("loss/") or name.removeprefix("train_") not in shown
        }
        self._add_points(points, (meter.epoch + 1) * self.images)
        with self._tensorboard() as writer:
            writer.flush()
        if self._shows(meter.epoch):
            logger.info("epoch %d/%d done  %s", meter.epoch, self.epochs, self._describe_epoch(meter, record))

    def save_crops(self, views: Sequence[Tensor]) -> None:
        """Save a picture of some images in all their views, unless the run has one."""
        if self.writer is None or self._crops_saved:
            return
        self._crops_saved = True
        picture = draw_crops(views, self.mean, self.std)
        with self._tensorboard() as writer:
            writer.add_image("views/crops", np.asarray(picture), 0, dataformats="HWC")
        with self.best_effort(), atomic_write(self.output_dir / "crops.png") as temporary:
            picture.save(temporary, format="png")


def _ignore_disk_errors(failed: threading.ExceptHookArgs) -> None:
    """Print no traceback for a disk error in TensorBoard's own thread: `RunLog` gets the same error and logs it."""
    if not (isinstance(failed.exc_value, OSError) and type(failed.thread).__module__.startswith("tensorboard.")):
        threading.__excepthook__(failed)


def tag(name: str) -> str:
    """Return the TensorBoard tag of a value: `loss` becomes `loss/total`, `view_loss` `loss/view`, `lr` `optim/lr`."""
    group = next(group for group, pattern in GROUPS.items() if re.search(pattern, name))
    if group == "loss":
        path, slash, last = name.removeprefix("loss/").replace("_loss/", "/").rpartition("/")
        name = f"{path}{slash}{'total' if last == 'loss' else last.removesuffix('_loss')}"
    return f"{group}/{name}"


def _numbers(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers in nested mappings, with their names joined by slashes."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield prefix + name, value
