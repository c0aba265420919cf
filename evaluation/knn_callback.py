"""k-NN accuracy during pre-training: a callback that scores student and teacher every --knn_every epochs.

Modes and random states are restored afterwards, so training is the same with and without it.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

import data
import utils
from checkpoints import loading
from data.transforms import augment
from distributed import collectives, fsdp
from evaluation.features import FeatureFunction, extract_features, labeled_datasets
from evaluation.knn import Split, knn_scores
from utils import UsageError

NEIGHBORS, TEMPERATURE, CROP_RATIO = 20, 0.07, 0.875  # the protocol of eval_knn.py


def build_knn_callback(
    args: argparse.Namespace,
    config: CfgNode,
    teacher: nn.Module,
    student: nn.Module,
    image_size: int,
    device: torch.device,
) -> Callable[[int], dict[str, float]] | None:
    """Build the callback of --knn_every, or return None if that is 0; every process calls this.

    Reads `knn_every`, `knn_data_path`, `seed`, `batch_size_per_gpu`, `num_workers` and `precision` of `args`.

    Returns:
        a function of the epoch that returns `knn_top1` (teacher) and `knn_top1_student` in percent, or an empty dictionary.

    Raises:
        UsageError: --knn_data_path cannot be used.
    """
    if not args.knn_every:
        return None
    with collectives.failing_together():
        datasets = labeled_images(args.knn_data_path, image_size, config, args.seed)
    networks = {"knn_top1": teacher, "knn_top1_student": student}
    sizes = args.knn_every, args.batch_size_per_gpu, args.num_workers
    return KnnProbe(networks, datasets, *sizes, device, args.precision)


class KnnProbe:
    """Scores networks every few epochs.

    Args:
        networks: backbones by the name of their score.
        datasets: training and validation images, or one set for leave-one-out.
        every: epochs between two scores.
        batch_size, num_workers: of each process.
        device, precision: of the feature computation.
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
        """Return the top-1 accuracy of each network after every `every`-th epoch, else nothing; every process calls this.

        Raises:
            UsageError: more than 1 % of the images cannot be read.
        """
        if (epoch + 1) % self.every:
            return {}
        functions = {name: self._feature_function(network) for name, network in self.networks.items()}
        with _evaluation_mode(*self.networks.values()), fsdp.unsharded(*self.networks.values()):
            parts = [
                extract_features(loader, functions, self.device, torch.device("cpu"), "k-NN") for loader in self.loaders
            ]
            leave_one_out = len(parts) == 1
            k = min(NEIGHBORS, len(next(iter(parts[0].values())).labels_N) - leave_one_out)
            splits = {name: Split(parts[0][name], parts[-1][name]) for name in functions}
            return {
                name: round(knn_scores(split, [k], TEMPERATURE, leave_one_out)[0].top1, 3)
                for name, split in splits.items()
            }

    def _feature_function(self, network: nn.Module) -> FeatureFunction:
        def compute(images: Tensor) -> Tensor:
            with utils.autocast(self.device, self.precision):
                return network.forward_features(images).view_BC  # type: ignore[operator]

        return compute


@contextlib.contextmanager
def _evaluation_mode(*networks: nn.Module) -> Iterator[None]:
    """Switch networks to evaluation mode; restore the mode of every module and all random states at the end."""
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
    """Open the images of a folder with `train/` and `val/`, or of a single set, as center crops of `size` pixels.

    Raises:
        UsageError: no such folder, no labels, or fewer than two images.
    """
    if not folder:
        raise UsageError("--knn_every needs --knn_data_path FOLDER, a small folder of class folders")
    transform = augment.eval_view(size, CROP_RATIO, config.INPUT.MEAN, config.INPUT.STD)
    if (Path(folder) / "val").is_dir():
        return list(labeled_datasets(folder, config, transform, transform, seed=seed))
    channels, value_range = config.MODEL.SPEC.IN_CHANS, config.INPUT.RANGE
    images = data.build_dataset(folder, "train", transform, channels, seed, need_labels=True, value_range=value_range)
    if len(images) < 2:
        raise UsageError(f"--knn_data_path {folder} has only one image; add more")
    return [images]
