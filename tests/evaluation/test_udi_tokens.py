"""Evaluation of networks with two class tokens: `--token` by value through the scripts, and its refusal for all others."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from helpers.small_networks import SMALL
from helpers.token_runs import NETWORK, QUICK, TWO, features, last_tokens, make_folder, network, run
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

import eval_finetune
import eval_knn
import eval_linear
import eval_logistic
import run_analysis
from checkpoints import loading, serialization
from data.transforms import augment
from models.heads import DINOHead
from utils import UsageError

BICUBIC = InterpolationMode.BICUBIC
PLACES = {"cls": [0], "cls+": [1], "both": [0, 1]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("tokens"))


@pytest.mark.parametrize("token", PLACES)
def test_knn_compares_the_chosen_tokens(token: str, folder: Path, tmp_path: Path) -> None:
    """Feature files hold the normed tokens, scaled to length 1 together; the results tell the token."""
    dump = ["--nb_knn", "1", "--dump_features", str(tmp_path / "features")]
    results = run(eval_knn, folder, tmp_path / "out", *dump, "--token", token)
    assert results["network"]["token"] == token
    expected = F.normalize(features(folder, "train", last_tokens)[:, PLACES[token]].flatten(1), dim=-1)
    torch.testing.assert_close(torch.load(tmp_path / "features/trainfeat.pth"), expected)


def test_the_linear_probe_sees_the_chosen_tokens_and_tells_its_augmentation(folder: Path, tmp_path: Path) -> None:
    """Of two blocks with both tokens: as many weights as that; another token is another run."""
    probe = ["--epochs", "1", "--n_last_blocks", "2", "--token", "both", "--train_aug", "strong"]
    results = run(eval_linear, folder, tmp_path / "out", *probe)
    weights = torch.load(tmp_path / "out/checkpoint.pth.tar", weights_only=False)["state_dict"]
    assert weights["module.linear.weight"].shape == (3, 2 * 2 * 24)
    assert (results["network"]["token"], results["protocol"]["train_aug"]) == ("both", "strong")
    assert results["protocol"]["name"].startswith("strong augmentation (RandAugment and erasing")
    assert json.loads((tmp_path / "out/log.txt").read_text())["protocol"] == results["protocol"]["name"]
    with pytest.raises(UsageError, match=re.escape("--token both -> cls; --train_aug strong -> standard")):
        run(eval_linear, folder, tmp_path / "out", *probe[:4])
    with pytest.raises(UsageError, match=r"--cache_features .*--train_aug strong"):
        run(eval_linear, folder, tmp_path / "other", *probe, "--cache_features")


@pytest.mark.parametrize("script", [eval_knn, eval_logistic], ids=lambda script: script.__name__)
def test_results_go_where_asked_and_not_beside_the_weights(
    script: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published scripts wrote beside the checkpoint, which of a bare file name was the root of the disk."""
    monkeypatch.chdir(folder)
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    weights = ["--cfg", str(ROOT / NETWORK[-1]), "--pretrained_weights", "checkpoint.pth"]
    run(script, folder, tmp_path / "out", *weights)
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results"]


def analyze(folder: Path, out: Path, *flags: str, tokens: tuple[str, ...] = TWO) -> None:
    paths = [
        "--pretrained_weights",
        str(folder / "checkpoint.pth"),
        "--image_path",
        str(folder / "images/val/class1/000.png"),
    ]
    command = [
        *NETWORK,
        *QUICK,
        *paths,
        "--output_dir",
        str(out),
        *flags,
        "--seed",
        "0",
        *SMALL["vit"].overrides,
        *tokens,
    ]
    run_analysis.main(run_analysis.get_args_parser().parse_args(command))


@torch.no_grad()
def test_attention_is_drawn_from_either_token(folder: Path, tmp_path: Path) -> None:
    """`both` leaves two drawings whose entropies are those of rows 0 and 1 of the last block's maps, over the patches alone."""
    analyze(folder, tmp_path, "--vis_attention", "--vis_correspondence", "--token", "both")
    pixels = TF.to_tensor(TF.resize(Image.open(folder / "images/val/class1/000.png"), [64, 64], BICUBIC)).clamp(0, 1)
    images = TF.normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])[None]
    maps = network().forward_selfattention(images)
    assert isinstance(maps, Tensor)
    for row, name in enumerate(("attention", "attention_cls+")):
        record = json.loads((tmp_path / f"vit_ssl_000_{name}.json").read_text())
        assert record["class_token"] == row
        to_patches = maps[0, :, row, 2:] / maps[0, :, row, 2:].sum(dim=1, keepdim=True)
        bits = -(to_patches * to_patches.log2()).sum(dim=1)
        assert [head["bits"] for head in record["heads"]] == pytest.approx(bits.sort().values.tolist(), rel=1e-3)
        assert (tmp_path / f"vit_ssl_000_{name}.png").exists()
    assert (tmp_path / "vit_ssl_000_correspondence.png").exists()
    with pytest.raises(UsageError, match=r"--query and --token both"):
        analyze(folder, tmp_path, "--vis_attention", "--token", "both", "--query", "3", "3")
    with pytest.raises(UsageError, match="--token both needs two class tokens"):
        analyze(folder, tmp_path, "--vis_attention", "--token", "both", tokens=())


