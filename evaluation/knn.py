"""Nearest neighbors by cosine and the weighted vote over them, for sets of any size.

Both sides are cut into chunks: the similarities of one chunk of queries to one chunk of keys are held at once, and each query
keeps its k best so far. Equal similarities go to the lower index and equal votes to the lower label, whatever the chunks are.

Memory: the keys, 14 million of width 384 being 21 GB in float32 and half of that in half precision, and beside them a few
chunks (`CHUNKS`) and one number for each query of a chunk and each class. Votes are float32 always. In half precision
a GPU multiplies in it; a CPU, where that is slow, turns a chunk of keys at a time to float32.

Shapes: N keys (training images), Q queries of a chunk, C channels, k neighbors, S numbers of neighbors asked for, L classes.
Origin: the protocol of DINO (Caron et al., ICCV 2021) section 4.1 after Wu et al. (CVPR 2018); the chunks are this project's own.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from config.choices import KNN_BACKENDS
from distributed import collectives
from evaluation.features import LabeledFeatures
from utils import UsageError, logger

CHUNKS = {"cpu": (128, 2048), "cuda": (2048, 65536)}  # queries and keys of a chunk; other devices take the CPU's
FAISS_QUERIES = 4096  # of a chunk; faiss cuts its work itself
CHECKED_ROWS = 65536  # features that are looked at together; half ones become float32 for it
TIE = 1e-6  # similarities of unit vectors that differ by less may be equal but for rounding
RANKED = 5  # the second accuracy is that of the five classes with most votes


class Split(NamedTuple):
    """The same kind of features of both halves of the protocol, normalized to length 1; one set twice for leave-one-out."""

    train: LabeledFeatures
    val: LabeledFeatures


class KnnScore(NamedTuple):
    """Accuracies in percent of the vote of `k` neighbors.

    `top5` counts classes that got a vote only, so that it is top-1 for one neighbor, and is top-L where there are only L < 5
    classes; `per_class` is the top-1 of each label that has validation images.
    """

    k: int
    top1: float
    top5: float
    per_class: dict[int, float]


class Neighbors(NamedTuple):
    """The nearest keys of some queries, best first; equal ones by index."""

    similarity_Qk: Tensor
    index_Qk: Tensor


# --------------------------------------------------------------------------- the search


def nearest(
    queries_QC: Tensor, keys_NC: Tensor, k: int, own_Q: Tensor | None = None, key_chunk: int = 2048
) -> Neighbors:
    """The `k` keys with the largest inner product, for each query.

    Args:
        queries_QC, keys_NC: on one device, in one precision.
        k: at most N, or N - 1 where `own_Q` is given.
        own_Q: the key that a query itself is, which is no neighbor of it.
        key_chunk: keys whose similarities are held at once.
    """
    if queries_QC.device.type == "cpu":
        queries_QC = queries_QC.float()
    best = Neighbors(
        torch.full((len(queries_QC), k), -torch.inf, device=queries_QC.device),
        torch.full((len(queries_QC), k), -1, device=queries_QC.device),
    )
    for first in range(0, len(keys_NC), key_chunk):
        keys = keys_NC[first : first + key_chunk].to(queries_QC.dtype)
        similarity = queries_QC @ keys.T
        if own_Q is not None:
            itself = own_Q - first
            rows = ((itself >= 0) & (itself < len(keys))).nonzero()[:, 0]
            similarity[rows, itself[rows]] = -torch.inf
        best = _merge(best, similarity, first)
    return best


def _merge(best: Neighbors, similarity: Tensor, first: int) -> Neighbors:
    """`best` with the keys `first`, `first` + 1, ... taken in, whose similarities (Q, keys) these are.

    Only what beats a query's worst neighbor so far is sorted: a key as good as that one comes later and loses.
    Where much does so, as at the beginning, the left half goes first and raises the bar for the right one.
    """
    queries, k = best.similarity_Qk.shape
    better = similarity > best.similarity_Qk[:, -1:].to(similarity.dtype)
    count, width = int(better.count_nonzero()), similarity.shape[1]
    if not count:
        return best
    if count > 2 * queries * k and width > 1:
        left, right = similarity.tensor_split(2, dim=1)
        return _merge(_merge(best, left, first), right, first + left.shape[1])
    rows, columns = better.nonzero(as_tuple=True)
    count_Q = rows.bincount(minlength=queries)
    slots = torch.arange(count, device=rows.device) - (count_Q.cumsum(0) - count_Q)[rows]
    shape = (queries, int(count_Q.max()))
    new_similarity = best.similarity_Qk.new_full(shape, -torch.inf)
    new_similarity[rows, slots] = similarity[rows, columns].float()
    new_index = best.index_Qk.new_full(shape, -1)
    new_index[rows, slots] = columns + first
    merged = torch.cat([best.similarity_Qk, new_similarity], 1).sort(dim=1, descending=True, stable=True)
    index = torch.cat([best.index_Qk, new_index], 1).gather(1, merged.indices[:, :k])
    return Neighbors(merged.values[:, :k].contiguous(), index)


def load_faiss() -> Any:
    """The faiss library.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module("faiss")
    except ImportError:
        raise UsageError(
            "--backend faiss needs the package faiss, which is not installed; pip install faiss-cpu, or use --backend torch"
        ) from None


