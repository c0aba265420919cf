"""main_udi.py: one step against the equations, and every combination of levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers.runs import TINY_VIT
from helpers.udi_runs import TINY_NETWORKS, Made, parsed
from torch import Tensor, nn

import main_udi
from checkpoints import loading
from data.transforms.udi_views import Correspondence, split_correspondence
from losses.dino import DINOLoss
from models.srs import SRS, bilinear_weights, default_heads, one_hot_weights
from models.vit import VisionTransformer

# --------------------------------------------------------------------------- a step against the equations


def encoded(network: Any, crop: Tensor) -> tuple[Tensor, Tensor]:
    """Both class tokens, normalized, and the patches before the last norm, by the blocks alone."""
    x = network.enter_stage(0, crop)
    for block in network.blocks:
        x, _ = block(x)
    return network.norm(x.tokens_BNC)[:, :2], x.tokens_BNC[:, 2:]


def expected_loss(method: main_udi.UDI, batch: Sequence[Tensor], alpha: float) -> dict[str, float]:
    """Every pair of a view's samples and another view by itself, images one by one; centers are zero."""
    crops, found = split_correspondence(batch)
    student, teacher = loading.unwrap(method.student), loading.unwrap(method.teacher)
    assert isinstance(student, VisionTransformer)
    assert isinstance(teacher, VisionTransformer)
    teacher_temp = method.criterion.teacher_temp(1)

    def entropy(target: Tensor, logits: Tensor) -> float:
        return -float((torch.softmax(target / teacher_temp, -1) * torch.log_softmax(logits / 0.1, -1)).sum())

    def sampled(network: Any, patches: Tensor, weights: Tensor) -> Tensor:
        return network.head(network.srs(patches, weights))[0]

    sums: dict[str, list[float]] = {name: [] for name in ("g_cl", "l_cl", "g_mcl", "l_mcl", "g_pch")}
    for b in range(len(crops[0])):
        of = Correspondence(*(field[b : b + 1] for field in found))
        own = [encoded(student, crop[b : b + 1]) for crop in crops]
        their = [encoded(teacher, crop[b : b + 1]) for crop in crops[:2]]
        cls = [teacher.head(both[:, 0])[0] for both, _ in their]
        tokens = [student.head(both)[0] for both, _ in own]
        grid = (8, 8)
        for v in (0, 1):
            targets = sampled(teacher, their[1 - v][1], bilinear_weights(of.target_2M2[:, v], grid))
            valid = of.valid_2M[0, v]
            mean = targets[valid].sum(0) / (valid.sum() + 1e-5)
            share = alpha if valid.any() else 0.0
            sums["g_cl"].append(entropy(cls[1 - v], tokens[v][0]))
            sums["g_mcl"].append(entropy(share * mean + (1 - share) * cls[1 - v], tokens[v][1]))
            patches = sampled(student, own[v][1], one_hot_weights(of.tokens_2M[:, v], 64))
            sums["g_pch"] += [entropy(t, s) for t, s, good in zip(targets, patches, valid) if good]
            for number, local in enumerate(tokens[2:]):
                places = of.local_target_L2m2[:, number, v]
                targets = sampled(teacher, their[v][1], bilinear_weights(places, grid))
                valid_m = of.local_valid_L2m[0, number, v]
                mean = targets[valid_m].sum(0) / (valid_m.sum() + 1e-5)
                share = alpha if valid_m.any() else 0.0
                sums["l_cl"].append(entropy(cls[v], local[0]))
                sums["l_mcl"].append(entropy(share * mean + (1 - share) * cls[v], local[1]))
    return {name: sum(values) / len(values) for name, values in sums.items()}


