"""Checkpoint files: written atomically, read safely, and loaded in full or rejected with names."""

from __future__ import annotations

import argparse
import os
import pickle
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from yacs.config import CfgNode

from checkpoints import layouts, loading, serialization
from utils import UsageError


class Net(nn.Module):
    """A backbone of one layer with a head."""

    def __init__(self, width: int = 3, prototypes: int = 4, head: bool = True) -> None:
        super().__init__()
        self.body = nn.Linear(width, 2)
        self.norm = nn.BatchNorm1d(2)
        self.head: nn.Module = nn.Module() if head else nn.Identity()
        if head:
            last = nn.Module()
            last.weight_g = nn.Parameter(torch.ones(prototypes, 1))
            last.weight_v = nn.Parameter(torch.randn(prototypes, 2))
            self.head.last_layer = last


def full_checkpoint(net: nn.Module) -> dict[str, object]:
    """Return content as published: names with prefix and an argparse.Namespace."""
    state = loading.add_module_prefix(net.state_dict())
    return {"student": state, "teacher": state, "epoch": 3, "args": argparse.Namespace(arch="net", lr=0.1)}


def test_round_trip_with_published_namespace(tmp_path: Path) -> None:
    net = Net()
    serialization.save_file(full_checkpoint(net), tmp_path / "checkpoint.pth")
    content = serialization.load_file(tmp_path / "checkpoint.pth")
    assert content["args"].arch == "net"
    assert content["epoch"] == 3
    loaded = Net()
    report = loading.load_network(loaded, layouts.network_state(content, "teacher", "x"), "x")
    assert str(report) == "full checkpoint, key 'teacher': 9 tensors loaded, 0 of them resized, 0 left out"
    for name, value in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_backbone_ignores_heads_and_loads_bare_files(tmp_path: Path) -> None:
    net, headless = Net(), Net(head=False)
    serialization.save_file(full_checkpoint(net), tmp_path / "full.pth")
    report = loading.load_backbone(headless, tmp_path / "full.pth")
    assert (report.matched, report.left_out) == (7, 2)
    assert torch.equal(headless.body.weight, net.body.weight)
    serialization.save_file(Net(head=False).state_dict(), tmp_path / "bare.pth")
    assert loading.load_backbone(headless, tmp_path / "bare.pth").layout == "bare state dict"
    prototypes = dict(net.named_parameters())["head.last_layer.weight_v"]
    before = prototypes.detach().clone()
    loading.load_backbone(net, tmp_path / "bare.pth")
    assert torch.equal(prototypes, before)
    assert torch.equal(net.body.weight, headless.body.weight)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Net(width=5), r"body.weight has shape \(2, 3\), expected \(2, 5\)"),
        (Net(prototypes=6), "heads of 4 prototypes, this run of 6; set --out_dim 4"),
        (nn.Linear(3, 2), r"2 tensors are missing \(weight, bias\), 7 unexpected \(body.weight"),
    ],
    ids=["shape", "prototypes", "names"],
)
def test_mismatching_network_is_rejected_and_unchanged(net: nn.Module, message: str) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(UsageError, match=message):
        loading.load_network(net, layouts.network_state(Net().state_dict(), "teacher", "x"), "the file")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_error_of_a_missing_key_lists_the_existing_ones() -> None:
    with pytest.raises(UsageError, match=r"has no network 'teacher'; .* student"):
        layouts.network_state({"student": {}, "epoch": 1}, "teacher", "file.pth")
    with pytest.raises(UsageError, match="holds no tensors"):
        layouts.network_state({"epoch": 1}, "teacher", "file.pth")


class RunsCommand:
    """Runs a command when unpickled."""

    def __init__(self, command: str = "true") -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "picture", "list", "code", "missing", "folder"])
def test_damaged_and_foreign_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file.pth"
    serialization.save_file(full_checkpoint(Net()), path)
    whole = path.read_bytes()
    contents = {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"hello, this is no checkpoint",
        "picture": b"\x89PNG\r\n\x1a\n" + bytes(200),
        "code": pickle.dumps({"teacher": RunsCommand()}),
    }
    if kind == "list":
        torch.save([1, 2], path)
    elif kind == "missing":
        path.unlink()
    elif kind == "folder":
        path = tmp_path
    else:
        path.write_bytes(contents[kind])
    with pytest.raises(UsageError) as caught:
        serialization.load_file(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [serialization.load_file, lambda path: loading.load_backbone(Net(head=False), path)])
