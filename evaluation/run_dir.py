"""The output directory of linear probes and fine-tuning, which train, log and resume."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from yacs.config import CfgNode

from checkpoints import files
from distributed import collectives
from training import checkpointing
from training.run_log import RunLog
from utils import UsageError


def make_run_dir(output_dir: str | Path, checkpoint: str, other_checkpoint: str) -> Path:
    """Create --output_dir for a run that saves `checkpoint` there.

    Raises:
        UsageError: it cannot be created or written to, or has `other_checkpoint`, that of another kind of run.
    """
    folder = files.make_output_dir(output_dir)
    with files.usable(folder):
        if (folder / other_checkpoint).exists() and not checkpointing.saved(folder / checkpoint):
            raise UsageError(
                f"--output_dir {folder} has the {other_checkpoint} of another kind of run; choose another folder"
            )
    return folder


def begin_run(
    args: argparse.Namespace,
    config: CfgNode,
    position: checkpointing.RunPosition,
    batch_size: int,
    images: int,
    device: torch.device,
) -> RunLog:
    """Clean up after a killed run, save the arguments and the config, and open the log.

    Args:
        batch_size, images: of a step and of an epoch, over all processes.
    """
    output_dir = Path(args.output_dir)
    seen = position.epoch * images + position.steps * batch_size
    with collectives.failing_together(), files.usable(output_dir):
        if collectives.is_main_process():
            checkpointing.tidy(output_dir, position)
            files.save_provenance(output_dir, args, config)
        normalization = config.INPUT.MEAN, config.INPUT.STD
        return RunLog(output_dir, args.epochs, args.log_freq, *normalization, device, images, seen)
