"""Defaults for large data sets on short runs and few images.

A default that does not fit is adapted, or warned about where adapting it would change results. A value that was given is never
changed: it is rejected or warned about. Each message names the flag, its value and the remedy, and comes before any image is read.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from utils import UsageError, counted, logger

WARMUPS = ("warmup_epochs", "warmup_teacher_temp_epochs")
LARGEST_INITIAL_SHARE = 0.05  # of the initial weights in the teacher at the end of a run
PUBLISHED_RATE = 0.001  # of linear probes
FEW_TRAINING_IMAGES = 2_000_000  # of a linear probe over all epochs; the published ones use 128 million


class DefaultInt(int):
    """A default that may be adapted to the run, unlike an equal number given on the command line."""


def fit_schedules(args: argparse.Namespace) -> None:
    """Lower default warm-ups longer than the run to a quarter of it, and warn about schedules that take all of its epochs.

    Raises:
        UsageError: A given warm-up is longer than the run.
    """
    for name in WARMUPS:
        warmup = getattr(args, name, 0)
        if warmup > args.epochs and not isinstance(warmup, DefaultInt):
            raise UsageError(f"--{name} {warmup} is more than --epochs {args.epochs}; lower --{name}")
        if warmup > args.epochs:
            setattr(args, name, args.epochs // 4)
            logger.info("--%s is %d: the default, %d, exceeds --epochs %d", name, args.epochs // 4, warmup, args.epochs)
        elif isinstance(warmup, DefaultInt):
            setattr(args, name, int(warmup))  # checkpoints hold plain numbers
    for name, first_of_concern, effect in (
        ("warmup_epochs", args.epochs, "the learning rate only rises"),
        ("freeze_last_layer", args.epochs, "the prototypes are never trained"),
        ("knn_every", args.epochs + 1, "no k-NN accuracy is computed"),
    ):
        if getattr(args, name, 0) >= first_of_concern:
            logger.warning(
                "--%s %d with --epochs %d: %s; lower --%s", name, getattr(args, name), args.epochs, effect, name
            )


def warn_slow_teacher(momentum: float, initial_share: float, steps: int) -> None:
    """Warn if a run is too short for its --momentum_teacher.

    Args:
        initial_share: Share of its initial weights in the teacher after all `steps`, the product of the momenta.
    """
    if initial_share <= LARGEST_INITIAL_SHARE:
        return
    # The cosine schedule to 1 has a mean of 1 - (1 - momentum) / 2, so the share is about exp(-steps (1 - momentum) / 2).
    fitting = max(1 + 2 * math.log(LARGEST_INITIAL_SHARE) / steps, 0.5)
    logger.warning(
        "--momentum_teacher %g: after the %s of this run the teacher still has %.0f %% of its initial weights; pass "
        "--momentum_teacher %.2g or more epochs, or evaluate the student (--checkpoint_key student)",
        *(momentum, counted(steps, "step"), 100 * initial_share, math.floor(1000 * fitting) / 1000),
    )


def warn_large_k(ks: list[int], voters: int) -> None:
    """Warn about --nb_knn larger than the number of images of the smallest class that vote."""
    large = [k for k in ks if k > voters]
    if large:
        logger.warning(
            "--nb_knn %s is more than the %s of the smallest class that vote, so other classes outvote it; rely on --nb_knn %d "
            "or fewer",
            *(" ".join(map(str, large)), counted(voters, "image"), max(voters, 1)),
        )


def warn_of_small_rate(rates: Sequence[float], epochs: int, images: int) -> None:
    """Warn if a linear probe of few images in all its epochs has no learning rate above the published one for ImageNet."""
    if images * epochs < FEW_TRAINING_IMAGES and max(rates) <= PUBLISHED_RATE:
        logger.warning(
            "--lr %s is for ImageNet, and %s in %s are few: the classifier may hardly be trained; pass --lr 0.001 0.01 0.1 1, "
            "which trains a classifier with each",
            *(" ".join(f"{rate:g}" for rate in rates), counted(images, "image"), counted(epochs, "epoch")),
        )
