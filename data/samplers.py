"""Shuffling that disks like: images that lie beside each other are read at about the same time, by one node.

The images are cut into chunks of neighbors. A node always gets the same whole chunks, reads one after the other, and shuffles
inside each; every other epoch it goes through them backwards, so that what it read last, and still has in memory, comes first.

Origin: this project's own; `--sampler chunk` is a flag of microsoft/esvit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from distributed.collectives import get_world_size
from utils import UsageError

CHUNK = 10_000  # images, at most


class ChunkSampler(Sampler[int]):
    """One process's images of an epoch: a function of (`seed`, epoch, `rank`) and the sizes alone.

    All processes get the same number; of each node up to one image a chunk, and what does not divide by its processes, is left out.

    Args:
        length: images of the data set.
        rank, world: of this process.
        per_node: processes of a node; ranks of a node follow each other.
        chunk: images of a chunk, at most.
    """

    def __init__(self, length: int, rank: int, world: int, per_node: int, seed: int = 0, chunk: int = CHUNK) -> None:
        nodes = world // per_node
        self.chunks_per_node = max(1, -(-length // (nodes * chunk)))
        chunks = nodes * self.chunks_per_node
        self.begins = np.arange(chunks + 1, dtype=np.int64) * length // chunks
        order = np.random.default_rng([seed % 2**64, 0]).permutation(
            chunks
        )  # of all nodes' chunks, the same each epoch
        sizes = np.diff(self.begins)[order.reshape(nodes, -1)].sum(axis=1)
        self.chunks = order.reshape(nodes, -1)[rank // per_node]
        self.count = int(sizes.min()) // per_node
        self.place, self.per_node = rank % per_node, per_node
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        left, passed = self.count, 0  # passed: images of the node so far, which its processes take in turns
        for chunk in self.chunks[:: -1 if self.epoch % 2 else 1]:
            generator = np.random.default_rng([self.seed % 2**64, 1, self.epoch, int(chunk)])
            images = self.begins[chunk] + generator.permutation(self.begins[chunk + 1] - self.begins[chunk])
            mine = images[(self.place - passed) % self.per_node :: self.per_node][:left]
            passed += len(images)
            left -= len(mine)
            yield from mine.tolist()


def processes_per_node() -> int:
    """As torchrun, Open MPI, Intel MPI or SLURM says; else all processes are on one node.

    Raises:
        UsageError: the nodes have different numbers of processes.
    """
    world = get_world_size()
    names = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE")
    text = next((os.environ[name] for name in names if os.environ.get(name)), str(world))
    per_node = int(text) if text.isdecimal() else 0
    if not 0 < per_node <= world or world % per_node:
        raise UsageError(
            f"--sampler chunk needs as many processes on each node, {world} are not a multiple of {text}; use distributed"
        )
    return per_node
