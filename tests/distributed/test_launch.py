"""Launchers' environments, and scripts/pretrain_slurm.sh with stubs for SLURM's commands."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helpers.runs import free_port

from distributed import launch
from distributed.launch import ProcessInfo, process_info
from utils import UsageError

OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
PMI = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0"}
SLURM = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "2"}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*(name for names in launch.LAUNCHERS.values() for name in names), "MASTER_ADDR", "MASTER_PORT"]:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({}, ProcessInfo(0, 1, 0)),
        (TORCHRUN, ProcessInfo(3, 4, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, ProcessInfo(1, 2, 0)),
        (OPEN_MPI, ProcessInfo(5, 8, 1)),
        (PMI, ProcessInfo(2, 4, 0)),
        (SLURM, ProcessInfo(1, 2, 1)),
        (OPEN_MPI | TORCHRUN, ProcessInfo(3, 4, 2)),  # torchrun started by mpirun
        (OPEN_MPI | SLURM, ProcessInfo(5, 8, 1)),  # mpirun that starts itself through srun
        ({"PMI_RANK": "1", "PMI_SIZE": "2"} | SLURM, ProcessInfo(1, 2, 1)),  # srun --mpi=pmi2
        (
            {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"},
            ProcessInfo(0, 1, 0),
        ),  # a batch script
        (
            {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
            ProcessInfo(0, 1, 0),
        ),
    ],
)
def test_process_info(env: dict[str, str], place: ProcessInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in env.items():
        monkeypatch.setenv(name, text)
    assert process_info() == place


def test_local_rank_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    assert process_info(3) == ProcessInfo(0, 1, 3)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert process_info(1) == ProcessInfo(1, 2, 1)


@pytest.mark.parametrize(
    ("env", "words"),
    [
        (TORCHRUN | {"RANK": "x"}, "RANK=x, WORLD_SIZE=4, LOCAL_RANK=2 must be integers"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "8"}, "do not fit: ranks count from 0 to 7"),
        (PMI | {"PMI_SIZE": "-4"}, "PMI_SIZE=-4"),
    ],
)
def test_invalid_environment(env: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in env.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(UsageError, match=words):
        process_info()


@pytest.mark.parametrize("env", [OPEN_MPI, PMI, SLURM, TORCHRUN])
def test_rendezvous_needs_an_address(env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (env | {"MASTER_ADDR": "127.0.0.1"}).items():
        monkeypatch.setenv(name, text)
    args = argparse.Namespace(device="cpu", dist_url="env://", dist_timeout=1.0, local_rank=None)
    with pytest.raises(UsageError, match=r"processes need a rendezvous: .*\(MASTER_PORT not set\)"):
        launch.init_processes(args)


@pytest.mark.parametrize("rank", [0, 1])
def test_rendezvous_timeout(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    args = argparse.Namespace(device="cpu", dist_url="env://", dist_timeout=0.02, local_rank=None)
    with pytest.raises(
        UsageError, match=rf"process {rank} of 2 did not reach all others at 127.0.0.1:\d+ within 0.02 min"
    ):
        launch.init_processes(args)


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("nan"), float("inf")])
def test_invalid_timeout(minutes: float) -> None:
    with pytest.raises(UsageError, match="must be a positive number of minutes"):
        launch.init_processes(
            argparse.Namespace(device="cpu", dist_timeout=minutes, dist_url="env://", local_rank=None)
        )


def test_restarted_workers_do_not_read_stale_keys() -> None:
    """torchrun's store outlives the workers: it holds addresses of processes that no longer exist."""
    agent = torch.distributed.HashStore()  # type: ignore[attr-defined]
    minute = datetime.timedelta(minutes=1)
    seen: list[str] = []
    for world in (3, 2, 3, 1):
        with ThreadPoolExecutor(world) as pool:
            parts = [pool.submit(launch._fresh_store, agent, rank, world, minute) for rank in reversed(range(world))]
            stores = [part.result() for part in parts]
        assert not any(store.check(["address of 0"]) for store in stores)
        stores[-1].set("address of 0", f"here, in start {len(seen)}")
        seen.append(*{store.get("address of 0").decode() for store in stores})
    assert seen == [f"here, in start {start}" for start in range(4)]


def test_missing_worker_after_a_restart() -> None:
    agent = torch.distributed.HashStore()  # type: ignore[attr-defined]
    for rank in (0, 1):
        with pytest.raises(torch.distributed.DistStoreError, match="did not answer"):
            launch._fresh_store(agent, rank, 2, datetime.timedelta(seconds=0.05))


