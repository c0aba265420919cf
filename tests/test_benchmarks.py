"""The benchmarks of a step: both sides compute the same, and what they count is what happens."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch
from runs import TINY_SWIN

from benchmarks import memory, sides, step, syncs, throughput
from engine import TrainStep
from progress import EpochMeter

TINY = argparse.Namespace(batch=2, out_dim=32, local_crops=2)
FLAGS = ("--cfg", "experiments/demo/swin_micro.yaml", "--head_hidden_dim", "16", "--head_bottleneck_dim", "8")
NO_DROP_PATH = (*TINY_SWIN[:-1], "0.0")


def tiny_step(side: str, *flags: str) -> TrainStep:
    return sides.build_step(side, TINY, arch="swin", flags=(*FLAGS, *flags), overrides=NO_DROP_PATH)


def test_plain_and_lean_steps_compute_the_same() -> None:
    """SGD would show it too, but the plain side has AdamW: two steps keep its division by tiny gradients small."""
    plain, lean = tiny_step("plain"), tiny_step("lean")
    for i in range(2):
        torch.manual_seed(i)
        crops = sides.make_crops(2, 2)
        losses = [one([crops], 50 + i, 0)["loss"].item() for one in (plain, lean)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for network in ("student", "teacher", "criterion"):
        a, b = (getattr(one.method, network).state_dict() for one in (plain, lean))
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=2e-4, msg=f"{network} {name}")


def test_counted_waits_and_operations() -> None:
    values = torch.arange(3.0)
    counter = syncs.count(lambda: (values.sum().item(), values.tolist(), values[values > 1], bool(values.any())))
    assert counter.waits == {"_local_scalar_dense": 2, "tolist": 1, "index": 1}
    assert syncs.count(lambda: (values + 1).view(3, 1)).operations == {"add": 1, "view": 1}
    assert not syncs.count(lambda: values[torch.tensor([1])] * 2).waits


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--use_mixup", "on"),
        ("--use_dense_prediction", "off"),
        ("--use_mixup", "on", "--use_dense_prediction", "off"),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("parts", [1, 2])
def test_a_lean_step_never_waits_and_its_interval_once(flags: tuple[str, ...], parts: int) -> None:
    lean = tiny_step("lean", *flags)
    micro_batches = [sides.make_crops(2, 2)] * parts
    meter = EpochMeter(0, 3, 2)
    meter.update(lean(micro_batches, 0, 0))
    for iteration in (1, 2):
        assert not syncs.count(lambda i=iteration: meter.update(lean(micro_batches, i, 0))).waits  # type: ignore[misc]
    reading = syncs.count(lambda: lean.check(meter.read(), 2))
    assert sum(reading.waits.values()) == 1


def test_live_storages_are_counted_to_the_byte() -> None:
    with memory.simulated():
        counter = memory.LiveStorages()
        with counter:
            a = torch.zeros(1000)
            b = a.view(10, 100) + 1
            assert counter.now == 8000
            del a
            assert counter.now == 4000
            c = torch.cat([b, b])
            del b, c
    assert counter.now == 0
    assert counter.peak == 4000 + 8000


@pytest.mark.slow
def test_simulated_step_holds_at_least_its_state_and_grows_with_the_batch() -> None:
    build: dict[str, Any] = {"arch": "swin", "flags": FLAGS, "overrides": NO_DROP_PATH}
    args = argparse.Namespace(out_dim=32, local_crops=2, precision="fp32")
    small, large = (memory.peak_bytes("lean", args, batch, **build) for batch in (2, 4))
    lean = sides.build_step("lean", TINY, **build)
    state = sum(p.numel() * 4 for p in lean.method.student.parameters()) * 4  # both networks and two moments
    assert state < small < large


def test_parsers_take_their_defaults() -> None:
    assert step.get_args_parser().parse_args([]).batch == 4
    assert memory.get_args_parser().parse_args([]).batch == 32
    assert syncs.get_args_parser().parse_args([]).batch == 1
    assert throughput.get_args_parser().parse_args([]).batch == [4]


@pytest.mark.slow
def test_throughput_compares_networks_that_compute_the_same() -> None:
    """The smallest row that timm has; its features must be ours."""
    args = argparse.Namespace(precision="fp32", repeats=1)
    ours, theirs, difference = throughput.measure(throughput.ROWS["DeiT-S/16"], 1, args, torch.device("cpu"))
    assert ours > 0
    assert theirs is not None
    assert difference < 1e-4
