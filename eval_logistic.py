"""Evaluate frozen features with multinomial logistic regression, e.g. on few labels (1 or 10 % of ImageNet).

    python eval_logistic.py --data_path IMAGENET --pretrained_weights OUT/checkpoint.pth \\
        --target_list_path 1percent.txt --output_dir OUT/logistic
    torchrun --nproc_per_node=8 eval_logistic.py ...                             # features in parallel, one process fits

--data_path holds train/<class>/ and val/<class>/. Features of center crops, scaled to length 1, are computed once. For each value
of --lr_lambd this is minimized over the weights, without intercept:

    mean cross-entropy over the training images  +  lambda / 2 * squared norm of the weights

lambda is the value of the flag, divided by the number of training images unless --adjust_lambd is off.

Results: `results/logistic.json` in --output_dir. docs/evaluation.md has the details.
Origin: the protocol of UDI (Su and Ji, ECCV 2024) after Mugs (Zhou et al., 2022); the solver is scikit-learn's L-BFGS.
"""

from __future__ import annotations

from config.arguments.eval_logistic import POOLED
from config.arguments.eval_logistic import get_args_parser as get_args_parser

if __name__ == "__main__":  # --help and usage errors are answered before torch is imported
    ARGS = get_args_parser().parse_command_line()

import argparse
import warnings
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from yacs.config import CfgNode

import data
import utils
from checkpoints import files
from config import arguments
from data.layouts.image_list import list_digest
from data.transforms import augment
from distributed import collectives, launch
from evaluation.confusion import confusion_cells
from evaluation.features import (
    FeatureFunction,
    LabeledFeatures,
    check_blocks,
    evaluation_size,
    extract_splits,
    frozen_backbone,
    labeled_datasets,
    network_config,
)
from evaluation.results import Results, describe_data, describe_network, save_results, topk_name
from models import Backbone
from utils import UsageError, logger

TOLERANCE = 1e-5  # largest entry of the gradient at the end


class Score(NamedTuple):
    """Scores of one value of --lr_lambd; accuracies in percent, for L < 5 classes `top5` is top-L."""

    lambd: float
    top1: float
    top5: float
    iterations: int
    converged: bool
    confusion_P3: Tensor  # see `evaluation.confusion`


def feature_function(backbone: Backbone, n_last_blocks: int, pooled: int) -> FeatureFunction:
    """Return a function from images to features; `pooled` is an index into `POOLED`."""

    def function(images_BCHW: Tensor) -> Tensor:
        if pooled == 1:
            return backbone.forward_features(images_BCHW).regions_BTC.mean(dim=1)
        return backbone.forward_return_n_last_blocks(images_BCHW, n_last_blocks, return_patch_avgpool=pooled == 2)

    return function


def solve(train: LabeledFeatures, val: LabeledFeatures, lambd: float, adjust: bool, iterations: int) -> Score:
    """Fit the weights for one lambda and score them.

    scikit-learn minimizes C * sum of cross-entropies + squared norm / 2, so C = 1 / (images * lambda). For two classes it fits one
    row of weights, the difference of two rows with half its squared norm in total, so C is twice that.
    """
    inverse = 1 / lambd if adjust else 1 / (len(train.labels_N) * lambd)
    if len(train.labels_N.unique()) == 2:
        inverse *= 2
    model = LogisticRegression(C=inverse, fit_intercept=False, tol=TOLERANCE, max_iter=iterations)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(train.features_NC.double().numpy(), train.labels_N.numpy())
    converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    logits_NL = torch.from_numpy(np.asarray(model.decision_function(val.features_NC.double().numpy())))
    if logits_NL.ndim == 1:  # two classes
        logits_NL = torch.stack([-logits_NL, logits_NL], dim=1)
    labels_L = torch.from_numpy(model.classes_)
    ranking = labels_L[logits_NL.topk(min(5, len(labels_L))).indices]
    correct = ranking == val.labels_N[:, None]
    top1, top5 = (100 * hits.double().mean().item() for hits in (correct[:, 0], correct.any(dim=1)))
    confusion = confusion_cells(val.labels_N, ranking[:, 0])
    return Score(lambd, top1, top5, int(np.max(model.n_iter_)), converged, confusion)


