"""The losses against golden values and against loops written from the equations."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import golden_arrays, relative_error
from fill import tensor
from torch import Tensor

import main_esvit
from benchmarks.golden import golden_loss, golden_outputs
from losses.dino import DINOLoss
from losses.distillation import teacher_temperature_schedule
from losses.matching import mixup_sources
from losses.region import RegionMatchingLoss
from models import MultiCropOutput
from ops.logits import FactoredLogits
from utils import UsageError

TOLERANCE = 1e-5


def random_outputs(
    images: int, student_regions: tuple[int, ...], prototypes: int = 11, channels: int = 5, seed: int = 0
) -> tuple[MultiCropOutput, MultiCropOutput]:
    generator = torch.Generator().manual_seed(seed)

    def output(regions: tuple[int, ...]) -> MultiCropOutput:
        rows = images * sum(regions)
        return MultiCropOutput(
            torch.randn(images * len(regions), prototypes, generator=generator),
            torch.randn(rows, prototypes, generator=generator),
            torch.randn(rows, channels, generator=generator),
            regions,
        )

    return output(student_regions), output(student_regions[:2])


def region_of(output: MultiCropOutput, rows: Tensor, images: int, view: int, image: int, region: int) -> Tensor:
    """One region's row, by counting."""
    before = images * sum(output.regions_per_view[:view]) + image * output.regions_per_view[view] + region
    return rows[before]


