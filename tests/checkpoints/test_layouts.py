"""Networks in files of other programs: found, renamed and loaded; files of DINO select DINO's resizing of positions."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from fill import fill_
from helpers.small_networks import SMALL, small_network
from torch import Tensor, nn

import export
from checkpoints import layouts, loading
from config.loading import load_config
from models import Backbone, build_model
from models.heads import DINOHead
from models.srs import SRS
from utils import UsageError

VIT = SMALL["vit"].overrides


def filled(network: Backbone) -> Backbone:
    fill_(network.state_dict())
    return network.eval()


def save(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def add_prefix(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def head(channels: int) -> dict[str, Tensor]:
    return add_prefix("head.", DINOHead(channels, 8, hidden_dim=16, bottleneck_dim=4).state_dict())


def assert_loaded(network: Backbone, theirs: dict[str, Tensor]) -> None:
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


# --------------------------------------------------------------------------- positions


def cubic(distance: Tensor) -> Tensor:
    """Return the kernel of bicubic interpolation with a = -0.75."""
    a, x = -0.75, distance.abs()
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))


def dino_weights(old: int, new: int) -> Tensor:
    """Return weights (new, old) of interpolation along an axis with scale factor (new + 0.1) / old and repeated border."""
    source = (torch.arange(new, dtype=torch.float64) + 0.5) * old / (new + 0.1) - 0.5
    weights = torch.zeros(new, old, dtype=torch.float64)
    for offset in range(-1, 3):
        at = source.floor() + offset
        weights.scatter_add_(1, at.long().clamp(0, old - 1)[:, None], cubic(source - at)[:, None])
    return weights


@torch.no_grad()
@pytest.mark.parametrize("size", [(96, 96), (480, 832), (224, 320), (64, 72)])
def test_positions_of_dino_files_are_resized_as_in_dino(
    size: tuple[int, int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At 64 x 72 pixels the grid has the size of the table, which DINO still resizes unless the image is square."""
    config = load_config(None, VIT)
    theirs = filled(build_model("vit", config, patch_size=16))
    path = save(
        {"teacher": add_prefix("backbone.", theirs.state_dict()) | head(24), "student": {}}, tmp_path / "dino.pth"
    )
    ours = build_model("vit", config, patch_size=16).eval()
    with caplog.at_level(logging.INFO, "esvit"):
        loading.load_backbone(ours, path)
    assert "POS_RESIZE" in caplog.text
    grid = (size[0] // 16, size[1] // 16)
    table = theirs.get_parameter("pos_embed")
    rows, columns = (dino_weights(4, side) for side in grid)
    plane = torch.einsum("yi,xj,ijc->yxc", rows, columns, table[0, 1:].double().unflatten(0, (4, 4))).float()
    expected = build_model(
        "vit", load_config(None, [*VIT, "MODEL.IMAGE_SIZE", str([16 * n for n in grid])]), patch_size=16
    )
    resized = torch.cat([table[:, :1], plane.flatten(0, 1)[None]], dim=1)
    expected.load_state_dict(theirs.state_dict() | {"pos_embed": resized})
    images = torch.randn(1, 3, *size)
    wanted = expected.eval().forward_features(images[..., : 16 * grid[0], : 16 * grid[1]])
    for a, b in zip(ours.forward_features(images), wanted):
        assert float((a - b).abs().max() / b.abs().max()) < 1e-5


def rule_after_loading(content: object, tmp_path: Path, *overrides: str) -> str:
    network = small_network("vit", *overrides)
    if isinstance(content, dict) and "safetensors" in content:
        path = tmp_path / "net.safetensors"
        safetensors.torch.save_file(dict(content["safetensors"]), path)
    else:
        path = save(content, tmp_path / "file.pth")
    loading.load_backbone(network, path)
    return str(network.pos_resize)


def test_files_of_dino_and_udi_are_distinguished_from_timm_deit_and_esvit(tmp_path: Path) -> None:
    state = dict(filled(small_network("vit")).state_dict())
    classifier = {"head.weight": torch.zeros(5, 24), "head.bias": torch.zeros(5)}
    timm_vit = timm.models.vision_transformer.VisionTransformer(
        img_size=64, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=0
    )
    wrapped = add_prefix("module.backbone.", state) | add_prefix("module.", head(24))
    for dino in (state, wrapped, {"teacher": wrapped, "student": {}}, {"state_dict": wrapped}):
        assert rule_after_loading(dino, tmp_path) == "scale"
        assert (
            rule_after_loading(dino, tmp_path, "MODEL.SPEC.POS_RESIZE", "size") == "size"
        )  # the config takes precedence
    others: list[object] = [state | classifier, {"model": state}, {"model": state | classifier}, {"safetensors": state}]
    others += [timm_vit.state_dict(), {"teacher": state | head(24), "student": {}}, state | head(24)]
    for other in others:
        assert rule_after_loading(other, tmp_path) == "size"


@pytest.mark.parametrize("rule", ["size", "scale"])
def test_exports_and_checkpoints_of_this_project_keep_their_rule(rule: str, tmp_path: Path) -> None:
    network = small_network("vit", "MODEL.SPEC.POS_RESIZE", rule)
    export.write(network, "backbone", tmp_path / "export.pth", load_config(None, VIT))
    assert rule_after_loading(torch.load(tmp_path / "export.pth", weights_only=False), tmp_path) == rule
    followed = small_network("vit")
    followed.adopt_pos_resize(rule)
    config = followed.resolve_config(load_config(None, VIT))
    assert rule == config.MODEL.SPEC.POS_RESIZE
    content = {"teacher": add_prefix("backbone.", dict(network.state_dict())), "student": {}, "config": config.dump()}
    assert rule_after_loading(content, tmp_path) == rule


# --------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(
    "prefix",
    [
        *("_orig_mod.", "module._orig_mod.", "module.module.", "encoder.", "base_encoder.", "momentum_encoder."),
        *("backbone.", "module.encoder._orig_mod.backbone.", "_orig_mod.module.momentum_encoder.module."),
    ],
)
def test_prefixes_of_names(name: str, prefix: str) -> None:
    theirs, ours = filled(small_network(name)), small_network(name)
    state = dict(theirs.state_dict())
    for content in (add_prefix(prefix, state), {"student": add_prefix(prefix, state)}):
        nn.init.zeros_(next(ours.parameters()))
        report = loading.load_network(ours, layouts.network_state(content, "student", "x"), "x")
        assert_loaded(ours, state)
        assert report.left_out == 0


