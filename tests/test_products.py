"""Products by oneDNN against float64, and where they are taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from ops import linear

here = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch was built without oneDNN's linear layer"
)


@pytest.fixture(autouse=True)
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "ENOUGH", 1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of what oneDNN multiplies."""
    seen, onednn = [], linear._onednn

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append(x.shape)
        return onednn(x, weight, bias)

    monkeypatch.setattr(linear, "_onednn", counted)
    return seen


@here
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("width", "out"), [(5, 3), (3, 5), (1, 1)])
@pytest.mark.parametrize("shape", [(7,), (2, 3, 4), (1,)], ids=str)
def test_layer_and_gradients(shape: tuple[int, ...], width: int, out: int, bias: bool, calls: list[torch.Size]) -> None:
    layer = linear.Linear(width, out, bias=bias)
    exact = nn.Linear(width, out, bias=bias).double()
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(*shape, width, requires_grad=True)
    grad = torch.randn(*shape, out)
    y, expected = layer(x), exact(x.double())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected.float())
    found = torch.autograd.grad(y, [x, *layer.parameters()], grad)
    wanted = torch.autograd.grad(expected, [x, *exact.parameters()], grad.double())
    assert len(calls) == 3
    for a, b in zip(found, wanted):
        assert a.is_contiguous()
        torch.testing.assert_close(a, b.float())


@here
def test_only_wanted_gradients_are_computed(calls: list[torch.Size]) -> None:
    layer = linear.Linear(3, 4).requires_grad_(False)
    x = torch.randn(2, 3, requires_grad=True)
    layer(x).sum().backward()
    assert len(calls) == 2
    assert layer.weight.grad is None
    torch.testing.assert_close(x.grad, layer.weight.sum(dim=0).expand(2, 3))
    with torch.no_grad():
        assert layer(x).grad_fn is None


@pytest.mark.parametrize("case", ["small", "float64", "autocast", "mixed"])
def test_everything_else_is_torchs_own(case: str, monkeypatch: pytest.MonkeyPatch, calls: list[torch.Size]) -> None:
    layer, theirs = linear.Linear(3, 4), nn.Linear(3, 4)
    theirs.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3)
    if case == "small":
        monkeypatch.setattr(linear, "ENOUGH", 2 * 3 * 4 + 1)
    if case == "float64":
        layer, theirs, x = layer.double(), theirs.double(), x.double()
    if case == "mixed":
        x = x.double()
        with pytest.raises(RuntimeError, match="dtype"):
            layer(x)
        return
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        assert torch.equal(layer(x), theirs(x))
    assert not calls


@here
def test_matrices(calls: list[torch.Size]) -> None:
    a, b = torch.randn(4, 6), torch.randn(6, 5)
    torch.testing.assert_close(linear.product(a, b), a @ b)
    for grad in (torch.randn(4, 5), torch.randn(4, 9)):
        torch.testing.assert_close(linear.weight_gradient(grad, a), grad.T @ a)
    assert len(calls) == 3


@here
def test_a_compiled_layer_takes_them_and_an_exported_one_does_not() -> None:
    layer = linear.Linear(3, 4)
    x = torch.randn(2, 3, requires_grad=True)
    targets: list[str] = []

    def note(module: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        targets.extend(str(node.target) for node in module.graph.nodes)
        return make_boxed_func(module.forward)

    compiled = torch.compile(layer, backend=aot_autograd(fw_compiler=note), fullgraph=True)
    found, expected = (torch.autograd.grad(run(x).square().sum(), [x, layer.weight]) for run in (compiled, layer))
    torch.testing.assert_close(found, expected)
    assert sum("onednn" in target for target in targets) == 3
    exported = torch.export.export(layer, (x.detach(),))
    assert not any("onednn" in str(node.target) for node in exported.graph.nodes)
