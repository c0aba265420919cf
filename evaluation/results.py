"""Result files: one `results/<evaluation>.json` under --output_dir, with one schema for all evaluations.

    {"evaluation": "knn",
     "network": {"arch": "swin_tiny", "pretrained_weights": "run/checkpoint.pth", "checkpoint_key": "teacher", "token": "cls"},
     "data": {"data_path": "imagenet", "train_images": 1281167, "val_images": 50000, "classes": 1000},
     "protocol": {"image_size": 224, "temperature": 0.07},
     "scores": {"network, 20-NN": {"top1": 75.0, "top5": 90.0, "per_class": {"n01440764": 94.0}}}}

Accuracies are percentages. `top5` is the top-L accuracy where the network distinguishes only L < 5 classes; `protocol.top5_is`
names it. `per_class` is the top-1 accuracy of each class, in segmentation its IoU; the confusion matrices behind it are in
`<evaluation>_confusion.csv`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from checkpoints import files
from evaluation.confusion import as_csv, class_accuracies, class_name

FOLDER = "results"


class Results(NamedTuple):
    """The content of a result file."""

    evaluation: str  # also the name of the file
    network: dict[str, Any]
    data: dict[str, Any]
    protocol: dict[str, Any]
    scores: dict[str, dict[str, Any]]  # a row for each network, setting or baseline


def save_results(
    output_dir: str | Path,
    results: Results,
    confusions: Mapping[str, Tensor | None] | None = None,
    classes: Sequence[str] = (),
    counted: str = "images",
) -> None:
    """Write a result file, and keep a previous one with other content as `<evaluation>.json.bak`.

    Args:
        confusions: confusion matrices of rows of `results.scores`, see `evaluation.confusion`; None where it is unknown. They
            are written to `<evaluation>_confusion.csv`, and each such row gets the accuracies `per_class` unless it has other ones.
        classes: names of the classes; without names they are numbered.
        counted: what the matrices count.

    Raises:
        DiskError: the file cannot be written.
    """
    scores = dict(results.scores)
    known = {name: cells for name, cells in (confusions or {}).items() if cells is not None}
    for name, cells in known.items():
        per_class = {class_name(label, classes): top1 for label, top1 in class_accuracies(cells).items()}
        scores[name] = scores[name] | {"per_class": scores[name].get("per_class", per_class)}
    path = Path(output_dir) / FOLDER / f"{results.evaluation}.json"
    with files.disk_errors(output_dir):
        files.check_lock(Path(output_dir))
        path.parent.mkdir(exist_ok=True)
        if known:
            text = as_csv(known, classes, counted)
            files.write_with_backup(
                confusion_path(path), text.encode("utf-8", "backslashreplace")
            )  # names may not be UTF-8
        elif confusion_path(path).exists():
            files.move_to_backup(confusion_path(path))
        files.write_with_backup(path, (json.dumps(results._replace(scores=scores)._asdict(), indent=2) + "\n").encode())


def confusion_path(path: Path) -> Path:
    """Return the path of the confusion matrices of a result file."""
    return path.with_name(f"{path.stem}_confusion.csv")


def describe_network(args: argparse.Namespace) -> dict[str, Any]:
    """Return the `network` part of a result file."""
    return {name: getattr(args, name) for name in ("arch", "pretrained_weights", "checkpoint_key", "token")}


def describe_data(data_path: str, train_images: int, val_images: int, classes: int) -> dict[str, Any]:
    """Return the `data` part of a result file."""
    return {"data_path": data_path, "train_images": train_images, "val_images": val_images, "classes": classes}


def topk_name(classes: int) -> str:
    """Return what the second accuracy is: `Top5`, or `Top<classes>` for fewer than five classes."""
    return f"Top{min(5, classes)}"
