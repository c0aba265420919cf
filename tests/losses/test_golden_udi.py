"""UDI against numbers of its released code: loss, geometry, networks, and two epochs of training (golden/README.md).

Shapes: B images, V = 2 global views, L local ones, S samples, K prototypes, D channels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import golden_arrays, relative_error
from torch import Tensor

from benchmarks.golden_udi import (
    CASES,
    CENTERS,
    TERMS,
    Case,
    build_case,
    centers_of,
    correspondence,
    golden_loss,
    loss_inputs,
)
from checkpoints import loading
from data.transforms import geometry
from losses.udi import StudentLevels, TeacherLevels, UDILoss
from main_udi import student_levels, student_weights, teacher_levels, teacher_weights
from models.srs import one_hot_weights
from ops.logits import FactoredLogits, materialize
from training import setup

# Largest difference by largest value. All is computed in float64; some of the golden arrays are stored as float32 (6e-8).
LOSS, GEOMETRY, NETWORK = 1e-6, 2e-5, 1e-5
GOLDEN = golden_arrays("udi_a")


# --------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("name", CASES["loss"])
def test_loss_gradients_targets_and_centers(name: str) -> None:
    """The centers of a step are what the step before left."""
    case = CASES["loss"][name]
    epoch = case["epoch"]
    loss = golden_loss(name)
    assert not loss.fall_back  # as released
    for step in range(case["steps"]):
        x = loss_inputs(name, step)
        golden = {key.split("/")[-1]: GOLDEN[key] for key in GOLDEN if key.startswith(f"loss/{name}/{step}/")}
        if step == 0:
            for center, row_K in zip(CENTERS, x["center"]):
                getattr(loss, center).copy_(row_K[None])
        logits = {key: x[key].requires_grad_() for key in x if key.startswith("s_")}
        student = StudentLevels(*(logits[f"s_{key}"] for key in ("cls", "cls_loc", "plus", "plus_loc", "pat")))
        teacher = TeacherLevels(x["t_cls"], x["t_pat"], x["V"], x["t_loc"], x["W"])
        terms = loss.terms(student, teacher, epoch)
        total = loss.total(terms)
        for ours, theirs in zip((total, *(terms[key] for key in TERMS)), golden["terms"], strict=True):
            assert float(ours.detach()) == pytest.approx(theirs, rel=LOSS)
        for key, gradient in zip(logits, torch.autograd.grad(total, list(logits.values()))):
            assert relative_error(gradient, golden[f"grad_{key}"]) < LOSS
        if step == 0:
            for key, target in targets(loss, x, epoch).items():
                assert relative_error(target, golden[f"target_{key}"]) < LOSS
        loss.accumulate_center(teacher)
        loss.update_center()
        for ours_K, theirs_K in zip(centers_of(loss), golden["center"], strict=True):
            assert relative_error(ours_K, theirs_K) < LOSS


def targets(loss: UDILoss, x: dict[str, Tensor], epoch: int) -> dict[str, Tensor]:
    """Teacher's targets by their golden names."""
    other_VBK = x["t_cls"].flip(0)
    plus = loss.mixed_logits(x["t_pat"], x["V"], other_VBK)
    plus_loc = loss.mixed_logits(x["t_loc"], x["W"], x["t_cls"].expand(len(x["t_loc"]), -1, -1, -1))
    return {
        "cls": loss.teacher_probs(other_VBK, loss.center, epoch),
        "plus": loss.teacher_probs(materialize(plus), loss.center_plus, epoch),
        "plus_loc": loss.teacher_probs(materialize(plus_loc), loss.center_plus, epoch),
        "patch": loss.teacher_probs(x["t_pat"], loss.center_patch, epoch)[:, :, :4],
    }


# --------------------------------------------------------------------------- geometry


def test_samples_lie_where_the_release_has_them() -> None:
    """Validity too, but of samples within 1e-5 of an edge, where rounding decides."""
    found, grid, local_grid = correspondence(GOLDEN, "geometry/a"), 14, 6
    coords = torch.from_numpy(GOLDEN["geometry/a/coords"]).double()
    worst, compared = 0.0, 0
    for b, crops in enumerate(coords):
        pairs = [(v, 1 - v, found.tokens_2M[b, v], grid, found.valid_2M[b, v], found.target_2M2[b, v]) for v in (0, 1)]
        for i, tokens in enumerate(found.local_tokens_Lm[b]):
            of_local = zip((0, 1), found.local_valid_L2m[b, i], found.local_target_L2m2[b, i])
            pairs += [(2 + i, v, tokens, local_grid, valid, place) for v, valid, place in of_local]
        for source, target, tokens, side, valid, place in pairs:
            ours = geometry.project(tokens, crops[source], crops[target], side, grid)
            extent = crops[source, 2:] - crops[source, :2]
            position = crops[source, :2] + geometry.token_positions(tokens, side, "corners") * extent
            edges = (position[:, None] - crops[target].view(2, 2)).abs().amin(dim=(1, 2))
            clear = edges > 1e-5
            assert torch.equal(ours.valid_S[clear], valid[clear])
            seen = clear & valid
            compared += int(seen.sum())
            if seen.any():
                worst = max(worst, relative_error(ours.target_S2[seen], place[seen]))
    assert worst < GEOMETRY
    assert compared > 100


