"""Supervised fine-tuning of a backbone: layer-wise learning rate decay, training, validation and checkpoints.

Parameter groups, mixup and cutmix, losses, cosine schedule and weight averaging are those of timm.

Shapes: B images, L classes.
Origin: layer-wise decay of BEiT (Bao et al., ICLR 2022) as used for Swin by SimMIM (Xie et al., CVPR 2022); recipe of DeiT
(Touvron et al., ICML 2021).
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
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import utils
from checkpoints import layouts, loading, serialization
from data.loader import Batch, FailureTally, in_groups, set_epoch
from distributed import collectives
from distributed.ddp import SYNC_BUFFERS
from evaluation.confusion import checked_cells, gather_confusion, top1_accuracy
from evaluation.features import readable_batches
from models.base import HEAD_PREFIXES, Backbone, batch_norms
from training import optim
from training.checkpointing import CHECKPOINT, RunPosition, StopRequest, check_same_run, run_fields, write
from training.restore import reading
from training.run_log import EpochMeter, RunLog
from utils import UsageError

BEST = "best.pth"
STATE = ("model", "optimizer", "epoch", "best", "finetuning")  # keys that a resumed checkpoint must have


# --------------------------------------------------------------------------- layer-wise learning rate decay


def layer_depths(network: Backbone) -> dict[str, int]:
    """Return the depth of each parameter: 0 before the first block, 1 .. n in the blocks, n + 1 for the last norm and the head.

    Layers between two stages (patch merging or embedding) have the depth of the block before them.
    """
    block_of: dict[int, int] = {}  # id of a parameter -> number of its block, from 1
    blocks = [block for stage in range(len(network.stage_depths)) for block in network.stage_blocks(stage)]
    for number, block in enumerate(blocks, start=1):
        for part in [block] if isinstance(block, nn.Module) else list(block):
            block_of |= {id(parameter): number for parameter in part.parameters()}
    depths, depth = {}, 0
    for name, parameter in network.named_parameters():
        if name.startswith(HEAD_PREFIXES):
            depths[name] = len(blocks) + 1
            continue
        depth = block_of.get(id(parameter), depth)
        after_blocks = depth == len(blocks) and id(parameter) not in block_of
        depths[name] = len(blocks) + 1 if after_blocks else depth
    return depths


class _DepthGroups(nn.Module):
    """Adapter of a network to timm's `param_groups_layer_decay`."""

    def __init__(self, network: Backbone) -> None:
        super().__init__()
        self.network = network
        self.depths = {f"network.{name}": depth for name, depth in layer_depths(network).items()}

    def group_matcher(self, coarse: bool) -> Any:
        """Return the function from parameter names to depths."""
        return self.depths.__getitem__


