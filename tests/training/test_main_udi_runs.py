"""main_udi.py as a script: what a run saves and how it goes on, mistakes, and that every flag is read."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conftest import ROOT
from helpers.runs import TINY_RUN, TINY_SWIN, TINY_UDI, TINY_VIT, run_script, start_script, write_images
from helpers.training_runs import assert_identical
from helpers.udi_runs import TINY_NETWORKS, parsed, run
from PIL import Image

import eval_knn
import main_esvit
import main_udi
from checkpoints import layouts, loading, serialization
from models import build_model, load_arch_config
from training import checkpointing
from utils import UsageError


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), 9)


# --------------------------------------------------------------------------- runs


def test_run_folder(images: Path, tmp_path: Path) -> None:
    """What is saved, with one head; it is a backbone to everything that reads checkpoints."""
    run(tmp_path, images, "--saveckp_freq", "1")
    content = serialization.load_file(tmp_path / "checkpoint.pth")
    assert {"student", "teacher", "optimizer", "epoch", "args", "udi_loss"} <= content.keys()
    assert "dino_loss" not in content
    assert content["udi_loss"].keys() == {"center", "center_plus", "center_patch"}
    head = {f"head.{name}" for name in ("mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias", "mlp.4.weight",
                                        "mlp.4.bias", "last_layer.weight_g", "last_layer.weight_v")}  # fmt: skip
    srs = {f"srs.{name}.{kind}" for name in ("norm", "qkv", "proj", "out_norm") for kind in ("weight", "bias")}
    config = load_arch_config("vit", str(tmp_path / "config.yaml"))
    backbone = build_model("vit", config, patch_size=4)
    assert content["teacher"].keys() == set(backbone.state_dict()) | head | srs
    assert content["student"].keys() == {f"module.{name}" for name in content["teacher"]}
    assert (config.MODEL.SPEC.NUM_CLS_TOKENS, config.MODEL.SPEC.POS_RESIZE) == (2, "scale")
    of_backbone = {name: content["teacher"][name] for name in backbone.state_dict()}
    assert loading.load_network(backbone, layouts.network_state(of_backbone, "", ""), "").matched == len(of_backbone)
    lines = [json.loads(line) for line in (tmp_path / "log.txt").open()]
    assert [line["epoch"] for line in lines] == [0, 1]
    terms = {
        "train_loss",
        "train_g_cl",
        "train_g_mcl",
        "train_g_pch",
        "train_l_cl",
        "train_l_mcl",
        "train_lr",
        "train_wd",
    }
    assert terms <= lines[0].keys()
    for line in lines:
        means = {name: line[f"train_{name}"] for name in ("loss", "g_cl", "l_cl", "g_mcl", "l_mcl", "g_pch")}
        levels = [(means[f"g_{name}"] + 2 * means[f"l_{name}"]) / 3 for name in ("cl", "mcl")] + [means["g_pch"]]
        assert means["loss"] == pytest.approx(sum(levels) / 3, rel=1e-5)
        assert all(means.values())
    assert {path.name for path in tmp_path.glob("checkpoint0*.pth")} == {"checkpoint0000.pth", "checkpoint0001.pth"}
    assert {f"train_{level}/kl" for level in ("cls", "cls+", "patch")} <= lines[0].keys()
    with Image.open(tmp_path / "crops.png") as picture:
        # Two global views and a row of two local ones, enlarged four times, and nothing of their correspondences.
        assert picture.height == 2 * (4 * 32 + 8) + 4 * 16 + 8 + 8
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    run(tmp_path, images, "--saveckp_freq", "1")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("where", ["within an epoch", "between epochs"])
def test_going_on_is_as_if_never_stopped(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Two steps an epoch, a SIGTERM in the first or after it: everything that is saved ends bit for bit the same."""
    run(tmp_path / "whole", images)
    due = checkpointing.Saver.due

    def signalled(self: checkpointing.Saver, steps: int, moved: bool, votes: Sequence[float]) -> bool:
        saved = (tmp_path / "parts" / "checkpoint.pth").exists()
        if (steps == 1 and moved) if where == "within an epoch" else (steps == 0 and saved):
            os.kill(os.getpid(), signal.SIGTERM)
            votes = [self.votes()[0], 0.0]
        return due(self, steps, moved, votes)

    with monkeypatch.context() as patch:
        patch.setattr(checkpointing.Saver, "due", signalled)
        run(tmp_path / "parts", images)
    stopped = serialization.load_file(tmp_path / "parts" / "checkpoint.pth")
    assert (stopped["epoch"], stopped.get("in_epoch", {}).get("steps")) == ((0, 1) if where[0] == "w" else (1, None))
    run(tmp_path / "parts", images)
    whole, parts = (serialization.load_file(tmp_path / name / "checkpoint.pth") for name in ("whole", "parts"))
    assert whole["epoch"] == 2
    for key in whole.keys() - {"args"}:
        assert_identical(whole[key], parts[key], key)


