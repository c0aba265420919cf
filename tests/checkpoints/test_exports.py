"""Exports load where they are meant to, by the lines that are printed, and carry the normalization of their images."""

from __future__ import annotations

import json
import pickle
from argparse import Namespace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import safetensors
import timm
import torch
from conftest import ROOT, relative_error
from fill import fill_
from helpers.small_networks import ARCHITECTURES, SMALL, small_network
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel

import eval_knn
import export
from checkpoints import files
from checkpoints.exports import write
from config.arguments.export import FORMATS
from config.loading import load_config
from data.transforms.augment import eval_view
from evaluation.features import frozen_backbone, network_config
from models import Backbone, build_model
from utils import UsageError

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
INPUT = ["INPUT.MEAN", str(MEAN), "INPUT.STD", str(STD)]
OVERRIDES: dict[str, list[str]] = {  # by the name of a variant, whose first word is that of the network
    "swin": [],
    "swin smaller window": ["MODEL.SPEC.WINDOW_SIZE", "8", "MODEL.SPEC.DEPTHS", "[2,2]", "MODEL.IMAGE_SIZE", "[48,48]"],
    "swin no bias": ["MODEL.SPEC.QKV_BIAS", "False", "MODEL.SPEC.MLP_RATIO", "2.0"],
    "vit": [],
    "vit wide images": ["MODEL.IMAGE_SIZE", "[64,96]", "MODEL.SPEC.IN_CHANS", "1"],
    "vit two tokens": ["MODEL.SPEC.NUM_CLS_TOKENS", "2"],
    "resnet": [],
}
WRAPPED = {"swin smaller window", "vit two tokens"}  # timm's network in transformers


def built(variant: str, *overrides: str) -> tuple[Backbone, Any]:
    """A small network with random norms, biases and tables, and its config."""
    small = SMALL[variant.split()[0]]
    config = load_config(None, [*small.overrides, *OVERRIDES.get(variant, []), *overrides])
    network = build_model(small.arch, config, patch_size=small.patch_size).eval()
    fill_(network.state_dict())
    return network, config


def images_for(config: Any, batch: int = 2) -> Tensor:
    return torch.randn(batch, config.MODEL.SPEC.IN_CHANS, *config.MODEL.IMAGE_SIZE)


def loaded(folder: Path) -> nn.Module:
    """The network of a folder, all of whose tensors are in the file and the other way round."""
    model, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    return model.eval()


def hidden_states(network: Backbone, images: Tensor) -> list[Tensor]:
    """What transformers calls hidden states after the first: (B, N, C) at every block of a ViT, else after every stage."""
    blocks = network.forward_blocks(images, sum(network.stage_depths))
    if network.num_cls_tokens:
        return [block.tokens_BNC for block in blocks]
    ends = [blocks[sum(network.stage_depths[: i + 1]) - 1] for i in range(len(network.stage_depths))]
    if not network.has_attention:  # ResNet
        return [end.tokens_BNC for end in ends]
    merged = [
        network.tokens(network.enter_stage(i + 1, end.tokens_BNC.unflatten(1, end.grid))).tokens_BNC
        for i, end in enumerate(ends[:-1])
    ]
    return [*merged, ends[-1].tokens_BNC]


# --------------------------------------------------------------------------- transformers


@torch.no_grad()
@pytest.mark.parametrize("variant", OVERRIDES)
def test_transformers_compute_the_same(variant: str, tmp_path: Path) -> None:
    network, config = built(variant)
    write(network, "transformers", tmp_path / "hub", config)
    theirs, images = loaded(tmp_path / "hub"), images_for(config)
    assert (type(theirs).__name__ == "TimmWrapperModel") == (variant in WRAPPED)
    output, features = theirs(images, output_hidden_states=True), network.forward_features(images)
    assert relative_error(output.pooler_output.flatten(1), features.view_BC) < 1e-5
    if variant in WRAPPED:
        return
    grid = output.last_hidden_state
    tokens = grid.flatten(2).transpose(1, 2) if grid.ndim == 4 else grid[:, network.num_cls_tokens :]
    assert relative_error(tokens, features.regions_BTC) < 1e-5
    ours = hidden_states(network, images)
    assert len(output.hidden_states) == len(ours) + 1
    for their, our in zip(output.hidden_states[1:], ours):
        assert relative_error(their.flatten(2).transpose(1, 2) if their.ndim == 4 else their, our) < 1e-5