def build_datasets(args: argparse.Namespace, config: CfgNode) -> tuple[data.ImageDataset, data.ImageDataset]:
    """Open the training and validation images as center crops.

    Raises:
        UsageError: no such data, or training images of a single class.
    """
    view = augment.eval_view(evaluation_size(args, config), args.crop_ratio, config.INPUT.MEAN, config.INPUT.STD)
    layout = data.layout_of(args)
    datasets = labeled_datasets(
        args.data_path, config, view, view, seed=args.seed, layout=layout, train_list=args.target_list_path
    )
    if len(np.unique(datasets[0].labels)) < 2:
        raise UsageError("all training images are of one class; logistic regression needs two or more classes")
    return datasets


def fit(args: argparse.Namespace, train: LabeledFeatures, val: LabeledFeatures, top5: str) -> list[Score]:
    """Solve for each value of --lr_lambd, and print its scores."""
    scores = []
    for lambd in args.lr_lambd:
        score = solve(train, val, lambd, args.adjust_lambd, args.epochs)
        steps = utils.counted(score.iterations, "iteration")
        print(f"lambda {lambd}: Top1: {score.top1:.2f}, {top5}: {score.top5:.2f} ({steps})")
        if not score.converged:
            logger.warning("lambda %s has not converged in --epochs %d iterations; raise --epochs", lambd, args.epochs)
        scores.append(score)
    return scores


def main(args: argparse.Namespace) -> None:
    """Extract features, fit, report."""
    device = launch.init_processes(args)
    utils.setup_logging(collectives.is_main_process())
    with collectives.failing_together():
        arguments.check_weights(args)
        if args.output_dir:
            files.make_output_dir(args.output_dir)
        config = network_config(args)
        datasets = build_datasets(args, config)
        backbone = frozen_backbone(args, config, args.pretrained_weights, device)
        check_blocks(backbone, [args.n_last_blocks], args.avgpool_patchtokens == 2)
    collectives.must_agree("numbers of images", [len(dataset) for dataset in datasets])

    functions = {"network": feature_function(backbone, args.n_last_blocks, args.avgpool_patchtokens)}
    splits = extract_splits(datasets, functions, args, device, torch.device("cpu"))
    if not collectives.is_main_process():
        return

    classes, top5 = len(datasets[0].classes), topk_name(len(datasets[0].classes))
    train_images, val_images = (len(dataset) for dataset in datasets)
    compared = f"{train_images} training and {utils.counted(val_images, 'validation image')}, {classes} classes"
    print(f"logistic regression on the {POOLED[args.avgpool_patchtokens]}: {compared}")
    scores = fit(args, splits[0]["network"], splits[1]["network"], top5)
    if args.output_dir:
        protocol = {
            "features": POOLED[args.avgpool_patchtokens],
            "n_last_blocks": args.n_last_blocks,
            "image_size": evaluation_size(args, config),
            "crop_ratio": args.crop_ratio,
            "target_list_path": args.target_list_path,
            "digest_of_list": list_digest(args.target_list_path) if args.target_list_path else None,
            "adjust_lambd": args.adjust_lambd,
            "top5_is": top5.lower(),
        }
        described = describe_network(args), describe_data(args.data_path, train_images, val_images, classes)
        rows = {f"lambda {score.lambd}": score._asdict() for score in scores}
        confusions = {name: row.pop("confusion_P3") for name, row in rows.items()}
        results = Results("logistic", *described, protocol, rows)
        save_results(args.output_dir, results, confusions, datasets[0].classes)


if __name__ == "__main__":
    launch.run_script(partial(main, ARGS))
