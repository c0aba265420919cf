"""Weighted k-nearest-neighbor classification by cosine similarity, in chunks, for sets of any size.

The similarities of one chunk of queries to one chunk of keys are in memory at a time, and each query keeps its k best keys so far.
Ties in similarity are resolved by the lower index and ties in votes by the lower label, for every chunk size.

Memory: the keys (14 million of width 384 take 21 GB in float32, half of that in float16), a few chunks (`CHUNKS`), and the votes
of a chunk of queries (Q x L). Votes are always float32. A GPU multiplies float16 features as they are; a CPU, where that is slow,
converts one chunk of keys at a time to float32.

Shapes: N keys (training images), Q queries of a chunk, C channels, k neighbors, S values of k, L classes.
Origin: the protocol of DINO (Caron et al., ICCV 2021) section 4.1 after Wu et al. (CVPR 2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from config.choices import KNN_BACKENDS
from distributed import collectives
from evaluation.confusion import gather_confusion, top1_accuracy
from evaluation.features import LabeledFeatures
from utils import UsageError, import_optional, logger

CHUNKS = {"cpu": (128, 2048), "cuda": (2048, 65536)}  # queries and keys of a chunk; other devices use those of the CPU
FAISS_QUERIES = 4096  # of a chunk; faiss divides its work further
CHECKED_ROWS = 65536  # features checked for non-finite values at a time
TIE = 1e-6  # similarities of unit vectors that differ by less may differ by rounding only
TOPK = 5  # of the second accuracy


class Split(NamedTuple):
    """Features of the training and the validation images, normalized to length 1; for leave-one-out twice the same set."""

    train: LabeledFeatures
    val: LabeledFeatures


class KnnScore(NamedTuple):
    """Accuracies in percent of the vote of `k` neighbors.

    `top5` only counts classes that received votes, so it equals `top1` for k = 1; for L < 5 classes it is top-L.
    """

    k: int
    top1: float
    top5: float
    confusion_P3: Tensor  # see `evaluation.confusion`


class Neighbors(NamedTuple):
    """The nearest keys of some queries, best first, ties by index."""

    similarity_Qk: Tensor
    index_Qk: Tensor


# --------------------------------------------------------------------------- the search


def nearest(
    queries_QC: Tensor, keys_NC: Tensor, k: int, own_Q: Tensor | None = None, key_chunk: int = 2048
) -> Neighbors:
    """Return the `k` keys with the largest inner product for each query.

    Args:
        queries_QC, keys_NC: on one device, of one dtype.
        k: at most N, or N - 1 with `own_Q`.
        own_Q: index of the key that is the query itself and is skipped (leave-one-out).
        key_chunk: keys compared at a time.
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
    """Update `best` with the keys `first`, `first` + 1, ... and their similarities (Q, keys).

    Only similarities above a query's worst neighbor so far are sorted (an equal one loses the tie). If they are many, as in the
    first chunks, the left half of the keys is merged first, which leaves fewer candidates in the right half.
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
    """Import faiss; raise a UsageError if it is not installed."""
    return import_optional("faiss", "--backend faiss", "faiss-cpu", "--backend torch")


def check_faiss(half: bool) -> None:
    """Raise UsageError if faiss is not installed, or cannot search features of half precision."""
    load_faiss()
    if half:
        raise UsageError("--backend faiss needs float32; leave --half out, or use --backend torch")


def nearest_faiss(
    queries_QC: Tensor, keys_NC: Tensor, k: int, own_Q: Tensor | None = None, key_chunk: int = 2048
) -> Neighbors:
    """Return the same as `nearest`, computed by the exact search of faiss; all tensors are on the CPU.

    faiss breaks ties arbitrarily and rounds differently, so queries with neighbors that differ by less than `TIE` are searched
    again by `nearest`.
    """
    faiss = load_faiss()
    wanted = min(k + 1 + (own_Q is not None), len(keys_NC))  # one more key shows whether the last one is tied
    found = faiss.knn(
        queries_QC.contiguous().numpy(), keys_NC.contiguous().numpy(), wanted, metric=faiss.METRIC_INNER_PRODUCT
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


class Votes(NamedTuple):
    """The result of the votes on some queries: the class with most votes, and the rank of the true class, from 0."""

    predicted_SQ: Tensor
    rank_SQ: Tensor


def vote(
    neighbors: Neighbors, labels_N: Tensor, truth_Q: Tensor, ks: Sequence[int], temperature: float, classes: int
) -> Votes:
    """Let the first k neighbors vote for each of `ks`; ties by label.

    A neighbor votes with weight exp(similarity / temperature). A true class without votes is ranked after all others.
    """
    # Weights relative to the nearest neighbor's, which keeps ranks and cannot overflow; at least tiny, so that each vote counts.
    similarity_Qk = neighbors.similarity_Qk
    weight_Qk = ((similarity_Qk - similarity_Qk[:, :1]) / temperature).exp().clamp_min(torch.finfo(torch.float32).tiny)
    label_Qk = labels_N[neighbors.index_Qk]
    votes_QL = weight_Qk.new_zeros(len(truth_Q), classes)
    lower_QL = torch.arange(classes, device=truth_Q.device) < truth_Q[:, None]
    counted, predicted, ranks = 0, {}, {}
    for k in sorted(set(ks)):
        votes_QL.scatter_add_(1, label_Qk[:, counted:k], weight_Qk[:, counted:k])
        counted = k
        own_Q1 = votes_QL.gather(1, truth_Q[:, None])
        rank_Q = ((votes_QL > own_Q1) | ((votes_QL == own_Q1) & lower_QL)).sum(dim=1)
        ranks[k] = rank_Q.where(own_Q1[:, 0] > 0, classes + TOPK)
        predicted[k] = votes_QL.argmax(dim=1)  # the first of equals
    return Votes(*(torch.stack([found[k] for k in ks]) for found in (predicted, ranks)))


def knn_scores(
    split: Split, ks: Sequence[int], temperature: float, leave_one_out: bool = False, backend: str = "torch"
) -> list[KnnScore]:
    """Return top-1 and top-5 accuracy for each k; the queries are divided among the processes, which all call this.

    A `k` larger than the training set is clamped to it, with a warning.

    Args:
        split: equal on all processes.
        leave_one_out: both sets are the same, and no image votes on itself.

    Raises:
        UsageError: too few images, `k` or temperature not positive, non-finite features, an unknown or missing backend.
    """
    train, val = split
    if backend == "faiss":  # once, not for every chunk of queries
        train, val = (LabeledFeatures(*(tensor.cpu().contiguous() for tensor in part)) for part in split)
    voters = len(train.labels_N) - leave_one_out
    _check(split, ks, temperature, voters, backend)
    clamped = [min(k, voters) for k in ks]
    for k in (k for k in ks if k > voters):
        logger.warning("k = %d is larger than the %d images that vote; using k = %d", k, voters, voters)
    classes = 1 + int(max(train.labels_N.max(), val.labels_N.max()).item())
    query_chunk, key_chunk = CHUNKS.get(train.features_NC.device.type, CHUNKS["cpu"])
    if backend == "faiss":
        query_chunk = FAISS_QUERIES
    search = nearest_faiss if backend == "faiss" else nearest
    top5_S = torch.zeros(len(ks), dtype=torch.long)
    labels = [torch.zeros(1 + len(ks), 0, dtype=torch.long)]  # the true ones and those that are predicted for each k
    chunks = range(0, len(val.labels_N), query_chunk)[collectives.get_rank() :: collectives.get_world_size()]
    for first in tqdm(chunks, desc="vote", disable=None if collectives.is_main_process() else True, leave=False):
        queries = val.features_NC[first : first + query_chunk]
        truth = val.labels_N[first : first + query_chunk]
        own = torch.arange(first, first + len(truth), device=truth.device) if leave_one_out else None
        found = search(queries, train.features_NC, max(clamped), own, key_chunk)
        votes = vote(found, train.labels_N, truth, clamped, temperature, classes)
        top5_S += (votes.rank_SQ < TOPK).sum(dim=1).cpu()
        labels.append(torch.cat([truth[None], votes.predicted_SQ]).cpu())
    top5_S = torch.stack(collectives.all_gather_objects(top5_S)).sum(dim=0)
    true_N, *predicted_SN = torch.cat(labels, dim=1)
    confusions = [gather_confusion(true_N, predicted_N) for predicted_N in predicted_SN]
    return [
        KnnScore(k, top1_accuracy(cells), 100 * int(top5) / len(val.labels_N), cells)
        for k, top5, cells in zip(ks, top5_S, confusions)
    ]


def _check(split: Split, ks: Sequence[int], temperature: float, voters: int, backend: str) -> None:
    if backend not in KNN_BACKENDS:
        raise UsageError(f"unknown --backend '{backend}'; choose one of {', '.join(KNN_BACKENDS)}")
    if voters < 1 or not len(split.val.labels_N):
        raise UsageError("k-NN needs at least one training and one validation image, --leave_one_out two images")
    if min(ks) < 1 or not 0 < temperature < float("inf"):
        raise UsageError(f"--nb_knn {list(ks)} and --temperature {temperature} must be positive")
    chunks = (chunk for part in split for chunk in part.features_NC.split(CHECKED_ROWS))
    if not torch.stack([chunk.sum(dtype=torch.float32) for chunk in chunks]).isfinite().all():
        raise UsageError("the features are not finite; check the weights of the network")
    if backend == "faiss":
        check_faiss(half=split.train.features_NC.dtype != torch.float32)
