"""Files of other libraries and projects, written here as they are there, load; exports equal what those libraries compute."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT, relative_error
from fill import fill_
from helpers.runs import run_script
from helpers.small_networks import SMALL, small_network
from torch import nn

import export
import hubconf
from checkpoints import layouts, loading
from config.loading import load_config
from models import Backbone
from models.heads import DINOHead
from models.interop import resnet_to_detectron2
from utils import UsageError

TIMM: dict[str, Callable[[], nn.Module]] = {
    "swin": lambda: timm.models.swin_transformer.SwinTransformer(
        img_size=64, embed_dim=12, depths=(2, 2), num_heads=(1, 2), window_size=4, num_classes=0
    ),
    "vit": lambda: timm.models.vision_transformer.VisionTransformer(
        img_size=64, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=0
    ),
    "resnet": lambda: timm.create_model("resnet18", num_classes=0),
}


def random_network(name: str, *overrides: str, dense: bool = False) -> Backbone:
    """A small network whose norms, biases and tables are not what the initialization leaves them."""
    network = small_network(name, *overrides, dense=dense).eval()
    fill_(network.state_dict())
    return network


def save(state: object, path: Path) -> Path:
    torch.save(state, path)
    return path


def assert_same_tensors(a: nn.Module, b: nn.Module) -> None:
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name


# --------------------------------------------------------------------------- loading


@torch.no_grad()
@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize("wrapped", [False, True])
def test_timm_files_load_and_give_timms_features(name: str, wrapped: bool, tmp_path: Path) -> None:
    theirs = TIMM[name]().eval()
    fill_(theirs.state_dict())
    state = theirs.state_dict() | {"head.fc.weight": torch.zeros(10, 24), "head.fc.bias": torch.zeros(10)}
    ours = small_network(name).eval()
    report = loading.load_backbone(ours, save({"model": state} if wrapped else state, tmp_path / "timm.pth"))
    images = torch.randn(2, 3, 64, 64)
    assert relative_error(ours(images), theirs(images)) < 1e-4
    assert report.key == ("model" if wrapped else None)
    assert (report.resized, report.left_out) == (0, 2)


@pytest.mark.parametrize("name", ["swin", "vit", "resnet", "cvt", "vil"])
@pytest.mark.parametrize("prefix", ["module.", "module.backbone."])
def test_full_checkpoints_of_this_project_and_of_dino(name: str, prefix: str, tmp_path: Path) -> None:
    saved, loaded = random_network(name), small_network(name)
    saved.head = DINOHead(saved.num_features, 8, hidden_dim=16, bottleneck_dim=4)
    state = {
        ("module." if key.startswith("head") else prefix) + key: value for key, value in saved.state_dict().items()
    }
    path = save({"teacher": state, "student": {}, "epoch": 1}, tmp_path / "checkpoint.pth")
    report = loading.load_backbone(loaded, path)
    assert (report.layout, report.key) == ("full checkpoint", "teacher")
    saved.head = nn.Identity()
    assert_same_tensors(saved, loaded)


def test_old_files_with_masks_and_a_linear_head(tmp_path: Path) -> None:
    saved, loaded = random_network("swin"), small_network("swin")
    extra = {"layers.0.blocks.1.attn_mask": torch.zeros(4, 16, 16), "head.weight": torch.zeros(5, 24)}
    report = loading.load_backbone(loaded, save(saved.state_dict() | extra, tmp_path / "old.pth"))
    assert_same_tensors(saved, loaded)
    assert report.left_out == 1  # the head; what the architecture computes itself does not count


def test_parametrized_weight_norm(tmp_path: Path) -> None:
    head, loaded = nn.Module(), nn.Module()
    head.head, loaded.head = (
        DINOHead(6, 8, hidden_dim=5, bottleneck_dim=4),
        DINOHead(6, 8, hidden_dim=5, bottleneck_dim=4),
    )
    state = head.state_dict()
    last = "head.last_layer."
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        state[f"{last}parametrizations.weight.{new}"] = state.pop(last + old)
    loading.load_network(loaded, layouts.network_state(state, "teacher", "x"), "x")
    assert_same_tensors(head, loaded)


def test_safetensors_load(tmp_path: Path) -> None:
    saved, loaded = random_network("vit"), small_network("vit")
    safetensors.torch.save_file(saved.state_dict(), tmp_path / "net.safetensors")
    assert loading.load_backbone(loaded, tmp_path / "net.safetensors").layout == "bare state dict"
    assert_same_tensors(saved, loaded)
    (tmp_path / "net.safetensors").write_bytes(b"not at all")
    with pytest.raises(UsageError, match="safetensors file or is damaged"):
        loading.load_backbone(loaded, tmp_path / "net.safetensors")


def test_another_window_resizes_the_tables(tmp_path: Path) -> None:
    saved = random_network("swin")
    loaded = small_network("swin", "MODEL.SPEC.WINDOW_SIZE", "8", "MODEL.SPEC.DEPTHS", "[2,2]")
    report = loading.load_backbone(loaded, save(saved.state_dict(), tmp_path / "w4.pth"))
    assert report.resized == 4
    name = "layers.0.blocks.0.attn.relative_position_bias_table"
    plane = saved.get_parameter(name).detach().view(1, 7, 7, 1).permute(0, 3, 1, 2)
    expected = F.interpolate(plane, size=(15, 15), mode="bicubic").flatten()
    torch.testing.assert_close(loaded.get_parameter(name).detach().flatten(), expected)


@torch.no_grad()
def test_another_image_size_resizes_the_position_embedding(tmp_path: Path) -> None:
    """The network of the larger size computes what the one of the file computes on images of that size."""
    saved, loaded = random_network("vit"), small_network("vit", "MODEL.IMAGE_SIZE", "[96,64]").eval()
    report = loading.load_backbone(loaded, save(saved.state_dict(), tmp_path / "64.pth"))
    assert report.resized == 1
    images = torch.randn(2, 3, 96, 64)
    torch.testing.assert_close(loaded(images), saved(images))


def test_less_than_a_full_match_is_an_error_unless_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    saved, loaded = random_network("vit"), small_network("vit")
    state = saved.state_dict()
    removed = [state.pop(name) for name in ("blocks.0.norm1.weight", "norm.bias")]
    path = save(state | {"what.is.this": torch.zeros(1)}, tmp_path / "partial.pth")
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    words = (
        r"2 tensors are missing \(blocks.0.norm1.weight, norm.bias\), 1 unexpected \(what.is.this\).*--allow_partial"
    )
    with pytest.raises(UsageError, match=words):
        loading.load_backbone(loaded, path)
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())
    report = loading.load_backbone(loaded, path, allow_partial=True)
    assert report.matched == len(state)
    assert report.left_out == 1
    assert torch.equal(loaded.blocks[1].norm1.weight, saved.blocks[1].norm1.weight)  # type: ignore[union-attr, index]
    assert len(removed) == 2


@torch.no_grad()
@pytest.mark.parametrize(("name", "tables"), [("vit", 1), ("vil", 2)])
@pytest.mark.parametrize(("before", "after"), [((32, 128), (64, 64)), ((96, 64), (64, 96)), ((64, 64), (96, 64))])
def test_sizes_that_are_not_square(
    name: str, tables: int, before: tuple[int, int], after: tuple[int, int], tmp_path: Path
) -> None:
    """Tables of as many rows but of another plane are resized: a full checkpoint tells the image size it was made for."""
    size = ["MODEL.IMAGE_SIZE", str(list(before))]
    saved, loaded = random_network(name, *size), small_network(name, "MODEL.IMAGE_SIZE", str(list(after)))
    config = load_config(None, [*SMALL[name].overrides, *size]).dump()
    path = save(
        {"teacher": loading.add_module_prefix(saved.state_dict()), "config": config}, tmp_path / "checkpoint.pth"
    )
    assert loading.load_backbone(loaded, path).resized == tables
    if name == "vit":
        images = torch.randn(2, 3, *after)
        torch.testing.assert_close(loaded.eval()(images), saved(images))
        return
    table = "layer2.1.attn.local_relative_position_bias_table"
    rows, columns = (2 * (side // 8) - 1 for side in before)
    plane = saved.get_parameter(table).view(1, rows, columns, 2).permute(0, 3, 1, 2)
    wanted = tuple(2 * (side // 8) - 1 for side in after)
    expected = F.interpolate(plane, size=wanted, mode="bicubic").squeeze(0).flatten(1).T
    torch.testing.assert_close(loaded.get_parameter(table), expected)


def test_what_vil_shares_must_be_equal_in_the_file_or_given_once(tmp_path: Path) -> None:
    untied, tied = random_network("vil", "MODEL.SPEC.MSVIT.SHARE_W", "False"), small_network("vil")
    with pytest.raises(UsageError, match=r"different tensors for .*query.* shares; set MODEL.SPEC.MSVIT.SHARE_W False"):
        loading.load_backbone(tied, save(untied.state_dict(), tmp_path / "untied.pth"))
    once = {name: value for name, value in random_network("vil").state_dict().items() if "_global." not in name}
    loading.load_backbone(tied, save(once, tmp_path / "once.pth"))
    assert all(torch.equal(value, once[name]) for name, value in tied.state_dict().items() if name in once)


@pytest.mark.parametrize(
    ("name", "override", "words"),
    [
        ("swin", ("MODEL.SPEC.IN_CHANS", "1"), "set MODEL.SPEC.IN_CHANS 1$"),
        (
            "swin",
            ("MODEL.SPEC.PATCH_SIZE", "8"),
            r"set --patch_size 8 \(or MODEL.SPEC.PATCH_SIZE where the yaml has it\)$",
        ),
        ("swin", ("MODEL.SPEC.DIM_EMBED", "24"), "check --arch and --cfg, .*--allow_partial True$"),
    ],
)
def test_the_remedy_fits_the_misfit(name: str, override: tuple[str, str], words: str, tmp_path: Path) -> None:
    path = save(random_network(name, *override).state_dict(), tmp_path / "other.pth")
    with pytest.raises(UsageError, match=f"tensors? of another shape .*; {words}"):
        loading.load_backbone(small_network(name), path)


@pytest.mark.parametrize("content", [{"teacher": None, "student": {}}, {"teacher": 3}, {1: 2}, {}])
def test_files_without_a_network(content: dict[object, object], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no tensors of a network"):
        loading.load_backbone(small_network("vit"), save(content, tmp_path / "odd.pth"))


def test_another_architecture_is_refused_even_in_part(tmp_path: Path) -> None:
    path = save(random_network("resnet").state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(UsageError, match=r"does not fit .* tensors are missing"):
        loading.load_backbone(small_network("swin"), path)
    with pytest.raises(UsageError, match="has no tensor of this network"):
        loading.load_backbone(small_network("swin"), path, allow_partial=True)


# --------------------------------------------------------------------------- export


def exported(network: Backbone, target: str, tmp_path: Path) -> Path:
    path = tmp_path / f"out.{target}"
    export.write(network, target, path, load_config(None, ["MODEL.IMAGE_SIZE", "64"]))
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    return path


@torch.no_grad()
@pytest.mark.parametrize("name", TIMM)
def test_timm_computes_the_same_features(name: str, tmp_path: Path) -> None:
    ours, theirs = random_network(name, dense=True), TIMM[name]().eval()
    ours.head = nn.Linear(ours.num_features, 3)
    theirs.load_state_dict(torch.load(exported(ours, "timm", tmp_path), weights_only=True), strict=True)
    images = torch.randn(2, 3, 64, 64)
    assert relative_error(theirs(images), ours.forward_features(images).view_BC) < 1e-4


@pytest.mark.parametrize("target", ["backbone", "safetensors"])
@pytest.mark.parametrize("name", ["swin", "vil"])
def test_backbone_files_come_back(name: str, target: str, tmp_path: Path) -> None:
    """Also with ViL's tensors of two names, which safetensors does not take."""
    saved, loaded = random_network(name), small_network(name)
    path = exported(saved, target, tmp_path)
    loading.load_backbone(loaded, path.rename(tmp_path / f"net.{'safetensors' if target == 'safetensors' else 'pth'}"))
    assert_same_tensors(saved, loaded)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["swin", "vit", "resnet", "cvt", "vil"])