@torch.no_grad()
def test_the_eps_of_patch_merging_is_all_that_differs(tmp_path: Path) -> None:
    """By the line of the model card; without the factor of the patch projection its norm would differ too."""
    network, config = built("swin")
    network.get_submodule("patch_embed.proj").weight.mul_(1e-3)  # type: ignore[operator]
    network.get_submodule("patch_embed.proj").bias.mul_(1e-3)  # type: ignore[operator]
    write(network, "transformers", tmp_path / "hub", config)
    model, images = loaded(tmp_path / "hub"), images_for(config)
    (line,) = (line for line in (tmp_path / "hub" / "README.md").read_text().split("`") if line.startswith("for layer"))
    exec(line, {"model": model})
    assert relative_error(model(images).pooler_output, network(images)) < 2e-6


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["resnet50", "resnext50_32x4d"])
def test_strides_and_groups_of_bottlenecks(arch: str, tmp_path: Path) -> None:
    network = build_model(arch, load_config(None, ["MODEL.NAME", "resnet"])).eval()
    fill_(network.state_dict())
    write(network, "transformers", tmp_path / "hub", load_config(None, ["MODEL.NAME", "resnet"]))
    images = torch.randn(1, 3, 64, 64)
    assert relative_error(loaded(tmp_path / "hub")(images).pooler_output.flatten(1), network(images)) < 1e-5


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("window", [7, 14])
def test_full_size_swin(window: int, tmp_path: Path) -> None:
    """Window 14 has 7 in the last stage, for which transformers' own class has no table."""
    config = load_config(None, ["MODEL.SPEC.WINDOW_SIZE", str(window)])
    network = build_model("swin_tiny", config).eval()
    fill_(network.state_dict())
    write(network, "transformers", tmp_path / "hub", config)
    images = torch.randn(1, 3, 224, 224)
    assert relative_error(loaded(tmp_path / "hub")(images).pooler_output, network(images)) < 3e-5


@pytest.mark.parametrize("name", ["cvt", "vil"])
def test_networks_that_transformers_does_not_have(name: str, tmp_path: Path) -> None:
    network, config = built(name)
    with pytest.raises(UsageError, match=r"--format transformers does not support .* choose one of backbone"):
        write(network, "transformers", tmp_path / "hub", config)
    assert not list(tmp_path.iterdir())


def test_the_processor_gives_the_pixels_of_the_evaluation(tmp_path: Path) -> None:
    """Up to three of 255 levels, because it resizes tensors; it rounds half of an odd margin down, torchvision to even."""
    network, config = built("vit", *INPUT)
    write(network, "transformers", tmp_path / "hub", config)
    processor, ours = AutoImageProcessor.from_pretrained(tmp_path / "hub"), eval_view(64, 0.875, MEAN, STD)
    photo = Image.effect_mandelbrot((300, 201), (-2, -1.5, 1, 1.5), 100).convert("L")
    for size, shift in (
        ((300, 201), 0),
        ((73, 73), 0),
        ((40, 60), 0),
        ((120, 400), 1),
    ):  # the last is resized to 73 x 243
        channels = [photo.resize(size), photo.rotate(90).resize(size), photo.rotate(180).resize(size)]
        image = Image.merge("RGB", channels)
        pixels, expected = processor(image, return_tensors="pt").pixel_values[0], ours(image)[0]
        levels = 255 * torch.tensor(STD)[:, None, None]
        assert pixels.shape == expected.shape
        assert ((pixels[:, shift:] - expected[:, : 64 - shift]) * levels).abs().max() < 3.1


