"""Disks that are full, read-only, stale or gone: told in one sentence at the start, survived by a run that is under way.

Where the tests may mount (as root on Linux) the disks are real ones of some MiB in memory.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import finetune_runs, linear_runs
from helpers.runs import TINY_RUN, TINY_SWIN, run_script, write_images
from helpers.training_runs import train
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

import eval_knn
import export
import run_analysis
from analysis import context
from checkpoints import serialization
from data import convert
from evaluation import finetune
from models import build_model, load_arch_config
from training import checkpointing
from training.run_log import EpochMeter, RunLog
from utils import UsageError, setup_logging

REFUSALS = (errno.ENOSPC, errno.EROFS, errno.EIO, errno.ESTALE)
CPU = torch.device("cpu")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of four images, for training and validation alike."""
    for seed, split in enumerate(("train", "val")):
        write_images(tmp_path / "images" / split, 4, classes=2, seed=seed)
    return tmp_path / "images"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("no permission to mount")
    yield place
    subprocess.run(["umount", "-l", place], capture_output=True)


RUNS: dict[str, Callable[[Path, Path], None]] = {
    "main_esvit": lambda images, out: train(out, images),
    "eval_finetune": lambda images, out: finetune_runs.run(images, out, *finetune_runs.PLAIN),
    "eval_linear": lambda images, out: linear_runs.run(images, out),
}


# --------------------------------------------------------------------------- at the start


@pytest.mark.parametrize("script", RUNS)
def test_folder_that_cannot_be_written_is_refused(images: Path, tmp_path: Path, script: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UsageError, match=r"--output_dir .*/file cannot be created \(File exists\); choose another"):
        RUNS[script](images, tmp_path / "file")
    with pytest.raises(UsageError, match=r"--output_dir /proc/self cannot be used \(.*\)"):
        RUNS[script](images, Path("/proc/self"))


@pytest.mark.parametrize("script", RUNS)
def test_read_only_disk_is_refused(images: Path, disk: Path, script: str) -> None:
    (disk / "run").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    for folder, words in ((disk / "run", "cannot be used"), (disk / "new", "cannot be created")):
        with pytest.raises(UsageError, match=rf"--output_dir {folder} {words} \(Read-only file system\)"):
            RUNS[script](images, folder)


@pytest.mark.parametrize("script", RUNS)
def test_full_disk_is_refused(images: Path, disk: Path, script: str) -> None:
    """Files can be made there, but hold nothing; they are not left."""
    fill(disk)
    with pytest.raises(UsageError, match=r"cannot be used \(No space left on device\)"):
        RUNS[script](images, disk)
    assert not list(disk.glob("*.json"))
    (disk / "ballast").unlink()
    RUNS[script](images, disk)
    assert list(disk.glob("checkpoint.pth*"))


