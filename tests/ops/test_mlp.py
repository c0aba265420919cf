"""The memory-saving MLP: bitwise equal to timm's, forward and backward, and what it stores."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import timm.layers
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from ops.mlp import Mlp, activated_linear

WIDTH, HIDDEN = 6, 24


def pair(drop: float = 0.0) -> tuple[Mlp, timm.layers.Mlp]:
    torch.manual_seed(0)
    ours = Mlp(WIDTH, HIDDEN, drop=drop)
    theirs = timm.layers.Mlp(WIDTH, HIDDEN, drop=drop)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def gradients(run: Callable[[Tensor], Tensor], network: nn.Module, autocast: bool = False) -> list[Tensor]:
    """The output for fixed tokens, and the gradients of the tokens and of all parameters for a fixed direction."""
    torch.manual_seed(1)
    x = torch.randn(2, 5, 3, WIDTH, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = run(x)
    wanted = [x, *(parameter for parameter in network.parameters() if parameter.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y, wanted, torch.randn_like(y))]


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_same_bits_as_timm(autocast: bool) -> None:
    ours, theirs = pair()
    assert_same_bits(gradients(ours, ours, autocast), gradients(theirs, theirs, autocast))


def test_same_bits_with_dropout() -> None:
    ours, theirs = pair(drop=0.5)
    assert_same_bits(gradients(ours, ours), gradients(theirs, theirs))


def test_same_bits_with_frozen_parameters() -> None:
    ours, theirs = pair()
    for mlp in (ours, theirs):
        mlp.fc2.weight.requires_grad_(False)
        mlp.fc1.bias.requires_grad_(False)
    assert_same_bits(gradients(ours, ours), gradients(theirs, theirs))


def test_same_bits_through_activation_checkpointing() -> None:
    ours, theirs = pair()
    found = gradients(lambda x: checkpoint(ours, x, use_reentrant=False), ours)
    assert_same_bits(found, gradients(theirs, theirs))


def test_any_activation_and_no_bias_against_autograd_in_float64() -> None:
    weight = torch.randn(WIDTH, HIDDEN, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, HIDDEN, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return activated_linear(x, timm.layers.QuickGELU(), weight, None)

    assert torch.autograd.gradcheck(run, (x, weight))
    torch.testing.assert_close(run(x, weight), (x * torch.sigmoid(1.702 * x)) @ weight.T)


def test_the_hidden_layer_is_stored_once() -> None:
    ours, theirs = pair()
    x = torch.randn(7, WIDTH, requires_grad=True)
    stored: dict[str, int] = {}
    for name, mlp in (("ours", ours), ("theirs", theirs)):
        storages: dict[int, Tensor] = {}

        def note(tensor: Tensor, storages: dict[int, Tensor] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            output = mlp(x)
        stored[name] = sum(tensor.shape[0] == 7 and tensor.shape[-1] == HIDDEN for tensor in storages.values())
        del output
    assert stored == {"ours": 1, "theirs": 2}


def test_same_bits_in_inference_mode() -> None:
    ours, theirs = pair()
    x = torch.randn(4, WIDTH)
    with torch.inference_mode():
        assert torch.equal(ours(x), theirs(x))


def test_traced_graphs_have_operators_of_torch_only() -> None:
    """Also where gradients are enabled, as when a trained network is exported without `no_grad`."""
    ours, _ = pair()
    x = torch.randn(4, WIDTH)
    exported = torch.export.export(ours, (x,)).graph
    operators = {node.target for node in exported.nodes if node.op == "call_function"}
    assert operators <= {torch.ops.aten.linear.default, torch.ops.aten.gelu.default, torch.ops.aten.dropout.default}
    traced = torch.jit.trace(ours, x)
    assert "PythonOp" not in str(traced.inlined_graph)
    assert "_ActivatedLinear" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), ours(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fake_tensors_get_shapes_and_types(dtype: torch.dtype) -> None:
    """The same as real ones get, with autocast and without."""
    results = []
    for mode in (FakeTensorMode(), nullcontext()):
        with mode:
            mlp, x = Mlp(WIDTH, HIDDEN), torch.randn(2, 5, WIDTH, requires_grad=True)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                y = mlp(x)
            y.sum().backward()
        results.append([(t.shape, t.stride(), t.dtype) for t in (y, x.grad, *(p.grad for p in mlp.parameters()))])
    assert results[0] == results[1]
