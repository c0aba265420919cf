"""Checkpointing and bit-exact resume, for pre-training, fine-tuning and the linear probe.

    with Saver(output_dir, step, args, config) as saver:          # stop signals become votes
        engine.train(step, loader, epochs, accum_iter, log, saver, resume_run(path, step.load_state_dict, args))

`checkpoint.pth` is written atomically; the previous one becomes `checkpoint_previous1.pth`, and so on, so that at least
one whole checkpoint exists at any moment. A checkpoint within an epoch holds that epoch as `epoch` and its position as `in_epoch`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

import utils
from checkpoints import files, serialization, sharded
from distributed import collectives
from training import restore, stopping
from training.run_log import EpochMeter
from utils import Stopped, UsageError, logger

CHECKPOINT = "checkpoint.pth"
# Arguments that may change at a resume without a warning: they change no number of the run.
LAUNCH_ARGUMENTS = {
    *("dist_url", "local_rank", "log_freq", "save_every_steps", "save_every_minutes", "keep_last", "max_bad_steps"),
    *("pretrained_weights_ckpt", "init_weights", "allow_partial", "output_dir", "saveckp_freq"),
    *("knn_every", "knn_data_path", "fsdp", "fsdp_group", "dist_timeout"),
}
# How a run computes, logged at every resume.
MODES = ("precision", "batch_size_per_gpu", "accum_iter", "grad_checkpointing", "fsdp", "compile")
# Behavior of runs saved before an argument existed.
BEFORE_THE_ARGUMENT = {"aug_backend": "pil", "plain_loss": True, "sampler": "distributed", "decode": "full"}

_known: set[Path] = set()  # checkpoints that this process has read or written


class RunPosition(NamedTuple):
    """Position of a run: epoch and step."""

    epoch: int = 0  # the current one
    steps: int = 0  # finished steps of that epoch
    meter: Mapping[str, Any] = {}  # state of that epoch's `EpochMeter`
    unreadable: Mapping[str, str] = {}  # unreadable files so far, and why
    is_new: bool = False
    damaged: tuple[Path, ...] = ()  # checkpoints that were skipped because they are damaged


class Stateful(Protocol):
    """An object whose state `Saver` writes."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state; a collective operation, whose result counts on the main process."""


@contextlib.contextmanager
def training_run(path: Path) -> Iterator[None]:
    """Lock the folder of the checkpoint at `path` for one training run.

    Raises:
        UsageError: Another run holds the folder, or it cannot be written.
        Stopped: A signal arrived before the first step.
    """
    at_once = stopping.stop_at_once(lambda: f"before the first step; the same command {_on_restart(path)}")
    with at_once, files.lock_folder(path.parent, "training"):
        yield


# --------------------------------------------------------------------------- when to save


class StopRequest(stopping.StopSignals):
    """Stop signals of a run that can save itself between its steps.

    Leaving the context without an error raises a `UsageError` if the last save failed.

    Attributes:
        failure: Why the last save on this process failed, empty if it did not; None before the first save.
        save_within: Saves the run after so many steps of the current epoch, on all processes, and returns why that failed.
    """

    def __init__(self, path: Path) -> None:
        super().__init__("saving and stopping")
        self.path = path
        self.failure: str | None = None
        self.save_within: Callable[[int], str] | None = None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        super().__exit__(kind)
        if kind is None:
            check_saved(self.failure, self.path)

    def stop_if(self, stop_votes: float, epoch: int, steps: int) -> None:
        """Save and stop on all processes, after `steps` steps of `epoch`, if any process voted for it.

        Raises:
            Stopped: The run is saved.
            UsageError: The run could not be saved.
        """
        if not stop_votes:
            return
        if steps and self.save_within is not None:
            self.failure = self.save_within(steps)
        check_saved(self.failure, self.path)
        where = f"{utils.counted(steps, 'step')} into epoch {epoch}, and saved" if steps else f"before epoch {epoch}"
        raise Stopped(
            f"stopped by a signal {where}; the same command {_on_restart(self.path)}", stopping.exit_code(stop_votes)
        )


