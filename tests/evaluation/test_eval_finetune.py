"""Fine-tuning: rates by depth, learning, resuming, several processes and what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.confusions import assert_confusions_fit, read_confusions
from helpers.finetune_runs import PLAIN, SMALL_RUN, command, results, run
from helpers.runs import TINY_SWIN, run_script, write_images
from helpers.small_networks import ARCHITECTURES, SMALL, small_network
from helpers.training_runs import assert_identical
from PIL import Image
from timm.utils import ModelEmaV3
from torch import nn

import eval_finetune
from checkpoints import loading, serialization
from checkpoints.network import saved_network
from config.loading import SavedConfig, load_config
from data.loader import Batch
from data.transforms.augment import eval_view
from evaluation import finetune
from evaluation.finetune import layer_depths, param_groups
from models import Backbone, build_model, load_arch_config
from training import checkpointing
from utils import UsageError

CLASSES = 3
# A global token ends with its stage, so the last block of a stage does not need what only it reads, and the last block of all
# nothing but what it reads.
WITHOUT_EFFECT = {"layer1.3.attn.g2g_relative_position_bias", "layer2.3.attn.local_relative_position_bias_table"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of different colors, 12 training and 9 validation images."""
    root = tmp_path_factory.mktemp("images")
    for seed, (split, count) in enumerate((("train", 4), ("val", 3))):
        write_images(root / split, count, classes=CLASSES, seed=seed)
    return root


# --------------------------------------------------------------------------- rates by depth


def with_head(name: str) -> Backbone:
    network = small_network(name)
    network.head = nn.Linear(network.num_features, CLASSES)
    return network


