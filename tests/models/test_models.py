"""The contract of models/base.py, held against every registered name (in small where a config can make it small)."""

from __future__ import annotations

import shutil

import pytest
import torch
from conftest import relative_error
from helpers.small_networks import ARCHITECTURES, SMALL, small_network
from torch import Tensor, nn

from config.loading import load_config
from models import Backbone, MultiCropOutput, build_model, list_models
from models.heads import DINOHead
from models.registry import lookup
from utils import UsageError

NAMES = list_models()


def network_of(name: str, *, dense: bool = False, is_teacher: bool = False) -> Backbone:
    """The network of a registered name, with the small config of its family."""
    own = next(small for small in SMALL.values() if small.overrides[1] == lookup(name).spec.name)
    config = load_config(None, own.overrides)
    return build_model(name, config, dense=dense, is_teacher=is_teacher, patch_size=own.patch_size)


# Networks of torchvision cannot be made small; two stand for the contract, all of them go through the slow tests at full size.
BIG = [name for name in NAMES if lookup(name).spec.name == "resnet" and name not in {"resnet18", "resnext50_32x4d"}]


@pytest.fixture(params=[name for name in NAMES if name not in BIG])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def images(count: int = 2, height: int = 64, width: int = 64) -> Tensor:
    return torch.randn(count, 3, height, width)


@torch.no_grad()
def test_features_agree_with_what_the_attributes_say(name: str) -> None:
    network = network_of(name).eval()
    assert isinstance(network, Backbone)
    assert isinstance(network.head, nn.Identity)
    assert network.head_dense is None
    assert len(network.stage_dims) == len(network.stage_depths)
    x = images()
    view_BC, regions_BTC = network.forward_features(x)
    maps = network.forward_feature_maps(x)
    assert view_BC.shape == (2, network.num_features)
    torch.testing.assert_close(maps.flatten(2).transpose(1, 2), regions_BTC)
    torch.testing.assert_close(network(x), view_BC)
    assert torch.isfinite(view_BC).all()
    assert float(view_BC.std()) > 0


@torch.no_grad()
def test_last_blocks_have_the_widths_of_their_stages(name: str) -> None:
    network, x = network_of(name).eval(), images(1)
    widths = [dim for dim, depth in zip(network.stage_dims, network.stage_depths) for _ in range(depth)]
    for n in (1, 2, len(widths)):
        assert network.forward_return_n_last_blocks(x, n).shape == (1, sum(widths[-n:]))
    features = network.forward_return_n_last_blocks(x, 1, return_patch_avgpool=True)
    appended = [network.forward_features(x).regions_BTC.mean(1)] if network.num_cls_tokens else []  # as published
    expected = torch.cat([network.forward_return_n_last_blocks(x, 1), *appended], dim=1)
    torch.testing.assert_close(features, expected)
    for n in (0, len(widths) + 1):
        with pytest.raises(ValueError, match=rf"outside 1\.\.{len(widths)}"):
            network.forward_return_n_last_blocks(x, n)


@torch.no_grad()
def test_maps_of_stages_have_their_widths_and_are_the_inputs_of_the_next(name: str) -> None:
    network, x = network_of(name).eval(), images(1)
    stages = list(range(len(network.stage_depths)))
    maps = network.forward_stage_maps(x, stages)
    assert [part.shape[1] for part in maps] == list(network.stage_dims)
    torch.testing.assert_close(maps[-1], network.forward_feature_maps(x))
    blocks = network.forward_blocks(x, sum(network.stage_depths))
    ends = [sum(network.stage_depths[: stage + 1]) - 1 for stage in stages]
    for part, end in zip(maps[:-1], ends):  # without norm
        tokens_BNC, prefix = blocks[end].tokens_BNC, blocks[end].num_prefix_tokens
        torch.testing.assert_close(part.flatten(2).transpose(1, 2), tokens_BNC[:, prefix:])
    for chosen in ([stages[-1], 0], [0]):
        for part, stage in zip(network.forward_stage_maps(x, chosen), chosen, strict=True):
            torch.testing.assert_close(part, maps[stage])
    for wrong in (-1, len(stages)):
        with pytest.raises(ValueError, match=rf"0\.\.{len(stages) - 1}"):
            network.forward_stage_maps(x, [0, wrong])


@torch.no_grad()
def test_images_are_independent_and_may_be_rectangular(name: str) -> None:
    network, x = network_of(name).eval(), images(3, 40, 72)
    maps = network.forward_feature_maps(x)
    assert relative_error(network.forward_feature_maps(x[1:2]), maps[1:2]) < 1e-4
    assert maps.shape[2] <= maps.shape[3]
    mirrored = network.forward_feature_maps(x.transpose(2, 3))
    assert mirrored.shape[2:] == (maps.shape[3], maps.shape[2])


