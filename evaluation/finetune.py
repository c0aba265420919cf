"""Supervised fine-tuning of a backbone: learning rates by depth, one update, one epoch, validation, saving and resuming.

What timm has comes from there: the parameter groups of layer-wise decay, mixup and cutmix, the losses, the cosine schedule and
the average of the weights. The command line is eval_finetune.py.

Shapes: B images, C channels, L classes.
Origin: layer-wise decay of BEiT (Bao et al., ICLR 2022) as used for Swin by SimMIM (Xie et al., CVPR 2022); recipe of DeiT
(Touvron et al., ICML 2021); all through timm.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import param_groups_layer_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import utils
from checkpoints import layouts, loading, serialization
from data.loader import Batch, FailureTally, in_groups, set_epoch
from distributed import collectives
from distributed.ddp import SYNC_BUFFERS
from models.base import HEADS, Backbone, batch_norms
from training import optim
from training.checkpointing import (
    RunPosition,
    StopRequest,
    check_same_run,
    in_epoch,
    newest_whole,
    position_of,
    write,
)
from training.restore import reading
from training.run_log import EpochMeter, RunLog
from utils import UsageError

CHECKPOINT = "checkpoint.pth"
BEST = "best.pth"
STATE = ("model", "optimizer", "epoch", "best", "finetuning")  # keys without which nothing is resumed


# --------------------------------------------------------------------------- learning rates by depth


def layer_depths(network: Backbone) -> dict[str, int]:
    """How deep each parameter lies: 0 before the first block, 1 .. n in the blocks, n + 1 after the last one (norm and heads).

    What leads from one stage to the next (merging, patch embedding) has the depth of the block before it.
    """
    number_of: dict[int, int] = {}  # id of a parameter -> its block, counted from 1
    blocks = [block for stage in range(len(network.stage_depths)) for block in network.stage_blocks(stage)]
    for number, block in enumerate(blocks, start=1):
        for part in [block] if isinstance(block, nn.Module) else list(block):
            number_of |= {id(parameter): number for parameter in part.parameters()}
    depths, passed = {}, 0
    for name, parameter in network.named_parameters():
        if name.startswith(HEADS):
            depths[name] = len(blocks) + 1
            continue
        passed = number_of.get(id(parameter), passed)
        after_all = passed == len(blocks) and id(parameter) not in number_of
        depths[name] = len(blocks) + 1 if after_all else passed
    return depths


class _ByDepth(nn.Module):
    """A network as timm's grouping asks for it: with its parameters' names, and a depth for each name."""

    def __init__(self, network: Backbone) -> None:
        super().__init__()
        self.network = network
        self.depths = {f"network.{name}": depth for name, depth in layer_depths(network).items()}

    def group_matcher(self, coarse: bool) -> Any:
        """From a name to its depth."""
        return self.depths.__getitem__


def param_groups(network: Backbone, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Groups whose `lr_scale` is layer_decay ** (deepest - depth); biases, norms and positions are without weight decay."""
    plain = [f"network.{name}" for name in network.no_weight_decay()]
    groups = param_groups_layer_decay(_ByDepth(network), weight_decay, plain, layer_decay=layer_decay)
    names = {parameter: name for name, parameter in network.named_parameters()}
    return [group | {"param_names": [names[parameter] for parameter in group["params"]]} for group in groups]


# --------------------------------------------------------------------------- the head


def projection_layers(path: str, key: str, token: int, count: int, width: int) -> list[nn.Module]:
    """The first `count` hidden layers of a checkpoint's projection head, each a linear layer and its GELU.

    Args:
        path, key: see `checkpoint.network_state`.
        token: place of the class token whose head is taken, where each has its own.
        width: channels of the features that go in.

    Raises:
        UsageError: no such head in the file, fewer hidden layers, layers with BatchNorm, or of another width.
    """
    tensors = layouts.network_state(serialization.load_file(path), key, path).tensors
    source = f"checkpoint '{path}'"
    mlp = f"head.{token}.mlp" if any(name.startswith(f"head.{token}.") for name in tensors) else "head.mlp"
    if f"{mlp}.1.weight" in tensors:
        raise UsageError(
            f"{source} has BatchNorm in its projection head, which is not kept; set --finetune_head_layer 0"
        )
    linear = sum(f"{mlp}.{2 * layer}.weight" in tensors for layer in range(len(tensors)))
    if count >= linear:
        has = utils.counted(linear - 1, "hidden layer") if linear else "none"
        raise UsageError(
            f"--finetune_head_layer {count} takes hidden layers of a projection head, {source} has {has}; lower it, or name a "
            "checkpoint of the pre-training"
        )
    layers: list[nn.Module] = []
    for layer in range(count):
        weight, bias = (tensors[f"{mlp}.{2 * layer}.{kind}"] for kind in ("weight", "bias"))
        if weight.shape[1] != width:
            raise UsageError(f"{source} has a projection head of width {weight.shape[1]}, not {width}; check --arch")
        layers += [nn.Linear(width, len(weight)), nn.GELU()]
        layers[-2].load_state_dict({"weight": weight, "bias": bias})
        width = len(weight)
    return layers


