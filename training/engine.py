"""The loop that every method shares: the step with accumulation, clipping and EMA, and the loop around it.

A method brings its networks and a function from a batch to a loss (`Method`); nothing here knows which method it is.
`TrainStep` is one update; `train` is the loop over epochs around it. A step never makes the host wait for the device: whether it
is finite is decided and acted upon there, and its numbers are read once a log interval.

Origin: the order of an update is DINO's (Caron et al., ICCV 2021).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader

import utils
from data.loader import Batch, FailureTally, in_groups, set_epoch
from distributed import collectives
from training.checkpointing import RunPosition, Saver
from training.run_log import EpochMeter, RunLog
from utils import UsageError

if TYPE_CHECKING:
    pass
from training.step import TrainStep, Views

# What processes tell each other about files goes past the device, which would have to be waited for.
HOST = torch.device("cpu")


def steps_per_epoch(batches: int, accum_iter: int) -> int:
    """Optimizer steps of an epoch; micro-batches that do not fill one are left out.

    Raises:
        UsageError: not even one.
    """
    if batches < accum_iter:
        raise UsageError(
            f"an epoch has {utils.counted(batches, 'batch', 'batches')}, --accum_iter {accum_iter} needs that many for one step; "
            "lower it"
        )
    return batches // accum_iter


def train(
    step: TrainStep,
    loader: DataLoader[Batch],
    epochs: int,
    accum_iter: int,
    log: RunLog,
    saver: Saver,
    start: RunPosition,
    probe: Callable[[int], dict[str, float]] | None = None,
) -> bool:
    """Train from `start` to the last of `epochs`, log each step and each epoch with what `probe(epoch)` measures, and save after
    each epoch and where `saver` asks for it.

    Returns:
        whether the run is done; else a signal has stopped it, and what it did is saved.

    Raises:
        UsageError: more than 1 % of the images cannot be read.
        FloatingPointError: see `TrainStep.check`; raised when the log interval ends in which it happened.
    """
    steps = steps_per_epoch(len(loader), accum_iter)
    tally = FailureTally(len(loader.dataset), start.unreadable)  # type: ignore[arg-type]
    for epoch in range(start.epoch, epochs):
        done = min(start.steps, steps) if epoch == start.epoch else 0
        set_epoch(loader, epoch, skipped_batches=done * accum_iter)
        if not done:
            tally.start_pass()
        step.method.start_epoch(epoch, epochs)
        meter = EpochMeter(epoch, steps, images_per_step=_global_batch(loader, accum_iter))
        if done:
            meter.resume(start.meter, done)
        with log.epoch(meter) as show:
            for i, micro_batches in enumerate(in_groups(meter.timed(loader), accum_iter), done):
                failures = [failure for batch in micro_batches for failure in batch.failures]
                incomplete = not all(batch.views for batch in micro_batches)
                wishes = tally.add(failures, HOST, incomplete, saver.wishes())
                iteration = epoch * steps + i
                if saver.due(i, i > done, wishes):
                    step.check(meter.read(), iteration - 1)
                    saver.save(RunPosition(epoch, i, meter.state(), tally.seen), images=i * meter.images_per_step)
                    if saver.stopping:
                        return False
                views = [partial(_finished_views, batch, step, log) for batch in micro_batches]
                meter.update(step(views, iteration, epoch, watch=log.due(meter, ahead=1)))
                if log.due(meter):
                    step.check(meter.read(), iteration, views[-1])
                show(lr=float(step.schedules.lr[iteration]), wd=float(step.schedules.weight_decay[iteration]))
        meter.stop()
        probed = {} if probe is None else probe(epoch)
        log.finish_epoch(meter, unreadable_images=len(tally.seen), **probed)
        saver.save(RunPosition(epoch + 1, unreadable=tally.seen))
    return True


def _finished_views(batch: Batch, step: TrainStep, log: RunLog) -> Views:
    views = batch.views_on(step.device)
    log.save_crops(step.method.images(views))
    return views


def _global_batch(loader: DataLoader[Batch], accum_iter: int) -> int:
    assert loader.batch_size is not None
    return loader.batch_size * accum_iter * collectives.get_world_size()
