"""benchmarks/scaling.py: docs/scaling.md is its output, and its arithmetic."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import nn

from benchmarks import scaling, traffic
from benchmarks.scaling import Cluster, CountFlops, Plan, get_args_parser
from benchmarks.traffic import Collective
from distributed import fsdp
from models.heads import DINOHead

PAGE = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
CLUSTER = Cluster(tflops=100, node=8, inside=200, between=50, latency=5)


def parsed(*flags: str) -> list[str]:
    return list(scaling.lines(get_args_parser().parse_args(flags)))


def test_page_has_the_introduction_and_the_networks_of_its_command() -> None:
    command = next(line for line in PAGE.splitlines() if line.startswith("python benchmarks/scaling.py"))
    args = get_args_parser().parse_args(shlex.split(command)[2:])
    assert PAGE.startswith(scaling.introduction(args, CLUSTER))
    assert [line.removeprefix("## ") for line in PAGE.splitlines() if line.startswith("## ")][1:] == args.networks
    assert PAGE.count("| 1024 |") == len(args.networks)


@pytest.mark.slow
def test_page_is_the_output() -> None:
    """The cheapest network; all of them take minutes."""
    assert "\n".join(parsed("--networks", "DeiT-S/16")[-16:]) in PAGE


def small_plan() -> Plan:
    """A head as a network of one unit, called once, in which nothing remains."""
    head = DINOHead(4, 6, hidden_dim=5, bottleneck_dim=3)
    student: Any = nn.Module()
    student.head, student.head_dense, student.srs, student.stage_depths = head, None, None, ()
    criterion = nn.Module()
    criterion.register_buffer("center", torch.zeros(1, 6))
    parameters, trainable = (
        sum(p.nbytes for p in head.parameters() if p.requires_grad or whole) for whole in (True, False)
    )
    return Plan(student, criterion, 2, parameters, trainable, flops=1e12, activations=0, checkpointed=0)


def test_collectives_and_memory_of_a_head() -> None:
    """Rows of 4, 5 and 3 floats and biases, padded to multiples of 2, and the fixed gains of 6 prototypes."""
    plan = small_plan()
    rows = [(5, 4), (5, 1), (5, 5), (5, 1), (3, 5), (3, 1), (6, 3)]
    trainable = 4 * sum(2 * -(-n // 2) * width for n, width in rows)
    gains = 4 * 6
    found = traffic.total(plan.collectives("hybrid", 8, 2))
    assert found == {
        ("all-gather", 2): 3 * (trainable + gains),
        ("reduce-scatter", 2): trainable,
        ("all-reduce", 4): trainable // 2,
        ("all-reduce", 2): 8 * len(rows),
        ("all-reduce", 8): 4 * 7,
    }
    whole = 4 * sum(n * width for n, width in rows)
    assert traffic.total(plan.collectives("DDP", 8, 2)) == {("all-reduce", 8): whole + 4 * 7}
    assert plan.memory(1) == 2 * (whole + gains) + 3 * whole
    assert plan.memory(2) == (5 * trainable + 2 * gains) / 2 + 2 * (trainable + gains)
    assert list(fsdp.units(plan.student)) == [plan.student.head]


def test_time_of_a_collective() -> None:
    """A ring within a node, across nodes, and eight that share a node's links; then a tree."""
    prompt = CLUSTER._replace(latency=0)
    assert prompt.seconds(Collective("all-gather", 8 * 10**9, 8)) == pytest.approx(7 / 200)
    assert prompt.seconds(Collective("all-gather", 16 * 10**9, 16)) == pytest.approx(15 / 50)
    assert prompt.seconds(Collective("all-reduce", 4 * 10**9, 4, spacing=8)) == pytest.approx(2 * 3 / (50 / 8))
    assert CLUSTER.seconds(Collective("all-reduce", 0, 1000)) == pytest.approx(20 * 5e-6)
    assert CLUSTER.seconds(Collective("reduce-scatter", 0, 1000)) == pytest.approx(999 * 5e-6)


def test_efficiency_without_and_with_overlap() -> None:
    half_a_second = [Collective("all-gather", 200 * 10**9, 2)]
    assert CLUSTER.efficiency(100e12, half_a_second) == pytest.approx((1 / 1.5, 1.0), rel=1e-4)
    assert CLUSTER.efficiency(25e12, half_a_second) == pytest.approx((1 / 3, 1 / 2), rel=1e-4)
    assert CLUSTER.efficiency(25e12, []) == (1.0, 1.0)


def test_operations_are_counted() -> None:
    with CountFlops() as counted:
        loss = (torch.ones(2, 3, requires_grad=True) @ torch.ones(3, 5)).sum()
        loss.backward()
    assert counted.total == 2 * (2 * 2 * 3 * 5)