DEPTHS: dict[str, dict[str, int]] = {  # two stages of two blocks, but for vit and resnet
    "swin": {"patch_embed.": 0, "layers.0.blocks.0.": 1, "layers.0.blocks.1.": 2, "layers.0.downsample.": 2,
             "layers.1.blocks.0.": 3, "layers.1.blocks.1.": 4, "norm.": 5, "head.": 5},
    "vit": {"cls_token": 0, "pos_embed": 0, "patch_embed.": 0, "blocks.0.": 1, "blocks.1.": 2, "blocks.2.": 3, "norm.": 4,
            "head.": 4},
    "resnet": {"backbone.backbone.conv1.": 0, "backbone.backbone.bn1.": 0}
              | {f"backbone.backbone.layer{1 + i // 2}.{i % 2}.": 1 + i for i in range(8)} | {"head.": 9},
    "cvt": {"stage0.0.": 0, "stage0.1.layers.0.": 1, "stage0.1.layers.1.": 2, "stage1.0.": 2, "stage1.1.layers.0.": 3,
            "stage1.1.layers.1.": 4, "norm.": 5, "head.": 5},
    "vil": {"layer1.0.": 0, "layer1.1.": 1, "layer1.2.": 1, "layer1.3.": 2, "layer1.4.": 2, "layer2.0.": 2, "layer2.1.": 3,
            "layer2.2.": 3, "layer2.3.": 4, "layer2.4.": 4, "norm.": 5, "head.": 5},
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_depths_by_value(name: str) -> None:
    """0 for the stem, a block its number, what leads to the next stage that of the block before it; norm and head last."""
    expected = DEPTHS[name]
    depths = layer_depths(with_head(name))
    assert all(key.startswith(tuple(expected)) for key in depths)
    found = {prefix: {depth for key, depth in depths.items() if key.startswith(prefix)} for prefix in expected}
    assert found == {prefix: {depth} for prefix, depth in expected.items()}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rates_and_decay_by_value(name: str) -> None:
    """Each parameter's group has layer_decay ** (n + 1 - depth), and weight decay unless it is a vector or a position."""
    network = with_head(name)
    deepest = max(DEPTHS[name].values())
    name_of = {id(parameter): key for key, parameter in network.named_parameters()}
    seen = []
    groups = param_groups(network, weight_decay=0.05, layer_decay=0.75)
    scales = sorted({group["lr_scale"] for group in groups})
    assert scales == pytest.approx([0.75 ** (deepest - depth) for depth in range(deepest + 1)])  # stem smallest, head 1
    assert len(groups) == 2 * len(scales)  # with weight decay and without
    for group in groups:
        for parameter in group["params"]:
            key = name_of[id(parameter)]
            seen.append(key)
            depth = next(depth for prefix, depth in DEPTHS[name].items() if key.startswith(prefix))
            assert group["lr_scale"] == pytest.approx(0.75 ** (deepest - depth)), key
            plain = parameter.ndim == 1 or any(part in key for part in ("relative_position", "pos_embed", "cls_token"))
            assert group["weight_decay"] == (0.0 if plain else 0.05), key
    assert sorted(seen) == sorted(name_of.values())


def test_schedule_by_value() -> None:
    """Ten steps of warm-up from 0, then half a cosine to the smallest rate, each group at its own scale."""
    network = with_head("swin")
    recipe = finetune.Recipe(4, 10, 1.0, 0.1, 1, 0.5, 0.0, 0, 0, 0, 0, 1, None)
    tuner = finetune.FineTuner(network, recipe, CLASSES, torch.device("cpu"), "fp32")
    for step, rate in ((0, 0.0), (5, 0.5), (10, 1.0), (25, 0.55), (40, 0.1)):
        tuner.scheduler.step_update(step)
        for group in tuner.optimizer.param_groups:
            assert group["lr"] == pytest.approx(rate * group["lr_scale"]), step


# --------------------------------------------------------------------------- the run


def test_accuracy_and_files_of_a_run(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(images, tmp_path, *PLAIN, "--epochs", "12", "--lr", "0.5", "--layer_decay", "0.9", "--model_ema")
    found = assert_confusions_fit(tmp_path, "finetune")
    best = found["scores"]["best"]
    assert best["top1"] >= 88  # chance: 33
    assert (found["data"]["classes"], found["data"]["val_images"], found["protocol"]["epochs"]) == (CLASSES, 9, 12)
    assert best["top5"] == 100.0  # of three classes
    assert all(json.loads(line)["top5_is"] == "top3" for line in (tmp_path / "log.txt").open())
    assert set(found["scores"]) == {"best", "last, model", "last, ema"}
    assert "Top3: 100.00" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "log.txt").open()]
    assert [line["epoch"] for line in lines] == list(range(12))
    assert lines[-1]["train_loss"] < 0.7 * lines[0]["train_loss"]
    top1, epoch = max((line["val"][name]["top1"], -line["epoch"]) for line in lines for name in line["val"])
    assert (best["top1"], best["epoch"]) == (top1, -epoch)

    content = serialization.load_file(tmp_path / "best.pth")
    assert content["model"]["head.weight"].shape == (CLASSES, 24)
    config = load_arch_config("swin", "experiments/demo/swin_micro.yaml", TINY_SWIN)
    backbone = build_model("swin", config)
    loading.load_backbone(backbone, tmp_path / "best.pth")  # for the other evaluations, which need no --cfg then
    saved = saved_network(tmp_path / "best.pth")
    assert isinstance(saved.config, SavedConfig)
    assert (saved.arch, saved.config.text) == ("swin", config.dump())
    assert torch.equal(backbone.state_dict()["norm.weight"], content["model"]["norm.weight"])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    run(images, tmp_path, *PLAIN, "--epochs", "12", "--lr", "0.5", "--layer_decay", "0.9", "--model_ema")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def small_run(name: str, images: Path, output_dir: Path, *flags: str) -> None:
    """Fine-tune the small network of an architecture."""
    arch, overrides, patch_size = SMALL[name]
    output_dir.mkdir()
    (output_dir / "small.yaml").write_text(load_config(None, overrides).dump())
    weights = [] if "--pretrained_weights" in flags else ["--random_weights"]
    command = [*weights, "--data_path", str(images), "--output_dir", str(output_dir), *SMALL_RUN, "--arch", arch]
    command += ["--cfg", str(output_dir / "small.yaml"), "--patch_size", str(patch_size), "--image_size", "32", *flags]
    eval_finetune.main(eval_finetune.get_args_parser().parse_args(command))


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_learns(name: str, images: Path, tmp_path: Path) -> None:
    rate, epochs = {"resnet": ("0.05", "4"), "vit": ("0.2", "8")}.get(name, ("0.3", "8"))
    small_run(name, images, tmp_path / "run", *PLAIN, "--epochs", epochs, "--lr", rate, "--layer_decay", "0.9")
    assert results(tmp_path / "run")["scores"]["best"]["top1"] >= 66  # chance: 33
    losses = [json.loads(line)["train_loss"] for line in (tmp_path / "run" / "log.txt").open()]
    assert min(losses[1:]) < 0.7 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_weight_of_every_architecture_is_trained(name: str, images: Path, tmp_path: Path) -> None:
    """With the whole recipe: mixup, drop path, accumulation, recomputed blocks; and the average follows."""
    network = small_network(name)
    before = {key: tensor.clone() for key, tensor in network.named_parameters()}
    torch.save({"teacher": network.state_dict(), "student": {}}, tmp_path / "pretrained.pth")
    flags = ["--pretrained_weights", str(tmp_path / "pretrained.pth"), "--warmup_epochs", "0", "--model_ema"]
    flags += ["--batch_size_per_gpu", "2", "--accum_iter", "2", "--grad_checkpointing"]
    small_run(name, images, tmp_path / "run", *flags, *([] if name == "resnet" else ["--drop_path", "0.1"]))
    content = serialization.load_file(tmp_path / "run" / "checkpoint.pth")
    for key, tensor in before.items():
        if key not in WITHOUT_EFFECT:
            assert not torch.equal(content["model"][key], tensor), key
            assert not torch.equal(content["ema"][key], content["model"][key]), key
    assert torch.isfinite(torch.cat([tensor.flatten().float() for tensor in content["model"].values()])).all()
    tuned = small_network(name)
    loading.load_backbone(tuned, tmp_path / "run" / "best.pth")  # for the other evaluations