def test_the_model_card_tells_the_training(tmp_path: Path) -> None:
    network, config = built("resnet", *INPUT)
    args = Namespace(use_dense_prediction=True, data_path="/home/somebody/lichens", epochs=9)
    torch.save({"teacher": {}, "args": args, "epoch": 5}, tmp_path / "checkpoint.pth")
    write(network, "transformers", tmp_path / "known", config, tmp_path / "checkpoint.pth")
    text = (tmp_path / "known" / "README.md").read_text()
    for words in ("views and regions; 5 of 9 epochs", "| lichens |", "64 x 64", str(MEAN), "license:", "11.2 million"):
        assert words in text
    assert "somebody" not in text
    write(network, "transformers", tmp_path / "unknown", config)
    assert "| Data | not stated" in (tmp_path / "unknown" / "README.md").read_text()


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, config = built("vit")
    (tmp_path / "mine").mkdir()
    with pytest.raises(UsageError, match=r"--output .*mine cannot be used"):
        write(network, "transformers", tmp_path / "mine", config)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("checkpoints.model_card.model_card", fail)
    with pytest.raises(UsageError, match="No space left"):
        write(network, "transformers", tmp_path / "hub", config)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert not list((tmp_path / "mine").iterdir())
    with pytest.raises(FileExistsError):
        files.write_new_folder(tmp_path / "mine", lambda folder: None)


# --------------------------------------------------------------------------- every format


def printed_lines(format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Backbone, str, Path]:
    """Run the script on a small Swin; return the network, the lines that it prints and its output."""
    network, config = built("swin", *INPUT)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    output = tmp_path / f"out{ {'safetensors': '.safetensors', 'detectron2': '.pkl'}.get(format, '') }"
    (tmp_path / "network.yaml").write_text(config.dump())
    line = ["--arch", "swin", "--cfg", str(tmp_path / "network.yaml"), "--format", format, "--output", str(output)]
    line += ["--pretrained_weights", str(tmp_path / "weights.pth")]
    export.main(export.get_args_parser().parse_args(line))
    return network, capsys.readouterr().out, output