def test_onnxruntime_computes_the_same(name: str, tmp_path: Path) -> None:
    network = random_network(name)
    session = onnxruntime.InferenceSession(exported(network, "onnx", tmp_path))
    images = torch.randn(3, 3, 64, 64)
    view, regions = session.run(["view_features", "region_features"], {"images": images.numpy()})
    expected = network.forward_features(images)
    assert relative_error(torch.from_numpy(view), expected.view_BC) < 1e-4
    assert relative_error(torch.from_numpy(regions), expected.regions_BTC) < 1e-4


def test_detectron2_names_of_resnet(tmp_path: Path) -> None:
    """The names of detectron2's converter for torchvision, in a file that its matching reads."""
    network = random_network("resnet")
    content = pickle.loads(exported(network, "detectron2", tmp_path).read_bytes())
    assert content["matching_heuristics"] is True
    names = content["model"]
    for theirs, ours in {
        "stem.conv1.weight": "conv1.weight",
        "stem.conv1.norm.running_mean": "bn1.running_mean",
        "res2.0.conv1.weight": "layer1.0.conv1.weight",
        "res5.1.conv2.norm.bias": "layer4.1.bn2.bias",
        "res3.0.shortcut.weight": "layer2.0.downsample.0.weight",
        "res3.0.shortcut.norm.running_var": "layer2.0.downsample.1.running_var",
    }.items():
        assert torch.equal(torch.from_numpy(names[theirs]), network.state_dict()[f"backbone.backbone.{ours}"])
    assert len(names) == len(network.state_dict())
    assert not any("bn" in name or "layer" in name for name in names)
    assert resnet_to_detectron2(network.state_dict()).keys() == names.keys()