def slow_loss(
    loss: RegionMatchingLoss,
    student: MultiCropOutput,
    teacher: MultiCropOutput,
    images: int,
    epoch: int,
    weights: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """L_V and L_R from the equations, one pair of rows at a time."""
    temperature, views = loss.teacher_temp(epoch), loss.ncrops
    if weights is None:
        weights = [torch.eye(images)] * views
    view_terms, region_terms = [], []
    for q, v in itertools.product(range(2), range(views)):
        if q == v:
            continue
        for image in range(images):
            log_p = F.log_softmax(student.view_logits[v * images + image] / 0.1, -1)
            target = sum(
                weights[v][source, image]
                * F.softmax((teacher.view_logits[q * images + source] - loss.center[0]) / temperature, -1)
                for source in range(images)
            )
            view_terms.append(-(target * log_p).sum())
            for i in range(student.regions_per_view[v]):
                log_p = F.log_softmax(region_of(student, student.region_logits, images, v, image, i) / 0.1, -1)
                feature = region_of(student, student.region_features, images, v, image, i)
                total = torch.zeros(())
                for source in range(images):
                    cosines = [
                        F.cosine_similarity(
                            feature, region_of(teacher, teacher.region_features, images, q, source, j), dim=0
                        )
                        for j in range(teacher.regions_per_view[q])
                    ]
                    best = int(torch.stack(cosines).argmax())
                    logits = region_of(teacher, teacher.region_logits, images, q, source, best)
                    target = F.softmax((logits - loss.center_grid[0]) / temperature, -1)
                    total = total - weights[v][source, image] * (target * log_p).sum()
                region_terms.append((total / student.regions_per_view[v], q, v))
    pairs = 2 * views - 2
    return torch.stack(view_terms).sum() / images / pairs, sum(t for t, _, _ in region_terms) / images / pairs  # type: ignore[return-value]


def test_region_loss_golden() -> None:
    golden, loss, (student, teacher) = golden_arrays("loss_a"), golden_loss(RegionMatchingLoss), golden_outputs()
    value = loss(student, teacher, 1)
    value.backward()
    assert relative_error(value, golden["region_loss"]) < TOLERANCE
    assert relative_error(student.view_logits.grad, golden["region_grad_cls"]) < TOLERANCE
    assert relative_error(student.region_logits.grad, golden["region_grad_region"]) < TOLERANCE
    loss.accumulate_center(teacher)
    loss.update_center()
    assert relative_error(loss.center, golden["region_center"]) < TOLERANCE
    assert relative_error(loss.center_grid, golden["region_center_grid"]) < TOLERANCE


def test_view_loss_golden() -> None:
    golden, loss, (student, teacher) = golden_arrays("loss_a"), golden_loss(DINOLoss), golden_outputs()
    value = loss(student.view_logits, teacher.view_logits, 1)
    value.backward()
    assert relative_error(value, golden["view_loss"]) < TOLERANCE
    assert relative_error(student.view_logits.grad, golden["view_grad"]) < TOLERANCE
    mix = [torch.softmax(3 * tensor(f"lossA-mix{v}", 3, 3), -1) for v in range(6)]
    assert relative_error(loss(student.view_logits, teacher.view_logits, 1, mix), golden["view_loss_mixup"]) < TOLERANCE
    loss.accumulate_center(teacher.view_logits)
    loss.update_center()
    assert relative_error(loss.center, golden["view_center"]) < TOLERANCE


@pytest.mark.parametrize("regions", [(4, 4), (4, 4, 1, 1), (6, 6, 2, 2, 1)], ids=str)
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("mixed", [False, True])
def test_losses_equal_the_equations(regions: tuple[int, ...], images: int, mixed: bool) -> None:
    """Value and gradients over numbers of local crops, of local sizes, of images, with and without mixup."""
    loss = RegionMatchingLoss(11, len(regions), 0.04, 0.07, 2, 4)
    for center in loss.state_dict().values():
        center.normal_(std=0.2)
    weights = [torch.rand(images, images).softmax(0) for _ in regions] if mixed else None
    fast_student, teacher = random_outputs(images, regions)
    slow_student = fast_student._replace(
        view_logits=fast_student.view_logits.clone(), region_logits=fast_student.region_logits.clone()
    )
    for student in (fast_student, slow_student):
        student.view_logits.requires_grad_()
        student.region_logits.requires_grad_()
    terms = loss.terms(fast_student, teacher, 1, weights)
    view_loss, region_loss = slow_loss(loss, slow_student, teacher, images, 1, weights)
    torch.testing.assert_close(terms["view_loss"], view_loss)
    torch.testing.assert_close(terms["region_loss"], region_loss)
    loss(fast_student, teacher, 1, weights).backward()
    (0.5 * view_loss + 0.5 * region_loss).backward()
    torch.testing.assert_close(fast_student.view_logits.grad, slow_student.view_logits.grad)
    torch.testing.assert_close(fast_student.region_logits.grad, slow_student.region_logits.grad)


def test_one_hot_mixup_is_no_mixup() -> None:
    loss = RegionMatchingLoss(11, 4, 0.04, 0.04, 0, 1)
    student, teacher = random_outputs(3, (4, 4, 1, 1))
    torch.testing.assert_close(loss(student, teacher, 0, [torch.eye(3)] * 4), loss(student, teacher, 0))


def test_known_number_of_mixed_images_changes_no_number() -> None:
    """Image and mirror image in two views of four, as timm mixes; a view that is not mixed has weights of 0 for the other."""
    loss = RegionMatchingLoss(11, 4, 0.04, 0.04, 0, 1)
    student, teacher = random_outputs(5, (4, 4, 1, 1))
    weights = [share * torch.eye(5) + (1 - share) * torch.eye(5).flip(0) for share in (0.3, 0.8, 1.0, 1.0)]
    sources = mixup_sources(weights, mixed_from=2)
    assert sources.images_PB.shape == (2, 5)
    torch.testing.assert_close(sources.weights_VPB.sum(dim=1), torch.ones(4, 5))
    for image in range(5):  # the one in the middle is its own mirror image
        assert {image, 4 - image} <= set(sources.images_PB[:, image].tolist())
    known, unknown = (loss.terms(student, teacher, 0, weights, most) for most in (2, None))
    for name in unknown:
        torch.testing.assert_close(known[name], unknown[name])


def test_uniform_outputs_sit_at_ln_k() -> None:
    loss = DINOLoss(65536, 2, 0.04, 0.04, 0, 1)
    value = loss(torch.zeros(2, 65536), torch.zeros(2, 65536), 0)
    assert value.item() == pytest.approx(math.log(65536), rel=1e-5)


def test_loss_changes_no_state_and_teacher_gets_no_gradient() -> None:
    loss = RegionMatchingLoss(11, 2, 0.04, 0.04, 0, 1)
    student, teacher = random_outputs(2, (4, 4))
    teacher.view_logits.requires_grad_()
    student.view_logits.requires_grad_()
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    loss(student, teacher, 0).backward()
    assert teacher.view_logits.grad is None
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())