def test_starts_from_the_given_weights(images: Path, tmp_path: Path) -> None:
    """A rate of 0 leaves the backbone as it was in the checkpoint."""
    torch.manual_seed(7)
    config = load_arch_config("swin", "experiments/demo/swin_micro.yaml", TINY_SWIN)
    weights = build_model("swin", config).state_dict()
    torch.save({"teacher": weights, "student": {}}, tmp_path / "pretrained.pth")
    run(
        images, tmp_path / "run", "--pretrained_weights", str(tmp_path / "pretrained.pth"), "--lr", "0", "--min_lr", "0"
    )
    tuned = serialization.load_file(tmp_path / "run" / "checkpoint.pth")["model"]
    for name, tensor in weights.items():
        assert torch.equal(tuned[name], tensor), name


class Killed(Exception):
    """The run ends here, as if by a signal."""


@pytest.mark.parametrize(
    "flags", [["--model_ema"], ["--accum_iter", "2", *PLAIN]], ids=["mixup and ema", "accumulation"]
)
def test_resumed_equals_uninterrupted(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    """Bit for bit: weights, average, optimizer, best accuracy and random states."""
    flags = [*flags, "--batch_size_per_gpu", "2"]
    run(images, tmp_path / "whole", *flags)
    save = finetune.save_run

    def save_and_die(*args: Any) -> None:
        save(*args)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(eval_finetune, "save_run", save_and_die)
        with pytest.raises(Killed):
            run(images, tmp_path / "parts", *flags)
    run(images, tmp_path / "parts", *flags)
    whole, parts = (serialization.load_file(tmp_path / name / "checkpoint.pth") for name in ("whole", "parts"))
    assert whole["epoch"] == 2
    for key in whole.keys() - {"args"}:
        assert_identical(whole[key], parts[key], key)
    assert results(tmp_path / "whole") == results(tmp_path / "parts")
    assert len((tmp_path / "parts" / "log.txt").read_text().splitlines()) == 2


def test_damaged_checkpoint_falls_back_to_the_previous_one(images: Path, tmp_path: Path) -> None:
    """The last epoch is trained again to the same bits; the damaged file and the line of that epoch are kept aside."""
    out = tmp_path / "run"
    run(images, out, *PLAIN)
    whole, scores = serialization.load_file(out / "checkpoint.pth"), results(out)
    (out / "checkpoint.pth").write_bytes(b"damaged")
    run(images, out, *PLAIN)
    again = serialization.load_file(out / "checkpoint.pth")
    for key in whole.keys() - {"args"}:
        assert_identical(whole[key], again[key], key)
    assert results(out) == scores
    assert (out / "checkpoint.pth.damaged").read_bytes() == b"damaged"
    for name, epochs in (("log.txt", [0, 1]), ("log_repeated.txt", [1])):
        assert [json.loads(line)["epoch"] for line in (out / name).open()] == epochs


def test_shared_weights_are_averaged_once_a_step() -> None:
    """ViL's global projections are its local ones; against lerp in double precision, with timm's decay by the step."""
    network = with_head("vil")
    state = network.state_dict()
    assert len({tensor.data_ptr() for tensor in state.values()}) < len(state)  # shared tensors are there
    average = finetune.WeightAverage(network, 0.9, use_warmup=True)
    expected = {name: tensor.double().clone() for name, tensor in state.items()}
    for step in range(1, 5):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update(network, step)
        decay = min(0.9, 1 - step ** (-2 / 3))  # timm counts its steps from 0
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                expected[name] += (1 - decay) * (tensor - expected[name])
            else:
                expected[name] = tensor.double()
    for name, tensor in average.module.state_dict().items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-5, msg=name)


