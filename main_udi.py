"""Pre-train a vision transformer with UDI: two class tokens and sampled patches, distilled between views whose geometry is known.

    python main_udi.py --arch vit_small --data_path IMAGES --output_dir OUT      # one process
    torchrun --nproc_per_node=8 main_udi.py ...                                  # many

The second class token learns from a blend of the teacher's patches, at the places that its own view shows, and its class token.
Networks without class tokens (Swin, CvT, ViL, ResNet) learn views and patches with --number_cls_token 1: an extension, not UDI's
own. A started run in --output_dir is continued. What every method shares is in training/setup.py.

Origin: UDI (Su and Ji, ECCV 2024); flags and defaults are those of ISL-CV/udi, which the help marks where they are not.
"""

from __future__ import annotations

from config.arguments.main_udi import get_args_parser as get_args_parser

if __name__ == "__main__":  # --help and usage errors are answered before torch is imported
    ARGS = get_args_parser().parse_command_line()

import argparse
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

import data
import utils
from config import arguments
from data.transforms.udi_views import (
    Correspondence,
    Sampling,
    split_correspondence,
    udi_views,
)
from distributed import collectives, launch
from evaluation.knn_callback import build_knn_callback
from losses.distillation import TEACHER_VIEWS
from losses.udi import StudentLevels, TeacherLevels, UDILoss
from models import Backbone, build_model, load_arch_config
from models.outputs import LevelOutput
from models.registry import lookup
from models.srs import SRS, bilinear_weights, default_heads, one_hot_weights
from ops.logits import map_rows, split_rows
from training import checkpointing, engine, setup
from training.step import Method
from utils import UsageError, logger