def test_a_run_of_another_method_is_not_gone_on_with(images: Path, tmp_path: Path) -> None:
    run(tmp_path, images, "--epochs", "1", "--warmup_teacher_temp_epochs", "0")
    flags = ["--data_path", str(images), "--output_dir", str(tmp_path), *TINY_SWIN]
    with pytest.raises(
        UsageError,
        match=r"cannot be resumed, it has no dino_loss \(another method made it\); choose another --output_dir",
    ):
        main_esvit.main(main_esvit.get_args_parser().parse_args([*TINY_RUN, *flags]))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--target_mix", "probs", "--local_patch", "on"]], ids=["UDI", "probs"])
def test_two_processes_equal_one(tmp_path: Path, flags: list[str]) -> None:
    """Losses, centers and both networks; each process draws random numbers of its own. SGD: see test_distributed.py."""
    images = write_images(tmp_path / "images", 17)
    common = [*TINY_UDI, "--optimizer", "sgd", "--lr", "1.0", "--clip_grad", "0.3", "--momentum_teacher", "0.9"]
    common += ["--drop_path_rate", "0", "--data_path", str(images), *flags]
    for name, processes, batch in (("one", 0, "8"), ("two", 2, "4")):
        own = ["--batch_size_per_gpu", batch, "--output_dir", str(tmp_path / name)]
        result = run_script("main_udi.py", *common, *own, *TINY_VIT, processes=processes)
        assert result.returncode == 0, result.stderr
    one, two = (serialization.load_file(tmp_path / name / "checkpoint.pth") for name in ("one", "two"))
    logs = [[json.loads(line) for line in (tmp_path / name / "log.txt").open()] for name in ("one", "two")]
    for name in ("train_loss", "train_g_pch", "train_l_mcl"):
        assert [line[name] for line in logs[0]] == pytest.approx([line[name] for line in logs[1]], rel=1e-5)
    for part in ("udi_loss", "student", "teacher"):
        assert one[part].keys() == two[part].keys()
        for name, value in one[part].items():
            torch.testing.assert_close(two[part][name], value, rtol=1e-4, atol=1e-5, msg=f"{part} {name}")
    assert not torch.equal(two["rng"][0]["torch"], two["rng"][1]["torch"])


