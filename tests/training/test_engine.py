"""The step against the golden trajectory, and what it does with accumulation and with losses that are not finite."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, golden_json
from helpers.runs import TINY_RUN, TINY_SWIN, run_script, write_images
from helpers.step_runs import CPU, everything, random_views, spoiled, tiny
from torch import Tensor

import main_esvit
from benchmarks.golden import golden_step, golden_views
from data.loader import Batch
from training import engine, optim
from training.run_log import RunLog
from utils import UsageError


def test_golden_trajectory() -> None:
    """Six updates of the whole rule: losses, schedules and every tensor of both networks at the end."""
    golden = golden_json("trajectory_region_adamw")
    step = golden_step(CPU)
    method = step.method
    losses = [step([golden_views(i, CPU)], iteration=i, epoch=i // 3)["loss"].item() for i in range(6)]
    assert losses == pytest.approx(golden["losses"], rel=1e-4)
    assert list(step.schedules.lr) == pytest.approx(golden["lr_schedule"])
    assert list(step.schedules.weight_decay) == pytest.approx(golden["wd_schedule"])
    assert list(step.schedules.momentum) == pytest.approx(golden["momentum_schedule"])
    for network, name in ((method.student, "student_mean_abs"), (method.teacher, "teacher_mean_abs")):
        ours = {
            key: value.abs().mean().item() for key, value in network.state_dict().items() if value.is_floating_point()
        }
        assert ours == pytest.approx(golden[name], rel=2e-3)
    centers = {name: value.abs().mean().item() for name, value in method.criterion.state_dict().items()}
    assert centers["center"] == pytest.approx(golden["center_mean_abs"], rel=1e-3)
    assert centers["center_grid"] == pytest.approx(golden["center_grid_mean_abs"], rel=1e-3)


def test_accumulated_micro_batches_equal_one_batch() -> None:
    """Losses, centers and weights of 2 micro-batches of 2 images are those of one batch of 4."""
    whole_method, whole = tiny("--batch_size_per_gpu", "4")
    parts_method, parts = tiny("--batch_size_per_gpu", "2", "--accum_iter", "2")
    assert list(whole.schedules.lr) == list(parts.schedules.lr)
    for i in range(3):
        views = random_views(4, seed=i)
        loss = whole([views], i, 1)["loss"].item()
        halves = [[v[:2] for v in views], [v[2:] for v in views]]
        assert parts(halves, i, 1)["loss"].item() == pytest.approx(loss, rel=1e-5)
    for a, b in zip(whole_method.criterion.state_dict().values(), parts_method.criterion.state_dict().values()):
        torch.testing.assert_close(a, b)
    for network in ("student", "teacher"):
        ours, theirs = getattr(whole_method, network).state_dict(), getattr(parts_method, network).state_dict()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=2e-5)


def test_views_are_made_at_their_turn_and_forgotten_after_it() -> None:
    """No view is there when the next ones are made; numbers are those of views that were there before."""
    (eager_method, eager), (method, step) = tiny("--accum_iter", "3"), tiny("--accum_iter", "3")
    views: list[weakref.ref[Tensor]] = []
    alive = []

    def make(seed: int) -> list[Tensor]:
        alive.append(sum(view() is not None for view in views))
        made = random_views(4, seed)
        views.extend(map(weakref.ref, made))
        return made

    step([partial(make, i) for i in range(3)], 0, 1)
    assert alive == [0, 0, 0]
    assert not any(view() is not None for view in views)
    eager([random_views(4, i) for i in range(3)], 0, 1)
    expected, found = everything(eager_method, eager), everything(method, step)
    assert not [name for name in expected if not torch.equal(expected[name], found[name])]


def test_one_micro_batch_of_a_run_is_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of two micro-batches of four of 16 images; the picture shows the first one's views."""
    views_on, views, alive, pictured = Batch.views_on, [], [], []  # type: ignore[var-annotated]

    def watched(self: Batch, device: torch.device) -> list[Tensor]:
        alive.append(sum(view() is not None for view in views))
        made = [view.clone() for view in views_on(self, device)]
        views.extend(map(weakref.ref, made))
        return made

    monkeypatch.setattr(Batch, "views_on", watched)
    monkeypatch.setattr(RunLog, "save_crops", lambda self, views_of_batch: pictured.append(len(views)))
    flags = ["--data_path", str(write_images(tmp_path / "images", 16)), "--output_dir", str(tmp_path / "out")]
    command_line = [*TINY_RUN, *flags, "--epochs", "1", "--accum_iter", "2", *TINY_SWIN]
    main_esvit.main(main_esvit.get_args_parser().parse_args(command_line))
    assert alive == [0] * 4
    assert pictured[0] == 4  # views that were made until then


