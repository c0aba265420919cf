"""UDI's loss: values of a worked example, the cheaper form, no valid patch, and DINO as its limit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from losses import DINOLoss
from outputs import FactoredLogits
from udi_losses import StudentLevels, TeacherLevels, UDILoss
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


def test_the_worked_example() -> None:
    student, teacher = example()
    loss = criterion()
    terms = loss.level_terms(student, teacher, 0)
    expected = {"g_cl": 5.37648752, "g_mcl": 1.10017973, "g_pch": 7.31019318, "l_cl": 4.06592898, "l_mcl": 4.58145649}
    assert {name: float(term) for name, term in terms.items()} == pytest.approx(expected, abs=1e-7)
    assert float(loss.total_of(terms, L)) == pytest.approx(5.07800197, abs=1e-7)
    loss.accumulate_centers(teacher)
    loss.update_center()
    for name, values in (
        ("center", [0.02705599, 0.00034746, -0.02640809, -0.04958943, -0.06605908]),
        ("center_plus", [-0.05205584, -0.0737452, -0.0854535, -0.08559606, -0.07415361]),
        ("center_patch", [-0.08500455, -0.07984402, -0.06387698, -0.03926449, -0.00933773]),
    ):
        assert getattr(loss, name)[0].tolist() == pytest.approx(values, abs=1e-7), name


def test_probabilities_are_blended_where_asked() -> None:
    terms = criterion("probs").level_terms(*example(), 0)
    assert float(terms["g_mcl"]) == pytest.approx(3.013256, abs=1e-6)
    assert float(terms["l_mcl"]) == pytest.approx(4.393817, abs=1e-6)


def test_averaging_before_the_last_layer_gives_the_same_numbers() -> None:
    student, teacher = example()
    prototypes = torch.randn(K, 3, dtype=torch.float64)
    factored = teacher._replace(
        patch_VBSK=FactoredLogits(torch.randn(2, B, M, 3, dtype=torch.float64), prototypes),
        local_patch_LVBSK=FactoredLogits(torch.randn(L, 2, B, m, 3, dtype=torch.float64), prototypes),
    )
    plain = factored._replace(
        patch_VBSK=factored.patch_VBSK.product(),  # type: ignore[union-attr]
        local_patch_LVBSK=factored.local_patch_LVBSK.product(),  # type: ignore[union-attr]
    )
    losses = [criterion() for _ in range(2)]
    values = [list(loss.level_terms(student, form, 0).values()) for loss, form in zip(losses, (factored, plain))]
    assert torch.allclose(torch.stack(values[0]), torch.stack(values[1]), atol=1e-10)
    for loss, form in zip(losses, (factored, plain)):
        loss.accumulate_centers(form)
        loss.update_center()
    for name in ("center", "center_plus", "center_patch"):
        assert torch.allclose(getattr(losses[0], name), getattr(losses[1], name), atol=1e-6), name


@pytest.mark.parametrize("mix", ["logits", "probs"])
def test_without_a_valid_patch_nothing_is_nan(mix: str) -> None:
    student, teacher = example()
    teacher = teacher._replace(valid_VBS=torch.zeros(2, B, M).bool(), local_valid_LVBS=torch.zeros(L, 2, B, m).bool())
    loss = criterion(mix)
    before = loss.center_patch.clone()
    terms = loss.level_terms(student, teacher, 0)
    assert terms["g_pch"] == 0
    assert bool(torch.isfinite(loss.total_of(terms, L)))
    loss.accumulate_centers(teacher)
    loss.update_center()
    assert torch.equal(loss.center_patch, before)


def test_with_the_class_token_alone_it_is_dino() -> None:
    student, teacher = example()
    loss, dino = criterion(), DINOLoss(K, 2 + L, 0.04, 0.04, 0, 1).double()
    dino.center.copy_(loss.center)
    terms = loss.level_terms(StudentLevels(student.cls_VBK, student.local_cls_LBK), TeacherLevels(teacher.cls_VBK), 0)
    rows = torch.cat([student.cls_VBK, student.local_cls_LBK]).flatten(0, 1)
    assert float(loss.total_of(terms, L)) == pytest.approx(
        float(dino(rows, teacher.cls_VBK.flatten(0, 1), 0)), abs=1e-10
    )


def test_without_local_views_only_the_global_ones_count() -> None:
    student, teacher = example()
    student = student._replace(local_cls_LBK=student.local_cls_LBK[:0], local_plus_LBK=None)
    terms = criterion().level_terms(student, teacher._replace(local_patch_LVBSK=None, local_valid_LVBS=None), 0)
    assert terms.keys() == {"g_cl", "g_mcl", "g_pch"}
    assert float(criterion().total_of(terms, 0)) == pytest.approx((5.37648752 + 1.10017973 + 7.31019318) / 3, abs=1e-7)


@pytest.mark.parametrize(("name", "value"), [("alpha", 1.5), ("target_mix", "both")])
def test_other_values_are_refused(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"--{name} {value} must"):
        UDILoss(K, 2, 0.04, 0.04, 0, 1, **{name: value})  # type: ignore[arg-type]
