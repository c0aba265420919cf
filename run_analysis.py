"""Look into a frozen network: attention, correspondences, entropy, features, and a report of a run.

    python run_analysis.py --arch swin_tiny --pretrained_weights RUN/checkpoint.pth --image_path PHOTO --output_dir OUT \\
        --vis_attention --vis_correspondence --vis_features
    python run_analysis.py ... --data_path IMAGES --vis_entropy --measure_correspondence    # over a folder; torchrun works too
    python run_analysis.py ... --measure_stereo                                             # against ground truth
    python run_analysis.py ... --report --run_dir RUN --image_path PHOTOS                   # one HTML page

Any architecture, any image size; ResNet has no attention to show. Nothing in --output_dir is overwritten.

Origin: the pictures and measures of EsViT (Li et al., ICLR 2022) and DINO (Caron et al., ICCV 2021); flags follow microsoft/esvit.
The stereo measure and the report are this project's own.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from yacs.config import CfgNode

import data
import utils
from analysis import attention, correspondence, pictures, plots, stereo
from analysis import report as pages
from analysis.draw import save_image
from analysis.images import (
    Chosen,
    Picture,
    Scale,
    Views,
    flip_views,
    load_pictures,
    plain_view,
    random_views,
    save_views,
    saved_views,
    scale_of,
)
from checkpoints import files
from checkpoints.files import unused
from config import arguments
from config.arguments import add_token_flag
from config.ranges import ABOVE_ZERO, BATCH, COUNT, MANY, PIXELS, SEED, WORKERS, integer, number
from data.transforms import augment
from data.transforms.augment import MultiCrop
from distributed import collectives, launch
from evaluation.features import frozen_backbone, network_config
from evaluation.results import save_json, write_new
from models import Backbone
from training.run_log import one_pass
from utils import UsageError, logger

LEARNING = {"ssl": "ssl", "sup": "sup", "supervised": "sup"}  # as in file names


def get_args_parser() -> argparse.ArgumentParser:
    """The command line: names and defaults of the published script, and this project's additions."""
    parser = arguments.Parser(
        "run_analysis.py", description="attention, correspondences and features of a frozen network"
    )
    add = parser.add_argument
    arguments.add_network_flags(parser)
    parser.set_defaults(patch_size=8)
    tasks = parser.add_argument_group("what to do, at least one of")
    for flag, words in {
        "vis_attention": "where a query looks, head by head",
        "vis_correspondence": "the most similar regions of two views, or of two images",
        "measure_correspondence": "how often regions find their place in the flipped image, over a folder",
        "measure_stereo": "how well regions find their place in the other picture of a stereo pair",
        "vis_entropy": "mean entropy of each head's attention, over a folder",
        "vis_features": "principal components of the region features as colors",
        "report": "one HTML page with the run's curves, scores and pictures",
    }.items():
        arguments.add_switch(tasks, f"--{flag}", words)
    arguments.add_weights_flags(parser)
    add_token_flag(parser)
    add("--learning", default="ssl", choices=list(LEARNING), help="how the network was trained, as file names tell it")
    add("--image_path", default=None, help="image, or folder of images of which some are taken; default: --data_path")
    add("--image_path2", default=None, help="second image for --vis_correspondence; default: two views of the first")
    add("--num_images", type=COUNT, default=4, help="how many images of a folder are looked at")
    add("--image_size", type=PIXELS, default=None, help="shorter side in pixels; default: that of MODEL.IMAGE_SIZE")
    add("--query", type=number(0, MANY), nargs=2, metavar=("X", "Y"), default=None,
        help="pixel of the image whose region looks; default: the class token where there is one, else the center")  # fmt: skip
    add(
        "--block",
        type=integer(-1000, 1000),
        default=-1,
        help="block to look at, counted from the first (0) or from the last (-1)",
    )
    add("--threshold", type=ABOVE_ZERO, default=0.6, help="share of the attention that masks keep")
    arguments.add_switch(
        parser, "--use_saved_aug", "take the views that an earlier --vis_correspondence saved in --output_dir"
    )
    add("--output_dir", default=".", help="folder for pictures and figures")
    add("--run_dir", default=None, help="folder of the training run for --report; default: --output_dir")
    add("--seed", type=SEED, default=8, help="of views, and of random weights")
    add("--batch_size_per_gpu", type=BATCH, default=32, help="images per process")
    add("--num_workers", type=WORKERS, default=10, help="loader processes, at most one a core")
    add("--data_path", default="", help="folder of images for what is measured over many")
    arguments.add_layout_flags(parser)
    arguments.add_launch_flags(parser)
    add("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    return parser


class Lab(NamedTuple):
    """What every task works with."""

    backbone: Backbone
    config: CfgNode
    scale: Scale
    device: torch.device
    folder: Path
    args: argparse.Namespace

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        return int(self.config.MODEL.SPEC.IN_CHANS)

    @property
    def tokens(self) -> list[str]:
        """The class tokens that attention is seen from, one after the other."""
        return ["cls", "cls+"] if self.args.token == "both" else [self.args.token]

    @property
    def block(self) -> int:
        """The block that --block means, counted from the first."""
        return attention.find_block(self.backbone, self.args.block)

    def output(self, name: str) -> Path:
        """Where a result goes, with network and learning in its name."""
        return self.folder / f"{self.args.arch}_{LEARNING[self.args.learning]}_{name}"

    def layout(self, path: str) -> str:
        """How a folder of images holds them, as the flags say."""
        return data.layout_of(self.args, path)

    def pictures(self) -> Chosen:
        """The images to look at.

        Raises:
            UsageError: one cannot be read.
        """
        path = self.args.image_path or self.args.data_path
        return self.load(path)

    def load(self, path: str) -> Chosen:
        """The images to look at of a file or folder.

        Raises:
            UsageError: see `load_pictures`.
        """
        return load_pictures(
            path, self.args.num_images, self.scale, self.in_chans, self.layout(path), self.config.INPUT.RANGE
        )


# --------------------------------------------------------------------------- pictures of single images


def vis_attention(lab: Lab) -> None:
    """An overview, its figures and the single pictures of every image."""
    block = lab.block
    for picture in lab.pictures().some:
        for token in lab.tokens:
            drawing, single = attention_of(lab, picture, block, token)
            what = "attention" if token == "cls" else f"attention_{token}"
            save_drawing(lab, drawing, f"{picture.name}_{what}")
            with files.disk_errors(lab.folder):
                folder = unused(lab.output(f"{picture.name}_{what}_heads"))
                folder.mkdir()
                for name, image in single.items():
                    image.save(folder / name)


def save_drawing(lab: Lab, drawing: pictures.Drawing, name: str) -> None:
    """The drawing as one picture, and the figures behind it, if any, as JSON."""
    with files.disk_errors(lab.folder):
        _say(save_image(pictures.on_one_page(drawing), lab.output(f"{name}.png")))
    if drawing.record:
        save_record(lab, drawing.record, lab.output(f"{name}.json"))


def save_record(lab: Lab, record: Mapping[str, Any], path: Path) -> None:
    """The figures of a task as JSON."""
    with files.disk_errors(lab.folder):
        _say(save_json(record, path))


def attention_of(lab: Lab, picture: Picture, block: int, token: str) -> tuple[pictures.Drawing, dict[str, Image.Image]]:
    """Attention of one block on one image, as the flags ask for it, seen from a class token where there is no --query."""
    lab.backbone.choose_token(token)
    query = tuple(lab.args.query) if lab.args.query else None
    found = pictures.attention_drawing(lab.backbone, picture, lab.scale, block, lab.args.threshold, query, lab.device)
    lab.backbone.choose_token(lab.tokens[0])  # which other drawings go by
    return found


def vis_correspondence(lab: Lab) -> None:
    """The best pairs of two views of every image, or of two images."""
    found = lab.pictures().some
    views = two_images(lab, found) if lab.args.image_path2 else {p.name: views_of(lab, p) for p in found}
    for name, both in views.items():
        drawing = pictures.correspondence_drawing(lab.backbone, both, lab.scale, lab.device)
        cosines = " ".join(f"{pair['cosine']:.3f}" for pair in drawing.record["pairs"])
        print(f"{name}: cosines {cosines}")
        save_drawing(lab, drawing, f"{name}_correspondence")


def two_images(lab: Lab, found: Sequence[Picture]) -> dict[str, Views]:
    """The image of --image_path and that of --image_path2.

    Raises:
        UsageError: more than one of either, or one that cannot be read.
    """
    path2 = lab.args.image_path2
    second = lab.load(path2).some
    for flag, several in (("--image_path", found), ("--image_path2", second)):
        if len(several) > 1:
            raise UsageError(
                f"{flag} names {len(several)} images, and --image_path2 compares one with one; name a file"
            )
    first, other = found[0], second[0]
    return {f"{first.name}_{other.name}": Views(first.pixels_CHW, other.pixels_CHW, "two images")}


def views_of(lab: Lab, picture: Picture) -> Views:
    """Two views: the saved ones with --use_saved_aug, else new ones, which are saved.

    Raises:
        UsageError: none of this picture were saved.
    """
    path = lab.folder / f"views_{picture.name}.pth"
    if lab.args.use_saved_aug:
        return saved_views(path, picture, lab.in_chans)
    views = random_views(picture, lab.args.seed)
    with files.disk_errors(lab.folder):
        write_new(path, lambda place: save_views(views, place))
    return views


def vis_features(lab: Lab) -> None:
    """Principal components of every image's regions."""
    for picture in lab.pictures().some:
        drawing = pictures.features_drawing(lab.backbone, picture, lab.scale, lab.device)
        save_drawing(lab, drawing, f"{picture.name}_features")


# --------------------------------------------------------------------------- measures over a folder


@torch.no_grad()
def sum_over_folder(lab: Lab, label: str, transform: MultiCrop, measure: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """The sum of what `measure` gives for each batch's views, over the whole folder and all processes.

    Raises:
        UsageError: no images, or more than 1 % of them cannot be read.
    """
    path = lab.args.data_path or lab.args.image_path
    with collectives.failing_together():
        layout, value_range = lab.layout(path), lab.config.INPUT.RANGE
        dataset = data.build_dataset(
            path, "val", transform, lab.in_chans, lab.args.seed, layout=layout, value_range=value_range
        )
    collectives.must_agree("numbers of images", len(dataset))
    loader = data.build_eval_loader(
        dataset, lab.args.batch_size_per_gpu, lab.args.num_workers, pin_memory=lab.device.type == "cuda"
    )
    total: Tensor | None = None
    failures: list[str] = []
    incomplete = False
    with one_pass(loader, label) as batches:
        for batch in batches:
            failures += batch.failures
            incomplete = incomplete or not batch.views
            if incomplete:
                break
            sums = measure([view.to(lab.device, non_blocking=True) for view in batch.views])
            total = sums if total is None else total + sums
    data.FailureTally(len(dataset)).exchange(failures, lab.device, incomplete)
    width = max(collectives.all_gather_objects(0 if total is None else len(total)))  # a process may have no image
    total = torch.zeros(width) if total is None else total
    return collectives.all_reduce_sum(total.float().to(lab.device)).double().cpu()


def measure_correspondence(lab: Lab) -> None:
    """The published measure over a folder, to `correspondence.json`."""
    size = lab.scale.size_for(*lab.config.MODEL.IMAGE_SIZE)

    def measure(views: list[Tensor]) -> Tensor:
        first, second = (correspondence.region_features(lab.backbone, view) for view in views)
        return correspondence.flip_sums(first, second, size, pictures.PAIRS)

    transform = flip_views(size, lab.in_chans, lab.scale.mean, lab.scale.std)
    score = correspondence.flip_score(sum_over_folder(lab, "correspondence", transform, measure).tolist())
    if collectives.is_main_process():
        print(
            f"correspondence under a flip, {utils.counted(score.images, 'image')}: accuracy {score.accuracy:.2f} %, "
            f"distance error {score.distance:.2f} pixels"
        )
        save_record(lab, score._asdict() | {"image_size": list(size)}, lab.folder / "correspondence.json")


def uniform_bits(lab: Lab) -> list[list[float]]:
    """For each block and head the entropy of attention that is spread evenly, on images that are cut to one size.

    Raises:
        UsageError: a network without attention.
    """
    attention.check_attention(lab.backbone)
    size = lab.scale.size_for(*lab.config.MODEL.IMAGE_SIZE)
    return attention.uniform_bits(lab.backbone, torch.zeros(1, lab.in_chans, *size, device=lab.device))


def mean_entropies(lab: Lab, heads: Sequence[int]) -> list[list[float]]:
    """For each block, of so many heads, the mean entropy of each head, in bits, over a folder."""
    size = lab.scale.size_for(*lab.config.MODEL.IMAGE_SIZE)

    def measure(views: list[Tensor]) -> Tensor:
        counted = torch.ones(len(views[0]), 1, device=views[0].device)
        return torch.cat([*attention.entropies(lab.backbone, views[0]), counted], dim=1).sum(dim=0).cpu()

    sums = sum_over_folder(lab, "entropy", plain_view(size, lab.scale.mean, lab.scale.std), measure)
    means = sums[:-1] / sums[-1]
    return [part.tolist() for part in means.split(list(heads))]


def vis_entropy(lab: Lab) -> None:
    """Entropy by layer and head, as a plot and as JSON."""
    by_head = uniform_bits(lab)
    values = mean_entropies(lab, [len(heads) for heads in by_head])
    if collectives.is_main_process():
        uniform = [heads[0] for heads in by_head]
        print("entropy of attention by block, in bits:", " ".join(f"{sum(heads) / len(heads):.3f}" for heads in values))
        png = plots.as_png(plots.entropy_plot(values, uniform, lab.backbone.stage_depths))
        with files.disk_errors(lab.folder):
            _say(write_new(lab.output("entropy.png"), lambda place: place.write_bytes(png)))
        record = {"bits_by_block_and_head": values, "bits_of_uniform_attention": uniform}
        save_record(lab, record, lab.output("entropy.json"))


# --------------------------------------------------------------------------- stereo


def measure_stereo(lab: Lab) -> None:
    """The network beside raw pixels, the untrained network and chance, as a table and to `stereo.json`."""
    scores = stereo_scores(lab)
    print(f"{'stereo pair':<20}{'regions':>9}{'within one region':>20}{'median error':>15}")
    for name, score in scores.items():
        print(f"{name:<20}{score.regions:>9}{score.within_one:>18.2f} %{score.median_error:>12.1f} px")
    save_record(lab, {name: score._asdict() for name, score in scores.items()}, lab.folder / "stereo.json")


@torch.no_grad()
def stereo_scores(lab: Lab) -> dict[str, stereo.StereoScore]:
    """The stereo measure for all kinds of features.

    Raises:
        UsageError: a network that takes no color images.
    """
    if lab.in_chans != 3:
        raise UsageError(
            f"--measure_stereo has pictures of 3 channels, this network takes {lab.in_chans}; leave it out"
        )
    pair = stereo.load_stereo()
    scale = lab.scale if lab.args.image_size else lab.scale._replace(shorter_side=pair.left.height)
    size = scale.size_for(pair.left.height, pair.left.width)
    pair = stereo.resized(pair, size)
    left, right = (
        scale.normalized(augment.as_tensor(picture)).to(lab.device)  # at `size` already
        for picture in (pair.left, pair.right)
    )
    networks = {"network": lab.backbone}
    if lab.args.pretrained_weights:
        networks["untrained network"] = frozen_backbone(lab.args, lab.config, "", lab.device)
    found = {
        name: (correspondence.region_features(network, left), correspondence.region_features(network, right))
        for name, network in networks.items()
    }
    grid = found["network"][0].grid
    regions = {
        name: (first.regions_BTC[0].cpu(), second.regions_BTC[0].cpu()) for name, (first, second) in found.items()
    }
    regions["raw pixels"] = stereo.pixel_regions(left.cpu(), grid), stereo.pixel_regions(right.cpu(), grid)
    truth = stereo.true_places(pair.disparity_HW, grid)
    scores = {name: stereo.stereo_score(*both, truth, grid, size) for name, both in regions.items()}
    scores["chance"] = stereo.chance_score(truth, grid, size)
    return scores


# --------------------------------------------------------------------------- the report


def report(lab: Lab) -> None:
    """Everything about a run on one page, `report.html`."""
    found, of = lab.pictures()
    sections = [section for picture in found for section in picture_sections(lab, picture)]
    if lab.backbone.has_attention:
        sections.append(entropy_section(lab, found))
    run_dir = Path(lab.args.run_dir or lab.folder)
    facts = {
        "network": f"{lab.args.arch}, {sum(p.numel() for p in lab.backbone.parameters()) / 1e6:.1f}M parameters",
        "weights": f"{lab.args.pretrained_weights} ({lab.args.checkpoint_key})"
        if lab.args.pretrained_weights
        else "random",
        "learning": {"ssl": "self-supervised", "sup": "supervised"}[LEARNING[lab.args.learning]],
        "images": f"{len(found)} of {of} in {lab.args.image_path or lab.args.data_path}",
        "run": str(run_dir),
        **pages.run_facts(run_dir),
    }
    title = f"Report on {run_dir.resolve().name}"
    page = pages.build_report(title, facts, run_dir, lab.folder, sections)
    with files.disk_errors(lab.folder):  # names of files need not be UTF-8
        _say(write_new(lab.folder / "report.html", lambda place: place.write_text(page, "utf-8", "backslashreplace")))


def picture_sections(lab: Lab, picture: Picture) -> Iterator[pages.Section]:
    """What the report shows of one image."""
    drawings = {}
    for token in lab.tokens if lab.backbone.has_attention else ():
        heading = "Attention" if token == "cls" else f"Attention of {token}"
        drawings[heading], _ = attention_of(lab, picture, lab.block, token)
    views = random_views(picture, lab.args.seed)
    drawings["Correspondence of two views"] = pictures.correspondence_drawing(
        lab.backbone, views, lab.scale, lab.device
    )
    drawings["Region features"] = pictures.features_drawing(lab.backbone, picture, lab.scale, lab.device)
    for heading, drawing in drawings.items():
        words = f"{drawing.about[:1].upper()}{drawing.about[1:]}."
        yield pages.Section(f"{heading}: {picture.name}", words, [pages.photo(*panel) for panel in drawing.panels])


def entropy_section(lab: Lab, found: Sequence[Picture]) -> pages.Section:
    """Mean entropy of the heads over the images of the report."""
    images = torch.cat([center_view(lab, picture) for picture in found]).to(lab.device)
    values = [bits_BH.mean(dim=0).tolist() for bits_BH in attention.entropies(lab.backbone, images)]
    uniform = [heads[0] for heads in uniform_bits(lab)]
    drawn = plots.entropy_plot(values, uniform, lab.backbone.stage_depths)
    words = (
        "How widely heads look, by layer: 0 bits are one region, the dashed line is all that a head can see, evenly."
    )
    shown = "of the image" if len(found) == 1 else f"mean over the {len(found)} images"
    return pages.Section("Entropy of attention", words, [pages.plot(drawn, f"{shown} above")])


def center_view(lab: Lab, picture: Picture) -> Tensor:
    """(1, C, H, W) of the size that all images can have."""
    transform = plain_view(lab.scale.size_for(*lab.config.MODEL.IMAGE_SIZE), lab.scale.mean, lab.scale.std)
    return transform(picture.pixels_CHW)[0].unsqueeze(0)


def _say(path: Path) -> None:
    logger.info("wrote %s", path)


# --------------------------------------------------------------------------- the script

# Measures over a folder share it among processes; the other tasks are the main process's.
SHARED: dict[str, Callable[[Lab], None]] = {
    "vis_entropy": vis_entropy,
    "measure_correspondence": measure_correspondence,
}
ALONE: dict[str, Callable[[Lab], None]] = {
    "vis_attention": vis_attention,
    "vis_correspondence": vis_correspondence,
    "vis_features": vis_features,
    "measure_stereo": measure_stereo,
    "report": report,  # last: it shows the scores of the others
}


def check_args(args: argparse.Namespace) -> None:
    """Stop on values that no task can use.

    Raises:
        UsageError: naming the flag.
    """
    tasks = SHARED | ALONE
    if not any(getattr(args, task) for task in tasks):
        raise UsageError(f"nothing to do; pass at least one of {' '.join('--' + task for task in tasks)}")
    arguments.check_weights(args)
    if args.use_saved_aug and args.image_path2:
        raise UsageError("--use_saved_aug takes views of one image, --image_path2 a second one; leave one of them out")
    if args.query and args.token != "cls":
        raise UsageError(f"--query looks from a region, --token {args.token} from a class token; leave one of them out")
    if args.run_dir and not os.path.isdir(args.run_dir):
        raise UsageError(f"--run_dir {args.run_dir} is no folder; name the folder of a training run")
    images = args.image_path or args.data_path
    if not images and any(getattr(args, task) for task in SHARED):
        raise UsageError("no folder of images is named; pass --data_path FOLDER")
    if not images and any(getattr(args, task) for task in ALONE if task != "measure_stereo"):
        raise UsageError("no image is named; pass --image_path FILE or FOLDER, or --data_path FOLDER")


def open_lab(args: argparse.Namespace, device: torch.device) -> Lab:
    """Load the network and see at which scale it looks."""
    config = network_config(args)
    augment.check_normalization(config.INPUT.MEAN, config.INPUT.STD, config.MODEL.SPEC.IN_CHANS)
    backbone = frozen_backbone(args, config, args.pretrained_weights, device)
    if args.token == "both":
        backbone.choose_token("cls")  # and the other in its turn, see `Lab.tokens`
    scale = scale_of(backbone, config, args.image_size, device)
    return Lab(backbone, config, scale, device, files.make_output_dir(args.output_dir), args)


def main(args: argparse.Namespace) -> None:
    """Do what was asked for, one task after the other."""
    device = launch.init_processes(args)
    collectives.setup_logging()
    with collectives.failing_together():
        check_args(args)
        lab = open_lab(args, device)
    tasks = SHARED | (ALONE if collectives.is_main_process() else {})
    failures = [failure for name, task in tasks.items() if getattr(args, name) and (failure := run_task(task, lab))]
    if failures:
        raise UsageError("; ".join(dict.fromkeys(failures)))


def run_task(task: Callable[[Lab], None], lab: Lab) -> str:
    """Do one task; what keeps it from writing its files is returned, so that others still tell what they find."""
    try:
        task(lab)
    except files.DiskError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    launch.run_script(lambda: main(get_args_parser().parse_args()))