@pytest.mark.parametrize(("name", "target"), [("cvt", "timm"), ("vil", "mmdet"), ("vit", "mmdet")])
def test_what_a_library_has_not_is_refused(name: str, target: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"--format {target} .* choose one of backbone, safetensors, onnx"):
        export.write(small_network(name), target, tmp_path / "x", load_config(None))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_script(tmp_path: Path) -> None:
    """The command line writes a file that timm reads, and never writes over one."""
    network = random_network("resnet")
    weights = save(
        {"teacher": loading.add_module_prefix(network.state_dict()), "student": {}}, tmp_path / "checkpoint.pth"
    )
    command = ["--arch", "resnet18", "--pretrained_weights", str(weights), "--format", "timm"]
    command += ["--output", str(tmp_path / "timm.pth")]
    done = run_script("export.py", *command)
    assert done.returncode == 0, done.stderr
    assert "full checkpoint, key 'teacher': 120 tensors loaded, 0 of them resized, 0 left out" in done.stderr
    theirs = timm.create_model("resnet18", num_classes=0)
    theirs.load_state_dict(torch.load(tmp_path / "timm.pth", weights_only=True), strict=True)
    for output in ("/proc/x", str(tmp_path / ("n" * 300))):
        refused = run_script("export.py", *command[:-1], output)
        assert refused.returncode == 2
        assert refused.stderr.splitlines()[-1].startswith("export.py: error: --output ")
        assert "Traceback" not in refused.stderr
    again = run_script("export.py", *command)
    assert again.returncode == 2
    assert "exists already" in again.stderr


