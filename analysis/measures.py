"""Measures over a folder of images, on any number of processes, and the stereo measure of a network and its baselines."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import data
from analysis import attention, correspondence, pictures, stereo
from analysis.context import AnalysisContext
from analysis.images import flip_views, plain_view
from data.transforms import augment
from data.transforms.augment import MultiCrop
from distributed import collectives
from evaluation.features import NETWORK, PIXELS, UNTRAINED, frozen_backbone, readable_batches
from training.run_log import tracked
from utils import UsageError


@torch.no_grad()
def sum_over_folder(
    context: AnalysisContext, label: str, transform: MultiCrop, measure: Callable[[list[Tensor]], Tensor]
) -> Tensor:
    """Return the sum of `measure(views)` over all batches of the folder and all processes.

    Raises:
        UsageError: no images, or more than 1 % of them cannot be read.
    """
    args, path = context.args, context.args.data_path or context.args.image_path
    with collectives.failing_together():
        layout, value_range = data.layout_of(args, path), context.config.INPUT.RANGE
        dataset = data.build_dataset(
            path, "val", transform, context.in_chans, args.seed, layout=layout, value_range=value_range
        )
    collectives.must_agree("numbers of images", len(dataset))
    pin_memory = context.device.type == "cuda"
    loader = data.build_eval_loader(dataset, args.batch_size_per_gpu, args.num_workers, pin_memory)
    total: Tensor | None = None
    with tracked(loader, label) as batches:
        for batch in readable_batches(batches, data.FailureTally(len(dataset)), context.device):
            sums = measure([view.to(context.device, non_blocking=True) for view in batch.views])
            total = sums if total is None else total + sums
    width = max(collectives.all_gather_objects(0 if total is None else len(total)))  # a process may have no image
    total = torch.zeros(width) if total is None else total
    return collectives.all_reduce_sum(total.float().to(context.device)).double().cpu()


def flip_correspondence(context: AnalysisContext) -> correspondence.FlipScore:
    """Match the regions of each image with those of its flipped and recolored copy."""
    size = context.image_size

    def measure(views: list[Tensor]) -> Tensor:
        first, second = (correspondence.region_features(context.backbone, view) for view in views)
        return correspondence.flip_sums(first, second, size, pictures.PAIRS)

    transform = flip_views(size, context.in_chans, context.scale.mean, context.scale.std)
    return correspondence.flip_score(sum_over_folder(context, "correspondence", transform, measure).tolist())


def uniform_entropies(context: AnalysisContext) -> list[list[float]]:
    """Return the entropy of uniform attention by block and head, in bits.

    Raises:
        UsageError: the network has no attention.
    """
    attention.check_attention(context.backbone)
    blank = torch.zeros(1, context.in_chans, *context.image_size, device=context.device)
    return attention.uniform_entropies(context.backbone, blank)


def mean_entropies(context: AnalysisContext, heads: Sequence[int]) -> list[list[float]]:
    """Return the mean entropy of attention over a folder by block and head, in bits; `heads` has the heads of each block."""

    def measure(views: list[Tensor]) -> Tensor:
        count = torch.ones(len(views[0]), 1, device=views[0].device)
        return torch.cat([*attention.entropies(context.backbone, views[0]), count], dim=1).sum(dim=0).cpu()

    transform = plain_view(context.image_size, context.scale.mean, context.scale.std)
    sums = sum_over_folder(context, "entropy", transform, measure)
    means = sums[:-1] / sums[-1]
    return [part.tolist() for part in means.split(list(heads))]


@torch.no_grad()
def stereo_scores(context: AnalysisContext) -> tuple[dict[str, stereo.StereoScore], tuple[int, int]]:
    """Return the stereo score of the network, the untrained network, raw pixels and chance, and the size of the pictures.

    Raises:
        UsageError: the network takes no RGB images.
    """
    if context.in_chans != 3:
        raise UsageError(
            f"--measure_stereo has pictures of 3 channels, this network takes {context.in_chans}; leave it out"
        )
    pair = stereo.load_stereo()
    height, width = pair.left.height, pair.left.width
    scale = context.scale if context.args.image_size else context.scale._replace(shorter_side=height)
    size = scale.size_for(height, width)
    pair = stereo.resized(pair, size)
    left, right = (
        scale.normalized(augment.as_tensor(picture)).to(context.device) for picture in (pair.left, pair.right)
    )
    networks = {NETWORK: context.backbone}
    if context.args.pretrained_weights:
        networks[UNTRAINED] = frozen_backbone(context.args, context.config, "", context.device)
    features = {
        name: [correspondence.region_features(network, image) for image in (left, right)]
        for name, network in networks.items()
    }
    grid = features[NETWORK][0].grid
    regions = {name: [side.regions_BTC[0].cpu() for side in sides] for name, sides in features.items()}
    regions[PIXELS] = [stereo.pixel_regions(image.cpu(), grid) for image in (left, right)]
    truth = stereo.true_positions(pair.disparity_HW, grid)
    scores = {name: stereo.stereo_score(first, second, truth, grid, size) for name, (first, second) in regions.items()}
    return scores | {"chance": stereo.chance_score(truth, grid, size)}, size
