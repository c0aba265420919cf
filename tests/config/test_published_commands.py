"""The published command lines, word by word: they are parsed, their yaml loads, their network builds, and they run at tiny size."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.launch
import torch.distributed.run
from conftest import ROOT
from helpers.runs import caught_recipe, clean_environment, free_port, write_images

import eval_finetune
import eval_knn
import eval_linear
import main_esvit
import main_esvit_mnodes
import main_udi
import run_analysis
from checkpoints import serialization
from models import build_model, load_arch_config

PRETRAIN = (
    "--data_path D/train --output_dir O --batch_size_per_gpu 32 --epochs 300 --teacher_temp 0.07 --warmup_epochs 10 "
    "--warmup_teacher_temp_epochs 30 --norm_last_layer false --use_dense_prediction True"
)
E = "experiments/imagenet"
SWIN = f"--cfg {E}/swin/swin_tiny_patch4_window7_224.yaml"
VIL_ARCH = "l1,h3,d96,n2,s1,g1,p4,f7,a0_l2,h6,d192,n2,s1,g1,p2,f7,a0_l3,h12,d384,n6,s0,g1,p2,f7,a0_l4,h24,d768,n2,s0,g0,p2,f7,a0"
UDI = "--data_path D --pretrained_weights C --arch vit_small --batch_size_per_gpu 256"
COMMANDS = {
    "swin": f"main_esvit.py --arch swin_tiny {PRETRAIN} {SWIN}",
    "cvt": f"main_esvit.py --arch cvt_tiny {PRETRAIN} --aug-opt dino_aug --cfg {E}/cvt_v4/s1.yaml",
    "vil": f"main_esvit.py --arch vil_2262 {PRETRAIN} --aug-opt dino_aug --cfg {E}/vil/vil_small/base.yaml "
    f"MODEL.SPEC.MSVIT.ARCH '{VIL_ARCH}' MODEL.SPEC.MSVIT.MODE 1 MODEL.SPEC.MSVIT.VIL_MODE_SWITCH 0.75",
    "nodes": "main_esvit_mnodes.py --num_nodes 2 --num_gpus_per_node 16 --data_path D/train "
    "--output_dir O/continued_from0200_dense --batch_size_per_gpu 16 --arch swin_small --zip_mode True --epochs 300 "
    "--teacher_temp 0.07 --warmup_epochs 10 --warmup_teacher_temp_epochs 30 --norm_last_layer false "
    f"--cfg {E}/swin/swin_small_patch4_window14_224.yaml --use_dense_prediction True "
    "--pretrained_weights_ckpt O/checkpoint0200.pth",
    "linear": "eval_linear.py --data_path D --output_dir O/lincls/epoch0300 --pretrained_weights C --checkpoint_key teacher "
    f"--batch_size_per_gpu 256 --arch swin_tiny {SWIN} --n_last_blocks 4 --num_labels 1000 MODEL.NUM_CLASSES 0",
    "knn": "eval_knn.py --data_path D --dump_features O/features/epoch0300 --pretrained_weights C --checkpoint_key teacher "
    f"--batch_size_per_gpu 256 --arch swin_tiny {SWIN} MODEL.NUM_CLASSES 0",
    "attention": "run_analysis.py --arch swin_tiny --image_path I --output_dir O --pretrained_weights C --learning ssl --seed 3 "
    f"{SWIN} --vis_attention True --vis_correspondence True MODEL.NUM_CLASSES 0",
    "correspondence": "run_analysis.py --arch swin_tiny --data_path D --output_dir O --pretrained_weights C --learning ssl "
    f"--seed 3 {SWIN} --measure_correspondence True MODEL.NUM_CLASSES 0",
    "udi": "main_udi.py --data_path D --output_dir O --arch vit_small --teacher_temp 0.07 --warmup_teacher_temp_epochs 30 "
    "--warmup_epochs 10 --local_crops_number 10 --norm_last_layer false --epochs 300",
    "udi-knn": f"eval_knn.py {UDI}",
    "udi-linear": f"eval_linear.py {UDI} --lr 0.02 --epochs 100",
    "udi-attention": "run_analysis.py --pretrained_weights C --arch vit_small --vis_attention True",
}
SCRIPTS: dict[str, Any] = {
    f"{script.__name__}.py": script
    for script in (main_esvit, main_esvit_mnodes, main_udi, eval_knn, eval_linear, eval_finetune, run_analysis)
}
PARAMETERS = {"swin": 27519354, "cvt": 29303616, "nodes": 48968298}  # as the reference has them


def words_of(name: str) -> tuple[Any, list[str]]:
    """The script of a command and the words behind it."""
    script, *words = shlex.split(COMMANDS[name])
    return SCRIPTS[script], words


def parsed(name: str) -> argparse.Namespace:
    script, words = words_of(name)
    return script.get_args_parser().parse_args(words)


# --------------------------------------------------------------------------- word by word


@pytest.mark.parametrize("name", COMMANDS)
def test_command_is_parsed_and_its_network_built(name: str) -> None:
    args = parsed(name)
    given = shlex.split(COMMANDS[name])
    for flag, value in itertools.pairwise(given):
        if not flag.startswith("--"):
            continue
        found = getattr(args, flag.removeprefix("--").replace("-", "_"))
        found = found[0] if isinstance(found, list | tuple) else found
        assert str(found).lower() == value.lower() or float(found) == float(value), flag
    if name.startswith("udi"):
        config = main_udi.load_config(args) if name == "udi" else load_arch_config(args.arch, args.cfg, args.opts)
    else:
        config = load_arch_config(args.arch, args.cfg, args.opts)
    with torch.device("meta"):
        network = build_model(args.arch, config, dense=getattr(args, "use_dense_prediction", False))
    assert sum(network.stage_depths) == {"nodes": 24}.get(name, 12)
    if name in PARAMETERS:
        assert sum(p.numel() for p in network.parameters()) == PARAMETERS[name]


def test_vil_command_asks_for_the_network_of_our_yaml() -> None:
    args = parsed("vil")
    ours = load_arch_config("vil_2262", None, ["MODEL.SPEC.MSVIT.VIL_MODE_SWITCH", "0.75"])
    assert load_arch_config(args.arch, args.cfg, args.opts) == ours


@pytest.mark.parametrize("launcher", [torch.distributed.launch, torch.distributed.run], ids=["launch", "torchrun"])
@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in {"nodes", "attention", "correspondence"}])
def test_launchers_hand_the_words_on(launcher: Any, name: str) -> None:
    parser = launcher.get_args_parser() if launcher is torch.distributed.run else None
    line = ["--nproc_per_node=16", *shlex.split(COMMANDS[name])]
    taken = parser.parse_args(line) if parser else launcher.parse_args(line)
    assert taken.nproc_per_node == "16"
    script, words = words_of(name)
    assert [taken.training_script, *taken.training_script_args] == [f"{script.__name__}.py", *words]
    script.get_args_parser().parse_args(["--local-rank=3", *words])  # what launch adds in front


def test_two_nodes_are_started_by_torchrun() -> None:
    """Every word but those for the launcher passes unchanged."""
    _, words = words_of("nodes")
    env = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
    line = main_esvit_mnodes.torchrun_arguments(words, env)
    taken = torch.distributed.run.get_args_parser().parse_args(line)
    assert (taken.nnodes, taken.nproc_per_node, taken.node_rank) == ("2", "16", 1)
    assert taken.training_script_args == words[4:]
    assert main_esvit.get_args_parser().parse_args(words[4:]).pretrained_weights_ckpt == "O/checkpoint0200.pth"


def test_udi_fine_tuning_is_translated_by_its_recipe(tmp_path: Path) -> None:
    """`--finetune F --model vit_small --epochs 200 --batch_size 256 --warmup_epochs 20 --drop_path 0.1 --lr 0.001
    --layer_decay 0.55 --mixup 0.8 --cutmix 1.0` on four GPUs.
    """
    done = caught_recipe(tmp_path, "eval_finetune_beit", "vit_small", "D", "F", "O", GPUS="4", PER_GPU="256")
    launched = torch.distributed.run.get_args_parser().parse_args(done.stdout.splitlines()[2:])
    assert (launched.nproc_per_node, Path(launched.training_script).name) == ("4", "eval_finetune.py")
    args = eval_finetune.get_args_parser().parse_args(launched.training_script_args)
    assert (args.pretrained_weights, args.arch, args.data_path) == ("F", "vit_small", "D")
    assert (args.epochs, args.batch_size_per_gpu, args.accum_iter, args.warmup_epochs) == (200, 256, 1, 20)
    assert (args.drop_path, args.layer_decay, args.mixup, args.cutmix) == (0.1, 0.55, 0.8, 1.0)
    assert args.lr * 4 * 256 / 256 == pytest.approx(0.001)  # BEiT does not scale it
    config = load_arch_config(args.arch, args.cfg, args.opts, args.drop_path)
    assert config.MODEL.SPEC.DROP_PATH_RATE == 0.1
    with torch.device("meta"):
        assert build_model(args.arch, config).num_features == 384


# --------------------------------------------------------------------------- at tiny size

SMALL_EVALUATION = ["--device", "cpu", "--num_workers", "0", "--batch_size_per_gpu", "4"]
SMALL_RUN = [
    *(
        "--local_crops_number",
        "2",
        "--local_crops_size",
        "32",
        *SMALL_EVALUATION,
        "--epochs",
        "2",
        "--warmup_epochs",
        "1",
    ),
    *("--warmup_teacher_temp_epochs", "1", "--out_dim", "32", "--head_hidden_dim", "16", "--head_bottleneck_dim", "8"),
]
SMALL_SWIN = [
    *("MODEL.IMAGE_SIZE", "64", "MODEL.SPEC.DIM_EMBED", "12", "MODEL.SPEC.DEPTHS", "[1,1,2,1]"),
    *("MODEL.SPEC.NUM_HEADS", "[1,2,4,8]"),
]
SMALL_CVT = [
    *("MODEL.IMAGE_SIZE", "64", "MODEL.SPEC.DIM_EMBED", "[8,8,16,16]", "MODEL.SPEC.DEPTH", "[1,1,2,1]"),
    *("MODEL.SPEC.NUM_HEADS", "[1,1,2,2]"),
]
SMALL_VIL = [
    *("MODEL.IMAGE_SIZE", "64", "MODEL.SPEC.MSVIT.ARCH"),
    "l1,h1,d12,n1,s1,g1,p4,f7,a0_l2,h1,d12,n1,s1,g1,p2,f7,a0_l3,h2,d24,n2,s0,g1,p2,f7,a0_l4,h2,d24,n1,s0,g0,p2,f7,a0",
]


def at_tiny_size(name: str, flags: list[str], overrides: list[str]) -> list[str]:
    """The command's words, with further flags before its KEY VALUE pairs and further pairs behind them; what comes last counts."""
    _, words = words_of(name)
    opts = parsed(name).opts
    return [*words[: len(words) - len(opts)], *flags, *opts, *overrides]