@torch.no_grad()
def test_views_keep_their_order_when_sizes_alternate(name: str) -> None:
    network = network_of(name, dense=True).eval()
    network.head, network.head_dense = nn.Linear(network.num_features, 5), nn.Linear(network.num_features, 7)
    views = [images(2, size, size) for size in (64, 32, 32, 64)]
    output = network(views)
    assert isinstance(output, MultiCropOutput)
    features = [network.forward_features(view) for view in views]
    torch.testing.assert_close(output.view_logits, network.head(torch.cat([f.view_BC for f in features])))
    regions = torch.cat([f.regions_BTC.flatten(0, 1) for f in features])
    torch.testing.assert_close(output.region_features, regions)
    torch.testing.assert_close(output.region_logits, network.head_dense(regions))
    assert output.regions_per_view == tuple(f.regions_BTC.shape[1] for f in features)
    plain = network_of(name)
    plain.load_state_dict(network.state_dict(), strict=False)
    plain.head = network.head
    torch.testing.assert_close(plain.eval()(views), output.view_logits)


def test_every_parameter_gets_a_gradient(name: str) -> None:
    network = network_of(name, dense=True)
    network.head, network.head_dense = nn.Linear(network.num_features, 5), nn.Linear(network.num_features, 7)
    output = network([images(2, 64, 64), images(2, 32, 32)])
    (output.view_logits.square().sum() + output.region_logits.square().sum()).backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        # The next stage of ViL drops the global tokens, so what only moves them gets a gradient of zero in a last block.
        assert parameter.grad.abs().sum() > 0 or key.endswith("g2g_relative_position_bias"), key


@torch.no_grad()
def test_the_teacher_equals_its_student_in_evaluation(name: str) -> None:
    student, teacher = network_of(name), network_of(name, is_teacher=True)
    teacher.load_state_dict(student.state_dict())
    x = images()
    torch.testing.assert_close(student.eval()(x), teacher.eval()(x))
    assert all(getattr(module, "drop_prob", 0.0) in (0.0, None) for module in teacher.modules())


# --------------------------------------------------------------------------- architectures, once each


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_features_with_attention_maps_equal_those_without(architecture: str) -> None:
    """The path with maps and the fused one give the same features; rows of the maps sum to 1."""
    network = small_network(architecture).eval()
    n = sum(network.stage_depths)
    x = images(2, 40, 56)
    if not network.has_attention:
        with pytest.raises(ValueError, match="no attention maps"):
            network.forward_selfattention(x)
        return
    with_maps, without = network.forward_blocks(x, n, attention=True), network.forward_blocks(x, n)
    for a, b in zip(with_maps, without):
        torch.testing.assert_close(a.tokens_BNC, b.tokens_BNC, atol=1e-5, rtol=1e-4)
        assert b.attention is None
        assert a.attention is not None
        torch.testing.assert_close(a.attention.sum(-1), torch.ones_like(a.attention[..., 0]))
    assert len(network.forward_selfattention(x, n)) == n


@torch.no_grad()
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "resnet"])
def test_attention_maps_in_half_precision(architecture: str) -> None:
    """A network in bf16, and one under autocast, give float32 maps close to those of float32."""
    network, x = small_network(architecture).eval(), images(1)
    exact = network.forward_selfattention(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = network.forward_selfattention(x)
    half = network.bfloat16().forward_selfattention(x.bfloat16())
    for maps in (mixed, half):
        assert isinstance(maps, Tensor)
        assert maps.dtype == torch.float32
        assert relative_error(maps, exact) < 0.1


@torch.no_grad()
def test_images_smaller_than_a_patch_are_refused() -> None:
    with pytest.raises(UsageError, match="images of 6 x 64 pixels are smaller than a patch of 8"):
        small_network("vit")(images(1, 6, 64))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_checkpointed_blocks_give_the_same_gradients(architecture: str) -> None:
    network, x = small_network(architecture, *no_drop_path(architecture)), images()
    other = small_network(architecture, *no_drop_path(architecture))
    other.load_state_dict(network.state_dict())
    other.grad_checkpointing = True
    for each in (network, other):
        each(x).square().sum().backward()
    for a, b in zip(network.parameters(), other.parameters()):
        torch.testing.assert_close(a.grad, b.grad)
    for ours, theirs in zip(network.buffers(), other.buffers()):  # running statistics count a batch once
        torch.testing.assert_close(ours, theirs)


def no_drop_path(architecture: str) -> list[str]:
    return [] if architecture == "resnet" else ["MODEL.SPEC.DROP_PATH_RATE", "0.0"]


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "resnet"])
def test_stochastic_depth_is_the_students_alone(architecture: str) -> None:
    rate = ("MODEL.SPEC.DROP_PATH_RATE", "0.9")
    student, teacher = small_network(architecture, *rate), small_network(architecture, *rate, is_teacher=True)
    x = images(4)
    with torch.no_grad():
        assert not torch.equal(student.train()(x), student(x))
        teacher.load_state_dict(student.state_dict())
        for module in teacher.train().modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()  # its batch statistics are no stochastic depth
        torch.testing.assert_close(teacher(x), student.eval()(x))


