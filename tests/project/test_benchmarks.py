"""The benchmarks: both sides compute the same, and what they count is what happens."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers.runs import TINY_SWIN

from benchmarks import dataset, memory, roofline, sides, step, syncs, throughput
from benchmarks.plain import PlainRegionLoss, PlainSwinBlock
from benchmarks.rows import ROWS
from data.layouts.index_cache import CACHE_VARIABLE
from models.swin import SwinBlock
from ops.mlp import Mlp
from training.run_log import EpochMeter
from training.step import TrainStep

TINY = argparse.Namespace(batch=2, out_dim=32, local_crops=2)
FLAGS = ("--cfg", "experiments/demo/swin_micro.yaml", "--head_hidden_dim", "16", "--head_bottleneck_dim", "8")
NO_DROP_PATH = (*TINY_SWIN[:-1], "0.0")


def tiny_step(side: str, *flags: str, dense: bool = True) -> TrainStep:
    return sides.build_step(side, TINY, arch="swin", dense=dense, flags=(*FLAGS, *flags), overrides=NO_DROP_PATH)


@pytest.mark.parametrize("dense", [True, False], ids=["regions", "views"])
def test_plain_and_lean_steps_compute_the_same(dense: bool) -> None:
    """SGD would show it too, but the plain side has AdamW: two steps keep its division by tiny gradients small."""
    plain, lean = (tiny_step(side, dense=dense) for side in ("plain", "lean"))
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


def test_launches_of_multi_tensor_kernels() -> None:
    """One factor for each of ten tensors: ten; else by the number of tensors and of elements."""
    tensors, factors = [torch.ones(3) for _ in range(10)], torch.ones(10).unbind()
    assert syncs.count(lambda: torch._foreach_mul_(tensors, factors)).launches == {"_foreach_mul_": 10}
    assert syncs.count(lambda: torch._foreach_lerp_(tensors, tensors, list(factors))).launches == {"_foreach_lerp_": 10}
    assert syncs.count(lambda: torch._foreach_mul_(tensors, 2.0)).launches == {"_foreach_mul_": 1}
    assert syncs.count(lambda: torch._foreach_add_(tensors * 20, tensors * 20)).launches == {"_foreach_add_": 4}
    many = [torch.ones(1).expand(65536 * 400)]
    assert syncs.count(lambda: torch._foreach_norm(many)).launches == {"_foreach_norm": 2}


def test_launches_of_a_lean_step_are_counted_without_a_gpu() -> None:
    """The fake step takes CUDA's branches: one attention per block and crop size, and no loop over parameters."""
    build = {"arch": "swin", "flags": FLAGS, "overrides": NO_DROP_PATH}
    args = argparse.Namespace(batch=2, out_dim=32, local_crops=2)
    counts = syncs.count_launches("lean", args, True, **build)
    blocks = sum(isinstance(module, SwinBlock) for module in tiny_step("lean").method.student.modules())
    assert counts["_scaled_dot_product_efficient_attention"] == 3 * blocks
    assert counts["_foreach_lerp_"] == counts["_foreach_copy_"] == 0


def test_roofline_counts_work_and_attributes_it() -> None:
    """Work of one product to the byte; the parts of a step are all there, and add up to it."""
    a, b = torch.ones(2, 3), torch.ones(3, 4)
    with roofline.CountedWork(roofline.Peaks(1.0, 1.0)) as counted:
        a @ b
        a.mul_(2.0)
        a.copy_(torch.ones(1).expand(2, 3))
    assert counted.work.flops == 2 * 2 * 3 * 4
    assert counted.work.bytes == 4 * ((6 + 12 + 8) + (6 + 6) + 1 + (1 + 6))  # product, in place, a new number, copy
    lean, crops = tiny_step("lean"), sides.make_crops(2, 2)
    with roofline.CountedWork(roofline.Peaks(1.0, 1.0)) as counted:
        work = roofline.run_watched(lean, crops, lambda: counted.work)
    assert set(work) == set(roofline.PARTS)
    assert sum(part.flops for part in work.values()) == counted.work.flops
    forward, backward = (work[part].flops for part in (roofline.STUDENT, roofline.STUDENT_BACKWARD))
    assert 1.7 * forward < backward < 2.3 * forward


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
    assert syncs.get_args_parser().parse_args([]).batch == 32
    assert throughput.get_args_parser().parse_args([]).batch == [4]


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True], ids=["features", "training"])
def test_throughput_compares_networks_that_compute_the_same(backward: bool) -> None:
    """The smallest row that timm has; its features must be ours."""
    args = argparse.Namespace(precision="fp32", repeats=1, backward=backward)
    ours, theirs, difference = throughput.measure(ROWS["DeiT-S/16"], 1, args, torch.device("cpu"))
    assert ours > 0
    assert theirs is not None
    assert difference < 1e-4


def test_timm_makes_its_masks_once_for_each_size() -> None:
    settings = {
        "img_size": 32,
        "patch_size": 4,
        "window_size": 4,
        "embed_dim": 12,
        "depths": (2,),
        "num_heads": (2,),
        "num_classes": 0,
    }
    torch.manual_seed(0)
    network = timm.models.SwinTransformer(**settings, strict_img_size=False).eval()
    made = []
    block = network.layers[0].blocks[1]
    make = block.get_attn_mask

    def counted(x: torch.Tensor) -> torch.Tensor | None:
        made.append(x.shape)
        return make(x)

    block.get_attn_mask = counted
    images = [torch.randn(1, 3, size, size) for size in (32, 48, 32, 48)]
    expected = [network(image) for image in images]
    assert len(made) == 4
    sides.cache_masks(network)
    for image, features in zip(images, expected):
        torch.testing.assert_close(network(image), features, rtol=0, atol=0)
    assert len(made) == 6


@pytest.mark.slow
def test_index_of_each_layout_is_timed_and_weighed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice each, beside the plain list; workers add less than the target."""
    monkeypatch.setenv(CACHE_VARIABLE, "")  # which the program sets
    dataset.main(dataset.get_args_parser().parse_args(["--entries", "5000", "--folder", str(tmp_path)]))
    rows = re.findall(
        r"^(\w+), (.*?) +[\d.]+ s CPU time .* ([\d.]+) MB per further worker$", capsys.readouterr().out, re.M
    )
    starts = [
        (layout, start) for layout in ("files", "zip", "tsv", "shards") for start in ("first start", "second start")
    ]
    assert [row[:2] for row in rows] == [("files", "list of tuples"), *starts]
    assert all(float(megabytes) < dataset.TARGET for *_, megabytes in rows)
    assert not list(tmp_path.iterdir())


def test_the_plain_step_has_nothing_of_the_lean_one() -> None:
    plain = tiny_step("plain")
    modules = [module for name in ("student", "teacher") for module in getattr(plain.method, name).modules()]
    assert not [module for module in modules if type(module) in {Mlp, SwinBlock}]
    assert any(isinstance(module, PlainSwinBlock) for module in modules)
    assert type(plain.method.criterion) is PlainRegionLoss
