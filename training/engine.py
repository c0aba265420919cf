"""The training loop over epochs and steps, shared by every method."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch.utils.data import DataLoader

import utils
from data.loader import Batch, FailureTally, in_groups, set_epoch
from training.checkpointing import RunPosition, Saver, images_per_step
from training.estimate import duration
from training.run_log import EpochMeter, RunLog
from training.step import TrainStep, Views
from utils import UsageError, logger

HOST = torch.device("cpu")  # for collectives that must not synchronize with the GPU


def steps_per_epoch(batches: int, accum_iter: int) -> int:
    """Return the optimizer steps of an epoch; micro-batches that do not fill a step are dropped.

    Raises:
        UsageError: There is not even one step.
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
    evaluate: Callable[[int], dict[str, float]] | None = None,
) -> bool:
    """Train from `start` to the end of the last epoch.

    Args:
        saver: Saves the run after each epoch, and within an epoch when it is due.
        evaluate: Called after each epoch; returns scores to log.

    Returns:
        Whether the run is finished; otherwise a signal has stopped it, and it is saved.

    Raises:
        UsageError: More than 1 % of the images cannot be read.
        FloatingPointError: Too many consecutive steps were not finite; raised at the end of the log interval.
    """
    steps = steps_per_epoch(len(loader), accum_iter)
    tally = FailureTally(len(loader.dataset), start.unreadable)  # type: ignore[arg-type]
    for epoch in range(start.epoch, epochs):
        done = min(start.steps, steps) if epoch == start.epoch else 0
        set_epoch(loader, epoch, skipped_batches=done * accum_iter)
        if not done:
            tally.start_pass()
        step.method.start_epoch(epoch, epochs)
        meter = EpochMeter(epoch, steps, images_per_step=images_per_step(saver.args))
        if done:
            meter.resume(start.meter, done)
        with log.epoch(meter) as show:
            for i, micro_batches in enumerate(in_groups(meter.timed(loader), accum_iter), done):
                failures = [failure for batch in micro_batches for failure in batch.failures]
                incomplete = not all(batch.views for batch in micro_batches)
                votes = tally.exchange(failures, HOST, incomplete, saver.votes())
                iteration = epoch * steps + i
                if saver.due(i, i > done, votes):
                    step.check(meter.read(), iteration - 1)
                    saver.save(RunPosition(epoch, i, meter.state(), tally.seen))
                    if saver.stopping:
                        return False
                views = [partial(_load_views, batch, step, log) for batch in micro_batches]
                started = time.perf_counter()
                meter.update(step(views, iteration, epoch, monitor=log.due(meter, ahead=1)))
                if saver.args.compile and iteration == start.epoch * steps + min(start.steps, steps):
                    logger.info("--compile: compiled; the first step took %s", duration(time.perf_counter() - started))
                if log.due(meter):
                    step.check(meter.read(), iteration, views[-1])
                show(lr=float(step.schedules.lr[iteration]), wd=float(step.schedules.weight_decay[iteration]))
        meter.stop()
        scores = {} if evaluate is None else evaluate(epoch)
        log.finish_epoch(meter, unreadable_images=len(tally.seen), **scores)
        saver.save(RunPosition(epoch + 1, unreadable=tally.seen))
    return True


def _load_views(batch: Batch, step: TrainStep, log: RunLog) -> Views:
    views = batch.views_on(step.device)
    log.save_crops(step.method.images(views))
    return views