# --------------------------------------------------------------------------- SLURM

# The run: waits for USR1, writes the log line of an epoch, ends as it is output to.
SRUN = """#!/bin/bash
echo "$@" >> "$CALLS"
[ "$MASTER_ADDR" = node1 ] && [ "$MASTER_PORT" = 10042 ] || exit 9
finish() { sleep 0.3; echo "{\\"epoch\\": $EPOCH}" >> out/log.txt; exit "$CODE"; }
trap finish USR1
echo '{"args": {"epochs": 3}}' > out/run.json
touch started
[ -z "$AT_ONCE" ] || finish
for i in $(seq 200); do sleep 0.05; done
exit 8
"""
SCONTROL = '#!/bin/bash\n[ "$1" = show ] && printf "node1\\nnode2\\n" || echo "scontrol $@" >> "$CALLS"\n'


def submit(
    tmp_path: Path, *flags: str, signalled: bool = True, epoch: int = 0, code: int = 0
) -> tuple[int, str, list[str]]:
    """Exit code, what was printed, and the calls of srun and of scontrol requeue."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "out").mkdir(exist_ok=True)
    calls = tmp_path / "calls"
    calls.write_text("")
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls), "EPOCH": str(epoch)}
    env |= {"CODE": str(code), "AT_ONCE": "" if signalled else "1", "PYTHON": sys.executable, "ESVIT_ROOT": str(ROOT)}
    env |= {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "node[1-2]"}
    pipe = subprocess.PIPE
    command = ["bash", str(ROOT / "scripts/pretrain_slurm.sh"), *flags]
    job = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 10
    while signalled and not (tmp_path / "started").exists() and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    if signalled and job.poll() is None:
        job.send_signal(signal.SIGUSR1)
    output = job.communicate(timeout=30)[0]
    return job.returncode, output, calls.read_text().splitlines()


RUN = ["--output_dir", "out", "--arch", "swin_tiny"]


def test_job_out_of_time_goes_back_to_the_queue(tmp_path: Path) -> None:
    code, output, calls = submit(tmp_path, *RUN)
    assert code == 0, output
    assert calls == [
        f"--kill-on-bad-exit=1 {sys.executable} {ROOT}/main_esvit.py --output_dir out --arch swin_tiny",
        "scontrol requeue 42",
    ]
    assert json.loads((tmp_path / "out/log.txt").read_text()) == {"epoch": 0}  # it had time to save


def test_job_of_another_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRIPT", "main_udi.py")
    code, output, calls = submit(tmp_path, *RUN, signalled=False)
    assert code == 0, output
    assert calls == [f"--kill-on-bad-exit=1 {sys.executable} {ROOT}/main_udi.py --output_dir out --arch swin_tiny"]
    monkeypatch.setenv("SCRIPT", "main_of_tomorrow.py")
    code, output, calls = submit(tmp_path, *RUN, signalled=False)
    assert (code, calls) == (2, [])
    assert f"{ROOT} has no main_of_tomorrow.py" in output


@pytest.mark.parametrize(
    ("signalled", "epoch", "code"),
    [(True, 2, 0), (False, 2, 0), (False, 0, 0), (True, 0, 1), (False, 0, 1)],
    ids=["last epoch done", "ended by itself", "ended early without a signal", "failed to save", "failed"],
)
def test_job_that_is_not_requeued(tmp_path: Path, signalled: bool, epoch: int, code: int) -> None:
    exit_code, output, calls = submit(tmp_path, "--output_dir=out", signalled=signalled, epoch=epoch, code=code)
    assert exit_code == code, output
    assert len(calls) == 1
    assert ("main_esvit.py ended with code 1" in output) == (code == 1)


def test_job_without_a_folder(tmp_path: Path) -> None:
    code, output, calls = submit(tmp_path, "--arch", "swin_tiny", signalled=False)
    assert (code, calls) == (2, [])
    assert "--output_dir OUT is needed" in output


def test_error_is_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """So lines of several processes do not interleave, also where stderr is unbuffered."""
    writes: list[str] = []

    def fail() -> None:
        raise UsageError("the value 3 is not allowed")

    monkeypatch.setattr(sys, "stderr", argparse.Namespace(write=writes.append, flush=lambda: None))
    with pytest.raises(SystemExit) as exit_info:
        launch.run_script(fail)
    assert exit_info.value.code == 2
    assert [(text.count("\n"), "the value 3 is not allowed" in text) for text in writes] == [(1, True)]
