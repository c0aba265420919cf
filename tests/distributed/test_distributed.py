"""Several processes give what one gives with the whole batch, and what a death of one does to the others."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.run
from conftest import ROOT
from helpers.confusions import assert_confusions_fit, read_confusions
from helpers.runs import TINY_RUN, TINY_SWIN, free_port, run_script, start_script, write_images

from checkpoints import serialization

pytestmark = pytest.mark.slow
SAME_RUN = [
    *TINY_RUN,
    "--epochs",
    "2",
    "--clip_grad",
    "0.3",
    "--momentum_teacher",
    "0.9",
    "--optimizer",
    "sgd",
    "--lr",
    "1.0",
]


def losses_of(run: Path) -> list[float]:
    return [json.loads(line)["train_loss"] for line in (run / "log.txt").open()]


@pytest.mark.parametrize(
    ("dense", "extra"), [("on", []), ("off", []), ("on", ["--centering", "sinkhorn", "--koleo_weight", "0.1"])]
)
def test_several_processes_equal_one(tmp_path: Path, dense: str, extra: list[str]) -> None:
    """Losses, centers and weights; the images are read from disk by the real loader, 17 of them so that one is left over.

    SGD, because Adam divides rounding errors of tiny gradients by their own size.
    """
    images = write_images(tmp_path / "images", 17)
    no_drop_path = [*TINY_SWIN[:-1], "0.0"]
    runs = {"one": (0, 8), "two": (2, 4)} | ({"four": (4, 2)} if dense == "on" and not extra else {})
    for run, (processes, batch) in runs.items():
        flags = ["--use_dense_prediction", dense, "--batch_size_per_gpu", str(batch), "--data_path", str(images)]
        flags += ["--output_dir", str(tmp_path / run)]
        result = run_script("main_esvit.py", *SAME_RUN, *extra, *flags, *no_drop_path, processes=processes)
        assert result.returncode == 0, result.stderr
    one, *others = (serialization.load_file(tmp_path / run / "checkpoint.pth") for run in runs)
    for run, many in zip(list(runs)[1:], others):
        assert losses_of(tmp_path / run) == pytest.approx(losses_of(tmp_path / "one"), rel=1e-5)
        for part in ("dino_loss", "student", "teacher"):
            assert one[part].keys() == many[part].keys()
            for name, value in one[part].items():
                torch.testing.assert_close(many[part][name], value, rtol=1e-4, atol=1e-5, msg=f"{run} {part} {name}")
        assert len(many["rng"]) == runs[run][0]
        assert not torch.equal(many["rng"][0]["torch"], many["rng"][1]["torch"])  # each rank draws its own numbers


def test_knn_of_two_processes_equals_one(tmp_path: Path) -> None:
    """Features of an odd number of images, without doubles or losses, in the data set's order."""
    for split, count in (("train", 5), ("val", 3)):
        write_images(tmp_path / "images" / split, count, classes=3, seed=len(split))
    flags = ["--arch", "swin", "--cfg", "experiments/demo/swin_micro.yaml", "--device", "cpu", "--num_workers", "0"]
    flags += ["--data_path", str(tmp_path / "images"), "--batch_size_per_gpu", "4", "--nb_knn", "1", "3"]
    outputs = []
    for run, processes in (("one", 0), ("two", 2)):
        result = run_script(
            "eval_knn.py",
            "--random_weights",
            *flags,
            "--dump_features",
            str(tmp_path / run),
            "--output_dir",
            str(tmp_path / run),
            *TINY_SWIN,
            processes=processes,
        )
        assert result.returncode == 0, result.stderr
        outputs.append([line for line in result.stdout.splitlines() if "Top1" in line])
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == 2
    for run in ("one", "two"):
        assert_confusions_fit(tmp_path / run, "knn")
    assert read_confusions(tmp_path / "one", "knn") == read_confusions(tmp_path / "two", "knn")
    for name, rows in (("trainfeat", 15), ("testfeat", 9), ("trainlabels", 15), ("testlabels", 9)):
        one, two = (serialization.load_tensor(tmp_path / run / f"{name}.pth") for run in ("one", "two"))
        assert len(one) == rows
        torch.testing.assert_close(one, two)


