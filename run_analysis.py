"""Visualize a frozen network: attention, correspondences, entropy, region features, and a report on a run.

    python run_analysis.py --pretrained_weights RUN/checkpoint.pth --image_path PHOTO --output_dir OUT \\
        --vis_attention --vis_correspondence --vis_features
    python run_analysis.py ... --data_path IMAGES --vis_entropy --measure_correspondence    # over a folder; torchrun works too
    python run_analysis.py ... --measure_stereo                                             # with ground truth
    python run_analysis.py ... --report --run_dir RUN --image_path PHOTOS                   # one HTML page

Works for every architecture (ResNet has no attention) and image size. Existing pictures are not overwritten: new ones get a number.
Scores are saved as `results/correspondence.json` and `results/stereo.json`. docs/evaluation.md has the details.

Origin: the pictures and measures of EsViT (Li et al., ICLR 2022) and DINO (Caron et al., ICCV 2021); flags follow microsoft/esvit.
"""

from __future__ import annotations

from config.arguments.run_analysis import LEARNING
from config.arguments.run_analysis import get_args_parser as get_args_parser

if __name__ == "__main__":  # --help and usage errors are answered before torch is imported
    ARGS = get_args_parser().parse_command_line()

import argparse
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import utils
from analysis import attention, measures, pictures, plots
from analysis import report as pages
from analysis.context import AnalysisContext, build_context
from analysis.images import Picture, Views, plain_view, random_views, save_views, saved_views
from analysis.output import save_image, save_json, write_new
from checkpoints import files
from checkpoints.files import unused
from config import arguments
from distributed import collectives, launch
from evaluation.results import Results, describe_network, save_results
from utils import UsageError

# --------------------------------------------------------------------------- pictures of single images


def vis_attention(context: AnalysisContext) -> None:
    """Draw the attention of a block for each image: an overview, its numbers as JSON, and a folder of single pictures."""
    block = context.block
    for picture in context.load_pictures(context.image_path).pictures:
        for token in context.tokens:
            drawing, single = draw_attention(context, picture, block, token)
            name = f"{picture.name}_attention" if token == "cls" else f"{picture.name}_attention_{token}"
            save_drawing(context, drawing, name)
            with files.disk_errors(context.output_dir):
                folder = unused(context.output_path(f"{name}_heads"))
                folder.mkdir()
                for file, image in single.items():
                    image.save(folder / file)


def save_drawing(context: AnalysisContext, drawing: pictures.Drawing, name: str) -> None:
    """Save a drawing as a picture, and its numbers, if any, as JSON."""
    save_image(pictures.on_one_page(drawing), context.output_path(f"{name}.png"))
    if drawing.record:
        save_json(drawing.record, context.output_path(f"{name}.json"))


def draw_attention(
    context: AnalysisContext, picture: Picture, block: int, token: str
) -> tuple[pictures.Drawing, dict[str, Image.Image]]:
    """Draw the attention of a class token, or of the region of --query."""
    args = context.args
    query = tuple(args.query) if args.query else None
    context.backbone.choose_token(token)
    drawing = pictures.attention_drawing(
        context.backbone, picture, context.scale, block, args.threshold, query, context.device
    )
    context.backbone.choose_token(context.tokens[0])
    return drawing


def vis_correspondence(context: AnalysisContext) -> None:
    """Draw the most similar regions of two views of each image, or of two images."""
    found = context.load_pictures(context.image_path).pictures
    pairs = two_images(context, found) if context.args.image_path2 else {p.name: views_of(context, p) for p in found}
    for name, views in pairs.items():
        drawing = pictures.correspondence_drawing(context.backbone, views, context.scale, context.device)
        cosines = " ".join(f"{pair['cosine']:.3f}" for pair in drawing.record["pairs"])
        print(f"{name}: cosines {cosines}")
        save_drawing(context, drawing, f"{name}_correspondence")


def two_images(context: AnalysisContext, found: Sequence[Picture]) -> dict[str, Views]:
    """Return the images of --image_path and --image_path2 as two views.

    Raises:
        UsageError: one of the flags names several images, or an image cannot be read.
    """
    second = context.load_pictures(context.args.image_path2).pictures
    for flag, several in (("--image_path", found), ("--image_path2", second)):
        if len(several) > 1:
            raise UsageError(f"{flag} names {len(several)} images, --image_path2 compares one with one; name a file")
    first, other = found[0], second[0]
    return {f"{first.name}_{other.name}": Views(first.pixels_CHW, other.pixels_CHW, "two images")}


