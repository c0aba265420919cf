"""Segmentation without training: each region gets the weighted vote of its nearest regions in the training images.

The label of a training region is the distribution of the classes of its pixels; regions without classes do not vote.

Shapes: B images, C channels, K classes, N training regions, Q queries, T regions of an image, h x w regions.
Origin: the k-NN vote of DINO (Caron et al., ICCV 2021) section 4.1, applied to regions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

import data
from data.segmentation import VOID
from distributed import collectives
from evaluation.dense_features import DenseFeatures
from evaluation.features import readable_batches
from evaluation.knn import CHUNKS, nearest
from training.run_log import tracked
from utils import UsageError, logger


class Regions(NamedTuple):
    """Features of training regions, and the distributions of their classes."""

    features_NC: Tensor
    labels_NK: Tensor


def region_labels(mask_HW: Tensor, grid: Sequence[int], classes: int) -> Tensor:
    """Return the share of each class among the pixels with a class of each region (T, K); 0 in regions without such pixels.

    Args:
        grid: height and width in regions, divisors of those of the mask.
    """
    rows_H, columns_W = (
        torch.arange(length, device=mask_HW.device) // (length // count) for length, count in zip(mask_HW.shape, grid)
    )
    region_HW = rows_H[:, None] * grid[1] + columns_W
    known = mask_HW != VOID
    pairs = region_HW[known] * classes + mask_HW[known].long()
    counts_TK = pairs.bincount(minlength=grid[0] * grid[1] * classes).view(-1, classes)
    return counts_TK / counts_TK.sum(dim=1, keepdim=True).clamp_min(1)


@torch.no_grad()
def training_regions(
    features: DenseFeatures,
    loader: DataLoader[data.Batch],
    classes: int,
    regions_per_image: int,
    most: int,
    seed: int,
    device: torch.device,
) -> Regions:
    """Return the features of training regions in the order of the images, equal on all processes.

    Args:
        loader: crops of the training images, of one size.
        most: so many regions are drawn at random from those of all images; the rest is left out.
        seed: of the draw.

    Raises:
        UsageError: an image or mask cannot be read, or no region has a class.
    """
    total = len(loader.dataset) * regions_per_image  # type: ignore[arg-type]
    drawn = (
        np.arange(total) if total <= most else np.sort(np.random.default_rng(seed).choice(total, most, replace=False))
    )
    rows: list[Tensor] = [torch.zeros(0, features.channels, device=device)]
    labels: list[Tensor] = [torch.zeros(0, classes, device=device)]
    numbers: list[Tensor] = [torch.zeros(0, dtype=torch.long, device=device)]
    tally = data.FailureTally(len(loader.dataset))  # type: ignore[arg-type]
    with tracked(loader, "training regions") as batches:
        for batch in readable_batches(batches, tally, device):
            maps_BChw = features(batch.views[0].to(device))
            grid, maps_BTC = maps_BChw.shape[2:], maps_BChw.flatten(2).transpose(1, 2)
            for index, map_TC, mask_HW in zip(batch.indices_B.tolist(), maps_BTC, batch.labels_B.to(device)):
                labels_TK = region_labels(mask_HW, grid, classes)
                first = index * regions_per_image
                begin, end = np.searchsorted(drawn, [first, first + regions_per_image])
                chosen = torch.from_numpy(drawn[begin:end] - first).to(device)
                chosen = chosen[labels_TK[chosen].sum(dim=1) > 0]
                rows.append(map_TC[chosen])
                labels.append(labels_TK[chosen])
                numbers.append(chosen + first)
    gathered = [torch.cat(collectives.all_gather_rows(torch.cat(part))) for part in (rows, labels, numbers)]
    order_N = gathered[2].argsort()
    if not len(order_N):
        raise UsageError("no training region has a class; raise --knn_regions, or check the masks")
    logger.info("k-NN among %d of %d training regions (--knn_regions %d, without void)", len(order_N), total, most)
    return Regions(gathered[0][order_N], gathered[1][order_N])


class RegionVote:
    """The vote of the nearest training regions, for each kind of features and each k.

    Args:
        ks: numbers of neighbors; larger ones than the number of regions are reduced to it, with a warning.
        temperature: a neighbor votes with weight exp(cosine similarity / temperature).
    """

    def __init__(self, features: DenseFeatures, regions: Regions, ks: Sequence[int], temperature: float) -> None:
        count = len(regions.features_NC)
        for k in (k for k in ks if k > count):
            logger.warning("k = %d is larger than the %d training regions; using k = %d", k, count, count)
        self.ks, self.temperature = [min(k, count) for k in ks], temperature
        self.labels_NK, self.columns = regions.labels_NK, features.columns
        self.keys = {
            name: F.normalize(regions.features_NC[:, columns], dim=1) for name, columns in features.columns.items()
        }
        self.rows = [f"{name}, {k}-NN" for name in self.columns for k in ks]

    @torch.no_grad()
    def predict(self, maps_BChw: Tensor) -> list[Tensor]:
        """Return the shares of the votes (B, K, h, w) for each of `rows`."""
        query_chunk, key_chunk = CHUNKS.get(maps_BChw.device.type, CHUNKS["cpu"])
        grid, queries_QC = maps_BChw.shape[2:], maps_BChw.permute(0, 2, 3, 1).flatten(0, 2)
        rows = []
        for name, columns in self.columns.items():
            chunks = F.normalize(queries_QC[:, columns], dim=1).split(query_chunk)
            votes = [self._votes(chunk_QC, self.keys[name], key_chunk) for chunk_QC in chunks]
            rows += [
                torch.cat(parts).view(-1, *grid, self.labels_NK.shape[1]).permute(0, 3, 1, 2) for parts in zip(*votes)
            ]
        return rows

    def _votes(self, queries_QC: Tensor, keys_NC: Tensor, key_chunk: int) -> list[Tensor]:
        """Return the shares of the votes (Q, K) for each k."""
        found = nearest(queries_QC, keys_NC, max(self.ks), key_chunk=key_chunk)
        weight_Qk = ((found.similarity_Qk - found.similarity_Qk[:, :1]) / self.temperature).exp()
        labels_QkK = self.labels_NK[found.index_Qk]
        return [
            torch.einsum("qk,qkc->qc", weight_Qk[:, :k], labels_QkK[:, :k]) / weight_Qk[:, :k].sum(dim=1, keepdim=True)
            for k in self.ks
        ]
