"""UDI's loss: values of a worked example, factored logits, missing valid patches, and DINO as a special case."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from losses.dino import DINOLoss
from losses.udi import StudentLevels, TeacherLevels, UDILoss
from ops.logits import FactoredLogits
from training import collapse
from utils import UsageError

B, L, K, M, m = 2, 2, 5, 4, 3


def sines(start: float, *shape: int) -> Tensor:
    return torch.sin(start + 0.37 * torch.arange(math.prod(shape), dtype=torch.float64)).view(shape)


def example() -> tuple[StudentLevels, TeacherLevels]:
    valid, local_valid = torch.ones(2, B, M, dtype=torch.float64), torch.ones(L, 2, B, m, dtype=torch.float64)
    valid[0, 0, 3] = 0
    valid[1, 1, 2:] = 0
    local_valid[0, 0, 1, 2] = 0
    local_valid[1, 1, 0, :] = 0
    student = StudentLevels(
        sines(1, 2, B, K), sines(4, L, B, K), sines(2, 2, B, K), sines(5, L, B, K), sines(3, 2, B, M, K)
    )
    return student, TeacherLevels(sines(6, 2, B, K), sines(7, 2, B, M, K), valid, sines(8, L, 2, B, m, K), local_valid)


def criterion(mix: str = "logits", centers: bool = True) -> UDILoss:
    loss = UDILoss(K, 2 + L, 0.04, 0.04, 0, 1, target_mix=mix).double()
    if centers:
        for name, start in (("center", 9), ("center_plus", 10), ("center_patch", 11)):
            getattr(loss, name).copy_(0.1 * sines(start, 1, K))
    return loss


def test_worked_example() -> None:
    student, teacher = example()
    loss = criterion()
    terms = loss.terms(student, teacher, 0)
    expected = {"g_cl": 5.37648752, "g_mcl": 1.10017973, "g_pch": 7.31019318, "l_cl": 4.06592898, "l_mcl": 4.58145649}
    assert {name: float(term) for name, term in terms.items()} == pytest.approx(expected, abs=1e-7)
    assert float(loss.total(terms)) == pytest.approx(5.07800197, abs=1e-7)
    loss.accumulate_center(teacher)
    loss.update_center()
    for name, values in (
        ("center", [0.02705599, 0.00034746, -0.02640809, -0.04958943, -0.06605908]),
        ("center_plus", [-0.05205584, -0.0737452, -0.0854535, -0.08559606, -0.07415361]),
        ("center_patch", [-0.08500455, -0.07984402, -0.06387698, -0.03926449, -0.00933773]),
    ):
        assert getattr(loss, name)[0].tolist() == pytest.approx(values, abs=1e-7), name


def test_target_mix_probs() -> None:
    terms = criterion("probs").terms(*example(), 0)
    assert float(terms["g_mcl"]) == pytest.approx(3.013256, abs=1e-6)
    assert float(terms["l_mcl"]) == pytest.approx(4.393817, abs=1e-6)


def factored_example(shared: bool = True) -> tuple[StudentLevels, TeacherLevels]:
    """Return factored logits of the sizes of the worked example, in float64; those of the student with gradients."""

    def rows(prototypes: Tensor, *shape: int) -> FactoredLogits:
        return FactoredLogits(torch.randn(*shape, 3, dtype=torch.float64).requires_grad_(), prototypes)

    student, *others = (torch.randn(K, 3, dtype=torch.float64).requires_grad_() for _ in range(4))
    cls, patches = (others[0], others[0]) if shared else others[:2]
    _, teacher = example()
    return StudentLevels(
        rows(student, 2, B), rows(student, L, B), rows(student, 2, B), rows(student, L, B), rows(student, 2, B, M),
        rows(student, L, B, m),
    ), teacher._replace(
        cls_VBK=rows(cls, 2, B), patch_VBSK=rows(patches, 2, B, M), local_patch_LVBSK=rows(patches, L, 2, B, m),
    )  # fmt: skip


def materialize(levels: Any) -> Any:
    return type(levels)(*(x.product() if isinstance(x, FactoredLogits) else x for x in levels))


@pytest.mark.parametrize("fall_back", [False, True])
@pytest.mark.parametrize("shared", [False, True], ids=["three heads", "one head"])
@pytest.mark.parametrize("mix", ["logits", "probs"])
def test_factored_logits_equal_whole_logits(mix: str, shared: bool, fall_back: bool) -> None:
    """Terms, gradients and centers."""
    student, teacher = factored_example(shared)
    leaves = [t for x in student if isinstance(x, FactoredLogits) for t in x]
    outcomes = []
    for change in (lambda x: x, materialize):
        loss = criterion(mix)
        loss.fall_back = fall_back
        terms = loss.terms(change(student), change(teacher), 0)
        assert terms.keys() == {"g_cl", "l_cl", "g_mcl", "l_mcl", "g_pch", "l_pch"}
        gradients = torch.autograd.grad(loss.total(terms), leaves)
        loss.accumulate_center(change(teacher))
        loss.update_center()
        outcomes.append([torch.stack(list(terms.values())), *gradients, *loss.state_dict().values()])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("mix", ["logits", "probs"])
def test_a_pair_without_a_valid_sample_falls_back_to_the_class_token(mix: str) -> None:
    """Without any valid sample the second token has the target of the class token."""
    student, teacher = example()
    teacher = teacher._replace(valid_VBS=torch.zeros(2, B, M), local_valid_LVBS=torch.zeros(L, 2, B, m))
    loss = criterion(mix)
    loss.fall_back = True
    loss.center_plus.copy_(loss.center)
    terms = loss.terms(student._replace(plus_VBK=student.cls_VBK, local_plus_LBK=student.local_cls_LBK), teacher, 0)
    assert float(terms["g_mcl"]) == pytest.approx(float(terms["g_cl"]), abs=1e-10)
    assert float(terms["l_mcl"]) == pytest.approx(float(terms["l_cl"]), abs=1e-10)


def test_patches_of_local_views_learn_from_both_teacher_views() -> None:
    """Compare with the equation, written as loops."""
    student, teacher = example()
    own = sines(12, L, B, m, K)
    loss = criterion()
    term = loss.terms(student._replace(local_patch_LBSK=own), teacher, 0)["l_pch"]
    assert isinstance(teacher.local_patch_LVBSK, Tensor)
    assert teacher.local_valid_LVBS is not None
    total, count = 0.0, 0.0
    for at in itertools.product(range(L), range(2), range(B), range(m)):
        p = torch.softmax((teacher.local_patch_LVBSK[at] - loss.center_patch[0]) / 0.04, dim=-1)
        weight = float(teacher.local_valid_LVBS[at])
        total -= weight * float((p * torch.log_softmax(own[at[0], at[2], at[3]] / 0.1, dim=-1)).sum())
        count += weight
    assert float(term) == pytest.approx(total / count, abs=1e-10)


def test_level_weights() -> None:
    student, teacher = example()
    terms = criterion().terms(student, teacher, 0)
    loss = UDILoss(K, 2 + L, 0.04, 0.04, 0, 1, level_weights=(2, 0, 1)).double()
    expected = (2 * (terms["g_cl"] + L * terms["l_cl"]) / (1 + L) + terms["g_pch"]) / 3
    assert float(loss.total(terms)) == pytest.approx(float(expected), abs=1e-10)
    with pytest.raises(UsageError, match=r"--level_weights 0 1 1 must be"):
        UDILoss(K, 2, 0.04, 0.04, 0, 1, level_weights=(0, 1, 1))


def test_monitored_rows_are_those_of_the_terms() -> None:
    """All rows are sampled here, so that KL divergence plus teacher entropy equals each term."""
    student, teacher = example()
    loss = criterion()
    terms = loss.terms(student, teacher, 0)
    features = {name: torch.randn(4, 3) for name in ("cls", "cls+", "patch")}
    levels = loss.monitored_levels(student, teacher, 0, features)
    for name, term in (("cls", "g_cl"), ("cls+", "g_mcl")):
        measured = collapse.measure(levels[name])
        found = float(measured["kl"] + measured["teacher_entropy"])
        assert found == pytest.approx(float(terms[term]), abs=1e-6)
        assert levels[name].term == term
    valid = int(teacher.valid_VBS.sum())  # type: ignore[union-attr]
    patch = levels["patch"]
    patch = patch._replace(student_logits=patch.student_logits[:valid], teacher_logits=patch.teacher_logits[:valid])  # type: ignore[arg-type]
    measured = collapse.measure(patch)
    assert float(measured["kl"] + measured["teacher_entropy"]) == pytest.approx(float(terms["g_pch"]), abs=1e-6)


@pytest.mark.parametrize("mix", ["logits", "probs"])
def test_no_valid_patch_gives_no_nan(mix: str) -> None:
    student, teacher = example()
    teacher = teacher._replace(valid_VBS=torch.zeros(2, B, M).bool(), local_valid_LVBS=torch.zeros(L, 2, B, m).bool())
    loss = criterion(mix)
    before = loss.center_patch.clone()
    terms = loss.terms(student, teacher, 0)
    assert terms["g_pch"] == 0
    assert bool(torch.isfinite(loss.total(terms)))
    loss.accumulate_center(teacher)
    loss.update_center()
    assert torch.equal(loss.center_patch, before)


@pytest.mark.parametrize("local", [False, True])
def test_mean_over_patches_of_all_processes(local: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The average of the losses of two processes, one without a valid patch, is the mean over all valid patches."""
    student, teacher = example()
    student = student._replace(local_patch_LBSK=sines(12, L, B, m, K))
    name, field = ("l_pch", "local_valid_LVBS") if local else ("g_pch", "valid_VBS")
    expected = criterion().terms(student, teacher, 0)[name]
    valid = getattr(teacher, field)
    monkeypatch.setattr("losses.udi.get_world_size", lambda: 2)
    monkeypatch.setattr("losses.udi.all_reduce_sum", lambda _: valid.sum())
    terms = [criterion().terms(student, teacher._replace(**{field: own}), 0)[name] for own in (valid, 0 * valid)]
    assert float(terms[1]) == 0
    assert float(sum(terms)) / 2 == pytest.approx(float(expected), abs=1e-10)


