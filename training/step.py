"""TODO."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import utils
from checkpoints import loading
from distributed import collectives, fsdp
from losses.distillation import MonitoredLevel
from models.base import Backbone, batch_norms
from training import optim
from training.collapse import Monitor
from training.nonfinite import NonFiniteSteps

if TYPE_CHECKING:
    from losses.distillation import SelfDistillation
Views = Sequence[Tensor]
MicroBatch = Views | Callable[[], Views]


class Method(ABC):
    """What a self-distillation method gives the engine.

    Attributes:
        student, teacher: networks with the same parameters in the same order; either may be wrapped for several processes.
        criterion: the loss, whose centers have seen the teacher's outputs after `compute_loss`.
        criterion_key: what checkpoints call its state dict.
        tasks: what is learned, in the words of the log.
        watch: set where outputs are to be watched for a collapse; then `compute_loss` calls it with its levels
        (training/collapse.py).
    """

    student: nn.Module
    teacher: nn.Module
    criterion: SelfDistillation
    criterion_key: str = "dino_loss"
    tasks: str
    watch: Callable[[Mapping[str, MonitoredLevel]], None] | None = None

    @abstractmethod
    def compute_loss(self, views: Sequence[Tensor], epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro-batch of views, and further scalars to log."""

    def images(self, views: Sequence[Tensor]) -> Sequence[Tensor]:
        """The images among what `compute_loss` takes: all of it, unless a method's views come with more."""
        return views

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Before each epoch, for networks whose attention depends on the progress of training."""
        for network in (self.student, self.teacher):
            backbone = loading.unwrap(network)
            if isinstance(backbone, Backbone):
                backbone.start_epoch(epoch, epochs)

    def finish_step(self, applied: Tensor) -> None:
        """After the last micro-batch: move the centers where the step is `applied`, a boolean scalar on the device."""
        self.criterion.update_center(applied)


class Schedules(NamedTuple):
    """One value for each optimizer step."""

    lr: np.ndarray
    weight_decay: np.ndarray
    momentum: np.ndarray


class TrainStep:
    """One update, in the published order: schedules, loss, backward, clipping, frozen prototypes, optimizer, teacher.

    Args:
        method, optimizer, schedules: see there; weight decay applies to parameter group 0 only.
        device, precision: where and in what the networks compute (`fp32`, `bf16` or `fp16`); losses are float32.
        clip_grad: largest norm of each parameter's gradient, 0 for none.
        freeze_last_layer: epochs during which the prototypes stay as they are.
        nonfinite: counts those that are not finite.
    """

    def __init__(
        self,
        method: Method,
        optimizer: torch.optim.Optimizer,
        schedules: Schedules,
        device: torch.device,
        precision: str = "fp32",
        clip_grad: float = 0.0,
        freeze_last_layer: int = 0,
        nonfinite: NonFiniteSteps | None = None,
    ) -> None:
        self.method = method
        self.optimizer = optimizer
        self.schedules = schedules
        self.device = device
        self.precision = precision
        self.clip_grad = clip_grad
        self.freeze_last_layer = freeze_last_layer
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.statistics = RunningStatistics([method.student, method.teacher])
        self.nonfinite = nonfinite or NonFiniteSteps()
        self.monitor = Monitor()

    def __call__(
        self, micro_batches: Sequence[MicroBatch], iteration: int, epoch: int, watch: bool = False
    ) -> dict[str, Tensor]:
        """Update on micro-batches of views that count as one batch.

        What is a function gives its views when it is their turn, and they are forgotten after their backward.

        Returns:
            scalars on the device, to be read later: `loss` and the method's, means over micro-batches and processes, and
            `skipped`: 1.0 where a loss or gradient was not finite; then no process has changed a parameter, a moment, a step
            counter, a running statistic or a center. With `watch` also what `Monitor.measure` gives for the last micro-batch.
        """
        student, teacher = self.method.student, self.method.teacher
        self._set_schedules(iteration)
        self.statistics.keep()
        scalars = self._accumulate_gradients(micro_batches, epoch, watch)
        self.scaler.unscale_(self.optimizer)
        norms = optim.clip_each_gradient(student, self.clip_grad)
        means = self._mean_over_processes(scalars, torch.isfinite(norms).all())
        applied = means.pop("finite") == 1
        names = [name for name, parameter in student.named_parameters() if parameter.grad is not None]
        self.nonfinite.remember(names, norms, scalars, applied)
        if epoch < self.freeze_last_layer:
            optim.drop_last_layer_gradients(student)
        optim.step_where(self.optimizer, applied)
        optim.update_teacher(teacher, student, float(self.schedules.momentum[iteration]), applied)
        fsdp.forget_forwards(teacher)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.finish_step(applied)
        self.statistics.restore_unless(applied)
        return means | {"skipped": 1 - applied.float()}

    def check(
        self, steps: Sequence[dict[str, float]], last_iteration: int, last_views: Callable[[], Views] | None = None
    ) -> None:
        """Tell of skipped steps and of a collapse in the last steps, whose scalars have been read; end a run that only skips.

        `last_views` gives the views of the last micro-batch, for the diagnosis.

        Raises:
            FloatingPointError: too many skipped steps in a row, on all processes at once; see `NonFiniteSteps.end`.
        """
        for iteration, scalars in enumerate(steps, last_iteration + 1 - len(steps)):
            if self.nonfinite.count(scalars, iteration):
                settings: dict[str, float | str] = {
                    "iteration": iteration,
                    "lr": float(self.schedules.lr[iteration]),
                    "precision": self.precision,
                }
                self.nonfinite.end(settings, last_views and (lambda: self.method.images(last_views())))
        if steps:
            self.monitor.check(steps[-1], warmed_up=last_iteration > int(self.schedules.lr.argmax()))

    def _set_schedules(self, iteration: int) -> None:
        for i, group in enumerate(self.optimizer.param_groups):
            group["lr"] = float(self.schedules.lr[iteration])
            if i == 0:
                group["weight_decay"] = float(self.schedules.weight_decay[iteration])

    def _accumulate_gradients(
        self, micro_batches: Sequence[MicroBatch], epoch: int, watch: bool = False
    ) -> dict[str, Tensor]:
        """Backward through every micro-batch; gradients are exchanged between processes after the last one only."""
        student = self.method.student
        scalars: dict[str, Tensor] = {}
        watched: dict[str, Tensor] = {}
        for i, micro_batch in enumerate(micro_batches):
            views = micro_batch() if callable(micro_batch) else micro_batch
            last = i == len(micro_batches) - 1
            wait = isinstance(student, DistributedDataParallel) and not last
            self.method.watch = (
                (lambda levels: watched.update(self.monitor.measure(levels))) if watch and last else None
            )
            fsdp.exchange_gradients(student, wanted=last)
            with student.no_sync() if wait else contextlib.nullcontext():  # type: ignore[operator]
                with utils.autocast(self.device, self.precision):
                    loss, extra = self.method.compute_loss(views, epoch)
                self.scaler.scale(loss / len(micro_batches)).backward()
            del views  # the next ones are made now
            for name, value in {"loss": loss, **extra}.items():
                scalars[name] = scalars.get(name, 0) + value.detach().float() / len(micro_batches)
        self.method.watch = None
        return scalars | watched

    def _mean_over_processes(self, scalars: dict[str, Tensor], gradients_finite: Tensor) -> dict[str, Tensor]:
        """Means of the scalars, and `finite`: 1.0 where all losses and gradients of all processes are."""
        finite = gradients_finite & torch.isfinite(scalars["loss"])
        stacked = torch.stack([*scalars.values(), finite.float()])
        means = collectives.all_reduce_sum(stacked) / collectives.get_world_size()
        return dict(zip([*scalars, "finite"], means.unbind()))


class RunningStatistics:
    """The running statistics of BatchNorm, which a forward changes: kept, to be put back where the step is skipped.

    Networks without BatchNorm cost nothing here.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        buffers = [buffer for network in networks for norm in batch_norms(network) for buffer in norm.buffers()]
        self._flat = {
            dtype: [buffer.view(-1) for buffer in buffers if buffer.dtype == dtype]
            for dtype in {buffer.dtype for buffer in buffers}
        }
        self._kept: dict[torch.dtype, Tensor] = {}

    def keep(self) -> None:
        """Remember them as they are now."""
        self._kept = {dtype: torch.cat(parts) for dtype, parts in self._flat.items()}

    def restore_unless(self, applied: Tensor) -> None:
        """Put back what was kept where `applied` is false."""
        for dtype, parts in self._flat.items():
            right = torch.where(applied, torch.cat(parts), self._kept.pop(dtype))
            torch._foreach_copy_(parts, right.split([len(part) for part in parts]))
