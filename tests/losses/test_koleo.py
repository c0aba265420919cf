"""The KoLeo regularizer against a loop over pairs, and within a training step."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.step_runs import random_views, tiny
from torch import Tensor

import main_esvit
from losses.koleo import koleo_loss
from utils import UsageError


def slow_loss(features_VBC: Tensor) -> Tensor:
    terms = []
    for view_BC in features_VBC.double():
        unit_BC = view_BC / view_BC.norm(dim=-1, keepdim=True)
        for i in range(len(unit_BC)):
            distances = [(unit_BC[i] - unit_BC[j]).norm() for j in range(len(unit_BC)) if j != i]
            terms.append(-torch.stack(distances).min().log())
    return torch.stack(terms).mean()


def test_value_and_gradient() -> None:
    features = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found, expected = koleo_loss(features), slow_loss(features)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(found, features)
    (wanted,) = torch.autograd.grad(expected, features)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


def test_opposite_features_have_the_smallest_loss_of_a_pair() -> None:
    assert koleo_loss(torch.tensor([[[3.0, 0.0], [-0.1, 0.0]]])).item() == pytest.approx(-math.log(2), rel=1e-5)


def test_equal_features_have_finite_gradients() -> None:
    features = torch.ones(1, 3, 4, requires_grad=True)
    koleo_loss(features).backward()
    assert features.grad is not None
    assert features.grad.isfinite().all()


def test_autocast_does_not_lower_the_precision() -> None:
    """So many images in three dimensions that bfloat16 would find other neighbors."""
    features = torch.randn(1, 200, 3, generator=torch.Generator().manual_seed(0))
    expected = koleo_loss(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(koleo_loss(features), expected)
        assert koleo_loss(features.bfloat16()).dtype == torch.float32


def test_step_adds_the_weighted_loss_of_the_student_features() -> None:
    views = random_views(4, seed=0)
    method, _ = tiny("--use_dense_prediction", "on", "--koleo_weight", "0.5")
    loss, terms = method.compute_loss(views, 0)
    with torch.no_grad():
        features = torch.stack([method.student.forward_features(view).view_BC for view in views[:2]])  # type: ignore[operator]
    torch.testing.assert_close(terms["koleo"], koleo_loss(features), rtol=1e-5, atol=0)
    torch.testing.assert_close(loss, 0.5 * (terms["view_loss"] + terms["region_loss"]) + 0.5 * terms["koleo"])
    name, weight = next((n, p) for n, p in method.student.named_parameters() if "qkv" in n)
    with_koleo = torch.autograd.grad(loss, weight)[0]
    method.koleo_weight = 0.0
    without = torch.autograd.grad(method.compute_loss(views, 0)[0], weight)[0]
    assert not torch.allclose(with_koleo, without, rtol=1e-3), name


def test_batch_of_one_image_is_rejected() -> None:
    args = main_esvit.get_args_parser().parse_args(["--koleo_weight", "0.1", "--batch_size_per_gpu", "1"])
    with pytest.raises(UsageError, match=r"--koleo_weight 0.1 .* --batch_size_per_gpu"):
        main_esvit.check_args(args)
    with pytest.raises(ValueError, match="two or more images"):
        koleo_loss(torch.ones(2, 1, 4))
