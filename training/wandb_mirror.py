"""Mirror the TensorBoard curves of a run to Weights & Biases, for `--wandb`.

wandb reads what TensorBoard writes, whose steps are its `global_step`. An output directory is one run there, however often it is
resumed; its ID is kept in `wandb_id.txt`. With `WANDB_MODE=offline` the run is written to `wandb/` in the output directory, for
`wandb sync`.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints.files import atomic_write, read_text
from utils import UsageError, isolated_rng, logger

if TYPE_CHECKING:
    import wandb

ID_FILE = "wandb_id.txt"
SETTINGS = {  # unless the environment has them; other versions of wandb ignore those that they do not know
    "WANDB_CONSOLE": "off",  # progress bars look for a terminal
    "WANDB_FINISH_TIMEOUT": "300",  # seconds for the last uploads, which without a network would never end
}


@contextlib.contextmanager
def mirror_tensorboard(project: str, output_dir: Path, config: Mapping[str, Any]) -> Iterator[Callable[[], None]]:
    """Mirror the TensorBoard writer of `output_dir` that is opened inside the block; do nothing without a project.

    Failures of wandb are warnings.

    Yields:
        the function that ends the mirror, for the end of the run.

    Raises:
        UsageError: wandb rejects its settings: nobody has logged in, say, or the project has an invalid name.
    """
    if not project:
        yield lambda: None
        return
    from wandb.integration import tensorboard

    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    tensorboard.patch(save=False, root_logdir=str(output_dir))
    try:
        run = _start(project, output_dir, config)
        yield lambda: _finish(run)
    finally:
        tensorboard.unpatch()  # later writers of this folder are found, and do not depend on wandb


def _start(project: str, output_dir: Path, config: Mapping[str, Any]) -> wandb.Run | None:
    """Start or resume the run of a folder; None, with a warning, if that fails."""
    import wandb

    try:
        with isolated_rng(0):  # training draws the same random numbers as without it
            return wandb.init(
                project=project,
                name=output_dir.resolve().name,
                id=run_id(output_dir),
                resume="allow",
                dir=str(output_dir),
                config=dict(config),
                sync_tensorboard=True,
            )
    except wandb.errors.UsageError as error:
        raise UsageError(f"--wandb {project}: {error}; run wandb login, or set WANDB_MODE=offline") from error
    except Exception as error:  # of the network, the server or the disk: of any type
        logger.warning("wandb cannot start (%s); the run continues without it", error)
        return None


def _finish(run: wandb.Run | None) -> None:
    """End the upload."""
    try:
        if run is not None:
            run.finish()
    except Exception as error:  # of any type, as above
        logger.warning("wandb cannot finish (%s); upload the folder wandb/ with wandb sync", error)


def run_id(output_dir: Path) -> str:
    """Return the ID of the run in `output_dir`, and write it there if it is new."""
    path = output_dir / ID_FILE
    if not path.exists():
        with atomic_write(path) as temporary:
            temporary.write_text(f"{uuid.uuid4().hex[:12]}\n")
    return read_text(path).strip()
