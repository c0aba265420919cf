"""Nearest images and near duplicates in a folder of features, by cosine similarity.

The similarities of one chunk of images to one chunk of images are in memory at a time (evaluation/knn.py); the processes take
chunks in turn, and results are written as they are found. Every process holds all features, scaled to length 1, in float32: 15 GB
for 10 million images of width 384.

Shapes: N images, M readable images, Q queries of a chunk, C channels, k neighbors, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.layouts.sources import PackedStrings
from distributed import collectives
from evaluation.knn import CHECKED_ROWS, CHUNKS, FAISS_QUERIES, TIE, Neighbors, check_faiss, nearest, nearest_faiss
from utils import UsageError, logger

MAX_PAIRS = 10_000_000  # of duplicates
NEIGHBOR_COLUMNS = ("image", "rank", "neighbor", "cosine")
DUPLICATE_COLUMNS = ("image", "duplicate", "cosine")


class UnitFeatures(NamedTuple):
    """Features of the readable images, scaled to length 1."""

    features_MC: Tensor  # float32
    rows_M: np.ndarray  # their rows in the folder


def unit_features(features_NC: np.ndarray, device: torch.device) -> UnitFeatures:
    """Load features chunk by chunk, leave out the rows of unreadable images, and scale the others to length 1."""
    unit_NC = torch.empty(features_NC.shape, device=device)
    rows: list[np.ndarray] = []
    count = 0
    for first in range(0, len(features_NC), CHECKED_ROWS):
        chunk = np.array(features_NC[first : first + CHECKED_ROWS], dtype=np.float32)
        readable = np.isfinite(chunk).all(axis=1)
        rows.append(first + np.flatnonzero(readable))
        end = count + len(rows[-1])
        unit_NC[count:end] = F.normalize(torch.from_numpy(chunk[readable]).to(device), dim=-1)
        count = end
    return UnitFeatures(unit_NC[:count], np.concatenate(rows))


def choose_backend(wanted: str, device: torch.device) -> str:
    """Return the library of the search; `auto` is faiss on a CPU where it is installed, else torch.

    Raises:
        UsageError: faiss is requested but not installed.
    """
    if wanted == "faiss":
        check_faiss(half=False)
    if wanted != "auto":
        return wanted
    try:
        check_faiss(half=False)
    except UsageError:
        return "torch"
    return "faiss" if device.type == "cpu" else "torch"


def usable_neighbors(k: int, unit: UnitFeatures) -> int:
    """Return `k`, or with a warning the number of other images if that is smaller.

    Raises:
        UsageError: there is no other image.
    """
    others = len(unit.rows_M) - 1
    if others < 1:
        raise UsageError(f"--neighbors needs two readable images, the folder has {len(unit.rows_M)}; add images")
    if k > others:
        logger.warning("--neighbors %d is larger than the number of other images; using %d", k, others)
    return min(k, others)


def neighbors_of_all(unit: UnitFeatures, k: int, backend: str) -> Iterator[Neighbors]:
    """Yield the `k` nearest other images of consecutive images; a collective operation."""
    features_MC = unit.features_MC.cpu() if backend == "faiss" else unit.features_MC
    query_chunk, key_chunk = CHUNKS.get(features_MC.device.type, CHUNKS["cpu"])
    search = nearest_faiss if backend == "faiss" else nearest

    def of_chunk(own_Q: Tensor) -> Neighbors:
        return search(features_MC[own_Q], features_MC, k, own_Q, key_chunk)

    query_chunk = FAISS_QUERIES if backend == "faiss" else query_chunk
    for similarity_Qk, index_Qk in _in_turn(of_chunk, features_MC, query_chunk):
        yield Neighbors(similarity_Qk, index_Qk)


def neighbor_rows(
    unit: UnitFeatures, names: PackedStrings, k: int, backend: str
) -> Iterator[tuple[str, int, str, str]]:
    """Yield rows of `NEIGHBOR_COLUMNS`; a collective operation."""
    query = 0
    for found in neighbors_of_all(unit, k, backend):
        for similarity_k, index_k in zip(found.similarity_Qk.tolist(), found.index_Qk.tolist()):
            name = names[unit.rows_M[query]]
            for rank, (cosine, index) in enumerate(zip(similarity_k, index_k), start=1):
                yield name, rank, names[unit.rows_M[index]], _printed(cosine)
            query += 1


def duplicate_rows(unit: UnitFeatures, names: PackedStrings, threshold: float) -> Iterator[tuple[str, str, str]]:
    """Yield rows of `DUPLICATE_COLUMNS`, in the order of the images; a collective operation.

    Raises:
        UsageError: there are more than `MAX_PAIRS`.
    """
    features_MC = unit.features_MC
    count = 0
    query_chunk, key_chunk = CHUNKS.get(features_MC.device.type, CHUNKS["cpu"])

    def of_chunk(own_Q: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal count
        with collectives.failing_together():
            pairs_P2, cosine_P = pairs_above(features_MC, own_Q, threshold, key_chunk)
        count += sum(collectives.all_gather_objects(len(pairs_P2)))
        check_pairs(count, threshold)  # before every process gets those of all
        return pairs_P2, cosine_P

    for pairs_P2, cosine_P in _in_turn(of_chunk, features_MC, query_chunk):
        for (first, second), cosine in zip(pairs_P2.tolist(), cosine_P.tolist()):
            yield names[unit.rows_M[first]], names[unit.rows_M[second]], _printed(cosine)


def pairs_above(features_MC: Tensor, own_Q: Tensor, threshold: float, key_chunk: int) -> tuple[Tensor, Tensor]:
    """Return the pairs (P, 2) of a query and a later image with at least this cosine similarity, ordered, and the similarities.

    Raises:
        UsageError: there are more than `MAX_PAIRS`.
    """
    count = 0
    pairs, cosines = [torch.zeros(0, 2, dtype=torch.long, device=own_Q.device)], [features_MC.new_zeros(0)]
    start = int(own_Q[0]) if len(own_Q) else len(features_MC)
    for first in range(start, len(features_MC), key_chunk):
        keys = features_MC[first : first + key_chunk]
        similarity = features_MC[own_Q] @ keys.T
        later = torch.arange(first, first + len(keys), device=own_Q.device) > own_Q[:, None]
        similar = (similarity >= threshold - TIE) & later
        count += int(similar.count_nonzero())
        check_pairs(count, threshold)
        query_P, key_P = similar.nonzero(as_tuple=True)
        pairs.append(torch.stack([own_Q[query_P], key_P + first], dim=1))
        cosines.append(similarity[query_P, key_P])
    pairs_P2, cosine_P = torch.cat(pairs), torch.cat(cosines)
    order = pairs_P2[:, 0].argsort(stable=True)  # within a query the keys are in order
    return pairs_P2[order], cosine_P[order]


def check_pairs(count: int, threshold: float) -> None:
    """Reject a threshold with too many pairs, of which `count` have been found so far."""
    if count > MAX_PAIRS:
        raise UsageError(
            f"--duplicates {threshold:g} has at least {count:,} pairs, more than {MAX_PAIRS:,}; pass a higher T"
        )


def _in_turn(
    of_chunk: Callable[[Tensor], tuple[Tensor, Tensor]], features_MC: Tensor, query_chunk: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `of_chunk` of all chunks of queries in order, on the CPU; the processes compute consecutive chunks at the same time."""
    count, world = len(features_MC), collectives.get_world_size()
    for begin in range(0, count, query_chunk * world):
        first = min(begin + collectives.get_rank() * query_chunk, count)
        own_Q = torch.arange(first, min(first + query_chunk, count), device=features_MC.device)
        parts = [collectives.all_gather_rows(part.cpu()) for part in of_chunk(own_Q)]
        yield from zip(*parts)


def _printed(cosine: Any) -> str:
    return f"{min(cosine, 1.0):.6f}"