def test_accumulation_and_batch_norm_heads_resume_on_two_processes(tmp_path: Path) -> None:
    """Two epochs in one go and with a stop between end with the same weights, bit for bit, on both processes."""
    images = write_images(tmp_path / "images", 17)
    flags = [
        *TINY_RUN,
        "--data_path",
        str(images),
        "--batch_size_per_gpu",
        "2",
        "--accum_iter",
        "2",
        "--use_bn_in_head",
        "on",
    ]
    for run, epochs in (("whole", ["2"]), ("parts", ["1", "2"])):
        for last in epochs:
            # The schedules depend on --epochs: keep them flat, so that a shorter first part is the same run.
            flat = ["--epochs", last, "--lr", "0.1", "--min_lr", str(0.1 * 8 / 256)]
            flat += ["--weight_decay_end", "0.04", "--momentum_teacher", "1"]
            result = run_script(
                "main_esvit.py", *flags, *flat, "--output_dir", str(tmp_path / run), *TINY_SWIN, processes=2
            )
            assert result.returncode == 0, result.stderr
    whole, parts = (serialization.load_file(tmp_path / run / "checkpoint.pth") for run in ("whole", "parts"))
    assert all(key.startswith("module.") for key in whole["teacher"])  # wrapped, as published for BatchNorm networks
    for part in ("student", "teacher", "dino_loss"):
        for name, value in whole[part].items():
            assert torch.equal(parts[part][name], value), f"{part} {name}"


def test_mistake_on_two_processes_ends_both(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 17)
    (images / "003.png").write_bytes(b"no image")
    flags = [*TINY_RUN, "--data_path", str(images), "--output_dir", str(tmp_path / "out")]
    result = run_script("main_esvit.py", *flags, *TINY_SWIN, processes=2, timeout=90)
    assert result.returncode != 0
    assert "1 of 17 images cannot be read, more than 1 %" in result.stderr


def test_old_launcher_flag_is_taken(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 4)
    flags = [*TINY_RUN, "--epochs", "1", "--data_path", str(images), "--output_dir", str(tmp_path / "out")]
    result = run_script("main_esvit.py", "--local-rank=0", *flags, *TINY_SWIN)
    assert result.returncode == 0, result.stderr


def test_srun_variables_make_a_group(tmp_path: Path) -> None:
    """Two plain processes with the variables that srun sets."""
    images = write_images(tmp_path / "images", 8)
    flags = [*TINY_RUN, "--epochs", "1", "--data_path", str(images), "--output_dir", str(tmp_path / "out"), *TINY_SWIN]
    shared = {"SLURM_STEP_NUM_TASKS": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in (0, 1)]
    processes = [start_script("main_esvit.py", *flags, env=shared | rank) for rank in ranks]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert serialization.load_file(tmp_path / "out" / "checkpoint.pth")["world_size"] == 2
    assert errors[1].count("epoch 0/1") == 0  # only the main process tells


def test_rows_are_gathered_from_processes_without_any(tmp_path: Path) -> None:
    script = tmp_path / "gather.py"
    script.write_text(
        "import argparse, sys, torch\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from distributed import collectives, launch\n"
        "def main():\n"
        "    launch.init_processes(argparse.Namespace(device='cpu', dist_url='env://', dist_timeout=1, local_rank=None))\n"
        "    rows = torch.zeros(0) if collectives.get_rank() else torch.tensor([[1, 2], [3, 4]])\n"
        "    assert torch.cat([part.view(-1, 2) for part in collectives.all_gather_rows(rows)]).tolist() == [[1, 2], [3, 4]]\n"
        "    collectives.must_agree('numbers', 3)\n"
        "    collectives.must_agree('ranks', collectives.get_rank())\n"
        "launch.run_script(main)\n"
    )
    result = run_script(str(script), processes=2)
    assert "gather.py: error: the processes see different ranks ([0, 1])" in result.stderr
    assert "gather.py: error (process 1): the processes see different ranks ([0, 1])" in result.stderr
    assert result.returncode == 1  # torchrun's own
    assert "exitcode  : 2" in result.stderr


def test_linear_probe_of_several_processes_equals_one(tmp_path: Path) -> None:
    """Losses and scores; nine images of each part do not divide by the processes, some of which have none in the last step."""
    for split, count in (("train", 3), ("val", 3)):
        write_images(tmp_path / "images" / split, count, classes=3, seed=len(split))
    flags = ["--arch", "swin", "--cfg", "experiments/demo/swin_micro.yaml", "--device", "cpu", "--num_workers", "0"]
    flags += [
        "--random_weights",
        "--data_path",
        str(tmp_path / "images"),
        "--epochs",
        "2",
        "--lr",
        "0.1",
        "--n_last_blocks",
        "2",
    ]
    logs = []
    for processes, batch in ((0, 4), (2, 2), (4, 1)):
        run = tmp_path / str(processes)
        own = ["--batch_size_per_gpu", str(batch), "--output_dir", str(run)]
        result = run_script("eval_linear.py", *flags, *own, *TINY_SWIN, processes=processes)
        assert result.returncode == 0, result.stderr
        logs.append([json.loads(line) for line in (run / "log.txt").open()])
    for log in logs:
        assert len(log) == 2
        for name in ("train_loss", "test_loss", "test_acc1", "test_acc5"):
            assert [line[name] for line in log] == pytest.approx([line[name] for line in logs[0]], rel=1e-4), name