@pytest.mark.parametrize(
    "script", [eval_knn, eval_linear, eval_logistic, eval_finetune], ids=lambda script: script.__name__
)
def test_one_class_token_leaves_nothing_to_choose(script: Any, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^--token cls\+ needs two class tokens, VisionTransformer has 1"):
        run(script, folder, tmp_path, "--token", "cls+", tokens=())


# --------------------------------------------------------------------------- fine-tuning

STILL = ["--epochs", "1", "--warmup_epochs", "0", "--lr", "0", "--min_lr", "0", "--precision", "fp32"]


def tuned(out: Path) -> dict[str, Tensor]:
    """The weights that a fine-tuning left."""
    model: dict[str, Tensor] = serialization.load_file(out / "checkpoint.pth")["model"]
    return model


def test_fine_tuning_takes_both_tokens_and_few_labels(folder: Path, tmp_path: Path) -> None:
    """The linear layer reads both; of the training images those of the list count; another token or list is another run."""
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"class{label}/{number:03}.png\n" for label in range(3) for number in (0, 2)))
    flags = [*STILL, "--token", "both", "--target_list_path", str(listed), "--init_scale", "0.001"]
    results = run(eval_finetune, folder, tmp_path / "out", *flags)
    assert results["network"]["token"] == "both"
    assert (results["data"]["train_images"], results["data"]["val_images"]) == (6, 6)
    weight = tuned(tmp_path / "out")["head.weight"]
    assert weight.shape == (3, 48)
    assert weight.std() == pytest.approx(0.02 * 0.001, rel=0.3)
    again = [*flags, "--epochs", "2"]
    with pytest.raises(UsageError, match=r"belongs to another run .*--token both -> cls"):
        run(eval_finetune, folder, tmp_path / "out", *again, "--token", "cls")
    listed.write_text(listed.read_text().replace("002", "001"))
    with pytest.raises(UsageError, match=r"belongs to another run .*digest of --target_list_path"):
        run(eval_finetune, folder, tmp_path / "out", *again)


def test_fine_tuning_stands_on_layers_of_the_projection_head(folder: Path, tmp_path: Path) -> None:
    """With a rate of 0 they are those of the checkpoint; a run goes on, and its best weights load as a backbone."""
    flags = [*STILL, "--pretrained_weights", str(folder / "with_head.pth"), "--finetune_head_layer", "2"]
    run(eval_finetune, folder, tmp_path / "out", *flags)
    before, after = serialization.load_file(folder / "with_head.pth")["teacher"], tuned(tmp_path / "out")
    for theirs, ours in {"head.mlp.0": "head.0", "head.mlp.2": "head.2"}.items():
        for kind in ("weight", "bias"):
            assert torch.equal(after[f"{ours}.{kind}"], before[f"{theirs}.{kind}"])
    assert after["head.4.weight"].shape == (3, 12)
    assert run(eval_finetune, folder, tmp_path / "out", *flags, "--epochs", "2")["protocol"]["epochs"] == 2
    assert loading.load_backbone(network(), tmp_path / "out/best.pth").left_out == 6
    with pytest.raises(UsageError, match=r"belongs to another run .*--finetune_head_layer 2 -> 1"):
        run(eval_finetune, folder, tmp_path / "out", *flags, "--finetune_head_layer", "1")


def test_each_token_stands_on_its_own_head_where_it_has_one(folder: Path, tmp_path: Path) -> None:
    heads = [DINOHead(24, 16, hidden_dim=12, bottleneck_dim=8) for _ in range(3)]
    state = network().state_dict() | {f"head.{n}": t for n, t in torch.nn.ModuleList(heads).state_dict().items()}
    torch.save({"teacher": state, "student": {}}, tmp_path / "net.pth")
    for level, token in enumerate(("cls", "cls+")):
        flags = ["--pretrained_weights", str(tmp_path / "net.pth"), "--finetune_head_layer", "1", "--token", token]
        run(eval_finetune, folder, tmp_path / token, *STILL, *flags)
        assert torch.equal(tuned(tmp_path / token)["head.0.weight"], state[f"head.{level}.mlp.0.weight"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--finetune_head_layer", "1"], r"checkpoint.pth' has none"),
        (["--finetune_head_layer", "3", "with_head.pth"], "with_head.pth' has 2 hidden layers; lower it"),
        (["--finetune_head_layer", "1", "batch_norm.pth"], "BatchNorm"),
        (["--finetune_head_layer", "1", "wide.pth"], "has a projection head of width 30, --arch gives 24"),
        (["--finetune_head_layer", "1", "--token", "both"], "--token both"),
    ],
    ids=["no head", "too many", "batch norm", "width", "both"],
)
def test_layers_that_are_not_there_are_not_made_up(flags: list[str], words: str, folder: Path, tmp_path: Path) -> None:
    """In the published script names that did not match left a random head, in silence."""
    if flags[-1].endswith(".pth"):
        path = folder / flags.pop()
        heads = {"batch_norm.pth": DINOHead(24, 16, use_bn=True), "wide.pth": DINOHead(30, 16)}
        if path.name in heads:
            head = {f"head.{name}": tensor for name, tensor in heads[path.name].state_dict().items()}
            torch.save({"teacher": network().state_dict() | head, "student": {}}, path)
        flags = [*flags, "--pretrained_weights", str(path)]
    with pytest.raises(UsageError, match=words):
        run(eval_finetune, folder, tmp_path / "out", *STILL, *flags)


# --------------------------------------------------------------------------- the strong view


def test_the_strong_view_is_random_normalized_and_erased() -> None:
    """A quarter of the views has an erased rectangle, whose noise leaves the range of normalized pixels."""
    view = augment.strong_view(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    views = torch.stack([view(Image.new("RGB", (50, 40), (128, 128, 128)))[0] for _ in range(400)])
    assert views.shape == (400, 3, 32, 32)
    erased = views.flatten(1).abs().amax(dim=1) > 1
    assert 0.15 < erased.float().mean() < 0.35
    assert len({image.sum().item() for image in views}) > 100
