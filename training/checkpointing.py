"""A run survives: what is saved of it and when, and how it goes on, to the bit as if it had never stopped.

    with Saver(output_dir, step, args, config) as saver:          # signals now ask for an end
        engine.train(step, loader, epochs, accum_iter, log, saver, resume_run(output_dir, step, args))

`checkpoint.pth` appears whole or not at all; the file before it becomes `checkpoint_previous1.pth`, and so on. At every moment at
least one of them is whole. Within an epoch `epoch` is the one that goes on, and `in_epoch` says how far it is.

Origin: this project's own.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

import utils
from checkpoints import files, loading
from distributed import collectives, fsdp
from models.base import Backbone
from training import restore, stopping
from training.run_log import EpochMeter
from utils import Stopped, UsageError, logger

if TYPE_CHECKING:
    from training.step import TrainStep

CHECKPOINT = "checkpoint.pth"
# Change no number of a run:
LAUNCH_FLAGS = {"dist_url", "local_rank", "log_freq", "save_every_steps", "save_every_minutes", "keep_last"}
LAUNCH_FLAGS |= {
    "gpu",
    "rank",
    "world_size",
    "pretrained_weights_ckpt",
    "init_weights",
    "allow_partial",
}  # how it was started
LAUNCH_FLAGS |= {"max_bad_steps", "knn_every", "knn_data_path", "fsdp", "dist_timeout"}
# What a run did whose saved arguments do not have the flag yet, where that is not what a new run does by itself.
BEFORE_THE_FLAG = {"aug_backend": "pil", "plain_loss": True, "sampler": "distributed"}

_seen: set[Path] = set()  # checkpoints that this process has found or written


class RunPosition(NamedTuple):
    """How far a run is."""

    epoch: int = 0  # the one to go on with
    steps: int = 0  # of it that are done
    meter: Mapping[str, Any] = {}  # what its `EpochMeter` has measured
    unreadable: Mapping[str, str] = {}  # files met so far, and why
    is_new: bool = False
    damaged: tuple[Path, ...] = ()  # files that were passed by to get here


# --------------------------------------------------------------------------- saving


@contextlib.contextmanager
def training_run(path: Path) -> Iterator[None]:
    """Hold the folder of a run, whose checkpoint is at `path`, against other runs.

    A signal that no `EndRequest` takes, before the first step, ends it at once.

    Raises:
        UsageError: see `files.sole_run`.
        Stopped: a signal came.
    """
    ending = stopping.ending_at_once(lambda: f"before the first step; the same command {_goes_on(path)}")
    with ending, files.sole_run(path.parent, "training"):
        yield


class EndRequest(stopping.StopVote):
    """The signals of a run that saves itself: they are asked for between its steps.

    On leaving without an error it says whether the last state of the run is on the disk.

    Args:
        path: of the run's checkpoint.

    Attributes:
        failure: why the last saving by this process did not work, empty where it did; None before the first.
        save_within: saves the run so many steps into the epoch at hand, on all processes at once, and says why that failed.
    """

    def __init__(self, path: Path) -> None:
        super().__init__("saving and ending")
        self.path = path
        self.failure: str | None = None
        self.save_within: Callable[[int], str] | None = None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        super().__exit__(kind)
        if kind is None:
            end_saved(self.failure, self.path)

    def end_if(self, wished: float, epoch: int, steps: int) -> None:
        """Save and end all processes, `steps` steps into `epoch`, if any of them wished it.

        Raises:
            Stopped: one did.
            UsageError: one did, and the run could not be saved, see `end_saved`.
        """
        if not wished:
            return
        if steps and self.save_within is not None:
            self.failure = self.save_within(steps)
        end_saved(self.failure, self.path)
        where = f"{utils.counted(steps, 'step')} into epoch {epoch}, and saved" if steps else f"before epoch {epoch}"
        raise Stopped(f"stopped by a signal {where}; the same command {_goes_on(self.path)}", stopping.code_of(wished))


class Saver(EndRequest):
    """Decides when a run is saved, on all processes alike, and saves it.

    Args:
        args: `save_every_steps`, `save_every_minutes`, `saveckp_freq` and `keep_last` say how often and how many.
        config: of the network, to be kept with it.

    Attributes:
        stopping: all processes know that the run is to end.
        code: the exit code that was asked for with it.
    """

    def __init__(self, output_dir: Path, step: TrainStep, args: Any, config: Any) -> None:
        super().__init__(output_dir / CHECKPOINT)
        self.output_dir = output_dir
        self.step = step
        self.args, self.config = args, config
        self.stopping = False
        self.code = 0
        self._saved_at = time.monotonic()

    def wishes(self) -> list[float]:
        """This process's: to end the run, and to save it by the clock, which the main process reads."""
        minutes = self.args.save_every_minutes
        late = bool(minutes) and time.monotonic() - self._saved_at >= 60 * minutes
        return [*super().wishes(), float(late and collectives.is_main_process())]

    def due(self, steps: int, moved: bool, wishes: Sequence[float]) -> bool:
        """Whether to save now, `steps` steps into the epoch, as the sums of all processes' `wishes` say.

        `moved`: at least one of the steps was made here.
        """
        end, late = wishes
        self.stopping = end > 0
        if self.stopping:
            self.code = stopping.code_of(end)
        every = self.args.save_every_steps
        return self.stopping or (moved and (late > 0 or bool(every and steps % every == 0)))

    def save(self, place: RunPosition, images: int = 0) -> None:
        """Save the run, on all processes at once; where that is not possible say so and let the run go on.

        `images`: of the epoch that all processes have seen.
        """
        self.failure = save_run(self.output_dir, self.step, place, images, self.args, self.config)
        self._saved_at = time.monotonic()
        if self.stopping and not self.failure:
            logger.warning(
                "stopped %s into epoch %d and saved in %s; the same command continues the run",
                utils.counted(place.steps, "step"),
                place.epoch,
                self.output_dir,
            )


