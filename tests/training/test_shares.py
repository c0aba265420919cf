"""What the processes of real runs see of an epoch: each image by exactly one of them, and the result that one process has."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helpers.runs import TINY_RUN, TINY_SWIN, clean_environment, free_port, run_script, write_images

from checkpoints import serialization
from data import convert
from data.samplers import ChunkSampler

pytestmark = pytest.mark.slow
IMAGES, BATCH, EPOCHS, CHUNK = 16, 4, 2, 3  # images; of a batch over all processes; epochs; images of a chunk, at most
RUN = [*TINY_RUN, "--epochs", str(EPOCHS), "--optimizer", "sgd", "--lr", "1.0", "--clip_grad", "0.3"]
NO_DROP_PATH = [*TINY_SWIN[:-1], "0.0"]

# main_esvit.py that writes the numbers of the images of each step to OUTPUT_DIR.seen.RANK. With small chunks; and in the order that
# the file SEEN says, where that is set.
RECORDING = """
import functools, os, pathlib, sys
sys.path.insert(0, ROOT)
import data.loader, main_esvit
from distributed import collectives, launch
from training import engine
args = main_esvit.get_args_parser().parse_args()
in_groups = engine.in_groups

def recording(batches, size):
    for group in in_groups(batches, size):
        with open(f"{args.output_dir}.seen.{collectives.get_rank()}", "a") as file:
            print(*(int(i) for batch in group for i in batch.indices_B), file=file)
        yield group

class Replay:
    def __init__(self, lines):
        self.lines = lines
    def set_epoch(self, epoch):
        half = len(self.lines) // EPOCHS
        self.order = [int(i) for line in self.lines[epoch * half:][:half] for i in line.split()]
    def __len__(self):
        return IMAGES
    def __iter__(self):
        return iter(self.order)

engine.in_groups = recording
data.loader.ChunkSampler = functools.partial(data.loader.ChunkSampler, chunk=CHUNK)
if "SEEN" in os.environ:
    lines = pathlib.Path(os.environ["SEEN"]).read_text().splitlines()
    data.loader._train_sampler = lambda *arguments: Replay(lines)
launch.run_script(lambda: main_esvit.main(args))
"""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", IMAGES)


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "recording.py"
    sizes = f"ROOT, IMAGES, EPOCHS, CHUNK = {str(ROOT)!r}, {IMAGES}, {EPOCHS}, {CHUNK}"
    path.write_text(f"{sizes}\n{RECORDING}")
    return str(path)


def flags(data_path: Path, out: Path, batch: int, *more: str) -> list[str]:
    own = ["--data_path", str(data_path), "--output_dir", str(out), "--batch_size_per_gpu", str(batch)]
    return [*RUN, *own, *more, *NO_DROP_PATH]


def seen(out: Path, rank: int) -> list[list[int]]:
    """The images of each epoch."""
    lines = Path(f"{out}.seen.{rank}").read_text().splitlines()
    assert len(lines) == EPOCHS * IMAGES // BATCH
    steps = [[int(number) for number in line.split()] for line in lines]
    each = IMAGES // BATCH
    return [list(chain.from_iterable(steps[epoch * each : (epoch + 1) * each])) for epoch in range(EPOCHS)]


def check_shares(out: Path) -> None:
    """Each image is seen by exactly one of two processes an epoch."""
    for first, second in zip(seen(out, 0), seen(out, 1), strict=True):
        assert len(first) == len(second)
        assert sorted(first + second) == list(range(IMAGES))


def check_same_result(one: Path, other: Path) -> None:
    """Losses and weights; up to rounding, since sums are taken in another order."""
    ours, theirs = ([json.loads(line)["train_loss"] for line in (run / "log.txt").open()] for run in (one, other))
    assert ours == pytest.approx(theirs, rel=1e-5)
    one_state, other_state = (serialization.load_file(run / "checkpoint.pth") for run in (one, other))
    for part in ("student", "teacher", "dino_loss"):
        for name, value in one_state[part].items():
            torch.testing.assert_close(other_state[part][name], value, rtol=1e-4, atol=1e-5, msg=f"{part} {name}")


def test_shards_on_two_processes(images: Path, script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process that reads the same images from the folder, in the order in which the two had them, ends with their network."""
    source = [str(images), str(tmp_path / "shards"), "--to", "shards", "--shard_images", "5"]
    convert.main(convert.get_args_parser().parse_args(source))
    two = flags(tmp_path / "shards", tmp_path / "two", BATCH // 2, "--shuffle_buffer", "3", "--num_workers", "1")
    result = run_script(script, *two, processes=2)
    assert result.returncode == 0, result.stderr
    check_shares(tmp_path / "two")
    first, second = seen(tmp_path / "two", 0)
    assert first != second

    steps = [Path(f"{tmp_path}/two.seen.{rank}").read_text().splitlines() for rank in (0, 1)]
    (tmp_path / "order").write_text("".join(f"{ours} {theirs}\n" for ours, theirs in zip(*steps, strict=True)))
    monkeypatch.setenv("SEEN", str(tmp_path / "order"))
    result = run_script(script, *flags(images, tmp_path / "one", BATCH))
    assert result.returncode == 0, result.stderr
    check_same_result(tmp_path / "one", tmp_path / "two")


def test_chunks_on_two_processes_of_a_node(images: Path, script: str, tmp_path: Path) -> None:
    """They take turns in the order that one process has, so its batches are theirs together."""
    for run, processes in (("one", 0), ("two", 2)):
        command = flags(images, tmp_path / run, BATCH // max(processes, 1), "--sampler", "chunk")
        result = run_script(script, *command, processes=processes)
        assert result.returncode == 0, result.stderr
    check_shares(tmp_path / "two")
    for alone, first, second in zip(
        *(seen(tmp_path / run, rank) for run, rank in (("one", 0), ("two", 0), ("two", 1)))
    ):
        assert alone == [index for step in zip(first, second) for index in step]
    check_same_result(tmp_path / "one", tmp_path / "two")


def test_chunks_on_two_nodes(images: Path, script: str, tmp_path: Path) -> None:
    """Two agents of one process each: a node keeps its whole chunks, and goes through them backwards in the second epoch."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc_per_node=1",
        "--master_addr=127.0.0.1",
    ]
    command += [f"--master_port={free_port()}"]
    own = flags(images, tmp_path / "nodes", BATCH // 2, "--sampler", "chunk")
    nodes = [
        subprocess.Popen(
            [*command, f"--node_rank={node}", script, *own],
            cwd=ROOT, env=clean_environment(), stderr=subprocess.PIPE, text=True,
        )
        for node in (0, 1)
    ]  # fmt: skip
    errors = [node.communicate(timeout=120)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], errors
    check_shares(tmp_path / "nodes")
    for node in (0, 1):
        sampler = ChunkSampler(IMAGES, node, 2, 1, seed=0, chunk=CHUNK)
        orders = []
        for epoch, images_of_epoch in enumerate(seen(tmp_path / "nodes", node)):
            sampler.set_epoch(epoch)
            assert images_of_epoch == list(sampler)
            chunks = (sampler.begins.searchsorted(images_of_epoch, side="right") - 1).tolist()
            orders.append(list(dict.fromkeys(chunks)))
            assert chunks == sorted(chunks, key=orders[-1].index)  # each of them in one go
        assert orders[0] == orders[1][::-1]
        assert len(orders[0]) > 1