def test_loss_is_float32_whatever_the_logits_are() -> None:
    loss = RegionMatchingLoss(11, 2, 0.04, 0.04, 0, 1)
    student, teacher = random_outputs(2, (4, 4))
    half = [MultiCropOutput(o[0].bfloat16(), o[1].bfloat16(), o[2].bfloat16(), o[3]) for o in (student, teacher)]
    rounded = [MultiCropOutput(o[0].float(), o[1].float(), o[2].float(), o[3]) for o in half]
    value = loss(*half, 0)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(*rounded, 0))


def test_loss_is_float32_under_autocast() -> None:
    """Region matching and mixup included: in bf16 a quarter of the matches would differ."""
    loss = RegionMatchingLoss(11, 4, 0.04, 0.04, 0, 1)
    student, teacher = random_outputs(3, (16, 16, 4, 4))
    weights = [torch.rand(3, 3).softmax(0) for _ in range(4)]
    outside = loss(student, teacher, 0, weights)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(student, teacher, 0, weights), outside)


def test_center_of_micro_batches_is_that_of_the_batch() -> None:
    whole, parts = DINOLoss(11, 2, 0.04, 0.04, 0, 1), DINOLoss(11, 2, 0.04, 0.04, 0, 1)
    logits = torch.randn(12, 11)
    whole.accumulate_center(logits)
    for part in logits.split([3, 9]):
        parts.accumulate_center(part)
    whole.update_center()
    parts.update_center()
    torch.testing.assert_close(parts.center, whole.center)
    torch.testing.assert_close(whole.center, 0.1 * logits.mean(0, keepdim=True))
    parts.accumulate_center(torch.full((2, 11), float("nan")))
    parts.update_center(torch.tensor(False))
    parts.update_center()
    torch.testing.assert_close(parts.center, whole.center)


@pytest.mark.parametrize("factored", [False, True])
def test_center_of_weighted_rows(factored: bool) -> None:
    """The weighted mean over micro-batches, of which one may have no weight; without any the center stays as it is."""
    loss = DINOLoss(11, 2, 0.04, 0.04, 0, 1)
    loss.center.normal_()
    before, bottleneck, prototypes = loss.center.clone(), torch.randn(12, 3), torch.randn(11, 3)
    weights = torch.cat([torch.rand(4), torch.zeros(4), torch.rand(4)])
    for rows in (slice(0, 4), slice(4, 8), slice(8, 12)):
        logits = FactoredLogits(bottleneck[rows], prototypes)
        loss._accumulate("center", logits if factored else logits.product(), weights[rows])
    loss._accumulate("center", torch.ones(2, 11))  # of weight 1 each
    loss.update_center()
    total = (weights[:, None] * (bottleneck @ prototypes.T)).sum(dim=0, keepdim=True) + 2
    torch.testing.assert_close(loss.center, 0.9 * before + 0.1 * total / (weights.sum() + 2))
    kept = loss.center.clone()
    loss._accumulate("center", bottleneck @ prototypes.T, torch.zeros(12))
    loss.update_center(torch.tensor(True))
    assert torch.equal(loss.center, kept)


def test_published_names() -> None:
    assert main_esvit.DINOLoss is DINOLoss  # scripts from elsewhere import them from there
    assert main_esvit.RegionMatchingLoss is RegionMatchingLoss
    assert list(RegionMatchingLoss(7, 2, 0.04, 0.04, 0, 1).state_dict()) == ["center", "center_grid"]


def test_teacher_temperature_warms_up_to_its_end_point() -> None:
    assert teacher_temperature_schedule(0.04, 0.07, 4, 6).tolist() == pytest.approx(
        [0.04, 0.05, 0.06, 0.07, 0.07, 0.07]
    )
    with pytest.raises(UsageError, match="warmup_teacher_temp_epochs"):
        teacher_temperature_schedule(0.04, 0.07, 7, 6)


def test_rows_that_do_not_fit_the_views() -> None:
    loss = RegionMatchingLoss(11, 4, 0.04, 0.04, 0, 1)
    student, teacher = random_outputs(3, (4, 4, 1, 1))
    with pytest.raises(ValueError, match="not a multiple of the 4 views"):
        loss(student._replace(view_logits=student.view_logits[:-1]), teacher, 0)
    with pytest.raises(ValueError, match="the student has 4 views"):
        loss(student._replace(regions_per_view=(4, 4, 1)), teacher, 0)
    with pytest.raises(ValueError, match="region rows"):
        loss(student._replace(region_logits=student.region_logits[:-1]), teacher, 0)