def test_weight_average_equals_timm_without_shared_weights() -> None:
    """Bit for bit, buffers of BatchNorm included."""
    network = with_head("resnet")
    ours, theirs = (kind(network, 0.9, use_warmup=True) for kind in (finetune.WeightAverage, ModelEmaV3))
    for step in range(1, 4):
        network.train()(torch.randn(2, 3, 64, 64))
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(1.1)
        ours.update(network, step)
        theirs.update(network, step)
    for name, tensor in theirs.module.state_dict().items():
        assert torch.equal(ours.module.state_dict()[name], tensor), name


def test_best_epoch() -> None:
    best = finetune.Best()
    for epoch, (model, ema) in enumerate([(30.0, 20.0), (30.0, 40.0), (40.0, 10.0)]):
        accuracies = {"model": finetune.Accuracy(model, 90.0), "ema": finetune.Accuracy(ema, 95.0)}
        best = eval_finetune.better(best, accuracies, epoch)
    assert best == finetune.Best("ema", 1, 40.0, 95.0)


def test_gray_images(tmp_path: Path) -> None:
    """One channel: random crops and flips without RandAugment."""
    for seed, split in enumerate(("train", "val")):
        write_images(tmp_path / "images" / split, 2, classes=2, seed=seed)
    gray = ["MODEL.SPEC.IN_CHANS", "1", "INPUT.MEAN", "[0.5]", "INPUT.STD", "[0.25]"]
    eval_finetune.main(
        eval_finetune.get_args_parser().parse_args([*command(tmp_path / "images", tmp_path / "run"), *gray])
    )
    assert results(tmp_path / "run")["data"]["classes"] == 2


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_val_interpolation(images: Path, tmp_path: Path, interpolation: str) -> None:
    flags = [] if interpolation == "bicubic" else ["--val_interpolation", interpolation]
    args = eval_finetune.get_args_parser().parse_args(command(images, tmp_path, *flags))
    config = load_config("experiments/demo/swin_micro.yaml", TINY_SWIN)
    _, val_set = eval_finetune.build_datasets(args, config, 28)
    picture = Image.open(images / "val" / "class0" / "000.png")
    view = val_set[0].views[0]
    for kind in ("bicubic", "bilinear"):
        (expected,) = eval_view(28, 0.875, config.INPUT.MEAN, config.INPUT.STD, kind)(picture)
        assert torch.equal(view, expected) is (kind == interpolation)


