"""CvT: attention against a loop, what shifts and relative positions do, and the published ways of writing its config."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from timm.layers import DropPath
from torch import Tensor, nn
from yacs.config import CfgNode

from config.loading import load_config
from models import Backbone, build_model
from models.cvt import ConvAttention, CvT
from utils import UsageError

SPEC = "MODEL.SPEC."
S1 = ROOT / "experiments/imagenet/cvt_v4/s1.yaml"
MICRO = ROOT / "experiments/demo/cvt_micro.yaml"
TINY = [SPEC + "DIM_EMBED", "[8, 12, 16]", SPEC + "NUM_HEADS", "[1, 2, 4]", SPEC + "DROP_PATH_RATE", "0.0"]
EVERYTHING = [SPEC + "SHIFT", "True", SPEC + "REL_POS_EMBED", "True", SPEC + "RES_STEM", "True"]


def tiny_config(*overrides: str) -> CfgNode:
    return load_config(MICRO, [*TINY, *overrides])


def tiny_network(*overrides: str, **kwargs: bool) -> Backbone:
    return build_model("cvt", tiny_config(*overrides), **kwargs).eval()


def attention_layer(dim: int, heads: int, window: int, *overrides: str, shifts: bool = False) -> ConvAttention:
    """A layer in float64 with nothing left at a value that hides something."""
    layer = ConvAttention(dim, heads, window, shifts, 0.0, tiny_config(*overrides).MODEL.SPEC).double().eval()
    for name, tensor in layer.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5 if name == "qkv.bn.running_var" else torch.randn_like(tensor))
    return layer


# --------------------------------------------------------------------------- attention


def slow_attention(layer: ConvAttention, x_HWC: Tensor) -> Tensor:
    """One image through the definition: zero padding, convolution tap by tap, then query by query and head by head."""
    height, width, dim = x_HWC.shape
    window = min(layer.window, height, width)
    rows, columns = math.ceil(height / window) * window, math.ceil(width / window) * window
    padded = torch.zeros(rows + 2, columns + 2, dim, dtype=x_HWC.dtype)  # with the border that the convolution sees
    padded[1 : height + 1, 1 : width + 1] = x_HWC
    p: Any = layer.qkv
    qkv = torch.zeros(rows, columns, 3, layer.num_heads, dim // layer.num_heads, dtype=x_HWC.dtype)
    for y in range(rows):
        for x in range(columns):
            token = sum(padded[y + i, x + j] * p.dw.weight[:, 0, i, j] for i in range(3) for j in range(3))
            token = (token - p.bn.running_mean) / (p.bn.running_var + p.bn.eps).sqrt() * p.bn.weight + p.bn.bias
            qkv[y, x] = (p.pw.weight[:, :, 0, 0] @ token + p.pw.bias).view(3, layer.num_heads, -1)
    out, proj = torch.zeros_like(x_HWC), layer.proj_out
    assert proj.bias is not None
    table = layer.relative_position_bias_table
    for y in range(height):
        for x in range(width):
            top, left = y // window * window, x // window * window
            keys = [(i, j) for i in range(top, top + window) for j in range(left, left + window)]
            heads = []
            for h in range(layer.num_heads):
                logits = torch.stack([qkv[y, x, 0, h] @ qkv[i, j, 1, h] for i, j in keys]) / math.sqrt(dim)
                if table is not None:
                    full = layer.window  # an offset has its bias in every window
                    at = [(y - i + full - 1) * (2 * full - 1) + x - j + full - 1 for i, j in keys]
                    logits = logits + table[at, h]
                weights = logits.softmax(0)
                heads.append(sum(weight * qkv[i, j, 2, h] for weight, (i, j) in zip(weights, keys)))
            out[y, x] = proj.weight[:, :, 0, 0] @ torch.cat(heads) + proj.bias
    return out


@torch.no_grad()
@pytest.mark.parametrize("relative", ["False", "True"])
@pytest.mark.parametrize(
    ("window", "size"), [(3, (6, 3)), (3, (5, 7)), (4, (3, 5)), (7, (2, 2))], ids=["fits", "padded", "shrunk", "whole"]
)
def test_attention_is_the_definition(window: int, size: tuple[int, int], relative: str) -> None:
    layer = attention_layer(6, 2, window, SPEC + "REL_POS_EMBED", relative)
    images = torch.randn(2, *size, 6, dtype=torch.float64)
    expected = torch.stack([slow_attention(layer, image) for image in images])
    torch.testing.assert_close(layer(images)[0], expected)
    torch.testing.assert_close(layer(images, True)[0], expected)


@torch.no_grad()
def test_block_is_two_residuals_with_norms_before_them() -> None:
    block = tiny_network().stage_blocks(1)[0].double()
    halves: list[Any] = list(block.children())
    attn, mlp = halves
    x = torch.randn(2, 5, 6, 12, dtype=torch.float64)
    x1 = x + torch.stack([slow_attention(attn.fn, image) for image in attn.norm(x)])
    hidden = mlp.norm(x1) @ mlp.fn.net[0].weight[:, :, 0, 0].T + mlp.fn.net[0].bias
    hidden = hidden * torch.sigmoid(1.702 * hidden)
    torch.testing.assert_close(block(x)[0], x1 + hidden @ mlp.fn.net[2].weight[:, :, 0, 0].T + mlp.fn.net[2].bias)


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (40, 72), (30, 33)])
@pytest.mark.parametrize("overrides", [[], EVERYTHING], ids=["published", "everything"])
def test_attention_maps_are_those_used(size: tuple[int, int], overrides: list[str]) -> None:
    network = tiny_network(*overrides)
    images = torch.randn(2, 3, *size)
    with_maps = network.forward_blocks(images, n=6, attention=True)
    for a, b in zip(with_maps, network.forward_blocks(images, n=6)):
        torch.testing.assert_close(a.tokens_BNC, b.tokens_BNC)
        assert b.attention is None
        assert a.attention is not None
        window = min(4, *a.grid)
        windows = math.ceil(a.grid[0] / window) * math.ceil(a.grid[1] / window)
        assert a.attention.shape[0] == 2 * windows
        assert a.attention.shape[2:] == (window**2, window**2)
        torch.testing.assert_close(a.attention.sum(-1), torch.ones_like(a.attention[..., 0]))


@torch.no_grad()
@pytest.mark.parametrize("overrides", [[], EVERYTHING], ids=["published", "everything"])
def test_non_square_images_do_not_mix_and_keep_their_grid(overrides: list[str]) -> None:
    network = tiny_network(*overrides)
    images = torch.randn(3, 3, 48, 80)
    maps = network.forward_feature_maps(images)
    assert maps.shape == (3, 16, 3, 5)
    torch.testing.assert_close(network.forward_feature_maps(images[1:2]), maps[1:2])
    torch.testing.assert_close(maps.flatten(2).mean(-1), network(images))


# --------------------------------------------------------------------------- shifted windows


def influences(layer: ConvAttention, height: int, width: int) -> Tensor:
    """(N, N): whether the output token of a row depends on the input token of a column."""
    layer.qkv.dw.weight.data.zero_()[:, :, 1, 1] = 1  # so that only attention carries anything from token to token
    x = torch.randn(1, height, width, 4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x)[0].sum(-1).flatten(), x)
    return jacobian.abs().amax(-1).flatten(1) > 1e-30


@pytest.mark.parametrize("shifts", [False, True])
@pytest.mark.parametrize("size", [(8, 12), (7, 9)])
def test_shifted_windows_attend_across_the_borders_of_plain_ones(size: tuple[int, int], shifts: bool) -> None:
    """Two tokens see each other exactly if they lie in one window of the plane, which starts at the shift."""
    height, width = size
    shift = 2 if shifts else 0
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    window_of_token = ((rows - shift).div(4, rounding_mode="floor") * 100 + (columns - shift) // 4).flatten()
    layer = attention_layer(4, 2, 4, shifts=shifts)
    layer.qkv.pw.weight.data.mul_(0.1)  # no weight of the softmax may vanish by itself
    assert torch.equal(influences(layer, height, width), window_of_token[:, None] == window_of_token[None, :])


def test_grid_of_one_window_is_not_shifted() -> None:
    layer = attention_layer(4, 2, 4, shifts=True)
    layer.qkv.pw.weight.data.mul_(0.1)
    assert influences(layer, 4, 4).all()


def test_every_second_block_shifts() -> None:
    network = tiny_network(SPEC + "SHIFT", "True", SPEC + "DEPTHS", "[3, 1, 2]")
    assert [m.shifts for m in network.modules() if isinstance(m, ConvAttention)] == [
        *(False, True, False),
        False,
        *(False, True),
    ]
    assert not any(m.shifts for m in tiny_network().modules() if isinstance(m, ConvAttention))


# --------------------------------------------------------------------------- relative positions


@torch.no_grad()
def test_relative_table_changes_the_output() -> None:
    layer = attention_layer(6, 2, 3, SPEC + "REL_POS_EMBED", "True")
    x = torch.randn(1, 6, 6, 6, dtype=torch.float64)
    before = layer(x)[0]
    assert layer.relative_position_bias_table is not None
    layer.relative_position_bias_table.add_(1.0)  # the same for all pairs: no effect
    torch.testing.assert_close(layer(x)[0], before)
    layer.relative_position_bias_table[0] += 1.0
    assert not torch.allclose(layer(x)[0], before)


@torch.no_grad()
def test_table_of_another_window_is_resized() -> None:
    network = tiny_network(SPEC + "REL_POS_EMBED", "True", SPEC + "WINDOW_SIZE", "[7, 7, 4]")
    name = "stage0.1.layers.0.0.fn.relative_position_bias_table"
    rows = torch.arange(7.0).repeat_interleave(7)  # grows along one axis of a window of 4, constant along the other
    resized = network.fit_tensor(name, rows.unsqueeze(1))
    assert resized is not None
    assert resized.shape == network.get_parameter(name).shape == (13**2, 1)
    plane = resized.view(13, 13)
    torch.testing.assert_close(plane, plane[:, :1].expand(13, 13))
    assert bool((plane[:, 0].diff() > 0).all())
    torch.testing.assert_close(plane[6, 6], torch.tensor(3.0))
    assert network.fit_tensor(name, torch.zeros(50, 1)) is None
    assert network.fit_tensor("norm.weight", torch.zeros(49, 1)) is None


def test_names_without_weight_decay() -> None:
    assert tiny_network().no_weight_decay() == set()
    names = tiny_network(SPEC + "REL_POS_EMBED", "True").no_weight_decay()
    assert len(names) == 6
    assert "stage2.1.layers.1.0.fn.relative_position_bias_table" in names


# --------------------------------------------------------------------------- the network


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True])
def test_norms_compute_in_float32(autocast: bool) -> None:
    norms = [m for m in tiny_network().modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 3 + 2 * 6 + 1
    x = (torch.randn(50, norms[0].normalized_shape[0]) * 3 + 20).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = norms[0](x)
    exact = x.double()
    exact = (exact - exact.mean(-1, keepdim=True)) / (exact.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-6)  # one rounding at the end, none before
    assert {norm.eps for norm in norms} == {1e-5}


@pytest.mark.parametrize("overrides", [[], EVERYTHING], ids=["published", "everything"])
def test_every_parameter_learns(overrides: list[str]) -> None:
    network = tiny_network(*overrides, dense=True).train()
    features = network.forward_features(torch.randn(2, 3, 48, 80))
    weights = torch.randn_like(features.view_BC)
    ((features.view_BC * weights).sum() + features.regions_BTC.square().sum()).backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without
    assert all(bool(p.grad.isfinite().all()) for p in network.parameters() if p.grad is not None)


@torch.no_grad()
@pytest.mark.parametrize(("size", "grid"), [((64, 64), (16, 16)), ((30, 33), (8, 9)), ((4, 5), (1, 2))])
def test_stem_quarters_the_image(size: tuple[int, int], grid: tuple[int, int]) -> None:
    network = tiny_network(SPEC + "RES_STEM", "True")
    assert network.enter_stage(0, torch.randn(2, 3, *size)).shape == (2, *grid, 8)
    assert network.patch_size == 4
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters() if name.startswith("stage0.0.")}
    norms = {f"stage0.0.stem.{i}.{kind}": (8,) for i in (1, 4, 7) for kind in ("weight", "bias")}
    assert shapes == norms | {f"stage0.0.stem.{i}.weight": (8, width, 3, 3) for i, width in ((0, 3), (3, 8), (6, 8))}


@torch.no_grad()
def test_stem_is_three_convolutions_with_norm_and_relu() -> None:
    network = tiny_network(SPEC + "RES_STEM", "True").eval()
    x = images = torch.randn(2, 3, 18, 21)
    state = network.state_dict()
    for i, stride in ((0, 2), (3, 1), (6, 2)):
        norm = [state[f"stage0.0.stem.{i + 1}.{kind}"] for kind in ("running_mean", "running_var", "weight", "bias")]
        x = F.relu(F.batch_norm(F.conv2d(x, state[f"stage0.0.stem.{i}.weight"], None, stride, 1), *norm))
    torch.testing.assert_close(network.enter_stage(0, images).permute(0, 3, 1, 2), x)


def test_stochastic_depth_grows_over_both_halves_of_all_blocks() -> None:
    overrides = [SPEC + "DROP_PATH_RATE", "0.5"]
    rates = [m.drop_prob for m in tiny_network(*overrides).modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([rate for i in range(6) for rate in (0.1 * i, 0.1 * i)])
    teacher = tiny_network(*overrides, is_teacher=True)
    assert {m.drop_prob for m in teacher.modules() if isinstance(m, DropPath)} == {0.0}


def test_initialization_of_convolutions() -> None:
    network = tiny_network()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            assert bool((module.weight.abs() <= 2).all())
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.5)
            assert module.bias is None or not module.bias.any()


@pytest.mark.parametrize(
    "overrides", [[], [SPEC + "SHIFT", "True"], EVERYTHING], ids=["published", "shift", "everything"]
)
def test_network_can_be_exported_and_trained_after_it(overrides: list[str]) -> None:
    """A mask that was first wanted by a trace or by an evaluation serves training too."""
    network = tiny_network(*overrides, SPEC + "DEPTHS", "[2, 1, 1]")
    images = torch.randn(1, 3, 116, 84 + len(overrides) * 16)  # of a size that no other test uses, since masks are kept
    exported = torch.export.export(network, (images,)).module()
    with torch.inference_mode():
        torch.testing.assert_close(exported(images), network(images))
    network(images).sum().backward()


# --------------------------------------------------------------------------- config

PUBLISHED = """
MODEL:
  NAME: cvt_v4_transformer
  SPEC:
    INIT: trunc_norm
    NUM_STAGES: 3
    PATCH_SIZE: [7, 3, 3]
    PATCH_STRIDE: [4, 2, 2]
    PATCH_PADDING: [2, 1, 1]
    DIM_EMBED: [40, 80, 160]
    DEPTH: [2, 2, 2]
    NUM_HEADS: [1, 2, 4]
    WINDOW_SIZE: 4
    MLP_RATIO: 4
    QKV_BIAS: [True, True, True]
    DROP_RATE: [0.0, 0.0, 0.0]
    ATTN_DROP_RATE: [0.0, 0.0, 0.0]
    DROP_PATH_RATE: [0.1, 0.1, 0.1]
    CLS_TOKEN: [False, False, False]
    POS_EMBED: [False, False, False]
    QKV_PROJ_METHOD: [dw_bn, dw_bn, dw_bn]
    KERNEL_QKV: [3, 3, 3]
    PADDING_KV: [1, 1, 1]
    STRIDE_KV: [1, 1, 1]
    PADDING_Q: [1, 1, 1]
    STRIDE_Q: [1, 1, 1]
    ACT: quick_gelu
    NORM: layernorm