class UDI(Method):
    """Student, teacher and loss of UDI, for the engine.

    Args:
        class_tokens: of the student that learn.
        grid_of: tokens on a side of a view, by its side in pixels.
        patches, local_patches: whether samples of the global views learn, and of the local ones.
    """

    criterion_key = "udi_loss"

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        criterion: UDILoss,
        class_tokens: int,
        grid_of: dict[int, int],
        patches: bool,
        local_patches: bool,
    ) -> None:
        self.student, self.teacher = student, teacher
        self.criterion: UDILoss = criterion
        self.class_tokens, self.grid_of = class_tokens, grid_of
        self.patches, self.local_patches = patches, local_patches
        levels = ["class token"] + ["second class token"] * (class_tokens - 1) + ["patches"] * patches
        self.tasks = " and ".join(levels)

    def images(self, views: Sequence[Tensor]) -> Sequence[Tensor]:
        """Views without their correspondences."""
        return split_correspondence(views)[0]

    def compute_loss(self, views: Sequence[Tensor], epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The teacher sees the global views, and is sampled where the student's samples lie in them."""
        crops, found = split_correspondence(views)
        sides = [crop.shape[-1] for crop in crops]
        of_teacher: list[Tensor | None] = [None] * TEACHER_VIEWS
        of_student: list[Tensor | None] = [None] * len(crops)
        if self.patches:
            of_teacher[:] = teacher_weights(found, self.grid_of[sides[0]])
            of_student = student_weights(found, sides, self.grid_of, self.local_patches)
        with torch.no_grad():
            teacher_output = self.teacher(crops[:TEACHER_VIEWS], of_teacher)
        teacher = teacher_levels(teacher_output, found)
        self.criterion.accumulate_center(teacher)
        student = student_levels(self.student(crops, of_student, self.class_tokens), found)
        terms = self.criterion.terms(student, teacher, epoch)
        if self.monitor is not None:
            tokens, patches = teacher_output.token_features, teacher_output.sample_features
            features = {"cls": tokens[:, 0], "cls+": tokens[:, -1], "patch": patches}
            self.monitor(self.criterion.monitored_levels(student, teacher, epoch, features))
        return self.criterion.total(terms), terms


def main(args: argparse.Namespace) -> None:
    """Pre-train, or resume the run in --output_dir."""
    device = launch.init_processes(args)
    utils.setup_logging(collectives.is_main_process())
    output_dir = Path(args.output_dir)
    with checkpointing.training_run(output_dir / checkpointing.CHECKPOINT):
        args.precision = utils.resolve_precision(args.precision if args.use_fp16 else "fp32", device)
        with collectives.failing_together():
            check_args(args)
            config = load_config(args)
            loader = setup.build_loader(args, config, *build_views(args, config), device)
        images = len(loader.dataset)  # type: ignore[arg-type]
        collectives.must_agree("numbers of images", images)

        utils.seed_everything(args.seed)  # the same weights on all processes
        method = build_method(args, config, device)  # student, teacher and loss
        utils.seed_everything(args.seed + collectives.get_rank())
        step = setup.build_step(args, method, len(loader), device, args.precision)  # optimizer and schedules

        image_size = setup.get_crops(args, config).global_size
        evaluate = build_knn_callback(args, config, method.teacher, method.student, image_size, device)

        position = setup.resume(args, step)
        if position.epoch >= args.epochs:
            logger.info("%s has %s already, nothing to do", output_dir, utils.counted(position.epoch, "epoch"))
            setup.log_end(args)
            return
        log = setup.open_log(args, config, setup.global_batch(args), images, position, device)
        setup.log_run(args, method, loader, device)
        config = setup.config_of(method, config)
        with checkpointing.Saver(output_dir, step, args, config) as saver, closing(log):
            finished = engine.train(step, loader, args.epochs, args.accum_iter, log, saver, position, evaluate)
    if finished:
        setup.log_end(args)
    elif saver.code:
        raise utils.Stopped(code=saver.code)


def check_args(args: argparse.Namespace) -> None:
    """Stop on values that no part of the program would refuse by itself.

    Raises:
        UsageError: naming the flag.
    """
    arguments.check_pretraining(args)
    if not args.include_patch and args.number_cls_token > 1:
        raise UsageError(
            "--include_patch off leaves the second class token nothing to learn from; pass --number_cls_token 1 too"
        )
    if not args.include_patch and args.local_patch:
        raise UsageError("--local_patch learns patches, which --include_patch off leaves out; turn one of them around")
    if args.aug_backend == "pil":
        raise UsageError("--aug_backend pil does not tell where its crops lie, which UDI needs; leave it at auto")


def load_config(args: argparse.Namespace) -> CfgNode:
    """The network's config with the class tokens of --number_cls_token, and positions resized as in the published networks.

    Raises:
        UsageError: another number of class tokens in the yaml or an override, or see `load_arch_config`.
    """
    has_tokens = "NUM_CLS_TOKENS" in lookup(args.arch).spec.defaults
    if args.number_cls_token > 1 and not has_tokens:
        raise UsageError(
            f"--number_cls_token {args.number_cls_token}: {args.arch} has no class tokens; pass --number_cls_token 1, which "
            "learns its views and patches (an extension of UDI)"
        )
    of_udi = ["MODEL.SPEC.NUM_CLS_TOKENS", str(args.number_cls_token), "MODEL.SPEC.POS_RESIZE", "scale"]
    config = load_arch_config(args.arch, args.cfg, args.opts, args.drop_path_rate, of_udi if has_tokens else ())
    given = config.MODEL.SPEC.get("NUM_CLS_TOKENS", args.number_cls_token)
    if given != args.number_cls_token:
        raise UsageError(
            f"MODEL.SPEC.NUM_CLS_TOKENS {given} and --number_cls_token {args.number_cls_token} differ; leave the key out of "
            f"yaml and overrides, or pass --number_cls_token {given}"
        )
    if config.MODEL.SPEC.IN_CHANS != 3:
        raise UsageError(f"UDI's views are of color images, MODEL.SPEC.IN_CHANS {config.MODEL.SPEC.IN_CHANS} is not 3")
    args.aug_backend = "split"
    return config


def build_views(args: argparse.Namespace, config: CfgNode) -> tuple[data.Transform, data.DeviceTransform]:
    """Crops of which workers also tell where they lie, and their colors."""
    crops = setup.get_crops(args, config)
    grid_of = token_grids(args, config)
    smallest = min(grid_of.values())
    sampling = Sampling(
        grid_of,
        args.global_sampling_window_size if args.include_patch else smallest,  # else they are not looked at
        args.local_sampling_window_size if args.include_patch else smallest,
        args.global_pair_mode,
        args.srs_align,
        args.local_reference,
        args.srs_drawing,
    )
    return udi_views(crops, config.INPUT.MEAN, config.INPUT.STD, args.color_jitter, sampling, args.flip_prob)


def token_grids(args: argparse.Namespace, config: CfgNode) -> dict[int, int]:
    """Tokens on a side of a view, by its side in pixels; the network is asked, because strides are its own affair.

    One on the meta device: shapes alone, no numbers.
    """
    crops = setup.get_crops(args, config)
    sizes = {crops.global_size, *(size for number, size in zip(crops.local_numbers, crops.local_sizes) if number)}
    with torch.device("meta"):
        network = build_model(args.arch, config, patch_size=args.patch_size)
        return {size: network.region_grid(torch.zeros(1, 3, size, size))[0] for size in sizes}


def build_network(args: argparse.Namespace, config: CfgNode, *, is_teacher: bool) -> Backbone:
    """A backbone with its head, or one a level, and what pools its patches at samples."""
    network = build_model(args.arch, config, is_teacher=is_teacher, patch_size=args.patch_size)
    head = setup.head_builder(args, network)
    levels = args.number_cls_token + args.include_patch
    network.head = head() if args.shared_head else nn.ModuleList(head() for _ in range(levels))
    if args.include_patch:
        network.srs = SRS(network.num_features, args.srs_heads or default_heads(network))
    return network


def build_method(args: argparse.Namespace, config: CfgNode, device: torch.device) -> UDI:
    """Student, teacher as its copy, and the loss, on the device and wrapped for several processes."""
    crops = setup.get_crops(args, config)
    student = build_network(args, config, is_teacher=False)
    teacher = build_network(args, config, is_teacher=True)
    networks = setup.pair_networks(args, student, teacher, crops, device, compiled="forward_blocks")
    criterion = UDILoss(
        args.out_dim,
        crops.total,
        args.warmup_teacher_temp,
        args.teacher_temp,
        args.warmup_teacher_temp_epochs,
        args.epochs,
        args.student_temp,
        args.center_momentum,
        alpha=args.alpha,
        target_mix=args.target_mix,
        fall_back=True,
        level_weights=args.level_weights,
    )
    criterion.to(device)
    grid_of = token_grids(args, config)
    return UDI(*networks, criterion, args.number_cls_token, grid_of, args.include_patch, args.local_patch)


# --------------------------------------------------------------------------- into the networks


def teacher_weights(found: Correspondence, grid: int) -> list[Tensor]:
    """Of each teacher view (B, M + L m, N): at the samples of the other global view, then at those of all local ones."""
    local = found.local_target_L2m2
    places = [
        torch.cat([found.target_2M2[:, 1 - view], local[:, :, view].flatten(1, 2)], dim=1)
        for view in range(TEACHER_VIEWS)
    ]
    return [bilinear_weights(place_BS2, (grid, grid)) for place_BS2 in places]


def student_weights(
    found: Correspondence, sides: Sequence[int], grid_of: Mapping[int, int], local: bool
) -> list[Tensor | None]:
    """Of each view, whose side in pixels is given, (B, S, N) at its own samples; with `local` also of the local ones."""
    tokens = [*found.tokens_2M.unbind(1), *found.local_tokens_Lm.unbind(1)]
    return [
        one_hot_weights(own, grid_of[side] ** 2) if local or view < TEACHER_VIEWS else None
        for view, (own, side) in enumerate(zip(tokens, sides))
    ]


# --------------------------------------------------------------------------- out of the networks


def teacher_levels(output: LevelOutput, found: Correspondence) -> TeacherLevels:
    """Of both global views, sampled as `teacher_weights` says or not at all."""
    batch, _, samples = found.valid_2M.shape
    _, local_views, _, local_samples = found.local_valid_L2m.shape
    levels = TeacherLevels(map_rows(output.token_logits[0], lambda x: x.unflatten(0, (TEACHER_VIEWS, batch))))
    if output.sample_logits is None:
        return levels
    rows = map_rows(output.sample_logits, lambda x: x.unflatten(0, (TEACHER_VIEWS, batch, -1)))
    levels = levels._replace(
        patch_VBSK=map_rows(rows, lambda x: x[:, :, :samples].flip(0)), valid_VBS=found.valid_2M.transpose(0, 1)
    )
    if not local_views:
        return levels
    local_shape = (local_views, local_samples)
    return levels._replace(
        local_patch_LVBSK=map_rows(rows, lambda x: x[:, :, samples:].unflatten(2, local_shape).movedim(2, 0)),
        local_valid_LVBS=found.local_valid_L2m.movedim(0, 2),
    )


def student_levels(output: LevelOutput, found: Correspondence) -> StudentLevels:
    """Of all views, sampled as `student_weights` says or not at all."""
    batch, _, samples = found.valid_2M.shape
    tokens = [map_rows(rows, lambda x: x.unflatten(0, (-1, batch))) for rows in output.token_logits]
    halves = [map_rows(rows, part) for rows in tokens for part in (_of_globals, _of_locals)]
    levels = StudentLevels(*halves)
    if output.sample_features is None:
        return levels
    of_globals = TEACHER_VIEWS * batch * samples
    of_locals = len(output.sample_features) - of_globals
    rows, local = split_rows(output.sample_logits, [of_globals, of_locals])
    levels = levels._replace(patch_VBSK=map_rows(rows, lambda x: x.unflatten(0, (TEACHER_VIEWS, batch, samples))))
    if not of_locals:
        return levels
    local_shape = (found.local_tokens_Lm.shape[1], batch, found.local_tokens_Lm.shape[2])
    return levels._replace(local_patch_LBSK=map_rows(local, lambda x: x.unflatten(0, local_shape)))


def _of_globals(rows: Tensor) -> Tensor:
    return rows[:TEACHER_VIEWS]


def _of_locals(rows: Tensor) -> Tensor:
    return rows[TEACHER_VIEWS:]


if __name__ == "__main__":
    launch.run_script(partial(main, ARGS))