# --------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--batch_size_per_gpu", "3"], "--batch_size_per_gpu 3 must be even"),
        (["--batch_size_per_gpu", "16"], "--batch_size_per_gpu 16 .*12 images"),
        (["--accum_iter", "4"], "--accum_iter 4"),
        (["--warmup_epochs", "3"], "--warmup_epochs 3 .*--epochs 2"),
        (["--aa", "random"], "--aa random"),
        (["--pretrained_weights", "no.pth"], r"'no\.pth' does not exist"),
        (["--image_size", "3"], "3 pixels are smaller than a patch of 4"),
        (["--precision", "fp16"], "needs a CUDA device"),
        (["--arch", "swim_tiny"], "did you mean 'swin_tiny'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors(images: Path, tmp_path: Path, flags: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        run(images, tmp_path / "out", *flags)
    assert "\n" not in str(caught.value)


def test_folders_of_other_runs_are_refused(images: Path, tmp_path: Path) -> None:
    torch.save({"student": {}, "teacher": {}, "epoch": 3}, tmp_path / "checkpoint.pth")
    before = (tmp_path / "checkpoint.pth").read_bytes()
    with pytest.raises(UsageError, match="has no model"):
        run(images, tmp_path)
    assert (tmp_path / "checkpoint.pth").read_bytes() == before
    (tmp_path / "linear").mkdir()
    (tmp_path / "linear" / "checkpoint.pth.tar").touch()
    with pytest.raises(UsageError, match=r"checkpoint\.pth\.tar"):
        run(images, tmp_path / "linear")
    assert [path.name for path in tmp_path.joinpath("linear").iterdir()] == ["checkpoint.pth.tar"]


WRONG: dict[str, Callable[[dict[str, Any]], object]] = {
    "exp_avg of head.weight": lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.ones(3)),
    "'optimizer'": lambda c: c["optimizer"].update(param_groups=5),
    "'best'": lambda c: c.update(best={"network": "model"}),
    "'last'": lambda c: c.update(last={"model": 3}),
    "'last' ": lambda c: c["last"]["model"].update(confusion_P3=torch.ones(2, 3)),
    "'model'": lambda c: c["model"].update({"norm.weight": 5}),
    "'rng'": lambda c: c.update(rng=[5]),
    "'epoch'": lambda c: c.update(epoch="1"),
}


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a short run."""
    folder = tmp_path_factory.mktemp("finished")
    run(images, folder, *PLAIN, "--epochs", "1", "--warmup_epochs", "0")
    return folder / "checkpoint.pth"


@pytest.mark.parametrize("named", WRONG)
def test_wrong_values_are_named_and_the_file_stays(images: Path, finished: Path, tmp_path: Path, named: str) -> None:
    content = torch.load(finished, weights_only=False)
    first = content["optimizer"]["param_groups"][0]["param_names"][0]
    WRONG[named](content)
    torch.save(content, tmp_path / "checkpoint.pth")
    before = (tmp_path / "checkpoint.pth").read_bytes()
    with pytest.raises(UsageError, match=named.strip().replace("head.weight", first)):
        run(images, tmp_path, *PLAIN)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pth"]
    assert (tmp_path / "checkpoint.pth").read_bytes() == before


def test_resuming_another_network_is_refused(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path / "run", *PLAIN, "--epochs", "1", "--warmup_epochs", "0")
    before = (tmp_path / "run" / "checkpoint.pth").read_bytes()
    for split in ("train", "val"):
        write_images(tmp_path / "two" / split, 6, classes=2)
    with pytest.raises(UsageError, match="classes, the data 2"):
        run(tmp_path / "two", tmp_path / "run", *PLAIN)
    with pytest.raises(UsageError, match="made with --model_ema off"):
        run(images, tmp_path / "run", *PLAIN, "--model_ema")
    for flags, words in (
        (["--image_size", "48"], "--image_size 32 -> 48"),
        (["--crop_ratio", "1"], "--crop_ratio 0.875 -> 1.0"),
    ):
        with pytest.raises(UsageError, match=f"belongs to another run .*{words}"):
            run(images, tmp_path / "run", *PLAIN, *flags)
    for split, count in (("train", 4), ("val", 3)):
        for label, name in enumerate(("class0", "class1", "other")):
            write_images(tmp_path / "other" / split / name, count, seed=label)
    with pytest.raises(UsageError, match=r"belongs to another run .*digest of classes and labels"):
        run(tmp_path / "other", tmp_path / "run", *PLAIN)
    assert (tmp_path / "run" / "checkpoint.pth").read_bytes() == before
    (tmp_path / "run" / "checkpoint.pth").write_bytes(before[: len(before) // 2])
    with pytest.raises(UsageError, match="damaged"):
        run(images, tmp_path / "run", *PLAIN)


def test_a_loss_that_is_not_finite_ends_the_run(images: Path, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="a lower --lr"):
        run(images, tmp_path, *PLAIN, "--warmup_epochs", "0", "--clip_grad", "0", lr=1e30)


def test_weights_that_are_not_finite_are_not_saved(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files of the first epoch stay as they were."""
    saved: dict[Path, bytes] = {}

    def spoil(output_dir: Path, tuner: finetune.FineTuner, position: checkpointing.RunPosition, *rest: Any) -> str:
        if position.epoch == 2:
            saved.update({path: path.read_bytes() for path in output_dir.glob("*.pth")})
            tuner.network.head.bias.data[0] = float("inf")  # type: ignore[operator]
        return finetune.save_run(output_dir, tuner, position, *rest)

    monkeypatch.setattr(eval_finetune, "save_run", spoil)
    with pytest.raises(FloatingPointError, match=r"model\.head\.bias is not finite"):
        run(images, tmp_path)
    assert {path.name for path in saved} == {"best.pth", "checkpoint.pth"}
    assert {path: path.read_bytes() for path in tmp_path.glob("*.pth")} == saved


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    """Neither weights nor average nor optimizer, after a step that did."""
    recipe = finetune.Recipe(1, 4, 0.1, 0.0, 0, 1.0, 0.05, 0, 0, 0, 0, 1, 0.9)
    tuner = finetune.FineTuner(with_head("swin"), recipe, CLASSES, torch.device("cpu"), "fp32")
    batch = Batch([torch.randn(2, 3, 64, 64)], torch.tensor([0, 1]), torch.arange(2), [])

    def everything() -> dict[str, Any]:
        networks = {name: network.state_dict() for name, network in tuner.networks().items()}
        return copy.deepcopy(networks | {"optimizer": tuner.optimizer.state_dict()["state"]})

    start = everything()
    tuner.step([batch], 0)
    before = everything()
    assert not torch.equal(start["model"]["head.weight"], before["model"]["head.weight"])
    with pytest.raises(FloatingPointError, match="the loss of step 1 is nan"):
        tuner.step([batch._replace(views=[torch.full((2, 3, 64, 64), torch.nan)])], 1)
    assert_identical(before, everything(), "after the step")