def nearest_faiss(
    queries_QC: Tensor, keys_NC: Tensor, k: int, own_Q: Tensor | None = None, key_chunk: int = 2048
) -> Neighbors:
    """As `nearest`, by faiss's exact search; all tensors are on the CPU.

    faiss takes any of several keys that are equally near, and rounds in its own way: queries with neighbors that differ by less
    than `TIE` are searched again by `nearest`, so that both give the same votes.
    """
    faiss = load_faiss()
    wanted = min(k + 1 + (own_Q is not None), len(keys_NC))  # the key after the last one shows whether that is tied
    found = faiss.knn(
        queries_QC.contiguous().numpy(),
        keys_NC.contiguous().numpy(),
        wanted,
        metric=faiss.METRIC_INNER_PRODUCT,
    )
    similarity, index = (torch.as_tensor(part) for part in found)
    index = index.long()
    if own_Q is not None:
        similarity = similarity.masked_fill(index == own_Q[:, None], -torch.inf)
    similarity, order = similarity.sort(dim=1, descending=True)
    index = index.gather(1, order)[:, :k]
    tied = (similarity[:, : k + 1].diff(dim=1) > -TIE).any(dim=1)
    again = nearest(queries_QC[tied], keys_NC, k, None if own_Q is None else own_Q[tied], key_chunk)
    similarity = similarity[:, :k].contiguous()
    similarity[tied], index[tied] = again
    return Neighbors(similarity, index)


# --------------------------------------------------------------------------- the vote


def classes_before_the_true_one(
    neighbors: Neighbors, labels_N: Tensor, truth_Q: Tensor, ks: Sequence[int], temperature: float, classes: int
) -> Tensor:
    """How many classes have more votes than the true one, or as many and a lower label: (S, Q), 0 for a correct vote.

    A true class that got no vote comes after all others. A neighbor's vote weighs exp(similarity / temperature); votes grow from
    one `k` to the next larger.
    """
    # Up to a factor of each query that no rank depends on; however faint, a vote is one.
    similarity_Qk = neighbors.similarity_Qk
    weight_Qk = ((similarity_Qk - similarity_Qk[:, :1]) / temperature).exp().clamp_min(torch.finfo(torch.float32).tiny)
    label_Qk = labels_N[neighbors.index_Qk]
    votes_QL = weight_Qk.new_zeros(len(truth_Q), classes)
    lower_QL = torch.arange(classes, device=truth_Q.device) < truth_Q[:, None]
    counted, before = 0, {}
    for k in sorted(set(ks)):
        votes_QL.scatter_add_(1, label_Qk[:, counted:k], weight_Qk[:, counted:k])
        counted = k
        own_Q1 = votes_QL.gather(1, truth_Q[:, None])
        ranked_Q = ((votes_QL > own_Q1) | ((votes_QL == own_Q1) & lower_QL)).sum(dim=1)
        before[k] = ranked_Q.where(own_Q1[:, 0] > 0, classes + RANKED)
    return torch.stack([before[k] for k in ks])


