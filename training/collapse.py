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
from typing import Any

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

FIXES = {
    "plateau": "keep the teacher sharper (--teacher_temp, --warmup_teacher_temp 0.04 or lower), use a longer --warmup_epochs or a "
    "lower --lr, a larger batch (--accum_iter), and --norm_last_layer True",
    "entropy": "make the teacher softer (a higher --teacher_temp), lower --lr, freeze the prototypes longer "
    "(--freeze_last_layer), and use --norm_last_layer True",
    "std": "lower --lr, raise --momentum_teacher or the batch (--accum_iter), and check that the views differ (crops.png)",
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
        self._streaks: dict[tuple[str, str], int] = {}

    @torch.no_grad()
    def measure(self, levels: Mapping[str, MonitoredLevel]) -> dict[str, Tensor]:
        """Return the scalars of all levels, named `level/scalar`."""
        scalars: dict[str, Tensor] = {}
        for name, level in levels.items():
            self.prototypes[name] = level.center.shape[-1]
            self.terms[name] = level.term or f"{name}_loss"
            with torch.autocast(level.center.device.type, enabled=False):
                scalars |= {f"{name}/{key}": value for key, value in measure(level).items()}
        return scalars

    def check(self, scalars: Mapping[str, float], warmed_up: bool) -> None:
        """Check scalars that have been read for signs of a collapse; `warmed_up`: the learning rate has passed its maximum."""
        for name, prototypes in self.prototypes.items():
            if f"{name}/kl" in scalars and not scalars.get("skipped"):
                term = self.terms[name]
                for cause, sentence in _symptoms(name, term, scalars, math.log(prototypes), warmed_up).items():
                    self._count((name, cause), sentence)

    def state_dict(self) -> dict[str, int]:
        """Return the number of consecutive readings with each cause, named `level/cause`."""
        return {"/".join(cause): streak for cause, streak in self._streaks.items()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Load the result of `state_dict`."""
        self._streaks = {
            (level, cause): int(n) for name, n in state.items() for level, _, cause in [name.rpartition("/")]
        }

    def _count(self, cause: tuple[str, str], sentence: str | None) -> None:
        streak = self._streaks[cause] = self._streaks.get(cause, 0) + 1 if sentence else 0
        times = streak // PATIENCE
        if streak and streak % PATIENCE == 0 and times & (times - 1) == 0:
            logger.warning("%s for %d consecutive readings; %s", sentence, streak, FIXES[cause[1]])


def _symptoms(
    name: str, term: str, scalars: Mapping[str, float], ln_k: float, warmed_up: bool
) -> dict[str, str | None]:
    """Return a sentence for each cause that applies to a level, and None for the others."""
    term = term if term in scalars else "loss"
    loss = scalars[term]
    entropy, std, rank = (scalars[f"{name}/{key}"] for key in ("teacher_entropy", "feature_std", "feature_rank"))
    used = scalars[f"{name}/prototypes_used"]
    plateau = warmed_up and abs(loss - ln_k) < PLATEAU * ln_k
    return {
        "plateau": f"{term} {loss:.3f} stays at ln K = {ln_k:.3f}: all prototypes are equally likely, nothing is learned"
        if plateau
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