def test_prefixes_of_torch_inside_names(tmp_path: Path) -> None:
    """A module of the network was compiled."""
    theirs, ours = filled(small_network("vit")), small_network("vit")
    state = {name.replace("blocks.", "blocks._orig_mod."): tensor for name, tensor in theirs.state_dict().items()}
    loading.load_backbone(ours, save(add_prefix("module.", state), tmp_path / "net.pth"))
    assert_loaded(ours, dict(theirs.state_dict()))


MOBY = (
    "encoder.",
    "encoder_k.",
    ("projector.linear1.weight", "projector_k.linear1.weight", "predictor.bn1.bias", "queue1"),
)
MOCO = ("module.encoder_q.", "module.encoder_k.", ("module.queue", "module.queue_ptr"))
MOCO_V3 = ("module.base_encoder.", "module.momentum_encoder.", ("module.predictor.0.weight",))


@pytest.mark.parametrize(("online", "momentum", "beside"), [MOBY, MOCO, MOCO_V3])
@pytest.mark.parametrize("name", ["swin", "resnet"])
def test_key_selects_online_or_momentum_network(
    name: str, online: str, momentum: str, beside: tuple[str, ...], tmp_path: Path
) -> None:
    first, second = small_network(name).state_dict(), small_network(name).state_dict()
    names = {ours: ours.removeprefix("backbone.backbone.") for ours in first}
    content = {online + names[n]: t for n, t in first.items()} | {momentum + names[n]: t for n, t in second.items()}
    content |= {online + "head.0.weight": torch.ones(2), momentum + "head.0.weight": torch.ones(2)}
    content |= {part: torch.ones(3) for part in beside}
    path = save({"model": content, "epoch": 3}, tmp_path / "file.pth")
    for key, wanted, word in (("teacher", second, "momentum"), ("student", first, "online")):
        network = small_network(name)
        report = loading.load_backbone(network, path, key)
        assert_loaded(network, wanted)
        assert word in str(report)
        assert report.left_out == len(beside) + 1
        assert set(report.parts) == {part.removeprefix("module.").partition(".")[0] for part in beside} | {"head"}


@pytest.mark.parametrize(
    "beside",
    [
        (
            "mask_token",
            "decoder_pos_embed",
            "decoder_embed.weight",
            "decoder_blocks.0.norm1.weight",
            "decoder_pred.bias",
        ),
        ("head.mlp.0.weight", "head.last_layer2.weight_g", "backbone.masked_embed"),
        ("fc.weight", "fc.bias"),
        ("head.weight", "head_dist.bias", "classifier.weight"),
    ],
    ids=["MAE", "iBOT", "torchvision", "classifiers"],
)
def test_heads_and_decoders_of_other_programs_are_left_out_and_listed(beside: tuple[str, ...], tmp_path: Path) -> None:
    theirs, ours = filled(small_network("vit")), small_network("vit")
    content = dict(theirs.state_dict()) | {name: torch.ones(2) for name in beside}
    report = loading.load_backbone(ours, save({"model": content}, tmp_path / "file.pth"))
    assert_loaded(ours, dict(theirs.state_dict()))
    assert report.left_out == len(beside)
    for name in beside:
        assert name.removeprefix("backbone.").partition(".")[0] in str(report)


