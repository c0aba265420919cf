"""The loss in chunks against the plain form: value, gradients, centers, memory, and a training with either."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import golden_arrays, relative_error
from fill import tensor
from helpers.step_runs import random_views, tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import utils
from benchmarks.golden import golden_loss, golden_outputs
from benchmarks.syncs import OperationCount
from losses.dino import DINOLoss
from losses.region import RegionMatchingLoss
from models.heads import WeightNormLinear
from models.outputs import MultiCropOutput
from ops import chunked_cross_entropy as chunked_module
from ops.chunked_cross_entropy import Targets, Temperatures, chunked_cross_entropy
from ops.logits import FactoredLogits

PROTOTYPES, CHANNELS = 37, 8
LAYERS = ("view", "region")


class Networks:
    """Last layers of a student and a teacher over bottleneck vectors, the student's being leaves of the graph."""

    def __init__(self, images: int, regions: tuple[int, ...]) -> None:
        self.student, self.teacher = ({name: self._layer() for name in LAYERS} for _ in range(2))
        for parameter in [p for layer in self.teacher.values() for p in layer.parameters()]:
            parameter.requires_grad_(False)
        self.inputs = [self._inputs(images, regions, True), self._inputs(images, regions[:2], False)]

    @staticmethod
    def _layer() -> WeightNormLinear:
        layer = WeightNormLinear(CHANNELS, PROTOTYPES)
        torch.nn.init.normal_(layer.weight_g, mean=2.0)
        return layer

    @staticmethod
    def _inputs(images: int, regions: tuple[int, ...], student: bool) -> dict[str, Any]:
        rows = images * sum(regions)
        vectors = {
            name: F.normalize(torch.randn(count, CHANNELS), dim=-1).requires_grad_(student)
            for name, count in (("view", images * len(regions)), ("region", rows))
        }
        return vectors | {"features": torch.randn(rows, 5), "regions": regions}

    def outputs(self, factored: bool) -> list[MultiCropOutput]:
        """Of student and teacher."""
        outputs = []
        for layers, inputs in zip((self.student, self.teacher), self.inputs):
            logits = [layers[n].factors(inputs[n]) if factored else layers[n](inputs[n]) for n in LAYERS]
            outputs.append(MultiCropOutput(logits[0], logits[1], inputs["features"], inputs["regions"]))
        return outputs

    def leaves(self) -> list[Tensor]:
        """Everything of the student that gets a gradient."""
        own = [self.inputs[0][name] for name in LAYERS]
        return own + [p for layer in self.student.values() for p in layer.parameters()]


def region_loss(views: int) -> RegionMatchingLoss:
    loss = RegionMatchingLoss(PROTOTYPES, views, 0.04, 0.07, 2, 4)
    for center in loss.state_dict().values():
        center.normal_(std=0.2)
    return loss


def shares(images: int, views: int, kind: str) -> list[Tensor] | None:
    """Targets of mixup: none, of two images each (as timm draws them), or of all images."""
    if kind == "none":
        return None
    if kind == "all":
        return [torch.rand(images, images).softmax(0) for _ in range(views)]
    lam = torch.rand(views)
    flipped = torch.eye(images).flip(0)
    return [lam[v] * torch.eye(images) + (1 - lam[v]) * flipped for v in range(views)]


def value_and_gradients(
    networks: Networks, loss: DINOLoss, factored: bool, mixup: Sequence[Tensor] | None, scale: float = 1.0
) -> tuple[dict[str, Tensor], list[Tensor]]:
    student, teacher = networks.outputs(factored)
    terms = loss.terms(student, teacher, 1, mixup)
    gradients = torch.autograd.grad(scale * loss.total(terms), networks.leaves())
    return terms, [gradient / scale for gradient in gradients]


