"""Rows of benchmarks/gpu.py: what each one measures, the process that runs it, and the record of what came of it.

A row is a generator of named figures. Rows run in a process of their own, one after another, so that a crash, a hang or a corrupted
CUDA context costs one row: the process is replaced, and the next row goes on. Each figure is in the record as soon as it is known.

This process never touches the device, so a forked one may.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import utils
from checkpoints import files

OK, FAILED, MISSED, NOT_RUN = "ok", "failed", "goal missed", "not run"
PARTS = ("right", "fast", "fed")
SLOWEST = 4.0  # times its estimate that a row may take
LEAST_LIMIT = 30.0  # seconds that every row may take
PR_SET_PDEATHSIG = 1  # prctl(2): end with the parent, also in the middle of a row
CPU_PACE = 20.0  # first guess of how much slower a CPU is than the GPU of the estimates


class Bound(NamedTuple):
    """A figure that must not be larger than a bound."""

    value: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether the value is within its bound; NaN is not."""
        return self.value <= self.bound

    def __str__(self) -> str:
        text = f"{self.value:.3g} (at most {self.bound:.3g})"
        return text if self.holds else f"**{text}**"


def largest(errors: Iterable[float], bound: float) -> Bound:
    """Return the largest error with its bound; NaN counts as larger than everything."""
    return Bound(max(errors, key=lambda error: math.inf if math.isnan(error) else error), bound)


Figure = float | str | Bound
Figures = Iterator[tuple[str, Figure]]


class Bench(NamedTuple):
    """What rows run with."""

    device: torch.device
    tiny: bool
    golden: Path  # folder of the golden numbers
    known: Mapping[str, Mapping[str, Figure]] = {}  # figures of the rows before, by name

    @property
    def is_cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"


class Row(NamedTuple):
    """A row of the record.

    Args:
        part: One of `PARTS`.
        seconds: Estimate for a recent GPU.
        columns: Figures that are columns of a table; rows without are listed.
    """

    part: str
    name: str
    seconds: float
    work: Callable[[Bench], Figures]
    needs_cuda: bool = False
    columns: tuple[str, ...] = ()


class Setup(NamedTuple):
    """What a process that runs rows is started with."""

    device: str
    tiny: bool
    golden: Path
    log: Path


# --------------------------------------------------------------------------- the process that runs rows


def _serve(connection: Connection, parents_end: Connection, part: str, rows: Sequence[Row], setup: Setup) -> None:
    """Run the rows whose numbers arrive, and send their figures; all output goes to the log."""
    parents_end.close()  # so that recv fails when the parent is gone
    os.setsid()  # a group that can be killed as a whole; Ctrl-C is the parent's
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if part == "right":
        compute_exactly()
    try:
        device = utils.resolve_device(setup.device)
    except utils.UsageError as error:
        connection.send(str(error))
        return
    gc.freeze()  # what was imported is not searched after each row
    with setup.log.open("a", buffering=1) as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        sys.stdout = sys.stderr = file
        connection.send(describe(device))
        while True:
            try:
                number, known = connection.recv()
            except EOFError:
                return
            print(f"--- {rows[number].part}: {rows[number].name}", file=file)
            connection.send(_run(rows[number], Bench(device, setup.tiny, setup.golden, known), connection))


def _run(row: Row, bench: Bench, connection: Connection) -> tuple[str, bool]:
    """Run a row; return its error, if any, and whether the process can go on."""
    try:
        for name, figure in row.work(bench):
            connection.send((name, figure))
    except Exception as error:
        traceback.print_exc()
        if utils.lack_of_memory(error):
            return "out of memory", True
        text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        return text, "CUDA error" not in str(error)  # later calls would fail as well
    finally:
        gc.collect()
        if bench.is_cuda:
            torch.cuda.empty_cache()
    return "", True


