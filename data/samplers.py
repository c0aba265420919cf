"""`--sampler chunk`: shuffling with locality, for datasets on disks that read neighboring images faster.

The images are divided into chunks of neighbors. Each node always reads the same chunks, one after the other, and shuffles inside
each. Every second epoch it reads them in reverse order, so that the chunks still in its page cache come first.

Origin: the flag is that of microsoft/esvit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from distributed.collectives import get_world_size
from utils import UsageError

MAX_CHUNK = 10_000  # images


class ChunkSampler(Sampler[int]):
    """The indices of one process for an epoch: a function of (`seed`, epoch, `rank`) and the sizes.

    All processes get the same number. Each node leaves out at most one image a chunk, and the remainder after division by its
    processes.

    Args:
        length: images of the dataset.
        rank, world: rank and world size.
        per_node: processes of a node, which have consecutive ranks.
        chunk: maximum number of images of a chunk.
    """

    def __init__(
        self, length: int, rank: int, world: int, per_node: int, seed: int = 0, chunk: int = MAX_CHUNK
    ) -> None:
        nodes = world // per_node
        self.chunks_per_node = max(1, -(-length // (nodes * chunk)))
        chunks = nodes * self.chunks_per_node
        self.begins = np.arange(chunks + 1, dtype=np.int64) * length // chunks
        # Chunks of all nodes, in the same order each epoch.
        order = np.random.default_rng([seed % 2**64, 0]).permutation(chunks).reshape(nodes, -1)
        sizes = np.diff(self.begins)[order].sum(axis=1)
        self.chunks = order[rank // per_node]
        self.count = int(sizes.min()) // per_node
        self.local_rank, self.per_node = rank % per_node, per_node
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        left, passed = self.count, 0  # passed: images of this node so far, dealt to its processes in turn
        for chunk in self.chunks[:: -1 if self.epoch % 2 else 1]:
            generator = np.random.default_rng([self.seed % 2**64, 1, self.epoch, int(chunk)])
            images = self.begins[chunk] + generator.permutation(self.begins[chunk + 1] - self.begins[chunk])
            own = images[(self.local_rank - passed) % self.per_node :: self.per_node][:left]
            passed += len(images)
            left -= len(own)
            yield from own.tolist()


def processes_per_node() -> int:
    """Return the number of processes on each node from the environment of torchrun, Open MPI, Intel MPI or SLURM.

    Without such a variable all processes are assumed to be on one node.

    Raises:
        UsageError: the nodes have different numbers of processes.
    """
    world = get_world_size()
    names = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE")
    text = next((os.environ[name] for name in names if os.environ.get(name)), str(world))
    per_node = int(text) if text.isdecimal() else 0
    if not 0 < per_node <= world or world % per_node:
        raise UsageError(
            f"--sampler chunk needs the same number of processes on each node, {world} is not a multiple of {text}; "
            "use --sampler distributed"
        )
    return per_node