@pytest.mark.parametrize("regions", [(4, 4), (4, 4, 1, 1), (6, 6, 2, 2, 1)], ids=str)
@pytest.mark.parametrize("images", [1, 3, 4])
@pytest.mark.parametrize("mixup", ["none", "two", "all"])
@pytest.mark.parametrize("rows", [1, 7, 10_000], ids="chunks of {}".format)
def test_equals_the_plain_form(
    monkeypatch: pytest.MonkeyPatch, regions: tuple[int, ...], images: int, mixup: str, rows: int
) -> None:
    """Both terms, and gradients of bottleneck vectors, gains and directions, whatever fits a chunk."""
    monkeypatch.setattr(chunked_module, "CHUNK_BYTES", rows * 4 * PROTOTYPES)
    networks, loss = Networks(images, regions), region_loss(len(regions))
    weights = shares(images, len(regions), mixup)
    plain_terms, plain = value_and_gradients(networks, loss, False, weights)
    terms, gradients = value_and_gradients(networks, loss, True, weights)
    for name, value in plain_terms.items():
        assert value.dtype == terms[name].dtype == torch.float32
        torch.testing.assert_close(terms[name], value)
    for ours, expected in zip(gradients, plain):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mixup", ["none", "two"])
def test_views_alone_equal_the_plain_form(mixup: str) -> None:
    networks, loss = Networks(4, (1, 1, 1)), DINOLoss(PROTOTYPES, 3, 0.04, 0.04, 0, 2)
    weights = shares(4, 3, mixup)
    (plain_student, plain_teacher), (student, teacher) = (networks.outputs(factored) for factored in (False, True))
    expected = loss(plain_student.view_logits, plain_teacher.view_logits, 0, weights)
    value = loss(student.view_logits, teacher.view_logits, 0, weights)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(
        torch.autograd.grad(value, networks.leaves()[0]), torch.autograd.grad(expected, networks.leaves()[0])
    )


def test_golden_losses() -> None:
    """With prototypes that are the identity, factored logits are the golden ones."""
    golden, loss, outputs = golden_arrays("loss_a"), golden_loss(RegionMatchingLoss), golden_outputs()
    student, teacher = (
        output._replace(
            view_logits=FactoredLogits(output.view_logits, torch.eye(32)),
            region_logits=FactoredLogits(output.region_logits, torch.eye(32)),
        )
        for output in outputs
    )
    value = loss(student, teacher, 1)
    value.backward()
    assert relative_error(value, golden["region_loss"]) < 1e-5
    assert relative_error(outputs[0].view_logits.grad, golden["region_grad_cls"]) < 1e-5
    assert relative_error(outputs[0].region_logits.grad, golden["region_grad_region"]) < 1e-5
    mix = [torch.softmax(3 * tensor(f"lossA-mix{v}", 3, 3), -1) for v in range(6)]
    mixed = golden_loss(DINOLoss)(student.view_logits, teacher.view_logits, 1, mix)
    assert relative_error(mixed, golden["view_loss_mixup"]) < 1e-5
    loss.accumulate_center(teacher)
    loss.update_center()
    assert relative_error(loss.center, golden["region_center"]) < 1e-5
    assert relative_error(loss.center_grid, golden["region_center_grid"]) < 1e-5


def slow_cross_entropy(
    student: FactoredLogits, teacher: FactoredLogits, targets: Targets, center: Tensor, temperatures: Temperatures
) -> Tensor:
    """One pair of rows at a time."""
    student_logits, teacher_logits = student.product(), teacher.product()
    total = center.new_zeros(())
    for g, s, m in itertools.product(*map(range, targets.rows_GSM.shape)):
        row = targets.rows_GSM[g, s, m]
        probs = F.softmax((teacher_logits[g, row] - center[0]) / temperatures.teacher, dim=-1)
        log_probs = F.log_softmax(student_logits[g, s] / temperatures.student, dim=-1)
        total = total - targets.weights_GSM[g, s, m] * (probs * log_probs).sum()
    return total


