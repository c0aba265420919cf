"""Curves of a training run: which keys of `log.txt` are plotted together, and where the run was resumed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from analysis import plots

CURVES = {  # title of a plot -> keys of log.txt, and what they are called
    "Loss": {"train_loss": "loss", "train_view_loss": "views", "train_region_loss": "regions"},
    "Terms of the loss": {
        "train_g_cl": "class token, global",
        "train_l_cl": "class token, local",
        "train_g_mcl": "second token, global",
        "train_l_mcl": "second token, local",
        "train_g_pch": "patches, global",
        "train_l_pch": "patches, local",
    },
    "Top-1, %": {"test_acc1": "top-1"},
    "mIoU, %": {"test_miou": "mIoU"},
    "k-NN top-1, %": {"knn_top1": "teacher", "knn_top1_student": "student"},
    "Learning rate": {"train_lr": "learning rate"},
    "Weight decay": {"train_wd": "weight decay"},
    "Images per second": {"images_per_s": "images/s"},
}
LEVELS = {"view": "views", "region": "regions", "cls": "class token", "cls+": "second token", "patch": "patches"}
STATISTICS = {  # of the collapse monitor
    "teacher_entropy": "Entropy of the teacher, nats",
    "kl": "KL divergence from the teacher, nats",
    "prototypes_used": "Prototypes in use, share",
    "feature_std": "Standard deviation of the features",
    "feature_rank": "Effective rank of the features",
}
COLLAPSE = {
    title: {f"train_{level}/{key}": name for level, name in LEVELS.items()} for key, title in STATISTICS.items()
}
COMPARED_WITH_LN_K = ("Loss", "Terms of the loss", STATISTICS["teacher_entropy"])


def titles_of_keys() -> dict[str, str]:
    """Return the title of a plot of its own for each key."""
    plotted = CURVES | COLLAPSE
    return {
        key: title if len(keys) == 1 or name == title.lower() else f"{title}: {name}"
        for title, keys in plotted.items()
        for key, name in keys.items()
    }


class Curves(NamedTuple):
    """A plot, and the first and last values of its curves in words."""

    figure: Figure
    caption: str


def draw_curves(
    log: Sequence[Mapping[str, Any]],
    titles: Mapping[str, Mapping[str, str]],
    resumed: Sequence[float] = (),
    prototypes: int | None = None,
) -> Iterator[Curves]:
    """Yield the plots that a log has values for.

    Args:
        log: epochs of the run.
        titles: `CURVES` or `COLLAPSE`.
        resumed: epochs done before each resume of the run.
        prototypes: K; ln K is the loss and the entropy of outputs without information.
    """
    for title, keys in titles.items():
        series = {name: finite_points(log, key) for key, name in keys.items()}
        series = {name: points for name, points in series.items() if points}
        if series:
            ends = "; ".join(f"{name} {_ends([value for _, value in points])}" for name, points in series.items())
            level = {"ln K": math.log(prototypes)} if prototypes and title in COMPARED_WITH_LN_K else {}
            # The value of epoch e is the mean over what is between e - 0.5 and e + 0.5 on the axis.
            yield Curves(plots.curve_plot(title, series, [epochs - 0.5 for epochs in resumed], level), ends)


def finite_points(log: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """Return the epochs with a finite value of `key`, and these values."""
    points = [(epoch["epoch"], float(epoch[key])) for epoch in log if isinstance(epoch.get(key), int | float)]
    return [point for point in points if math.isfinite(point[1])]


def _ends(values: Sequence[float]) -> str:
    """Return the first and the last value of a curve."""
    return " to ".join(f"{value:.4g}" for value in (values if len(values) == 1 else (values[0], values[-1])))