class Saver(StopRequest):
    """Decides, on all processes alike, when a pre-training run is saved, and saves it.

    Args:
        args: `save_every_steps`, `save_every_minutes`, `saveckp_freq` and `keep_last`.

    Attributes:
        stopping: Whether all processes are about to stop.
        code: Exit code of that stop.
    """

    def __init__(self, output_dir: Path, step: Stateful, args: Any, config: Any) -> None:
        super().__init__(output_dir / CHECKPOINT)
        self.step, self.args, self.config = step, args, config
        self.stopping = False
        self.code = 0
        self._saved_at = time.monotonic()

    def votes(self) -> list[float]:
        """Return this process's votes: to stop, and (main process only) to save because `save_every_minutes` have passed."""
        minutes = self.args.save_every_minutes
        late = bool(minutes) and time.monotonic() - self._saved_at >= 60 * minutes
        return [*super().votes(), float(late and collectives.is_main_process())]

    def due(self, steps: int, moved: bool, votes: Sequence[float]) -> bool:
        """Return whether to save now.

        Args:
            steps: Finished steps of the epoch.
            moved: Whether at least one of them was made since the start or resume.
            votes: Sums over all processes of `votes()`.
        """
        stop_votes, save_votes = votes
        self.stopping = stop_votes > 0
        if self.stopping:
            self.code = stopping.exit_code(stop_votes)
        every = self.args.save_every_steps
        return self.stopping or (moved and (save_votes > 0 or bool(every and steps % every == 0)))

    def save(self, position: RunPosition) -> None:
        """Save the run, a collective operation; if writing fails, warn and continue."""
        self.failure = save_run(self.path, self.step, position, self.args, self.config)
        self._saved_at = time.monotonic()
        if self.stopping and not self.failure:
            logger.warning(
                "stopped %s into epoch %d and saved in %s; the same command continues the run",
                utils.counted(position.steps, "step"),
                position.epoch,
                self.path.parent,
            )


# --------------------------------------------------------------------------- saving


def save_run(path: Path, step: Stateful, position: RunPosition, args: Any, config: Any) -> str:
    """Write `checkpoint.pth`, and keep it as `checkpoint{epoch:04}.pth` after every `args.saveckp_freq`-th epoch (0: never).

    All processes call this; the main process writes.

    Returns:
        Why `checkpoint.pth` could not be written; empty on success.
    """
    state = run_fields(position, args, config) | step.state_dict() | {"unreadable": dict(position.unreadable)}
    with sharded.gathered(state) as tensors:
        if not collectives.is_main_process():
            return ""
        failure = write(state, path, args.keep_last, tensors)
    finished = position.epoch - 1
    if not failure and args.saveckp_freq and not position.steps and finished % args.saveckp_freq == 0:
        _keep(path, path.with_name(f"checkpoint{finished:04}.pth"))
    return failure


def run_fields(position: RunPosition, args: Any, config: Any) -> dict[str, Any]:
    """Return the fields of a checkpoint that `position_of` reads, and the config; a collective operation."""
    fields = {
        "epoch": position.epoch,
        "args": args,
        "config": None if config is None else config.dump(),
        "rng": collectives.all_gather_objects(utils.get_rng_state()),
        "world_size": collectives.get_world_size(),
    }
    return fields | ({"in_epoch": in_epoch(position.steps, position.meter, args)} if position.steps else {})


