"""main_esvit_mnodes.py: the arguments for torchrun, and usage errors."""

from __future__ import annotations

import pytest
import torch.distributed.run

import main_esvit_mnodes
from main_esvit_mnodes import SCRIPT, torchrun_arguments
from utils import UsageError

MEET = {"MASTER_ADDR": "node0", "MASTER_PORT": "29501"}
OWN = ["--arch", "swin_tiny", "--local_crops_number", "2", "6", "--local_crops_size", "96", "64", "--", "MODEL.X", "3"]


@pytest.mark.parametrize(
    ("flags", "env", "where"),
    [
        ("", {}, "--nnodes 1 --nproc_per_node 8 --standalone"),
        (
            "--num_gpus_per_node 2",
            {"MASTER_PORT": "77"},
            "--nnodes 1 --nproc_per_node 2 --node_rank 0 --master_addr 127.0.0.1 --master_port 77",
        ),
        (
            "--num_nodes=4 --node_rank 3",
            MEET | {"OMPI_COMM_WORLD_RANK": "1"},  # the flag takes precedence
            "--nnodes 4 --nproc_per_node 8 --node_rank 3 --master_addr node0 --master_port 29501",
        ),
        (
            "--num_nodes 2 --num_gpus_per_node 1",
            MEET | {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
            "--nnodes 2 --nproc_per_node 1 --node_rank 1 --master_addr node0 --master_port 29501",
        ),
    ],
)
def test_arguments_for_torchrun(flags: str, env: dict[str, str], where: str) -> None:
    """Node flags may be anywhere before --; all other words are passed unchanged and in order."""
    expected = [*where.split(), str(SCRIPT), *OWN]
    assert torchrun_arguments([*flags.split(), *OWN], env) == expected
    assert torchrun_arguments([*OWN[:2], *flags.split(), *OWN[2:]], env) == expected


def test_torchrun_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr(torch.distributed.run, "main", called.append)
    main_esvit_mnodes.main(["--data_path", "a folder; rm -r x"], {})
    assert called[0][-2:] == ["--data_path", "a folder; rm -r x"]  # one word: no shell reads it


@pytest.mark.parametrize(
    ("flags", "env", "words"),
    [
        ("--num_nodes 2", MEET, "--num_nodes 2 needs --node_rank"),
        ("--num_nodes 2 --node_rank 2", MEET, r"--node_rank 2 must lie in 0..1"),
        ("--node_rank 1", {}, r"--node_rank 1 must lie in 0..0"),
        ("--num_nodes 2 --node_rank 0", {}, r"MASTER_ADDR and MASTER_PORT not set"),
        ("--num_nodes 2 --node_rank 0", {"MASTER_ADDR": "a"}, r"\(MASTER_PORT not set\)"),
        ("--num_nodes 2 --node_rank 0", MEET | {"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is not a port"),
        ("--num_nodes 2", MEET | {"OMPI_COMM_WORLD_RANK": "one"}, "OMPI_COMM_WORLD_RANK=one is not a number"),
        (
            "--num_nodes 2",
            MEET | {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "16"},
            "mpirun started 16 processes for --num_nodes 2; start one a node",
        ),
    ],
)
def test_mistakes(flags: str, env: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        torchrun_arguments(flags.split(), env)


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    with pytest.raises(UsageError, match="--num_gpus_per_node 8, but this machine has 4 GPUs"):
        torchrun_arguments([], {})
    assert "--standalone" in torchrun_arguments(["--device", "cpu"], {})


def test_unknown_flag_ends_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        torchrun_arguments(["--num_node", "2"], {})
    assert "did you mean --num_nodes" in capsys.readouterr().err
