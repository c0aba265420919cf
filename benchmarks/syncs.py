"""Synchronizations and kernel launches of a step, plain and lean.

    python benchmarks/syncs.py                              # Swin-T, with and without regions, some minutes
    python benchmarks/syncs.py --batch 2 --out_dim 4096 --top 20

A synchronization is a number read by the host (`item`, `tolist`, a tensor used as a condition), a shape that depends on values
(`nonzero`, boolean indices), or a copy to another device. They are counted in a small step on the CPU. The scalars of the lean
step are read once per log interval, which is counted separately.

Launches are counted at full size with fake tensors, as on CUDA (benchmarks/memory.py), in forward and backward: one for each
operation that is not a view. A foreach or a fused optimizer launches one kernel for so many tensors and elements, or one per
tensor if it has one factor per tensor. Operations that launch several kernels count once, on both sides.
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

from benchmarks import memory
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
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
QUESTIONS = {"device", "promote_types", "_record_function_enter_new", "_record_function_exit"}
# The multi-tensor kernels of torch: tensors of one launch by the number of lists, elements of a block, and blocks of a launch.
TENSORS_PER_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
ELEMENTS_PER_BLOCK, BLOCKS_PER_LAUNCH = 65536, 320
READING_METHODS = {Tensor.tolist, Tensor.numpy}  # on a CPU these dispatch nothing
TARGET_WAITS, TARGET_LAUNCHES = 1, 0.5


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
        operations: Counts by name, including views; several for a foreach that launches several kernels.
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

    @property
    def launches(self) -> Counter[str]:
        """Counts of the operations that launch kernels on a GPU."""
        silent = VIEWS | ALLOCATIONS | QUESTIONS
        return Counter({name: count for name, count in self.operations.items() if name not in silent})

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
    """Return the number of kernels that an operation launches on CUDA."""
    if not name.startswith(("_foreach", "_fused")):
        return 1
    lists = [[x for x in arg if isinstance(x, Tensor)] for arg in args if isinstance(arg, list | tuple)]
    tensors = lists[0]
    same = [other for other in lists if [x.shape for x in other] == [x.shape for x in tensors]]
    if name.startswith("_foreach") and len(same) < len(lists):  # one factor per tensor
        return len(tensors)
    blocks = sum(-(-tensor.numel() // ELEMENTS_PER_BLOCK) for tensor in tensors)
    return max(-(-len(tensors) // TENSORS_PER_LAUNCH[len(same)]), -(-blocks // BLOCKS_PER_LAUNCH))


def _has_boolean_index(name: str, args: Sequence[Any]) -> bool:
    if name not in {"index", "index_put_", "index_put", "_index_put_impl_"}:
        return False
    return any(index is not None and index.dtype in {torch.bool, torch.uint8} for index in args[1])


def count(work: Callable[[], Any]) -> OperationCount:
    """Count what `work` dispatches."""
    with OperationCount() as counter:
        work()
    return counter


def count_waits(side: str, args: argparse.Namespace, dense: bool) -> tuple[int, int]:
    """Return the synchronizations of a second step (the first one fills caches), and of reading a log interval."""
    small = argparse.Namespace(batch=1, out_dim=1024, local_crops=args.local_crops)
    step = build_step(side, small, dense=dense)
    crops = make_crops(small.batch, small.local_crops)
    meter = EpochMeter(0, 3, small.batch)
    meter.update(step([crops], 0, 0))
    counters = count(lambda: meter.update(step([crops], 1, 0))), count(lambda: step.check(meter.read(), 1))
    step_waits, reading_waits = (sum(counter.waits.values()) for counter in counters)
    return step_waits, reading_waits


def count_launches(side: str, args: argparse.Namespace, dense: bool, **build: Any) -> Counter[str]:
    """Return the launches of a second step by name."""
    with memory.simulated_step(side, args, dense=dense, **build) as step:
        crops = make_crops(args.batch, args.local_crops)
        step([crops], 0, 0)
        return count(lambda: step([crops], 1, 0)).launches


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(
        "benchmarks/syncs.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_sizes(parser, batch=32)
    parser.add_argument("--top", type=integer(0), default=0, help="also list the N most frequent launches")
    return parser


def main(args: argparse.Namespace) -> None:
    """Count both sides for both losses and print the ratios."""
    for dense in (True, False):
        print(f"Swin-T, {'views and regions' if dense else 'views'}, 2 + {args.local_crops} crops, fp32:")
        for side in ("plain", "lean"):
            waits, reading = count_waits(side, args, dense)
            target = f" (target: at most {TARGET_WAITS})" if side == "lean" else ""
            print(f"  {side:6} {waits:5} synchronizations per step{target}, {reading} per log interval", flush=True)
        totals = {}
        for side in ("plain", "lean"):
            launches = count_launches(side, args, dense)
            totals[side] = sum(launches.values())
            print(f"  {side:6} {totals[side]:5} launches per step, batch {args.batch}, K {args.out_dim}", flush=True)
            if args.top:
                print("   ", "  ".join(f"{name} {times}" for name, times in launches.most_common(args.top)))
        print(f"  lean / plain: {totals['lean'] / totals['plain']:.2f} of the launches (target: {TARGET_LAUNCHES})")


if __name__ == "__main__":
    launch.run_script(lambda: main(get_args_parser().parse_args()))
