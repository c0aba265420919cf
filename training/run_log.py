"""What a run tells: meters of an epoch, a progress bar or plain lines, `log.txt` and TensorBoard.

`log.txt` has one JSON object a line with the published keys (train_loss, train_lr, train_wd, epoch) and more. Epochs count from 0,
in every file and on the terminal, as in DINO.
Only the main process shows and writes; the others keep quiet.

Origin: this project's own.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

from checkpoints.files import atomic_write, check_lock
from distributed.collectives import is_main_process
from distributed.launch import stop_on_interrupt
from utils import UsageError, logger, peak_memory_mb

CROP_GRID_IMAGES = 8


@contextlib.contextmanager
def one_pass(loader: DataLoader[Any], label: str) -> Iterator[Iterator[Any]]:
    """The batches of a pass that nothing is kept of before its end, with a bar on a terminal.

    Raises:
        Stopped: Ctrl-C, which tells how far it was.
    """
    done = 0

    def counted() -> Iterator[Any]:
        nonlocal done
        for batch in tqdm(loader, desc=label, disable=None if is_main_process() else True, leave=False):
            yield batch
            done += 1

    with stop_on_interrupt(lambda: f"{label}: {done} of {len(loader)} batches were done, nothing of them is kept"):
        yield counted()


class EpochMeter:
    """Running means of one epoch, its speed, and the share of time spent waiting for data.

    Scalars may lie on a device; they stay there until somebody asks for a number.

    Args:
        epoch, steps: which epoch and how many optimizer steps it has.
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
        """What has been measured, for an epoch that goes on in another process."""
        self.read()
        sums = {name: list(pair) for name, pair in self._sums.items()}
        return {"sums": sums, "waited": self._waited, "seconds": self.seconds}

    def go_on_from(self, state: Mapping[str, Any], done: int) -> None:
        """Take over the `state` of an epoch of which `done` steps are done."""
        self.done = done
        self._sums = {name: (float(total), int(count)) for name, (total, count) in state.get("sums", {}).items()}
        self._waited = float(state.get("waited", 0.0))
        self._started -= float(state.get("seconds", 0.0))

    def stop(self) -> None:
        """The steps are done: what follows in the epoch does not count as their time."""
        self._stopped = time.perf_counter()

    def timed(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Pass `batches` on and count the time they take to come."""
        iterator = iter(batches)
        while True:
            before = time.perf_counter()
            batch = next(iterator, None)
            self._waited += time.perf_counter() - before
            if batch is None:
                return
            yield batch

    def update(self, scalars: Mapping[str, Tensor | float]) -> None:
        """Count a finished step, whose scalars (tensors of no axis, on one device, or numbers) are not read yet."""
        self.done += 1
        self._unread.append(scalars)

    def read(self) -> list[dict[str, float]]:
        """Take in the steps since the last reading and return their scalars: one wait for the device, however many they are."""
        tensors = [value for scalars in self._unread for value in scalars.values() if isinstance(value, Tensor)]
        numbers = iter(torch.stack(tensors).tolist() if tensors else [])
        steps = [
            {name: next(numbers) if isinstance(value, Tensor) else value for name, value in scalars.items()}
            for scalars in self._unread
        ]
        self._unread.clear()
        for scalars in steps:
            self._take_in(scalars)
        return steps

    def _take_in(self, scalars: dict[str, float]) -> None:
        """What a skipped step measured is left out of the means."""
        self._latest = scalars
        skipped = bool(scalars.get("skipped"))
        for name, value in scalars.items():
            total, count = self._sums.get(name, (0.0, 0))
            if name == "skipped" or not skipped:
                total, count = total + value, count + 1
            self._sums[name] = (total, count)

    @property
    def latest(self) -> dict[str, float]:
        """The scalars of the last step."""
        self.read()
        return self._latest

    def means(self) -> dict[str, float | None]:
        """Mean of each scalar, None where every step was skipped, and `skipped_steps`, a count."""
        self.read()
        means = {
            name: total / count if count else None for name, (total, count) in self._sums.items() if name != "skipped"
        }
        return means | {"skipped_steps": self.skipped_steps}

    @property
    def skipped_steps(self) -> int:
        """How many of the steps that were read changed nothing."""
        return int(self._sums.get("skipped", (0.0, 0))[0])

    @property
    def seconds(self) -> float:
        """Since the epoch began, until `stop` if it was called."""
        return (self._stopped or time.perf_counter()) - self._started

    @property
    def images_per_second(self) -> float:
        """Over all processes."""
        return self.done * self.images_per_step / self.seconds

    @property
    def waiting_share(self) -> float:
        """Share of the time in which no batch was ready, 0..1."""
        return self._waited / self.seconds


class RunLog:
    """Everything a run writes down as it goes.

    Args:
        output_dir: where `log.txt`, `crops.png` and the TensorBoard files go.
        epochs: of the whole run, for the time left.
        log_freq: steps between two lines (or TensorBoard points).
        mean, std: the images' normalization, undone in the picture of the crops.
        device: whose memory is reported.
        images: of an epoch. The steps of TensorBoard's `step/` curves are images seen, which go on where the batch size changes.
        seen: images that the run has seen already; TensorBoard hides what the folder holds of later ones.
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
    ) -> None:
        try:
            str(output_dir).encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"--output_dir {output_dir} is not UTF-8, in which TensorBoard takes names; choose another"
            ) from None
        self.output_dir = output_dir
        self.epochs = epochs
        self.log_freq = log_freq
        self.mean, self.std = mean, std
        self.device = device
        self.images = images
        self._rates: dict[str, float] = {}
        self.writer: SummaryWriter | None = None
        if is_main_process():
            threading.excepthook = _pass_over_disks
            self.writer = SummaryWriter(str(output_dir), purge_step=seen + 1)
        self._failed = False  # some time; then it has been told
        self._writer_failed = False  # since the last epoch; then it is of no more use
        self._unwritten: list[str] = []  # lines of log.txt
        self._pictured = (output_dir / "crops.png").exists()

    def close(self) -> None:
        """Write what is not written yet, and flush TensorBoard."""
        if self.writer is None:
            return
        if self._unwritten:
            with self.failing_softly():
                self._write_lines()
        if self._unwritten:
            count = len(self._unwritten)
            logger.warning("log.txt lacks its last %s", "line" if count == 1 else f"{count} lines")
        with self._drawing() as writer:
            writer.close()

    @contextlib.contextmanager
    def failing_softly(self) -> Iterator[None]:
        """A full disk or a lost mount does not end a run because of what it tells: warned about once, then passed over."""
        try:
            yield
        except OSError as error:
            if not self._failed:
                logger.warning(
                    "cannot write to %s (%s): the run goes on; log.txt gets its lines when that works again, TensorBoard not",
                    *(self.output_dir, error),
                )
            self._failed = True

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[SummaryWriter]:
        """The TensorBoard writer, in the main process; it cannot be used again after an error."""
        assert self.writer is not None
        with self.failing_softly():
            try:
                yield self.writer
            except OSError:
                self._writer_failed = True
                raise

    def _write_lines(self) -> None:
        """Append what is not written yet to `log.txt`, whole or not at all."""
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
        """Whether the last step, or the one so many steps `ahead`, ends a log interval."""
        done = meter.done + ahead
        return done % self.log_freq == 0 or done == meter.steps

    @contextlib.contextmanager
    def epoch(self, meter: EpochMeter) -> Iterator[Callable[..., None]]:
        """Give the function that shows a step: a progress bar on a terminal, a line every `log_freq` steps elsewhere."""
        terminal = is_main_process() and sys.stderr.isatty()
        label = f"epoch {meter.epoch}/{self.epochs}"
        with tqdm(total=meter.steps, initial=meter.done, desc=label, disable=not terminal, leave=False) as bar:

            def show(lr: float, wd: float | None = None) -> None:
                bar.update()
                if not self.due(meter):
                    return
                line = self._describe(meter, lr)
                bar.set_postfix_str(line, refresh=False)
                if not terminal:
                    logger.info("%s  step %d/%d  %s", label, meter.done, meter.steps, line)
                rates = {"lr": lr} if wd is None else {"lr": lr, "wd": wd}
                points = meter.latest | rates
                points |= {"images_per_s": meter.images_per_second, "waiting_share": meter.waiting_share}
                if self.writer is not None:
                    seen = meter.epoch * self.images + min(meter.done * meter.images_per_step, self.images)
                    with self._drawing() as writer:
                        for name, value in points.items():
                            writer.add_scalar(f"step/{name}", value, seen)
                self._rates = {f"train_{name}": value for name, value in rates.items()}

            yield show

    def _describe(self, meter: EpochMeter, lr: float) -> str:
        steps_left = (self.epochs - meter.epoch) * meter.steps - meter.done
        left = tqdm.format_interval(steps_left * meter.seconds / meter.done)
        losses = "  ".join(
            f"{name} {value:.4f}" for name, value in meter.latest.items() if name != "skipped" and "/" not in name
        )
        return (
            f"{losses}  lr {lr:.2e}  {meter.images_per_second:.1f} images/s  waiting {meter.waiting_share:.0%}  "
            f"memory {peak_memory_mb(self.device):.0f} MiB  left {left}"
        )

    def finish_epoch(self, meter: EpochMeter, **more: Any) -> None:
        """Append the epoch's line, with `more` numbers and mappings of numbers, to `log.txt` and to TensorBoard, and say it."""
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
        with self.failing_softly():
            self._write_lines()
        if self._writer_failed:
            with self.failing_softly():
                self.writer, self._writer_failed = SummaryWriter(str(self.output_dir)), False
        with self._drawing() as writer:
            for name, value in _numbers(record, "epoch/"):
                if name != "epoch/epoch":
                    writer.add_scalar(name, value, meter.epoch)
            writer.flush()
        logger.info(
            "epoch %d/%d done: %s",
            meter.epoch,
            self.epochs,
            json.dumps(record),
        )

    def crops_once(self, views: Sequence[Tensor]) -> None:
        """Once a run: a picture of some images (columns) in all their views (rows), to TensorBoard and `crops.png`."""
        if self.writer is None or self._pictured:
            return
        self._pictured = True
        side = max(view.shape[-1] for view in views)
        images = min(CROP_GRID_IMAGES, len(views[0]))
        tiles = [self._tile(view[:images].detach().float().cpu(), side) for view in views]
        grid = make_grid(torch.cat(tiles), nrow=images)
        with self._drawing() as writer:
            writer.add_image("crops", grid, 0)
        with self.failing_softly(), atomic_write(self.output_dir / "crops.png") as temporary:
            save_image(grid, temporary, format="png")

    def _tile(self, view: Tensor, side: int) -> Tensor:
        """Undo the normalization, show one or three channels, and center small views on a canvas of `side` pixels."""
        shape = (1, -1, 1, 1)
        pixels = (view * torch.tensor(self.std).view(shape) + torch.tensor(self.mean).view(shape)).clamp(0, 1)
        pixels = pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)
        margin = side - pixels.shape[-1]
        return torch.nn.functional.pad(
            pixels, (margin // 2, margin - margin // 2, margin // 2, margin - margin // 2), value=1.0
        )


def _pass_over_disks(failed: threading.ExceptHookArgs) -> None:
    """No traceback of TensorBoard's own thread, whose error `RunLog` meets too and tells in words."""
    if not (isinstance(failed.exc_value, OSError) and type(failed.thread).__module__.startswith("tensorboard.")):
        threading.__excepthook__(failed)


def _numbers(record: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """The numbers of nested mappings with their names joined by slashes; anything else is left out."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield prefix + name, value
