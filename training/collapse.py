"""Is the run collapsing? Numbers about the outputs of a step, measured on the device, and warnings in words.

In the last step of a log interval a method shows a few rows of each level of its outputs (`MonitoredLevel`: views, regions, ...);
`Monitor.measure` turns them into scalars that travel with the losses, and `Monitor.check` judges them once they have been read.
Nothing here draws a random number, changes a tensor of the step or makes the host wait.

Shapes: N rows, K prototypes, C channels.
Origin: effective rank after Roy & Vetterli (EUSIPCO 2007); deviation of normalized features after SimSiam (Chen & He, CVPR 2021);
the plateau of the loss at ln K and its cures as in DINO (Caron et al., ICCV 2021) section 5.3 and its README.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.distillation import MONITORED_ROWS, MonitoredLevel, _take_rows, evenly_spaced
from ops.logits import FactoredLogits, Logits, materialize
from utils import logger

BLOCK = 64  # rows whose logits are held at once
PATIENCE = 5  # readings in a row before a warning; it comes again each time the cause has lasted twice as long
PLATEAU = 1e-3  # distance of the loss from ln K, as a share of it
LEAST_ENTROPY = 0.01  # of the teacher, as a share of ln K
LEAST_STD, LEAST_RANK = 0.01, 2.0
# Where `effective_rank` looks at the spectrum: steps of 2 in ln(eigenvalue / sum of them), errors below 0.1 %.
NODES = range(-26, 27, 2)

CURES = {
    "plateau": "keep the teacher sharper (--teacher_temp, --warmup_teacher_temp 0.04 or lower), use a longer --warmup_epochs or a "
    "lower --lr, a larger batch (--accum_iter), and --norm_last_layer True",
    "entropy": "make the teacher softer (a higher --teacher_temp), lower --lr, freeze the prototypes longer "
    "(--freeze_last_layer), and use --norm_last_layer True",
    "std": "lower --lr, raise --momentum_teacher or the batch (--accum_iter), and check that the views differ (crops.png)",
    "rank": "lower --lr or --weight_decay_end, raise the batch (--accum_iter), and check that the images differ (crops.png)",
}


@contextlib.contextmanager
def inputs_of(heads: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Fills a dictionary with what each head is given in the block: the features of the backbone."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, inputs: tuple[Any, ...]) -> None:
        seen[name] = inputs[0].detach()

    hooks = [
        head.register_forward_pre_hook(lambda _, inputs, name=name: keep(name, inputs)) for name, head in heads.items()
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


# --------------------------------------------------------------------------- what is measured


def measure(level: MonitoredLevel) -> dict[str, Tensor]:
    """Scalars on the device.

    `teacher_entropy`: mean entropy of the teacher's probabilities, in nats, 0 .. ln K.
    `kl`: mean divergence of the student's probabilities from them, in nats.
    `prototypes_used`: prototypes that are some row's most probable one, as a share of the most there could be, min(N, K).
    `feature_std`: mean deviation of the channels of features of length 1, times sqrt(C): 0 where all are alike, 1 at most.
    `feature_rank`: their effective rank, 1 .. min(N - 1, C).
    """
    rows = _length(level.teacher_logits)
    entropies, divergences, best = [], [], []
    for block in torch.arange(rows, device=level.center.device).split(BLOCK):
        teacher_NK = (materialize(_take_rows(level.teacher_logits, block)).float() - level.center) / level.teacher_temp
        log_p_NK = F.log_softmax(teacher_NK, dim=-1)
        log_q_NK = F.log_softmax(
            materialize(_take_rows(level.student_logits, block)).float() / level.student_temp, dim=-1
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
    """exp of the entropy of s / sum s, s being the singular values of the centered features; 1 where all rows are equal.

    Solvers of eigenvalues make the host wait for a GPU. With eigenvalues l = s^2 of the Gram matrix G, of trace 1, and
    g(u) = tr G (G + u)^-1, both sums that the entropy needs are integrals over x = ln u, which a few Cholesky factors give:

        sum s = 1/pi int g(u) sqrt(u) dx          sum s ln l = 1/pi int g(u) sqrt(u) x dx
    """
    dtype = torch.float32 if features_NC.device.type == "mps" else torch.float64
    centered_NC = features_NC.to(dtype) - features_NC.to(dtype).mean(dim=0)
    gram = centered_NC @ centered_NC.T if len(centered_NC) <= centered_NC.shape[1] else centered_NC.T @ centered_NC
    total = gram.diagonal().sum()
    size, device = len(gram), gram.device
    gram = gram / total.clamp_min(torch.finfo(dtype).tiny)
    eye = torch.eye(size, dtype=dtype, device=device)
    x_n = torch.arange(NODES.start, NODES.stop, NODES.step, dtype=dtype, device=device)
    u_n = x_n.exp()
    factors, _ = torch.linalg.cholesky_ex(gram + u_n[:, None, None] * eye)
    inverses = torch.linalg.solve_triangular(factors, eye.expand_as(factors), upper=False)
    g_n = (size - u_n * inverses.square().sum(dim=(1, 2))).clamp_min(0)
    weighted_n = g_n * u_n.sqrt() * (NODES.step / math.pi)
    sum_s, sum_s_ln_s = weighted_n.sum(), (weighted_n * x_n).sum() / 2
    rank = (sum_s.log() - sum_s_ln_s / sum_s).exp()
    return torch.where(total > 0, rank, torch.where(total == 0, torch.ones_like(rank), total)).float()


def _length(logits: Logits) -> int:
    return len(logits.bottleneck if isinstance(logits, FactoredLogits) else logits)


# --------------------------------------------------------------------------- the monitor


class Monitor:
    """Measures levels of outputs, and warns in words of what stays wrong.

    A warning comes after `PATIENCE` readings in a row with its cause, and again each time that has lasted twice as long; a reading
    without the cause starts the count anew.
    """

    def __init__(self) -> None:
        self.prototypes: dict[str, int] = {}  # K of each level that was measured
        self.terms: dict[str, str] = {}  # of the loss, by level
        self._streaks: dict[tuple[str, str], int] = {}

    @torch.no_grad()
    def measure(self, levels: Mapping[str, MonitoredLevel]) -> dict[str, Tensor]:
        """Scalars on the device, by `level/name`; see the function of this name."""
        scalars: dict[str, Tensor] = {}
        for name, level in levels.items():
            self.prototypes[name] = level.center.shape[-1]
            self.terms[name] = level.term or f"{name}_loss"
            with torch.autocast(level.center.device.type, enabled=False):
                scalars |= {f"{name}/{key}": value for key, value in measure(level).items()}
        return scalars

    def check(self, scalars: Mapping[str, float], warmed_up: bool) -> None:
        """Judge the numbers of a step that have been read; `warmed_up`: the learning rate has seen its highest value."""
        for name, prototypes in self.prototypes.items():
            if f"{name}/kl" in scalars and not scalars.get("skipped"):
                term = self.terms[name]
                for cause, sentence in _symptoms(name, term, scalars, math.log(prototypes), warmed_up).items():
                    self._count((name, cause), sentence)

    def state(self) -> dict[str, int]:
        """How many readings in a row had each cause, by `level/cause`: for a run that goes on in another process."""
        return {"/".join(cause): streak for cause, streak in self._streaks.items()}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Take over what `state` gave."""
        self._streaks = {
            (level, cause): int(n) for name, n in state.items() for level, _, cause in [name.rpartition("/")]
        }

    def _count(self, cause: tuple[str, str], sentence: str | None) -> None:
        streak = self._streaks[cause] = self._streaks.get(cause, 0) + 1 if sentence else 0
        times = streak // PATIENCE
        if streak and streak % PATIENCE == 0 and times & (times - 1) == 0:
            logger.warning("%s for %d readings in a row; %s", sentence, streak, CURES[cause[1]])