def param_groups(network: Backbone, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Return groups with `lr_scale` = layer_decay ** (deepest - depth), and no weight decay of biases, norms and positions."""
    no_decay = [f"network.{name}" for name in network.no_weight_decay()]
    groups = param_groups_layer_decay(_DepthGroups(network), weight_decay, no_decay, layer_decay=layer_decay)
    names = {parameter: name for name, parameter in network.named_parameters()}
    return [group | {"param_names": [names[parameter] for parameter in group["params"]]} for group in groups]


# --------------------------------------------------------------------------- the head


def projection_layers(path: str, key: str, token: int, count: int, width: int) -> list[nn.Module]:
    """Load the first `count` hidden layers of the projection head in a checkpoint, each a linear layer and its GELU.

    Args:
        path, key: checkpoint, and the key of the network in it.
        token: index of the class token, for networks with a head for each.
        width: number of input features.

    Raises:
        UsageError: no projection head, too few hidden layers, BatchNorm, or another width.
    """
    tensors = layouts.network_state(serialization.load_file(path), key, path).tensors
    source = f"checkpoint '{path}'"
    mlp = f"head.{token}.mlp" if any(name.startswith(f"head.{token}.") for name in tensors) else "head.mlp"
    if f"{mlp}.1.weight" in tensors:
        raise UsageError(
            f"{source} has a projection head with BatchNorm, which --finetune_head_layer does not support; set it to 0"
        )
    linear = sum(f"{mlp}.{2 * layer}.weight" in tensors for layer in range(len(tensors)))
    if count >= linear:
        has = utils.counted(linear - 1, "hidden layer") if linear else "none"
        raise UsageError(
            f"--finetune_head_layer {count} needs hidden layers of a projection head, {source} has {has}; lower it, or pass a "
            "checkpoint of pre-training"
        )
    layers: list[nn.Module] = []
    for layer in range(count):
        weight, bias = (tensors[f"{mlp}.{2 * layer}.{kind}"] for kind in ("weight", "bias"))
        if weight.shape[1] != width:
            raise UsageError(
                f"{source} has a projection head of width {weight.shape[1]}, --arch gives {width}; check --arch"
            )
        layers += [nn.Linear(width, len(weight)), nn.GELU()]
        layers[-2].load_state_dict({"weight": weight, "bias": bias})
        width = len(weight)
    return layers


def linear_head(hidden: list[nn.Module], width: int, classes: int, scale: float) -> nn.Module:
    """Return a new linear classifier on top of `hidden` layers; its initial weights are scaled as in BEiT."""
    widths = [layer.out_features for layer in hidden if isinstance(layer, nn.Linear)]
    linear = nn.Linear((widths or [width])[-1], classes)
    nn.init.trunc_normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    with torch.no_grad():
        linear.weight *= scale
    return nn.Sequential(*hidden, linear) if hidden else linear


# --------------------------------------------------------------------------- training


class WeightAverage(ModelEmaV3):
    """Exponential moving average of timm that updates each tensor once a step.

    The state dict of a network with shared modules (global and local projections of ViL) has the same tensor under several names,
    and timm would update it several times.
    """

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """Move the average towards the weights of `model` by a factor of 1 - decay."""
        pairs = zip(self.module.state_dict().values(), model.state_dict().values())
        unique = list({average.data_ptr(): (average, own) for average, own in pairs if average.numel()}.values())
        floating = [pair for pair in unique if pair[0].is_floating_point()]
        torch._foreach_lerp_([average for average, _ in floating], [own for _, own in floating], 1.0 - decay)
        for average, own in unique:
            if not average.is_floating_point():
                average.copy_(own)


class Recipe(NamedTuple):
    """Hyperparameters of training."""

    epochs: int
    steps: int  # optimizer steps of an epoch
    lr: float  # of the head, scaled with the batch
    min_lr: float
    warmup_epochs: int
    layer_decay: float
    weight_decay: float
    mixup: float
    cutmix: float
    smoothing: float
    clip_grad: float
    accum_iter: int
    ema_decay: float | None  # None: no weight averaging


class Accuracy(NamedTuple):
    """Accuracies in percent; for L < 5 classes `top5` is top-L."""

    top1: float
    top5: float
    confusion_P3: Tensor | None = None  # see `evaluation.confusion`; None in checkpoints of earlier versions


class Best(NamedTuple):
    """The best validation so far; epochs are counted from 0."""

    network: str = ""  # `model` or `ema`; empty before the first validation
    epoch: int = -1
    top1: float = -1.0
    top5: float = -1.0
    confusion_P3: Tensor | None = None  # see `Accuracy`


class FineTuner:
    """A network with its optimizer, schedule, loss and weight average.

    Args:
        network: with a linear head for `classes` classes, on `device`.
        precision: of the network, `fp32`, `bf16` or `fp16`; losses are float32.
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
        self.best = Best()
        self.last: Mapping[str, Accuracy] = {}  # of the last validation, by network
        self.wrapped: nn.Module = network
        if collectives.is_distributed():
            buffers: dict[str, Any] = {SYNC_BUFFERS: bool(batch_norms(network))}
            self.wrapped = DistributedDataParallel(
                network, device_ids=[device.index] if device.type == "cuda" else None, **buffers
            )

    def networks(self) -> dict[str, Backbone]:
        """Return the networks to validate: `model`, and `ema` with --model_ema."""
        return {"model": self.network} | ({} if self.ema is None else {"ema": self.ema.module})

    def step(self, batches: list[Batch], iteration: int) -> dict[str, float]:
        """Update the weights on one batch, given as micro-batches; return the mean loss over micro-batches and processes.

        Raises:
            FloatingPointError: the loss is not finite; raised on all processes, before any weight has changed.
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
                f"the loss of step {iteration} is {mean} with --precision {self.precision}; resume from the last epoch by the same "
                "command with --precision fp32 or a lower --lr"
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
        """Train for one epoch, skipping the steps that are `done`.

        Raises:
            UsageError: more than 1 % of the images cannot be read.
            FloatingPointError: the loss is not finite.
            Stopped: a process received a signal.
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
                (votes,) = tally.exchange(failures, self.device, incomplete, ending.votes())
                ending.stop_if(votes, epoch, i)
                iteration = epoch * self.recipe.steps + i
                meter.update(self.step(batches, iteration))
                show(lr=max(group["lr"] for group in self.optimizer.param_groups))
        meter.stop()

    @torch.no_grad()
    def validate(self, loader: DataLoader[Batch]) -> dict[str, Accuracy]:
        """Return the accuracy of all networks, computed in one pass over the validation images of all processes.

        Raises:
            UsageError: more than 1 % of the images cannot be read.
        """
        networks = self.networks()
        top5_hits = dict.fromkeys(networks, 0)
        labels = [torch.zeros(1 + len(networks), 0, dtype=torch.long)]  # the true and the predicted ones
        tally = FailureTally(len(loader.dataset))  # type: ignore[arg-type]
        for network in networks.values():
            network.eval()
        batches = tqdm(loader, desc="val", disable=None if collectives.is_main_process() else True, leave=False)
        for batch in readable_batches(batches, tally, self.device):
            images = batch.views[0].to(self.device, non_blocking=True)
            labels_of_batch = [batch.labels_B]
            for name, network in networks.items():
                with utils.autocast(self.device, self.precision):
                    logits_BL = network(images)
                ranking = logits_BL.float().topk(min(5, self.classes)).indices.cpu()
                top5_hits[name] += int((ranking == batch.labels_B[:, None]).sum())
                labels_of_batch.append(ranking[:, 0])
            labels.append(torch.stack(labels_of_batch))
        true_N, *predicted = torch.cat(labels, dim=1)
        accuracies = {}
        for (name, own), predicted_N in zip(top5_hits.items(), predicted):
            cells = gather_confusion(true_N, predicted_N)
            top5 = 100 * sum(collectives.all_gather_objects(own)) / int(cells[:, 2].sum())
            accuracies[name] = Accuracy(top1_accuracy(cells), top5, cells)
        return accuracies

    # --------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the state of a checkpoint.

        Raises:
            FloatingPointError: A weight is not finite; on all processes.
        """
        serialization.check_finite(**{name: network.state_dict() for name, network in self.networks().items()})
        return {
            "model": self.network.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "fp16_scaler": self.scaler.state_dict() if self.scaler.is_enabled() else None,
            "best": self.best._asdict(),
            "last": {name: accuracy._asdict() for name, accuracy in self.last.items()},
            "finetuning": self.recipe._asdict(),
        }

    def load_state_dict(self, content: dict[str, Any], path: Path, *, identity: Mapping[str, Any]) -> None:
        """Load the content of a checkpoint of the same run.

        Raises:
            UsageError: It is of another kind of run, of other data or of another network.
        """
        source = f"checkpoint '{path}'"
        absent = [key for key in STATE if key not in content]
        if absent:
            raise UsageError(
                f"{source} is no fine-tuning run, it has no {', '.join(absent)}; choose another --output_dir"
            )
        with reading("model", path):
            biases = [t for name, t in content["model"].items() if name.startswith("head.") and name.endswith("bias")]
            classes = len(biases[-1]) if biases else 0
        if classes != self.classes:
            raise UsageError(f"{source} has {classes} classes, the data {self.classes}; choose another --output_dir")
        with reading("identity", path):
            check_same_run(content.get("identity"), identity, source)
        if (content.get("ema") is None) != (self.ema is None):
            flag = "off" if self.ema else "on"
            raise UsageError(f"{source} was made with --model_ema {flag}; pass that, or choose another --output_dir")
        for key, network in self.networks().items():
            with reading(key, path):
                loading.load_network(network, layouts.NetworkState(content[key], "full checkpoint", key), source)
        optim.load_own_moments(self.optimizer, content["optimizer"], source)
        with reading("fp16_scaler", path):
            if self.scaler.is_enabled() and content.get("fp16_scaler"):
                self.scaler.load_state_dict(content["fp16_scaler"])
        with reading("last", path):
            rows = content.get("last", {}).items()
            self.last = {
                str(name): Accuracy(float(row["top1"]), float(row["top5"]), checked_cells(row.get("confusion_P3")))
                for name, row in rows
            }
        with reading("best", path):
            best = content["best"]
            scores = float(best["top1"]), float(best["top5"]), checked_cells(best.get("confusion_P3"))
            self.best = Best(str(best["network"]), int(best["epoch"]), *scores)


def save_run(
    output_dir: Path, tuner: FineTuner, position: RunPosition, identity: Mapping[str, Any], args: Any, config: Any
) -> str:
    """Write `checkpoint.pth`, and before it `best.pth` after an epoch with the best validation; a collective operation.

    Args:
        identity: What must not change when the run is resumed, by flag.

    Returns:
        Why a file could not be written; empty on success.

    Raises:
        FloatingPointError: A weight is not finite.
    """
    state = run_fields(position, args, config) | tuner.state_dict() | {"identity": dict(identity)}
    if not collectives.is_main_process():
        return ""
    best = tuner.best
    if best.epoch == position.epoch - 1 and not position.steps:
        weights = tuner.networks()[best.network].state_dict()
        about = {name: value for name, value in best._asdict().items() if name != "confusion_P3"}
        content = {"model": weights, "finetuning": about, "args": args, "config": config.dump()}
        if failure := write(content, output_dir / BEST, keep=0):
            return failure
    return write(state, output_dir / CHECKPOINT)