def test_prototypes_are_frozen_in_the_first_epoch() -> None:
    method, step = tiny()
    weights = dict(method.student.named_parameters())["head.last_layer.weight_v"]
    before = weights.detach().clone()
    step([random_views(4, 0)], 0, 0)
    assert torch.equal(weights, before)
    step([random_views(4, 1)], 1, 1)
    assert not torch.equal(weights, before)


@pytest.mark.parametrize("first", [0, 1], ids=["bad first step", "bad second step"])
@pytest.mark.parametrize("optimizer", optim.OPTIMIZERS)
def test_bad_step_in_the_middle_leaves_no_trace(optimizer: str, first: int) -> None:
    """Weights, moments, step counters, running statistics and centers end bit for bit as without that step."""
    flags = ["--optimizer", optimizer, "--use_bn_in_head", "on", "--momentum_teacher", "0.5"]
    (clean_method, clean), (method, step) = tiny(*flags), tiny(*flags)
    for i in range(3):
        if i == first:
            assert step([spoiled(random_views(4, 7))], i, min(i, 1))["skipped"] == 1
        # Epoch 0 freezes the prototypes, whose moments begin in epoch 1.
        assert [s([random_views(4, i)], i, min(i, 1))["skipped"].item() for s in (clean, step)] == [0, 0]
    expected, found = everything(clean_method, clean), everything(method, step)
    assert expected.keys() == found.keys()
    assert not [name for name in expected if not torch.equal(expected[name], found[name])]
    assert not [name for name in found if name.endswith("running_mean") and not torch.isfinite(found[name]).all()]


def test_step_that_is_not_finite_changes_nothing() -> None:
    method, step = tiny()
    step([random_views(4, 0)], 0, 1)
    before = everything(method, step)
    result = step([random_views(4, 2), spoiled(random_views(4, 1))], 1, 1)
    assert result["skipped"] == 1.0
    assert math.isnan(result["loss"])
    after = everything(method, step)
    assert all(torch.equal(before[name], after[name]) for name in before | after)
    assert step([random_views(4, 0)], 1, 1)["skipped"] == 0.0


@pytest.mark.slow
def test_two_processes_skip_together(tmp_path: Path) -> None:
    """Only the second process meets a value that is not finite; both keep everything as it was, and go on alike."""
    script = tmp_path / "skip.py"
    script.write_text(
        "import argparse, sys, torch\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "from distributed import collectives, launch\n"
        "from helpers.step_runs import everything, random_views, spoiled, tiny\n"
        "def main():\n"
        "    launch.init_processes(argparse.Namespace(device='cpu', dist_url='env://', dist_timeout=1, local_rank=None))\n"
        "    rank = collectives.get_rank()\n"
        "    method, step = tiny()\n"
        "    assert step([random_views(4, rank)], 0, 1)['skipped'] == 0\n"
        "    before = everything(method, step)\n"
        "    views = random_views(4, 5 + rank)\n"
        "    assert step([spoiled(views) if rank else views], 1, 1)['skipped'] == 1\n"
        "    after = everything(method, step)\n"
        "    assert all(torch.equal(before[name], after[name]) for name in before | after)\n"
        "    assert step([random_views(4, rank)], 1, 1)['skipped'] == 0\n"
        "    collectives.must_agree('weights', [value.tolist() for value in everything(method, step).values()])\n"
        "launch.run_script(main)\n"
    )
    result = run_script(str(script), processes=2)
    assert result.returncode == 0, result.stderr


