"""The loop that every method shares: the step with accumulation, clipping and EMA, logging, saving and resuming.

A method brings its networks and a function from a batch to a loss (`Method`); nothing here knows which method it is.
`TrainStep` is one update; `train` is the loop over epochs around it. A step never makes the host wait for the device: whether it
is finite is decided and acted upon there, and its numbers are read once a log interval.

Origin: the order of an update is DINO's (Caron et al., ICCV 2021).
"""

from __future__ import annotations

import contextlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import checkpoint
import optim
import utils
from data.loader import Batch, FailureTally, set_epoch
from models.base import Backbone
from progress import EpochMeter, RunLog
from utils import UsageError, logger

MAX_BAD_STEPS = 20
# What processes tell each other about files goes past the device, which would have to be waited for.
HOST = torch.device("cpu")
# What DistributedDataParallel calls the exchange of buffers before a forward; torch 2.14 renamed it.
SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else "broadcast_buffers"
)
LAUNCH_FLAGS = {"dist_url", "dist_timeout", "local_rank", "log_freq"}  # change no number of a run
# What a run did whose saved arguments do not have the flag yet, where that is not what a new run does by itself.
BEFORE_THE_FLAG = {"aug_backend": "pil", "plain_loss": True, "sampler": "distributed"}
Views = Sequence[Tensor]
MicroBatch = Views | Callable[[], Views]


