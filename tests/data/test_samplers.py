"""The chunk sampler: chunks per node, reversed every second epoch, in equal shares."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from helpers.image_files import whole, write_gray
from torch.utils.data import DataLoader

from data.datasets import build_dataset
from data.loader import Batch, build_train_loader, set_epoch
from data.samplers import ChunkSampler, processes_per_node
from utils import UsageError

GRID = [
    (100, 1, 1, 10),
    (103, 4, 2, 10),
    (1000, 8, 4, 16),
    (57, 3, 1, 7),
    (12, 4, 4, 100),
    (50, 6, 3, 5),
    (9, 8, 4, 10_000),
]


def epoch_of(length: int, world: int, per_node: int, chunk: int, epoch: int, seed: int = 0) -> list[list[int]]:
    shares = []
    for rank in range(world):
        sampler = ChunkSampler(length, rank, world, per_node, seed, chunk)
        sampler.set_epoch(epoch)
        shares.append(list(sampler))
        assert len(shares[-1]) == len(sampler)
    return shares


@pytest.mark.parametrize(("length", "world", "per_node", "chunk"), GRID)
def test_equal_disjoint_shares_of_nearly_all_images(length: int, world: int, per_node: int, chunk: int) -> None:
    nodes = world // per_node
    chunks_per_node = ChunkSampler(length, 0, world, per_node, 0, chunk).chunks_per_node
    for epoch in range(3):
        shares = epoch_of(length, world, per_node, chunk, epoch)
        assert len({len(share) for share in shares}) == 1
        seen = [index for share in shares for index in share]
        assert len(set(seen)) == len(seen)
        assert set(seen) <= set(range(length))
        assert length - len(seen) <= nodes * (chunks_per_node + per_node - 1)


@pytest.mark.parametrize(("length", "world", "per_node", "chunk"), GRID)
def test_chunks_stay_on_their_node_and_reverse(length: int, world: int, per_node: int, chunk: int) -> None:
    """The processes of a node read its chunks one after the other, in the next epoch in reverse order with a new shuffle."""
    begins = ChunkSampler(length, 0, world, per_node, 0, chunk).begins
    assert max(begins[1:] - begins[:-1]) <= chunk
    chunk_of = {index: c for c in range(len(begins) - 1) for index in range(begins[c], begins[c + 1])}
    orders: dict[tuple[int, int], list[int]] = {}
    for epoch in range(4):
        shares = epoch_of(length, world, per_node, chunk, epoch)
        for node in range(world // per_node):
            together = [index for step in zip(*shares[node * per_node : (node + 1) * per_node]) for index in step]
            order: list[int] = []
            for index in together:
                if not order or chunk_of[index] != order[-1]:
                    order.append(chunk_of[index])
            assert len(set(order)) == len(order)  # never back to a chunk that was left
            orders[epoch, node] = order
    for node in range(world // per_node):
        forwards, backwards = orders[0, node], orders[1, node][::-1]
        assert set(forwards) & set(backwards) or length < world
        common = [c for c in forwards if c in backwards]
        assert [c for c in backwards if c in forwards] == common
        assert (orders[0, node], orders[1, node]) == (orders[2, node], orders[3, node])
    owners = {c: {node for (_, node), order in orders.items() if c in order} for c in range(len(begins) - 1)}
    assert all(len(nodes) <= 1 for nodes in owners.values())


def test_pure_function_of_seed_and_epoch() -> None:
    assert epoch_of(100, 2, 1, 10, 3) == epoch_of(100, 2, 1, 10, 3)
    different = [epoch_of(100, 1, 1, 10, 0)[0], epoch_of(100, 1, 1, 10, 2)[0], epoch_of(100, 1, 1, 10, 0, seed=1)[0]]
    assert len({tuple(order) for order in different}) == 3
    assert all(sorted(order) == list(range(100)) for order in different)
    assert different[0][:10] != sorted(different[0][:10])


def test_processes_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.samplers.get_world_size", lambda: 8)
    for variable in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.delenv(variable, raising=False)
    assert processes_per_node() == 8
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    assert processes_per_node() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert processes_per_node() == 4
    for wrong in ("3", "0", "16", "4(x2)"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", wrong)
        with pytest.raises(UsageError, match="--sampler chunk needs the same number of processes on each node"):
            processes_per_node()


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_with_chunks(tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(11):
        write_gray(tmp_path / f"{i:02}.png", i)
    monkeypatch.setattr("data.loader.ChunkSampler", partial(ChunkSampler, chunk=4))
    loader: DataLoader[Batch] = build_train_loader(
        build_dataset(tmp_path, "train", whole), 3, workers, pin_memory=False, sampler="chunk"
    )
    for epoch in (0, 1):
        set_epoch(loader, epoch)
        seen = [index for batch in loader for index in batch.indices_B.tolist()]
        sampler = ChunkSampler(11, 0, 1, 1, chunk=4)
        sampler.set_epoch(epoch)
        assert seen == list(sampler)[:9]
