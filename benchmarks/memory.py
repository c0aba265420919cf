"""Peak memory of a training step, simulated with fake tensors, without a GPU.

    python benchmarks/memory.py                          # Swin-T at batch 32: plain, lean, lean with --grad_checkpointing
    python benchmarks/memory.py --rows                   # and the largest batch of every published network for 24, 40 and 80 GB
    python benchmarks/memory.py --batch 8 --out_dim 4096

Counts every storage that is alive during the second step: parameters, gradients, optimizer state, centers, tensors saved by
autograd and temporaries. The lean side uses CUDA's memory-efficient attention, the plain side explicit attention. Not counted are
the CUDA context and libraries, scratch memory of kernels, fragmentation and prefetched images: leave one or two GB for them. The
largest batch is extrapolated linearly from two batch sizes.
"""

from __future__ import annotations

import argparse
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main_esvit
from benchmarks.plain import PlainStep
from benchmarks.rows import ROWS
from benchmarks.sides import add_sizes, build_step, make_crops
from distributed import launch
from ops import chunked_cross_entropy
from ops.attention import BIAS_ALIGNMENT
from training import optim
from training.step import TrainStep

GB = 1e9
TARGETS = {"lean": 0.6, "checkpointed": 0.35}
CAPACITIES = (24, 40, 80)
FIT_BATCHES = (8, 16)


class LiveStorages(TorchDispatchMode):
    """Counts the bytes `now` and at the `peak` of all storages that are alive inside the `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def track(self, tensor: Tensor) -> None:
        """Count the storage of a tensor until it is freed."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.track(leaf)
        return result


