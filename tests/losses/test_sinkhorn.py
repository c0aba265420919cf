"""Sinkhorn-Knopp centers against the algorithm on whole matrices, and the losses that use them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers.step_runs import everything, random_views, tiny
from torch import Tensor

from losses.dino import DINOLoss
from losses.sinkhorn import sinkhorn_center
from ops.logits import FactoredLogits


def assignment(logits_NK: Tensor, temperature: float, iterations: int) -> Tensor:
    """Scale columns and rows of the whole matrix alternately, in float64."""
    q_NK = (logits_NK.double() / temperature).exp()
    rows, prototypes = q_NK.shape
    for _ in range(iterations):
        for k in range(prototypes):
            q_NK[:, k] /= q_NK[:, k].sum() * prototypes
        for n in range(rows):
            q_NK[n] /= q_NK[n].sum() * rows
    return q_NK * rows


@pytest.mark.parametrize("temperature", [0.04, 1.0])
@pytest.mark.parametrize("iterations", [1, 3, 20])
@pytest.mark.parametrize("chunk_bytes", [1, 200, 2**20])
def test_softmax_is_the_assignment(temperature: float, iterations: int, chunk_bytes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    bottleneck = F.normalize(torch.randn(13, 5, generator=generator), dim=-1)
    prototypes = F.normalize(torch.randn(7, 5, generator=generator), dim=-1)
    expected = assignment(bottleneck @ prototypes.T, temperature, iterations)
    for logits in (FactoredLogits(bottleneck, prototypes), bottleneck @ prototypes.T):
        center = sinkhorn_center(logits, temperature, iterations, chunk_bytes)
        assert center.shape == (1, 7)
        found = F.softmax((bottleneck @ prototypes.T - center) / temperature, dim=-1)
        torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-6)
    if (iterations, temperature) == (20, 1.0):  # equal shares of the batch
        torch.testing.assert_close(expected.mean(dim=0), torch.full((7,), 1 / 7).double(), rtol=0.02, atol=0)


def test_large_logits_stay_finite() -> None:
    center = sinkhorn_center(1e4 * torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), 0.04)
    assert center.isfinite().all()


def test_loss_with_sinkhorn_targets() -> None:
    """The view loss from its equation; its gradient reaches the student only, and the EMA center is not used."""
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(12, 5, generator=generator), torch.randn(8, 5, generator=generator)
    student.requires_grad_()
    loss = DINOLoss(5, 3, 0.1, 0.1, 0, 2, centering="sinkhorn")
    loss.center.fill_(torch.nan)
    targets = assignment(teacher, 0.1, 3).float().view(2, 4, 5)
    log_q = F.log_softmax(student / 0.1, dim=-1).view(3, 4, 5)
    pairs = [-(targets[q] * log_q[v]).sum(-1).mean() for q in range(2) for v in range(3) if q != v]
    found = loss(student, teacher, 0)
    torch.testing.assert_close(found, torch.stack(pairs).mean(), rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(found, student)
    (expected,) = torch.autograd.grad(torch.stack(pairs).mean(), student)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dense", ["on", "off"])
def test_chunked_step_equals_the_plain_one(dense: str) -> None:
    """With materialized logits everything that a step changes is the same, and differs from that of centering by the mean."""
    ends = []
    for flags in (["--centering", "sinkhorn"], ["--centering", "sinkhorn", "--plain_loss", "on"], []):
        method, step = tiny("--use_dense_prediction", dense, "--optimizer", "sgd", *flags)
        for seed in range(2):
            step([random_views(4, seed)], seed, 0)
        ends.append(everything(method, step))
    chunked, plain, mean = ends
    for name, value in chunked.items():
        rounding = 1e-5 * value.abs().max().item()  # of sums in another order
        torch.testing.assert_close(plain[name], value, rtol=1e-4, atol=rounding, msg=name)
    assert any(not torch.allclose(mean[name], value, rtol=1e-3) for name, value in chunked.items())