def _symptoms(
    name: str, term: str, scalars: Mapping[str, float], ln_k: float, warmed_up: bool
) -> dict[str, str | None]:
    """What is wrong with a level, by cause; None where nothing is."""
    term = term if term in scalars else "loss"
    loss = scalars[term]
    entropy, std, rank = (scalars[f"{name}/{key}"] for key in ("teacher_entropy", "feature_std", "feature_rank"))
    used = scalars[f"{name}/prototypes_used"]
    plateau = warmed_up and abs(loss - ln_k) < PLATEAU * ln_k
    return {
        "plateau": f"{term} {loss:.3f} stays at ln K = {ln_k:.3f}: student and teacher see all prototypes alike, nothing is learned"
        if plateau
        else None,
        "entropy": f"the entropy of the teacher's {name} outputs is {entropy:.3f} of {ln_k:.3f}, {used:.1%} of the prototypes "
        "that could be in use are: the outputs collapse to few prototypes"
        if entropy < LEAST_ENTROPY * ln_k
        else None,
        "std": f"the {name} features hardly differ (deviation {std:.4f}): they collapse to one vector"
        if std < LEAST_STD
        else None,
        "rank": f"the {name} features have lost rank (effective rank {rank:.2f}): they collapse to a line"
        if rank < LEAST_RANK
        else None,
    }
