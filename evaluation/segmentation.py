"""Linear segmentation of frozen region features: classifiers, training, sliding windows and mean intersection over union.

A classifier is a normalization over the batch (BatchNorm without parameters, which the convolution would absorb) and a 1x1
convolution; its logits are resized bilinearly to the mask. Several are trained on the same batches, each by AdamW at a learning
rate that falls linearly to 0.

Shapes: B images, C channels, K classes, S classifiers, N windows, h x w regions, H x W pixels.
Origin: the linear setup of DINOv2 (Oquab et al., 2023) section 7.4; sliding windows and scores as in mmsegmentation.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import data
from data.segmentation import VOID, Size
from data.transforms.geometry import CropBox
from distributed import collectives
from evaluation.dense_features import DenseFeatures, upsampled
from evaluation.feature_loaders import FeatureLoader
from evaluation.features import NETWORK, readable_batches
from training import checkpointing, optim, restore
from training.checkpointing import RunPosition, StopRequest
from training.run_log import EpochMeter, RunLog, tracked
from utils import UsageError

CHECKPOINT = "segmentation.pth"
MOMENTUM = 0.1  # of running statistics, as in torch
LARGEST_SCORES = 2**25  # numbers of pixels times classes held at once

Predictor = Callable[[Tensor], list[Tensor]]  # features (B, C, h, w) -> scores (B, K, h, w) of each row of the results


# --------------------------------------------------------------------------- classifiers


class Setting(NamedTuple):
    """Features and learning rate of one classifier."""

    features: str
    lr: float

    @property
    def name(self) -> str:
        """Name in checkpoints, logs and results."""
        return f"{self.features}, lr {self.lr:g}"


class SyncedNorm(nn.Module):
    """BatchNorm without weight and bias for inputs without gradients, over the batches of all processes."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    @torch.no_grad()
    def forward(self, x_BChw: Tensor) -> Tensor:
        """Normalize each channel, in training by the statistics of the batch."""
        if not self.training:
            return F.batch_norm(x_BChw, self.running_mean, self.running_var, eps=self.eps)
        values = collectives.all_reduce_sum(x_BChw.new_tensor(float(x_BChw.numel() // x_BChw.shape[1])))
        mean_C = collectives.all_reduce_sum(x_BChw.sum(dim=(0, 2, 3))) / values
        centered_BChw = x_BChw - mean_C[:, None, None]
        var_C = collectives.all_reduce_sum(centered_BChw.square().sum(dim=(0, 2, 3))) / values
        self.running_mean.lerp_(mean_C, MOMENTUM)
        self.running_var.lerp_(var_C * values / (values - 1).clamp_min(1), MOMENTUM)
        return centered_BChw * (var_C + self.eps).rsqrt()[:, None, None]


class Classifiers(nn.Module):
    """Independent 1x1 convolutions on the same normalized features, each initialized as if it were the only one."""

    def __init__(self, settings: Sequence[Setting], features: DenseFeatures, classes: int, seed: int) -> None:
        super().__init__()
        self.columns = [features.columns[setting.features] for setting in settings]
        self.norm = SyncedNorm(features.channels)
        self.each = nn.ModuleList(_convolution(c.stop - c.start, classes, seed) for c in self.columns)

    def forward(self, maps_BChw: Tensor) -> list[Tensor]:
        """Map features to the logits (B, K, h, w) of each classifier."""
        x_BChw = self.norm(maps_BChw)
        return [convolution(x_BChw[:, columns]) for convolution, columns in zip(self.each, self.columns)]


def _convolution(channels: int, classes: int, seed: int) -> nn.Conv2d:
    convolution = nn.Conv2d(channels, classes, kernel_size=1)
    nn.init.normal_(convolution.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    assert convolution.bias is not None
    nn.init.zeros_(convolution.bias)
    return convolution


class Probe:
    """The classifiers of a run with their optimizer."""

    def __init__(self, settings: Sequence[Setting], classifiers: Classifiers, weight_decay: float) -> None:
        self.settings, self.classifiers = list(settings), classifiers
        groups = [
            {
                "params": list(convolution.parameters()),
                "param_names": [f"{setting.name}.{name}" for name, _ in convolution.named_parameters()],
            }
            for setting, convolution in zip(settings, classifiers.each)
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=weight_decay)

    def step(self, progress: float, maps_BChw: Tensor, masks_BHW: Tensor) -> Tensor:
        """Make a step on the images of all processes; this process has B of them, maybe none.

        Args:
            progress: finished part of the run, 0..1, for the learning rates.

        Returns:
            (S,) mean losses over all pixels with a class.
        """
        for setting, group in zip(self.settings, self.optimizer.param_groups):
            group["lr"] = setting.lr * (1 - progress)
        masks_BHW = masks_BHW.long()
        pixels = collectives.all_reduce_sum((masks_BHW != VOID).sum()).clamp_min(1)
        losses_S = torch.stack([
            F.cross_entropy(upsampled(logits, masks_BHW.shape[1:]), masks_BHW, ignore_index=VOID, reduction="sum")
            for logits in self.classifiers.train()(maps_BChw)
        ]) / pixels  # fmt: skip
        self.optimizer.zero_grad()
        losses_S.sum().backward()
        for parameter in self.classifiers.parameters():
            assert parameter.grad is not None
            collectives.all_reduce_sum(parameter.grad)
        self.optimizer.step()
        return collectives.all_reduce_sum(losses_S.detach())

    @torch.no_grad()
    def predict(self, maps_BChw: Tensor) -> list[Tensor]:
        """Return the logits of each classifier."""
        return self.classifiers.eval()(maps_BChw)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of classifiers and optimizer."""
        return {"state_dict": self.classifiers.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, content: dict[str, Any], path: Path, *, run: Mapping[str, Any]) -> None:
        """Restore the state that a checkpoint holds.

        Args:
            content: Content of the file.
            path: Its path, for messages.
            run: What identifies this run, to be compared with that of the file.

        Raises:
            UsageError: Keys are missing, or it is of another run.
        """
        source = f"checkpoint '{path}'"
        absent = {"epoch", "state_dict", "optimizer", "run"} - content.keys()
        if absent:
            raise UsageError(
                f"{source} cannot be resumed: it has no {', '.join(sorted(absent))}; choose another --output_dir"
            )
        with restore.reading("run", path):
            checkpointing.check_same_run(content["run"], run, source)
        with restore.reading("state_dict", path):
            self.classifiers.load_state_dict(content["state_dict"])
        optim.load_own_moments(self.optimizer, content["optimizer"], source)


# --------------------------------------------------------------------------- training


def train(
    probe: Probe,
    loader: FeatureLoader,
    start: RunPosition,
    args: argparse.Namespace,
    log: RunLog,
    ending: StopRequest,
    about_run: dict[str, Any],
    validate: Callable[[], dict[str, SegmentationScore]],
) -> None:
    """Train from `start` to the last epoch; save every epoch, and validate every --val_freq epochs but the last.

    Args:
        about_run: `run`, `args` and `classes`, saved in each checkpoint.
        validate: scores the classifiers, by name.
    """
    path = Path(args.output_dir) / CHECKPOINT

    def save(epoch: int, meter: EpochMeter, steps: int = 0) -> str:
        state = {"epoch": epoch, **probe.state_dict(), **about_run}
        if steps:
            state["in_epoch"] = checkpointing.in_epoch(steps, meter.state(), args)
        return checkpointing.write(state, path) if collectives.is_main_process() else ""

    for epoch in range(start.epoch, args.epochs):
        meter = EpochMeter(epoch, loader.steps, images_per_step=checkpointing.images_per_step(args))
        done = start.steps if epoch == start.epoch else 0
        if done:
            meter.resume(start.meter, done)
        ending.save_within = partial(save, epoch, meter)
        train_epoch(probe, loader, epoch, meter, log, ending, done)
        scores = {}
        if args.val_freq and (epoch + 1) % args.val_freq == 0 and epoch + 1 < args.epochs:
            scores = validate()
        test = {name: score.summary() for name, score in scores.items()}
        own = [setting.name for setting in probe.settings if setting.features == NETWORK]
        best = {"test_miou": max(scores[name].miou for name in own)} if scores else {}
        log.finish_epoch(meter, **best, **({"test": test} if test else {}))
        ending.failure = save(epoch + 1, meter)


def train_epoch(
    probe: Probe, loader: FeatureLoader, epoch: int, meter: EpochMeter, log: RunLog, ending: StopRequest, done: int = 0
) -> None:
    """Train for one epoch, without its first `done` steps.

    Raises:
        FloatingPointError: a loss is not finite, on all processes at once.
        Stopped: a process received a signal.
    """
    names = ["loss", *(f"loss/{setting.name}" for setting in probe.settings[1:])]  # of the first one, and of the others
    with log.epoch(meter) as show:
        for step, (maps_BChw, masks_BHW) in enumerate(loader.training(epoch, meter, ending, done), done):
            progress = (epoch + step / loader.steps) / log.epochs
            losses_S = probe.step(progress, maps_BChw, masks_BHW)
            meter.update(dict(zip(names, losses_S.unbind())))
            show(lr=probe.optimizer.param_groups[0]["lr"])
    meter.stop()
    means = meter.means()
    for setting, name in zip(probe.settings, names):
        if not math.isfinite(means[name] or 0.0):
            raise FloatingPointError(
                f"the loss of '{setting.name}' is not finite in epoch {epoch}; lower --lr, or check the weights"
            )


# --------------------------------------------------------------------------- sliding windows


class Windows(NamedTuple):
    """Windows in which large images are segmented."""

    side: int  # in pixels, a multiple of `DenseFeatures.multiple`
    stride: int  # at most `side`
    multiple: int  # of the sides of smaller images, which are padded


def window_boxes(size: Size, windows: Windows) -> list[CropBox]:
    """Return windows that cover an image of `size`; the last ones of a row and column end at its border."""

    def starts(length: int) -> list[int]:
        return [*range(0, length - windows.side, windows.stride), max(0, length - windows.side)]

    height, width = (min(side, windows.side) for side in size)
    return [CropBox(top, left, height, width) for top, left in itertools.product(starts(size[0]), starts(size[1]))]


def segment(
    features: DenseFeatures, predict: Predictor, image_CHW: Tensor, windows: Windows, batch_size: int, size: Size
) -> Iterator[Tensor]:
    """Yield the classes of an image by each row of `predict`, resized to `size`.

    An image smaller than a window is padded with the mean color to a multiple of `windows.multiple`.
    """
    height, width = image_CHW.shape[1:]
    below, right = (-side % windows.multiple if side < windows.side else 0 for side in (height, width))
    image_CHW = F.pad(image_CHW, (0, right, 0, below))
    boxes = window_boxes((height + below, width + right), windows)
    views = [image_CHW[:, box.top : box.top + box.height, box.left : box.left + box.width] for box in boxes]
    parts = [
        predict(features(torch.stack(views[first : first + batch_size]))) for first in range(0, len(views), batch_size)
    ]
    for scores in zip(*parts):
        yield classify(torch.cat(scores), boxes, (height, width), size)


def classify(scores_NKhw: Tensor, boxes: Sequence[CropBox], visible: Size, size: Size) -> Tensor:
    """Return the class of each pixel: the maximum of the blended scores, resized to `size`.

    Few classes at a time, as the scores of all of them for a large image do not fit into memory.

    Args:
        visible: height and width of the image without its padding.
    """
    pixels = max(size[0] * size[1], visible[0] * visible[1])
    best_HW = scores_NKhw.new_full(size, -math.inf)
    found_HW = torch.zeros(size, dtype=torch.long, device=scores_NKhw.device)
    first = 0
    for part_NKhw in scores_NKhw.split(max(1, LARGEST_SCORES // pixels), dim=1):
        blended_KHW = blend(part_NKhw, boxes)[:, : visible[0], : visible[1]]
        value_HW, class_HW = upsampled(blended_KHW[None], size)[0].max(dim=0)
        found_HW = torch.where(value_HW > best_HW, class_HW + first, found_HW)
        best_HW = torch.maximum(value_HW, best_HW)
        first += part_NKhw.shape[1]
    return found_HW


def blend(scores_NKhw: Tensor, boxes: Sequence[CropBox]) -> Tensor:
    """Return the mean over windows of their scores, resized to pixels."""
    height, width = boxes[-1].top + boxes[-1].height, boxes[-1].left + boxes[-1].width
    sums_KHW = scores_NKhw.new_zeros(scores_NKhw.shape[1], height, width)
    counts_HW = scores_NKhw.new_zeros(height, width)
    for scores_Khw, box in zip(scores_NKhw, boxes):
        rows, columns = slice(box.top, box.top + box.height), slice(box.left, box.left + box.width)
        sums_KHW[:, rows, columns] += upsampled(scores_Khw[None], (box.height, box.width))[0]
        counts_HW[rows, columns] += 1
    return sums_KHW / counts_HW


# --------------------------------------------------------------------------- scores


class SegmentationScore(NamedTuple):
    """Scores in percent, and the confusion matrix of all pixels (see `evaluation.confusion`).

    `miou` is the mean over classes that occur in a mask or a prediction, `class_accuracy` over those that occur in a mask;
    `per_class` is the intersection over union of each class, None for a class that occurs in neither.
    """

    miou: float
    pixel_accuracy: float
    class_accuracy: float
    per_class: list[float | None]
    confusion_P3: Tensor

    def summary(self) -> dict[str, float]:
        """Return the scores over all classes."""
        return {"miou": self.miou, "pixel_accuracy": self.pixel_accuracy, "class_accuracy": self.class_accuracy}


def confusion_matrix(found_HW: Tensor, mask_HW: Tensor, classes: int) -> Tensor:
    """Return the number of pixels (K, K) by true class and found class, without void."""
    known = mask_HW != VOID
    pairs = mask_HW[known].long() * classes + found_HW[known]
    return pairs.bincount(minlength=classes**2).view(classes, classes)


def score_of(confusion_KK: Tensor) -> SegmentationScore:
    """Return the scores of a confusion matrix with at least one pixel."""
    hits_K, truth_K, found_K = confusion_KK.diag().double(), confusion_KK.sum(dim=1), confusion_KK.sum(dim=0)
    union_K = truth_K + found_K - hits_K
    iou_K, accuracy_K = 100 * hits_K / union_K, 100 * hits_K / truth_K  # NaN for absent classes
    return SegmentationScore(
        iou_K.nanmean().item(),
        (100 * hits_K.sum() / truth_K.sum()).item(),
        accuracy_K.nanmean().item(),
        [None if math.isnan(iou) else iou for iou in iou_K.tolist()],
        torch.cat([confusion_KK.nonzero(), confusion_KK[confusion_KK > 0][:, None]], dim=1).cpu(),
    )


@torch.no_grad()
def evaluate(
    features: DenseFeatures,
    predict: Predictor,
    rows: Sequence[str],
    loader: DataLoader[data.Batch],
    classes: int,
    windows: Windows,
    batch_size: int,
    device: torch.device,
) -> dict[str, SegmentationScore]:
    """Score each row of `predict` on all images over all processes, each mask at its own resolution.

    Args:
        rows: their names.
        loader: batches of one image.

    Raises:
        UsageError: an image or mask cannot be read.
    """
    confusions_SKK = torch.zeros(len(rows), classes, classes, dtype=torch.long, device=device)
    tally = data.FailureTally(len(loader.dataset))  # type: ignore[arg-type]
    with tracked(loader, "val") as batches:
        for batch in readable_batches(batches, tally, device):
            image_CHW, mask_HW = batch.views[0][0].to(device), batch.labels_B[0].to(device)
            size = mask_HW.shape[0], mask_HW.shape[1]
            for row, found_HW in enumerate(segment(features, predict, image_CHW, windows, batch_size, size)):
                confusions_SKK[row] += confusion_matrix(found_HW, mask_HW, classes)
    collectives.all_reduce_sum(confusions_SKK)
    return {name: score_of(confusion_KK) for name, confusion_KK in zip(rows, confusions_SKK)}