@pytest.mark.parametrize("rows", [1, 2, 5, 9, 100])
def test_equals_the_equation_in_float64(rows: int) -> None:
    """Any weights, rows that learn from nothing, and everything to the last digits."""
    groups, students, teachers, columns = 3, 5, 4, 2
    temperatures = Temperatures(0.1, 0.05)
    z = F.normalize(torch.randn(groups, students, CHANNELS, dtype=torch.float64), dim=-1).requires_grad_()
    prototypes = torch.randn(PROTOTYPES, CHANNELS, dtype=torch.float64).requires_grad_()
    teacher = FactoredLogits(
        torch.randn(groups, teachers, CHANNELS).double(), torch.randn(PROTOTYPES, CHANNELS).double()
    )
    weights = torch.rand(groups, students, columns, dtype=torch.float64)
    weights[1, 2] = 0
    targets = Targets(torch.randint(teachers, (groups, students, columns)), weights)
    center = torch.randn(1, PROTOTYPES, dtype=torch.float64)
    inputs = (FactoredLogits(z, prototypes), teacher, targets, center, temperatures)
    value, expected = chunked_cross_entropy(*inputs, chunk_bytes=rows * 8 * PROTOTYPES), slow_cross_entropy(*inputs)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    ours, slow = (torch.autograd.grad(3 * loss, (z, prototypes)) for loss in (value, expected))
    for a, b in zip(ours, slow):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert not ours[0][1, 2].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mixup", ["none", "two"])
def test_autocast_is_as_close_to_float32_as_the_plain_form(dtype: torch.dtype, mixup: str) -> None:
    """Values, gradients (scaled as for float16) and centers: errors at most those of the plain form and a little."""
    regions, scale = (9, 9, 4, 4), 4096.0
    networks, loss = Networks(4, regions), region_loss(len(regions))
    weights = shares(4, len(regions), mixup)
    exact_terms, exact = value_and_gradients(networks, loss, False, weights)
    with torch.autocast("cpu", dtype):
        plain_terms, plain = value_and_gradients(networks, loss, False, weights, scale)
        terms, gradients = value_and_gradients(networks, loss, True, weights, scale)
        assert networks.outputs(True)[0].view_logits.bottleneck.dtype == dtype
    for name, value in exact_terms.items():
        for expected_value in (value, plain_terms[name]):
            torch.testing.assert_close(terms[name], expected_value, rtol=4 * torch.finfo(dtype).eps, atol=0)
    for ours, other, expected in zip(gradients, plain, exact):
        assert relative_error(ours, expected) < 1.5 * relative_error(other, expected) + torch.finfo(dtype).eps
        assert ours.dtype == torch.float32


def test_small_gradients_survive_float16() -> None:
    """Gradients of logits are 1e-6 to 1e-4 here, of which float16 keeps few digits; and small weights must not shrink them."""
    prototypes = 2**16
    z = F.normalize(torch.rand(1, 12, 2), dim=-1).half()
    weight, teacher_weight = torch.randn(prototypes, 2).half(), torch.zeros(prototypes, 2)
    teacher_weight[0] = 10.0  # nearly all of the target
    targets = Targets(torch.zeros(1, 12, 1, dtype=torch.long), torch.full((1, 12, 1), 1e-6))
    gradients = []
    for dtype in (torch.float32, torch.float16):
        leaf = weight.to(dtype).requires_grad_()
        student, teacher = FactoredLogits(z.to(dtype), leaf), FactoredLogits(torch.ones(1, 1, 2), teacher_weight)
        teacher = FactoredLogits(*(factor.to(dtype) for factor in teacher))
        value = chunked_cross_entropy(student, teacher, targets, torch.zeros(1, prototypes), Temperatures(1.0, 1.0))
        gradients.append(torch.autograd.grad(1e9 * value, leaf)[0].float())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=5e-3, atol=0)


def test_centers_equal_the_plain_form() -> None:
    networks, losses = Networks(3, (4, 4)), [region_loss(2) for _ in range(2)]
    losses[1].load_state_dict(losses[0].state_dict())
    for loss, factored in zip(losses, (False, True)):
        for _ in range(2):  # micro-batches
            loss.accumulate_center(networks.outputs(factored)[1])
        loss.update_center()
    for a, b in zip(losses[0].state_dict().values(), losses[1].state_dict().values()):
        torch.testing.assert_close(a, b)


