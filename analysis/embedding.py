"""Features in two dimensions, by PCA, t-SNE or UMAP."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from utils import UsageError, import_optional

NAMES = {"pca": "PCA", "tsne": "t-SNE", "umap": "UMAP"}
MIN_IMAGES = 5
PCA_WIDTH = 50  # t-SNE works on this many principal components
PERPLEXITY, NEIGHBORS = 30, 15  # usual values of t-SNE and UMAP


class Projection(NamedTuple):
    """Points of images in two dimensions, and what the axes are."""

    points_N2: np.ndarray
    axes: tuple[str, str]


def load_umap() -> Any:
    """Import umap; raise a UsageError if it is not installed."""
    return import_optional("umap", "--plot umap", "umap-learn", "--plot tsne")


def project(features_NC: np.ndarray, method: str, seed: int) -> Projection:
    """Project features of length 1; of these, Euclidean and cosine distances have the same order.

    Args:
        method: a key of `NAMES`.

    Raises:
        UsageError: fewer than `MIN_IMAGES` images, or umap is not installed.
    """
    count, width = features_NC.shape
    if count < MIN_IMAGES:
        raise UsageError(f"--plot needs {MIN_IMAGES} readable images, the folder has {count}; add images")
    if method == "umap":
        reducer = load_umap().UMAP(
            metric="cosine", n_neighbors=min(NEIGHBORS, count - 2), random_state=seed, init="pca"
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "n_jobs value", UserWarning)  # the price of a fixed seed
            return Projection(reducer.fit_transform(features_NC), ("", ""))
    pca = PCA(2 if method == "pca" else min(PCA_WIDTH, count, width), random_state=seed)
    components = pca.fit_transform(features_NC)
    if method == "pca":
        first, second = pca.explained_variance_ratio_
        return Projection(components, (f"{first:.0%} of the variance", f"{second:.0%} of the variance"))
    reducer = TSNE(perplexity=min(PERPLEXITY, (count - 1) / 3), init="pca", random_state=seed)
    return Projection(reducer.fit_transform(components), ("", ""))
