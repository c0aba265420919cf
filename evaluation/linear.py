"""Linear classifiers on frozen features, trained side by side: weights, optimizer, schedule, epochs and table of scores.

Shapes: B images of a batch, C channels of a feature, K classes, S classifiers.
Origin: the linear evaluation of DINO (Caron et al., ICCV 2021) section 4.1; keys of files follow microsoft/esvit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from checkpoints import loading, serialization
from distributed import collectives
from evaluation.features import FeatureSource
from models import Backbone
from training import optim, restore
from training.checkpointing import StopRequest
from training.run_log import EpochMeter, RunLog
from utils import UsageError, logger


class Setting(NamedTuple):
    """What one classifier is trained with."""

    lr: float  # of the command line, before it is scaled with the batch
    n_last_blocks: int

    @property
    def name(self) -> str:
        """Its key in files."""
        return f"lr{self.lr}_n{self.n_last_blocks}"


class Score(NamedTuple):
    """Mean loss and accuracies in percent; `top5` is top-C where there are only C < 5 classes."""

    loss: float
    top1: float
    top5: float


# --------------------------------------------------------------------------- classifiers


def probe_width(backbone: Backbone, n: int, avgpool: bool) -> int:
    """Length of `forward_return_n_last_blocks(images, n, avgpool)`; these are the last entries of what a larger n gives."""
    widths = [width for width, depth in zip(backbone.stage_dims, backbone.stage_depths) for _ in range(depth)]
    appended = backbone.num_features if avgpool and backbone.num_cls_tokens else 0
    return sum(widths[-n:]) * len(backbone.view_tokens) + appended


class Classifier(nn.Module):
    """One linear layer on the last `width` entries of a feature vector."""

    def __init__(self, width: int, num_labels: int, seed: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, num_labels)
        with torch.no_grad():
            self.linear.weight.normal_(std=0.01, generator=torch.Generator().manual_seed(seed))
            self.linear.bias.zero_()

    def forward(self, features_BC: Tensor) -> Tensor:
        """(B, C) to logits (B, K)."""
        return self.linear(features_BC[:, -self.linear.in_features :])


class Classifiers(nn.Module):
    """Classifiers that see the same features and nothing of each other; each starts as it would alone."""

    def __init__(self, widths: list[int], num_labels: int, seed: int) -> None:
        super().__init__()
        self.each = nn.ModuleList(Classifier(width, num_labels, seed) for width in widths)

    def forward(self, features_BC: Tensor) -> list[Tensor]:
        """(B, C) to the logits (B, K) of each."""
        return [classifier(features_BC) for classifier in self.each]


class Probe:
    """All classifiers of a run with their optimizer, their schedule and the table of their scores.

    Args:
        settings: one for each classifier.
        widths: of each one's features.
        num_labels: classes.
        batch: images of a step over all processes.
        epochs: length of the cosine.
        lr_min: rate at its end, for every batch size.
        device: where they compute; with several processes gradients are averaged.
        seed: of the initial weights.
    """

    def __init__(
        self,
        settings: list[Setting],
        widths: list[int],
        num_labels: int,
        batch: int,
        epochs: int,
        device: torch.device,
        seed: int,
        lr_min: float = 0.0,
    ) -> None:
        self.settings = settings
        self.classifiers = Classifiers(widths, num_labels, seed).to(device)
        self.wrapped: nn.Module = self.classifiers
        if collectives.is_distributed():
            self.wrapped = DistributedDataParallel(
                self.classifiers, device_ids=[device.index] if device.type == "cuda" else None
            )
        groups = [
            {
                "params": list(classifier.parameters()),
                "param_names": [f"{setting.name}.{name}" for name, _ in classifier.named_parameters()],
                "lr": setting.lr * batch / 256,
            }
            for setting, classifier in zip(settings, self.classifiers.each)
        ]
        self.optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=0.0)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, epochs, eta_min=lr_min)
        self.table: list[dict[str, Any]] = [
            {**setting._asdict(), "best_acc1": None, "best_acc5": None, "best_epoch": None} for setting in settings
        ]

    @property
    def lrs(self) -> list[float]:
        """Present learning rate of each classifier."""
        return [group["lr"] for group in self.optimizer.param_groups]

    @property
    def best(self) -> int:
        """The classifier with the best validation accuracy so far; the first of equals."""
        return max(range(len(self.table)), key=self._accuracy)

    def _accuracy(self, row: int) -> float:
        best = self.table[row]["best_acc1"]
        return -1.0 if best is None else best

    def step(self, features_BC: Tensor, labels_B: Tensor, images: int) -> Tensor:
        """Update every classifier by the mean over the `images` of all processes, of which this one has B, perhaps none.

        Returns:
            a loss of each classifier, whose mean over processes is that over images.
        """
        share = images / collectives.get_world_size()
        logits_SBK = self.wrapped(features_BC)
        losses_S = torch.stack([F.cross_entropy(logits, labels_B, reduction="sum") / share for logits in logits_SBK])
        self.optimizer.zero_grad()
        losses_S.sum().backward()
        self.optimizer.step()
        return losses_S.detach()

    def record(self, epoch: int, scores: list[Score]) -> None:
        """Enter the scores of a validation into the table."""
        for row, score in zip(self.table, scores):
            row |= {"last_acc1": score.top1, "last_acc5": score.top5, "last_loss": json_number(score.loss)}
            if row["best_acc1"] is None or score.top1 > row["best_acc1"]:
                row |= {"best_acc1": score.top1, "best_acc5": score.top5, "best_epoch": epoch}

    def state(self, epoch: int) -> dict[str, Any]:
        """What `checkpoint.pth.tar` holds: the published keys for the best classifier, and all where there are several.

        Classifiers that have diverged are left out, and stay so when the run goes on.

        Raises:
            FloatingPointError: all of them have.
        """
        weights = [classifier.state_dict() for classifier in self.classifiers.each]
        finite = [row for row, state in enumerate(weights) if not any(serialization.nonfinite(state))]
        if not finite:
            raise FloatingPointError("no classifier has finite weights any more, nothing is saved; lower --lr")
        kept = self.best if self.best in finite else max(finite, key=self._accuracy)
        state = {
            "epoch": epoch + 1,
            "state_dict": loading.add_module_prefix(weights[kept]),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "best_acc": self.table[kept]["best_acc1"] or 0.0,
            "table": self.table,
        }
        if len(weights) > 1:
            state["classifiers"] = {self.settings[row].name: weights[row] for row in finite}
            state["diverged"] = [setting.name for row, setting in enumerate(self.settings) if row not in finite]
        return state

    def load_state(self, content: dict[str, Any], path: Path) -> None:
        """Take up what `state` returned, or a published file of one classifier, which `path` holds.

        Raises:
            UsageError: keys are missing, it is of other classifiers, or a value is of another kind than `state` writes.
        """
        source = f"checkpoint '{path}'"
        absent = {"epoch", "state_dict", "optimizer", "scheduler", "best_acc"} - content.keys()
        if absent:
            raise UsageError(
                f"{source} cannot be resumed, it has no {', '.join(sorted(absent))}; choose another --output_dir"
            )
        for flag, name in (("--epochs", "T_max"), ("--lr_min", "eta_min")):
            begun_with, now = content["scheduler"].get(name), getattr(self.scheduler, name)
            if begun_with not in (None, now):
                raise UsageError(
                    f"{source} was begun with {flag} {begun_with}, not {now}; pass that, or choose another --output_dir"
                )
        several = content.get("classifiers", {})
        try:
            for setting, classifier in zip(self.settings, self.classifiers.each):
                if setting.name in content.get("diverged", ()):
                    classifier.load_state_dict({k: w * math.nan for k, w in classifier.state_dict().items()})
                    continue
                weights = several[setting.name] if len(self.settings) > 1 else content["state_dict"]
                classifier.load_state_dict({name.removeprefix(loading.PREFIX): w for name, w in weights.items()})
        except (KeyError, AttributeError, TypeError, RuntimeError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise UsageError(f"{source} is of other classifiers ({reason}); choose another --output_dir") from None
        optim.load_own_moments(self.optimizer, content["optimizer"], source)
        with restore.reading("scheduler", path):
            self._load_schedule(content["scheduler"], content["optimizer"]["param_groups"])
        if "table" not in content:
            self.table[0]["best_acc1"] = float(content["best_acc"])
            return
        with restore.reading("table", path):
            for mine, row in zip(self.table, content["table"], strict=True):
                if any(not isinstance(row[key], int | float | None) for key in mine):
                    raise TypeError("a score that is no number")
            self.table = content["table"]

    def _load_schedule(self, saved: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
        """Take up the epoch and the rates of a saved schedule, which follows from them, and of its optimizer's groups.

        Raises:
            TypeError, ValueError, KeyError: values of other types, or of another number of classifiers.
        """
        own = self.scheduler.state_dict()
        rates = {key: [float(rate) for rate in saved[key]] for key in ("base_lrs", "_last_lr")}
        if any(len(values) != len(groups) for values in rates.values()):
            raise ValueError(f"rates of {len(rates['base_lrs'])} classifiers, moments of {len(groups)}")
        steps = {key: int(saved[key]) for key in ("last_epoch", "_step_count") if key in saved}
        self.scheduler.load_state_dict(own | rates | steps)
        for group, found in zip(self.optimizer.param_groups, groups):
            group["lr"] = float(found["lr"])


# --------------------------------------------------------------------------- epochs


def train_epoch(
    probe: Probe,
    source: FeatureSource,
    epoch: int,
    meter: EpochMeter,
    log: RunLog,
    ending: StopRequest,
    save: Callable[[int, list[float]], str],
    done: int = 0,
    sums: Sequence[float] = (),
) -> list[float]:
    """One pass over the training set; returns the mean loss of each classifier over steps and processes.

    Args:
        probe, source, epoch, meter, log, ending: see there.
        save: saves the run within the epoch: after so many steps, with such sums of losses.
        done, sums: the steps that were done before, and their sums of losses.

    Raises:
        FloatingPointError: no classifier has a finite loss any more, on all processes at once.
        Stopped: see `StopRequest.stop_if`.
    """
    losses_S: Any = 0.0
    if done:
        losses_S = torch.tensor(sums, device=next(probe.wrapped.parameters()).device) / collectives.get_world_size()
    ending.save_within = lambda steps: save(steps, collectives.all_reduce_sum(losses_S.clone()).tolist())
    with log.epoch(meter) as show:
        for step, (features_BC, labels_B) in enumerate(source.training(epoch, meter, ending, done), done):
            losses = probe.step(features_BC, labels_B, source.images_of(step))
            losses_S = losses_S + losses
            meter.update({"loss": losses[probe.best]})
            show(lr=probe.lrs[probe.best])
    meter.stop()
    means = (collectives.all_reduce_sum(losses_S) / (source.steps * collectives.get_world_size())).tolist()
    diverged = [setting for setting, mean in zip(probe.settings, means) if not math.isfinite(mean)]
    if len(diverged) == len(means):
        raise FloatingPointError(f"the loss is not finite in epoch {epoch}; lower --lr {[s.lr for s in diverged]}")
    for setting in diverged:
        logger.warning("the classifier %s has diverged in epoch %d: its loss is not finite", setting.name, epoch)
    return means


@torch.no_grad()
def validate(probe: Probe, source: FeatureSource) -> list[Score]:
    """Score every classifier on every validation image once, over all processes.

    A classifier whose logits are not finite is wrong everywhere.
    """
    sums_S3 = torch.zeros(len(probe.settings), 3, dtype=torch.float64)
    images = 0
    for features_BC, labels_B in source.validation():
        images += len(labels_B)
        for row, logits_BK in enumerate(probe.classifiers(features_BC)):
            ranking = logits_BK.topk(min(5, logits_BK.shape[1])).indices
            correct = (ranking == labels_B[:, None]) & logits_BK.isfinite().all(dim=1, keepdim=True)
            loss = F.cross_entropy(logits_BK, labels_B, reduction="sum")
            sums_S3[row] += torch.stack([loss, correct[:, 0].sum(), correct.sum()]).cpu()
    parts = collectives.all_gather_objects((images, sums_S3))
    total = sum(part[0] for part in parts)
    assert total == source.validation_images, (total, source.validation_images)
    means_S3 = torch.stack([part[1] for part in parts]).sum(dim=0) / total
    return [Score(loss, 100 * top1, 100 * top5) for loss, top1, top5 in means_S3.tolist()]


# --------------------------------------------------------------------------- files


class SavedClassifier(NamedTuple):
    """One trained linear layer, as a file holds it."""

    weight_KC: Tensor
    bias_K: Tensor
    classes: Sequence[str]  # names of its outputs; empty where the file does not say


def load_classifier(path: Path, channels_alternate: int = 0) -> SavedClassifier:
    """Read the (best) classifier of a `checkpoint.pth.tar`, or a published file of linear weights.

    Args:
        channels_alternate: of a file whose inputs alternate between so many channels of a token and those of the mean patch, as
            DINO's do; they come back one after the other. 0: they are so already.

    Raises:
        UsageError: see `checkpoint.load_file`; no linear layer in the file, or one of other shapes.
    """
    content = serialization.load_file(path)
    state = content.get("state_dict", content)
    if isinstance(state, dict):
        state = {str(name).removeprefix(loading.PREFIX): tensor for name, tensor in state.items()}
    weight, bias = (state.get(f"linear.{name}") if isinstance(state, dict) else None for name in ("weight", "bias"))
    if not isinstance(weight, Tensor) or not isinstance(bias, Tensor) or weight.shape[:1] != bias.shape:
        raise UsageError(f"'{path}' holds no linear classifier (linear.weight and linear.bias under state_dict)")
    if channels_alternate:
        if weight.shape[1] != 2 * channels_alternate:
            raise UsageError(
                f"the classifier of '{path}' takes {weight.shape[1]} features, not {channels_alternate} of a token and as "
                "many of the mean patch; leave --linear_order dino out"
            )
        weight = weight.unflatten(1, (channels_alternate, 2)).transpose(1, 2).flatten(1)
    return SavedClassifier(weight.float(), bias.float(), tuple(content.get("classes", ())))


def json_number(value: float) -> float | None:
    """None in place of what JSON cannot hold."""
    return value if math.isfinite(value) else None
