"""Write sharded states as one file: memory of the main process, a disk that fills up meanwhile, and moments loaded again.

    torchrun --nproc_per_node=2 tests/soak/write_shards.py FOLDER

Prints a line for each; the first difference ends all processes with code 1.
"""

import errno
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.distributed.tensor import DTensor, Shard, distribute_tensor  # noqa: E402

import main_esvit  # noqa: E402
from checkpoints import serialization, sharded  # noqa: E402
from distributed import collectives, fsdp, launch  # noqa: E402
from training import checkpointing  # noqa: E402

COUNT, ROWS, COLUMNS = 100, 500, 1001  # 200 MB
TENSOR_KB = ROWS * COLUMNS * 4 / 1024


def main() -> None:
    launch.init_processes(main_esvit.get_args_parser().parse_args(["--device", "cpu"]))
    path = Path(sys.argv[1]) / "checkpoint.pth"
    for check in (check_memory, check_full_disk, check_copies):
        check(path)
        if collectives.is_main_process():
            print(f"{check.__name__}: holds", flush=True)


def build_state() -> dict[str, Any]:
    """Return plain values and sharded tensors, each full of its number."""
    mesh = fsdp.build_mesh("cpu", 0)
    state: dict[str, Any] = {"epoch": 3, "rng": torch.arange(5)}
    for number in range(COUNT):
        rows = collectives.get_world_size() + 1 if number == 0 else ROWS  # shards of different sizes
        whole = torch.full((rows, COLUMNS), float(number))
        state[f"weight{number}"] = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None).clone()
    return state


def save(state: dict[str, Any], path: Path, limit: int | None = None) -> str:
    """Save a state; writing fails at the tensor with the number `limit`."""
    with sharded.gathered(state) as tensors:
        assert tensors is not None
        limited = limit_file(tensors, limit)
        return checkpointing.write(state, path, 1, limited) if collectives.is_main_process() else ""


def limit_file(tensors: Iterator[torch.Tensor], limit: int | None) -> Iterator[torch.Tensor]:
    """Limit the size of files to half of what is written when the tensor with the number `limit` is asked for."""
    for number, tensor in enumerate(tensors):
        if number == limit:
            most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (number // 2 * ROWS * COLUMNS * 4, most))
        yield tensor


def check_memory(path: Path) -> None:
    """The peak of the process grows by a few tensors, not by all; the file is whole, checksums included."""
    state = build_state()
    assert save({"weight": state["weight0"]}, path) == ""  # imports what it needs
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert save(state, path) == ""
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / TENSOR_KB
    assert grown < COUNT / 4, f"the peak grew by {grown:.1f} tensors of {COUNT}"
    collectives.must_agree("saves", 0)
    loaded = serialization.load_file(path)
    assert list(loaded) == list(state)
    assert loaded["epoch"] == 3
    assert torch.equal(loaded["rng"], torch.arange(5))
    for number in range(COUNT):
        tensor = loaded[f"weight{number}"]
        assert tensor.shape == state[f"weight{number}"].shape
        assert bool((tensor == number).all()), number
    collectives.must_agree("saves", 0)


def check_full_disk(path: Path) -> None:
    """A save that fails in the middle leaves the previous file, and all processes go on to the next save."""
    state = build_state()
    before = path.read_bytes() if collectives.is_main_process() else b""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    failure = save(state, path, limit=COUNT // 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if collectives.is_main_process():
        assert os.strerror(errno.EFBIG) in failure, failure
        assert path.read_bytes() == before
        assert not list(path.parent.glob(".*")), "a temporary file is left"
    assert save(state, path) == ""


def check_copies(path: Path) -> None:
    """A shard of a loaded tensor does not keep the whole one in memory."""
    own = build_state()["weight2"]
    shard = fsdp.shard_like(own, serialization.load_file(path)["weight2"])
    assert isinstance(shard, DTensor)
    assert torch.equal(shard.to_local(), own.to_local())
    assert shard.to_local().untyped_storage().nbytes() == own.to_local().nbytes


if __name__ == "__main__":
    launch.run_script(main)