class Method(ABC):
    """What a self-distillation method gives the engine.

    Attributes:
        student, teacher: networks with the same parameters in the same order; either may be wrapped for several processes.
        criterion: the loss; its state dict is saved as `dino_loss`.
    """

    student: nn.Module
    teacher: nn.Module
    criterion: nn.Module

    @abstractmethod
    def compute_loss(self, views: Sequence[Tensor], epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro-batch of views, and further scalars to log."""

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Before each epoch, for networks whose attention depends on the progress of training."""
        for network in (self.student, self.teacher):
            backbone = checkpoint.unwrap(network)
            if isinstance(backbone, Backbone):
                backbone.start_epoch(epoch, epochs)

    @abstractmethod
    def finish_step(self, applied: Tensor) -> None:
        """After the last micro-batch: move centres where the step is `applied`, a boolean scalar on the device."""


class Schedules(NamedTuple):
    """One value for each optimiser step."""

    lr: np.ndarray
    weight_decay: np.ndarray
    momentum: np.ndarray


class TrainStep:
    """One update, in the published order: schedules, loss, backward, clipping, frozen prototypes, optimiser, teacher.

    Args:
        method, optimizer, schedules: see there; weight decay applies to parameter group 0 only.
        device, precision: where and in what the networks compute (`fp32`, `bf16` or `fp16`); losses are float32.
        clip_grad: largest norm of each parameter's gradient, 0 for none.
        freeze_last_layer: epochs during which the prototypes stay as they are.
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
        self.bad_steps_in_a_row = 0

    def __call__(self, micro_batches: Sequence[MicroBatch], iteration: int, epoch: int) -> dict[str, Tensor]:
        """Update on micro-batches of views that count as one batch.

        What is a function gives its views when it is their turn, and they are forgotten after their backward.

        Returns:
            scalars on the device, to be read later: `loss` and the method's, means over micro-batches and processes, and
            `skipped`: 1.0 where a loss or gradient was not finite; then no process has changed a parameter, a moment, a step
            counter, a running statistic or a centre.
        """
        student, teacher = self.method.student, self.method.teacher
        self._set_schedules(iteration)
        self.statistics.keep()
        scalars = self._accumulate_gradients(micro_batches, epoch)
        self.scaler.unscale_(self.optimizer)
        gradients_finite = optim.clip_each_gradient(student, self.clip_grad)
        means = self._mean_over_processes(scalars, gradients_finite)
        applied = means.pop("finite") == 1
        if epoch < self.freeze_last_layer:
            optim.drop_last_layer_gradients(student)
        optim.step_where(self.optimizer, applied)
        optim.update_teacher(teacher, student, float(self.schedules.momentum[iteration]), applied)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.finish_step(applied)
        self.statistics.restore_unless(applied)
        return means | {"skipped": 1 - applied.float()}

    def check(self, steps: Sequence[dict[str, float]], last_iteration: int) -> None:
        """Tell of skipped steps among the last ones, whose scalars have been read, and end a run that only skips.

        Raises:
            FloatingPointError: `MAX_BAD_STEPS` skipped steps in a row, on all processes at once.
        """
        for iteration, scalars in enumerate(steps, last_iteration + 1 - len(steps)):
            self._count_bad_steps(not scalars["skipped"], scalars["loss"], iteration)

    def _set_schedules(self, iteration: int) -> None:
        for i, group in enumerate(self.optimizer.param_groups):
            group["lr"] = float(self.schedules.lr[iteration])
            if i == 0:
                group["weight_decay"] = float(self.schedules.weight_decay[iteration])

    def _accumulate_gradients(self, micro_batches: Sequence[MicroBatch], epoch: int) -> dict[str, Tensor]:
        """Backward through every micro-batch; gradients are exchanged between processes after the last one only."""
        student = self.method.student
        scalars: dict[str, Tensor] = {}
        for i, micro_batch in enumerate(micro_batches):
            views = micro_batch() if callable(micro_batch) else micro_batch
            last = i == len(micro_batches) - 1
            wait = isinstance(student, DistributedDataParallel) and not last
            with student.no_sync() if wait else contextlib.nullcontext():  # type: ignore[operator]
                with utils.autocast(self.device, self.precision):
                    loss, extra = self.method.compute_loss(views, epoch)
                self.scaler.scale(loss / len(micro_batches)).backward()
            del views  # the next ones are made now
            for name, value in {"loss": loss, **extra}.items():
                scalars[name] = scalars.get(name, 0) + value.detach().float() / len(micro_batches)
        return scalars

    def _mean_over_processes(self, scalars: dict[str, Tensor], gradients_finite: Tensor) -> dict[str, Tensor]:
        """Means of the scalars, and `finite`: 1.0 where all losses and gradients of all processes are."""
        finite = gradients_finite & torch.isfinite(scalars["loss"])
        stacked = torch.stack([*scalars.values(), finite.float()])
        means = utils.all_reduce_sum(stacked) / utils.get_world_size()
        return dict(zip([*scalars, "finite"], means.unbind()))

    def _count_bad_steps(self, applied: bool, loss: float, iteration: int) -> None:
        self.bad_steps_in_a_row = 0 if applied else self.bad_steps_in_a_row + 1
        if not applied:
            logger.warning("step %d skipped: loss %s or a gradient is not finite", iteration, loss)
        if self.bad_steps_in_a_row >= MAX_BAD_STEPS:
            raise FloatingPointError(
                f"{MAX_BAD_STEPS} steps in a row had a loss or gradient that is not finite (loss {loss}, "
                f"lr {float(self.schedules.lr[iteration]):.3g}, precision {self.precision}); resume with --precision fp32, "
                "a lower --lr or a smaller --clip_grad"
            )


class RunningStatistics:
    """The running statistics of BatchNorm, which a forward changes: kept, to be put back where the step is skipped.

    Networks without BatchNorm cost nothing here.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        norms = [m for net in networks for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        buffers = [buffer for norm in norms for buffer in norm.buffers()]
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


# --------------------------------------------------------------------------- the loop


def wrap_networks(student: nn.Module, teacher: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Wrap the networks for several processes; with one process they come back as they are.

    Networks with BatchNorm share their statistics over processes on CUDA, and the teacher is wrapped too, as published.
    """
    if not utils.is_distributed():
        return student, teacher
    device = next(student.parameters()).device
    device_ids = [device.index] if device.type == "cuda" else None
    has_batch_norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in student.modules())
    if has_batch_norm:
        if device.type == "cuda":
            student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
            teacher = nn.SyncBatchNorm.convert_sync_batchnorm(teacher)
        teacher.requires_grad_(True)  # DistributedDataParallel refuses a network without trainable parameters
        teacher = DistributedDataParallel(teacher, device_ids=device_ids)
        teacher.requires_grad_(False)
    options: dict[str, Any] = {SYNC_BUFFERS: has_batch_norm, "gradient_as_bucket_view": True}
    return DistributedDataParallel(student, device_ids=device_ids, **options), teacher


def steps_per_epoch(batches: int, accum_iter: int) -> int:
    """Optimiser steps of an epoch; micro-batches that do not fill one are left out.

    Raises:
        UsageError: not even one.
    """
    if batches < accum_iter:
        raise UsageError(
            f"an epoch has {batches} batches, --accum_iter {accum_iter} needs that many for one step; lower it"
        )
    return batches // accum_iter


def train(
    step: TrainStep,
    loader: DataLoader[Batch],
    epochs: range,
    accum_iter: int,
    log: RunLog,
    save: Callable[[int], None],
) -> None:
    """Train through `epochs`, log each step and each epoch, and call `save(epoch)` after each.

    Raises:
        UsageError: more than 1 % of the images cannot be read.
        FloatingPointError: see `TrainStep.check`; raised when the log interval ends in which it happened.
    """
    steps = steps_per_epoch(len(loader), accum_iter)
    tally = FailureTally(len(loader.dataset))  # type: ignore[arg-type]
    for epoch in epochs:
        set_epoch(loader, epoch)
        step.method.start_epoch(epoch, epochs.stop)
        meter = EpochMeter(epoch, steps, images_per_step=_global_batch(loader, accum_iter))
        with log.epoch(meter) as show:
            for i, micro_batches in enumerate(_in_groups(meter.timed(loader), accum_iter)):
                failures = [failure for batch in micro_batches for failure in batch.failures]
                tally.add(failures, HOST, incomplete=not all(batch.views for batch in micro_batches))
                views = [partial(_finished_views, batch, step.device, log) for batch in micro_batches]
                iteration = epoch * steps + i
                meter.update(step(views, iteration, epoch))
                if log.due(meter):
                    step.check(meter.read(), iteration)
                show(
                    iteration, lr=float(step.schedules.lr[iteration]), wd=float(step.schedules.weight_decay[iteration])
                )
        log.finish_epoch(meter, unreadable_images=len(tally.seen))
        save(epoch)


def _finished_views(batch: Batch, device: torch.device, log: RunLog) -> Views:
    views = batch.views_on(device)
    log.crops_once(views)
    return views


def _global_batch(loader: DataLoader[Batch], accum_iter: int) -> int:
    assert loader.batch_size is not None
    return loader.batch_size * accum_iter * utils.get_world_size()


def _in_groups(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """Consecutive groups of `size`; an incomplete last one is left out."""
    while len(group := list(islice(batches, size))) == size:
        yield group


# --------------------------------------------------------------------------- saving and resuming


def save_run(output_dir: Path, step: TrainStep, epoch: int, args: Any, config: Any, keep_every: int) -> None:
    """Write `checkpoint.pth`, and `checkpoint{epoch:04}.pth` every `keep_every` epochs (0: never).

    All processes call this; the main one writes.
    """
    rng_of_rank = utils.all_gather_objects(utils.get_rng_state())
    if not utils.is_main_process():
        return
    method = step.method
    state = {
        "student": checkpoint.prefixed(method.student.state_dict()),
        "teacher": method.teacher.state_dict(),
        "optimizer": step.optimizer.state_dict(),
        "epoch": epoch + 1,
        "args": args,
        "dino_loss": method.criterion.state_dict(),
        "fp16_scaler": step.scaler.state_dict() if step.scaler.is_enabled() else None,
        "config": None if config is None else config.dump(),
        "rng": rng_of_rank,
        "world_size": utils.get_world_size(),
    }
    checkpoint.save_file(state, output_dir / "checkpoint.pth")
    if keep_every and epoch % keep_every == 0:
        checkpoint.save_file(state, output_dir / f"checkpoint{epoch:04}.pth")


def resume_run(output_dir: Path, step: TrainStep, args: Any) -> int:
    """Continue from `output_dir/checkpoint.pth` if it is there; returns the epoch to start with.

    Raises:
        UsageError: the file is damaged or of another network, optimiser or number of prototypes.
    """
    path = output_dir / "checkpoint.pth"
    if not path.exists():
        return 0
    source = f"checkpoint '{path}'"
    content = checkpoint.load_file(path)
    absent = {"student", "teacher", "optimizer", "epoch", "dino_loss"} - content.keys()
    if absent:
        raise UsageError(
            f"{source} cannot be resumed, it has no {', '.join(sorted(absent))}; choose another --output_dir"
        )
    for network, key in ((step.method.student, "student"), (step.method.teacher, "teacher")):
        checkpoint.load_network(network, checkpoint.network_state(content, key, path), source)
    centres = checkpoint.NetworkState(content["dino_loss"], "full checkpoint", "dino_loss")
    checkpoint.load_network(step.method.criterion, centres, source)
    saved_args = content.get("args") or args
    if getattr(saved_args, "optimizer", args.optimizer) != args.optimizer:
        raise UsageError(
            f"{source} was made with --optimizer {saved_args.optimizer}, not {args.optimizer}; choose another --output_dir"
        )
    try:
        optim.load_optimizer_state(step.optimizer, content["optimizer"])
    except ValueError:
        raise UsageError(f"{source} trained other parameters; was --norm_last_layer the same?") from None
    if step.scaler.is_enabled() and content.get("fp16_scaler"):
        step.scaler.load_state_dict(content["fp16_scaler"])
    return continue_from(content, args, path)


def continue_from(content: dict[str, Any], args: Any, path: Path) -> int:
    """The end of every resume: report changed arguments, restore the random states, say and return the epoch to start with."""
    _report_changes(vars(args), vars(content.get("args") or args))
    rng_of_rank = content.get("rng") or []
    if len(rng_of_rank) == utils.get_world_size():
        utils.set_rng_state(rng_of_rank[utils.get_rank()])
    else:
        logger.info("the run was saved by %d processes: random numbers start afresh", len(rng_of_rank))
    logger.info("resuming %s at epoch %d", path, content["epoch"])
    return int(content["epoch"])


def _report_changes(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Say which arguments differ from those of the run that is continued, or from what it did before they existed."""
    before = BEFORE_THE_FLAG | before
    names = sorted((now.keys() & before.keys()) - LAUNCH_FLAGS)
    changed = [f"{name} {before[name]} -> {now[name]}" for name in names if now[name] != before[name]]
    if changed:
        logger.warning("arguments differ from those of the resumed run: %s", "; ".join(changed))