@pytest.mark.parametrize("script", RUNS)
def test_stale_folder_is_refused(images: Path, tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a server that has gone: even looking for a checkpoint fails."""
    lstat = Path.lstat

    def stale(self: Path) -> os.stat_result:
        if self.name.startswith("checkpoint"):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(self))
        return lstat(self)

    monkeypatch.setattr(Path, "lstat", stale)
    with pytest.raises(UsageError, match=r"--output_dir .*/run cannot be used \(Stale file handle\)"):
        RUNS[script](images, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 2])
def test_scripts_end_with_one_sentence_and_code_2(images: Path, processes: int) -> None:
    flags = [*TINY_RUN, "--data_path", str(images), "--output_dir", "/proc/self", "MODEL.IMAGE_SIZE", "32"]
    result = run_script("main_esvit.py", *flags, processes=processes)
    assert result.returncode == (1 if processes else 2)  # torchrun's own is always 1
    assert "main_esvit.py: error: --output_dir /proc/self cannot be used" in result.stderr
    assert processes or "Traceback" not in result.stderr


# --------------------------------------------------------------------------- under way


def fill(disk: Path) -> None:
    """Leave no room."""
    with (disk / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 12))


def cover_read_only(disk: Path) -> None:
    """Mount the disk over itself, read-only: the kernel makes no disk so on which a file is open for writing, as the lock is."""
    subprocess.run(["mount", "--bind", disk, disk], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", disk], check=True)


@pytest.mark.parametrize("trouble", ["full", "read-only"])
def test_run_survives_a_disk_that_refuses_for_a_while(
    images: Path, disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trouble: str
) -> None:
    """From the second to the third epoch of five: the checkpoint of the first stays, `log.txt` lacks nothing in the end."""
    due = checkpointing.Saver.due
    seen = []

    def refuse(self: checkpointing.Saver, steps: int, moved: bool, votes: Sequence[float]) -> bool:
        seen.append(steps)
        if len(seen) == 3:  # two steps an epoch
            fill(disk) if trouble == "full" else cover_read_only(disk)
        if len(seen) == 7:
            found = checkpointing.newest_whole(disk / "checkpoint.pth")
            assert found is not None
            assert (found[0].name, found[1]["epoch"], found[2]) == ("checkpoint.pth", 1, ())
            lines = len((disk / "log.txt").read_text().splitlines())
            assert lines == 1 or trouble == "full"  # whose last page had room
            if trouble == "read-only":
                subprocess.run(["umount", disk], check=True)
            (disk / "ballast").unlink(missing_ok=True)
        return due(self, steps, moved, votes)

    monkeypatch.setattr(checkpointing.Saver, "due", refuse)
    train(disk, images, "--epochs", "5", "--saveckp_freq", "0")
    told = capsys.readouterr().err
    assert told.count("the last whole checkpoint remains") == 2
    assert told.count(f"cannot write to {disk}") == 1
    assert "Traceback" not in told
    assert serialization.load_file(disk / "checkpoint.pth")["epoch"] == 5
    assert [json.loads(line)["epoch"] for line in (disk / "log.txt").open()] == [0, 1, 2, 3, 4]
    points = [point.step for point in EventAccumulator(str(disk)).Reload().Scalars("loss/total")]
    kept = [4, 8, 36, 40]  # images seen
    assert points == kept or (trouble == "full" and set(kept) < set(points))


@pytest.mark.parametrize("code", REFUSALS, ids=errno.errorcode.get)
@pytest.mark.parametrize("script", RUNS)
def test_end_that_cannot_be_saved_is_told(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, script: str
) -> None:
    """The disk refuses when bytes are to reach it; the run ends with one sentence, and goes on when started again."""
    out = tmp_path / "out"

    def refuse(_descriptor: int) -> None:
        if list(out.glob("checkpoint.pth*")):
            raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(UsageError, match=rf"last checkpoint could not be written \(.*{os.strerror(code)}"):
            RUNS[script](images, out)
    (path,) = (path for path in out.glob("checkpoint.pth*") if "previous" not in path.name)
    first = serialization.load_file(path)["epoch"]
    RUNS[script](images, out)
    assert serialization.load_file(path)["epoch"] > first == 1
    assert not list(out.glob(".*"))


# --------------------------------------------------------------------------- results


NETWORK = ["--arch", "swin", "--cfg", "experiments/demo/swin_micro.yaml", "--device", "cpu", "--num_workers", "0"]


def test_features_that_cannot_be_dumped_take_no_score_away(
    images: Path, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk fills up after the folder was found to be usable."""
    flags = [
        *NETWORK,
        "--random_weights",
        "--data_path",
        str(images),
        "--nb_knn",
        "1",
        "--dump_features",
        str(disk / "f"),
    ]

    dump = eval_knn.dump_features

    def fill_and_dump(*args: Any) -> None:
        fill(disk)
        dump(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval_knn, "dump_features", fill_and_dump)
        with pytest.raises(UsageError, match=rf"--dump_features {disk}/f cannot be used .*(No space left|write)"):
            eval_knn.main(eval_knn.get_args_parser().parse_args([*flags, *TINY_SWIN]))
    assert "network: 1-NN classifier result: Top1:" in capsys.readouterr().out
    (disk / "ballast").unlink()
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("format", ["backbone", "safetensors", "detectron2", "transformers", "torchscript"])
def test_export_to_a_full_disk_is_one_sentence(disk: Path, tmp_path: Path, format: str) -> None:
    config = load_arch_config("swin", "experiments/demo/swin_micro.yaml", TINY_SWIN)
    network = build_model("swin", config)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    suffix = {"safetensors": "safetensors", "detectron2": "pkl"}.get(format, "pth")
    line = ["--arch", "swin", "--cfg", "experiments/demo/swin_micro.yaml", "--pretrained_weights"]
    line += [str(tmp_path / "weights.pth"), "--format", format, "--output", str(disk / f"out.{suffix}"), *TINY_SWIN]
    fill(disk)
    with pytest.raises(UsageError, match=rf"--output {disk}/out.{suffix} cannot be used"):
        export.main(export.get_args_parser().parse_args(line))
    assert [path.name for path in disk.rglob("*") if path.is_file()] == ["ballast"]
    (disk / "ballast").unlink()
    export.main(export.get_args_parser().parse_args(line))
    assert [path.name for path in disk.iterdir()] == [f"out.{suffix}"]


@pytest.mark.parametrize("to", ["zip", "tsv", "shards", "files"])
def test_conversion_to_a_full_disk_is_one_sentence(images: Path, disk: Path, to: str) -> None:
    """It is full after the first image; nothing is left."""
    items = convert.read_records

    def filling(*args: Any) -> Iterator[convert.ImageRecord]:
        for number, item in enumerate(items(*args)):
            if number == 1:
                fill(disk)
            yield item._replace(content=item.content * 20)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "read_records", filling)
        with pytest.raises(UsageError, match=rf"DEST {disk}/out cannot be used \(No space left on device\)"):
            convert.main(convert.get_args_parser().parse_args([str(images), str(disk / "out"), "--to", to]))
    (disk / "ballast").unlink()
    assert list(disk.iterdir()) == []