@torch.no_grad()
@pytest.mark.parametrize("format", [*FORMATS[:-2], pytest.param("onnx", marks=pytest.mark.slow), "torchscript"])
def test_the_printed_lines_load_it(format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network, lines, output = printed_lines(format, tmp_path, capsys)
    images = torch.randn(3, 3, 64, 64)
    assert len(lines.splitlines()) == 2
    names: dict[str, Any] = {"images": images, "train": Namespace()}
    names["model"] = {"backbone": {}, "data_preprocessor": {}} if format == "mmdet" else Namespace()
    exec(lines, names)
    expected = network.forward_features(images)
    if format == "detectron2":
        assert names["train"].init_checkpoint == str(output)
        assert names["model"].pixel_std == [102.0, 127.5, 153.0]
    elif format == "mmdet":
        assert names["model"]["backbone"]["init_cfg"] == {"type": "Pretrained", "checkpoint": str(output)}
        assert names["model"]["data_preprocessor"]["mean"] == [25.5, 51.0, 76.5]
    elif format in {"onnx", "torchscript"}:
        assert relative_error(names["view_features"], expected.view_BC) < 1e-5
        assert relative_error(names["region_features"], expected.regions_BTC) < 1e-5
    elif format == "transformers":
        assert relative_error(names["model"](images).pooler_output, expected.view_BC) < 1e-5
        assert list(names["processor"].image_mean) == MEAN
    else:
        model = names["model"].eval() if format == "timm" else names["backbone"].eval()
        assert relative_error(model(images), expected.view_BC) < 1e-6
    if format in {"backbone", "safetensors"}:
        args = eval_knn.get_args_parser().parse_args(["--pretrained_weights", str(output), "--device", "cpu"])
        again = frozen_backbone(args, network_config(args), output, torch.device("cpu"))
        assert args.arch == "swin"
        assert torch.equal(again(images), expected.view_BC)


@torch.no_grad()
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("kept", ["first", "none"])
def test_the_printed_lines_after_tokens_are_dropped(
    kept: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network, config = built("vit two tokens")
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    (tmp_path / "network.yaml").write_text(config.dump())
    line = [
        "--arch",
        "vit",
        "--cfg",
        str(tmp_path / "network.yaml"),
        "--pretrained_weights",
        str(tmp_path / "weights.pth"),
    ]
    line += ["--format", "backbone" if suffix == "pth" else "safetensors", "--output", str(tmp_path / f"out.{suffix}")]
    export.main(export.get_args_parser().parse_args([*line, "--patch_size", "8", "--class_tokens", kept]))
    names: dict[str, Any] = {}
    exec(capsys.readouterr().out, names)
    if kept == "none":
        assert names["state"]["pos_embed"].shape[1] == network.pos_embed.shape[1] - 2  # type: ignore[index]
    else:
        network.keep_class_tokens(1)
        images = images_for(config, 2)
        assert relative_error(names["backbone"](images), network(images)) < 1e-6


@pytest.mark.parametrize("format", [*FORMATS[:-2], pytest.param("onnx", marks=pytest.mark.slow), "torchscript"])
def test_every_format_carries_the_normalization(format: str, tmp_path: Path) -> None:
    network, config = built("resnet", *INPUT)
    output = tmp_path / "out"
    write(network, format, output, config)
    expected = {"mean": MEAN, "std": STD, "image_size": [64, 64]}
    found: Any
    if format == "safetensors":
        with safetensors.safe_open(output, "pt") as file:
            found = {key: json.loads(value) for key, value in file.metadata().items()}
    elif format == "onnx":
        found = {
            entry.key: json.loads(entry.value) for entry in onnx.load(output).metadata_props if entry.key in expected
        }
    elif format == "torchscript":
        extra = {"preprocessing.json": ""}
        torch.jit.load(output, _extra_files=extra)
        found = json.loads(extra["preprocessing.json"])
    elif format == "transformers":
        content = json.loads((output / "preprocessor_config.json").read_text())
        size = [content["crop_size"]["height"], content["crop_size"]["width"]]
        found = {"mean": content["image_mean"], "std": content["image_std"], "image_size": size}
    elif format == "detectron2":
        found = pickle.loads(output.read_bytes())["preprocessing"]
    elif format == "mmdet":
        found = torch.load(output, weights_only=True)["meta"]["preprocessing"]
    else:
        state = torch.load(output, weights_only=True)
        found = state._metadata["preprocessing"]
        assert all(isinstance(value, Tensor) for value in state.values())
    assert found == expected


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_trace_takes_any_number_of_images(name: str, tmp_path: Path) -> None:
    network, config = built(name)
    write(network, "torchscript", tmp_path / "trace.pt", config)
    traced = torch.jit.load(tmp_path / "trace.pt")
    for batch in (1, 5):
        images = images_for(config, batch)
        for found, expected in zip(traced(images), network.forward_features(images)):
            assert relative_error(found, expected) < 1e-5


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "resnet", "cvt"])
def test_an_onnx_graph_takes_images_of_any_size(name: str, tmp_path: Path) -> None:
    unshifted = ["MODEL.SPEC.SHIFT", "False", "MODEL.SPEC.REL_POS_EMBED", "False"] if name == "cvt" else []
    network, config = built(name, *unshifted)
    write(network, "onnx", tmp_path / "net.onnx", config)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]
    for shape in ((1, 3, 64, 64), (3, 3, 96, 40), (2, 3, 65, 130)):
        images = torch.randn(shape)
        for found, expected in zip(session.run(None, {"images": images.numpy()}), network.forward_features(images)):
            assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("name", ["swin", "vil", "cvt"])
def test_windows_tie_a_graph_to_the_grid(name: str) -> None:
    assert not small_network(name).any_grid
    assert not small_network("vit", "MODEL.SPEC.POS_RESIZE", "scale").any_grid


@torch.no_grad()
@pytest.mark.parametrize("name", ["swin", "vit", "resnet"])
def test_feature_maps_in_timm(name: str, tmp_path: Path) -> None:
    """By the recipe of the documentation; timm gives the last block before the final norm."""
    network, config = built(name)
    write(network, "timm", tmp_path / "timm.pth", config)
    recipe = "features_only=True, pretrained=True, pretrained_cfg_overlay=dict(file=FILE, num_classes=0)"
    assert recipe in " ".join((ROOT / "docs" / "checkpoints.md").read_text().split())
    model = network.in_timm(config)
    assert model is not None
    call = f"{model.call()[:-1]}, {recipe})"
    images = images_for(config)
    feature_map = eval(call, {"timm": timm, "FILE": str(tmp_path / "timm.pth")}).eval()(images)[-1]
    last = network.forward_blocks(images)[-1]
    expected = last.tokens_BNC[:, last.num_prefix_tokens :].unflatten(1, last.grid)
    channels_last = feature_map if name == "swin" else feature_map.permute(0, 2, 3, 1)
    assert relative_error(channels_last, expected) < 1e-5
