"""The output directory of linear probes and fine-tuning, which train, log and resume."""

from __future__ import annotations

from pathlib import Path

from checkpoints import files
from training import checkpointing
from utils import UsageError


def make_run_dir(output_dir: str | Path, checkpoint: str, other_checkpoint: str) -> Path:
    """Create --output_dir for a run that saves `checkpoint` there.

    Raises:
        UsageError: it cannot be created or written to, or has `other_checkpoint`, that of another kind of run.
    """
    folder = files.make_output_dir(output_dir)
    with files.disk_errors(folder):
        if (folder / other_checkpoint).exists() and not checkpointing.saved(folder / checkpoint):
            raise UsageError(
                f"--output_dir {folder} has the {other_checkpoint} of another kind of run; choose another folder"
            )
    return folder