def test_analysis_on_a_full_disk_tells_all_that_it_measured(
    images: Path, disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each task says its figures; the end says once that they are in no file."""
    flags = [*NETWORK, "--random_weights", "--data_path", str(images / "val"), "--output_dir", str(disk)]
    flags += ["--vis_entropy", "--measure_correspondence", "--patch_size", "4"]

    def build_and_fill(*args: Any) -> context.AnalysisContext:
        built = context.build_context(*args)
        fill(disk)
        return built

    monkeypatch.setattr(run_analysis, "build_context", build_and_fill)
    with pytest.raises(UsageError, match=rf"^--output_dir {disk} cannot be used \([^;]*\); check [^;]*$"):
        run_analysis.main(run_analysis.get_args_parser().parse_args([*flags, *TINY_SWIN]))
    said = capsys.readouterr().out
    assert "entropy of attention by block" in said
    assert "correspondence under a flip, 8 images: accuracy" in said
    assert [path.name for path in disk.rglob("*") if path.is_file()] == ["ballast"]


@pytest.mark.parametrize("script", RUNS)
def test_folder_that_vanishes_is_told_with_what_was_in_it(
    images: Path, tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its first saving, with its checkpoint: as a mount does."""
    out, write = tmp_path / "out", checkpointing.write

    def write_and_lose(state: Any, path: Path, *rest: Any, **more: Any) -> str:
        lost = path in checkpointing._known
        if lost:
            shutil.rmtree(out, ignore_errors=True)
        failure = write(state, path, *rest, **more)
        assert bool(failure) == lost
        return failure

    monkeypatch.setattr(checkpointing, "write", write_and_lose)
    monkeypatch.setattr(finetune, "write", write_and_lose)
    with pytest.raises(
        UsageError, match=r"last checkpoint could not be written .*unless the checkpoint that was in .*/out is back"
    ):
        RUNS[script](images, out)


# --------------------------------------------------------------------------- logs alone


def one_epoch(log: RunLog, epoch: int) -> None:
    meter = EpochMeter(epoch, steps=1, images_per_step=1)
    with log.epoch(meter) as show:
        meter.update({"loss": float(epoch)})
        show(lr=0.5)
    log.finish_epoch(meter)


def test_lines_wait_for_their_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`log.txt` on a full device: told once; what waits is written with the next line, and named where there is none."""
    (tmp_path / "log.txt").symlink_to("/dev/full")
    setup_logging()
    log = RunLog(tmp_path, epochs=3, log_freq=1, mean=[0.5], std=[0.5], device=CPU, images=12)
    for epoch in range(2):
        one_epoch(log, epoch)
    told = capsys.readouterr().err
    assert told.count("No space left on device") == 1
    (tmp_path / "log.txt").unlink()
    one_epoch(log, 2)
    assert [json.loads(line)["epoch"] for line in (tmp_path / "log.txt").open()] == [0, 1, 2]
    (tmp_path / "log.txt").unlink()
    (tmp_path / "log.txt").symlink_to("/dev/full")
    one_epoch(log, 3)
    log.close()
    assert "1 line of log.txt" in capsys.readouterr().err.splitlines()[-1]


def test_a_line_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes half of it."""
    log = RunLog(tmp_path, epochs=3, log_freq=1, mean=[0.5], std=[0.5], device=CPU, images=12)
    one_epoch(log, 0)
    before = (tmp_path / "log.txt").read_text()
    opened = Path.open

    def half(self: Path, mode: str = "r", **options: Any) -> Any:
        file = opened(self, mode, **options)
        if mode == "a":
            file.write('{"epoch": 1, "tr')
            file.close()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", half)
        one_epoch(log, 1)
    assert (tmp_path / "log.txt").read_text() == before
    one_epoch(log, 2)
    assert [json.loads(line)["epoch"] for line in (tmp_path / "log.txt").open()] == [0, 1, 2]


def test_tensorboard_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its thread ends without a traceback; the next epoch that can draws in a new file."""
    setup_logging()
    log = RunLog(tmp_path, epochs=4, log_freq=1, mean=[0.5], std=[0.5], device=CPU, images=12)
    one_epoch(log, 0)

    def refuse(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "write", refuse)
        one_epoch(log, 1)
        one_epoch(log, 2)
    one_epoch(log, 3)
    one_epoch(log, 4)
    log.close()
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert told.count("Input/output error") == 1
    assert [json.loads(line)["epoch"] for line in (tmp_path / "log.txt").open()] == [0, 1, 2, 3, 4]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [point.step for point in events.Scalars("loss/train")] == [12, 48, 60]


def test_picture_of_crops_is_whole_or_absent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Image.Image.save

    def full(image: Image.Image, file: Any, **options: Any) -> None:
        if not isinstance(file, Path):  # TensorBoard's
            return save(image, file, **options)
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    setup_logging()
    views = [torch.zeros(2, 3, 64, 64)]
    for refused in (True, False):
        log = RunLog(tmp_path, epochs=1, log_freq=1, mean=[0.5] * 3, std=[0.5] * 3, device=CPU, images=2)
        with monkeypatch.context() as patch:
            if refused:
                patch.setattr(Image.Image, "save", full)
            log.save_crops(views)
        log.close()
        assert not list(tmp_path.glob(".*"))
        assert (tmp_path / "crops.png").exists() != refused
        assert capsys.readouterr().err.count("No space left on device") == refused
    with Image.open(tmp_path / "crops.png") as picture:
        picture.load()
