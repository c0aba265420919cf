"""Checkpoints of the released programs (golden/genuine) are loaded and resumed: features, next losses and weights agree.

Damaged files and fields of wrong types are rejected by name, and nothing is overwritten.
"""

from __future__ import annotations

import argparse
import json
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import relative_error
from helpers.genuine_runs import GENUINE, NAMES, STEPS, GenuineRun, probe_images
from torch import nn

from checkpoints import layouts, loading, serialization
from models import build_model
from training import checkpointing
from utils import UsageError

FEATURES, LOSS, WEIGHTS = 1e-5, 1e-5, 1e-4  # largest relative errors
NO_GRADIENT = ("qkv.bias", "attn_mask")  # biases of keys do not change attention: their gradient is rounding error


def after(run: GenuineRun, who: str) -> dict[str, float]:
    """Return mean absolute values of the program's tensors after its last step."""
    names = json.loads(str(run.golden[f"after/{who}/names"]))
    return dict(zip((name.removeprefix("module.") for name in names), run.golden[f"after/{who}/mean_abs"]))


def assert_same_numbers(run: GenuineRun, scalars: list[dict[str, float]], network: nn.Module, who: str) -> None:
    """Compare the ten losses, their terms, and the mean absolute value of every parameter afterwards."""
    np.testing.assert_allclose([step["loss"] for step in scalars], run.golden["loss"], rtol=LOSS)
    for key in [key for key in run.golden if key.startswith("terms/")]:
        np.testing.assert_allclose([step[key.removeprefix("terms/")] for step in scalars], run.golden[key], rtol=LOSS)
    theirs = after(run, who)
    published = serialization.load_file(run.path)[who]
    names = layouts.parameter_names(network, published)
    ours = dict(network.named_parameters())
    compared = {name.removeprefix("module."): ours[our_name] for name, our_name in names.items() if our_name}
    assert len(compared) == len(ours)
    for name, parameter in compared.items():
        if theirs[name] > 1e-9 and not name.endswith(NO_GRADIENT):
            assert parameter.double().abs().mean().item() == pytest.approx(theirs[name], rel=WEIGHTS), name


@pytest.mark.parametrize("key", ["teacher", "student"])
@pytest.mark.parametrize("name", NAMES)
def test_features(name: str, key: str) -> None:
    run = GenuineRun(name)
    network = build_model(run.args.arch, run.config, is_teacher=True, patch_size=run.args.patch_size).eval()
    if run.program == "udi":
        network.choose_token("both")
    report = loading.load_backbone(network, run.path, key)
    own = network.state_dict().items()
    assert report.matched == sum(t.numel() > 0 and not name.endswith(layouts.DERIVED) for name, t in own)
    with torch.no_grad():
        ours = network(probe_images())
    theirs = run.golden[f"features/{key}"]
    if run.program == "udi":
        theirs = theirs.reshape(ours.shape)  # both class tokens
    assert relative_error(ours, theirs) < FEATURES


@pytest.mark.parametrize("name", NAMES)
def test_next_ten_losses(name: str, tmp_path: Path) -> None:
    run = GenuineRun(name)
    step, position = run.resume_in(tmp_path)
    assert (position.epoch, position.steps, position.is_new) == (int(run.golden["saved"]), 0, False)
    scalars = run.train(step, position.epoch, int(run.golden["epochs"]))
    assert len(scalars) == 10
    assert_same_numbers(run, scalars, step.method.student, "student")
    if "lr" in run.golden:
        np.testing.assert_allclose(step.schedules.lr[-10:], run.golden["lr"])
        np.testing.assert_allclose(step.schedules.weight_decay[-10:], run.golden["weight_decay"])


@pytest.mark.parametrize("name", NAMES)
def test_losses_differ_without_moments(name: str, tmp_path: Path) -> None:
    """The agreement of the losses depends on the moments."""
    run = GenuineRun(name)
    step, position = run.resume_in(tmp_path)
    for moments in step.optimizer.state.values():
        for moment in moments.values():
            moment.zero_()
    scalars = run.train(step, position.epoch, position.epoch + 1)
    errors = [abs(ours["loss"] / theirs - 1) for ours, theirs in zip(scalars, run.golden["loss"])]
    assert max(errors) > 1e-3