@pytest.mark.slow
def test_shards_equal_whole_networks(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images", 17)
    common = [*TINY_UDI, "--drop_path_rate", "0", "--optimizer", "sgd", "--lr", "1.0", "--data_path", str(images)]
    runs = []
    for name, flags in (("whole", []), ("shards", ["--fsdp"])):
        result = run_script(
            "main_udi.py", *common, *flags, "--output_dir", str(tmp_path / name), *TINY_VIT, processes=2
        )
        assert result.returncode == 0, result.stderr
        runs.append(serialization.load_file(tmp_path / name / "checkpoint.pth"))
    for part in ("udi_loss", "student", "teacher"):
        assert runs[0][part].keys() == runs[1][part].keys()
        for name, value in runs[0][part].items():
            torch.testing.assert_close(runs[1][part][name], value, rtol=1e-4, atol=1e-5, msg=f"{part} {name}")


@pytest.mark.slow
def test_signal_ends_a_run_with_code_0(tmp_path: Path, images: Path) -> None:
    flags = [*TINY_UDI, "--epochs", "500", "--data_path", str(images), "--output_dir", str(tmp_path / "out")]
    process = start_script("main_udi.py", *flags, *TINY_VIT, env={})
    while not (tmp_path / "out" / "checkpoint.pth").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert errors.count("the same command continues the run") == 1


@pytest.mark.slow
def test_a_run_can_be_compiled(tmp_path: Path, images: Path) -> None:
    flags = ["--drop_path_rate", "0", "--local_crops_number", "0"]
    run(tmp_path / "plain", images, *flags)
    run(tmp_path / "compiled", images, *flags, "--compile")
    losses = [
        [json.loads(line)["train_loss"] for line in (tmp_path / name / "log.txt").open()]
        for name in ("plain", "compiled")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# --------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--include_patch", "off"], "--number_cls_token 1"),
        (["--include_patch", "off", "--number_cls_token", "1", "--local_patch", "on"], "--local_patch on"),
        (TINY_NETWORKS["swin"], "--number_cls_token 2: swin has no class tokens; pass --number_cls_token 1"),
        (["--arch", "vit_large"], "unknown arch 'vit_large'"),
        (["--epochs", "2", "--warmup_epochs", "3"], "--warmup_epochs 3"),
        (["--warmup_teacher_temp_epochs", "30"], "warmup_teacher_temp_epochs 30"),
        (["--aug_backend", "pil"], "--aug_backend pil"),
        (["--global_sampling_window_size", "9"], r"--global_sampling_window_size 9 must be in 1\.\.8: global views of 32 pixels"),
        (["--srs_heads", "3"], "--srs_heads 3 must divide the 16 channels"),
        (["--level_weights", "0", "1", "1"], "--level_weights 0.0 1.0 1.0 must be"),
        (["--local_crops_size", "3"], "images of 3 x 3 pixels are smaller than a patch of 4"),
        (["--batch_size_per_gpu", "10"], "--batch_size_per_gpu 10 .*9 images"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_usage_errors(images: Path, tmp_path: Path, flags: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        run(tmp_path / "out", images, *flags, network=[] if "--arch" in flags else TINY_VIT)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("given", "asked"), [(1, 2), (2, 1)])
@pytest.mark.parametrize("where", ["yaml", "override"])
def test_class_tokens_of_the_config_are_those_of_the_flag(where: str, given: int, asked: int, tmp_path: Path) -> None:
    """Neither wins in silence; what a yaml says of positions counts, and without a word UDI's own values do."""
    yaml = tmp_path / "vit.yaml"
    text = "MODEL: {NAME: vision_transformer, SPEC: {POS_RESIZE: size, NUM_CLS_TOKENS: %d}}"
    yaml.write_text(text % (given if where == "yaml" else asked))
    pairs = [*TINY_VIT, "MODEL.SPEC.NUM_CLS_TOKENS", str(given)] if where == "override" else TINY_VIT
    words = rf"^MODEL\.SPEC\.NUM_CLS_TOKENS {given} and --number_cls_token {asked} differ; .* pass --number_cls_token {given}$"
    with pytest.raises(UsageError, match=words):
        main_udi.load_config(parsed("--cfg", str(yaml), "--number_cls_token", str(asked), network=pairs))
    yaml.write_text(text % asked)
    spec = main_udi.load_config(parsed("--cfg", str(yaml), "--number_cls_token", str(asked))).MODEL.SPEC
    keys = ("NUM_CLS_TOKENS", "POS_RESIZE", "DEPTH")
    assert [spec[key] for key in keys] == [asked, "size", 2]
    spec = main_udi.load_config(parsed("--number_cls_token", str(asked))).MODEL.SPEC
    assert [spec[key] for key in keys] == [asked, "scale", 2]


def test_images_of_other_channels_are_refused(images: Path, tmp_path: Path) -> None:
    five = ["MODEL.SPEC.IN_CHANS", "5", "INPUT.MEAN", "[0,0,0,0,0]", "INPUT.STD", "[1,1,1,1,1]"]
    with pytest.raises(UsageError, match=r"MODEL\.SPEC\.IN_CHANS 5"):
        run(tmp_path, images, network=[*TINY_VIT, *five])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--number_cls_token", "3"], "invalid choice: 3"), (["--include_patch", "off"], "pass --number_cls_token 1")],
    ids=["choice", "combination"],
)
def test_mistakes_end_with_one_line_and_code_2(flags: list[str], words: str, images: Path) -> None:
    result = run_script("main_udi.py", *TINY_UDI, "--data_path", str(images), *flags, "--seed", "1", *TINY_VIT)
    assert result.returncode == 2
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("main_udi.py: error: ")
    assert words in last
    assert "Traceback" not in result.stderr


def test_the_last_line_names_the_results_and_a_command_that_scores_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where nothing was left to do; not where a signal has stopped the run."""
    for seed, part in enumerate(("train", "val")):
        write_images(tmp_path / "labeled images" / part, 3, classes=2, seed=seed)
    out = tmp_path / "a run"
    one_epoch = ("--epochs", "1", "--warmup_teacher_temp_epochs", "0")
    told = []
    for _ in range(2):
        run(out, tmp_path / "labeled images" / "train", *one_epoch)
        *_, before, last = capsys.readouterr().err.strip().splitlines()
        told.append(last)
    assert told[0] == told[1]
    assert before == f"{out} has 1 epoch already, nothing to do"
    assert told[0].startswith(
        f"the run is finished: {out} holds checkpoint.pth, log.txt and the curves (tensorboard --logdir '{out}')"
    )
    _, _, command = told[0].partition(": python eval_knn.py ")
    words = [word.replace("IMAGES", str(tmp_path / "labeled images")) for word in shlex.split(command)]
    assert "--arch" not in words  # the checkpoint names the network
    eval_knn.main(eval_knn.get_args_parser().parse_args([*words, "--num_workers", "0", "--device", "cpu"]))
    assert json.loads((out / "results" / "knn.json").read_text())["network"]["pretrained_weights"] == str(
        out / "checkpoint.pth"
    )
    monkeypatch.setattr(checkpointing.Saver, "votes", lambda self: [1.0, 0.0])
    capsys.readouterr()
    run(tmp_path / "stopped", tmp_path / "labeled images" / "train", *one_epoch)
    told = capsys.readouterr().err.strip().splitlines()
    assert told[-1].endswith("the same command continues the run")


# --------------------------------------------------------------------------- flags


class Watched(argparse.Namespace):
    """Remembers which of its arguments were asked for."""

    read: ClassVar[set[str]] = set()

    def __getattribute__(self, name: str) -> Any:
        Watched.read.add(name)
        return super().__getattribute__(name)


@pytest.mark.parametrize("script", [main_udi, main_esvit], ids=lambda script: script.__name__)
def test_every_flag_is_read(script: Any, images: Path, tmp_path: Path) -> None:
    folders = ["--data_path", str(images), "--output_dir", str(tmp_path / "out")]
    runs = [[*TINY_UDI, *folders, "--", *TINY_VIT]]
    if script is main_esvit:
        runs = [[*TINY_RUN, *folders, "--epochs", "1", *flags, "--seed", "0", *TINY_SWIN]
                for flags in (["--use_mixup", "on"], ["--aug-opt", "deit_aug", "--batch_size_per_gpu", "8", "--output_dir",
                                                      str(tmp_path / "deit")])]  # fmt: skip
    read: set[str] = set()
    for line in runs:
        args = script.get_args_parser().parse_args(line, namespace=Watched())
        Watched.read.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(serialization, "write_file", lambda state, path: path.write_bytes(b""))
            script.main(args)
        read |= Watched.read
    # Read where there are several processes, shards or a folder for k-NN; or, of the loader, under another name.
    elsewhere = {"dist_url", "shuffle_buffer", "epoch_images", "knn_data_path", "allow_partial"}
    assert vars(args).keys() - read - elsewhere == set()
    packages = ("training", "evaluation", "distributed")
    files = [*ROOT.glob("*.py"), *(file for package in packages for file in (ROOT / package).glob("*.py"))]
    sources = "".join(path.read_text() for path in files)
    assert all(f"args.{name}" in sources for name in elsewhere)
