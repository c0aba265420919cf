"""The golden numbers of the references on the device: networks, losses and updates of benchmarks/golden.py and golden_udi.py."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import utils
from benchmarks import golden, golden_udi
from benchmarks.golden import relative_error
from benchmarks.gpu_rows import Bench, Bound, Figures, largest
from losses.dino import DINOLoss
from losses.region import RegionMatchingLoss
from losses.udi import StudentLevels, TeacherLevels
from training import setup

FP32 = 1e-4  # largest difference by largest value; TF32 is off
AUTOCAST = {"bf16": 0.03, "fp16": 0.005}  # of network outputs; two to three times what a CPU has
AUTOCAST_LOSS = {"bf16": 3e-3, "fp16": 5e-4}
FLOAT64 = 1e-5
LAST_LOSS, MEAN_ABS = 2e-3, 2e-3  # of the trajectory


@torch.no_grad()
def check_network(name: str, bench: Bench) -> Figures:
    """Compare multi-crop outputs and headless features in float32 and under autocast, and the loss of the outputs."""
    expected, device = golden.arrays(name, bench.golden), bench.device
    dense, headless = (golden.golden_network(name, dense).to(device) for dense in (True, False))
    views = [crop.to(device) for crop in golden.crops()]
    criterion = RegionMatchingLoss(128, len(views), 0.04, 0.04, 0, 1).to(device)
    reference = None
    for precision in ("fp32", *golden_precisions(bench)):
        with utils.autocast(device, precision):
            output = dense(views)
            features = {"backbone_224": headless(views[0]), "backbone_96": headless(views[2])}
            loss = criterion(output, dense(views[:2]), 0)
        found = {
            "cls_logits": output.view_logits,
            "region_logits_every_37th_row": output.region_logits[::37],
            "region_features_every_37th_row": output.region_features[::37],
            **features,
        }
        errors = [relative_error(value.float(), expected[key]) for key, value in found.items()]
        yield precision, largest(errors, FP32 if precision == "fp32" else AUTOCAST[precision])
        if reference is None:
            reference = loss
        else:
            assert loss.dtype == torch.float32
            yield f"{precision} loss", Bound(relative_error(loss, reference.cpu()), AUTOCAST_LOSS[precision])


def golden_precisions(bench: Bench) -> tuple[str, ...]:
    """Return the precisions of autocast that the device computes in; none for tiny runs, since a CPU emulates them."""
    if bench.tiny:
        return ()
    if bench.is_cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        return ("fp16",)
    return ("bf16", "fp16")


def check_losses(bench: Bench) -> Figures:
    """Compare values, gradients and centers of both losses."""
    expected = golden.arrays("loss_a", bench.golden)
    region = golden.golden_loss(RegionMatchingLoss).to(bench.device)
    view = golden.golden_loss(DINOLoss).to(bench.device)
    student, teacher = golden.golden_outputs(bench.device)
    value = region(student, teacher, 1)
    value.backward()
    region.accumulate_center(teacher)
    region.update_center()
    found = {"region_loss": value, "region_grad_cls": student.view_logits.grad}
    found |= {"region_grad_region": student.region_logits.grad}
    found |= {"region_center": region.center, "region_center_grid": region.center_grid}
    yield "view and region loss", largest((relative_error(found[key], expected[key]) for key in found), FP32)

    student, teacher = golden.golden_outputs(bench.device)
    value = view(student.view_logits, teacher.view_logits, 1)
    value.backward()
    mixes = [torch.softmax(3 * golden.tensor(f"lossA-mix{v}", 3, 3), -1).to(bench.device) for v in range(6)]
    mixed = view(student.view_logits, teacher.view_logits, 1, mixes)
    view.accumulate_center(teacher.view_logits)
    view.update_center()
    found = {"view_loss": value, "view_grad": student.view_logits.grad, "view_loss_mixup": mixed}
    found |= {"view_center": view.center}
    yield "view loss, mixup", largest((relative_error(found[key], expected[key]) for key in found), FP32)


def check_trajectory(bench: Bench) -> Figures:
    """Compare six updates of the whole rule: losses, and both networks and centers at the end."""
    expected = golden.settings("trajectory_region_adamw", bench.golden)
    step = golden.golden_step(bench.device)
    steps_per_epoch = golden.TRAJECTORY_STEPS // 2
    losses = [
        step([golden.golden_views(i, bench.device)], i, i // steps_per_epoch)["loss"].item()
        for i in range(golden.TRAJECTORY_STEPS)
    ]
    yield "first loss", Bound(relative_error(losses[0], expected["losses"][0]), FP32)
    yield "losses", largest((relative_error(a, b) for a, b in zip(losses, expected["losses"], strict=True)), LAST_LOSS)
    method = step.method
    for name, network in (("student", method.student), ("teacher", method.teacher)):
        means = {key: value.abs().mean() for key, value in network.state_dict().items() if value.is_floating_point()}
        wanted = expected[f"{name}_mean_abs"]
        yield name, largest((relative_error(means[key], wanted[key]) for key in wanted), MEAN_ABS)
    centers = {f"{name}_mean_abs": value.abs().mean() for name, value in method.criterion.state_dict().items()}
    yield "centers", largest((relative_error(centers[key], expected[key]) for key in centers), MEAN_ABS)


def check_udi_losses(bench: Bench) -> Figures:
    """Compare terms, gradients and centers of UDI's loss, in float32."""
    expected = golden.arrays("udi_a", bench.golden)
    for name, case in golden_udi.CASES["loss"].items():
        loss, errors = golden_udi.golden_loss(name).float().to(bench.device), []
        for i in range(case["steps"]):
            prefix = f"loss/{name}/{i}"
            inputs = golden_udi.loss_inputs(name, i)
            x = {
                key: (value if value.dtype == torch.bool else value.float()).to(bench.device)
                for key, value in inputs.items()
            }
            for center, row_K in zip(golden_udi.CENTERS, x["center"] if i == 0 else ()):
                getattr(loss, center).copy_(row_K[None])
            logits = {key: x[key].requires_grad_() for key in x if key.startswith("s_")}
            student = StudentLevels(*(logits[f"s_{key}"] for key in ("cls", "cls_loc", "plus", "plus_loc", "pat")))
            teacher = TeacherLevels(x["t_cls"], x["t_pat"], x["V"], x["t_loc"], x["W"])
            terms = loss.terms(student, teacher, case["epoch"])
            total = loss.total(terms)
            values = torch.stack([total, *(terms[key] for key in golden_udi.TERMS)])
            errors.append(relative_error(values, expected[f"{prefix}/terms"]))
            gradients = torch.autograd.grad(total, list(logits.values()))
            errors += [relative_error(g, expected[f"{prefix}/grad_{key}"]) for key, g in zip(logits, gradients)]
            loss.accumulate_center(teacher)
            loss.update_center()
            errors.append(relative_error(golden_udi.centers_of(loss), expected[f"{prefix}/center"]))
        yield f"case {name}", largest(errors, FP32)


def check_udi_epochs(bench: Bench) -> Figures:
    """Compare two epochs of UDI, in the float64 of the golden numbers: means of the losses, and centers."""
    case = golden_udi.build_case(golden.arrays("udi_a", bench.golden), bench.device)
    steps = golden_udi.CASES["net"][case.name]["steps"]
    step = setup.build_step(case.args, case.method, steps, bench.device, "fp32")
    for epoch in range(2):
        scalars = []
        for i in range(steps):
            crops, found = case.batch(i)
            views = [tensor.to(bench.device) for tensor in (*crops, *found)]
            scalars.append(step([views], epoch * steps + i, epoch))
        names = ("loss", *golden_udi.TERMS)
        means = torch.stack([torch.stack([s[key].double() for s in scalars]).mean() for key in names])
        yield f"losses of epoch {epoch}", Bound(relative_error(means, case.golden(f"epoch{epoch}/means")), FLOAT64)
        centers = golden_udi.centers_of(case.method.criterion)
        yield f"centers of epoch {epoch}", Bound(relative_error(centers, case.golden(f"epoch{epoch}/center")), FLOAT64)
