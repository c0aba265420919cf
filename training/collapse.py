"""Collapse monitor: statistics of the outputs, and warnings with suggested fixes.

In the last step of a log interval a method passes sampled rows of each level of its outputs (views, regions, ...) to
`Monitor.measure`, whose scalars are logged with the losses; `Monitor.check` judges them once they have been read. The monitor draws
no random numbers and changes no tensor of the step.

Shapes: N rows, K prototypes, C channels.
Origin: effective rank after Roy & Vetterli (EUSIPCO 2007); standard deviation of normalized features after SimSiam (Chen & He,
CVPR 2021); the plateau of the loss at ln K and its fixes after DINO (Caron et al., ICCV 2021), section 5.3 and its README.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.distillation import MONITORED_ROWS, MonitoredLevel, count_rows, evenly_spaced
from ops.logits import materialize, take_rows
from utils import logger

BLOCK = 64  # rows whose logits are materialized at once
PATIENCE = 5  # consecutive readings before a warning, which is repeated each time the cause has lasted twice as long
PLATEAU = 1e-3  # distance of the loss from ln K, relative to ln K
LEAST_ENTROPY = 0.01  # of the teacher, relative to ln K
LEAST_STD, LEAST_RANK = 0.01, 2.0
# Effective rank of view features, relative to that of the first reading and to its bound min(N - 1, C), in the last reading of
# micro networks on CIFAR-10 and the demo. Runs whose k-NN accuracy rose by 5 to 12 points: 1.19, 1.23, 1.32, 1.58 and 0.44, 0.57,
# 0.67, 0.74; ViT on the demo 0.99 and 0.27. Runs that ended below the untrained network: 0.29, 0.30 and 0.09, 0.05. Little gained:
# 0.38 and 0.12 (3 points), and 0.52 and 0.24 (1 point), of which the monitor does not warn.
LEAST_RANK_KEPT, LEAST_RANK_SHARE = 0.4, 0.08

FIXES = {
    "plateau": "keep the teacher sharper (--teacher_temp, --warmup_teacher_temp 0.04 or lower), use a longer --warmup_epochs or a "
    "lower --lr, a larger batch (--accum_iter), and --norm_last_layer True",
    "entropy": "make the teacher softer (a higher --teacher_temp), lower --lr, freeze the prototypes longer "
    "(--freeze_last_layer), and use --norm_last_layer True",
    "std": "lower --lr, raise --momentum_teacher or the batch (--accum_iter), and check that the views differ (crops.png)",
    "partial": "spread the features (--koleo_weight 0.1), remove shortcuts from the views (crops.png), or lower --lr; "
    "docs/small_data.md compares remedies",
    "rank": "lower --lr or --weight_decay_end, raise the batch (--accum_iter), and check that the images differ (crops.png)",
}


@contextlib.contextmanager
def record_inputs(heads: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Record the input of each head inside the block: the features of the backbone, with gradients if they are enabled."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, inputs: tuple[Any, ...]) -> None:
        seen[name] = inputs[0]

    hooks = [
        head.register_forward_pre_hook(lambda _, inputs, name=name: keep(name, inputs)) for name, head in heads.items()
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def measure(level: MonitoredLevel) -> dict[str, Tensor]:
    """Return scalars on the device.

    Returns:
        `teacher_entropy`: mean entropy of the teacher's probabilities in nats, 0 to ln K.
        `kl`: mean KL divergence of the student's probabilities from the teacher's, in nats.
        `prototypes_used`: number of prototypes that are the most probable one of some row, relative to min(N, K).
        `feature_std`: mean standard deviation of the channels of normalized features, times sqrt(C): 0 if all rows are equal,
            at most 1.
        `feature_rank`: effective rank of the features, 1 to min(N - 1, C).
    """
    rows = count_rows(level.teacher_logits)
    entropies, divergences, best = [], [], []
    for block in torch.arange(rows, device=level.center.device).split(BLOCK):
        teacher_NK = (materialize(take_rows(level.teacher_logits, block)).float() - level.center) / level.teacher_temp
        log_p_NK = F.log_softmax(teacher_NK, dim=-1)
        log_q_NK = F.log_softmax(
            materialize(take_rows(level.student_logits, block)).float() / level.student_temp, dim=-1
        )
        p_NK = log_p_NK.exp()
        entropies.append(-torch.xlogy(p_NK, p_NK).sum(dim=-1))
        divergences.append((torch.xlogy(p_NK, p_NK) - p_NK * log_q_NK).sum(dim=-1))
        best.append(teacher_NK.argmax(dim=-1))
    used_K = level.center.new_zeros(level.center.shape[-1]).scatter_(0, torch.cat(best), 1.0)
    features_NC = level.features.detach()
    features_NC = features_NC[evenly_spaced(len(features_NC), MONITORED_ROWS, features_NC.device)].float()
    channels = features_NC.shape[1]
    return {
        "teacher_entropy": torch.cat(entropies).mean(),
        "kl": torch.cat(divergences).mean(),
        "prototypes_used": used_K.sum() / min(rows, len(used_K)),
        "feature_std": F.normalize(features_NC, dim=-1).std(dim=0, correction=0).mean() * math.sqrt(channels),
        "feature_rank": effective_rank(features_NC),
    }


def effective_rank(features_NC: Tensor) -> Tensor:
    """Return exp of the entropy of s / sum(s), with s the singular values of the centered features.

    It is 1 if all rows are equal, and NaN if a feature is not finite.
    """
    dtype = torch.float32 if features_NC.device.type == "mps" else torch.float64
    features_NC = features_NC.to(dtype)
    finite = features_NC.isfinite().all()
    centered_NC = torch.where(finite, features_NC - features_NC.mean(dim=0), 0.0)  # the solver refuses other values
    s = torch.linalg.svdvals(centered_NC)
    p = s / s.sum().clamp_min(torch.finfo(dtype).tiny)
    return torch.where(finite, torch.special.entr(p).sum().exp(), torch.nan).float()


# --------------------------------------------------------------------------- the monitor


class Monitor:
    """Measures levels of outputs, and warns when something has been wrong for several consecutive readings."""

    def __init__(self) -> None:
        self.prototypes: dict[str, int] = {}  # K of each measured level
        self.terms: dict[str, str] = {}  # loss term of each level
        self.largest_rank: dict[str, int] = {}  # bound of the effective rank of each level
        self._first_rank: dict[str, float] = {}  # of each level, in the first reading
        self._streaks: dict[tuple[str, str], int] = {}
        self._since: dict[tuple[str, str], int] = {}  # iteration of the first reading of each streak

    @torch.no_grad()
    def measure(self, levels: Mapping[str, MonitoredLevel]) -> dict[str, Tensor]:
        """Return the scalars of all levels, named `level/scalar`."""
        scalars: dict[str, Tensor] = {}
        for name, level in levels.items():
            self.prototypes[name] = level.center.shape[-1]
            self.terms[name] = level.term or f"{name}_loss"
            rows, channels = level.features.shape
            self.largest_rank[name] = min(rows - 1, MONITORED_ROWS - 1, channels)
            with torch.autocast(level.center.device.type, enabled=False):
                scalars |= {f"{name}/{key}": value for key, value in measure(level).items()}
        return scalars

    def check(self, scalars: Mapping[str, float], warmed_up: bool, iteration: int) -> None:
        """Check scalars that have been read for signs of a collapse.

        Args:
            warmed_up: Whether the learning rate has passed its maximum.
            iteration: Number of the step that they describe.
        """
        for name, prototypes in self.prototypes.items():
            if f"{name}/kl" in scalars and not scalars.get("skipped"):
                first_rank = self._first_rank.setdefault(name, scalars[f"{name}/feature_rank"])
                references = Reference(math.log(prototypes), first_rank, self.largest_rank[name])
                for cause, sentence in _symptoms(name, self.terms[name], scalars, references, warmed_up).items():
                    self._count((name, cause), sentence, iteration)

    def state_dict(self) -> dict[str, float]:
        """Return the counts of readings, `level/cause`, the steps since when, `level/cause/since`, and `level/first_rank`."""
        state: dict[str, float] = {"/".join(cause): streak for cause, streak in self._streaks.items()}
        state |= {"/".join([*cause, "since"]): iteration for cause, iteration in self._since.items()}
        return state | {f"{name}/first_rank": rank for name, rank in self._first_rank.items()}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Load the result of `state_dict`."""
        self._streaks, self._since, self._first_rank = {}, {}, {}
        for key, value in state.items():
            level, _, cause = key.removesuffix("/since").rpartition("/")
            if cause == "first_rank":
                self._first_rank[level] = float(value)
            else:
                (self._since if key.endswith("/since") else self._streaks)[level, cause] = int(value)

    def _count(self, cause: tuple[str, str], sentence: str | None, iteration: int) -> None:
        if sentence is None:
            self._streaks[cause] = 0
            return
        streak = self._streaks[cause] = self._streaks.get(cause, 0) + 1
        if streak == 1:
            self._since[cause] = iteration
        times = streak // PATIENCE
        if streak % PATIENCE == 0 and times & (times - 1) == 0:
            since = self._since.get(cause)
            begun = "" if since is None else f", since step {since + 1}"
            logger.warning("%s for %d consecutive readings%s; %s", sentence, streak, begun, FIXES[cause[1]])


