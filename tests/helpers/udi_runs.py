"""Small runs of main_udi.py for tests: their command line, what they are made of, and the script on a tiny ViT."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import main_udi
from helpers.runs import TINY_UDI, TINY_VIT
from training import setup

CPU = torch.device("cpu")
TINY_NETWORKS = {
    "swin": ["--cfg", "experiments/demo/swin_micro.yaml", "--arch", "swin", "--local_sampling_window_size", "1"],
    "cvt": ["--cfg", "experiments/demo/cvt_micro.yaml", "--arch", "cvt", "--local_sampling_window_size", "1"],
    "vil": ["--cfg", "experiments/demo/vil_micro.yaml", "--arch", "vil", "--local_sampling_window_size", "1"],
    "resnet18": [
        "--cfg",
        "experiments/demo/resnet_micro.yaml",
        "--arch",
        "resnet18",
        "--drop_path_rate",
        "0",
        "--global_sampling_window_size",
        "1",
        "--local_sampling_window_size",
        "1",
    ],
}


def parsed(*flags: str, network: Sequence[str] = TINY_VIT) -> argparse.Namespace:
    return main_udi.get_args_parser().parse_args([*TINY_UDI, *flags, "--device", "cpu", *network])


class Made:
    """What a run is made of, without its loop."""

    def __init__(self, *flags: str, network: Sequence[str] = TINY_VIT) -> None:
        self.args = parsed(*flags, network=network)
        main_udi.check_args(self.args)
        self.config = main_udi.load_config(self.args)
        self.transform, self.finish = main_udi.build_views(self.args, self.config)
        torch.manual_seed(0)
        self.method = main_udi.build_method(self.args, self.config, CPU)
        self.step = setup.build_step(self.args, self.method, 10, CPU, "fp32")

    def batch(self, images: int = 4, seed: int = 0) -> list[Tensor]:
        """Finished views of photographs that are noise, and their correspondences."""
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        pictures = [Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)) for _ in range(images)]
        assert self.finish is not None
        samples = zip(*(self.transform(picture) for picture in pictures))
        return list(self.finish([torch.stack(parts) for parts in samples], CPU))


def run(output_dir: Path, images: Path, *flags: str, network: Sequence[str] = TINY_VIT) -> None:
    folders = ["--data_path", str(images), "--output_dir", str(output_dir)]
    main_udi.main(parsed(*folders, *flags, network=network))