def test_run_is_continued_in_a_new_folder(tmp_path: Path) -> None:
    """`--pretrained_weights_ckpt` continues at the epoch of the file with its moments and centers."""
    run = GenuineRun("esvit_swin_vr", "--pretrained_weights_ckpt", str(GENUINE / "esvit_swin_vr.pth"))
    step = run.build_step()
    position = checkpointing.continue_run(run.path, partial(step.load_state_dict, extend=True), run.args)
    assert (position.epoch, position.is_new) == (2, False)
    scalars = run.train(step, position.epoch, 3)
    np.testing.assert_allclose([numbers["loss"] for numbers in scalars], run.golden["loss"][:STEPS], rtol=LOSS)


def test_saved_again_moments_are_found_by_name(tmp_path: Path) -> None:
    """In any order, and the resumed run is bit-identical."""
    run = GenuineRun("dino_vit")
    step, position = run.resume_in(tmp_path)
    run.train(step, 2, 3)
    path = tmp_path / checkpointing.CHECKPOINT
    assert not checkpointing.save_run(path, step, checkpointing.RunPosition(3), run.args, run.config)
    whole = run.train(step, 3, 4)
    content = serialization.load_file(tmp_path / "checkpoint.pth")
    groups = content["optimizer"]["param_groups"]
    student = dict(step.method.student.named_parameters())
    assert sorted(name for group in groups for name in group["param_names"]) == sorted(student)
    for group in groups:  # as if a later version declared its layers in another order
        group["params"].reverse()
        group["param_names"].reverse()
    torch.save(content, tmp_path / "reversed.pth")
    again, position = run.resume_in(tmp_path, tmp_path / "reversed.pth")
    assert position.epoch == 3
    assert run.train(again, 3, 4) == whole


def rewritten(path: Path, old: bytes, new: bytes, out: Path) -> Path:
    """Write the checkpoint with other bytes in its pickle."""
    with zipfile.ZipFile(path) as records, zipfile.ZipFile(out, "w") as copy:
        for record in records.namelist():
            content = records.read(record)
            if record.endswith("data.pkl"):
                assert old in content
                content = content.replace(old, new)
            copy.writestr(record, content)
    return out


def test_older_spelling_of_numpy(tmp_path: Path) -> None:
    """numpy 1 names the constructor of scalars differently."""
    old = rewritten(GENUINE / "dino_vit.pth", b"numpy._core.multiarray", b"numpy.core.multiarray", tmp_path / "old.pth")
    group = serialization.load_file(old)["optimizer"]["param_groups"][0]
    assert group["lr"] == serialization.load_file(GENUINE / "dino_vit.pth")["optimizer"]["param_groups"][0]["lr"]
    values = [
        np.float16(0.5),
        np.float32(0.1),
        np.float64(0.1),
        np.int64(-3),
        np.int32(7),
        np.uint8(200),
        np.bool_(True),
    ]
    torch.save({"values": values}, tmp_path / "scalars.pth")
    read = serialization.load_file(tmp_path / "scalars.pth")["values"]
    assert [(value.dtype, value) for value in read] == [(value.dtype, value) for value in values]


