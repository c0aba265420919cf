"""Synchronizations and dispatched operations of a step, plain and lean.

    python benchmarks/syncs.py                         # Swin-T, with and without regions, a minute
    python benchmarks/syncs.py --batch 2 --out_dim 4096

Both are counted on the CPU while one step runs. A synchronization is a number read by the host (`item`, `tolist`, a tensor used
as a condition), a shape that depends on values (`nonzero`, boolean indices), or a copy to another device. Operations are counted
in forward and backward; views launch no kernel on a GPU, and a foreach counts once unless it has one factor per tensor. The
scalars of the lean step are read once per log interval, which is counted separately. The operations of the lean step grow with
the chunks of the loss.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.sides import add_sizes, build_step, make_crops
from config.ranges import integer
from distributed import launch
from training.run_log import EpochMeter

WAITING_OPS = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "equal"}
VIEWS = {
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "permute",
    "expand",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
    "detach",
    "alias",
}
VIEWS |= {"unbind", "split", "split_with_sizes", "as_strided", "diagonal", "lift_fresh", "_reshape_alias", "unfold"}
READING_METHODS = {Tensor.tolist, Tensor.numpy}  # on a CPU these dispatch nothing
TARGET_WAITS, TARGET_OPERATIONS = 1, 0.5


class _ReadingCount(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function in READING_METHODS
        return function(*args, **(kwargs or {}))


class OperationCount(TorchDispatchMode):
    """Counts the operations dispatched inside the `with` block.

    Attributes:
        operations: Counts by name, including views.
        waits: Counts of synchronizations by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self._readings = _ReadingCount()

    def __enter__(self) -> OperationCount:
        self._readings.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._readings.__exit__(*error)
        if self._readings.count:
            self.waits["tolist"] += self._readings.count
        self._readings.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        self.operations[name] += _launches(name, args)
        if name in WAITING_OPS or _has_boolean_index(name, args):
            self.waits[name] += 1
        before = {value.device for value in args if isinstance(value, Tensor)}
        result = function(*args, **(kwargs or {}))
        if name in {"_to_copy", "copy_"} and isinstance(result, Tensor) and before - {result.device}:
            self.waits["copy to another device"] += 1
        return result


def _launches(name: str, args: Sequence[Any]) -> int:
    """Return the number of kernels: one, except for a foreach with one factor per tensor, which CUDA runs tensor by tensor."""
    if not name.startswith("_foreach") or len(args) < 2 or not isinstance(args[1], list | tuple):
        return 1
    factor_per_tensor = any(isinstance(f, Tensor) and f.shape != tensor.shape for tensor, f in zip(args[0], args[1]))
    return len(args[0]) if factor_per_tensor else 1


def _has_boolean_index(name: str, args: Sequence[Any]) -> bool:
    if name not in {"index", "index_put_", "index_put", "_index_put_impl_"}:
        return False
    return any(index is not None and index.dtype in {torch.bool, torch.uint8} for index in args[1])


def count(work: Callable[[], Any]) -> OperationCount:
    """Count what `work` dispatches."""
    with OperationCount() as counter:
        work()
    return counter


def count_step(side: str, args: argparse.Namespace, dense: bool) -> tuple[OperationCount, int]:
    """Return the counts of a second step (the first one fills caches), and the synchronizations of reading a log interval."""
    step = build_step(side, args, dense=dense)
    crops = make_crops(args.batch, args.local_crops)
    meter = EpochMeter(0, 3, args.batch)
    meter.update(step([crops], 0, 0))
    counter = count(lambda: meter.update(step([crops], 1, 0)))
    reading = count(lambda: step.check(meter.read(), 1))
    return counter, sum(reading.waits.values())


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(
        "benchmarks/syncs.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_sizes(parser, batch=1)
    parser.set_defaults(out_dim=1024)
    parser.add_argument("--top", type=integer(0), default=0, help="also list the N most frequent operations")
    return parser


def main(args: argparse.Namespace) -> None:
    """Count both sides for both losses and print the ratios."""
    for dense in (True, False):
        print(f"Swin-T, {'views and regions' if dense else 'views'}, 2 + {args.local_crops} crops, fp32:")
        totals = {}
        for side in ("plain", "lean"):
            counter, reading = count_step(side, args, dense)
            everything = sum(counter.operations.values())
            totals[side] = everything, everything - sum(counter.operations[name] for name in VIEWS)
            waits = sum(counter.waits.values())
            target = f" (target: at most {TARGET_WAITS})" if side == "lean" else ""
            print(
                f"  {side:6} {totals[side][0]:6} operations, {totals[side][1]} without views; {waits} synchronizations per step"
                f"{target}, {reading} per log interval"
            )
            if args.top:
                print("   ", "  ".join(f"{name} {times}" for name, times in counter.operations.most_common(args.top)))
        ratios = [lean / plain for lean, plain in zip(totals["lean"], totals["plain"])]
        print(
            f"  lean / plain: {ratios[0]:.2f} of the operations, {ratios[1]:.2f} without views (target: {TARGET_OPERATIONS})"
        )


if __name__ == "__main__":
    launch.run_script(lambda: main(get_args_parser().parse_args()))