def save_run(output_dir: Path, step: TrainStep, place: RunPosition, images: int, args: Any, config: Any) -> str:
    """Write `checkpoint.pth`, and of every `args.saveckp_freq`th epoch from 0 on (0: none) `checkpoint{epoch:04}.pth`.

    All processes call this; the main one writes.

    Returns:
        why `checkpoint.pth` could not be written, see `write`.

    Raises:
        FloatingPointError: see `checkpoint.check_finite`.
    """
    rng_of_rank = collectives.all_gather_objects(utils.get_rng_state())
    method = step.method
    owners = (method.student, method.teacher, step.optimizer)
    student, teacher, optimizer = (fsdp.whole_state(owner) for owner in owners)
    loading.check_finite(student=student, teacher=teacher, **{method.criterion_key: method.criterion.state_dict()})
    if not collectives.is_main_process():
        return ""
    state = {
        "student": loading.prefixed(student),
        "teacher": teacher,
        "optimizer": optimizer,
        "epoch": place.epoch,
        "args": args,
        method.criterion_key: method.criterion.state_dict(),
        "fp16_scaler": step.scaler.state_dict() if step.scaler.is_enabled() else None,
        "config": None if config is None else _settled(method.student, config).dump(),
        "rng": rng_of_rank,
        "world_size": collectives.get_world_size(),
        "bad_steps_in_a_row": step.nonfinite.in_a_row,
        "monitor": step.monitor.state(),
        "unreadable": dict(place.unreadable),
    }
    if place.steps:
        state["in_epoch"] = {"steps": place.steps, "images": images, "meter": dict(place.meter)}
    failure = write(state, output_dir / CHECKPOINT, args.keep_last)
    finished = place.epoch - 1
    if args.saveckp_freq and not place.steps and finished % args.saveckp_freq == 0:
        kept = output_dir / f"checkpoint{finished:04}.pth"
        try:
            loading.save_file(state, kept)
        except OSError as error:
            logger.warning("cannot keep %s (%s); the run goes on without it", kept.name, _in_one_line(error))
    return failure