"""
WITHOUT_EFFECT = "INIT CLS_TOKEN POS_EMBED QKV_PROJ_METHOD KERNEL_QKV PADDING_KV STRIDE_KV PADDING_Q STRIDE_Q ACT NORM"


def test_published_way_of_writing(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr("utils.logger.propagate", True)
    caplog.set_level("INFO", logger="esvit")
    file = tmp_path / "published.yaml"
    file.write_text(PUBLISHED)
    config = load_config(file)
    assert load_config(file, [SPEC + "NUM_STAGES", "0", "MODEL.IMAGE_SIZE", "64"]) == load_config(MICRO)
    assert isinstance(build_model("cvt", config), CvT)
    (message,) = {text for text in caplog.messages if text.startswith(f"config {file}")}
    assert message.split(": ")[-1].split(", ") == sorted(SPEC + key for key in WITHOUT_EFFECT.split())


def test_the_last_value_counts_under_either_name(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("MODEL: {NAME: cvt_v4_transformer, SPEC: {DEPTHS: [1, 1, 1, 1]}}")
    file = tmp_path / "top.yaml"
    file.write_text("BASE: [base.yaml]\nMODEL: {SPEC: {DEPTH: [2, 2, 2, 2]}}")
    assert load_config(file).MODEL.SPEC.DEPTHS == [2, 2, 2, 2]
    assert load_config(file, [SPEC + "DEPTHS", "[3, 3]"]).MODEL.SPEC.DEPTHS == [3, 3]
    assert load_config(file, [SPEC + "DEPTHS", "[3]", SPEC + "DEPTH", "[4]"]).MODEL.SPEC.DEPTHS == [4]


def test_one_value_for_every_stage() -> None:
    spec = load_config(S1, [SPEC + "WINDOW_SIZE", "14", SPEC + "MLP_RATIO", "2"]).MODEL.SPEC
    assert spec.WINDOW_SIZE == [14, 14, 14, 14]
    assert spec.MLP_RATIO == [2.0, 2.0, 2.0, 2.0]
    assert tiny_config(SPEC + "WINDOW_SIZE", "2").MODEL.SPEC.WINDOW_SIZE == [2, 2, 2]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("CLS_TOKEN", "[False, False, False, True]"),
        ("POS_EMBED", "True"),
        ("QKV_PROJ_METHOD", "[avg, avg, avg, avg]"),
        ("KERNEL_QKV", "[5, 3, 3, 3]"),
        ("STRIDE_KV", "[2, 2, 2, 2]"),
        ("STRIDE_Q", "2"),
        ("ACT", "relu"),
        ("NORM", "batchnorm"),
        ("INIT", "xavier"),
        ("DROP_PATH_RATE", "[0.0, 0.0, 0.0, 0.1]"),
        ("DROP_RATE", "[]"),
        ("QKV_BIAS", "[True, True, False, True]"),
        ("DEPTHS", "2"),
        ("WINDOW_SIZE", "seven"),
        ("NUM_HEADS", "[0, 3, 6, 12]"),
    ],
)
def test_value_of_another_network_is_refused(key: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"'{SPEC}{key}'") as caught:
        load_config(S1, [SPEC + key, value])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key", ["PATCH_SIZE", "PATCH_STRIDE", "PATCH_PADDING", "DIM_EMBED", "NUM_HEADS", "WINDOW_SIZE"]
)
def test_lists_have_one_entry_for_each_stage(key: str) -> None:
    with pytest.raises(UsageError, match=f"{key}.* must have .*DEPTHS"):
        tiny_network(SPEC + key, "[4, 4]")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("NUM_HEADS", "[3, 3, 3]", "must divide the 8 channels"),
        ("NUM_STAGES", "4", "NUM_STAGES 4"),
        ("DEPTHS", "[2, 2]", "DEPTHS"),
        ("PATCH_PADDING", "[-1, 1, 1]", "PATCH_PADDING. takes a whole number from 0 to 1_024"),
    ],
)
def test_inconsistent_values_are_rejected(key: str, value: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        tiny_network(SPEC + key, value)


def test_stem_has_one_stride() -> None:
    with pytest.raises(UsageError, match="RES_STEM has stride 4"):
        tiny_network(SPEC + "RES_STEM", "True", SPEC + "PATCH_STRIDE", "[2, 2, 2]")


def test_other_networks_take_no_cvt_spelling() -> None:
    with pytest.raises(UsageError, match="DEPTH"):
        load_config(None, [SPEC + "DEPTH", "[2, 2, 2, 2]"])
    with pytest.raises(UsageError, match="unknown config key"):
        load_config(None, [SPEC + "CLS_TOKEN", "False"])
