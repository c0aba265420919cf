"""Pre-train a multi-stage vision transformer with EsViT: self-distillation of views and of matched regions.

    python main_esvit.py --arch swin_tiny --data_path IMAGES --output_dir OUT --use_dense_prediction True      # one process
    torchrun --nproc_per_node=8 main_esvit.py ...                                                              # many

Without --use_dense_prediction only the view-level loss of DINO is trained. A run in --output_dir is resumed.
The losses are in losses/, the training step in training/step.py, the loop in training/engine.py, and the builders that all methods
share in training/setup.py.

Origin: EsViT (Li et al., ICLR 2022) and DINO (Caron et al., ICCV 2021); flags are those of microsoft/esvit.
"""

from __future__ import annotations

from config.arguments.main_esvit import get_args_parser as get_args_parser

if __name__ == "__main__":  # --help and usage errors are answered before torch is imported
    ARGS = get_args_parser().parse_command_line()

import argparse
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

import data
import utils
from checkpoints import loading
from config import arguments
from data.transforms import augment
from data.transforms.crops import split_views
from data.transforms.mixup import ViewMixup
from data.transforms.recipe import RECIPES
from distributed import collectives, launch
from evaluation.knn_callback import build_knn_callback
from losses.dino import DINOLoss as DINOLoss
from losses.distillation import TEACHER_VIEWS
from losses.koleo import koleo_loss
from losses.region import RegionMatchingLoss as RegionMatchingLoss
from models import Backbone, build_model, load_arch_config
from training import checkpointing, collapse, engine, setup
from training.step import Method
from utils import UsageError, logger


class EsViT(Method):
    """The method of EsViT, and of DINO without regions."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        criterion: DINOLoss,
        mixup: ViewMixup | None = None,
        koleo_weight: float = 0.0,
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.criterion: DINOLoss = criterion
        self.mixup = mixup
        self.koleo_weight = koleo_weight
        self.tasks = "views and regions" if isinstance(criterion, RegionMatchingLoss) else "views"

    def compute_loss(self, views: Sequence[Tensor], epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Compare the student's outputs for all views, mixed if mixup is on, with the teacher's for the global views."""
        with torch.no_grad(), collapse.record_inputs(self._heads(self.teacher) if self.monitor else {}) as features:
            teacher_output = self.teacher(views[:TEACHER_VIEWS])
        self.criterion.accumulate_center(teacher_output)
        student_views, targets = (views, None) if self.mixup is None else self.mixup(views)
        mixed_from = None if self.mixup is None else self.mixup.mixed_from
        with collapse.record_inputs(self._heads(self.student) if self.koleo_weight else {}) as student_features:
            student_output = self.student(student_views)
        terms = self.criterion.terms(student_output, teacher_output, epoch, targets, mixed_from)
        if self.monitor is not None:
            self.monitor(self.criterion.monitored_levels(student_output, teacher_output, epoch, features))
        loss = self.criterion.total(terms)
        terms = terms if len(terms) > 1 else {}
        if self.koleo_weight:
            global_views = student_features["view"][: TEACHER_VIEWS * len(views[0])]
            terms["koleo"] = koleo_loss(global_views.unflatten(0, (TEACHER_VIEWS, -1)))
            loss = loss + self.koleo_weight * terms["koleo"]
        return loss, terms

    def _heads(self, network: nn.Module) -> dict[str, nn.Module]:
        """Return the heads of the student or the teacher by level."""
        backbone = loading.unwrap(network)
        heads = {"view": backbone.head, "region": getattr(backbone, "head_dense", None)}
        return {name: head for name, head in heads.items() if isinstance(head, nn.Module)}


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
    if args.koleo_weight and args.batch_size_per_gpu * collectives.get_world_size() < 2:
        raise UsageError(
            f"--koleo_weight {args.koleo_weight} compares the images of a batch, and this one has one image; raise "
            "--batch_size_per_gpu"
        )
    if args.smoothing and args.use_mixup and args.use_dense_prediction:
        raise UsageError(
            f"--smoothing {args.smoothing} mixes every image with every other, which is too slow for regions; set it to 0, or turn "
            "--use_dense_prediction off"
        )