def _settled(network: nn.Module, config: Any) -> Any:
    """See `Backbone.resolve_config`."""
    backbone = loading.unwrap(network)
    return backbone.resolve_config(config) if isinstance(backbone, Backbone) else config


def write(state: Mapping[str, Any], path: Path, keep: int = 1) -> str:
    """Write the checkpoint at `path`, whole, and keep `keep` of those before it; where that fails say so, and let the run go on.

    Returns:
        why it could not be written, and the files are what they were; empty where it was.
    """
    gone = path in _seen and not os.path.exists(path)
    if gone:
        logger.warning(
            "%s has no %s any more, which was there: was it moved, or is its disk no longer mounted?",
            *(path.parent, path.name),
        )
    try:
        with files.whole_file(path) as temporary:
            loading.save_file(state, temporary)  # which is on the disk before the others step back
            _step_back(path, keep)
    except OSError as error:
        failure = _in_one_line(error)
        stays = "its last whole checkpoint stays" if os.path.exists(path) else "there is no whole checkpoint yet"
        stays = "the checkpoint that was there is gone" if gone else stays
        logger.warning("cannot save the run (%s); %s, and the next saving is tried", failure, stays)
        return failure
    _seen.add(path)
    return ""


def end_saved(failure: str | None, path: Path) -> None:
    """At the end of a run, whose checkpoint is at `path`: stop on all processes if the main one's last `write` failed.

    Raises:
        UsageError: it did.
    """
    with collectives.failing_together():
        if failure:
            raise UsageError(
                f"the end of the run is not saved ({failure}); make room in {path.parent} and start it again, "
                f"it {_goes_on(path)}"
            )


def _goes_on(path: Path) -> str:
    """What a run does when it is started again, by what there is of the checkpoint at `path`."""
    with contextlib.suppress(OSError):  # a disk that is gone does not tell
        if not saved(path) and path in _seen:
            return (
                f"begins anew, unless the checkpoint that was in {path.parent} is back there: was its disk unmounted?"
            )
        if not saved(path):
            return "begins anew"
    return f"goes on from the last whole checkpoint in {path.parent}"


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def previous(path: Path, number: int) -> Path:
    """The checkpoint `number` savings before the one at `path`; 0 is that itself."""
    return path.with_name(f"{path.stem}_previous{number}{path.suffix}") if number else path


def _step_back(path: Path, keep: int) -> None:
    """Each file becomes the one before and the last is gone; the newest keeps its own name too, until the next one takes it."""
    if not keep or not path.exists():
        return
    for number in range(keep - 1, 0, -1):
        if previous(path, number).exists():
            os.replace(previous(path, number), previous(path, number + 1))
    previous(path, 1).unlink(missing_ok=True)
    try:
        os.link(path, previous(path, 1))
    except OSError:  # a disk without links: for a moment there is no newest one
        os.replace(path, previous(path, 1))


# --------------------------------------------------------------------------- going on


def resume_run(output_dir: Path, step: TrainStep, args: Any) -> RunPosition:
    """Continue from the newest whole checkpoint of `output_dir`, if there is any.

    Raises:
        UsageError: all files are damaged, or of another network, optimizer or number of prototypes.
    """
    found = newest_whole(output_dir / CHECKPOINT)
    if found is None:
        return RunPosition(is_new=True)
    path, content, damaged = found
    return _restore(path, content, step, args)._replace(damaged=damaged)