def moved(network: nn.Module) -> None:
    """Make another network of a copy."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.parametrize("flags", [["--plain_loss", "on"], ["--plain_loss", "on", "--srs_drawing", "view"]], ids=str)
def test_a_loss_is_that_of_the_equations(flags: list[str]) -> None:
    """Which sample of which view meets which token of which view, through both networks."""
    made = Made("--drop_path_rate", "0", "--alpha", "0.3", *flags)
    moved(made.method.teacher)
    batch = made.batch()
    loss, terms = made.method.compute_loss(batch, epoch=1)
    with torch.no_grad():
        expected = expected_loss(made.method, batch, alpha=0.3)
    assert {name: term.item() for name, term in terms.items()} == pytest.approx(expected, rel=1e-4)
    levels = [(expected["g_cl"] + 2 * expected["l_cl"]) / 3, (expected["g_mcl"] + 2 * expected["l_mcl"]) / 3]
    assert loss.item() == pytest.approx((sum(levels) + expected["g_pch"]) / 3, rel=1e-4)


@pytest.mark.parametrize(("local", "sampled"), [("off", 2 * 4), ("on", 4 * 4)])
def test_nothing_is_computed_twice_or_for_nothing(local: str, sampled: int) -> None:
    """Each network encodes a view once; the teacher is sampled for all views in that pass, the student where its patches learn."""
    made = Made("--local_patch", local)
    images: dict[str, int] = {}

    def counted(name: str) -> Callable[..., None]:
        return lambda _, inputs: images.update(
            {name: images.get(name, 0) + len(getattr(inputs[0], "tokens_BNC", inputs[0]))}
        )

    for name, network in (("student", made.method.student), ("teacher", made.method.teacher)):
        for module in ("blocks.0", "srs"):
            network.get_submodule(module).register_forward_pre_hook(counted(f"{name} {module}"))
    loss, _ = made.method.compute_loss(made.batch(), epoch=1)
    loss.backward()
    teachers = {"teacher blocks.0": 2 * 4, "teacher srs": 2 * 4}
    assert images == teachers | {"student blocks.0": 4 * 4, "student srs": sampled}
    assert all(parameter.grad is None for parameter in made.method.teacher.parameters())


def test_factored_logits_train_as_whole_ones_do() -> None:
    outcomes = []
    for plain in ("off", "on"):
        made = Made("--plain_loss", plain, "--local_patch", "on", "--drop_path_rate", "0", "--clip_grad", "0.3")
        for i in range(3):
            assert made.step([made.batch(seed=i)], i, 1)["skipped"] == 0
        outcomes.append([*made.method.student.parameters(), *made.method.criterion.buffers()])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_with_the_class_token_alone_a_step_is_dinos() -> None:
    """The same network, views and loss as main_esvit.py's without regions."""
    made = Made("--include_patch", "off", "--number_cls_token", "1", "--drop_path_rate", "0")
    batch = made.batch()
    loss, terms = made.method.compute_loss(batch, epoch=1)
    dino = DINOLoss(32, 4, 0.04, 0.07, 1, 2)
    views = split_correspondence(batch)[0]
    expected = dino(made.method.student(views), made.method.teacher(views[:2]), 1)
    assert terms.keys() == {"g_cl", "l_cl"}
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


# --------------------------------------------------------------------------- combinations

COMBINATIONS = {
    "UDI": [],
    "patches off, one token": ["--include_patch", "off", "--number_cls_token", "1"],
    "one token": ["--number_cls_token", "1"],
    "no local views": ["--local_crops_number", "0"],
    "local sizes": ["--local_crops_number", "2", "1", "--local_crops_size", "16", "12", "--local_patch", "on"],
    "local views as large": ["--local_crops_size", "32", "--local_patch", "on"],
    "BatchNorm in heads": ["--use_bn_in_head", "on"],
    "a head each": ["--shared_head", "off"],
    "probabilities": ["--target_mix", "probs", "--global_pair_mode", "nested", "--srs_align", "centers"],
    "one image": ["--batch_size_per_gpu", "1"],
    "recomputed": ["--grad_checkpointing", "on"],
}