def linear_head(kept: list[nn.Module], width: int, classes: int, scale: float) -> nn.Module:
    """A new linear layer, behind those that are kept; its first weights are scaled, as BEiT does."""
    widths = [layer.out_features for layer in kept if isinstance(layer, nn.Linear)]
    linear = nn.Linear((widths or [width])[-1], classes)
    nn.init.trunc_normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    with torch.no_grad():
        linear.weight *= scale
    return nn.Sequential(*kept, linear) if kept else linear


# --------------------------------------------------------------------------- the average of the weights


class WeightAverage(ModelEmaV3):
    """timm's average of parameters and buffers, with each tensor taken once a step.

    A state dict names tensors that modules share (global and local projections of ViL) more than once; timm's own update
    would move these as often.
    """

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """Move every tensor by 1 - decay of the way to the model's."""
        pairs = zip(self.module.state_dict().values(), model.state_dict().values())
        each = list({average.data_ptr(): (average, own) for average, own in pairs if average.numel()}.values())
        moving = [pair for pair in each if pair[0].is_floating_point()]
        torch._foreach_lerp_([average for average, _ in moving], [own for _, own in moving], 1.0 - decay)
        for average, own in each:
            if not average.is_floating_point():
                average.copy_(own)


# --------------------------------------------------------------------------- the training


class Recipe(NamedTuple):
    """Everything of the command line that an update depends on."""

    epochs: int
    steps: int  # optimizer steps of an epoch
    lr: float  # of the head, after scaling with the batch
    min_lr: float
    warmup_epochs: int
    layer_decay: float
    weight_decay: float
    mixup: float
    cutmix: float
    smoothing: float
    clip_grad: float
    accum_iter: int
    ema_decay: float | None  # None: no average of the weights


class Accuracy(NamedTuple):
    """In percent; `top5` is of as many classes as there are when these are fewer."""

    top1: float
    top5: float