@pytest.mark.parametrize("prefix", ["", "encoder.", "module.base_encoder."])
def test_foreign_networks_are_rejected_with_the_first_names(prefix: str, tmp_path: Path) -> None:
    ours = small_network("vit")
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    state = add_prefix(prefix, {"layers.0.self_attention.in_proj_weight": torch.ones(3), "ln.weight": torch.ones(3)})
    with pytest.raises(
        UsageError, match=r"42 tensors are missing .cls_token, pos_embed, .*2 unexpected .*self_attention"
    ):
        loading.load_backbone(ours, save(state, tmp_path / "file.pth"))
    assert_loaded(ours, before)


def test_abbreviated_table_name_of_cvt(tmp_path: Path) -> None:
    theirs, ours = filled(small_network("cvt")), small_network("cvt")
    state = {
        name.replace("relative_position_bias_table", "rel_pos_bias_table"): t for name, t in theirs.state_dict().items()
    }
    assert state.keys() != theirs.state_dict().keys()
    state["stage0.1.layers.0.0.fn.rel_pos_idx"] = torch.zeros(16, 16, dtype=torch.long)
    assert loading.load_backbone(ours, save({"teacher": state}, tmp_path / "cvt.pth")).left_out == 0
    assert_loaded(ours, dict(theirs.state_dict()))


# --------------------------------------------------------------------------- UDI


def udi_state() -> tuple[Backbone, dict[str, Tensor]]:
    """Return a network with SRS, and its tensors with UDI's names: repeated prefixes, and the same head three times."""
    network = small_network("vit", "MODEL.SPEC.NUM_CLS_TOKENS", "2")
    network.srs = SRS(24, 2)
    filled(network)
    parts = {"srs.norm.": "backbone.norm1.", "srs.out_norm.": "backbone.attn.norm.", "srs.": "backbone.attn."}
    state = {}
    for name, tensor in network.state_dict().items():
        part = next((part for part in parts if name.startswith(part)), "")
        state[parts.get(part, "backbone.backbone.") + name.removeprefix(part)] = tensor
    last = DINOHead(24, 16, hidden_dim=12, bottleneck_dim=8).state_dict()
    return network, state | {f"head.{level}.{name}": tensor for level in range(3) for name, tensor in last.items()}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_output_of_udis_extraction_script(prefix: str, tmp_path: Path) -> None:
    """The script removes one `backbone.` from the names, and the heads."""
    network, state = udi_state()
    cut = f"{prefix}backbone."
    extracted = {name.removeprefix(cut): t for name, t in add_prefix(prefix, state).items() if name.startswith(cut)}
    assert {"backbone.cls_token", "attn.qkv.weight", "norm1.bias"} <= extracted.keys()
    path = save(extracted, tmp_path / "backbone.pth")
    ours = small_network("vit", "MODEL.SPEC.NUM_CLS_TOKENS", "2")
    assert loading.load_backbone(ours, path).left_out == 8
    assert ours.pos_resize == "scale"
    assert_loaded(ours, dict(network.state_dict()))
    ours.srs = SRS(24, 2)
    assert loading.load_backbone(ours, path).left_out == 0
    assert_loaded(ours, dict(network.state_dict()))


def test_centers_of_published_losses() -> None:
    center = torch.randn(3, 8)
    published = {"centering.center": center, "centering.count": torch.zeros(3, 1)}
    found = layouts.criterion_state(published)
    assert list(found) == ["center", "center_plus", "center_patch"]
    assert torch.equal(torch.cat(list(found.values())), center)
    assert list(layouts.criterion_state({"centering.center": center[:2]})) == ["center", "center_patch"]
    esvit = {"center": center[:1], "center_grid": center[1:2]}
    assert layouts.criterion_state(esvit) == esvit


# --------------------------------------------------------------------------- order of the optimizer


def trained(network: nn.Module) -> list[str]:
    """Return the names of the parameters in the order of the optimizer."""
    return [name for name, _ in network.named_parameters()]


@pytest.mark.parametrize("name", SMALL)
def test_parameter_names_follow_the_order_of_the_file(name: str) -> None:
    """Without buffers and second names of shared modules; parameters that the network lacks map to None."""
    theirs, ours = small_network(name), small_network(name)
    theirs.add_module("late", nn.Linear(2, 2))
    for network in (theirs, ours):
        network.head = DINOHead(network.num_features, 8, hidden_dim=16, bottleneck_dim=4)
    names = layouts.parameter_names(ours, add_prefix("module.", dict(theirs.state_dict())))
    assert list(names) == [f"module.{name}" for name in trained(theirs)]
    for theirs_name, our_name in names.items():
        lacks = theirs_name.startswith("module.late.")
        assert our_name == (None if lacks else theirs_name.removeprefix("module.")), theirs_name


def test_parameter_names_of_udi_have_one_head() -> None:
    network, state = udi_state()
    network.head = DINOHead(24, 16, hidden_dim=12, bottleneck_dim=8)
    names = layouts.parameter_names(network, add_prefix("module.", state))
    assert len(names) == len(trained(network)) == len(set(names.values()))
    assert names["module.backbone.attn.norm.bias"] == "srs.out_norm.bias"
    assert names["module.head.0.last_layer.weight_v"] == "head.last_layer.weight_v"
    assert not any(name.startswith("module.head.1.") for name in names)