def test_class_token_alone_equals_dino() -> None:
    student, teacher = example()
    loss, dino = criterion(), DINOLoss(K, 2 + L, 0.04, 0.04, 0, 1).double()
    dino.center.copy_(loss.center)
    terms = loss.terms(StudentLevels(student.cls_VBK, student.local_cls_LBK), TeacherLevels(teacher.cls_VBK), 0)
    rows, teacher_rows = sines(1, 2, B, K), sines(6, 2, B, K).flatten(0, 1)
    rows = torch.cat([rows, sines(4, L, B, K)]).flatten(0, 1)
    assert float(loss.total(terms)) == pytest.approx(float(dino(rows, teacher_rows, 0)), abs=1e-10)


def test_without_local_views() -> None:
    student, teacher = example()
    student = student._replace(local_cls_LBK=torch.zeros(0, B, K), local_plus_LBK=None)
    terms = criterion().terms(student, teacher._replace(local_patch_LVBSK=None, local_valid_LVBS=None), 0)
    assert terms.keys() == {"g_cl", "g_mcl", "g_pch"}
    assert float(UDILoss(K, 2, 0.04, 0.04, 0, 1).double().total(terms)) == pytest.approx(
        (5.37648752 + 1.10017973 + 7.31019318) / 3, abs=1e-7
    )


@pytest.mark.parametrize(("name", "value"), [("alpha", 1.5), ("target_mix", "both")])
def test_invalid_values_are_rejected(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"--{name} {value} must"):
        UDILoss(K, 2, 0.04, 0.04, 0, 1, **{name: value})  # type: ignore[arg-type]
