"""UDI's published files load into backbone, SRS and head, what does not match is refused in words; exports of two class tokens."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
from conftest import ROOT
from fill import fill_
from helpers.runs import run_script
from helpers.small_networks import small_network
from torch import Tensor, nn

import export
import hubconf
from checkpoints import loading, serialization
from config.loading import load_config
from models import Backbone
from models.heads import DINOHead
from models.srs import SRS
from utils import UsageError

TWO = ("MODEL.SPEC.NUM_CLS_TOKENS", "2", "MODEL.SPEC.POS_RESIZE", "scale")


def two_tokens(filled: bool = True, beside: bool = False) -> Backbone:
    """A small ViT with two class tokens, with SRS and a head `beside` it if wanted."""
    network = small_network("vit", *TWO).eval()
    if beside:
        network.srs = SRS(24, 2)
        network.head = DINOHead(24, 16, hidden_dim=12, bottleneck_dim=8)
    if filled:
        fill_(network.state_dict())
    return network


def published(network: Backbone, prefix: str = "") -> dict[str, Tensor]:
    """The state of a whole network as UDI's files spell it: two prefixes of a backbone, one head three times."""
    srs = {"norm.": "backbone.norm1.", "out_norm.": "backbone.attn.norm.", "qkv.": "backbone.attn.qkv."}
    srs |= {"proj.": "backbone.attn.proj."}
    state: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        if name.startswith("head."):
            state |= {f"{prefix}head.{level}.{name.removeprefix('head.')}": tensor for level in range(3)}
        elif name.startswith("srs."):
            old = next(old for old in srs if name.removeprefix("srs.").startswith(old))
            state[prefix + srs[old] + name.removeprefix(f"srs.{old}")] = tensor
        else:
            state[f"{prefix}backbone.backbone.{name}"] = tensor
    return state


def saved(network: Backbone, path: Path) -> Path:
    """A file as published, with its Namespace and centers."""
    content = {
        "student": published(network, "module."),
        "teacher": published(network),
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 300,
        "args": argparse.Namespace(arch="vit_small", number_cls_token=2),
        "udi_loss": {"centering.center": torch.zeros(3, 16), "centering.count": torch.zeros(3, 1)},
    }
    torch.save(content, path)
    return path


def test_the_published_names_are_those_of_the_specification() -> None:
    """One of each kind, so that what the other tests load is not merely what they made up."""
    names = published(two_tokens(beside=True)).keys()
    assert {
        "backbone.backbone.cls_token", "backbone.backbone.blocks.2.mlp.fc2.bias", "backbone.backbone.norm.weight",
        "backbone.norm1.weight", "backbone.attn.qkv.weight", "backbone.attn.proj.bias", "backbone.attn.norm.bias",
        "head.0.mlp.0.weight", "head.2.mlp.4.bias", "head.1.last_layer.weight_g", "head.1.last_layer.weight_v",
    } <= names  # fmt: skip
    assert not any(name.startswith(("srs.", "head.mlp", "head.last")) for name in names)


@pytest.mark.parametrize("key", ["teacher", "student"])
def test_a_published_file_loads_with_nothing_missing_and_nothing_unexpected(key: str, tmp_path: Path) -> None:
    """Whole networks take backbone, SRS and the one head; backbones leave the other two out."""
    theirs = two_tokens(beside=True)
    path = saved(theirs, tmp_path / "checkpoint.pth")
    whole = two_tokens(filled=False, beside=True)
    report = loading.load_backbone(whole, path, key)
    assert report == ("full checkpoint of UDI", key, len(theirs.state_dict()), 0, 0, (), ())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(whole.state_dict()[name], tensor), name
    bare = two_tokens(filled=False)
    report = loading.load_backbone(bare, path, key)
    assert (report.matched, report.left_out) == (len(bare.state_dict()), len(theirs.state_dict()) - report.matched)
    images = torch.randn(2, 3, 64, 64)
    theirs.head = nn.Identity()
    assert torch.equal(bare(images), theirs(images))