class RunsCode:
    """Calls a function when unpickled."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize(
    "value",
    [
        np.zeros(3),
        np.array([{}], dtype=object),
        np.datetime64("2020-01-01"),
        np.str_("x"),
        RunsCode(np.fromstring, "1"),
        RunsCode(print, "executed"),
        RunsCode(Path.touch, Path("executed")),
    ],
    ids=["array", "objects", "date", "text", "numpy function", "print", "touch"],
)
def test_other_types_of_numpy_and_python_are_rejected(
    value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"teacher": {}, "args": argparse.Namespace(x=value)}, tmp_path / "file.pth")
    with pytest.raises(UsageError, match=r"file\.pth"):
        serialization.load_file(tmp_path / "file.pth")
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.99, 0.9999])
def test_truncated_files_are_rejected(share: float, tmp_path: Path) -> None:
    content = (GENUINE / "dino_vit.pth").read_bytes()
    (tmp_path / "checkpoint.pth").write_bytes(content[: int(share * len(content))])
    run = GenuineRun("dino_vit")
    with pytest.raises(UsageError, match=r"checkpoint\.pth"):
        serialization.load_file(tmp_path / "checkpoint.pth")
    with pytest.raises(UsageError, match=r"checkpoint\.pth"):
        checkpointing.resume_run(tmp_path / checkpointing.CHECKPOINT, run.build_step().load_state_dict, run.args)


def change(content: dict[str, Any], where: str, value: Any) -> None:
    """Set the value at a path of keys and positions; a function is applied to the old value."""
    *path, last = where.split("/")
    inside: Any = content
    for part in path:
        inside = inside[int(part) if part.isdigit() else part]
    key: Any = int(last) if last.isdigit() else last
    inside[key] = value(inside[key]) if callable(value) else value


WRONG = [
    ("epoch", "2", "epoch"),
    ("epoch", -1, "epoch"),
    ("epoch", None, "epoch"),
    ("args", {"optimizer": "adamw"}, "args"),
    ("args", argparse.Namespace(optimizer=7), "--optimizer 7"),
    ("args", argparse.Namespace(lr=torch.zeros(3)), "args"),
    ("student", [], "student"),
    ("teacher", torch.zeros(3), "teacher"),
    ("optimizer", [], "optimizer"),
    ("optimizer", {}, "optimizer"),
    ("optimizer/state", None, "optimizer"),
    ("optimizer/param_groups", None, "optimizer"),
    ("optimizer/param_groups", [], "optimizer"),
    ("optimizer/param_groups/0/params", 5, "optimizer"),
    ("optimizer/param_groups/0/params", lambda numbers: numbers[:-2], "parameters"),
    ("optimizer/state/3", [1, 2], "optimizer"),
    ("optimizer/state/3/exp_avg", lambda moment: moment[:-1], "patch_embed.proj.bias|patch_embed.proj.weight|blocks"),
    ("optimizer/state/3/exp_avg_sq", torch.zeros(()), "exp_avg_sq"),
    ("optimizer/state/3/exp_avg", "x", "exp_avg"),
    ("optimizer/state/3/step", torch.zeros(4), "step"),
    ("optimizer/state/3", lambda moments: {"mu": moments["exp_avg"]}, "mu"),
    ("dino_loss", [1], "dino_loss"),
    ("dino_loss/center", torch.zeros(1, 63), "center"),
    ("dino_loss/center", "x", "center"),
    ("rng", 5, "rng"),
    ("rng", [5], "rng"),
    ("rng", [{"python": 1}], "rng"),
    ("in_epoch", [], "in_epoch"),
    ("in_epoch", {"steps": "a", "images": 4, "meter": {}}, "in_epoch"),
    ("in_epoch", {"steps": 1}, "in_epoch"),
    ("in_epoch", {"steps": 1, "images": 4, "meter": {"sums": {"loss": 3}}}, "in_epoch"),
    ("monitor", [3], "monitor"),
    ("monitor", {"view/rank": "x"}, "monitor"),
    ("bad_steps_in_a_row", "3", "bad_steps_in_a_row"),
    ("unreadable", "x", "unreadable"),
    ("fp16_scaler", [1], "fp16_scaler"),
    ("config", 3, "config"),
]


@pytest.mark.parametrize(
    ("where", "value", "named"), WRONG, ids=[f"{where}-{i}" for i, (where, *_) in enumerate(WRONG)]
)
def test_wrong_fields_are_named(where: str, value: Any, named: str, tmp_path: Path) -> None:
    run = GenuineRun("dino_vit")
    content = serialization.load_file(run.path)
    change(content, where, value)
    torch.save(content, tmp_path / "checkpoint.pth")
    before = (tmp_path / "checkpoint.pth").read_bytes()
    with pytest.raises(UsageError, match=named):
        checkpointing.resume_run(tmp_path / checkpointing.CHECKPOINT, run.build_step().load_state_dict, run.args)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pth"]
    assert (tmp_path / "checkpoint.pth").read_bytes() == before