def write(state: Mapping[str, Any], path: Path, keep: int = 1, tensors: Iterator[Tensor] | None = None) -> str:
    """Write a checkpoint whole and keep the `keep` previous ones; if writing fails, warn and leave them as they are.

    Args:
        tensors: The tensors of a sharded `state` (`sharded.gathered`).

    Returns:
        Why it could not be written; empty on success.
    """
    gone = path in _known and not os.path.exists(path)
    if gone:
        logger.warning("%s has disappeared: was it moved, or is its disk no longer mounted?", path)
    try:
        with files.atomic_write(path, before_replacing=lambda: _rotate(path, keep)) as temporary:
            if tensors is None:
                serialization.write_file(state, temporary)
            else:
                sharded.write(state, tensors, temporary)
    except OSError as error:
        failure = _one_line(error)
        remains = "the last whole checkpoint remains" if os.path.exists(path) else "there is no whole checkpoint yet"
        remains = "the previous checkpoint has disappeared" if gone else remains
        logger.warning("cannot save the run (%s); %s; the next save will try again", failure, remains)
        return failure
    _known.add(path)
    return ""


def _rotate(path: Path, keep: int) -> None:
    """Rename each previous checkpoint to the one before it; the newest keeps its name as well until it is replaced."""
    if not keep or not path.exists():
        return
    for number in range(keep - 1, 0, -1):
        if previous(path, number).exists():
            os.replace(previous(path, number), previous(path, number + 1))
    previous(path, 1).unlink(missing_ok=True)
    try:
        os.link(path, previous(path, 1))
    except OSError:  # a file system without hard links: for a moment the newest has only its new name
        os.replace(path, previous(path, 1))


def _keep(path: Path, kept: Path) -> None:
    """Keep the checkpoint at `path` under a second name as well."""
    try:
        with files.atomic_write(kept) as temporary:
            try:
                os.link(path, temporary)
            except OSError:
                shutil.copyfile(path, temporary)
    except OSError as error:
        logger.warning("cannot keep %s (%s); the run continues without it", kept.name, _one_line(error))


def check_saved(failure: str | None, path: Path) -> None:
    """Stop on all processes if the main process's last `write` failed.

    Raises:
        UsageError: It did.
    """
    with collectives.failing_together():
        if failure:
            raise UsageError(
                f"the last checkpoint could not be written ({failure}); free some space in {path.parent} and start it again, "
                f"it {_on_restart(path)}"
            )


def _on_restart(path: Path) -> str:
    """Return what a restarted run does, given the checkpoints at `path`."""
    with contextlib.suppress(OSError):
        if not saved(path):
            lost = f", unless the checkpoint that was in {path.parent} is back: was its disk unmounted?"
            return "starts from the beginning" + (lost if path in _known else "")
    return f"continues from the last whole checkpoint in {path.parent}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def previous(path: Path, number: int) -> Path:
    """Return the name of the checkpoint that was saved `number` saves before the one at `path`; 0 is `path` itself."""
    return path.with_name(f"{path.stem}_previous{number}{path.suffix}") if number else path


# --------------------------------------------------------------------------- resuming


def resume_run(path: Path, load: Callable[[dict[str, Any], Path], None], args: Any) -> RunPosition:
    """Load the newest whole checkpoint at `path` and return its position; a new position if there is no checkpoint.

    Args:
        load: Takes the content and the path of the file, such as `TrainStep.load_state_dict`.

    Raises:
        UsageError: All files are damaged, or the content does not fit this run.
    """
    found = newest_whole(path, _maps_file(args))
    if found is None:
        return RunPosition(is_new=True)
    source, content, damaged = found
    load(content, source)
    return position_of(content, source, args)._replace(damaged=damaged)


def continue_run(path: Path, load: Callable[[dict[str, Any], Path], None], args: Any) -> RunPosition:
    """Continue, in a new folder, the run that wrote the full checkpoint at `path`: at its epoch and on the same schedule.

    Raises:
        UsageError: It is no full checkpoint, does not fit this run, or has finished all of `args.epochs`.
    """
    content = serialization.load_file(path, mapped=_maps_file(args))
    restore.check_fields(content, path)
    load(content, path)
    position = position_of(content, path, args)
    if position.epoch >= args.epochs:
        raise UsageError(
            f"checkpoint '{path}' has {utils.counted(position.epoch, 'epoch')} already, --epochs {args.epochs} leaves none to "
            "train; raise --epochs, or pass --init_weights FILE to start a new schedule"
        )
    return position