def test_files_of_this_project_load_with_what_lies_beside_the_backbone(tmp_path: Path) -> None:
    theirs, bare = two_tokens(beside=True), two_tokens(filled=False)
    content = {"student": loading.add_module_prefix(theirs.state_dict()), "teacher": theirs.state_dict(), "epoch": 1}
    serialization.save_file(content, tmp_path / "checkpoint.pth")
    for key in ("teacher", "student"):
        loading.load_backbone(bare, tmp_path / "checkpoint.pth", key)
        assert torch.equal(bare.state_dict()["cls_token"], theirs.state_dict()["cls_token"])
        whole = two_tokens(filled=False, beside=True)
        loading.load_backbone(whole, tmp_path / "checkpoint.pth", key)
        assert torch.equal(whole.state_dict()["srs.qkv.weight"], theirs.state_dict()["srs.qkv.weight"])


def refusal(network: Backbone, state: dict[str, Tensor], tmp_path: Path) -> str:
    """Why a network does not take a state, and leaves itself as it was."""
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    torch.save({"teacher": state, "student": {}}, tmp_path / "file.pth")
    with pytest.raises(UsageError) as caught:
        loading.load_backbone(network, tmp_path / "file.pth")
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    return str(caught.value)


def test_one_class_token_is_not_two(tmp_path: Path) -> None:
    state = published(two_tokens(beside=True))
    words = refusal(small_network("vit"), state, tmp_path)
    assert words.endswith("; set MODEL.SPEC.NUM_CLS_TOKENS 2")
    words = refusal(two_tokens(), small_network("vit").state_dict(), tmp_path)
    assert words.endswith("; set MODEL.SPEC.NUM_CLS_TOKENS 1")


def test_names_that_do_not_match_are_told_and_nothing_is_left_random(tmp_path: Path) -> None:
    """Nothing of the encoder matched in the published fine-tuning with a wrong prefix, and it only warned."""
    state = published(two_tokens(beside=True))
    less = {name: tensor for name, tensor in state.items() if "backbone.backbone.blocks.1" not in name}
    assert "12 tensors are missing (blocks.1." in refusal(two_tokens(), less, tmp_path)
    without = {name: tensor for name, tensor in state.items() if not name.startswith("backbone.attn.")}
    assert "6 tensors are missing (srs.qkv.weight, " in refusal(two_tokens(beside=True), without, tmp_path)
    more = state | {"backbone.surprise": torch.zeros(1)}
    assert "1 unexpected (backbone.surprise)" in refusal(two_tokens(), more, tmp_path)


def test_heads_that_differ_are_not_taken_for_one(tmp_path: Path) -> None:
    """They load where there is one for each level, and a backbone leaves them out."""
    state = published(two_tokens(beside=True))
    state["head.2.mlp.0.bias"] = state["head.2.mlp.0.bias"] + 1
    assert "8 tensors are missing (head.mlp.0.weight, " in refusal(two_tokens(beside=True), state, tmp_path)
    several = two_tokens(filled=False, beside=True)
    several.head = nn.ModuleList(DINOHead(24, 16, hidden_dim=12, bottleneck_dim=8) for _ in range(3))
    report = loading.load_backbone(several, tmp_path / "file.pth")
    assert (report.matched, report.left_out) == (len(several.state_dict()), 0)
    assert torch.equal(several.state_dict()["head.2.mlp.0.bias"], state["head.2.mlp.0.bias"])
    assert loading.load_backbone(two_tokens(), tmp_path / "file.pth").left_out == 3 * 8 + 8


# --------------------------------------------------------------------------- export


def exported(network: Backbone, target: str, path: Path, kept: int | None = None) -> Path:
    export.drop_class_tokens(network, kept)
    export.write(network, target, path, load_config(None, ["MODEL.IMAGE_SIZE", "64"]))
    return path


def timms(**settings: int | bool | str) -> nn.Module:
    return timm.models.vision_transformer.VisionTransformer(
        img_size=64, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=0, **settings
    ).eval()