@pytest.mark.parametrize("plain", ["off", "on"])
@pytest.mark.parametrize("flags", COMBINATIONS.values(), ids=COMBINATIONS)
def test_every_combination_learns(flags: list[str], plain: str) -> None:
    """With a fixed teacher and batch the student fits its targets, and each of its parameters is trained."""
    made = Made("--momentum_teacher", "1", "--lr", "0.1", "--plain_loss", plain, "--drop_path_rate", "0", *flags)
    made.method.criterion.center_momentum = 1.0
    moved(made.method.teacher)
    before = [parameter.detach().clone() for parameter in made.method.student.parameters()]
    batch = made.batch(made.args.batch_size_per_gpu)
    scalars = [made.step([batch], i, 1, monitor=True) for i in range(8)]
    losses = [float(s["loss"]) for s in scalars]
    assert losses[-1] < 0.95 * losses[0]
    after = dict(made.method.student.named_parameters())
    assert not [n for (n, p), old in zip(after.items(), before) if p.requires_grad and torch.equal(p, old)]
    levels = {name.partition("/")[0] for name in scalars[0] if "/" in name}
    asked = {"cls": True, "cls+": made.args.number_cls_token == 2, "patch": made.args.include_patch}
    assert levels == {name for name, wanted in asked.items() if wanted}


@pytest.mark.parametrize("network", TINY_NETWORKS)
def test_other_backbones_learn_views_and_patches(network: str) -> None:
    made = Made(
        "--number_cls_token", "1", "--momentum_teacher", "1", "--lr", "0.1", *TINY_NETWORKS[network], network=[]
    )
    made.method.criterion.center_momentum = 1.0
    batch = made.batch()
    scalars = [made.step([batch], i, 1) for i in range(8)]
    assert {"g_cl", "l_cl", "g_pch"} <= scalars[0].keys()
    assert float(scalars[-1]["loss"]) < 0.95 * float(scalars[0]["loss"])


@pytest.mark.parametrize("network", ["vit", *TINY_NETWORKS])
def test_grids_are_those_that_the_networks_make(network: str) -> None:
    """They are asked of a network without numbers, which draws none either."""
    flags = [] if network == "vit" else ["--number_cls_token", "1", *TINY_NETWORKS[network]]
    args = parsed(*flags, network=TINY_VIT if network == "vit" else [])
    config = main_udi.load_config(args)
    made = main_udi.build_network(args, config, is_teacher=True)
    state = torch.get_rng_state()
    grids = main_udi.token_grids(args, config)
    assert torch.equal(torch.get_rng_state(), state)
    assert grids == {
        size: made.forward_feature_maps(torch.randn(2, 3, size, size)).shape[3] for size in (grids.keys() | {16})
    }


def test_without_a_valid_patch_a_step_is_applied() -> None:
    """The patches' level is 0, the second token learns the class token's targets, and the center of patches stays."""
    made = Made("--local_patch", "on")
    batch = made.batch()
    crops, found = split_correspondence(batch)
    nowhere = found._replace(valid_2M=found.valid_2M & False, local_valid_L2m=found.local_valid_L2m & False)
    scalars = made.step([[*crops, *nowhere]], 0, 1)
    assert scalars["skipped"] == 0
    assert scalars["g_pch"] == scalars["l_pch"] == 0
    assert all(bool(torch.isfinite(parameter).all()) for parameter in made.method.student.parameters())
    assert not made.method.criterion.center_patch.any()
    assert made.method.criterion.center_plus.any()


@pytest.mark.parametrize(("arch", "heads"), [("vit_tiny", 3), ("vit_small", 6), ("vit_base", 12)])
def test_sampling_has_the_width_and_heads_of_the_backbone(arch: str, heads: int) -> None:
    flags = ["--out_dim", "8", "--head_hidden_dim", "8", "--head_bottleneck_dim", "4"]
    args = main_udi.get_args_parser().parse_args(["--arch", arch, *flags])
    with torch.device("meta"):
        network = main_udi.build_network(args, main_udi.load_config(args), is_teacher=False)
    assert isinstance(network.srs, SRS)
    assert network.srs.num_heads == heads == default_heads(network)
    assert network.srs.qkv.weight.shape == (3 * network.num_features, network.num_features)
    assert network.srs(torch.zeros(2, 196, network.num_features, device="meta"), torch.zeros(2, 16, 196, device="meta")).shape == (
        2, 16, network.num_features
    )  # fmt: skip
    tokens = [network.get_parameter(name).shape[1] for name in ("cls_token", "pos_embed")]
    assert tokens == [2, 2 + 14**2]
    if arch == "vit_small":
        sizes = [p.numel() for name, p in network.named_parameters() if not name.startswith(("head.", "srs."))]
        assert sum(sizes) == 21_666_432
        assert sum(p.numel() for p in network.srs.parameters()) == 592_896