def position_of(content: Mapping[str, Any], path: Path, args: Any) -> RunPosition:
    """Return the position that a checkpoint holds; restore the random states and report changed arguments."""
    steps, meter = _within_epoch(content, args, path)
    with restore.reading("args", path):
        before = vars(content.get("args") or args)
        _report_changes(vars(args), before)
        modes = describe_modes(vars(args), before, content.get("world_size"))
    if content.get("rng"):
        _restore_rng(content["rng"], path)
    if content["epoch"] < args.epochs:
        logger.info("resuming %s at epoch %d: %s", path, content["epoch"], modes)
    return RunPosition(int(content["epoch"]), steps, meter, content.get("unreadable", {}))


def _maps_file(args: Any) -> bool:
    """Return whether a process keeps only a part of a checkpoint, and therefore maps the file instead of reading it."""
    return bool(getattr(args, "fsdp", False))


def newest_whole(path: Path, mapped: bool = False) -> tuple[Path, dict[str, Any], tuple[Path, ...]] | None:
    """Read the newest whole checkpoint at `path`.

    Args:
        mapped: As in `serialization.load_file`.

    Returns:
        Its path, its content and the damaged files that were skipped; None if there is no file.

    Raises:
        DamagedError: There are files, and all are damaged.
    """
    damaged: list[Path] = []
    for candidate in saved(path):
        try:
            content = serialization.load_file(candidate, mapped)
        except serialization.DamagedError as error:
            logger.warning("%s", error)
            damaged.append(candidate)
            continue
        restore.check_fields(content, candidate)
        _known.add(path)
        if candidate != path:
            logger.warning("resuming from the previous checkpoint, %s", candidate)
        return candidate, content, tuple(damaged)
    if damaged:
        raise serialization.DamagedError(
            f"every checkpoint in {path.parent} is damaged ({', '.join(file.name for file in damaged)}); "
            "put a copy there, or choose another --output_dir"
        )
    return None


def saved(path: Path) -> list[Path]:
    """Return the existing checkpoint at `path` and its previous ones, newest first."""
    numbers = [int(n) for file in path.parent.glob(f"{path.stem}_previous*{path.suffix}")
               if (n := file.stem.removeprefix(f"{path.stem}_previous")).isdecimal()]  # fmt: skip
    return [file for file in (previous(path, number) for number in [0, *sorted(numbers)]) if files.lexists(file)]


def check_same_run(before: Mapping[str, Any] | None, now: Mapping[str, Any], source: str) -> None:
    """Compare what identifies a saved run with this run, by name of the flag; None is accepted with a warning.

    Raises:
        UsageError: Something differs.
    """
    if before is None:
        logger.warning("%s has no recorded settings; assuming that it belongs to this run", source)
        return
    changed = [f"{key} {old} -> {now.get(key)}" for key, old in before.items() if old != now.get(key)]
    if changed:
        raise UsageError(
            f"{source} belongs to another run ({'; '.join(changed)}); choose another --output_dir or repeat its command"
        )


def in_epoch(steps: int, meter: Mapping[str, Any], args: Any) -> dict[str, Any]:
    """Return the `in_epoch` field of a checkpoint after `steps` steps of an epoch."""
    return {"steps": steps, "images": steps * images_per_step(args), "meter": dict(meter)}


def _within_epoch(content: Mapping[str, Any], args: Any, path: Path) -> tuple[int, Mapping[str, Any]]:
    """Return the finished steps of the epoch, converted to this run's batch size (rounded down), and the meter's state."""
    position = content.get("in_epoch", {"steps": 0, "images": 0, "meter": {}})
    with restore.reading("in_epoch", path):
        batch = images_per_step(args)
        steps, repeated = divmod(position["images"], batch)
        EpochMeter(0, 1, 1).resume(position["meter"], steps)  # fails here if it cannot be continued
        if steps != position["steps"]:
            logger.warning(
                "%d images of the epoch are done, %s of %d images now instead of %d; %d images are repeated, and the run is not "
                "bit-identical to an uninterrupted one",
                *(position["images"], utils.counted(steps, "step"), batch, position["steps"], repeated),
            )
        elif steps:
            logger.info("%s of the epoch are done", utils.counted(steps, "step"))
        return steps, position["meter"]