def test_flipped_bit_of_a_weight_is_detected_by_every_reader(tmp_path: Path, read: Callable[[Path], object]) -> None:
    path = tmp_path / "file.pth"
    net = Net()
    serialization.save_file(full_checkpoint(net), path)
    read(path)
    content = bytearray(path.read_bytes())
    place = content.index(net.body.weight.detach().numpy().tobytes()) + 2
    content[place] ^= 1
    path.write_bytes(bytes(content))
    torch.load(path, weights_only=False)  # torch does not detect it
    with pytest.raises(serialization.DamagedError, match=r"file\.pth' is damaged \(Bad CRC-32") as caught:
        read(path)
    assert str(caught.value).count(str(path)) == 1


def test_flipped_bit_of_a_single_tensor_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "trainfeat.pth"
    features = torch.randn(5, 3)
    serialization.save_file(features, path)
    content = bytearray(path.read_bytes())
    content[content.index(features.numpy().tobytes())] ^= 128
    path.write_bytes(bytes(content))
    with pytest.raises(serialization.DamagedError, match="Bad CRC-32"):
        serialization.load_tensor(path)


def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    net, before = Net(), torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(full_checkpoint(net), tmp_path / "file.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    loaded = Net(head=False)
    loading.load_backbone(loaded, tmp_path / "file.pth")
    assert torch.equal(loaded.body.weight, net.body.weight)


def test_file_that_cannot_be_mapped_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems refuse to map files; the error is torch's own, provoked by a file larger than the memory allowed."""
    net = Net()
    serialization.save_file(full_checkpoint(net), tmp_path / "file.pth")
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(2**40)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, limits[1]))
    try:
        with pytest.raises(RuntimeError) as refused:
            torch.UntypedStorage.from_file(str(large), False, 2**40)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)

    def refuse(*_: object) -> None:
        raise refused.value

    monkeypatch.setattr(torch.UntypedStorage, "from_file", refuse)
    state = serialization.load_file(tmp_path / "file.pth", mapped=True)["student"]
    assert torch.equal(state["module.body.weight"], net.body.weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_weights_are_neither_saved_nor_loaded(tmp_path: Path, value: float) -> None:
    net = Net()
    serialization.check_finite(student=net.state_dict())
    net.body.weight.data[1, 2] = value
    with pytest.raises(FloatingPointError, match=r"student\.body\.weight is not finite"):
        serialization.check_finite(teacher=Net().state_dict(), student=net.state_dict())
    serialization.save_file(full_checkpoint(net), tmp_path / "old.pth")
    loaded = Net(head=False)
    before = loaded.body.bias.clone()
    with pytest.raises(UsageError, match=r"old\.pth' has a weight that is not finite \(body\.weight\)"):
        loading.load_backbone(loaded, tmp_path / "old.pth")
    assert torch.equal(loaded.body.bias, before)


def test_files_of_swin_with_their_yacs_config(tmp_path: Path) -> None:
    """The config is read, but not if it contains code."""
    net, path = Net(), tmp_path / "swin.pth"
    config = CfgNode({"MODEL": {"TYPE": "swin", "SWIN": {"DEPTHS": [2, 2, 6, 2]}}, "DATA": {"IMG_SIZE": 224}})
    config.freeze()
    wrapped = {
        "model": net.state_dict(),
        "optimizer": {"state": {}},
        "max_accuracy": 81.2,
        "epoch": 299,
        "config": config,
    }
    torch.save(wrapped, path)
    loaded = Net()
    report = loading.load_backbone(loaded, path)
    assert str(report) == "wrapped state dict, key 'model': 9 tensors loaded, 0 of them resized, 0 left out"
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in net.state_dict().items())
    assert serialization.load_file(path)["config"]["MODEL"]["SWIN"]["DEPTHS"] == [2, 2, 6, 2]
    marker = tmp_path / "code has run"
    torch.save(wrapped | {"config": CfgNode({"MODEL": {"TYPE": 1}}) | {"CODE": RunsCommand(f"touch '{marker}'")}}, path)
    with pytest.raises(UsageError, match="refused for safety"):
        serialization.load_file(path)
    assert not marker.exists()


def test_code_is_never_run(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    torch.save({"teacher": RunsCommand()}, path)
    with pytest.raises(UsageError, match=r"refused for safety.*convert it once"):
        serialization.load_file(path)


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.pth"
    serialization.save_file({"epoch": 1}, path)

    def half_written(state: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half_written)
    with pytest.raises(OSError, match="disk full"):
        serialization.save_file({"epoch": 2}, path)
    monkeypatch.undo()
    assert serialization.load_file(path) == {"epoch": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pth"]