def compute_exactly() -> None:
    """Compute float32 without TF32, and let cuBLAS be deterministic; before the device is used."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def describe(device: torch.device) -> dict[str, Any]:
    """Return what the device and its libraries are."""
    about: dict[str, Any] = {"device": str(device), "type": device.type, "torch": torch.__version__}
    about["python"] = sys.version.split()[0]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        about |= {"name": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        about |= {"memory_gb": total / 1e9, "free_gb": free / 1e9, "cuda": torch.version.cuda}
        about |= {"cudnn": torch.backends.cudnn.version()}
    return about


class Worker:
    """The process that runs rows of one part.

    Raises:
        UsageError: There is no such device.
    """

    def __init__(self, part: str, rows: Sequence[Row], setup: Setup) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=_serve, args=(theirs, self.connection, part, rows, setup))
        self.process.start()
        theirs.close()
        try:
            about = self.connection.recv()
        except EOFError:
            about = f"the process of the device ended at once; {setup.log} may say why"
        if isinstance(about, str):
            self.stop()
            raise utils.UsageError(about)
        self.about: dict[str, Any] = about

    def stop(self) -> None:
        """End the process and what it started."""
        self.connection.close()
        for kill in (os.killpg, os.kill):
            try:
                kill(self.process.pid or 0, signal.SIGKILL)
                break
            except ProcessLookupError:
                pass
        self.process.join()

    def run(self, number: int, known: Mapping[str, Any], limit: float) -> Iterator[tuple[str, Figure]]:
        """Yield the figures of a row.

        Raises:
            RowError: The row failed, or took longer than `limit` seconds.
        """
        until = time.monotonic() + limit
        self.connection.send((number, known))
        while self.connection.poll(max(until - time.monotonic(), 0)):
            try:
                message = self.connection.recv()
            except (EOFError, ConnectionError):
                self.process.join()
                raise RowError(f"the process ended with code {self.process.exitcode}", usable=False) from None
            if isinstance(message[1], bool):
                error, usable = message
                if error:
                    raise RowError(error, usable)
                return
            yield message
        raise RowError(f"stopped after {limit:.0f} s", usable=False, late=True)


class RowError(Exception):
    """A row that came to no good end.

    Args:
        usable: Whether its process can run further rows.
        late: Whether it was stopped because of the time.
    """

    def __init__(self, reason: str, usable: bool = True, late: bool = False) -> None:
        super().__init__(reason)
        self.usable, self.late = usable, late


# --------------------------------------------------------------------------- the record


class Entry(NamedTuple):
    """What came of a row."""

    row: Row
    result: str
    reason: str
    seconds: float
    figures: Mapping[str, Figure]


class Record:
    """The entries so far, written to a JSON file at each figure."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path, self.about = path, about
        self.entries: list[Entry] = []

    @property
    def known(self) -> dict[str, Mapping[str, Figure]]:
        """Figures by row."""
        return {entry.row.name: entry.figures for entry in self.entries}

    def write(self, current: Entry | None = None, verdict: Sequence[str] = ()) -> None:
        """Write the entries, and the one that is being measured."""
        entries = [*self.entries, *([current] if current else [])]
        rows = [
            {"part": e.row.part, "name": e.row.name, "result": e.result, "reason": e.reason}
            | {"seconds": round(e.seconds, 2), "figures": {name: _plain(figure) for name, figure in e.figures.items()}}
            for e in entries
        ]
        with files.atomic_write(self.path) as temporary:
            temporary.write_text(json.dumps(self.about | {"rows": rows, "verdict": list(verdict)}, indent=1) + "\n")

    def add(self, entry: Entry) -> None:
        """Add an entry, and show it."""
        self.entries.append(entry)
        self.write()
        reason = f": {entry.reason}" if entry.reason else ""
        print(f"{entry.row.part:5} {entry.seconds:6.1f} s  {entry.row.name}: {entry.result}{reason}", flush=True)


def _plain(figure: Figure) -> Any:
    """Return a figure as JSON has it."""
    if isinstance(figure, Bound):
        return {"value": _plain(figure.value), "at_most": figure.bound, "holds": figure.holds}
    return str(figure) if isinstance(figure, float) and not math.isfinite(figure) else figure


