"""Attention: fused, spelled out and over few keys are one function, and what the last one keeps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ops import attention, cpu_attention
from ops.attention import attend

BIASES = {
    "none": None,
    "of each head": (3, 5, 7),
    "of all": (1, 3, 5, 7),
    "of each image": (2, 1, 1, 7),
    "of each key": (7,),
}


def problem(dtype: torch.dtype = torch.float64, bias: tuple[int, ...] | None = None) -> list[Tensor]:
    """Queries (2, 3, 5, 4), keys (2, 3, 7, 4), values (2, 3, 7, 6), and a bias."""
    torch.manual_seed(0)
    shapes = [(2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6), *([] if bias is None else [bias])]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def few(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    return attend(q, k, v, bias=bias, scale=0.7)[0]


def fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, bias, scale=0.7)


@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
def test_few_keys_equal_the_fused_kernel_and_its_gradients(bias: tuple[int, ...] | None) -> None:
    inputs = problem(bias=bias)
    assert torch.autograd.gradcheck(few, inputs)
    direction = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    for found, expected in zip(*(torch.autograd.grad(run(*inputs), inputs, direction) for run in (few, fused))):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(few(*inputs), fused(*inputs))


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_same_bits_where_maps_are_asked_for(autocast: bool) -> None:
    """With the maps it is spelled out; features must not depend on who looks."""
    q, k, v, bias = problem(torch.float32, (3, 5, 7))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        x, maps = attend(q, k, v, bias=bias, attention=True)
        alone, nothing = attend(q, k, v, bias=bias)
    assert nothing is None
    assert maps is not None
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps.sum(dim=-1), torch.ones(2, 3, 5))
    assert torch.equal(x, alone)


def test_under_autocast_gradients_are_those_of_float32_but_for_rounding() -> None:
    inputs = problem(torch.float32, (3, 5, 7))
    exact = torch.autograd.grad(few(*inputs).square().sum(), inputs)
    with torch.autocast("cpu", torch.bfloat16):
        x = few(*inputs)
    assert x.dtype == torch.bfloat16
    rounded = torch.autograd.grad(x.float().square().sum(), inputs)
    for found, expected in zip(rounded, exact):
        assert found.dtype == torch.float32
        assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("shape", [shape for shape in BIASES.values() if shape is not None])
def test_a_float32_bias_has_a_gradient_that_no_sum_in_half_precision_gives(shape: tuple[int, ...]) -> None:
    inputs = problem(torch.float32, shape)
    for tensor in inputs[:3]:
        tensor.data = tensor.bfloat16()
    grad = torch.autograd.grad(few(*inputs).float().square().sum(), inputs[3])[0]
    assert grad.dtype == torch.float32
    assert not torch.equal(grad, grad.bfloat16().float())


def test_maps_are_kept_once_in_the_dtype_of_the_products() -> None:
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(note, lambda tensor: tensor):
        few(*problem(torch.float32, (3, 5, 7)))
    assert [tensor.dtype for tensor in kept if tensor.shape[-2:] == (5, 7)] == [torch.bfloat16]


@pytest.mark.parametrize("shape", [None, (3, 5, 7), (2, 1, 1, 7)])
def test_what_compilers_are_told_of_the_results_is_true(shape: tuple[int, ...] | None) -> None:
    """Shapes, strides and dtypes, and that nothing is changed in place."""
    q, k, v, *bias = (x.detach() for x in problem(torch.float32, shape))
    q, k, v = (x.flatten(0, 1).bfloat16() for x in (q, k, v))
    sizes = [2, 3, 5, 7]
    checks = ("test_schema", "test_faketensor")
    given = (q, k, v, bias[0] if bias else None, 0.7, sizes)
    torch.library.opcheck(cpu_attention._few_keys, given, test_utils=checks)
    x, maps = cpu_attention._few_keys(*given)
    kept = (torch.ones_like(x), q, k, v, maps, 0.7, sizes, list(shape or ()), torch.float32)
    torch.library.opcheck(cpu_attention._few_keys_backward, kept, test_utils=checks)


def test_many_keys_go_to_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = problem(torch.float32)
    spelled_out = few(*inputs)
    monkeypatch.setattr(attention, "FEW_KEYS", 6)
    monkeypatch.setattr(attention, "attend_to_few", None)
    torch.testing.assert_close(few(*inputs), spelled_out)
