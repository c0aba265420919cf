"""Schedules, groups, clipping and EMA against the formulas."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from conftest import golden_json
from torch import nn

from training import optim
from utils import UsageError


def test_schedules_golden() -> None:
    golden = golden_json("trajectory_region_adamw")
    np.testing.assert_allclose(optim.cosine_schedule(0.05 * 4 / 256, 1e-6, 2, 3, 1), golden["lr_schedule"], rtol=1e-12)
    np.testing.assert_allclose(optim.cosine_schedule(0.04, 0.4, 2, 3), golden["wd_schedule"], rtol=1e-12)
    np.testing.assert_allclose(optim.cosine_schedule(0.9, 1.0, 2, 3), golden["momentum_schedule"], rtol=1e-12)


def test_cosine_schedule_formula() -> None:
    values = optim.cosine_schedule(2.0, 0.5, epochs=5, niter_per_ep=4, warmup_epochs=2, start_warmup_value=0.1)
    assert len(values) == 20
    for i in range(8):
        assert values[i] == pytest.approx(0.1 + (2.0 - 0.1) * i / 7)
    for i in range(12):
        assert values[8 + i] == pytest.approx(0.5 + 0.5 * 1.5 * (1 + math.cos(math.pi * i / 12)))
    assert len(optim.cosine_schedule(1.0, 0.0, epochs=2, niter_per_ep=3, warmup_epochs=2)) == 6
    with pytest.raises(UsageError, match="--warmup_epochs 3"):
        optim.cosine_schedule(1.0, 0.0, epochs=2, niter_per_ep=3, warmup_epochs=3)


def test_param_groups_follow_shape_and_name() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Conv2d(2, 2, 1))
    model.register_parameter("gain", nn.Parameter(torch.ones(4, 1)))
    model.register_parameter("frozen", nn.Parameter(torch.ones(4, 1), requires_grad=False))
    decayed, plain = optim.param_groups(model)
    assert {tuple(p.shape) for p in decayed["params"]} == {(2, 3), (2, 2, 1, 1), (4, 1)}
    assert [tuple(p.shape) for p in plain["params"]] == [(2,)] * 4
    assert plain["weight_decay"] == 0.0
    assert len(decayed["params"]) == 3


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_weight_decay_acts_on_the_first_group_only(name: str) -> None:
    model = nn.Linear(3, 2)
    optimizer = optim.build_optimizer(name, optim.param_groups(model))
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.1
    optimizer.param_groups[0]["weight_decay"] = 0.5
    before = [p.detach().clone() for p in (model.weight, model.bias)]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert model.weight.norm() < before[0].norm()
    assert torch.equal(model.bias, before[1])


def test_unknown_optimizer() -> None:
    with pytest.raises(UsageError, match="'adam'; choose one of adamw, sgd, lars"):
        optim.build_optimizer("adam", [])


def random_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))


def train_steps(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range, bad: int = -1) -> None:
    """Take a step for each seed; that of `bad` has nonfinite gradients and is skipped."""
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            if seed == bad:
                parameter.grad[..., 0] = float("nan")
        for group, decay in zip(optimizer.param_groups, (0.3, 0.0)):
            group.update(lr=0.05, weight_decay=decay)
        optim.step_if(optimizer, torch.tensor(seed != bad))


PLAIN = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.0, foreach=False, fused=False),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.0, momentum=0.9, foreach=False, fused=False),
}


@pytest.mark.parametrize("name", PLAIN)
def test_fused_optimizer_equals_the_plain_one_up_to_rounding(name: str) -> None:
    """Ten steps, one of which is skipped."""
    ours, plain = random_model(), random_model()
    optimizer = optim.build_optimizer(name, optim.param_groups(ours))
    assert optimizer.defaults["fused"]
    train_steps(ours, optimizer, range(10), bad=5)
    train_steps(plain, PLAIN[name](optim.param_groups(plain)), range(10), bad=5)
    for a, b in zip(ours.parameters(), plain.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_other_devices_use_the_default_of_torch() -> None:
    """`False` would also rule out the updates of many parameters at once."""
    groups = optim.param_groups(nn.Linear(2, 2, device="meta"))
    assert [optim.build_optimizer(name, groups).defaults["fused"] for name in ("adamw", "sgd")] == [None, None]


@pytest.mark.parametrize("name", PLAIN)
def test_state_of_a_plain_optimizer_is_loaded_into_a_fused_one(name: str) -> None:
    """As in checkpoints from elsewhere; the settings of how to compute are not taken over from them."""
    ours, plain = random_model(), random_model()
    before = PLAIN[name](optim.param_groups(plain))
    train_steps(plain, before, range(3))
    ours.load_state_dict(plain.state_dict())
    optimizer = optim.build_optimizer(name, optim.param_groups(ours))
    state = copy.deepcopy(before.state_dict())
    for group in state["param_groups"]:
        del group["fused"], group["eps" if name == "adamw" else "dampening"]  # older and other files do not have them
    optim.load_moments(optimizer, optim.named_moments(state, None, "the file"), "the file")
    assert all(group["fused"] for group in optimizer.param_groups)
    for model, its_own in ((plain, before), (ours, optimizer)):
        train_steps(model, its_own, range(3, 6), bad=4)
    for a, b in zip(ours.parameters(), plain.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_step_counters_are_copies() -> None:
    """One that is a view of a file mapped into memory would keep the whole file open."""
    model = nn.Linear(2, 2)
    optimizer = optim.build_optimizer("adamw", optim.param_groups(model))
    train_steps(model, optimizer, range(1))
    moments = optim.named_moments(copy.deepcopy(optimizer.state_dict()), None, "the file")
    saved = {moment["step"].data_ptr() for moment in moments.values()}
    optim.load_moments(optimizer, moments, "the file")
    assert len(saved) == len(optimizer.state) == 2
    assert not saved & {state["step"].data_ptr() for state in optimizer.state.values()}


@pytest.mark.parametrize("name", PLAIN)
def test_moments_in_another_memory_format_are_loaded(name: str) -> None:
    """Fused updates walk through memory and ask for no strides."""
    torch.manual_seed(0)
    ours, old = (
        nn.Conv2d(3, 4, 2).to(memory_format=layout) for layout in (torch.channels_last, torch.contiguous_format)
    )
    ours.load_state_dict(old.state_dict())
    optimizers = [optim.build_optimizer(name, optim.param_groups(model)) for model in (old, ours)]
    images, target = torch.randn(2, 3, 4, 4), torch.randn(2, 4, 3, 3)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        (model(images) - target).square().sum().backward()
        optimizer.step()

    for _ in range(2):
        step(old, optimizers[0])
    ours.load_state_dict(old.state_dict())
    moments = optim.named_moments(copy.deepcopy(optimizers[0].state_dict()), None, "the file")
    optim.load_moments(optimizers[1], moments, "the file")
    for model, optimizer in zip((old, ours), optimizers):
        step(model, optimizer)
    assert ours.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours.weight, old.weight)


def test_each_gradient_is_clipped_by_its_own_norm() -> None:
    model = nn.Linear(4, 3)
    model.weight.grad, model.bias.grad = torch.full((3, 4), 2.0), torch.full((3,), 0.01)
    assert optim.clip_each_gradient(model, 0.5).isfinite().all()
    norm = math.sqrt(12 * 4.0)
    torch.testing.assert_close(model.weight.grad, torch.full((3, 4), 2.0 * 0.5 / (norm + 1e-6)))
    torch.testing.assert_close(model.bias.grad, torch.full((3,), 0.01))
    optim.clip_each_gradient(model, 0.0)
    torch.testing.assert_close(model.bias.grad, torch.full((3,), 0.01))
    model.bias.grad[1] = float("inf")
    assert not optim.clip_each_gradient(model, 0.5).isfinite().all()


def test_last_layer_gradients_are_dropped() -> None:
    model = nn.ModuleDict({"last_layer": nn.Linear(2, 2), "mlp": nn.Linear(2, 2)})
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optim.drop_last_layer_gradients(model)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"mlp.weight", "mlp.bias"}


def test_teacher_update_leaves_buffers_unchanged() -> None:
    student, teacher = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    nn.init.constant_(student.weight, 5.0)
    student.running_mean.fill_(7.0)  # type: ignore[union-attr]
    optim.update_teacher(teacher, student, 0.75, torch.tensor(False))
    torch.testing.assert_close(teacher.weight.detach(), torch.ones(3))
    optim.update_teacher(teacher, student, 0.75, torch.tensor(True))
    torch.testing.assert_close(teacher.weight.detach(), torch.full((3,), 0.75 * 1 + 0.25 * 5))
    torch.testing.assert_close(teacher.running_mean, torch.zeros(3))
