"""Deterministic inputs of the golden UDI cases, by numpy's legacy generator: equal numbers on every version and machine.

Shapes: B images, V = 2 global views, L local ones, M samples of a global view, m of a local one, K prototypes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from conftest import golden_json
from torch import Tensor

CASES: dict[str, dict[str, Any]] = golden_json("udi_a")  # settings by kind (`loss`, `net`) and name


def normal(seed: int, shape: Sequence[int], scale: float = 1.0) -> Tensor:
    """Draw a float64 tensor from a seed of its own."""
    return torch.from_numpy(np.asarray(scale * np.random.RandomState(seed).standard_normal(tuple(shape))))


def loss_inputs(name: str, step: int) -> dict[str, Tensor]:
    """Make logits, validity (`V`, `W`) and first centers of a step of a loss case."""
    case = CASES["loss"][name]
    B, L, K, M, m = (case[key] for key in ("B", "L", "K", "M", "m"))
    seed = 1000 * case["seed"] + 100 * step
    student = {
        "s_cls": (2, B, K),
        "s_plus": (2, B, K),
        "s_pat": (2, B, M, K),
        "s_cls_loc": (L, B, K),
        "s_plus_loc": (L, B, K),
    }
    teacher = {"t_cls": (2, B, K), "t_pat": (2, B, M, K), "t_loc": (L, 2, B, m, K)}
    inputs = {key: normal(seed + i, shape, 0.4) for i, (key, shape) in enumerate(student.items(), 1)}
    inputs |= {key: normal(seed + i, shape, 0.25) for i, (key, shape) in enumerate(teacher.items(), 6)}
    inputs["center"] = normal(1000 * case["seed"] + 9, (3, K), case["center"])
    drawn = np.random.RandomState(seed + 10)
    for key, shape, share in (("V", (2, B, M), 0.75), ("W", (L, 2, B, m), 0.7)):
        inputs[key] = torch.from_numpy(drawn.uniform(size=shape) < share)
        inputs[key][..., 0] = True
    for key, *place in case["empty"]:
        inputs[key][tuple(place)] = False
    return inputs


def network_weights(seed: int, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Fill tensors in the order of their sorted names, each from its own seed; gains lie near 1."""
    weights = {}
    for i, name in enumerate(sorted(shapes)):
        w = normal(1000 * seed + i, shapes[name], 0.15)
        if name.endswith("weight") and w.ndim == 1:
            w = 1 + w
        if name.endswith("weight_g"):
            w = 1 + 0.3 * w.abs()
        weights[name] = w
    return weights


def network_crops(name: str, step: int) -> list[Tensor]:
    """Make the crops (B, 3, side, side) of a step of a network case, the two global ones first."""
    case = CASES["net"][name]
    sides = [case["sizes"][0]] * 2 + [case["sizes"][1]] * case["L"]
    return [normal(7000 * case["seed"] + 100 * step + i, (case["B"], 3, side, side)) for i, side in enumerate(sides)]
