"""Starting from another run's checkpoint: `--pretrained_weights_ckpt` continues it, `--init_weights` takes its weights alone."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.runs import TINY_RUN, TINY_SWIN, run_script, write_images
from helpers.training_runs import assert_identical, train

import main_esvit
from checkpoints import serialization
from training import checkpointing, setup
from utils import UsageError


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), 9)


@pytest.fixture(scope="module")
def view_level(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a view-level run after two of three epochs (of three, of which it is the schedule's)."""
    folder = tmp_path_factory.mktemp("views")
    train(folder, images, "--use_dense_prediction", "off", "--epochs", "3", "--saveckp_freq", "1")
    return folder / "checkpoint0001.pth"


def test_views_go_on_with_regions(images: Path, tmp_path: Path, view_level: Path) -> None:
    """As six published networks were made: epoch, schedule, centers and moments continue, the new head starts and learns."""
    words = ["--epochs", "3", "--output_dir", str(tmp_path), "--data_path", str(images), *TINY_SWIN]
    args = main_esvit.get_args_parser().parse_args([*TINY_RUN, "--pretrained_weights_ckpt", str(view_level), *words])
    config = main_esvit.load_config(args)
    torch.manual_seed(3)
    method = main_esvit.build_method(args, config, torch.device("cpu"))
    new_head = {name: p.clone() for name, p in method.student.state_dict().items() if name.startswith("head_dense.")}
    step = setup.build_step(args, method, 2, torch.device("cpu"), "fp32")
    place = checkpointing.continue_run(view_level, partial(step.load_state_dict, extend=True), args)
    assert (place.epoch, place.steps) == (2, 0)
    old = serialization.load_file(view_level)
    torch.testing.assert_close(method.criterion.center, old["dino_loss"]["center"], rtol=0, atol=0)
    assert not method.criterion.state_dict()["center_grid"].any()
    for network, key, prefix in ((method.student, "student", "module."), (method.teacher, "teacher", "")):
        for name, tensor in network.state_dict().items():
            assert torch.equal(tensor, new_head[name] if name in new_head else old[key][prefix + name]), name
    groups = old["optimizer"]["param_groups"]
    numbers = {n: i for group in groups for n, i in zip(group["param_names"], group["params"])}
    for name, parameter in method.student.named_parameters():
        moments, saved = step.optimizer.state.get(parameter, {}), old["optimizer"]["state"].get(numbers.get(name), {})
        assert moments.keys() == saved.keys(), name  # none of the new head
        for kind, moment in moments.items():
            assert torch.equal(moment, saved[kind]), (name, kind)


def test_published_continuation(images: Path, tmp_path: Path, view_level: Path) -> None:
    """The published command of V+R networks, on two processes: it trains the epochs that are left, on the schedule of all."""
    flags = ["--epochs", "3", "--pretrained_weights_ckpt", str(view_level), "--use_dense_prediction", "True"]
    folders = ["--data_path", str(images), "--output_dir", str(tmp_path / "continued_from0001_dense")]
    nodes = ["--num_nodes", "1", "--num_gpus_per_node", "2", "--batch_size_per_gpu", "2"]
    run = run_script("main_esvit_mnodes.py", *TINY_RUN, *nodes, *folders, *flags, *TINY_SWIN)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in (tmp_path / "continued_from0001_dense" / "log.txt").open()]
    assert [line["epoch"] for line in lines] == [2]
    of_old = [json.loads(line) for line in (view_level.parent / "log.txt").open()]
    assert lines[0]["train_lr"] == pytest.approx(of_old[2]["train_lr"])  # that of the third epoch of three
    assert lines[0]["train_lr"] < 0.5 * of_old[1]["train_lr"]
    done = serialization.load_file(tmp_path / "continued_from0001_dense" / "checkpoint.pth")
    assert done["epoch"] == 3
    assert done["dino_loss"]["center_grid"].any()


def test_a_run_of_its_own_wins_over_the_file_it_came_from(images: Path, tmp_path: Path, view_level: Path) -> None:
    flags = ["--epochs", "4", "--saveckp_freq", "1", "--pretrained_weights_ckpt", str(view_level)]
    train(tmp_path / "whole", images, *flags)
    train(tmp_path / "parts", images, *flags, "--epochs", "4")
    (tmp_path / "parts" / "checkpoint.pth").write_bytes((tmp_path / "parts" / "checkpoint0002.pth").read_bytes())
    train(tmp_path / "parts", images, *flags)
    whole, parts = (serialization.load_file(tmp_path / run / "checkpoint.pth") for run in ("whole", "parts"))
    assert_identical(whole["student"], parts["student"])
    assert_identical(whole["optimizer"], parts["optimizer"])


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--epochs", "2"], "--epochs 2"),
        (["--head_hidden_dim", "8"], "--head_hidden_dim"),
        (["--out_dim", "16"], "--out_dim 32"),
        (["--norm_last_layer", "off"], "--norm_last_layer"),
        (["--optimizer", "sgd"], "--optimizer adamw"),
        (["--init_weights", "x.pth"], "--init_weights"),
    ],
    ids=str,
)
def test_what_cannot_go_on_is_named(
    images: Path, tmp_path: Path, view_level: Path, flags: list[str], named: str
) -> None:
    with pytest.raises(UsageError, match=named):
        train(tmp_path / "out", images, "--epochs", "3", "--pretrained_weights_ckpt", str(view_level), *flags)
    assert not (tmp_path / "out").exists()


def test_bare_weights_do_not_go_on(images: Path, tmp_path: Path, view_level: Path) -> None:
    torch.save(serialization.load_file(view_level)["teacher"], tmp_path / "bare.pth")
    with pytest.raises(UsageError, match="--init_weights"):
        train(tmp_path / "out", images, "--pretrained_weights_ckpt", str(tmp_path / "bare.pth"))


def test_part_of_a_head_is_no_whole_head(images: Path, tmp_path: Path, view_level: Path) -> None:
    content = serialization.load_file(view_level)
    for key, prefix in (("student", "module."), ("teacher", "")):
        del content[key][f"{prefix}head.mlp.0.bias"]
    torch.save(content, tmp_path / "part.pth")
    flags = ["--epochs", "3", "--pretrained_weights_ckpt", str(tmp_path / "part.pth")]
    with pytest.raises(UsageError, match=r"head\.mlp\.0\.bias"):
        train(tmp_path / "out", images, *flags)


def test_init_weights_start_a_new_schedule(images: Path, tmp_path: Path) -> None:
    train(tmp_path / "first", images)
    weights = str(tmp_path / "first" / "checkpoint.pth")
    train(
        tmp_path / "second", images, "--init_weights", weights, "--lr", "0", "--min_lr", "0", "--momentum_teacher", "1"
    )
    first, second = (serialization.load_file(tmp_path / run / "checkpoint.pth") for run in ("first", "second"))
    assert_identical(first["teacher"], second["teacher"])
    assert_identical(first["student"], second["student"])
    assert second["epoch"] == 2
    assert len((tmp_path / "second" / "log.txt").read_text().splitlines()) == 2
