"""Extract the features of any images with a frozen network; find nearest images and near duplicates, and draw them.

    python extract_features.py --pretrained_weights RUN/checkpoint.pth --data_path PHOTOS --output_dir FEATURES
    torchrun --nproc_per_node=8 extract_features.py ...
    python extract_features.py --output_dir FEATURES --neighbors 10 --duplicates 0.95 --plot tsne    # of extracted features

--data_path is what pre-training takes: a folder with or without classes, a text file of paths, zip, tsv or tar shards. The same
command resumes an interrupted extraction. A finished folder is never changed; what is derived from it gets new names.

Results: `features.npy`, `files.txt`, `meta.json`, ... (evaluation/feature_folder.py), `neighbors.csv`, `neighbors.png`,
`duplicates.csv` and `plot_METHOD.png`. docs/evaluation.md has the details.
"""

from __future__ import annotations

from config.arguments.extract_features import get_args_parser as get_args_parser

if __name__ == "__main__":  # --help and usage errors are answered before torch is imported
    ARGS = get_args_parser().parse_command_line()

import argparse
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import data
import utils
from analysis import embedding, gallery
from analysis.output import save_image, write_new
from analysis.plots import as_png
from checkpoints import files
from config import arguments
from distributed import collectives, launch
from evaluation import neighbors
from evaluation.extraction import Names, describe, extract, label_names, open_images
from evaluation.feature_folder import FeatureFolder, SavedFeatures, write_csv
from evaluation.features import frozen_backbone, network_config
from evaluation.knn import nearest
from utils import UsageError, logger

QUERIES, SHOWN_NEIGHBORS = 8, 8  # of neighbors.png
MAX_PLOTTED = 2000  # images


def check_args(args: argparse.Namespace, folder: FeatureFolder) -> None:
    """Raise UsageError for missing flags or packages before anything is loaded.

    A finished folder needs no images and no network; flags that contradict it are refused.
    """
    if args.plot == "umap":
        embedding.load_umap()
    if args.neighbors:
        neighbors.choose_backend(args.backend, torch.device("cpu"))
    if args.data_path:
        arguments.check_weights(args)
        return
    if not folder.finished:
        raise UsageError(
            f"--data_path is missing, and --output_dir {folder.path} has no finished features; pass --data_path"
        )
    defaults = get_args_parser()
    for name, value in recorded_flags(folder.load().meta).items():
        given = getattr(args, name)
        if given and given not in (defaults.get_default(name), value):
            words = f"--{name} {given}" if name != "opts" else " ".join(given)
            raise UsageError(
                f"{words} cannot change the finished features of --output_dir {folder.path}; leave it out, "
                "or pass --data_path and another --output_dir"
            )


