"""Score frozen features with multinomial logistic regression, as for few labels (1 or 10 % of ImageNet).

    python eval_logistic.py --arch swin_tiny --data_path IMAGENET --pretrained_weights OUT/checkpoint.pth \\
        --target_list_path 1percent.txt --output_dir OUT/logistic
    torchrun --nproc_per_node=8 eval_logistic.py ...                             # features in parallel, one process fits

--data_path holds train/<class>/ and val/<class>/. Features of center crops, scaled to length 1, are computed once; for each value
of --lr_lambd the whole problem is solved, without intercept:

    mean over the training images of the cross-entropy  +  lambda / 2 * squared norm of the weights

where lambda is the value of the flag, divided by the number of training images unless --adjust_lambd is off. All values are
reported, in `results.json` too; choosing the best of them on the validation images is a little optimistic.

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
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import data
import utils
from config import arguments
from data.layouts.lists import digest_of
from data.transforms import augment
from distributed import collectives, launch
from evaluation.features import (
    FeatureFunction,
    LabeledFeatures,
    evaluation_size,
    extract_features,
    frozen_backbone,
    labeled_datasets,
    network_config,
    tell_avgpool,
)
from evaluation.results import add_results, claim_folder
from models import Backbone
from utils import UsageError, logger

EVALUATION = "logistic regression"  # how results.json tells whose it is
TOLERANCE = 1e-5  # largest entry of the gradient at the end


class Score(NamedTuple):
    """What one value of --lr_lambd gives; accuracies in percent, `top5` of as many classes as there are when these are fewer."""

    lambd: float
    top1: float
    top5: float
    iterations: int
    converged: bool


def feature_function(backbone: Backbone, n_last_blocks: int, pooled: int) -> FeatureFunction:
    """Images to features; `pooled` is the place in `POOLED`."""

    def function(images_BCHW: Tensor) -> Tensor:
        if pooled == 1:
            return backbone.forward_features(images_BCHW).regions_BTC.mean(dim=1)
        return backbone.forward_return_n_last_blocks(images_BCHW, n_last_blocks, return_patch_avgpool=pooled == 2)

    return function


def solve(train: LabeledFeatures, val: LabeledFeatures, lambd: float, adjust: bool, iterations: int) -> Score:
    """Fit one value and score it.

    scikit-learn minimizes C * sum of cross-entropies + squared norm / 2: C is 1 / (images * lambda). For two classes it has one row
    of weights, the difference of two whose squared norms are half of its own: C is twice that.
    """
    inverse = 1 / lambd if adjust else 1 / (len(train.labels_N) * lambd)
    if len(train.labels_N.unique()) == 2:
        inverse *= 2
    model = LogisticRegression(C=inverse, fit_intercept=False, tol=TOLERANCE, max_iter=iterations)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(train.features_NC.double().numpy(), train.labels_N.numpy())
    converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    logits_NK = torch.from_numpy(np.asarray(model.decision_function(val.features_NC.double().numpy())))
    if logits_NK.ndim == 1:  # of two classes
        logits_NK = torch.stack([-logits_NK, logits_NK], dim=1)
    labels_K = torch.from_numpy(model.classes_)
    ranked = labels_K[logits_NK.topk(min(5, len(labels_K))).indices] == val.labels_N[:, None]
    top1, top5 = (100 * hits.double().mean().item() for hits in (ranked[:, 0], ranked.any(dim=1)))
    return Score(lambd, top1, top5, int(np.max(model.n_iter_)), converged)


def extract(
    args: argparse.Namespace, device: torch.device
) -> tuple[list[LabeledFeatures], data.ImageDataset, dict[str, Any]]:
    """Features of both parts, the training images, and what the features are of.

    Raises:
        UsageError: images of one class, more blocks than the network has, or see `labeled_datasets` and `frozen_backbone`.
    """
    with collectives.failing_together():
        config = network_config(args)
        view = augment.eval_view(evaluation_size(args, config), args.crop_ratio, config.INPUT.MEAN, config.INPUT.STD)
        datasets = labeled_datasets(args, config, view, view, args.target_list_path)
        present = len(np.unique(datasets[0].labels))
        if present < 2:
            raise UsageError(f"the training images are of {present} class; logistic regression needs two or more")
        backbone = frozen_backbone(args, config, args.pretrained_weights, device)
        blocks = sum(backbone.stage_depths)
        if not 1 <= args.n_last_blocks <= blocks:
            raise UsageError(f"--n_last_blocks {args.n_last_blocks} must lie in 1..{blocks}, the blocks of {args.arch}")
    collectives.must_agree("numbers of images", [len(dataset) for dataset in datasets])
    if not args.pretrained_weights:
        logger.warning("--random_weights: the scores are those of a network with random weights")
    tell_avgpool(args.avgpool_patchtokens == 2, backbone)
    functions = {"network": feature_function(backbone, args.n_last_blocks, args.avgpool_patchtokens)}
    found = []
    for part, dataset in zip(("train", "val"), datasets):
        loader = data.build_eval_loader(dataset, args.batch_size_per_gpu, args.num_workers, device.type == "cuda")
        found.append(extract_features(loader, functions, device, torch.device("cpu"), part)["network"])
    about = {
        "arch": args.arch,
        "pretrained_weights": args.pretrained_weights,
        "checkpoint_key": args.checkpoint_key,
        "features": POOLED[args.avgpool_patchtokens],
        "token": args.token,
        "n_last_blocks": args.n_last_blocks,
        "data_path": args.data_path,
        "target_list_path": args.target_list_path,
        "digest_of_list": digest_of(args.target_list_path) if args.target_list_path else None,
        "image_size": evaluation_size(args, config),
        "crop_ratio": args.crop_ratio,
    }
    return found, datasets[0], about


def main(args: argparse.Namespace) -> None:
    """Extract features, fit every value, report."""
    device = launch.init_processes(args)
    utils.setup_logging(collectives.is_main_process())
    with collectives.failing_together():
        arguments.check_weights(args)
        if args.output_dir:
            claim_folder(args.output_dir, EVALUATION)
    (train, val), dataset, about = extract(args, device)
    if not collectives.is_main_process():
        return
    classes = len(dataset.classes)
    ranked = f"Top{min(5, classes)}"
    compared = (
        f"{len(train.labels_N)} training and {utils.counted(len(val.labels_N), 'validation image')}, {classes} classes"
    )
    print(f"logistic regression on the {about['features']}: {compared}")
    scores = []
    for lambd in args.lr_lambd:
        score = solve(train, val, lambd, args.adjust_lambd, args.epochs)
        scores.append(score)
        steps = utils.counted(score.iterations, "iteration")
        print(f"lambda {lambd}: Top1: {score.top1:.2f}, {ranked}: {score.top5:.2f} ({steps})")
        if not score.converged:
            logger.warning("lambda %s has not converged in --epochs %d; raise that", lambd, args.epochs)
    if args.output_dir:
        record = about | {
            "compared": compared,
            "adjust_lambd": args.adjust_lambd,
            "top5_is": ranked.lower(),
            "scores": [score._asdict() for score in scores],
        }
        logger.info("%s", add_results(Path(args.output_dir), EVALUATION, record))


if __name__ == "__main__":
    launch.run_script(partial(main, ARGS))