def test_finished_run_reports_again(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(images, tmp_path, *PLAIN)
    said, record = capsys.readouterr().out.splitlines()[-1], (tmp_path / "results" / "finetune.json").read_bytes()
    found = json.loads(record)
    best = found["scores"]["best"]
    assert said == f"best of 9 validation images: Top1: {best['top1']:.2f} (epoch {best['epoch']}, model)"
    assert (found["protocol"]["top5_is"], found["protocol"]["image_size"]) == ("top3", 32)
    assert found["network"]["checkpoint_key"] == "teacher"
    (tmp_path / "results" / "finetune.json").unlink()
    run(images, tmp_path, *PLAIN)
    again = capsys.readouterr()
    assert again.out.splitlines() == [said]
    assert f"{tmp_path} already has 2 epochs of --epochs 2" in again.err
    assert (tmp_path / "results" / "finetune.json").read_bytes() == record


# --------------------------------------------------------------------------- several processes


@pytest.mark.slow
def test_two_processes_equal_one(images: Path, tmp_path: Path) -> None:
    """9 validation images on 2 processes count once each; weights agree, without randomness in the network."""
    flags = [*PLAIN, "--batch_size_per_gpu", "4", "--clip_grad", "1", "--drop_path", "0"]
    one = run_script("eval_finetune.py", *command(images, tmp_path / "one", *flags))
    assert one.returncode == 0, one.stderr
    flags[flags.index("--batch_size_per_gpu") + 1] = "2"
    two = run_script("eval_finetune.py", *command(images, tmp_path / "two", *flags), processes=2)
    assert two.returncode == 0, two.stderr
    found = [results(tmp_path / name) for name in ("one", "two")]
    assert found[0] == found[1]
    assert_confusions_fit(tmp_path / "two", "finetune")
    one_csv, two_csv = (read_confusions(tmp_path / name, "finetune") for name in ("one", "two"))
    assert one_csv == two_csv
    assert found[0]["data"]["val_images"] == 9
    hits = found[0]["scores"]["best"]["top1"] * 9 / 100
    assert hits == pytest.approx(round(hits), abs=1e-6)
    losses = [
        [json.loads(line)["train_loss"] for line in (tmp_path / name / "log.txt").open()] for name in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_mistakes_end_with_one_line_and_code_2(images: Path, tmp_path: Path) -> None:
    result = run_script("eval_finetune.py", *command(images, tmp_path, "--layer_decay", "2"))
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("eval_finetune.py: error: argument --layer_decay")
    assert "Traceback" not in result.stderr