# Gradients of processes against those of one that does their parts one after the other, on the same random numbers.
PARTS = """
import sys, torch
sys.path.insert(0, ROOT)
import main_esvit, utils
from distributed import collectives, launch
from models import load_arch_config
args = main_esvit.get_args_parser().parse_args(sys.argv[1:])

def build():
    utils.seed_everything(0)
    return main_esvit.build_method(args, load_arch_config(args.arch, args.cfg, args.opts, 0.0), torch.device("cpu"))

def backward(method, rank):
    utils.seed_everything(100 + rank)
    views = [torch.randn(4, 3, size, size) for size in (32, 32, 16, 16)]
    loss = method.compute_loss(views, 0)[0]
    loss.backward()
    method.criterion.update_center(torch.tensor(True))
    return loss.item()

def main():
    launch.init_processes(args)
    world, rank = collectives.get_world_size(), collectives.get_rank()
    method = build()
    loss = backward(method, rank)
    losses = collectives.all_gather_objects(loss)
    theirs = {name.removeprefix("module."): p.grad for name, p in method.student.named_parameters()}
    torch.distributed.destroy_process_group()
    sums, alone = {}, []
    for part in range(world):
        one = build()
        alone.append(backward(one, part))
        for name, p in one.student.named_parameters():
            if p.grad is not None:
                sums[name] = sums.get(name, 0) + p.grad / world
    assert losses == alone and len(set(losses)) == world, (losses, alone)
    assert sums.keys() == {name for name, grad in theirs.items() if grad is not None}
    for name, grad in sums.items():
        torch.testing.assert_close(theirs[name], grad, rtol=1e-4, atol=1e-6, msg=name)
    print("equal", len(sums))
launch.run_script(main)
"""


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("what", ["mixup", "batch_norm"])
def test_gradients_are_means_over_processes(tmp_path: Path, what: str, processes: int) -> None:
    """Mixup mixes images of one process; on the CPU BatchNorm sees those of one process (on CUDA those of all)."""
    script = tmp_path / "parts.py"
    script.write_text(PARTS.replace("ROOT", repr(str(ROOT))))
    own = {"mixup": ["--use_mixup", "on", "--num_mixup_views", "4"], "batch_norm": ["--use_bn_in_head", "on"]}[what]
    result = run_script(str(script), *TINY_RUN, *own, *TINY_SWIN, processes=processes)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("equal") == processes


# main_esvit.py in which process 1, or a worker of its loader, dies in epoch 1, the first time.
DYING = """
import os, pathlib, signal, sys
sys.path.insert(0, ROOT)
import data.datasets, main_esvit
from distributed import launch
from training.step import TrainStep
marker, how = pathlib.Path(os.environ["MARKER"]), os.environ["HOW"]
step, sample = TrainStep.__call__, data.datasets.ImageDataset.__getitem__

def die(epoch):
    if epoch == 1 and os.environ["RANK"] == os.environ.get("VICTIM", "1") and not marker.exists():
        marker.touch()
        if "kill" in how or "stop" in how:
            os.kill(os.getpid(), signal.SIGKILL if "kill" in how else signal.SIGSTOP)
        raise RuntimeError("this process dies")

def dying_step(self, views, iteration, epoch, **more):
    die(epoch)
    return step(self, views, iteration, epoch, **more)

def dying_sample(self, index):
    die(self.epoch)
    return sample(self, index)
if "worker" in how:
    data.datasets.ImageDataset.__getitem__ = dying_sample
else:
    TrainStep.__call__ = dying_step
launch.run_script(lambda: main_esvit.main(main_esvit.get_args_parser().parse_args()))
"""


@pytest.fixture
def dying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    script = tmp_path / "dying.py"
    script.write_text(DYING.replace("ROOT", repr(str(ROOT))))
    monkeypatch.setenv("MARKER", str(tmp_path / "died"))
    return str(script)