def load_config(args: argparse.Namespace) -> CfgNode:
    """Load the config of the network, and resolve `--aug_backend auto` in the arguments."""
    config = load_arch_config(args.arch, args.cfg, args.opts, args.drop_path)
    args.aug_backend = augment.choose_backend(args.aug_backend, args.aug_opt, config.MODEL.SPEC.IN_CHANS)
    return config


def build_views(args: argparse.Namespace, config: CfgNode) -> tuple[data.Transform, data.DeviceTransform | None]:
    """Build the augmentation of --aug-opt: the transform of the loader workers, and the one of batches on the device, if any.

    Raises:
        UsageError: deit_aug for images that are not RGB, or invalid parameters.
    """
    crops, in_chans = setup.get_crops(args, config), config.MODEL.SPEC.IN_CHANS
    mean, std = config.INPUT.MEAN, config.INPUT.STD
    backend = augment.choose_backend(args.aug_backend, args.aug_opt, in_chans)
    logger.info("augmentation %s, backend %s", args.aug_opt, backend)
    recipe = RECIPES.get(args.aug_opt)
    if recipe and backend == "split":
        return split_views(recipe(crops, args.color_jitter), mean, std)
    if recipe:
        return augment.dino_views(recipe(crops, args.color_jitter), in_chans, mean, std), None
    if in_chans != 3:
        raise UsageError(
            f"--aug-opt deit_aug needs RGB images, these have {in_chans} channels; use dino_aug or small_aug"
        )
    transform = augment.deit_views(
        crops,
        mean,
        std,
        color_jitter=args.color_jitter,
        auto_augment=args.aa,
        interpolation=args.train_interpolation,
        erase_prob=args.reprob,
        erase_mode=args.remode,
        erase_count=args.recount,
        clean_first_view=args.resplit,
    )
    return transform, None


def build_network(args: argparse.Namespace, config: CfgNode, *, is_teacher: bool) -> Backbone:
    """Build a backbone with its heads."""
    network = build_model(
        args.arch, config, dense=args.use_dense_prediction, is_teacher=is_teacher, patch_size=args.patch_size
    )
    head = setup.head_builder(args, network)
    network.head = head()
    if network.dense:
        network.head_dense = head()
    return network


def build_method(args: argparse.Namespace, config: CfgNode, device: torch.device) -> EsViT:
    """Build student, teacher and loss on the device, wrapped for several processes."""
    student = build_network(args, config, is_teacher=False)
    teacher = build_network(args, config, is_teacher=True)
    crops = setup.get_crops(args, config)
    networks = setup.pair_networks(args, student, teacher, crops, device)
    loss = RegionMatchingLoss if args.use_dense_prediction else DINOLoss
    criterion = loss(
        args.out_dim,
        crops.total,
        args.warmup_teacher_temp,
        args.teacher_temp,
        args.warmup_teacher_temp_epochs,
        args.epochs,
        centering=args.centering,
    )
    mixup = None
    if args.use_mixup:
        check_cut(args, crops)
        mixup = ViewMixup(
            args.num_mixup_views,
            args.batch_size_per_gpu,
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            cutmix_minmax=args.cutmix_minmax,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            smoothing=args.smoothing,
        )
    return EsViT(*networks, criterion.to(device), mixup, args.koleo_weight)


def check_cut(args: argparse.Namespace, crops: augment.Crops) -> None:
    """Raise a `UsageError` if the range of --cutmix-minmax holds no whole number of pixels for some size of views."""
    low, high = args.cutmix_minmax or (0, 1)
    for side in crops.sides[: args.num_mixup_views]:
        if int(side * low) >= int(side * high):
            raise UsageError(
                f"--cutmix-minmax {low} {high} is less than a pixel wide on views of {side} pixels; widen it"
            )


if __name__ == "__main__":
    launch.run_script(partial(main, ARGS))
