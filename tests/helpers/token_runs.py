"""Tiny networks with two class tokens, and their features."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fill import fill_
from torch import Tensor

import data
from data.transforms import augment
from helpers.runs import write_images
from helpers.small_networks import SMALL, small_network
from models import Backbone
from models.heads import DINOHead

TWO = ("MODEL.SPEC.NUM_CLS_TOKENS", "2", "MODEL.SPEC.POS_RESIZE", "scale")
NETWORK = ["--arch", "vit", "--patch_size", "8", "--cfg", "experiments/demo/vit_micro.yaml"]
QUICK = ["--device", "cpu", "--num_workers", "0", "--batch_size_per_gpu", "4"]


def make_folder(root: Path) -> Path:
    """Write `images` with 12 and 6 images of three classes, and a `checkpoint.pth` of a ViT with two class tokens."""
    for seed, (split, count) in enumerate((("train", 4), ("val", 2))):
        write_images(root / "images" / split, count, classes=3, seed=seed)
    torch.save({"teacher": network().state_dict(), "student": {}}, root / "checkpoint.pth")
    whole = network()
    whole.head = DINOHead(24, 16, hidden_dim=12, bottleneck_dim=8)
    torch.save({"teacher": whole.state_dict(), "student": {}}, root / "with_head.pth")
    return root


def run(script: Any, folder: Path, out: Path, *flags: str, tokens: tuple[str, ...] = TWO) -> dict[str, Any]:
    """The results of a script on the small network of `folder`."""
    weights = [] if "--pretrained_weights" in flags else ["--pretrained_weights", str(folder / "checkpoint.pth")]
    paths = ["--data_path", str(folder / "images"), "--output_dir", str(out)]
    command = [*NETWORK, *QUICK, *paths, *weights, *flags, "--seed", "0", *SMALL["vit"].overrides, *tokens]
    script.main(script.get_args_parser().parse_args(command))
    (path,) = (out / "results").glob("*.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@torch.no_grad()
def features(folder: Path, split: str, of: Callable[[Backbone, Tensor], Tensor]) -> Tensor:
    """What a function makes of all images of a part, in their order."""
    view = augment.eval_view(64, 0.875, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    dataset = data.build_dataset(folder / "images", split, view, need_labels=True)
    return of(network(), torch.stack([dataset[i].views[0] for i in range(len(dataset))]))


def last_tokens(backbone: Backbone, images: Tensor) -> Tensor:
    return backbone.norm(backbone.forward_blocks(images)[-1].tokens_BNC)


def network() -> Backbone:
    made = small_network("vit", *TWO, is_teacher=True).eval()
    fill_(made.state_dict())
    return made