def continue_run(path: Path, step: TrainStep, args: Any) -> RunPosition:
    """Continue the run that wrote `path` with this one's networks and loss, at its epoch and on the same schedule.

    Whole heads and centers that the file lacks start fresh (a view-level run goes on with regions, say), with `args.allow_partial`
    also whatever else does not fit.

    Raises:
        UsageError: no full checkpoint, one of another network or optimizer, or one that has all of `args.epochs` behind it.
    """
    content = loading.load_file(path)
    restore.check_fields(content, path)
    place = _restore(path, content, step, args, extend=True)
    if place.epoch >= args.epochs:
        raise UsageError(
            f"checkpoint '{path}' has {utils.counted(place.epoch, 'epoch')} already, --epochs {args.epochs} leaves none to train; "
            "raise --epochs, or pass --init_weights FILE to start a new schedule"
        )
    return place


def _restore(path: Path, content: dict[str, Any], step: TrainStep, args: Any, extend: bool = False) -> RunPosition:
    """Give `step` and the generators of random numbers the state that a checkpoint holds; `extend`: see `restore`."""
    restore.restore(path, content, step, args, extend)
    steps, meter = within_epoch(content, args, path)
    return RunPosition(continue_from(content, args, path), steps, meter, content.get("unreadable", {}))


def newest_whole(path: Path) -> tuple[Path, dict[str, Any], tuple[Path, ...]] | None:
    """The newest whole one of the checkpoint at `path` and those before it, with its content and the damaged ones passed by.

    Raises:
        DamagedError: there are files, and none of them is whole.
    """
    damaged: list[Path] = []
    for candidate in saved(path):
        try:
            content = loading.load_file(candidate)
        except loading.DamagedError as error:
            logger.warning("%s", error)
            damaged.append(candidate)
            continue
        restore.check_fields(content, candidate)
        _seen.add(path)
        if candidate != path:
            logger.warning("going on from the checkpoint before, %s", candidate)
        return candidate, content, tuple(damaged)
    if damaged:
        raise loading.DamagedError(
            f"every checkpoint in {path.parent} is damaged ({', '.join(file.name for file in damaged)}); "
            "put a copy there, or choose another --output_dir"
        )
    return None


def saved(path: Path) -> list[Path]:
    """The checkpoint at `path` and those before it, the newest first, as far as there are any."""
    numbers = [int(n) for file in path.parent.glob(f"{path.stem}_previous*{path.suffix}")
               if (n := file.stem.removeprefix(f"{path.stem}_previous")).isdecimal()]  # fmt: skip
    return [file for file in (previous(path, number) for number in [0, *sorted(numbers)]) if files.is_there(file)]


def check_same_run(saved: Mapping[str, Any] | None, now: Mapping[str, Any], source: str) -> None:
    """Stop unless a saved run was made with what this one is made with, both by the name of the flag; None: it does not say.

    Raises:
        UsageError: naming what differs.
    """
    if saved is None:
        logger.warning("%s does not say what it was made with; it is taken for a part of this run", source)
        return
    changed = [f"{key} {old} -> {now.get(key)}" for key, old in saved.items() if old != now.get(key)]
    if changed:
        raise UsageError(
            f"{source} belongs to another run ({'; '.join(changed)}); choose another --output_dir or repeat its command"
        )


def in_epoch(steps: int, meter: Mapping[str, Any], args: Any) -> dict[str, Any]:
    """What a checkpoint within an epoch says of it, for `within_epoch`."""
    return {"steps": steps, "images": steps * _images_of_step(args), "meter": dict(meter)}


def within_epoch(content: Mapping[str, Any], args: Any, path: Path) -> tuple[int, Mapping[str, Any]]:
    """The steps of the epoch that a checkpoint has behind it, and what its `EpochMeter` had measured.

    Raises:
        UsageError: values of other types.
    """
    saved_in = content.get("in_epoch", {"steps": 0, "images": 0, "meter": {}})
    with restore.reading("in_epoch", path):
        steps, meter = _steps_of(saved_in, args), saved_in["meter"]
        EpochMeter(0, 1, 1).go_on_from(meter, steps)  # one that cannot go on is told now
    return steps, meter


def _images_of_step(args: Any) -> int:
    return int(args.batch_size_per_gpu * getattr(args, "accum_iter", 1) * collectives.get_world_size())


