"""Pre-train a vision transformer with UDI: self-distillation of two class tokens and of sampled patches between overlapping views.

    python main_udi.py --arch vit_small --data_path IMAGES --output_dir OUT      # one process
    torchrun --nproc_per_node=8 main_udi.py ...                                  # many

The target of the second class token is a blend of the teacher's class token and its patches inside the student's view. Networks
without class tokens (Swin, CvT, ViL, ResNet) train with --number_cls_token 1, an extension of UDI. A run in
--output_dir is resumed.

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
from data.transforms.udi_views import Correspondence, Sampling, UDICrops, split_correspondence, udi_views
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
    """The method of UDI.

    Args:
        class_tokens: Number of the student's class tokens that are trained.
        grid_of: Tokens per side of a view by its size in pixels.
        patches: Whether sampled patches of the global views are trained.
        local_patches: Whether those of the local views are trained as well.
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
        """Return the views without their correspondences."""
        return split_correspondence(views)[0]

    def compute_loss(self, views: Sequence[Tensor], epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Compare the student's class tokens and samples with the teacher's, which is sampled at the same places of the image."""
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
        log = setup.open_log(args, config, images, position, device)
        setup.log_run(args, config, method, loader, device)
        config = setup.config_of(method, config)
        with checkpointing.Saver(output_dir, step, args, config) as saver, closing(log):
            finished = engine.train(step, loader, args.epochs, args.accum_iter, log, saver, position, evaluate)
    if finished:
        setup.log_end(args)
    elif saver.code:
        raise utils.Stopped(code=saver.code)


def check_args(args: argparse.Namespace) -> None:
    """Raise a `UsageError` for flags that do not go together."""
    arguments.check_pretraining(args)
    if not args.include_patch and args.number_cls_token > 1:
        raise UsageError(
            "--include_patch off leaves the second class token without a target; pass --number_cls_token 1 as well"
        )
    if not args.include_patch and args.local_patch:
        raise UsageError("--local_patch on needs --include_patch on; change one of them")
    if args.aug_backend == "pil":
        raise UsageError("--aug_backend pil does not return the positions of its crops, which UDI needs; use auto")


def load_config(args: argparse.Namespace) -> CfgNode:
    """Load the config of the network, with --number_cls_token class tokens and positions resized as in the published networks.

    Raises:
        UsageError: The yaml or an override has another number of class tokens, or the config is invalid.
    """
    has_tokens = "NUM_CLS_TOKENS" in lookup(args.arch).spec.defaults
    if args.number_cls_token > 1 and not has_tokens:
        raise UsageError(
            f"--number_cls_token {args.number_cls_token}: {args.arch} has no class tokens; pass --number_cls_token 1 "
            "(an extension of UDI)"
        )
    udi_defaults = ["MODEL.SPEC.NUM_CLS_TOKENS", str(args.number_cls_token), "MODEL.SPEC.POS_RESIZE", "scale"]
    config = load_arch_config(args.arch, args.cfg, args.opts, args.drop_path_rate, udi_defaults if has_tokens else ())
    given = config.MODEL.SPEC.get("NUM_CLS_TOKENS", args.number_cls_token)
    if given != args.number_cls_token:
        raise UsageError(
            f"MODEL.SPEC.NUM_CLS_TOKENS {given} and --number_cls_token {args.number_cls_token} differ; leave the key out of "
            f"yaml and overrides, or pass --number_cls_token {given}"
        )
    if config.MODEL.SPEC.IN_CHANS != 3:
        raise UsageError(f"MODEL.SPEC.IN_CHANS {config.MODEL.SPEC.IN_CHANS}: UDI needs RGB images, set it to 3")
    args.aug_backend = "split"
    return config


def build_views(args: argparse.Namespace, config: CfgNode) -> tuple[UDICrops, data.DeviceTransform]:
    """Build the transform of the workers, which also returns the geometry of the crops, and the one of batches on the device."""
    crops = setup.get_crops(args, config)
    grid_of = token_grids(args, config)
    smallest = min(grid_of.values())
    sampling = Sampling(
        grid_of,
        args.global_sampling_window_size if args.include_patch else smallest,  # unused
        args.local_sampling_window_size if args.include_patch else smallest,
        args.global_pair_mode,
        args.srs_align,
        args.local_reference,
        args.srs_drawing,
    )
    return udi_views(crops, config.INPUT.MEAN, config.INPUT.STD, args.color_jitter, sampling, args.flip_prob)


def token_grids(args: argparse.Namespace, config: CfgNode) -> dict[int, int]:
    """Return the tokens per side of a view by its size in pixels, from a network on the meta device."""
    crops = setup.get_crops(args, config)
    sizes = {crops.global_size, *(size for number, size in zip(crops.local_numbers, crops.local_sizes) if number)}
    with torch.device("meta"):
        network = build_model(args.arch, config, patch_size=args.patch_size)
        return {size: network.region_grid(torch.zeros(1, 3, size, size))[0] for size in sizes}


def build_network(args: argparse.Namespace, config: CfgNode, *, is_teacher: bool) -> Backbone:
    """Build a backbone with one head, or one per level, and the module that samples its patches."""
    network = build_model(args.arch, config, is_teacher=is_teacher, patch_size=args.patch_size)
    head = setup.head_builder(args, network)
    levels = args.number_cls_token + args.include_patch
    network.head = head() if args.shared_head else nn.ModuleList(head() for _ in range(levels))
    if args.include_patch:
        network.srs = SRS(network.num_features, args.srs_heads or default_heads(network))
    return network


def build_method(args: argparse.Namespace, config: CfgNode, device: torch.device) -> UDI:
    """Build student, teacher and loss on the device, wrapped for several processes."""
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


# --------------------------------------------------------------------------- samples
#
# Shapes: B images, L local views, M samples of a global view, m of a local one (S of either), N tokens of a view.


def teacher_weights(found: Correspondence, grid: int) -> list[Tensor]:
    """Return sampling weights (B, M + L m, N) of each teacher view: at the samples of all other views."""
    local = found.local_target_L2m2
    places = [
        torch.cat([found.target_2M2[:, 1 - view], local[:, :, view].flatten(1, 2)], dim=1)
        for view in range(TEACHER_VIEWS)
    ]
    return [bilinear_weights(place_BS2, (grid, grid)) for place_BS2 in places]


def student_weights(
    found: Correspondence, sides: Sequence[int], grid_of: Mapping[int, int], local: bool
) -> list[Tensor | None]:
    """Return sampling weights (B, S, N) of each student view at its own samples; None for local views unless `local`."""
    tokens = [*found.tokens_2M.unbind(1), *found.local_tokens_Lm.unbind(1)]
    return [
        one_hot_weights(own, grid_of[side] ** 2) if local or view < TEACHER_VIEWS else None
        for view, (own, side) in enumerate(zip(tokens, sides))
    ]


# --------------------------------------------------------------------------- levels


def teacher_levels(output: LevelOutput, found: Correspondence) -> TeacherLevels:
    """Arrange the teacher's output, sampled with `teacher_weights` or not at all, by level and view."""
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
    """Arrange the student's output, sampled with `student_weights` or not at all, by level and view."""
    batch, _, samples = found.valid_2M.shape
    tokens = [map_rows(rows, lambda x: x.unflatten(0, (-1, batch))) for rows in output.token_logits]
    halves = [map_rows(rows, part) for rows in tokens for part in (_global_views, _local_views)]
    levels = StudentLevels(*halves)
    if output.sample_features is None:
        return levels
    global_rows = TEACHER_VIEWS * batch * samples
    local_rows = len(output.sample_features) - global_rows
    rows, local = split_rows(output.sample_logits, [global_rows, local_rows])
    levels = levels._replace(patch_VBSK=map_rows(rows, lambda x: x.unflatten(0, (TEACHER_VIEWS, batch, samples))))
    if not local_rows:
        return levels
    local_shape = (found.local_tokens_Lm.shape[1], batch, found.local_tokens_Lm.shape[2])
    return levels._replace(local_patch_LBSK=map_rows(local, lambda x: x.unflatten(0, local_shape)))


def _global_views(rows: Tensor) -> Tensor:
    return rows[:TEACHER_VIEWS]


def _local_views(rows: Tensor) -> Tensor:
    return rows[TEACHER_VIEWS:]


if __name__ == "__main__":
    launch.run_script(partial(main, ARGS))