# --------------------------------------------------------------------------- tracing, torch.compile and torch.export


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("gradients", [False, True], ids=["no gradients", "gradients"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_traced_forward_gives_equal_results(architecture: str, gradients: bool) -> None:
    network = small_network(architecture).eval()
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(network, images())
        x = images()
        torch.testing.assert_close(traced(x), network(x))


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiled_forward_gives_equal_results(architecture: str) -> None:
    """Traced without a break of the graph; a backend that generates no code keeps it short.

    Names of one architecture run the same code with other numbers, so one network stands for all of them.
    """
    torch._dynamo.reset()
    network, x = small_network(architecture).eval(), images()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(x), network(x)) < 1e-4


# Tracing and generating code take seconds a block: one or two blocks of every kind that an architecture has.
MICRO = {
    "swin": ("MODEL.SPEC.DEPTHS", "[2]", "MODEL.SPEC.NUM_HEADS", "[2]"),
    "vit": ("MODEL.SPEC.DEPTH", "1"),
    "resnet": (),
    "cvt": (
        *("MODEL.SPEC.DEPTHS", "[2]", "MODEL.SPEC.NUM_HEADS", "[2]", "MODEL.SPEC.DIM_EMBED", "[8]"),
        *("MODEL.SPEC.PATCH_SIZE", "[7]", "MODEL.SPEC.PATCH_STRIDE", "[4]", "MODEL.SPEC.PATCH_PADDING", "[2]"),
        *("MODEL.SPEC.WINDOW_SIZE", "[4]", "MODEL.SPEC.MLP_RATIO", "[4.0]"),
    ),
    "vil": ("MODEL.SPEC.MSVIT.ARCH", "l1,h1,d12,n1,s1,g1,p4,f4,a0_l2,h2,d24,n1,s0,g1,p2,f4,a0"),
}
# ViL as its yaml trains it: each call draws a neighboring chunk.
TRAINED = {"vil": ["MODEL.SPEC.MSVIT.MODE", "1"]}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiled_training_gives_equal_gradients(architecture: str) -> None:
    """In training mode too, with stochastic depth off: outputs of crops of two sizes, and the gradient of each parameter."""
    overrides = [*MICRO[architecture], *no_drop_path(architecture), *TRAINED.get(architecture, [])]
    network, other = (small_network(architecture, *overrides, dense=True) for _ in range(2))
    other.load_state_dict(network.state_dict())
    torch._dynamo.reset()  # what was compiled before counts towards a limit
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    crops = [images(2, 64, 64), images(2, 32, 32)]
    for run in (network, compiled):
        torch.manual_seed(3)
        output = run(crops)
        (output.view_logits.square().sum() + output.region_logits.square().sum()).backward()
    for (name, a), b in zip(network.named_parameters(), other.parameters()):
        assert a.grad is not None
        assert b.grad is not None
        assert (b.grad - a.grad).abs().max() <= 1e-4 + 1e-3 * a.grad.abs().max(), name


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="generating code for the CPU takes a C++ compiler")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generated_code_gives_equal_results(architecture: str) -> None:
    """The default backend, on a network of a few blocks and 32-pixel images."""
    network = small_network(architecture, "MODEL.IMAGE_SIZE", "32", *MICRO[architecture]).eval()
    x = images(2, 32, 32)
    torch._dynamo.reset()
    assert relative_error(torch.compile(network, fullgraph=True)(x), network(x)) < 1e-4


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_export_gives_equal_results(architecture: str) -> None:
    network, x = small_network(architecture).eval(), images(3)
    batch = torch.export.Dim("batch")
    program = torch.export.export(network, (x,), dynamic_shapes={"crops": {0: batch}})
    other = images(5)
    assert relative_error(program.module()(other), network(other)) < 1e-4