def _steps_of(in_epoch: Mapping[str, Any], args: Any) -> int:
    """How many steps of this run have seen the images that the saved one has, rounded down."""
    batch = _images_of_step(args)
    steps, left = divmod(in_epoch["images"], batch)
    if steps != in_epoch["steps"]:
        logger.warning(
            "%d images of the epoch are seen, which make %s of %d images now, not %d; %d of them come again, and what follows is "
            "not to the bit what the saved run would have done",
            *(in_epoch["images"], utils.counted(steps, "step"), batch, in_epoch["steps"], left),
        )
    elif steps:
        logger.info("%s of the epoch done already", utils.counted(steps, "step"))
    return steps


def continue_from(content: dict[str, Any], args: Any, path: Path) -> int:
    """The end of every resume: report changed arguments, restore the random states, say and return the epoch to start with."""
    with restore.reading("args", path):
        _report_changes(vars(args), vars(content.get("args") or args))
    rng_of_rank = content.get("rng") or []
    if len(rng_of_rank) == collectives.get_world_size():
        with restore.reading("rng", path):
            utils.set_rng_state(rng_of_rank[collectives.get_rank()])
    elif not rng_of_rank:
        logger.info("%s holds no random states (another program wrote it): they start afresh", path)
    else:
        logger.warning(
            "the run was saved by %s and goes on with %d: random numbers start afresh",
            *(utils.counted(len(rng_of_rank), "process", "processes"), collectives.get_world_size()),
        )
    if content["epoch"] < args.epochs:
        logger.info("resuming %s at epoch %d", path, content["epoch"])
    return int(content["epoch"])


def _report_changes(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Say which arguments differ from those of the run that is continued, or from what it did before they existed."""
    before = BEFORE_THE_FLAG | before
    names = sorted((now.keys() & before.keys()) - LAUNCH_FLAGS)
    changed = [f"{name} {before[name]} -> {now[name]}" for name in names if _differ(now[name], before[name])]
    if changed:
        logger.warning("arguments differ from those of the resumed run: %s", "; ".join(changed))


def _differ(now: Any, before: Any) -> bool:
    """Whether two values of a flag differ; one value and a list of it, and lists and tuples, are the same."""
    lists = [list(value) if isinstance(value, list | tuple) else [value] for value in (now, before)]
    return bool(lists[0] != lists[1])


def tidy(output_dir: Path, place: RunPosition) -> None:
    """Before a run goes on: what a killed one left half done is taken out of the way. The main process calls this.

    Temporary files are removed, damaged checkpoints get the suffix `.damaged` (so that no whole one gives way to them), and lines
    of `log.txt` about epochs that are trained again go to `log_repeated.txt`.
    """
    for file in output_dir.glob(f".*{files.TEMPORARY}"):
        logger.warning("removing %s, which a saving left that did not end", file)
        file.unlink(missing_ok=True)
    for file in place.damaged:
        os.replace(file, files.unused(file.with_name(file.name + ".damaged")))
        _seen.discard(file)  # nobody else took it away
    log = output_dir / "log.txt"
    if not log.exists():
        return
    lines = log.read_bytes().splitlines(keepends=True)  # which need not be text: a disk may have damaged one
    again = [line for line in lines if _is_repeated(line, place.epoch)]
    if again:
        with (output_dir / "log_repeated.txt").open("ab") as repeated:
            repeated.writelines(line.rstrip(b"\n") + b"\n" for line in again)
        with files.whole_file(log) as temporary:
            temporary.write_bytes(b"".join(line for line in lines if not _is_repeated(line, place.epoch)))


def _is_repeated(line: bytes, epoch: int) -> bool:
    """Whether a line is about `epoch` or a later one, or was never written to its end."""
    try:
        return bool(files.parse_json(line)["epoch"] >= epoch)
    except (ValueError, LookupError, TypeError):
        return not line.endswith(b"\n")
