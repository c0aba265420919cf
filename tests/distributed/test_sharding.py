"""Networks sharded over processes: same results as whole networks, and checkpoints that either can resume."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import TINY_RUN, TINY_SWIN, run_script, write_images
from torch import nn
from torch.utils._pytree import tree_leaves

import main_esvit
from checkpoints import serialization, sharded
from distributed import fsdp
from models.heads import DINOHead
from training import checkpointing, optim
from utils import UsageError

CASES = ("swin", "vit, fp16", "vil", "cvt", "cvt, recomputed", "resnet", "swin, BatchNorm in heads", "swin, LARS")
# The schedules depend on --epochs: flat, a shorter first part is the same run.
FLAT = ["--min_lr", str(0.01 * 4 / 256), "--weight_decay_end", "0.04", "--momentum_teacher", "1"]


def train(out: Path, images: Path, *flags: str, processes: int = 2, batch: int = 2, epochs: int = 2) -> dict[str, Any]:
    """Run the script without stochastic depth, which draws per process, and return its last checkpoint."""
    line = [*TINY_RUN, "--clip_grad", "0.3", "--epochs", str(epochs), "--batch_size_per_gpu", str(batch), *flags]
    line += ["--data_path", str(images), "--output_dir", str(out), *TINY_SWIN[:-1], "0.0"]
    result = run_script("main_esvit.py", *line, processes=processes)
    assert result.returncode == 0, result.stderr
    return serialization.load_file(out / "checkpoint.pth")


def losses_of(run: Path) -> list[float]:
    return [json.loads(line)["train_loss"] for line in (run / "log.txt").open()]


def knn_of(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "log.txt").open()]
    return [{name: value for name, value in line.items() if name.startswith("knn")} for line in lines]


def assert_close(one: dict[str, Any], two: dict[str, Any], tolerance: float) -> None:
    """Compare networks and centers, with names in the same order."""
    for part in ("student", "teacher", "dino_loss"):
        assert list(one[part]) == list(two[part])
        for name, value in one[part].items():
            torch.testing.assert_close(two[part][name], value, rtol=tolerance, atol=tolerance, msg=f"{part} {name}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--optimizer", "sgd", "--lr", "1.0"],
        ["--optimizer", "sgd", "--lr", "1.0", "--accum_iter", "2", "--freeze_last_layer", "0"],
        ["--optimizer", "sgd", "--lr", "1.0", "--grad_checkpointing", "on", "--norm_last_layer", "off"],
        ["--use_dense_prediction", "off", "--plain_loss", "on", "--freeze_last_layer", "0"],
    ],
    ids=str,
)
def test_sharded_training_equals_whole_networks(tmp_path: Path, flags: list[str]) -> None:
    """Losses, weights, centers and teacher after two epochs, and the layout of the files."""
    images = write_images(tmp_path / "images", 17)
    if "--accum_iter" in flags:  # nine labeled images: one process has three batches of them, the other two
        labeled = write_images(tmp_path / "labeled", 3, classes=3)
        flags = ["--knn_every", "1", "--knn_data_path", str(labeled), *flags]
    flags = ["--momentum_teacher", "0.9", *flags]
    whole = train(tmp_path / "whole", images, *flags)
    shards = train(tmp_path / "shards", images, "--fsdp", *flags)
    assert losses_of(tmp_path / "shards") == pytest.approx(losses_of(tmp_path / "whole"), rel=1e-6, abs=1e-6)
    assert knn_of(tmp_path / "shards") == knn_of(tmp_path / "whole")
    assert_close(whole, shards, 1e-6 if "sgd" in flags else 1e-5)  # Adam divides rounding errors by their own size
    assert whole["optimizer"]["state"].keys() == shards["optimizer"]["state"].keys()
    for number, state in whole["optimizer"]["state"].items():
        for name, value in state.items():
            assert shards["optimizer"]["state"][number][name].shape == value.shape


@pytest.mark.slow
def test_every_architecture_beside_its_whole_self() -> None:
    """Mixup, micro-batches, BatchNorm, LARS, fp16 and its scaler, and a step that one process alone finds not finite."""
    result = run_script("tests/soak/side_by_side.py", processes=2, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"{case}: equal" for case in CASES]


@pytest.mark.slow
def test_hybrid_sharding_equals_whole_networks() -> None:
    """Two replicas of two shards each: clipping by whole norms, LARS, and statistics of BatchNorm."""
    cases = ["swin", "cvt", "swin, LARS"]
    result = run_script("tests/soak/side_by_side.py", "--group", "2", *cases, processes=4, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"{case}: equal" for case in cases]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_bytes_sent_are_those_predicted(processes: int) -> None:
    result = run_script("tests/soak/count_traffic.py", processes=processes, timeout=300)
    assert result.returncode == 0, result.stderr
    counted = ["DDP", "--fsdp", "--fsdp --fsdp_group 2"][: 2 if processes == 2 else 3]
    assert result.stdout.splitlines() == [f"{name}: as predicted" for name in counted]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [(["--fsdp"], []), ([], ["--fsdp"]), (["--fsdp"], ["--fsdp"])],
    ids=["shards, whole", "whole, shards", "shards, shards"],
)
def test_checkpoints_are_resumed_with_and_without_fsdp(tmp_path: Path, before: list[str], after: list[str]) -> None:
    """One epoch each way equals two epochs in one run."""
    images = write_images(tmp_path / "images", 17)
    flags = [*FLAT, "--freeze_last_layer", "0"]
    whole = train(tmp_path / "whole", images, *flags)
    train(tmp_path / "parts", images, *flags, *before, epochs=1)
    parts = train(tmp_path / "parts", images, *flags, *after)
    assert parts["epoch"] == 2
    assert_close(whole, parts, 1e-5)


@pytest.mark.slow
def test_one_process_resumes_a_sharded_run(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 17)
    before = train(tmp_path, images, "--fsdp", epochs=1)
    after = train(tmp_path, images, processes=0, batch=4)
    assert (before["epoch"], after["epoch"]) == (1, 2)
    assert (before["world_size"], after["world_size"]) == (2, 1)


@pytest.mark.slow
def test_another_group_resumes_a_hybrid_run(tmp_path: Path) -> None:
    """An epoch with two replicas of two shards, then one with four shards, equals two epochs of one process."""
    images = write_images(tmp_path / "images", 16)
    flags = [*FLAT, "--freeze_last_layer", "0"]
    whole = train(tmp_path / "whole", images, *flags, processes=1, batch=4)
    train(tmp_path / "parts", images, *flags, "--fsdp", "--fsdp_group", "2", processes=4, batch=1, epochs=1)
    parts = train(tmp_path / "parts", images, *flags, "--fsdp", processes=4, batch=1)
    assert_close(whole, parts, 1e-5)


@pytest.mark.slow
def test_shards_are_written_tensor_by_tensor(tmp_path: Path) -> None:
    """The main process never holds the whole state, and a full disk stops no process."""
    result = run_script("tests/soak/write_shards.py", str(tmp_path), processes=2, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"check_{what}: holds" for what in ("memory", "full_disk", "copies")]


def test_file_written_tensor_by_tensor_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    state = {
        "args": argparse.Namespace(arch="swin"),
        "networks": OrderedDict(a=torch.randn(3, 70), scalar=torch.tensor(2.5), empty=torch.empty(0, 4)),
        "moments": [torch.randn(5).bfloat16(), torch.tensor([True, False]), torch.randn(4, 6).t()],
        "epoch": 7,
    }
    path = tmp_path / "checkpoint.pth"
    tensors = [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)]
    # In a process of its own: fake tensors start threads of autograd, after which no fork could compute gradients.
    writer = multiprocessing.get_context("fork").Process(target=sharded.write, args=(state, iter(tensors), path))
    writer.start()
    writer.join()
    loaded = serialization.load_file(path)
    assert (loaded["epoch"], loaded["args"], type(loaded["networks"])) == (7, state["args"], OrderedDict)
    read = [leaf for leaf in tree_leaves(loaded) if isinstance(leaf, torch.Tensor)]
    for one, two in zip(read, tensors, strict=True):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        filled = [record for record in archive.infolist() if record.file_size]
    content = bytearray(path.read_bytes())
    for record in filled:  # after the content, for programs that read a file from its start
        assert record.CRC
        assert sharded.DESCRIPTOR + record.CRC.to_bytes(4, "little") in content
    content[content.index(tensors[0].numpy().tobytes())] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(serialization.DamagedError):
        serialization.load_file(path)


def test_a_gather_that_fails_is_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends the run: another gather would meet that of another tensor in the other processes."""
    asked = []

    def fail_at_two(tensor: torch.Tensor) -> torch.Tensor:
        asked.append(int(tensor))
        if tensor == 2:
            raise RuntimeError("out of memory")
        return tensor

    monkeypatch.setattr(fsdp, "is_sharded", lambda tensors: True)
    monkeypatch.setattr(fsdp, "full_tensor", fail_at_two)
    monkeypatch.setattr(sharded, "write", lambda state, tensors, path: list(tensors))
    state = {str(number): torch.tensor(number) for number in range(5)}
    with pytest.raises(RuntimeError, match="out of memory"), sharded.gathered(state) as tensors:
        checkpointing.write(state, tmp_path / "checkpoint.pth", 1, tensors)
    assert asked == [0, 1, 2]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--fsdp", "--compile"], "--fsdp and --compile do not work together"),
        (["--fsdp_group", "2"], "--fsdp_group 2 .* --fsdp"),
        (["--fsdp", "--fsdp_group", "1"], "--fsdp_group 1 shards nothing"),
    ],
    ids=str,
)
def test_incompatible_flags_are_rejected(flags: list[str], words: str) -> None:
    args = main_esvit.get_args_parser().parse_args(flags)
    with pytest.raises(UsageError, match=words):
        main_esvit.check_args(args)


@pytest.mark.parametrize("group", [4, 5, 12])
def test_group_that_does_not_divide_the_processes_is_rejected(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distributed.collectives.get_world_size", lambda: 6)
    with pytest.raises(UsageError, match=f"--fsdp_group {group} .* 6 processes .* 2, 3, 6"):
        fsdp.build_mesh("cpu", group)


def test_one_process_is_rejected() -> None:
    network: Any = DINOHead(4, 8)
    with pytest.raises(UsageError, match="--fsdp needs several processes"):
        fsdp.shard_networks(network, network, torch.device("cpu"))


def test_functions_return_whole_tensors_unchanged() -> None:
    network = nn.Linear(2, 3)
    optimizer = optim.build_optimizer("adamw", optim.param_groups(network))
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert fsdp.full_tensor(network.weight) is network.weight
    assert fsdp.shard_like(network.weight, network.bias) is network.bias
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    torch.testing.assert_close(fsdp.norms(gradients), torch.stack([g.norm() for g in gradients]))