class FineTuner:
    """A network with its optimizer and all else that changes as it trains.

    Args:
        network: with a linear head, on `device`.
        recipe, classes: see there; classes of the head.
        precision: what the network computes in, `fp32`, `bf16` or `fp16`; losses are float32.
    """

    def __init__(self, network: Backbone, recipe: Recipe, classes: int, device: torch.device, precision: str) -> None:
        if collectives.is_distributed() and device.type == "cuda":
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
        self.network, self.recipe, self.classes = network, recipe, classes
        self.device, self.precision = device, precision
        self.optimizer = torch.optim.AdamW(param_groups(network, recipe.weight_decay, recipe.layer_decay), lr=recipe.lr)
        self.scheduler = CosineLRScheduler(
            self.optimizer,
            t_initial=max((recipe.epochs - recipe.warmup_epochs) * recipe.steps, 1),
            lr_min=recipe.min_lr,
            warmup_t=recipe.warmup_epochs * recipe.steps,
            warmup_prefix=True,
            t_in_epochs=False,
        )
        self.mixup = None
        if recipe.mixup > 0 or recipe.cutmix > 0:
            self.mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=classes)
            self.criterion: nn.Module = SoftTargetCrossEntropy()
        else:
            self.criterion = LabelSmoothingCrossEntropy(recipe.smoothing) if recipe.smoothing else nn.CrossEntropyLoss()
        self.ema = None if recipe.ema_decay is None else WeightAverage(network, recipe.ema_decay, use_warmup=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self.wrapped: nn.Module = network
        if collectives.is_distributed():
            buffers: dict[str, Any] = {SYNC_BUFFERS: bool(batch_norms(network))}
            self.wrapped = DistributedDataParallel(
                network, device_ids=[device.index] if device.type == "cuda" else None, **buffers
            )

    def networks(self) -> dict[str, Backbone]:
        """What is validated: the network, and the average of its weights where there is one."""
        return {"model": self.network} | ({} if self.ema is None else {"ema": self.ema.module})

    def step(self, batches: list[Batch], iteration: int) -> dict[str, float]:
        """One update on micro-batches that count as one batch; gives the loss, a mean over them and the processes.

        Raises:
            FloatingPointError: a loss that is not finite, on all processes at once and before any weight has changed.
        """
        self.scheduler.step_update(iteration)
        total = torch.zeros((), device=self.device)
        for i, batch in enumerate(batches):
            wait = isinstance(self.wrapped, DistributedDataParallel) and i < len(batches) - 1
            with self.wrapped.no_sync() if wait else contextlib.nullcontext():  # type: ignore[operator]
                images, targets = batch.views[0].to(self.device), batch.labels_B.to(self.device)
                if self.mixup is not None:
                    images, targets = self.mixup(images, targets)
                with utils.autocast(self.device, self.precision):
                    logits_BL = self.wrapped(images)
                loss = self.criterion(logits_BL.float(), targets)
                self.scaler.scale(loss / len(batches)).backward()
            total += loss.detach() / len(batches)
        mean = collectives.all_reduce_sum(total).item() / collectives.get_world_size()
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"the loss of step {iteration} is {mean} with --precision {self.precision}; start the same command again, which "
                "goes on at the last epoch, with --precision fp32 or a lower --lr"
            )
        self.scaler.unscale_(self.optimizer)
        if self.recipe.clip_grad:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.network, iteration + 1)
        return {"loss": mean}

    def train_epoch(
        self,
        loader: DataLoader[Batch],
        epoch: int,
        meter: EpochMeter,
        log: RunLog,
        tally: FailureTally,
        ending: StopRequest,
        done: int = 0,
    ) -> None:
        """All updates of an epoch, but for those that are `done`.

        Raises:
            UsageError: more than 1 % of the images cannot be read.
            FloatingPointError: see `step`.
            Stopped: see `StopRequest.stop_if`.
        """
        set_epoch(loader, epoch, skipped_batches=done * self.recipe.accum_iter)
        tally.start_pass()
        for network in self.networks().values():
            network.start_epoch(epoch, self.recipe.epochs)
        self.network.train()
        with log.epoch(meter) as show:
            for i, batches in enumerate(in_groups(meter.timed(loader), self.recipe.accum_iter), done):
                failures = [failure for batch in batches for failure in batch.failures]
                incomplete = not all(batch.views for batch in batches)
                (stop_votes,) = tally.exchange(failures, self.device, incomplete, ending.votes())
                ending.stop_if(stop_votes, epoch, i)
                iteration = epoch * self.recipe.steps + i
                meter.update(self.step(batches, iteration))
                show(lr=max(group["lr"] for group in self.optimizer.param_groups))
        meter.stop()

    @torch.no_grad()
    def validate(self, loader: DataLoader[Batch]) -> dict[str, Accuracy]:
        """Accuracies of all networks in one pass; over all processes every image counts once.

        Raises:
            UsageError: more than 1 % of the images cannot be read.
        """
        networks = self.networks()
        hits = {name: torch.zeros(2, dtype=torch.float64) for name in networks}
        failures: list[str] = []
        seen, incomplete = 0, False
        for network in networks.values():
            network.eval()
        for batch in tqdm(loader, desc="val", disable=None if collectives.is_main_process() else True, leave=False):
            failures += batch.failures
            incomplete = not batch.views
            if incomplete:
                break
            images = batch.views[0].to(self.device, non_blocking=True)
            seen += len(images)
            for name, network in networks.items():
                with utils.autocast(self.device, self.precision):
                    logits_BL = network(images)
                best = logits_BL.float().topk(min(5, self.classes)).indices.cpu() == batch.labels_B[:, None]
                hits[name] += torch.stack([best[:, :1].sum(), best.sum()])
        FailureTally(len(loader.dataset)).exchange(failures, self.device, incomplete)  # type: ignore[arg-type]
        images_of_all = sum(collectives.all_gather_objects(seen))
        accuracies = {}
        for name, own in hits.items():
            top1, top5 = (100 * torch.stack(collectives.all_gather_objects(own)).sum(dim=0) / images_of_all).tolist()
            accuracies[name] = Accuracy(top1, top5)
        return accuracies


# --------------------------------------------------------------------------- saving and resuming


class Best(NamedTuple):
    """The best validation so far; epochs count from 0."""

    network: str = ""  # `model` or `ema`; empty before the first validation
    epoch: int = -1
    top1: float = -1.0
    top5: float = -1.0


