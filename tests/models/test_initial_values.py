"""Student and teacher as main_esvit.py makes them, against what the published program starts from."""

from __future__ import annotations

import math
import re

import pytest
import torch
from conftest import golden_json
from timm.layers import DropPath
from torch import Tensor, nn

import main_esvit

REFERENCE = golden_json("init_ref")
HEAD_PREFIXES = ["--out_dim", "4096", "--norm_last_layer", "false", "--use_dense_prediction", "True"]
ARTIFACT = 2.0  # the reference's truncated normal gives its bound where its uniform number is exactly the bound


def kind(name: str, tensor: Tensor) -> str:
    """The name without numbers, and the shape."""
    parts = [re.sub(r"^(layer|stage|)\d+$", r"\1*", part) for part in name.split(".")]
    return f"{'.'.join(parts)} {'x'.join(map(str, tensor.shape))}"


def largest_drop_path(network: nn.Module) -> float:
    return max((module.drop_prob for module in network.modules() if isinstance(module, DropPath)), default=0.0)


@pytest.mark.parametrize("case", REFERENCE)
def test_every_kind_of_tensor_starts_with_the_spread_of_the_reference(case: str) -> None:
    """Means and deviations within six of their own standard errors; exactly where nothing is drawn."""
    reference = REFERENCE[case]["parameters"]
    args = main_esvit.get_args_parser().parse_args(["--arch", case.split()[0], *HEAD_PREFIXES])
    student = main_esvit.build_network(args, main_esvit.load_config(args), is_teacher=False)
    found: dict[str, list[Tensor]] = {}
    for name, parameter in student.named_parameters():
        found.setdefault(kind(name, parameter), []).append(parameter.detach().flatten())
    assert {name: len(tensors) for name, tensors in found.items()} == {n: r["tensors"] for n, r in reference.items()}
    for name, expected in reference.items():
        values = torch.cat(found[name])
        spread, error = expected["std"], expected["std"] / math.sqrt(len(values))
        assert values.mean().item() == pytest.approx(expected["mean"], abs=6 * error + 1e-6), name
        assert values.std().item() == pytest.approx(spread, abs=6 * error / math.sqrt(2) + 1e-6), name
        if expected["largest"] != ARTIFACT:  # tells uniform from normal: 1.7 deviations from 3 and more
            assert values.abs().max().item() == pytest.approx(expected["largest"], abs=1.5 * spread + 1e-6), name


@pytest.mark.parametrize("case", REFERENCE)
def test_largest_drop_path(case: str) -> None:
    args = main_esvit.get_args_parser().parse_args(["--arch", case.split()[0], *HEAD_PREFIXES])
    with torch.device("meta"):
        networks = {
            who: main_esvit.build_network(args, main_esvit.load_config(args), is_teacher=who == "teacher")
            for who in ("student", "teacher")
        }
    expected = {who: REFERENCE[case]["largest drop path"][who] for who in networks}
    assert {who: largest_drop_path(network) for who, network in networks.items()} == pytest.approx(expected)