def recorded_flags(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags that features depend on and the values that they were made with, None where only their effect is saved."""
    network, images, preprocessing = meta["network"], meta["data"], meta["preprocessing"]
    own = ("arch", "patch_size", "pretrained_weights", "checkpoint_key", "token", "allow_partial")
    return {
        **{name: network[name] for name in own},
        **dict.fromkeys(("cfg", "opts")),
        "random_weights": not network["pretrained_weights"],
        "dataset": images["layout"] if images["layout"] in data.COLLECTIONS else Path(images["data_path"]).name,
        "split": images["split"],
        "zip_mode": images["layout"] == "zip",
        "tsv_mode": images["layout"] == "tsv",
        "image_size": preprocessing["image_size"],
        "crop_ratio": preprocessing["crop_ratio"],
        "regions": "regions" in meta,
        "half": meta["features"]["dtype"] == "float16",
        "normalize": meta["features"]["unit_length"],
    }


def extract_features(args: argparse.Namespace, folder: FeatureFolder, device: torch.device) -> None:
    """Extract the features that the folder lacks; of a finished one, check that it has the same settings."""
    with collectives.failing_together():
        config = network_config(args)
        dataset = open_images(args, config)
        backbone = frozen_backbone(args, config, args.pretrained_weights, device)
        meta = describe(args, config, dataset, backbone, device)
        if collectives.is_main_process():
            with files.disk_errors(folder.path):
                folder.prepare(meta, Names(dataset), label_names(dataset))
    collectives.must_agree("numbers of images", len(dataset))
    if folder.finished:
        logger.info("%s has the features of these images", folder.path)
    else:
        extract(args, dataset, backbone, folder, device)


# --------------------------------------------------------------------------- of finished features


def save_rows(path: Path, header: Sequence[str], rows: Iterator[Sequence[Any]]) -> None:
    """Write the rows that all processes find, under a new name."""
    if collectives.is_main_process():
        write_new(path, lambda temporary: write_csv(temporary, header, rows))
    else:
        for _ in rows:
            pass


def open_thumbnails(saved: SavedFeatures) -> gallery.Thumbnails:
    """Open the images of a folder again, for pictures."""
    spec, place = saved.meta["network"]["config"], saved.meta["data"]
    in_chans, value_range = spec["MODEL"]["SPEC"]["IN_CHANS"], spec["INPUT"]["RANGE"]
    try:
        source = data.build_dataset(
            place["data_path"], place["split"], lambda image: [], in_chans, layout=place["layout"]
        ).source
    except UsageError as error:
        logger.warning("the pictures show no images: %s", error)
        source = None
    return gallery.Thumbnails(source, saved.names, in_chans, value_range)


def draw_neighbors(saved: SavedFeatures, unit: neighbors.UnitFeatures, k: int, path: Path) -> None:
    """Draw some images, spread over the folder, with their nearest ones."""
    count = len(unit.rows_M)
    query_Q = torch.from_numpy(spread(count, QUERIES)).to(unit.features_MC.device)
    found = nearest(unit.features_MC[query_Q], unit.features_MC, min(k, SHOWN_NEIGHBORS), query_Q)

    def tile(index: int, cosine: float | None = None) -> gallery.Tile:
        row = int(unit.rows_M[index])
        return gallery.Tile(row, gallery.caption(saved.names[row], saved.labels[row] if saved.labels else None, cosine))

    rows = [
        [tile(query), *(tile(index, cosine) for index, cosine in zip(index_k, similarity_k))]
        for query, index_k, similarity_k in zip(query_Q.tolist(), found.index_Qk.tolist(), found.similarity_Qk.tolist())
    ]
    thumbnails = open_thumbnails(saved)
    about = f"{len(rows)} of {count} images (framed) and the nearest others, with cosine similarities"
    save_image(gallery.neighbor_page(rows, thumbnails, about), path)
    thumbnails.warn_missing()


def draw_plot(saved: SavedFeatures, unit: neighbors.UnitFeatures, method: str, seed: int, path: Path) -> None:
    """Draw the images, or a sample of them, in two dimensions."""
    count = len(unit.rows_M)
    sample = spread(count, MAX_PLOTTED)
    if len(sample) < count:
        logger.info("--plot shows %d of %d images, spread evenly over the folder", len(sample), count)
    projection = embedding.project(unit.features_MC[torch.from_numpy(sample)].cpu().numpy(), method, seed)
    rows = unit.rows_M[sample].tolist()
    labels = None if saved.labels is None else [saved.labels[row] for row in rows]
    thumbnails = open_thumbnails(saved)
    shown = f"{len(sample)} of {count} images" if len(sample) < count else utils.counted(count, "image")
    title = f"{embedding.NAMES[method]} of the features of {shown}"
    figure = gallery.scatter_plot(projection.points_N2, projection.axes, rows, labels, thumbnails, title)
    write_new(path, lambda temporary: temporary.write_bytes(as_png(figure)))
    thumbnails.warn_missing()


def spread(count: int, most: int) -> np.ndarray:
    """Return at most `most` of the indices below `count`, evenly spread."""
    return np.linspace(0, count - 1, min(most, count)).astype(np.int64)


def derive(args: argparse.Namespace, folder: FeatureFolder, device: torch.device) -> None:
    """Write the neighbors, duplicates and pictures that were asked for."""
    with collectives.failing_together():
        saved = folder.load()
        unit = neighbors.unit_features(saved.features_NC, device)
        k = neighbors.usable_neighbors(args.neighbors, unit) if args.neighbors else 0
    if k:
        backend = neighbors.choose_backend(args.backend, device)
        rows = neighbors.neighbor_rows(unit, saved.names, k, backend)
        save_rows(folder.path / "neighbors.csv", neighbors.NEIGHBOR_COLUMNS, rows)
    if args.duplicates:
        pairs = neighbors.duplicate_rows(unit, saved.names, args.duplicates)
        save_rows(folder.path / "duplicates.csv", neighbors.DUPLICATE_COLUMNS, pairs)
    with collectives.failing_together():
        if k and collectives.is_main_process():
            draw_neighbors(saved, unit, k, folder.path / "neighbors.png")
        if args.plot and collectives.is_main_process():
            draw_plot(saved, unit, args.plot, args.seed, folder.path / f"plot_{args.plot}.png")


def main(args: argparse.Namespace) -> None:
    """Extract the features, then write what is derived from them."""
    device = launch.init_processes(args)
    utils.setup_logging(collectives.is_main_process())
    folder = FeatureFolder(args.output_dir)
    with collectives.failing_together():
        check_args(args, folder)
    with files.lock_folder(folder.path, "features"):
        if args.data_path:
            extract_features(args, folder, device)
        if args.neighbors or args.duplicates or args.plot:
            derive(args, folder, device)


if __name__ == "__main__":
    launch.run_script(partial(main, ARGS))