class Reference(NamedTuple):
    """What the statistics of a level are compared with."""

    ln_k: float
    first_rank: float
    largest_rank: int


def _symptoms(
    name: str, term: str, scalars: Mapping[str, float], reference: Reference, warmed_up: bool
) -> dict[str, str | None]:
    """Return a sentence for each cause that applies to a level, and None for the others."""
    term = term if term in scalars else "loss"
    loss, ln_k = scalars[term], reference.ln_k
    entropy, std, rank = (scalars[f"{name}/{key}"] for key in ("teacher_entropy", "feature_std", "feature_rank"))
    used = scalars[f"{name}/prototypes_used"]
    symptoms = {
        "plateau": f"{term} {loss:.3f} stays at ln K = {ln_k:.3f}: all prototypes are equally likely, nothing is learned"
        if warmed_up and abs(loss - ln_k) < PLATEAU * ln_k
        else None,
        "entropy": f"the entropy of the teacher's {name} outputs is {entropy:.3f} of {ln_k:.3f} and {used:.1%} of the prototypes "
        "are used: the outputs collapse to few prototypes"
        if entropy < LEAST_ENTROPY * ln_k
        else None,
        "std": f"the {name} features are nearly constant (standard deviation {std:.4f}): they collapse to one vector"
        if std < LEAST_STD
        else None,
        "rank": f"the {name} features have lost rank (effective rank {rank:.2f}): they collapse to a line"
        if rank < LEAST_RANK
        else None,
    }
    least = max(LEAST_RANK_KEPT * reference.first_rank, LEAST_RANK_SHARE * reference.largest_rank)
    partially = warmed_up and rank < least and not any(symptoms.values())
    symptoms["partial"] = (
        f"the {name} features use few of their dimensions (effective rank {rank:.1f}; {reference.first_rank:.1f} at the start, at "
        f"most {reference.largest_rank}): a partial collapse, which neither the loss nor the entropy shows"
        if partially
        else None
    )
    return symptoms