def fake_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, dropout: float = 0.0, *, scale: float | None = None
) -> Tensor:
    """Run the operator that `scaled_dot_product_attention` selects on CUDA for a bias with gradient.

    Torch would copy or refuse a bias that is not aligned, so it must be.
    """
    if bias is not None:
        *strides, last = bias.stride()
        unaligned = last != 1 or any(stride % BIAS_ALIGNMENT for stride in strides)
        assert not unaligned, f"bias of strides {bias.stride()}"
        bias = bias.expand(*q.shape[:-1], k.shape[-2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(q, k, v, bias, torch.is_grad_enabled(), dropout, False, scale=scale)[0]


@contextmanager
def simulated() -> Iterator[FakeTensorMode]:
    """Make tensors fake (shapes without values) inside the block, and compute with them as on CUDA.

    They are on the CPU by name: the backward of a fake tensor on CUDA needs a GPU.
    """
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with (
            mock.patch("torch.nn.functional.scaled_dot_product_attention", fake_attention),
            mock.patch.object(chunked_cross_entropy, "CHUNK_BYTES", chunked_cross_entropy.CUDA_CHUNK_BYTES),
            mock.patch.object(optim, "LOOPING_DEVICES", frozenset()),
            FakeTensorMode(allow_non_fake_inputs=True) as mode,
        ):
            yield mode
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)


def make_fake(module: nn.Module, mode: FakeTensorMode) -> None:
    """Replace the tensors of a module by fake ones."""
    module._apply(lambda tensor: mode.from_tensor(tensor, static_shapes=True))


@contextmanager
def simulated_step(side: str, sizes: argparse.Namespace, **build: Any) -> Iterator[TrainStep]:
    """Build a step of fake tensors, lean or plain (`sides.build_step`), which can run inside the block."""
    step = build_step(side, sizes, **build)
    with simulated() as mode:
        for module in (step.method.student, step.method.teacher, step.method.criterion):
            make_fake(module, mode)
        yield rebuild_step(step, plain=side == "plain")


def peak_bytes(side: str, args: argparse.Namespace, batch: int, *, flags: tuple[str, ...] = (), **build: Any) -> int:
    """Return the peak of the second step of a side: plain, lean or checkpointed."""
    if side == "checkpointed":
        flags = (*flags, "--grad_checkpointing", "on")
    sizes = argparse.Namespace(batch=batch, out_dim=args.out_dim, local_crops=args.local_crops)
    built = "plain" if side == "plain" else "lean"
    with simulated_step(built, sizes, precision=args.precision, flags=flags, **build) as step:
        crops = make_crops(batch, args.local_crops)
        step([crops], 0, 0)
        counter = LiveStorages()
        held = [*crops, *step_tensors(step)]
        for tensor in held:
            counter.track(tensor)
        del held
        with counter:
            step([crops], 1, 0)
    return counter.peak


def rebuild_step(step: TrainStep, *, plain: bool) -> TrainStep:
    """Return the step with a new optimizer for the current parameters of the networks."""
    assert isinstance(step.method, main_esvit.EsViT)
    optimizer = optim.build_optimizer("adamw", optim.param_groups(step.method.student))
    settings = (step.schedules, step.device, step.precision, step.clip_grad, step.freeze_last_layer)
    new = TrainStep(step.method, optimizer, *settings)
    return PlainStep(new, read=lambda tensor: 1.0) if plain else new


def step_tensors(step: TrainStep) -> Iterator[Tensor]:
    """Yield parameters, buffers and the optimizer's state."""
    for module in (step.method.student, step.method.teacher, step.method.criterion):
        yield from module.parameters()
        yield from module.buffers()
    for state in step.optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


class LinearPeak(NamedTuple):
    """Peak memory as a function of the batch, through the peaks at `FIT_BATCHES`."""

    fixed: float
    per_image: float

    def at(self, batch: int) -> float:
        """Return the bytes at a batch."""
        return self.fixed + self.per_image * batch

    def largest_batch(self, capacity: float) -> int:
        """Return the largest batch that fits in so many bytes."""
        return max(int((capacity - self.fixed) // self.per_image), 0)


def fit_peak(args: argparse.Namespace, side: str, **build: Any) -> LinearPeak:
    """Simulate the peaks of a side at `FIT_BATCHES`."""
    (small, large), peaks = FIT_BATCHES, [peak_bytes(side, args, batch, **build) for batch in FIT_BATCHES]
    per_image = (peaks[1] - peaks[0]) / (large - small)
    return LinearPeak(peaks[0] - per_image * small, per_image)


def largest_batches(args: argparse.Namespace, side: str, **build: Any) -> list[int]:
    """Return the largest batch for each of `CAPACITIES`."""
    peak = fit_peak(args, side, **build)
    return [peak.largest_batch(capacity * GB) for capacity in CAPACITIES]


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(
        "benchmarks/memory.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_sizes(parser, batch=32)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument(
        "--rows", nargs="*", choices=tuple(ROWS), default=None, metavar="ROW", help="networks; default all"
    )
    return parser


def main(args: argparse.Namespace) -> None:
    """Print peaks and ratios, and the table of published networks."""
    print(
        f"Swin-T, views and regions, batch {args.batch}, K {args.out_dim}, 2 + {args.local_crops} crops, {args.precision}:"
    )
    plain = peak_bytes("plain", args, args.batch)
    print(f"  {'plain':13} {plain / GB:6.2f} GB", flush=True)
    for side, target in TARGETS.items():
        peak = peak_bytes(side, args, args.batch)
        print(f"  {side:13} {peak / GB:6.2f} GB   {peak / plain:.2f} of plain (target: {target})", flush=True)
    if args.rows is None:
        return
    print(
        f"largest batch for {', '.join(map(str, CAPACITIES))} GB ({args.precision}, without and with --grad_checkpointing):"
    )
    for row in args.rows or ROWS:
        arch, overrides = ROWS[row].arch, ROWS[row].overrides
        lean, checkpointed = (largest_batches(args, side, arch=arch, overrides=overrides) for side in TARGETS)
        print(f"  {row:18}", "   ".join(f"{a:4} / {b:4}" for a, b in zip(lean, checkpointed)), flush=True)


if __name__ == "__main__":
    launch.run_script(lambda: main(get_args_parser().parse_args()))