# --------------------------------------------------------------------------- networks


@pytest.fixture(params=[False, True], ids=["plain", "factored"])
def case(request: pytest.FixtureRequest) -> Case:
    """Case `a`; the loss sees logits, or bottlenecks and prototypes."""
    return build_case(GOLDEN, torch.device("cpu"), plain_loss=not request.param)


@torch.no_grad()
def test_tokens_attention_pooling_and_logits(case: Case) -> None:
    crops, found = case.batch(0)
    student: Any = loading.unwrap(case.method.student).eval()
    teacher: Any = loading.unwrap(case.method.teacher).eval()
    ours: dict[str, Tensor] = {}
    for name, images in (("global", crops[0]), ("local", crops[2])):
        last = student.forward_blocks(images)[-1]
        ours[f"tokens_{name}"] = student.class_features(last.tokens_BNC, last.num_prefix_tokens)
    blocks = student.forward_blocks(crops[2], 2)
    ours["intermediate2_local"] = torch.stack([student.norm(block.tokens_BNC) for block in blocks])
    ours["attention_global"] = student.forward_selfattention(crops[0])[:, :, :2]
    valid_VBS1 = found.valid_2M.transpose(0, 1)[..., None]
    patches = student.forward_blocks(torch.cat(crops[:2]))[-1]
    weights = torch.cat([one_hot_weights(tokens, patches.grid[0] ** 2) for tokens in found.tokens_2M.unbind(1)])
    pooled = student.srs(patches.tokens_BNC[:, patches.num_prefix_tokens :], weights)
    ours["srs_at_tokens"] = pooled.unflatten(0, (2, -1)) * valid_VBS1
    sides, grid_of = [crop.shape[-1] for crop in crops], case.method.grid_of
    of_student: Any = student_levels(student(crops, student_weights(found, sides, grid_of, False), 2), found)
    of_teacher: Any = teacher_levels(teacher(crops[:2], teacher_weights(found, grid_of[sides[0]])), found)
    ours["student_cls"], ours["student_plus"] = materialize(of_student.cls_VBK), materialize(of_student.plus_VBK)
    ours["student_plus_loc"] = materialize(of_student.local_plus_LBK)
    ours["student_patch"] = materialize(of_student.patch_VBSK) * valid_VBS1
    ours["teacher_cls"] = materialize(of_teacher.cls_VBK)
    ours["teacher_patch"] = materialize(of_teacher.patch_VBSK) * valid_VBS1
    assert isinstance(of_student.plus_VBK, FactoredLogits) is not case.args.plain_loss
    prefix = f"net/{case.name}/"
    arrays = {key.removeprefix(prefix) for key in GOLDEN if key.startswith(prefix)}
    assert ours.keys() == {key for key in arrays if "/" not in key} - {"keys"}
    for key, value in ours.items():
        assert relative_error(value, case.golden(key)) < NETWORK, key


def our_name(name: str) -> str:
    """What a tensor of the release is called here."""
    theirs = {"backbone.backbone.": "", "backbone.norm1.": "srs.norm.", "backbone.attn.norm.": "srs.out_norm."}
    theirs |= {"backbone.attn.": "srs.", "head.0.": "head."}
    prefix = next(prefix for prefix in theirs if name.startswith(prefix))
    return theirs[prefix] + name.removeprefix(prefix)


def test_two_epochs_of_training(case: Case) -> None:
    """Mean losses, centers and both networks after each epoch: clipping, frozen prototypes, schedules, moving average."""
    steps = CASES["net"][case.name]["steps"]
    step = setup.build_step(case.args, case.method, steps, torch.device("cpu"), "fp32")
    for epoch in range(2):
        scalars = []
        for i in range(steps):
            crops, found = case.batch(i)
            scalars.append(step([[*crops, *found]], epoch * steps + i, epoch))
        means = torch.stack([torch.stack([s[key].double() for s in scalars]).mean() for key in ("loss", *TERMS)])
        assert relative_error(means, case.golden(f"epoch{epoch}/means")) < NETWORK
        assert relative_error(centers_of(case.method.criterion), case.golden(f"epoch{epoch}/center")) < NETWORK
        for who, network in (("student", case.method.student), ("teacher", case.method.teacher)):
            state = loading.unwrap(network).state_dict()
            tensors = {name: state[our_name(name)] for name in case.names}
            norms = torch.stack([t.norm() for t in tensors.values()])
            middles = torch.stack([t.flatten()[t.numel() // 2] for t in tensors.values()])
            assert relative_error(norms, case.golden(f"epoch{epoch}/{who}_norms")) < NETWORK
            assert relative_error(middles, case.golden(f"epoch{epoch}/{who}_first")) < NETWORK
            for name in ("backbone.backbone.cls_token", "backbone.attn.qkv.bias", "backbone.norm1.weight"):
                assert relative_error(tensors[name], case.golden(f"epoch{epoch}/{who}/{name}")) < NETWORK
