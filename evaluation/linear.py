"""Linear classifiers on frozen features, trained in parallel on the same batches: model, optimizer, training and checkpoints.

Shapes: B images of a batch, C channels of a feature, K classes, S classifiers.
Origin: the linear evaluation of DINO (Caron et al., ICCV 2021) section 4.1; keys of checkpoints follow microsoft/esvit.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from yacs.config import CfgNode

import data
from checkpoints import layouts, loading, serialization
from distributed import collectives
from evaluation.confusion import NONE, checked_cells, gather_confusion
from evaluation.feature_loaders import FeatureLoader
from evaluation.features import check_blocks, data_identity
from models import Backbone
from training import checkpointing, optim, restore
from training.checkpointing import RunPosition, StopRequest
from training.run_log import EpochMeter, RunLog
from utils import UsageError, logger

CHECKPOINT = "checkpoint.pth.tar"  # the published name
PROTOCOLS = {
    "standard": "published protocol (random resized crops)",
    "strong": "strong augmentation (RandAugment and erasing, as UDI was scored; NOT comparable with random resized crops alone)",
    "cached": "cached features of un-augmented images (NOT the published protocol)",
}


def describe_protocol(args: argparse.Namespace) -> str:
    """Return the entry of `PROTOCOLS` that --cache_features and --train_aug select."""
    return PROTOCOLS["cached" if args.cache_features else args.train_aug]


class Setting(NamedTuple):
    """Hyperparameters of one classifier."""

    lr: float  # for 256 images a step
    n_last_blocks: int

    @property
    def name(self) -> str:
        """Key in checkpoints and logs."""
        return f"lr{self.lr}_n{self.n_last_blocks}"


class Score(NamedTuple):
    """Mean loss, and accuracies in percent; for K < 5 classes `top5` is top-K."""

    loss: float
    top1: float
    top5: float
    confusion_P3: Tensor  # see `evaluation.confusion`


# --------------------------------------------------------------------------- classifiers


def probe_width(backbone: Backbone, n: int, avgpool: bool) -> int:
    """Return the width of `forward_return_n_last_blocks(images, n, avgpool)`, which is the tail of the features of a larger n."""
    widths = [width for width, depth in zip(backbone.stage_dims, backbone.stage_depths) for _ in range(depth)]
    appended = backbone.num_features if avgpool and backbone.num_cls_tokens else 0
    return sum(widths[-n:]) * len(backbone.view_tokens) + appended


class Classifier(nn.Module):
    """Linear layer on the last `width` entries of a feature vector."""

    def __init__(self, width: int, num_labels: int, seed: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, num_labels)
        with torch.no_grad():
            self.linear.weight.normal_(std=0.01, generator=torch.Generator().manual_seed(seed))
            self.linear.bias.zero_()

    def forward(self, features_BC: Tensor) -> Tensor:
        """Map features (B, C) to logits (B, K)."""
        return self.linear(features_BC[:, -self.linear.in_features :])


class Classifiers(nn.Module):
    """Independent classifiers on the same features, each initialized as if it were the only one."""

    def __init__(self, widths: list[int], num_labels: int, seed: int) -> None:
        super().__init__()
        self.each = nn.ModuleList(Classifier(width, num_labels, seed) for width in widths)

    def forward(self, features_BC: Tensor) -> list[Tensor]:
        """Map features (B, C) to the logits (B, K) of each classifier."""
        return [classifier(features_BC) for classifier in self.each]


class Probe:
    """The classifiers of a run with their optimizer, schedule and scores.

    Args:
        settings, widths: hyperparameters and number of features of each classifier.
        num_labels: outputs.
        batch: images of a step over all processes.
        epochs: length of the cosine schedule.
        lr_min: learning rate at its end, not scaled with the batch.
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
        self.loss_sums = [0.0] * len(settings)  # over the finished steps of the current epoch
        self.table: list[dict[str, Any]] = [
            {**setting._asdict(), "best_acc1": None, "best_acc5": None, "best_epoch": None} for setting in settings
        ]
        self.confusions: list[Tensor | None] = [None] * len(settings)  # of the best epochs

    @property
    def lrs(self) -> list[float]:
        """Current learning rate of each classifier."""
        return [group["lr"] for group in self.optimizer.param_groups]

    @property
    def best(self) -> int:
        """Index of the classifier with the best validation accuracy so far; the first one of equals."""
        return max(range(len(self.table)), key=self._accuracy)

    def _accuracy(self, row: int) -> float:
        best = self.table[row]["best_acc1"]
        return -1.0 if best is None else best

    def step(self, features_BC: Tensor, labels_B: Tensor, images: int) -> Tensor:
        """Update every classifier by the mean loss over the `images` of all processes; this process has B of them, maybe none.

        Returns:
            (S,) losses, scaled such that their mean over processes is the mean over images.
        """
        share = images / collectives.get_world_size()
        logits_SBK = self.wrapped(features_BC)
        losses_S = torch.stack([F.cross_entropy(logits, labels_B, reduction="sum") / share for logits in logits_SBK])
        self.optimizer.zero_grad()
        losses_S.sum().backward()
        self.optimizer.step()
        return losses_S.detach()

    def record(self, epoch: int, scores: list[Score]) -> None:
        """Update the table with the scores of a validation."""
        for number, (row, score) in enumerate(zip(self.table, scores)):
            row |= {"last_acc1": score.top1, "last_acc5": score.top5, "last_loss": json_number(score.loss)}
            if row["best_acc1"] is None or score.top1 > row["best_acc1"]:
                row |= {"best_acc1": score.top1, "best_acc5": score.top5, "best_epoch": epoch}
                self.confusions[number] = score.confusion_P3

    def state_dict(self, epoch: int) -> dict[str, Any]:
        """Return the content of a checkpoint: the published keys for the best classifier, and the weights of all of several.

        Weights of diverged classifiers are not saved; these stay diverged when the run is resumed.

        Raises:
            FloatingPointError: all classifiers have diverged.
        """
        weights = [classifier.state_dict() for classifier in self.classifiers.each]
        finite = [row for row, state in enumerate(weights) if not any(serialization.nonfinite(state))]
        if not finite:
            raise FloatingPointError("no classifier has finite weights, so no checkpoint is written; lower --lr")
        kept = self.best if self.best in finite else max(finite, key=self._accuracy)
        state = {
            "epoch": epoch + 1,
            "state_dict": loading.add_module_prefix(weights[kept]),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "best_acc": self.table[kept]["best_acc1"] or 0.0,
            "table": self.table,
            "confusions": self.confusions,
        }
        if len(weights) > 1:
            state["classifiers"] = {self.settings[row].name: weights[row] for row in finite}
            state["diverged"] = [setting.name for row, setting in enumerate(self.settings) if row not in finite]
        return state

    def load_state_dict(self, content: dict[str, Any], path: Path, *, run: Mapping[str, Any] | None = None) -> None:
        """Restore what `state_dict` returned, or a published checkpoint of one classifier, read from `path`.

        Args:
            content: Content of the file.
            path: Its path, for messages.
            run: What identifies this run, to be compared with that of the file.

        Raises:
            UsageError: Keys are missing, it is of another run or other classifiers, or a value has another type.
        """
        source = f"checkpoint '{path}'"
        if run is not None:
            with restore.reading("run", path):
                checkpointing.check_same_run(content.get("run"), run, source)
        absent = {"epoch", "state_dict", "optimizer", "scheduler", "best_acc"} - content.keys()
        if absent:
            raise UsageError(
                f"{source} cannot be resumed: it has no {', '.join(sorted(absent))}; choose another --output_dir"
            )
        for flag, name in (("--epochs", "T_max"), ("--lr_min", "eta_min")):
            started_with, now = content["scheduler"].get(name), getattr(self.scheduler, name)
            if started_with not in (None, now):
                raise UsageError(
                    f"{source} was started with {flag} {started_with}, not {now}; pass {flag} {started_with}, or choose "
                    "another --output_dir"
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
            raise UsageError(f"{source} holds other classifiers ({reason}); choose another --output_dir") from None
        optim.load_own_moments(self.optimizer, content["optimizer"], source)
        with restore.reading("scheduler", path):
            self._load_schedule(content["scheduler"], content["optimizer"]["param_groups"])
        if content.get("in_epoch"):
            with restore.reading("in_epoch", path):
                losses = content["in_epoch"]["losses"]
                self.loss_sums = [float(loss) for _, loss in zip(self.settings, losses, strict=True)]
        if "table" not in content:
            self.table[0]["best_acc1"] = float(content["best_acc"])
            return
        with restore.reading("table", path):
            for mine, row in zip(self.table, content["table"], strict=True):
                if any(not isinstance(row[key], int | float | None) for key in mine):
                    raise TypeError("a score is not a number")
            self.table = content["table"]
        with restore.reading("confusions", path):
            saved = content.get("confusions", self.confusions)
            self.confusions = [checked_cells(cells) for _, cells in zip(self.settings, saved, strict=True)]

    def _load_schedule(self, saved: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
        """Restore the epoch and learning rates of a saved schedule and of the parameter groups of its optimizer.

        Raises:
            TypeError, ValueError, KeyError: values of other types, or for another number of classifiers.
        """
        own = self.scheduler.state_dict()
        rates = {key: [float(rate) for rate in saved[key]] for key in ("base_lrs", "_last_lr")}
        if any(len(values) != len(groups) for values in rates.values()):
            raise ValueError(f"learning rates of {len(rates['base_lrs'])} classifiers, moments of {len(groups)}")
        steps = {key: int(saved[key]) for key in ("last_epoch", "_step_count") if key in saved}
        self.scheduler.load_state_dict(own | rates | steps)
        for group, found in zip(self.optimizer.param_groups, groups):
            group["lr"] = float(found["lr"])


def build_probe(args: argparse.Namespace, backbone: Backbone, num_labels: int, device: torch.device) -> Probe:
    """Build a classifier for every pair of --lr and --n_last_blocks.

    Raises:
        UsageError: the network has fewer blocks than --n_last_blocks.
    """
    check_blocks(backbone, args.n_last_blocks, args.avgpool_patchtokens)
    settings = [Setting(lr, n) for n in args.n_last_blocks for lr in args.lr]
    widths = [probe_width(backbone, setting.n_last_blocks, args.avgpool_patchtokens) for setting in settings]
    batch = checkpointing.images_per_step(args)
    return Probe(settings, widths, num_labels, batch, args.epochs, device, args.seed, args.lr_min)


# --------------------------------------------------------------------------- training


def network_digest(backbone: Backbone, config: CfgNode) -> str:
    """Return a digest of the weights and the config of a network."""
    digest = hashlib.sha256(backbone.resolve_config(config).dump().encode())
    weights = {name: t for name, t in backbone.state_dict().items() if not name.endswith(layouts.DERIVED)}
    for name, tensor in weights.items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def run_identity(
    args: argparse.Namespace,
    config: CfgNode,
    backbone: Backbone,
    datasets: tuple[data.ImageDataset, data.ImageDataset],
    precision: str,
) -> dict[str, Any]:
    """Return everything that affects the scores of a run, by flag; a checkpoint with another identity is not resumed."""
    flags = ["arch", "token", "train_aug", "lr", "lr_min", "n_last_blocks", "avgpool_patchtokens", "epochs"]
    flags += ["cache_features", "image_size", "crop_ratio", "seed", "num_labels"]
    return {f"--{name}": getattr(args, name) for name in flags} | {
        "--batch_size_per_gpu times processes": checkpointing.images_per_step(args),
        "--precision": precision,
        **data_identity(*datasets),
        "digest of weights and config": network_digest(backbone, config),
    }


def train(
    probe: Probe,
    loader: FeatureLoader,
    start: RunPosition,
    args: argparse.Namespace,
    log: RunLog,
    ending: StopRequest,
    about_run: dict[str, Any],
) -> None:
    """Train from `start` to the last epoch; save every epoch, and validate every --val_freq epochs and after the last one.

    Args:
        about_run: `run` (see `run_identity`), `args` and `classes`, saved in each checkpoint.
    """
    path = Path(args.output_dir) / CHECKPOINT
    batch = checkpointing.images_per_step(args)

    def save_within(meter: EpochMeter, steps: int, sums: list[float]) -> str:
        state = probe.state_dict(meter.epoch - 1) | about_run
        state["in_epoch"] = checkpointing.in_epoch(steps, meter.state(), args) | {"losses": sums}
        return checkpointing.write(state, path) if collectives.is_main_process() else ""

    for epoch in range(start.epoch, args.epochs):
        meter = EpochMeter(epoch, loader.steps, images_per_step=batch)
        done = start.steps if epoch == start.epoch else 0
        if done:
            meter.resume(start.meter, done)
        lrs = probe.lrs
        losses = train_epoch(probe, loader, epoch, meter, log, ending, partial(save_within, meter), done)
        probe.scheduler.step()
        rows = [{"train_loss": json_number(loss), "train_lr": lr} for loss, lr in zip(losses, lrs)]
        if epoch % args.val_freq == 0 or epoch == args.epochs - 1:
            scores = validate(probe, loader)
            probe.record(epoch, scores)
            for row, score in zip(rows, scores):
                row |= {"test_loss": json_number(score.loss), "test_acc1": score.top1, "test_acc5": score.top5}
        every = {"classifiers": {s.name: row for s, row in zip(probe.settings, rows)}} if len(rows) > 1 else {}
        about = {} if describe_protocol(args) == PROTOCOLS["standard"] else {"protocol": describe_protocol(args)}
        if args.num_labels < 5:
            about["acc5_is"] = f"top{args.num_labels}"
        log.finish_epoch(meter, **rows[probe.best], **every, **about)
        state = probe.state_dict(epoch) | about_run
        if collectives.is_main_process():
            ending.failure = checkpointing.write(state, path)


def train_epoch(
    probe: Probe,
    loader: FeatureLoader,
    epoch: int,
    meter: EpochMeter,
    log: RunLog,
    ending: StopRequest,
    save: Callable[[int, list[float]], str],
    done: int = 0,
) -> list[float]:
    """Train for one epoch and return the mean loss of each classifier over steps and processes.

    Args:
        save: saves the run within the epoch, given the number of steps and the sums of losses.
        done: steps that are done already, whose sums of losses are `probe.loss_sums`.

    Raises:
        FloatingPointError: no classifier has a finite loss, on all processes at once.
        Stopped: a process received a signal.
    """
    losses_S: Any = 0.0
    if done:
        device = next(probe.wrapped.parameters()).device
        losses_S = torch.tensor(probe.loss_sums, device=device) / collectives.get_world_size()
    ending.save_within = lambda steps: save(steps, collectives.all_reduce_sum(losses_S.clone()).tolist())
    with log.epoch(meter) as show:
        for step, (features_BC, labels_B) in enumerate(loader.training(epoch, meter, ending, done), done):
            losses = probe.step(features_BC, labels_B, loader.images_in_step(step))
            losses_S = losses_S + losses
            meter.update({"loss": losses[probe.best]})
            show(lr=probe.lrs[probe.best])
    meter.stop()
    means = (collectives.all_reduce_sum(losses_S) / (loader.steps * collectives.get_world_size())).tolist()
    diverged = [setting for setting, mean in zip(probe.settings, means) if not math.isfinite(mean)]
    if len(diverged) == len(means):
        raise FloatingPointError(f"the loss is not finite in epoch {epoch}; lower --lr {[s.lr for s in diverged]}")
    for setting in diverged:
        logger.warning("classifier %s has diverged in epoch %d: its loss is not finite", setting.name, epoch)
    return means


@torch.no_grad()
def validate(probe: Probe, loader: FeatureLoader) -> list[Score]:
    """Score every classifier on all validation images over all processes; non-finite logits count as wrong."""
    sums_S3 = torch.zeros(len(probe.settings), 3, dtype=torch.float64)
    labels = [torch.zeros(1 + len(probe.settings), 0, dtype=torch.long)]  # the true and the predicted ones
    images = 0
    for features_BC, labels_B in loader.validation():
        images += len(labels_B)
        labels_of_batch = [labels_B]
        for row, logits_BK in enumerate(probe.classifiers(features_BC)):
            ranking = logits_BK.topk(min(5, logits_BK.shape[1])).indices
            ranking = ranking.where(logits_BK.isfinite().all(dim=1, keepdim=True), NONE)
            correct = ranking == labels_B[:, None]
            labels_of_batch.append(ranking[:, 0])
            loss = F.cross_entropy(logits_BK, labels_B, reduction="sum")
            sums_S3[row] += torch.stack([loss, correct[:, 0].sum(), correct.sum()]).cpu()
        labels.append(torch.stack(labels_of_batch).cpu())
    parts = collectives.all_gather_objects((images, sums_S3))
    total = sum(part[0] for part in parts)
    assert total == loader.validation_images, (total, loader.validation_images)
    means_S3 = torch.stack([part[1] for part in parts]).sum(dim=0) / total
    true_N, *predicted_SN = torch.cat(labels, dim=1)
    confusions = [gather_confusion(true_N, predicted_N) for predicted_N in predicted_SN]
    return [
        Score(loss, 100 * top1, 100 * top5, cells) for (loss, top1, top5), cells in zip(means_S3.tolist(), confusions)
    ]


# --------------------------------------------------------------------------- files


class SavedClassifier(NamedTuple):
    """A trained linear layer."""

    weight_KC: Tensor
    bias_K: Tensor
    classes: Sequence[str]  # names of the outputs; empty if the file has none


def load_classifier(path: Path, channels_alternate: int = 0) -> SavedClassifier:
    """Load the (best) classifier of a `checkpoint.pth.tar`, or a published file of linear weights.

    Args:
        channels_alternate: number of channels if the inputs alternate between channels of the class token and of the mean patch,
            as in DINO's files; they are reordered to token, then mean patch. 0 for inputs in that order.

    Raises:
        UsageError: the file cannot be read, or has no linear layer of such shapes.
    """
    content = serialization.load_file(path)
    state = content.get("state_dict", content)
    if isinstance(state, dict):
        state = {str(name).removeprefix(loading.PREFIX): tensor for name, tensor in state.items()}
    weight, bias = (state.get(f"linear.{name}") if isinstance(state, dict) else None for name in ("weight", "bias"))
    if not isinstance(weight, Tensor) or not isinstance(bias, Tensor) or weight.shape[:1] != bias.shape:
        raise UsageError(
            f"'{path}' has no linear classifier (linear.weight and linear.bias in state_dict); check --linear_weights"
        )
    if channels_alternate:
        if weight.shape[1] != 2 * channels_alternate:
            raise UsageError(
                f"the classifier in '{path}' takes {weight.shape[1]} features, not {channels_alternate} of a token and as "
                "many of the mean patch; leave out --linear_order dino"
            )
        weight = weight.unflatten(1, (channels_alternate, 2)).transpose(1, 2).flatten(1)
    return SavedClassifier(weight.float(), bias.float(), tuple(content.get("classes", ())))


def json_number(value: float) -> float | None:
    """Return None for values that JSON cannot represent."""
    return value if math.isfinite(value) else None