def knn_scores(
    split: Split, ks: Sequence[int], temperature: float, leave_one_out: bool = False, backend: str = "torch"
) -> list[KnnScore]:
    """Top-1 and top-5 of the vote, for each number of neighbors; several processes share the queries.

    A `k` beyond the training set is clamped to it, with a warning.

    Args:
        split: the same on all processes, which all have to call this.
        leave_one_out: the two sets are one, and every image votes on all others but not on itself.

    Raises:
        UsageError: an empty set (or a single image to leave out), a `k` or temperature that is not positive, features that
            are not finite, a backend that is unknown or not installed.
    """
    train, val = split
    if backend == "faiss":  # which searches there; once, not for every chunk of queries
        train, val = (LabeledFeatures(*(tensor.cpu().contiguous() for tensor in part)) for part in split)
    voters = len(train.labels_N) - leave_one_out
    _check(split, ks, temperature, voters, backend)
    clamped = [min(k, voters) for k in ks]
    for k in (k for k in ks if k > voters):
        logger.warning("k = %d is more than the %d training images that vote; all of them do", k, voters)
    classes = 1 + int(max(train.labels_N.max(), val.labels_N.max()).item())
    query_chunk, key_chunk = CHUNKS.get(train.features_NC.device.type, CHUNKS["cpu"])
    if backend == "faiss":
        query_chunk = FAISS_QUERIES
    search = nearest_faiss if backend == "faiss" else nearest
    hits = torch.zeros(len(ks), 2, classes, dtype=torch.long)  # of the one class with most votes, and of the first five
    mine = range(0, len(val.labels_N), query_chunk)[collectives.get_rank() :: collectives.get_world_size()]
    for first in tqdm(mine, desc="vote", disable=None if collectives.is_main_process() else True, leave=False):
        queries = val.features_NC[first : first + query_chunk]
        truth = val.labels_N[first : first + query_chunk]
        own = torch.arange(first, first + len(truth), device=truth.device) if leave_one_out else None
        found = search(queries, train.features_NC, max(clamped), own, key_chunk)
        before = classes_before_the_true_one(found, train.labels_N, truth, clamped, temperature, classes)
        for row, before_Q in enumerate(before):
            for column, ranked in enumerate((1, RANKED)):
                hits[row, column] += truth[before_Q < ranked].bincount(minlength=classes).cpu()
    hits = torch.stack(collectives.all_gather_objects(hits)).sum(dim=0)
    return _percent(hits, val.labels_N.cpu().bincount(minlength=classes), ks)


def _check(split: Split, ks: Sequence[int], temperature: float, voters: int, backend: str) -> None:
    if backend not in KNN_BACKENDS:
        raise UsageError(f"unknown --backend '{backend}'; choose one of {', '.join(KNN_BACKENDS)}")
    if voters < 1 or not len(split.val.labels_N):
        raise UsageError("k-NN needs at least one training and one validation image, --leave_one_out two images")
    if min(ks) < 1 or not 0 < temperature < float("inf"):
        raise UsageError(f"--nb_knn {list(ks)} and --temperature {temperature} must be positive")
    chunks = (chunk for part in split for chunk in part.features_NC.split(CHECKED_ROWS))
    if not torch.stack([chunk.sum(dtype=torch.float32) for chunk in chunks]).isfinite().all():
        raise UsageError("the features hold numbers that are not finite; check the weights of the network")
    if backend == "faiss" and split.train.features_NC.dtype != torch.float32:
        raise UsageError("--backend faiss takes float32 only; leave --half out, or use --backend torch")
    if backend == "faiss":
        load_faiss()


def _percent(hits: Tensor, images_L: Tensor, ks: Sequence[int]) -> list[KnnScore]:
    """Accuracies of counted hits (S, 2, L)."""
    scores = []
    labels = images_L.nonzero()[:, 0].tolist()
    for k, (first, ranked) in zip(ks, hits):
        top1, top5 = (100 * int(count.sum()) / int(images_L.sum()) for count in (first, ranked))
        scores.append(
            KnnScore(k, top1, top5, {label: 100 * int(first[label]) / int(images_L[label]) for label in labels})
        )
    return scores