def views_of(context: AnalysisContext, picture: Picture) -> Views:
    """Return two views of a picture: saved ones with --use_saved_aug, else new ones, which are saved.

    Raises:
        UsageError: no views of this picture are saved.
    """
    path = context.output_dir / f"views_{picture.name}.pth"
    if context.args.use_saved_aug:
        return saved_views(path, picture, context.in_chans)
    views = random_views(picture, context.args.seed)
    write_new(path, lambda temporary: save_views(views, temporary))
    return views


def vis_features(context: AnalysisContext) -> None:
    """Draw the principal components of the region features of each image."""
    for picture in context.load_pictures(context.image_path).pictures:
        drawing = pictures.features_drawing(context.backbone, picture, context.scale, context.device)
        save_drawing(context, drawing, f"{picture.name}_features")


# --------------------------------------------------------------------------- measures


def measure_correspondence(context: AnalysisContext) -> None:
    """Measure the published correspondence under a flip over a folder."""
    score = measures.flip_correspondence(context)
    if collectives.is_main_process():
        print(
            f"correspondence under a flip, {utils.counted(score.images, 'image')}: accuracy {score.accuracy:.2f} %, "
            f"distance error {score.distance:.2f} pixels"
        )
        described = {"data_path": context.args.data_path or context.args.image_path, "val_images": score.images}
        protocol = {"image_size": list(context.image_size), "pairs": pictures.PAIRS}
        scores = {"network": {"accuracy": score.accuracy, "distance": score.distance}}
        results = Results("correspondence", describe_network(context.args), described, protocol, scores)
        save_results(context.output_dir, results)


def vis_entropy(context: AnalysisContext) -> None:
    """Plot the entropy of attention by block and head, and save the numbers as JSON."""
    by_head = measures.uniform_entropies(context)
    values = measures.mean_entropies(context, [len(heads) for heads in by_head])
    if collectives.is_main_process():
        uniform = [heads[0] for heads in by_head]
        print("entropy of attention by block, in bits:", " ".join(f"{sum(heads) / len(heads):.3f}" for heads in values))
        png = plots.as_png(plots.entropy_plot(values, uniform, context.backbone.stage_depths))
        write_new(context.output_path("entropy.png"), lambda temporary: temporary.write_bytes(png))
        record = {"bits_by_block_and_head": values, "bits_of_uniform_attention": uniform}
        save_json(record, context.output_path("entropy.json"))


def measure_stereo(context: AnalysisContext) -> None:
    """Measure correspondence in a stereo pair, beside raw pixels, the untrained network and chance."""
    scores, size = measures.stereo_scores(context)
    print(f"{'stereo pair':<20}{'regions':>9}{'within one region':>20}{'median error':>15}")
    for name, score in scores.items():
        print(f"{name:<20}{score.regions:>9}{score.within_one:>18.2f} %{score.median_error:>12.1f} px")
    described = {"data_path": "motorcycle pair of scikit-image"}
    rows = {name: score._asdict() for name, score in scores.items()}
    results = Results("stereo", describe_network(context.args), described, {"image_size": list(size)}, rows)
    save_results(context.output_dir, results)


# --------------------------------------------------------------------------- the report


def report(context: AnalysisContext) -> None:
    """Write `report.html` on a run: curves, scores and pictures."""
    args, backbone = context.args, context.backbone
    found, total = context.load_pictures(context.image_path)
    sections = [section for picture in found for section in picture_sections(context, picture)]
    if backbone.has_attention:
        sections.append(entropy_section(context, found))
    run_dir = Path(args.run_dir or context.output_dir)
    facts = {
        "network": f"{args.arch}, {sum(p.numel() for p in backbone.parameters()) / 1e6:.1f}M parameters",
        "weights": f"{args.pretrained_weights} ({args.checkpoint_key})" if args.pretrained_weights else "random",
        "learning": {"ssl": "self-supervised", "sup": "supervised"}[LEARNING[args.learning]],
        "images": f"{len(found)} of {total} in {context.image_path}",
        "run": str(run_dir),
        **pages.run_facts(run_dir),
    }
    title = f"Report on {run_dir.resolve().name}"
    page = pages.build_report(title, facts, run_dir, context.output_dir, sections)
    # Names of files need not be UTF-8.
    write_new(context.output_dir / "report.html", lambda path: path.write_text(page, "utf-8", "backslashreplace"))


