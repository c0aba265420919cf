"""The output directory of linear probes, segmentation and fine-tuning, which train, log and resume."""

from __future__ import annotations

from pathlib import Path

from checkpoints import files
from training import checkpointing
from utils import UsageError


def make_run_dir(output_dir: str | Path, checkpoint: str, *other_checkpoints: str) -> Path:
    """Create --output_dir for a run that saves `checkpoint` there.

    Raises:
        UsageError: it cannot be created or written to, or has one of `other_checkpoints`, those of other kinds of runs.
    """
    folder = files.make_output_dir(output_dir)
    with files.disk_errors(folder):
        found = [name for name in other_checkpoints if (folder / name).exists()]
        if found and not checkpointing.saved(folder / checkpoint):
            raise UsageError(f"--output_dir {folder} has the {found[0]} of another kind of run; choose another folder")
    return folder