@pytest.mark.parametrize("how", ["raise", "kill"])
@pytest.mark.parametrize("launcher", ["torchrun", "none"])
def test_death_of_one_ends_the_others(
    tmp_path: Path, dying: str, how: str, launcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a minute of it, and saying why."""
    monkeypatch.setenv("HOW", how)
    images = write_images(tmp_path / "images", 8)
    flags = [*TINY_RUN, "--data_path", str(images), "--output_dir", str(tmp_path / "out"), *TINY_SWIN]
    if launcher == "torchrun":
        result = run_script(dying, *flags, processes=2)
        codes, told = [result.returncode], result.stderr
    else:
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        processes = [start_script(dying, *flags, env=shared | {"RANK": str(rank)}) for rank in (0, 1)]
        told = "".join(process.communicate(timeout=120)[1] for process in processes)
        codes = [process.returncode for process in processes]
    assert time.time() - (tmp_path / "died").stat().st_mtime < 60
    assert 0 not in codes
    if how == "raise":
        assert "RuntimeError: this process dies" in told
        assert "Traceback" in told
    elif launcher == "torchrun":
        assert "Signal 9 (SIGKILL) received" in told
    else:
        assert codes == [1, -9]


@pytest.mark.parametrize(("how", "victim"), [("kill", 1), ("kill", 0), ("stop", 1)])
def test_missing_process_is_named_in_one_sentence(
    tmp_path: Path, dying: str, how: str, victim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the one that held the store where all met; one that is stopped is missed after --dist_timeout."""
    monkeypatch.setenv("HOW", how)
    monkeypatch.setenv("VICTIM", str(victim))
    images = write_images(tmp_path / "images", 8)
    wait = ["--dist_timeout", "0.2" if how == "stop" else "30"]
    flags = [*TINY_RUN, *wait, "--data_path", str(images), "--output_dir", str(tmp_path / "out"), *TINY_SWIN]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [start_script(dying, *flags, env=shared | {"RANK": str(rank)}) for rank in (0, 1)]
    _, told = processes[1 - victim].communicate(timeout=120)
    waited = time.time() - (tmp_path / "died").stat().st_mtime
    processes[victim].kill()
    processes[victim].communicate()
    assert processes[1 - victim].returncode == 1
    assert "Traceback" not in told
    (sentence,) = [line for line in told.splitlines() if line.startswith("dying.py: error")]
    assert f"process {victim} of 2 (pid {processes[victim].pid} on {socket.gethostname()})" in sentence
    assert ("0.2 minutes of --dist_timeout" in sentence) == (how == "stop")
    assert (12 if how == "stop" else 0) <= waited < 60


@pytest.mark.parametrize("how", ["worker raises", "worker is killed"])
def test_death_of_a_loader_worker_ends_all(
    tmp_path: Path, dying: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its error is no image that cannot be read; the traceback tells where it was, or which signal."""
    monkeypatch.setenv("HOW", how)
    images = write_images(tmp_path / "images", 8)
    flags = [*TINY_RUN, "--num_workers", "1", "--data_path", str(images), "--output_dir", str(tmp_path / "out")]
    result = run_script(dying, *flags, *TINY_SWIN, processes=2)
    assert time.time() - (tmp_path / "died").stat().st_mtime < 60
    assert result.returncode != 0
    words = (
        "RuntimeError: Caught RuntimeError in DataLoader worker process 0" if "raises" in how else "killed by signal"
    )
    assert words in result.stderr
    assert ("RuntimeError: this process dies" in result.stderr) == ("raises" in how)


def test_killed_worker_is_restarted_from_its_checkpoint(
    tmp_path: Path, dying: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun --max-restarts, on two nodes, of which each counts its own; the run ends as one that nothing happened to."""
    monkeypatch.setenv("HOW", "kill")
    images = write_images(tmp_path / "images", 8)
    for run in ("killed", "whole"):  # the second finds the marker of the first
        flags = [*TINY_RUN, "--data_path", str(images), "--output_dir", str(tmp_path / run), *TINY_SWIN]
        where = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}"]
        line = [torch.distributed.run.__file__, *where, "--max-restarts=1", dying, *flags]
        nodes = [start_script(*line, env={}) for _ in range(2)]
        errors = [node.communicate(timeout=180)[1] for node in nodes]
        assert [node.returncode for node in nodes] == [0, 0], errors
        assert ("at epoch 1" in "".join(errors)) == (run == "killed")
    equal_checkpoints(tmp_path / "killed", tmp_path / "whole")


def test_two_nodes_equal_two_processes(tmp_path: Path) -> None:
    """main_esvit_mnodes.py as two nodes of one process each, as one node of two, and plain torchrun."""
    images = write_images(tmp_path / "images", 8)

    def flags(run: str) -> list[str]:
        own = ["--data_path", str(images), "--output_dir", str(tmp_path / run)]
        return [*TINY_RUN, "--epochs", "1", *own, *TINY_SWIN]

    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    nodes = ["--num_nodes", "2", "--num_gpus_per_node", "1"]
    first = start_script("main_esvit_mnodes.py", *nodes, "--node_rank", "0", *flags("nodes"), env=meet)
    second = start_script("main_esvit_mnodes.py", *nodes, *flags("nodes"), env=meet | {"OMPI_COMM_WORLD_RANK": "1"})
    errors = [node.communicate(timeout=120)[1] for node in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], errors
    one_node = run_script("main_esvit_mnodes.py", "--num_gpus_per_node", "2", *flags("node"))
    assert one_node.returncode == 0, one_node.stderr
    plain = run_script("main_esvit.py", *flags("plain"), processes=2)
    assert plain.returncode == 0, plain.stderr
    for run in ("nodes", "node"):
        equal_checkpoints(tmp_path / run, tmp_path / "plain")


def equal_checkpoints(one: Path, other: Path) -> None:
    """The same weights and centers of two processes, bit for bit."""
    ours, theirs = (serialization.load_file(folder / "checkpoint.pth") for folder in (one, other))
    assert (ours["world_size"], ours["epoch"]) == (theirs["world_size"], theirs["epoch"])
    assert ours["world_size"] == 2
    for part in ("student", "teacher", "dino_loss"):
        for name, value in theirs[part].items():
            assert torch.equal(ours[part][name], value), f"{part} {name}"


def test_mpi_variables_make_a_group(tmp_path: Path) -> None:
    """Two plain processes, one of them described as Open MPI does it, the other as Intel MPI."""
    images = write_images(tmp_path / "images", 8)
    flags = [*TINY_RUN, "--epochs", "1", "--data_path", str(images), "--output_dir", str(tmp_path / "out"), *TINY_SWIN]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    places = [
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
        {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1"},
    ]
    processes = [start_script("main_esvit.py", *flags, env=shared | place) for place in places]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert serialization.load_file(tmp_path / "out" / "checkpoint.pth")["world_size"] == 2


# Process 1 is done while an exchange goes on that it does not wait for; its end holds the interpreter's lock until that is over.
LATE = """
import argparse, atexit, os, pathlib, sys, time
ending = pathlib.Path(os.environ["MARKER"])
if os.environ["RANK"] == "1":  # what is registered first is called last
    atexit.register(sum, range(6 * 10**7))
    atexit.register(ending.touch)
sys.path.insert(0, ROOT)
import torch, torch.distributed as dist
import utils
from distributed import collectives, launch
args = argparse.Namespace(device="cpu", dist_url="env://", dist_timeout=1, local_rank=None)
kept = []

def main():
    launch.init_processes(args)
    kept.append(dist.group.WORLD)  # as the meshes of sharded networks do
    while collectives.get_rank() == 0 and not ending.exists():
        time.sleep(0.01)
    work = dist.all_reduce(torch.ones(1), async_op=True)
    if collectives.get_rank() == 0:
        work.wait()
        return
    print("not flushed", end="")
    if HOW == "mistake":
        raise utils.UsageError("told")
    if HOW == "error":
        raise RuntimeError("shown")
launch.run_script(main)
"""


@pytest.mark.parametrize(("how", "code"), [("done", 0), ("mistake", 2), ("error", 1)])
def test_process_ends_while_a_thread_needs_the_interpreter(tmp_path: Path, how: str, code: int) -> None:
    """With its own exit code and all that it said, although torch keeps the threads of a group that something holds."""
    script = tmp_path / "late.py"
    script.write_text(LATE.replace("ROOT", repr(str(ROOT))).replace("HOW", repr(how)))
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"MARKER": str(tmp_path / "ending")}
    processes = [start_script(str(script), env=shared | {"RANK": str(rank)}) for rank in (0, 1)]
    (_, _), (out, told) = (process.communicate(timeout=60) for process in processes)
    assert [process.returncode for process in processes] == [0, code], told
    assert out == "not flushed"
    assert {"done": "", "mistake": "error (process 1): told", "error": "RuntimeError: shown"}[how] in told
    assert bool(told) == (how != "done")