# --------------------------------------------------------------------------- at full size


FULL_SIZE = [name for name in NAMES if lookup(name).default_config is not None]  # the others have no size of their own


@pytest.mark.slow
@pytest.mark.parametrize("full", FULL_SIZE)
def test_networks_of_full_size(full: str) -> None:
    """Every name with the yaml of its own: crops of two sizes forward and backward, gradients and widths of a probe."""
    network = build_model(full, dense=True, is_teacher=True)  # without stochastic depth, so that every gradient flows
    network.head, network.head_dense = nn.Linear(network.num_features, 5), nn.Linear(network.num_features, 7)
    output = network([images(2, 64, 96), images(2, 32, 32)])
    assert isinstance(output, MultiCropOutput)
    assert output.view_logits.shape == (4, 5)
    stride = 16 if len(network.stage_dims) == 1 else 32
    assert output.regions_per_view == (64 * 96 // stride**2, 32 * 32 // stride**2)
    assert output.region_logits.shape == (2 * sum(output.regions_per_view), 7)
    (output.view_logits.square().sum() + output.region_logits.square().sum()).backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        none = parameter.numel() == 0 or key.endswith("g2g_relative_position_bias")  # positions of no global tokens
        assert none or parameter.grad.abs().sum() > 0, key
    widths = [dim for dim, depth in zip(network.stage_dims, network.stage_depths) for _ in range(depth)]
    with torch.no_grad():
        assert network.eval().forward_return_n_last_blocks(images(1), 4).shape == (1, sum(widths[-4:]))


# --------------------------------------------------------------------------- errors and layouts


@pytest.mark.parametrize("architecture", ["resnet", "cvt"])
def test_one_value_for_batch_norm_is_rejected(architecture: str) -> None:
    """One image whose map is down to 1 x 1 can be looked at, but not trained on; two of them can."""
    overrides = ["MODEL.SPEC.PATCH_STRIDE", "[8,8]"] if architecture == "cvt" else []
    network = small_network(architecture, *overrides)
    with pytest.raises(
        UsageError, match=r"one value per channel.*1 x 1.*raise --batch_size_per_gpu or enlarge the crops"
    ):
        network([images(1, 16, 16)])
    assert torch.isfinite(network(images(2, 16, 16))).all()
    assert torch.isfinite(network.eval()(images(1, 16, 16))).all()


def test_one_row_for_batch_norm_of_a_head_is_rejected() -> None:
    network = small_network("vit")
    network.head = DINOHead(network.num_features, 8, use_bn=True, hidden_dim=16, bottleneck_dim=4)
    with pytest.raises(UsageError, match="one value per channel"):
        network(images(1))


def test_other_errors_of_forward_are_unchanged() -> None:
    with pytest.raises(RuntimeError, match="expected input"):
        small_network("resnet")(torch.randn(2, 4, 64, 64))


def test_config_of_another_architecture_is_rejected() -> None:
    config = load_config(None, SMALL["vit"].overrides)
    with pytest.raises(UsageError, match=r"needs a yaml of MODEL.NAME 'swin_transformer'"):
        build_model("swin", config)
    assert config.MODEL.NAME == "vision_transformer"


@pytest.mark.parametrize("patch_size", [4, 16])
@torch.no_grad()
def test_vit_takes_any_patch_size(patch_size: int) -> None:
    config = load_config(None, SMALL["vit"].overrides)
    network = build_model("vit", config, patch_size=patch_size).eval()
    assert network.forward_features(images(1, 48, 32)).regions_BTC.shape[1] == 48 * 32 // patch_size**2


def test_vit_refuses_a_patch_larger_than_the_image() -> None:
    with pytest.raises(UsageError, match=r"--patch_size 65 must be in 1\.\.64"):
        build_model("vit", load_config(None, SMALL["vit"].overrides), patch_size=65)


def test_resnet_stays_channels_last_after_loading() -> None:
    network = small_network("resnet")
    network.load_state_dict({name: tensor.contiguous() for name, tensor in network.state_dict().items()})
    convolutions = [module for module in network.modules() if isinstance(module, torch.nn.Conv2d)]
    assert convolutions
    assert all(conv.weight.is_contiguous(memory_format=torch.channels_last) for conv in convolutions)
    maps: list[torch.Tensor] = []
    for conv in convolutions:
        conv.register_forward_hook(lambda _conv, _inputs, output: maps.append(output))
    network(torch.randn(2, 3, 64, 64))
    assert len(maps) == len(convolutions)
    assert all(output.is_contiguous(memory_format=torch.channels_last) for output in maps)