class Progress(NamedTuple):
    """How far a run is."""

    epochs: int = 0  # that are done
    best: Best = Best()
    last: Mapping[str, Accuracy] = {}  # of the last validation, by network
    damaged: tuple[Path, ...] = ()  # files that were passed by to get here
    steps: int = 0  # of the epoch at hand that are done
    meter: Mapping[str, Any] = {}  # what its `EpochMeter` has measured

    @property
    def place(self) -> RunPosition:
        """The same in the words of training/checkpointing.py."""
        return RunPosition(self.epochs, self.steps, self.meter, damaged=self.damaged)


def save_run(
    output_dir: Path, tuner: FineTuner, progress: Progress, identity: Mapping[str, Any], args: Any, config: Any
) -> str:
    """Write `best.pth` at the end of an epoch if it was the best one, and `checkpoint.pth`. All processes call this.

    Args:
        identity: what must be the same for the run to go on, by the name of the flag.

    Returns:
        why one of them could not be written, see `resume.write`; `checkpoint.pth` waits for `best.pth`.

    Raises:
        FloatingPointError: see `checkpoint.check_finite`.
    """
    rng_of_rank = collectives.all_gather_objects(utils.get_rng_state())
    serialization.check_finite(**{name: network.state_dict() for name, network in tuner.networks().items()})
    if not collectives.is_main_process():
        return ""
    best = progress.best
    if best.epoch == progress.epochs - 1 and not progress.steps:
        weights = tuner.networks()[best.network].state_dict()
        content = {"model": weights, "finetuning": best._asdict(), "config": config.dump()}
        if failure := write(content, output_dir / BEST, keep=0):
            return failure
    state = {
        "model": tuner.network.state_dict(),
        "ema": None if tuner.ema is None else tuner.ema.module.state_dict(),
        "optimizer": tuner.optimizer.state_dict(),
        "fp16_scaler": tuner.scaler.state_dict() if tuner.scaler.is_enabled() else None,
        "epoch": progress.epochs,
        "best": best._asdict(),
        "last": {name: accuracy._asdict() for name, accuracy in progress.last.items()},
        "identity": dict(identity),
        "finetuning": tuner.recipe._asdict(),
        "args": args,
        "config": config.dump(),
        "rng": rng_of_rank,
        "world_size": collectives.get_world_size(),
    }
    if progress.steps:
        state["in_epoch"] = in_epoch(progress.steps, progress.meter, args)
    return write(state, output_dir / CHECKPOINT)


def resume_run(output_dir: Path, tuner: FineTuner, identity: Mapping[str, Any], args: Any) -> Progress:
    """Continue from the newest whole `checkpoint.pth` of `output_dir` if there is any; returns how far it is.

    Raises:
        UsageError: all files are damaged, or of another kind of run, of other data or of another network.
    """
    found = newest_whole(output_dir / CHECKPOINT)
    if found is None:
        return Progress()
    path, content, damaged = found
    source = f"checkpoint '{path}'"
    absent = [key for key in STATE if key not in content]
    if absent:
        raise UsageError(
            f"{source} is not of a fine-tuning, it has no {', '.join(absent)}; choose another --output_dir"
        )
    with reading("model", path):
        biases = [t for name, t in content["model"].items() if name.startswith("head.") and name.endswith("bias")]
        classes = len(biases[-1]) if biases else 0
    if classes != tuner.classes:
        raise UsageError(
            f"{source} has another number of classes than the data's {tuner.classes}; choose another --output_dir"
        )
    with reading("identity", path):
        check_same_run(content.get("identity"), identity, source)
    if (content.get("ema") is None) != (tuner.ema is None):
        flag = "off" if tuner.ema else "on"
        raise UsageError(f"{source} was made with --model_ema {flag}; pass that, or choose another --output_dir")
    for key, network in tuner.networks().items():
        with reading(key, path):
            loading.load_network(network, layouts.NetworkState(content[key], "full checkpoint", key), source)
    optim.load_own_moments(tuner.optimizer, content["optimizer"], source)
    with reading("fp16_scaler", path):
        if tuner.scaler.is_enabled() and content.get("fp16_scaler"):
            tuner.scaler.load_state_dict(content["fp16_scaler"])
    with reading("last", path):
        rows = content.get("last", {}).items()
        last = {str(name): Accuracy(float(row["top1"]), float(row["top5"])) for name, row in rows}
    with reading("best", path):
        saved = content["best"]
        best = Best(str(saved["network"]), int(saved["epoch"]), float(saved["top1"]), float(saved["top5"]))
    place = position_of(content, path, args)
    return Progress(place.epoch, best, last, damaged, place.steps, place.meter)
