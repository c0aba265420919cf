"""One training step: what a method supplies, and the update that every method shares.

A step never synchronizes with the device: whether it is finite is decided and acted upon there, and its scalars are read once per
log interval.

Origin: the order of an update is that of DINO (Caron et al., ICCV 2021).
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import utils
from checkpoints import loading, serialization
from distributed import collectives, fsdp
from losses.distillation import MonitoredLevel, SelfDistillation
from models.base import Backbone, batch_norms
from training import optim, restore
from training.collapse import Monitor
from training.nonfinite import NonFiniteSteps
from utils import UsageError, logger

Views = Sequence[Tensor]
MicroBatch = Views | Callable[[], Views]


class Method(ABC):
    """A self-distillation method.

    Attributes:
        student: Network that is trained; it and the teacher may be wrapped for several processes.
        teacher: Network with the same parameters in the same order.
        criterion: The loss; `compute_loss` adds the teacher's outputs to its centers.
        criterion_key: Field of the checkpoint that holds the state of the loss.
        tasks: Short description of the objective, for the log.
        monitor: If set, `compute_loss` calls it with the levels of its outputs (training/collapse.py).
    """

    student: nn.Module
    teacher: nn.Module
    criterion: SelfDistillation
    criterion_key: str = "dino_loss"
    tasks: str
    monitor: Callable[[Mapping[str, MonitoredLevel]], None] | None = None

    @abstractmethod
    def compute_loss(self, views: Sequence[Tensor], epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of one micro-batch of views, and further scalars to log."""

    def images(self, views: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the images among the inputs of `compute_loss`."""
        return views

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Notify the backbones of a new epoch; some schedule their attention by it."""
        for network in (self.student, self.teacher):
            backbone = loading.unwrap(network)
            if isinstance(backbone, Backbone):
                backbone.start_epoch(epoch, epochs)


class Schedules(NamedTuple):
    """Values of each optimizer step."""

    lr: np.ndarray
    weight_decay: np.ndarray
    momentum: np.ndarray


class TrainStep:
    """One update: schedules, loss, backward, clipping, frozen prototypes, optimizer, teacher, centers.

    Args:
        optimizer: Optimizer of the student; weight decay applies to its first parameter group only.
        schedules: Learning rate, weight decay and teacher momentum of each step.
        precision: `fp32`, `bf16` or `fp16` for the networks; losses are computed in float32.
        clip_grad: Largest norm of each parameter's gradient; 0 disables clipping.
        freeze_last_layer: Number of epochs during which the prototypes are frozen.
        nonfinite: Counter of steps that are not finite.
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

    # ----------------------------------------------------------------- the update

    def __call__(
        self, micro_batches: Sequence[MicroBatch], iteration: int, epoch: int, monitor: bool = False
    ) -> dict[str, Tensor]:
        """Update student, teacher and centers.

        Args:
            micro_batches: Views of each micro-batch, or functions that make them when they are needed.
            monitor: Also return the statistics of the collapse monitor for the last micro-batch.

        Returns:
            Scalars on the device: `loss` and those of the method, averaged over micro-batches and processes, and `skipped`, 1.0
            if a loss or gradient was not finite; then parameters, moments, step counters, running statistics and centers are
            unchanged on all processes.
        """
        student, teacher = self.method.student, self.method.teacher
        self._set_schedules(iteration)
        self.statistics.keep()
        fsdp.broadcast_running_statistics(student)
        scalars = self._accumulate_gradients(micro_batches, epoch, monitor)
        self.scaler.unscale_(self.optimizer)
        norms = optim.clip_each_gradient(student, self.clip_grad)
        means = self._mean_over_processes(scalars, torch.isfinite(norms).all())
        applied = means.pop("finite") == 1
        names = [name for name, parameter in student.named_parameters() if parameter.grad is not None]
        self.nonfinite.record(names, norms, scalars, applied)
        if epoch < self.freeze_last_layer:
            optim.drop_last_layer_gradients(student)
        optim.step_if(self.optimizer, applied)
        optim.update_teacher(teacher, student, float(self.schedules.momentum[iteration]), applied)
        fsdp.reset_forward_state(teacher)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.criterion.update_center(applied)
        self.statistics.restore_unless(applied)
        return means | {"skipped": 1 - applied.float()}

    def _set_schedules(self, iteration: int) -> None:
        for i, group in enumerate(self.optimizer.param_groups):
            group["lr"] = float(self.schedules.lr[iteration])
            if i == 0:
                group["weight_decay"] = float(self.schedules.weight_decay[iteration])

    def _accumulate_gradients(
        self, micro_batches: Sequence[MicroBatch], epoch: int, monitor: bool
    ) -> dict[str, Tensor]:
        """Run forward and backward of every micro-batch; gradients are synchronized after the last one only."""
        student = self.method.student
        scalars: dict[str, Tensor] = {}
        monitored: dict[str, Tensor] = {}
        for i, micro_batch in enumerate(micro_batches):
            views = micro_batch() if callable(micro_batch) else micro_batch
            last = i == len(micro_batches) - 1
            no_sync = isinstance(student, DistributedDataParallel) and not last
            if monitor and last:
                self.method.monitor = lambda levels: monitored.update(self.monitor.measure(levels))
            fsdp.set_gradient_sync(student, enabled=last)
            with student.no_sync() if no_sync else contextlib.nullcontext():  # type: ignore[operator]
                with utils.autocast(self.device, self.precision):
                    loss, extra = self.method.compute_loss(views, epoch)
                self.scaler.scale(loss / len(micro_batches)).backward()
            del views  # before the next ones are made
            for name, value in {"loss": loss, **extra}.items():
                scalars[name] = scalars.get(name, 0) + value.detach().float() / len(micro_batches)
        self.method.monitor = None
        return scalars | monitored

    def _mean_over_processes(self, scalars: dict[str, Tensor], gradients_finite: Tensor) -> dict[str, Tensor]:
        """Return the means of the scalars, and `finite`: 1.0 if all losses and gradients of all processes are finite."""
        finite = gradients_finite & torch.isfinite(scalars["loss"])
        stacked = torch.stack([*scalars.values(), finite.float()])
        means = collectives.all_reduce_sum(stacked) / collectives.get_world_size()
        return dict(zip([*scalars, "finite"], means.unbind()))

    # ----------------------------------------------------------------- after a log interval

    def check(
        self, steps: Sequence[dict[str, float]], last_iteration: int, last_views: Callable[[], Views] | None = None
    ) -> None:
        """Report skipped steps and signs of a collapse.

        Args:
            steps: Scalars of the last steps, as read from the device.
            last_iteration: Number of the last of them.
            last_views: Returns the views of the last micro-batch, for the diagnosis.

        Raises:
            FloatingPointError: Too many consecutive steps were skipped; on all processes.
        """
        for iteration, scalars in enumerate(steps, last_iteration + 1 - len(steps)):
            if self.nonfinite.count(scalars, iteration):
                settings: dict[str, float | str] = {
                    "iteration": iteration,
                    "lr": float(self.schedules.lr[iteration]),
                    "precision": self.precision,
                }
                self.nonfinite.fail(settings, last_views and (lambda: self.method.images(last_views())))
        if steps:
            warmed_up = last_iteration > int(self.schedules.lr.argmax())
            self.monitor.check(steps[-1], warmed_up, last_iteration)

    # ----------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the state under the published names, with sharded tensors where the run is sharded; a collective operation.

        Raises:
            FloatingPointError: A weight is not finite.
        """
        method = self.method
        student, teacher = method.student.state_dict(), method.teacher.state_dict()
        if batch_norms(method.teacher) and collectives.is_distributed():
            teacher = loading.add_module_prefix(teacher)  # wrapped like the student, as published
        criterion = method.criterion.state_dict()
        serialization.check_finite(student=student, teacher=teacher, **{method.criterion_key: criterion})
        return {
            "student": loading.add_module_prefix(student),
            "teacher": teacher,
            "optimizer": self.optimizer.state_dict(),
            method.criterion_key: criterion,
            "fp16_scaler": self.scaler.state_dict() if self.scaler.is_enabled() else None,
            "bad_steps_in_a_row": self.nonfinite.in_a_row,
            "monitor": self.monitor.state_dict(),
        }

    def load_state_dict(
        self, content: Mapping[str, Any], path: Path, *, extend: bool = False, allow_partial: bool = False
    ) -> None:
        """Load the content of a checkpoint, this project's or a published one; an error leaves the state partly loaded.

        Args:
            extend: Let heads and centers that the file lacks as a whole start fresh.
            allow_partial: With `extend`, load what fits of everything.

        Raises:
            UsageError: Something is missing or does not fit.
        """
        method, source = self.method, f"checkpoint '{path}'"
        allow_partial = extend and allow_partial
        needed = {"student", "teacher", "epoch", *(() if allow_partial else ("optimizer",))}
        absent = (needed if extend else needed | {method.criterion_key}) - content.keys()
        if absent:
            other = " (another method made it)" if absent == {method.criterion_key} else ""
            remedy = (
                "pass --init_weights FILE to start a new schedule from it" if extend else "choose another --output_dir"
            )
            raise UsageError(f"{source} cannot be resumed, it has no {', '.join(sorted(absent))}{other}; {remedy}")
        networks = {"student": method.student, "teacher": method.teacher}
        fresh = restore.load_networks(path, content, networks, extend, allow_partial)
        fresh_centers = restore.load_centers(path, content, method.criterion, method.criterion_key, extend)
        student = loading.unwrap(method.student)
        restore.load_moments(path, content, self.optimizer, student, fresh, extend, allow_partial)
        if extend:
            names = [*(part.rstrip(".") for part in fresh), *fresh_centers]
            logger.info("continuing %s%s", source, f"; {', '.join(names)} start fresh" if names else "")
        if not content.get("rng"):
            logger.info("%s holds no random states (another program wrote it); they start fresh", source)
        with restore.reading("fp16_scaler", path):
            if self.scaler.is_enabled() and content.get("fp16_scaler"):
                self.scaler.load_state_dict(content["fp16_scaler"])
        self.nonfinite.in_a_row = content.get("bad_steps_in_a_row", 0)
        with restore.reading("monitor", path):
            self.monitor.load_state_dict(content.get("monitor", {}))


class RunningStatistics:
    """Running statistics of BatchNorm layers, which are restored when a step is skipped."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        buffers = [buffer for network in networks for norm in batch_norms(network) for buffer in norm.buffers()]
        self._flat = {
            dtype: [buffer.view(-1) for buffer in buffers if buffer.dtype == dtype]
            for dtype in {buffer.dtype for buffer in buffers}
        }
        self._kept: dict[torch.dtype, Tensor] = {}

    def keep(self) -> None:
        """Copy the current statistics."""
        self._kept = {dtype: torch.cat(parts) for dtype, parts in self._flat.items()}

    def restore_unless(self, applied: Tensor) -> None:
        """Restore the copied statistics where `applied`, a boolean scalar on the device, is False."""
        for dtype, parts in self._flat.items():
            right = torch.where(applied, torch.cat(parts), self._kept.pop(dtype))
            torch._foreach_copy_(parts, right.split([len(part) for part in parts]))