@torch.no_grad()
def test_timm_computes_the_same_with_both_tokens(tmp_path: Path) -> None:
    """The second class token is a register token there, and comes back as what it was."""
    ours, theirs = two_tokens(), timms(reg_tokens=1, no_embed_class=False)
    state = torch.load(exported(ours, "timm", tmp_path / "timm.pth"), weights_only=True)
    theirs.load_state_dict(state, strict=True)
    images = torch.randn(2, 3, 64, 64)
    tokens = ours.norm(ours.forward_blocks(images)[-1].tokens_BNC)
    torch.testing.assert_close(theirs.forward_features(images), tokens, rtol=1e-4, atol=1e-4)  # type: ignore[operator]
    torch.testing.assert_close(theirs(images), ours(images), rtol=1e-4, atol=1e-4)
    again = two_tokens(filled=False)
    loading.load_backbone(again, tmp_path / "timm.pth")
    assert torch.equal(again(images), ours(images))


@torch.no_grad()
@pytest.mark.parametrize("kept", [1, 0])
def test_fewer_tokens_are_exported_with_their_positions_and_the_change_is_told(
    kept: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, ours = two_tokens(), two_tokens()
    with caplog.at_level("WARNING"):
        state = torch.load(exported(ours, "backbone", tmp_path / "net.pth", kept), weights_only=True)
    assert f"kept {kept} of 2 class tokens" in caplog.text
    assert state["pos_embed"].shape == (1, kept + 64, 24)
    assert torch.equal(state["pos_embed"][:, kept:], whole.state_dict()["pos_embed"][:, 2:])
    assert torch.equal(state["pos_embed"][:, :kept], whole.state_dict()["pos_embed"][:, :kept])
    assert ("cls_token" in state) == bool(kept)
    others = state.keys() - {"pos_embed", "cls_token"}
    assert all(torch.equal(state[name], whole.state_dict()[name]) for name in others)
    if kept:
        single: nn.Module = small_network("vit").eval()
        loading.load_backbone(single, tmp_path / "net.pth")
    else:
        single = timms(class_token=False, global_pool="avg", fc_norm=False)
        single.load_state_dict(state, strict=True)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(single(images), ours(images), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(single(images), whole(images), atol=1e-2)


def test_detectron2_takes_one_class_token_or_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at most one class token; pass --class_tokens first or none"):
        exported(two_tokens(), "detectron2", tmp_path / "net.pkl")
    assert not list(tmp_path.iterdir())
    content = pickle.loads(exported(two_tokens(), "detectron2", tmp_path / "net.pkl", 0).read_bytes())
    assert content["model"]["pos_embed"].shape == (1, 64, 24)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kept", [None, 1, 0])
def test_onnxruntime_computes_the_same(kept: int | None, tmp_path: Path) -> None:
    network = two_tokens()
    session = onnxruntime.InferenceSession(exported(network, "onnx", tmp_path / "net.onnx", kept))
    images = torch.randn(3, 3, 64, 64)
    view, regions = session.run(["view_features", "region_features"], {"images": images.numpy()})
    expected = network.forward_features(images)
    torch.testing.assert_close(torch.from_numpy(view), expected.view_BC, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(regions), expected.regions_BTC, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_hub_and_script_read_a_published_file_of_full_size(tmp_path: Path) -> None:
    network = hubconf.udi_vit_small()
    assert sum(p.numel() for p in network.parameters()) == 21_666_432
    path = tmp_path / "udi.pth"
    torch.save({"student": {}, "teacher": {f"backbone.backbone.{n}": t for n, t in network.state_dict().items()}}, path)
    again = torch.hub.load(str(ROOT), "udi_vit_small", source="local", weights=path)
    images = torch.randn(1, 3, 96, 96)
    assert torch.equal(again(images), network(images))
    again.choose_token("both")
    assert again(images).shape == (1, 768)
    command = ["--arch", "deit_small", "--pretrained_weights", str(path), "--format", "backbone"]
    command += ["--class_tokens", "none", "--output", str(tmp_path / "grid.pth"), "--", *TWO]
    done = run_script("export.py", *command)
    assert done.returncode == 0, done.stderr
    assert "class tokens" in done.stderr
    assert torch.load(tmp_path / "grid.pth")["pos_embed"].shape == (1, 196, 384)
