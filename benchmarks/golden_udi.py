"""The golden cases of UDI (tests/golden/README.md): inputs, and the tiny run with the weights of the released program.

Inputs come from numpy's legacy generator, with equal numbers on every version and machine.

Shapes: B images, V = 2 global views, L local ones, M samples of a global view, m of a local one, K prototypes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main_udi
from benchmarks import golden
from checkpoints import layouts, loading
from data.transforms.udi_views import Correspondence
from losses.udi import UDILoss

# Settings by kind (`loss`, `net`) and name.
CASES: dict[str, dict[str, Any]] = golden.settings("udi_a")
TERMS = ("g_cl", "g_mcl", "g_pch", "l_cl", "l_mcl")
CENTERS = ("center", "center_plus", "center_patch")


# --------------------------------------------------------------------------- inputs


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


def correspondence(arrays: Mapping[str, np.ndarray], prefix: str) -> Correspondence:
    """Return the release's own samples and where they lie, for the global views and for local ones alike."""
    fields = {
        key: torch.from_numpy(arrays[f"{prefix}/{key}"]) for key in ("valid", "target", "local_valid", "local_target")
    }
    tokens, local = (torch.from_numpy(arrays[f"{prefix}/{key}"]).long()[:, None] for key in ("tokens", "local_tokens"))
    return Correspondence(
        tokens.expand(-1, 2, -1), fields["valid"], fields["target"],
        local.expand(-1, fields["local_valid"].shape[1], -1), fields["local_valid"], fields["local_target"],
    )  # fmt: skip


# --------------------------------------------------------------------------- losses and runs


def golden_loss(name: str) -> UDILoss:
    """Return the loss of a case in float64, as released; its first centers are in the inputs."""
    case = CASES["loss"][name]
    temps = case["temps"]
    sizes = (case["K"], 2 + case["L"])
    return UDILoss(*sizes, temps[0], temps[-1], len(temps), len(temps), alpha=case["alpha"]).double()


def centers_of(loss: UDILoss) -> Tensor:
    """Return the three centers (3, K)."""
    return torch.cat([getattr(loss, name) for name in CENTERS])


class Case(NamedTuple):
    """A tiny run with the release's weights, in float64."""

    name: str
    args: Any
    method: main_udi.UDI
    names: list[str]  # of the release's parameters, sorted; its three heads are one
    arrays: Mapping[str, np.ndarray]

    def golden(self, key: str) -> np.ndarray:
        """Return an array of the case."""
        return self.arrays[f"net/{self.name}/{key}"]

    def batch(self, step: int) -> tuple[list[Tensor], Correspondence]:
        """Return the crops of a step, and the correspondence of their tokens."""
        return network_crops(self.name, step), correspondence(self.arrays, f"net/{self.name}/{step}")


def published_state(keys: dict[str, list[int]], seed: int) -> dict[str, Tensor]:
    """Return a network in the release's layout, whose heads 1 and 2 are head 0 again."""
    own = {key: shape for key, shape in keys.items() if not key.startswith(("head.1.", "head.2."))}
    weights = network_weights(seed, own)
    return {key: weights[key.replace("head.1.", "head.0.").replace("head.2.", "head.0.")] for key in keys}


def build_case(arrays: Mapping[str, np.ndarray], device: torch.device, plain_loss: bool = False) -> Case:
    """Return the case `a`; the loss sees logits if it is plain, else bottlenecks and prototypes."""
    name = "a"
    made = CASES["net"][name]
    words = (
        f"--arch vit --patch_size {made['patch']} --out_dim {made['K']} --local_crops_number {made['L']} "
        f"--local_crops_size {made['sizes'][1]} --head_hidden_dim {made['hidden']} --head_bottleneck_dim {made['bottleneck']} "
        f"--norm_last_layer false --drop_path_rate 0 --optimizer {made['opt']} --epochs 2 --warmup_epochs 0 "
        f"--lr {0.01 * 256 / made['B']} --min_lr 1e-3 --batch_size_per_gpu {made['B']} --clip_grad 0.3 --freeze_last_layer 1 "
        f"--warmup_teacher_temp_epochs 2 --momentum_teacher 0.9 --precision fp32 --plain_loss {plain_loss}"
    )
    spec = {"DIM_EMBED": made["dim"], "DEPTH": made["depth"], "NUM_HEADS": made["heads"]}
    model = {"NAME": "vision_transformer", "IMAGE_SIZE": [made["sizes"][0]] * 2, "SPEC": spec}
    with tempfile.TemporaryDirectory() as folder:
        yaml = Path(folder) / "golden.yaml"
        yaml.write_text(json.dumps({"MODEL": model}))
        args = main_udi.get_args_parser().parse_args([*words.split(), "--cfg", str(yaml)])
        main_udi.check_args(args)
        method = main_udi.build_method(args, main_udi.load_config(args), device)
    keys = json.loads(str(arrays[f"net/{name}/keys"]))
    content = {
        "student": {f"module.{key}": w for key, w in published_state(keys, made["seed"]).items()},
        "teacher": published_state(keys, made["seed"] + 1),
    }
    for key, network in (("student", method.student), ("teacher", method.teacher)):
        loading.load_network(network.double(), layouts.network_state(content, key, "golden"), "golden")
    method.criterion.fall_back = False  # as released
    method.criterion.double()
    return Case(name, args, method, sorted(key for key in keys if key.startswith(("backbone.", "head.0."))), arrays)
