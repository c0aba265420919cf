"""The k-NN score of a network that is being trained, on a small labeled folder: does it learn anything useful?

Training goes on as if it had not been measured: modes and random states are put back.
Origin: the weighted vote of eval_knn.py.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

import data
import utils
from checkpoints import loading
from data.transforms import augment
from distributed import fsdp
from evaluation.features import FeatureFunction, extract_features, labeled_datasets
from evaluation.knn import Split, knn_scores
from utils import UsageError

NEIGHBORS, TEMPERATURE, CROP_RATIO = 20, 0.07, 0.875  # the protocol of eval_knn.py


class KnnProbe:
    """Scores networks every so many epochs.

    Args:
        networks: backbones by the name of their score.
        datasets: training and validation images, or one set whose images are judged by all others.
        every: epochs.
        batch_size, num_workers: of each process.
        device, precision: where and in what features are computed.
    """

    def __init__(
        self,
        networks: dict[str, nn.Module],
        datasets: Sequence[data.ImageDataset],
        every: int,
        batch_size: int,
        num_workers: int,
        device: torch.device,
        precision: str,
    ) -> None:
        self.networks = {name: loading.unwrap(network) for name, network in networks.items()}
        self.loaders = [
            data.build_eval_loader(dataset, batch_size, num_workers, device.type == "cuda") for dataset in datasets
        ]
        self.every, self.device, self.precision = every, device, precision

    def __call__(self, epoch: int) -> dict[str, float]:
        """Top-1 in percent by name, after every `every`-th epoch, else nothing; every process calls this.

        Raises:
            UsageError: more than 1 % of the images cannot be read.
        """
        if (epoch + 1) % self.every:
            return {}
        functions = {name: self._features_of(network) for name, network in self.networks.items()}
        with _untouched(*self.networks.values()), fsdp.unsharded(*self.networks.values()):
            parts = [
                extract_features(loader, functions, self.device, torch.device("cpu"), "k-NN") for loader in self.loaders
            ]
            alone = len(parts) == 1
            k = min(NEIGHBORS, len(next(iter(parts[0].values())).labels_N) - alone)
            return {
                name: round(knn_scores(Split(parts[0][name], parts[-1][name]), [k], TEMPERATURE, alone)[0].top1, 3)
                for name in functions
            }

    def _features_of(self, network: nn.Module) -> FeatureFunction:
        def compute(images: Tensor) -> Tensor:
            with utils.autocast(self.device, self.precision):
                return network.forward_features(images).view_BC  # type: ignore[operator]

        return compute


@contextlib.contextmanager
def _untouched(*networks: nn.Module) -> Iterator[None]:
    """Networks are in evaluation mode in the block; then the mode of every module and all random states are as before."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    random_state = utils.get_rng_state()
    try:
        for network in networks:
            network.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        utils.set_rng_state(random_state)


def labeled_images(folder: str, size: int, config: CfgNode, seed: int) -> list[data.ImageDataset]:
    """The images of a folder with `train/` and `val/`, or of one without, as center crops of `size` pixels.

    Raises:
        UsageError: no such folder, no labels, or fewer than two images.
    """
    transform = augment.eval_view(size, CROP_RATIO, config.INPUT.MEAN, config.INPUT.STD)
    if (Path(folder) / "val").is_dir():
        args = argparse.Namespace(data_path=folder, seed=seed, zip_mode=False, tsv_mode=False)
        return list(labeled_datasets(args, config, transform, transform))
    if not folder:
        raise UsageError("--knn_every needs --knn_data_path FOLDER, a small folder of class folders")
    about = config.MODEL.SPEC.IN_CHANS, seed
    images = data.build_dataset(folder, "train", transform, *about, need_labels=True, value_range=config.INPUT.RANGE)
    if len(images) < 2:
        raise UsageError(f"--knn_data_path {folder} holds one image, which has no neighbor; add more")
    return [images]


def load_images(args: argparse.Namespace, config: CfgNode, size: int) -> list[data.ImageDataset]:
    """The labeled images of --knn_every; none where that is off."""
    return labeled_images(args.knn_data_path, size, config, args.seed) if args.knn_every else []


def build_knn_probe(
    args: argparse.Namespace,
    student: nn.Module,
    teacher: nn.Module,
    images: list[data.ImageDataset],
    device: torch.device,
) -> KnnProbe | None:
    """k-NN scores of both networks; the teacher's is the one without a suffix. None without images."""
    networks = {"knn_top1": teacher, "knn_top1_student": student}
    sizes = args.knn_every, args.batch_size_per_gpu, args.num_workers
    return KnnProbe(networks, images, *sizes, device, args.precision) if images else None