def run_rows(rows: Sequence[Row], setup: Setup, minutes: float, record: Record) -> None:
    """Run rows in their order until the time is over."""
    deadline = time.monotonic() + 60 * minutes
    worker: Worker | None = None
    running_part = ""
    estimated = measured = 0.0
    try:
        for number, row in enumerate(rows):
            if worker is None or row.part != running_part:
                if worker is not None:
                    worker.stop()
                worker, running_part = Worker(row.part, rows, setup), row.part
                record.about["environment"] = worker.about
            on_cuda = worker.about["type"] == "cuda"
            if row.needs_cuda and not on_cuda:
                record.add(Entry(row, NOT_RUN, "needs CUDA", 0.0, {}))
                continue
            first_pace = 1.0 if on_cuda or setup.tiny else CPU_PACE
            pace = measured / estimated if estimated else first_pace
            left = deadline - time.monotonic()
            expected = row.seconds * pace
            if expected > left:
                record.add(Entry(row, NOT_RUN, "time", 0.0, {}))
                continue
            limit = max(SLOWEST * expected, LEAST_LIMIT)
            entry, usable = _run_row(worker, number, row, record, min(limit, left), out_of_time=left < limit)
            record.add(entry)
            estimated, measured = estimated + row.seconds, measured + entry.seconds
            if not usable:
                worker.stop()
                worker = None
    finally:
        if worker is not None:
            worker.stop()


def _run_row(
    worker: Worker, number: int, row: Row, record: Record, limit: float, out_of_time: bool
) -> tuple[Entry, bool]:
    """Run one row for at most `limit` seconds; return its entry, and whether the process can run further ones.

    Args:
        out_of_time: Whether the limit is the end of the program, not what the row may take.
    """
    start = time.monotonic()
    figures: dict[str, Figure] = {}
    try:
        for name, figure in worker.run(number, record.known, limit):
            figures[name] = figure
            record.write(Entry(row, "running", "", time.monotonic() - start, figures))
    except RowError as error:
        cut = error.late and out_of_time
        result, reason = (NOT_RUN, "time") if cut else (FAILED, str(error))
        return Entry(row, result, reason, time.monotonic() - start, figures), error.usable
    broken = [name for name, figure in figures.items() if isinstance(figure, Bound) and not figure.holds]
    result = OK if not broken else FAILED if row.part == "right" else MISSED
    return Entry(row, result, ", ".join(broken), time.monotonic() - start, figures), True


# --------------------------------------------------------------------------- what is printed at the end


def tables(entries: Sequence[Entry]) -> Iterator[str]:
    """Yield the lines of Markdown tables, one for each part and set of columns."""
    groups: dict[tuple[str, tuple[str, ...]], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.row.part, entry.row.columns), []).append(entry)
    for (part, columns), group in sorted(groups.items(), key=lambda item: PARTS.index(item[0][0])):
        titles = [part, "result", *(columns or ("figures",))]
        yield f"\n| {' | '.join(titles)} |\n|{' --- |' * len(titles)}"
        for entry in group:
            cells = [_cell(entry.figures.get(column, "")) for column in columns]
            listed = "; ".join(f"{name} {_cell(figure)}" for name, figure in entry.figures.items())
            result = f"{entry.result}: {entry.reason}" if entry.reason else entry.result
            cells = [entry.row.name, result, *(cells if columns else [listed])]
            yield f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _cell(figure: Figure) -> str:
    return f"{figure:.4g}" if isinstance(figure, float) else str(figure)


def verdict(entries: Sequence[Entry]) -> Iterator[str]:
    """Yield one sentence for each part."""
    for part in PARTS:
        own = [entry for entry in entries if entry.row.part == part]
        by_result = {result: [e for e in own if e.result == result] for result in (OK, FAILED, MISSED, NOT_RUN)}
        ran = len(own) - len(by_result[NOT_RUN])
        if not own:
            continue
        sentence = f"{part}: {len(by_result[OK])} of {ran} rows hold" if ran else f"{part}: nothing was run"
        for result in (FAILED, MISSED):
            if by_result[result]:
                sentence += f"; {result}: {', '.join(e.row.name for e in by_result[result])}"
        for reason in dict.fromkeys(entry.reason for entry in by_result[NOT_RUN]):
            count = sum(entry.reason == reason for entry in by_result[NOT_RUN])
            sentence += f"; {count} not run ({reason})"
        yield sentence