def folders(images: Path, out: Path) -> list[str]:
    return ["--data_path", str(images), "--output_dir", str(out)]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("published")
    for split, seed in (("train", 0), ("val", 1)):
        write_images(root / split, 4, size=72, classes=3, seed=seed)
    return root


def check_run(out: Path, name: str, processes: int) -> None:
    """Two epochs with the command's own settings, and prototypes that move once they are not frozen."""
    lines = [json.loads(line) for line in (out / "log.txt").open()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert all(0 < line["train_loss"] < 2 * math.log(32) for line in lines)
    assert max(line["train_lr"] for line in lines) <= 0.0005 * 4 * processes / 256
    saved = serialization.load_file(out / "checkpoint.pth")
    args, wanted = saved["args"], parsed(name)
    same = ("arch", "cfg", "teacher_temp", "norm_last_layer", "use_dense_prediction", "aug_opt")
    assert {key: getattr(args, key) for key in same} == {key: getattr(wanted, key) for key in same}
    assert (saved["epoch"], args.teacher_temp, args.norm_last_layer) == (2, 0.07, False)
    for head in ("head", "head_dense"):
        name = f"{head}.last_layer.weight_v"
        assert not torch.equal(saved["student"][f"module.{name}"], saved["teacher"][name])


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the first command, by the published launcher with two processes."""
    out = tmp_path_factory.mktemp("out")
    words = at_tiny_size("swin", [*folders(images / "train", out), *SMALL_RUN], SMALL_SWIN)
    launcher = ["-m", "torch.distributed.launch", "--nproc_per_node=2", f"--master_port={free_port()}"]
    command = [sys.executable, *launcher, "main_esvit.py", *words]
    done = subprocess.run(command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.slow
def test_swin_runs_under_the_published_launcher(trained: Path) -> None:
    check_run(trained, "swin", processes=2)


@pytest.mark.parametrize(("name", "overrides"), [("cvt", SMALL_CVT), ("vil", SMALL_VIL)], ids=["cvt", "vil"])
def test_pre_training_runs(images: Path, tmp_path: Path, name: str, overrides: list[str]) -> None:
    words = at_tiny_size(name, [*folders(images / "train", tmp_path), *SMALL_RUN], overrides)
    main_esvit.main(main_esvit.get_args_parser().parse_args(words))
    check_run(tmp_path, name, processes=1)


def evaluate(name: str, trained: Path, flags: list[str]) -> None:
    script, _ = words_of(name)
    weights = ["--pretrained_weights", str(trained / "checkpoint.pth")]
    words = at_tiny_size(name, [*weights, *SMALL_EVALUATION, *flags], SMALL_SWIN)
    script.main(script.get_args_parser().parse_args(words))


@pytest.mark.slow
def test_linear_evaluation_runs(images: Path, trained: Path, tmp_path: Path) -> None:
    evaluate("linear", trained, [*folders(images, tmp_path), "--epochs", "2", "--num_labels", "3"])
    log = [json.loads(line) for line in (tmp_path / "log.txt").open()]
    assert [line["epoch"] for line in log] == [0, 1]
    (row,) = json.loads((tmp_path / "results" / "linear.json").read_text())["scores"].values()
    assert row["last_top1"] == log[-1]["test_acc1"]


@pytest.mark.slow
def test_knn_evaluation_runs(images: Path, trained: Path, tmp_path: Path) -> None:
    out = ["--dump_features", str(tmp_path / "features"), "--output_dir", str(tmp_path)]
    evaluate("knn", trained, ["--data_path", str(images), *out])
    features = torch.load(tmp_path / "features" / "trainfeat.pth")
    assert features.shape == (12, 96)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(12))
    assert (tmp_path / "results" / "knn.json").is_file()


@pytest.mark.slow
def test_analyses_run(images: Path, trained: Path, tmp_path: Path) -> None:
    image = str(images / "val" / "class0" / "000.png")
    evaluate("attention", trained, ["--image_path", image, "--output_dir", str(tmp_path / "one")])
    assert len(list((tmp_path / "one").rglob("*.png"))) > 2
    evaluate("correspondence", trained, folders(images, tmp_path / "many"))
    (file,) = (tmp_path / "many").rglob("*.json")
    assert json.loads(file.read_text())