# --------------------------------------------------------------------------- torch.hub


def test_hub_entries_exist_for_every_published_row() -> None:
    entries = {name for name in vars(hubconf) if not name.startswith("_")}
    assert {
        *(f"esvit_swin_{size}{window}" for size in ("tiny", "small", "base") for window in ("", "_w14")),
        *("esvit_vil_2262", "esvit_cvt_tiny", "esvit_deit_small", "esvit_resnet50"),
    } <= set(entries)


@torch.no_grad()
def test_hub_loads_weights(tmp_path: Path) -> None:
    first = torch.hub.load(str(ROOT), "esvit_deit_small", source="local")
    path = save(first.state_dict(), tmp_path / "deit.pth")
    second = torch.hub.load(str(ROOT), "esvit_deit_small", source="local", weights=path)
    images = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(second(images), first(images))
    with pytest.raises(ValueError, match="does not exist"):
        torch.hub.load(str(ROOT), "esvit_deit_small", source="local", weights="nowhere.pth")
    other = save({"elsewhere": torch.zeros(2)}, tmp_path / "other.pth")
    for partial, words in ((False, "does not fit .* pass allow_partial=True"), (True, "has no tensor")):
        with pytest.raises(ValueError, match=rf"^checkpoint '.*other\.pth' {words}") as caught:
            torch.hub.load(str(ROOT), "esvit_deit_small", source="local", weights=other, allow_partial=partial)
        assert "; call the entry of the network" in str(caught.value)
        assert "--" not in str(caught.value)  # no flags of scripts
        assert "\n" not in str(caught.value)