def test_step_is_skipped_when_another_process_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decision is taken on the sum over processes, here of this one and of one whose gradients are not finite."""

    def with_a_bad_process(scalars: Tensor) -> Tensor:
        return scalars + torch.cat([scalars[:-1], torch.zeros(1)])

    method, step = tiny()
    before = [parameter.detach().clone() for parameter in method.student.parameters()]
    with monkeypatch.context() as patch:
        patch.setattr("distributed.collectives.get_world_size", lambda: 2)
        patch.setattr("distributed.collectives.all_reduce_sum", with_a_bad_process)
        assert step([random_views(4, 0)], 0, 1)["skipped"] == 1.0
    assert all(torch.equal(a, b) for a, b in zip(before, method.student.parameters()))
    assert step([random_views(4, 0)], 0, 1)["skipped"] == 0.0


def test_many_bad_steps_end_the_run_with_a_diagnosis(tmp_path: Path) -> None:
    _, step = tiny("--max_bad_steps", "2", "--output_dir", str(tmp_path))
    good, bad = {"loss": 1.0, "skipped": 0.0}, {"loss": math.nan, "skipped": 1.0}
    step.check([bad, good, bad], last_iteration=2)
    assert step.nonfinite.in_a_row == 1
    step.check([good, bad], last_iteration=4)
    with pytest.raises(FloatingPointError, match=r"2 steps in a row .*--precision fp32"):
        step.check([bad], last_iteration=3)  # they may lie on both sides of a reading


def test_run_of_bad_steps_ends_with_its_log_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four steps an epoch and a reading every two: the third bad step in a row is found after the fourth."""
    compute, calls = main_esvit.EsViT.compute_loss, []

    def spoil(self: main_esvit.EsViT, views: Sequence[Tensor], epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        calls.append(epoch)
        loss, terms = compute(self, views, epoch)
        return loss * math.nan, terms

    monkeypatch.setattr(main_esvit.EsViT, "compute_loss", spoil)
    flags = ["--data_path", str(write_images(tmp_path / "images", 16)), "--output_dir", str(tmp_path / "out")]
    command_line = [*TINY_RUN, *flags, "--epochs", "1", "--log_freq", "2", "--max_bad_steps", "3", *TINY_SWIN]
    with pytest.raises(FloatingPointError, match="3 steps in a row"):
        main_esvit.main(main_esvit.get_args_parser().parse_args(command_line))
    assert len(calls) == 4


@pytest.mark.parametrize(
    "flags", [[], ["--use_mixup", "on"], ["--local_crops_number", "0"]], ids=["plain", "mixup", "no locals"]
)
@pytest.mark.parametrize("dense", ["on", "off"])
def test_training_on_one_batch_lowers_the_loss(flags: list[str], dense: str) -> None:
    """With a fixed teacher and batch the student fits its targets; every flag combination must be able to learn."""
    method, step = tiny("--use_dense_prediction", dense, "--momentum_teacher", "1.0", "--lr", "0.2", *flags, steps=20)
    views = random_views(4, 0)[: method.criterion.ncrops]
    losses = [step([views], i, 1)["loss"].item() for i in range(20)]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_bf16_loss_is_close_to_fp32() -> None:
    _, plain = tiny()
    _, half = tiny()
    half.precision = "bf16"
    views = random_views(4, 0)
    loss, exact = half([views], 0, 1)["loss"].item(), plain([views], 0, 1)["loss"].item()
    assert loss == pytest.approx(exact, rel=2e-2)
    assert loss != exact  # the networks did compute in bf16


def test_gradient_scaling_changes_no_number() -> None:
    """The path of fp16, with its scaler switched on where float32 makes the outcome comparable."""
    plain_method, plain = tiny()
    scaled_method, scaled = tiny()
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i in range(2):
        views = random_views(4, i)
        assert scaled([views], i, 1)["loss"].item() == pytest.approx(plain([views], i, 1)["loss"].item(), rel=1e-5)
    for a, b in zip(plain_method.student.parameters(), scaled_method.student.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    overflow = [view * float("inf") for view in random_views(4, 2)]
    assert scaled([overflow], 2, 1)["skipped"] == 1.0
    assert scaled.scaler.get_scale() == 512.0


@pytest.mark.slow
def test_compiled_step_is_the_plain_one() -> None:
    """Losses and weights agree to rounding, and names in the state dicts are the same."""
    (eager_method, eager), (method, step) = tiny(), tiny("--compile")
    for i in range(2):
        views = random_views(4, i)
        assert step([views], i, 1)["loss"].item() == pytest.approx(eager([views], i, 1)["loss"].item(), rel=1e-5)
    for network in ("student", "teacher"):
        expected, found = getattr(eager_method, network).state_dict(), getattr(method, network).state_dict()
        assert list(found) == list(expected)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4, msg=name)


def test_compile_and_checkpointing_exclude_each_other() -> None:
    args = main_esvit.get_args_parser().parse_args(["--compile", "--grad_checkpointing", "on"])
    with pytest.raises(UsageError, match="turn one of them off"):
        main_esvit.check_args(args)


def test_steps_per_epoch_needs_one_step() -> None:
    assert engine.steps_per_epoch(7, 3) == 2
    with pytest.raises(UsageError, match="--accum_iter 8"):
        engine.steps_per_epoch(7, 8)