def images_per_step(args: Any) -> int:
    """Return the number of images of an optimizer step, over all processes."""
    return int(args.batch_size_per_gpu * getattr(args, "accum_iter", 1) * collectives.get_world_size())


def _restore_rng(rng_of_rank: Sequence[dict[str, Any]], path: Path) -> None:
    """Restore this rank's random state, if the world size is that of the checkpoint."""
    if len(rng_of_rank) == collectives.get_world_size():
        with restore.reading("rng", path):
            utils.set_rng_state(rng_of_rank[collectives.get_rank()])
    else:
        logger.warning(
            "the run was saved by %s and continues with %d; random states start fresh",
            *(utils.counted(len(rng_of_rank), "process", "processes"), collectives.get_world_size()),
        )


def describe_modes(now: Mapping[str, Any], before: Mapping[str, Any], processes_before: int | None) -> str:
    """Return the `MODES` and the number of processes of a resumed run, with those of the saved run where they differ."""
    world = collectives.get_world_size()
    pairs = {name: (now[name], before.get(name, now[name])) for name in MODES if name in now}
    pairs["processes"] = (world, processes_before or world)
    words = {True: "on", False: "off"}

    def text(value: Any) -> str:
        return words[value] if isinstance(value, bool) else str(value)

    return ", ".join(
        f"{name} {text(value)}" + (f" (was {text(old)})" if old != value else "")
        for name, (value, old) in pairs.items()
    )


def _report_changes(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Warn about arguments that differ from those of the resumed run; `describe_modes` has the others."""

    def listed(value: Any) -> list[Any]:  # a value equals a list of it, and tuples equal lists
        return list(value) if isinstance(value, list | tuple) else [value]

    before = BEFORE_THE_ARGUMENT | before
    names = sorted((now.keys() & before.keys()) - LAUNCH_ARGUMENTS - set(MODES))
    changed = [f"{name} {before[name]} -> {now[name]}" for name in names if listed(now[name]) != listed(before[name])]
    if changed:
        logger.warning("arguments differ from those of the resumed run: %s", "; ".join(changed))


def clean_up(output_dir: Path, position: RunPosition) -> None:
    """Clean the folder of a run before it continues; the main process calls this.

    Temporary files are removed, damaged checkpoints get the suffix `.damaged` (so that no whole one is rotated out for them), and
    lines of `log.txt` about epochs that are trained again move to `log_repeated.txt`.
    """
    for file in output_dir.glob(f".*{files.TEMPORARY_SUFFIX}"):
        logger.warning("removing %s, left by an interrupted save", file)
        file.unlink(missing_ok=True)
    for file in position.damaged:
        os.replace(file, files.unused(file.with_name(file.name + ".damaged")))
        _known.discard(file)
    log = output_dir / "log.txt"
    if not log.exists():
        return
    lines = log.read_bytes().splitlines(keepends=True)  # bytes: a damaged line need not be text
    repeated = [line for line in lines if _is_repeated(line, position.epoch)]
    if repeated:
        with (output_dir / "log_repeated.txt").open("ab") as moved:
            moved.writelines(line.rstrip(b"\n") + b"\n" for line in repeated)
        with files.atomic_write(log) as temporary:
            temporary.write_bytes(b"".join(line for line in lines if not _is_repeated(line, position.epoch)))


def _is_repeated(line: bytes, epoch: int) -> bool:
    """Return whether a line of `log.txt` is about `epoch` or a later one, or is incomplete."""
    try:
        return bool(files.parse_json(line)["epoch"] >= epoch)
    except (ValueError, LookupError, TypeError):
        return not line.endswith(b"\n")
