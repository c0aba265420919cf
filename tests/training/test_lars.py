"""LARS against a loop written from its equations, skipped steps, and no synchronization."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.optim import Lars
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from training import optim
from training.lars import LARS

MOMENTUM, ETA = 0.9, 0.001


def network(dtype: torch.dtype) -> nn.Module:
    """Return tensors of 1, 2 and 4 dimensions, one of norm 0, and a `last_layer` that may be frozen."""
    torch.manual_seed(0)
    zero = nn.Linear(4, 3)
    nn.init.zeros_(zero.weight)
    last = nn.Linear(3, 5, bias=False)
    net = nn.ModuleDict({"conv": nn.Conv2d(2, 3, 2), "norm": nn.LayerNorm(4), "zero": zero, "last_layer": last})
    return net.to(memory_format=torch.channels_last).to(dtype)


def gradients(net: nn.Module, step: int) -> list[Tensor | None]:
    """Return random gradients; none for the frozen layer in steps 0 and 3, zeros for `zero` in the first two steps."""
    generator = torch.Generator().manual_seed(step)
    found: list[Tensor | None] = []
    for name, p in net.named_parameters():
        gradient = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        if name == "zero.weight" and step < 2:
            gradient.zero_()
        found.append(None if name.startswith("last_layer") and step in (0, 3) else gradient)
    return found


def reference_step(w: Tensor, g: Tensor, mu: Tensor, lr: float, decay: float) -> tuple[Tensor, Tensor]:
    """Return a tensor and its momentum after a step."""
    d = g
    if w.ndim > 1:
        d = g + decay * w
        norms = w.square().sum().sqrt().item(), d.square().sum().sqrt().item()
        d = d * (ETA * norms[0] / norms[1] if norms[0] > 0 and norms[1] > 0 else 1.0)
    mu = MOMENTUM * mu + d
    return w - lr * mu, mu


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_steps_equal_the_equations(decay: float, dtype: torch.dtype, tolerance: float) -> None:
    """Eight steps, two of which are skipped because of nonfinite gradients."""
    net = network(dtype)
    optimizer = optim.build_optimizer("lars", optim.param_groups(net))
    weights = [p.detach().clone().double() for p in net.parameters()]
    mus = [torch.zeros_like(w) for w in weights]
    for step in range(8):
        lr, bad = 0.5 - 0.05 * step, step in (2, 5)
        for group, of_group in zip(optimizer.param_groups, (decay, 0.0)):
            group.update(lr=lr, weight_decay=of_group)
        found = gradients(net, step)
        for i, (p, g) in enumerate(zip(net.parameters(), found)):
            p.grad = g
            if g is not None and not bad:
                weights[i], mus[i] = reference_step(weights[i], g.double(), mus[i], lr, decay)
            elif g is not None:
                g.view(-1)[i % 2] = float("inf") if i % 2 else float("nan")
        optim.step_if(optimizer, torch.tensor(not bad))
        for p, w, mu in zip(net.parameters(), weights, mus):
            torch.testing.assert_close(p.detach().double(), w, rtol=tolerance, atol=tolerance)
            ours = optimizer.state[p].get("mu", torch.zeros_like(p))
            torch.testing.assert_close(ours.double(), mu, rtol=tolerance, atol=tolerance)
    assert all(set(state) == {"mu"} for state in optimizer.state.values())


def test_skipped_step_changes_nothing() -> None:
    net = network(torch.float32)
    optimizer = optim.build_optimizer("lars", optim.param_groups(net))
    for step, applied in ((1, True), (2, False)):
        for p, gradient in zip(net.parameters(), gradients(net, step)):
            p.grad = gradient if applied else torch.full_like(p, float("nan"))
        for group in optimizer.param_groups:
            group.update(lr=0.1, weight_decay=0.1)
        before = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
        optim.step_if(optimizer, torch.tensor(applied))
        pairs = [(net.state_dict()[name], value) for name, value in before[0].items()]
        state = optimizer.state_dict()["state"]
        pairs += [(state[i]["mu"], of_one["mu"]) for i, of_one in before[1]["state"].items()]
        assert all(torch.equal(*pair) for pair in pairs) is not applied
    assert not hasattr(optimizer, "found_inf")  # does not affect the next step


def test_first_step_may_be_skipped() -> None:
    held, plain = (nn.Linear(3, 2) for _ in range(2))
    plain.load_state_dict(held.state_dict())
    optimizers = [LARS(model.parameters(), lr=1.0) for model in (held, plain)]
    for parameter in held.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optim.step_if(optimizers[0], torch.tensor(False))
    for ours, other in zip(held.parameters(), plain.parameters()):
        assert torch.equal(ours, other)
        ours.grad, other.grad = torch.ones_like(ours), torch.ones_like(ours)
    optim.step_if(optimizers[0], torch.tensor(True))
    optimizers[1].step()
    for ours, other in zip(held.parameters(), plain.parameters()):
        assert torch.equal(ours, other)
    torch.testing.assert_close(plain.bias.grad, torch.ones(2))  # gradients are not written to


def test_state_of_timms_lars_is_loaded() -> None:
    theirs, ours = nn.Linear(3, 2), nn.Linear(3, 2)
    before = Lars(optim.param_groups(theirs), lr=0.1, momentum=0.9)
    for parameter in theirs.parameters():
        parameter.grad = torch.randn_like(parameter)
    before.step()
    ours.load_state_dict(theirs.state_dict())
    optimizer = optim.build_optimizer("lars", optim.param_groups(ours))
    moments = optim.named_moments(copy.deepcopy(before.state_dict()), None, "the file")
    optim.load_moments(optimizer, moments, "the file")
    bias = ours.bias.detach().clone()
    for parameter in ours.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.1
    optimizer.step()
    mu = 0.9 * before.state[theirs.bias]["momentum_buffer"] + 1
    torch.testing.assert_close(optimizer.state[ours.bias]["mu"], mu)
    torch.testing.assert_close(ours.bias.detach(), bias - 0.1 * mu)
    assert all(set(state) == {"mu"} for state in optimizer.state.values())
    assert all(group["eta"] == ETA for group in optimizer.param_groups)


def test_step_does_not_synchronize() -> None:
    """Fake tensors have no values that the host could read."""
    with FakeTensorMode():
        net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        optimizer = optim.build_optimizer("lars", optim.param_groups(net))
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        applied = torch.zeros(()) > 0
        optim.step_if(optimizer, applied)
        with pytest.raises(DataDependentOutputException):
            applied.item()
    assert len(optimizer.state) == 4