def test_nothing_is_computed_for_a_loss_without_gradient() -> None:
    networks, loss = Networks(2, (4, 4)), region_loss(2)
    student, teacher = networks.outputs(True)
    before = [value.clone() for value in loss.state_dict().values()]
    with torch.no_grad(), OperationCount() as alone:
        value = loss(student, teacher, 1)
    with OperationCount() as together:
        loss(student, teacher, 1)
    assert not value.requires_grad
    # Of each term: the logits of teacher and student, and with gradients those of the bottleneck and of the prototypes.
    products = [sum(count.operations[name] for name in ("mm", "addmm_")) for count in (alone, together)]
    assert products == [4, 8]
    torch.testing.assert_close(value, loss(student, teacher, 1).detach())
    assert all(torch.equal(a, b) for a, b in zip(before, loss.state_dict().values()))


def test_rows_that_do_not_fit_the_views() -> None:
    student, teacher = Networks(3, (4, 4, 1, 1)).outputs(True)
    loss, view = region_loss(4), student.view_logits
    with pytest.raises(ValueError, match="11 rows of student logits are not a multiple of the 4 views"):
        loss(student._replace(view_logits=view._replace(bottleneck=view.bottleneck[:-1])), teacher, 0)
    with pytest.raises(ValueError, match="region rows"):
        loss(student._replace(region_logits=view), teacher, 0)
    with pytest.raises(ValueError, match="the student has 2 images"):
        loss(Networks(2, (4, 4, 1, 1)).outputs(True)[0], teacher, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_widened_where_they_are_narrower_only(dtype: torch.dtype) -> None:
    z, weight = torch.randn(1, 3, 2).to(dtype), torch.randn(5, 2).to(dtype)
    targets = Targets(torch.zeros(1, 3, 1, dtype=torch.long), torch.ones(1, 3, 1))
    factors = FactoredLogits(z, weight)
    chunks = chunked_module._ChunkedPass(
        factors, factors, targets, torch.zeros(1, 5), Temperatures(1.0, 1.0), 2**20, (False, False)
    )
    assert (chunks.widened_NK is None) == (dtype == torch.float32)
    probs = torch.softmax((z[0] @ weight.T).float(), dim=-1)
    torch.testing.assert_close(chunks.run(), -(probs[0] * probs.log()).sum())


class Watch(TorchDispatchMode):
    """Notes the largest tensor that any operation gives, and operations that wait for the device."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.waits = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for output in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(output, Tensor):
                self.largest = max(self.largest, output.numel())
        self.waits += any(name in str(func) for name in self.WAITS)
        return result


def test_no_tensor_holds_all_logits_and_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    regions, rows_of_chunk = (9, 9, 4, 4), 20
    monkeypatch.setattr(chunked_module, "CHUNK_BYTES", rows_of_chunk * 4 * PROTOTYPES)
    networks, loss = Networks(4, regions), region_loss(len(regions))
    for factored, largest in ((False, 4 * sum(regions[:2]) * PROTOTYPES), (True, 2 * rows_of_chunk * PROTOTYPES)):
        with Watch() as watch:
            student, teacher = networks.outputs(factored)
            loss(student, teacher, 1).backward()
            loss.accumulate_center(teacher)
        assert watch.waits == 0
        assert watch.largest <= largest if factored else watch.largest >= largest


@pytest.mark.parametrize("flags", [[], ["--use_mixup", "on"], ["--norm_last_layer", "off"]], ids=" ".join)
def test_training_is_that_of_the_plain_loss(flags: list[str]) -> None:
    """Losses, centers and weights of both networks after some steps."""
    methods = []
    losses: list[list[float]] = []
    for plain in ("off", "on"):
        method, step = tiny("--plain_loss", plain, "--optimizer", "sgd", *flags)
        utils.seed_everything(0)  # mixup draws
        losses.append([float(step([random_views(4, i), random_views(4, i + 9)], i, 1)["loss"]) for i in range(4)])
        methods.append(method)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for part in ("student", "teacher", "criterion"):
        ours, plain_state = (getattr(method, part).state_dict() for method in methods)
        for name, value in plain_state.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6, msg=f"{part} {name}")