def picture_sections(context: AnalysisContext, picture: Picture) -> Iterator[pages.Section]:
    """Yield the sections of the report on one image."""
    backbone, scale, device = context.backbone, context.scale, context.device
    drawings = {}
    for token in context.tokens if backbone.has_attention else ():
        heading = "Attention" if token == "cls" else f"Attention of {token}"
        drawings[heading], _ = draw_attention(context, picture, context.block, token)
    views = random_views(picture, context.args.seed)
    drawings["Correspondence of two views"] = pictures.correspondence_drawing(backbone, views, scale, device)
    drawings["Region features"] = pictures.features_drawing(backbone, picture, scale, device)
    for heading, drawing in drawings.items():
        words = f"{drawing.about[:1].upper()}{drawing.about[1:]}."
        panels = [pages.photo(*panel) for panel in drawing.panels]
        bar = pages.photo(*drawing.scale) if drawing.scale else None
        yield pages.Section(f"{heading}: {picture.name}", words, panels, bar)


def entropy_section(context: AnalysisContext, found: Sequence[Picture]) -> pages.Section:
    """Return the section on the mean entropy of attention over the images of the report."""
    images = torch.cat([center_view(context, picture) for picture in found]).to(context.device)
    values = [bits_BH.mean(dim=0).tolist() for bits_BH in attention.entropies(context.backbone, images)]
    uniform = [heads[0] for heads in measures.uniform_entropies(context)]
    drawn = plots.entropy_plot(values, uniform, context.backbone.stage_depths)
    words = "Entropy of the attention of each head by layer. 0 bits: one region; dashed line: uniform attention."
    images_shown = "the image" if len(found) == 1 else f"mean over the {len(found)} images"
    return pages.Section("Entropy of attention", words, [pages.plot(drawn, f"{images_shown} above")])


def center_view(context: AnalysisContext, picture: Picture) -> Tensor:
    """Return the center crop (1, C, H, W) of a picture, of the same size for all pictures."""
    transform = plain_view(context.image_size, context.scale.mean, context.scale.std)
    return transform(picture.pixels_CHW)[0].unsqueeze(0)


# --------------------------------------------------------------------------- the script

Task = Callable[[AnalysisContext], None]
ALL_PROCESSES: dict[str, Task] = {"vis_entropy": vis_entropy, "measure_correspondence": measure_correspondence}
MAIN_PROCESS: dict[str, Task] = {
    "vis_attention": vis_attention,
    "vis_correspondence": vis_correspondence,
    "vis_features": vis_features,
    "measure_stereo": measure_stereo,
    "report": report,  # last: it shows the scores of the other tasks
}


def check_args(args: argparse.Namespace) -> None:
    """Raise UsageError for flags that no task can use."""
    tasks = ALL_PROCESSES | MAIN_PROCESS
    if not any(getattr(args, task) for task in tasks):
        raise UsageError(f"nothing to do; pass at least one of {' '.join('--' + task for task in tasks)}")
    arguments.check_weights(args)
    if args.use_saved_aug and args.image_path2:
        raise UsageError("--use_saved_aug and --image_path2 exclude each other; leave out one of them")
    if args.query and args.token != "cls":
        raise UsageError(f"--query and --token {args.token} exclude each other; leave out one of them")
    if args.run_dir and not os.path.isdir(args.run_dir):
        raise UsageError(f"--run_dir {args.run_dir} is not a folder; name the folder of a training run")
    images = args.image_path or args.data_path
    if not images and any(getattr(args, task) for task in ALL_PROCESSES):
        raise UsageError("no folder of images is named; pass --data_path FOLDER")
    if not images and any(getattr(args, task) for task in MAIN_PROCESS if task != "measure_stereo"):
        raise UsageError("no image is named; pass --image_path FILE or FOLDER, or --data_path FOLDER")


def run_tasks(tasks: Mapping[str, Task], context: AnalysisContext) -> list[str]:
    """Run the tasks that the flags name, each also if an earlier one could not write its files; return these failures."""
    failures = []
    for name, task in tasks.items():
        if getattr(context.args, name):
            try:
                task(context)
            except files.DiskError as error:
                failures.append(str(error))
    return failures


def main(args: argparse.Namespace) -> None:
    """Run the tasks that the flags name."""
    device = launch.init_processes(args)
    utils.setup_logging(collectives.is_main_process())
    with collectives.failing_together():
        check_args(args)
        context = build_context(args, device)
    failures = run_tasks(ALL_PROCESSES, context)
    if collectives.is_main_process():
        failures += run_tasks(MAIN_PROCESS, context)
    if failures:
        raise UsageError("; ".join(dict.fromkeys(failures)))


if __name__ == "__main__":
    launch.run_script(partial(main, ARGS))
