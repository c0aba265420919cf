"""Label propagation of moving squares: the rule against DINO's formula, exact values on known features, and the script's masks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from fill import fill_
from helpers.runs import clean_environment
from helpers.small_networks import SMALL, small_network
from PIL import Image
from torch import Tensor

import eval_video
from analysis import propagation
from analysis.images import Scale
from analysis.propagation import Labeled, PropagationConfig, near, propagate, propagated, to_pixels, to_regions
from utils import UsageError

PALETTE = [0, 0, 0, 200, 30, 30, 30, 200, 30, *[7] * 753]
SQUARES = {
    1: ((60, 200, 60), 3, 4, 2),
    2: ((220, 60, 40), 9, 12, -1),
}  # label -> color, row, first column, columns a frame


def place(label: int, frame: int) -> tuple[slice, slice]:
    """Rows and columns of a square of three regions a side, in regions of a 14 x 20 grid."""
    _, row, column, speed = SQUARES[label]
    return slice(row, row + 3), slice(column + speed * frame, column + speed * frame + 3)


def truth(frame: int, pixels: int = 1) -> np.ndarray:
    """The labels of a frame, of regions or of so many pixels a region."""
    labels = np.zeros((14, 20), dtype=np.uint8)
    for label in SQUARES:
        labels[place(label, frame)] = label
    return labels.repeat(pixels, axis=0).repeat(pixels, axis=1)


def write_video(folder: Path, frames: int, pixels: int = 8) -> Path:
    """Frames 8, 9, 10, ... of the squares over a background of smooth noise that stands still, and the mask of the first."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(60, 160, (14, 20, 3)).astype(np.uint8))
    background = np.asarray(coarse.resize((20 * pixels, 14 * pixels), Image.Resampling.BICUBIC))
    (folder / "frames").mkdir(parents=True)
    for frame in range(frames):
        picture, labels = background.copy(), truth(frame, pixels)
        for label, (color, *_) in SQUARES.items():
            picture[labels == label] = color
        Image.fromarray(picture).save(folder / f"frames/{frame + 8}.png")
    mask = Image.fromarray(truth(0, pixels))
    mask.putpalette(PALETTE)
    mask.save(folder / "mask.png")
    return folder


def overlap(found: np.ndarray, wanted: np.ndarray, label: int) -> float:
    """Intersection over union of a label."""
    return ((found == label) & (wanted == label)).sum() / ((found == label) | (wanted == label)).sum()


# --------------------------------------------------------------------------- the rule


def dinos(features: Tensor, context: list[Labeled], grid: tuple[int, int], rule: PropagationConfig) -> Tensor:
    """As DINO's script has it: exponentials of all regions, zero outside the neighborhood and below the k-th largest."""
    rows, columns = grid
    close = torch.zeros(rows, columns, rows, columns)
    for i in range(rows):
        for j in range(columns):
            for p in range(rows):
                for q in range(columns):
                    close[i, j, p, q] = abs(i - p) <= rule.radius and abs(j - q) <= rule.radius
    count = rows * columns
    affinity = torch.stack([torch.exp(features @ frame.features_NC.T / rule.temperature) for frame in context])
    affinity = (affinity * close.view(count, count)).transpose(1, 2).reshape(-1, count)
    smallest = affinity.topk(rule.top, dim=0).values.min(dim=0).values
    affinity[affinity < smallest] = 0
    affinity = affinity / affinity.sum(dim=0, keepdim=True)
    return affinity.T @ torch.cat([frame.labels_NK for frame in context])


@pytest.mark.parametrize(("radius", "top"), [(1, 3), (2, 5), (9, 1), (9, 40)])
@pytest.mark.parametrize("frames", [1, 3])
def test_propagation_equals_dino(radius: int, top: int, frames: int) -> None:
    grid, rule = (5, 7), PropagationConfig(radius=radius, top=min(top, frames * 35))
    made = [Labeled(F.normalize(torch.randn(35, 6), dim=1), torch.rand(35, 4)) for _ in range(frames + 1)]
    found = propagated(made[0].features_NC, made[1:], near(grid, radius), rule)
    assert torch.allclose(found, dinos(made[0].features_NC, made[1:], grid, rule), atol=1e-5)


def test_radius_0_is_the_whole_frame() -> None:
    assert near((4, 6), 0).all()
    assert torch.equal(near((4, 6), 0), near((4, 6), 6))
    assert near((4, 6), 1).sum() == sum(
        (min(i + 1, 3) - max(i - 1, 0) + 1) * (min(j + 1, 5) - max(j - 1, 0) + 1) for i in range(4) for j in range(6)
    )


def test_context_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[float]] = []

    def remember(features: Tensor, context: list[Labeled], *rest: object) -> Tensor:
        seen.append([frame.features_NC[0, 0].item() for frame in context])
        return torch.ones(1, 1)

    monkeypatch.setattr(propagation, "propagated", remember)
    angles = torch.arange(6) / 10
    maps = [torch.stack([angle.cos(), angle.sin()]).view(2, 1, 1) for angle in angles]
    assert len(list(propagate(maps, torch.ones(1, 1), PropagationConfig(last_frames=2)))) == 5
    expected = [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4]]
    assert seen == [pytest.approx([angles[i].cos().item() for i in frames]) for frames in expected]


def test_propagation_of_known_features() -> None:
    """Each region's feature is its label's own direction: every frame has the true labels, to the last region."""
    directions = torch.eye(3)
    maps = [directions[torch.from_numpy(truth(frame)).long()].permute(2, 0, 1) for frame in range(6)]
    first = to_regions(torch.from_numpy(truth(0, 8)), torch.tensor([0, 1, 2]), (14, 20))
    for frame, labels in enumerate(propagate(maps, first, PropagationConfig()), start=1):
        assert torch.allclose(labels.sum(dim=1), torch.ones(280))
        assert np.array_equal(labels.argmax(dim=1).view(14, 20), truth(frame))
        pixels = to_pixels(labels, (14, 20), (112, 160)).numpy()
        assert overlap(pixels, truth(frame, 8), 1) > 0.9  # corners are rounded


def test_small_radius_loses_fast_objects() -> None:
    directions = torch.eye(3)
    maps = [directions[torch.from_numpy(truth(frame)).long()].permute(2, 0, 1) for frame in (0, 5)]
    first = to_regions(torch.from_numpy(truth(0)), torch.tensor([0, 1, 2]), (14, 20))
    (found,) = propagate(maps, first, PropagationConfig(radius=2))
    labels = found.argmax(dim=1).view(14, 20).numpy()
    assert overlap(labels, truth(5), 1) == 0  # ten columns away
    (found,) = propagate(maps, first, PropagationConfig(radius=12))
    assert overlap(found.argmax(dim=1).view(14, 20).numpy(), truth(5), 1) == 1


# --------------------------------------------------------------------------- the script


def run(folder: Path, *flags: str, name: str = "vit", extra: tuple[str, ...] = ()) -> None:
    arch, overrides, patch_size = SMALL[name]
    network = ["--arch", arch, "--cfg", f"experiments/demo/{name}_micro.yaml", "--patch_size", str(patch_size)]
    paths = ["--frames", str(folder / "frames"), "--first_mask", str(folder / "mask.png")]
    command = [*network, *paths, "--output_dir", str(folder / "out"), "--device", "cpu", "--image_size", "112", *flags]
    if "--pretrained_weights" not in flags:
        command.append("--random_weights")
    eval_video.main(eval_video.get_args_parser().parse_args([*command, "--seed", "0", *overrides, *extra]))


@pytest.mark.parametrize("tokens", ["1", "2"])
def test_masks_follow_the_squares(tokens: str, tmp_path: Path) -> None:
    """A ViT of random weights, with one class token or two, already tells these colors apart; what stands still does not."""
    folder = write_video(tmp_path, 6)
    two = ("MODEL.SPEC.NUM_CLS_TOKENS", tokens)
    network = small_network("vit", *two)
    fill_(network.state_dict())
    torch.save(network.state_dict(), tmp_path / "net.pth")
    run(folder, "--pretrained_weights", str(tmp_path / "net.pth"), extra=two)
    assert sorted(path.name for path in (folder / "out").iterdir()) == sorted(f"{frame}.png" for frame in range(8, 14))
    with Image.open(folder / "out/8.png") as first, Image.open(folder / "mask.png") as mask:
        assert np.array_equal(np.asarray(first), np.asarray(mask))
    for frame in range(1, 6):
        with Image.open(folder / f"out/{frame + 8}.png") as image:
            assert (image.mode, image.size) == ("P", (160, 112))
            assert (image.getpalette() or [])[:9] == PALETTE[:9]
            found = np.asarray(image)
        for label in SQUARES:
            assert overlap(found, truth(frame, 8), label) > 0.6, (frame, label)
    assert max(overlap(truth(0), truth(5), label) for label in SQUARES) == 0
    with pytest.raises(UsageError, match=r"--output_dir .*8\.png"):
        run(folder)


@pytest.mark.parametrize("name", ["swin", "resnet", "cvt", "vil"])
def test_every_architecture(name: str, tmp_path: Path) -> None:
    """Also with larger regions than a square's parts, and on a shorter side that is not the frames' own."""
    folder = write_video(tmp_path, 2)
    run(folder, "--image_size", "128", name=name)
    with Image.open(folder / "out/9.png") as image:
        assert image.size == (160, 112)
        assert set(np.unique(np.asarray(image))) <= {0, 1, 2}


@pytest.mark.parametrize(
    ("size", "shorter", "region", "expected"),
    [
        ((480, 854), 480, 16, (480, 832)),
        ((1080, 1920), 480, 8, (480, 832)),
        ((854, 480), 480, 16, (832, 480)),
        ((500, 500), 480, 16, (448, 480)),
        ((60, 100), 42, 14, (42, 70)),
    ],
)
def test_sizes_equal_dino(size: tuple[int, int], shorter: int, region: int, expected: tuple[int, int]) -> None:
    assert eval_video.resized_size(size, Scale(shorter, (region, region), (0.5,), (0.5,))) == expected


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("no folder", "--frames .* is not a folder"),
        ("one frame", "--frames .* has 1 image"),
        ("twins", "--frames .* images of the same name"),
        ("no mask", r"--first_mask .*mask\.png cannot be read"),
        ("colors", r"--first_mask .*mode RGB"),
        ("size", r"--first_mask .*20 x 14 pixels, 8\.png has 160 x 112"),
        ("empty", "--first_mask .* single value"),
        ("damaged", r"cannot read the frame .*9\.png"),
        ("other size", r"9\.png differs in size"),
        ("region", "--image_size 100 is not a multiple of 8"),
    ],
)
def test_mistakes(what: str, words: str, tmp_path: Path) -> None:
    folder = write_video(tmp_path, 2)
    frame, mask = folder / "frames/9.png", folder / "mask.png"
    flags = ["--image_size", "100"] if what == "region" else []
    if what == "no folder":
        (folder / "frames").rename(folder / "elsewhere")
    elif what == "one frame":
        frame.unlink()
    elif what == "twins":
        frame.with_suffix(".jpg").write_bytes(frame.read_bytes())
    elif what == "no mask":
        mask.unlink()
    elif what == "colors":
        Image.open(mask).convert("RGB").save(mask)
    elif what == "size":
        Image.fromarray(truth(0)).save(mask)
    elif what == "empty":
        Image.new("P", (160, 112)).save(mask)
    elif what == "damaged":
        frame.write_bytes(frame.read_bytes()[:200])
    elif what == "other size":
        Image.open(frame).resize((80, 56)).save(frame)
    with pytest.raises(UsageError, match=words):
        run(folder, *flags)


def test_other_files_are_ignored(tmp_path: Path) -> None:
    """A pipe would be waited for for ever; macOS hides files beside images."""
    folder = write_video(tmp_path, 2)
    (folder / "frames/._8.png").write_bytes(b"no image")
    (folder / "frames/folder.png").mkdir()
    os.mkfifo(folder / "frames/pipe.png")
    (folder / "frames/zero.png").symlink_to("/dev/zero")
    run(folder)
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["8.png", "9.png"]
    (folder / "mask.png").unlink()
    os.mkfifo(folder / "mask.png")
    with pytest.raises(UsageError, match=r"mask\.png cannot be read .*not a regular file"):
        run(folder)


def test_small_objects_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_video(tmp_path, 2)
    with Image.open(folder / "mask.png") as opened:
        mask = opened.copy()
    mask.putpixel((0, 0), 5)
    mask.save(folder / "mask.png")
    run(folder)
    assert "objects [5]" in capsys.readouterr().err


@pytest.mark.slow
def test_davis_script(tmp_path: Path) -> None:
    """In the layout of DAVIS, the last line of the list without an end; a folder that is there is left alone."""
    arch, overrides, patch_size = SMALL["vit"]
    for name in ("dog", "swan", "train"):
        video = write_video(tmp_path / "made" / name, 2)
        for kind, source in (("JPEGImages", video / "frames"), ("Annotations", video / "mask.png")):
            target = tmp_path / "davis" / kind / "480p" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                source.rename(target)
            else:
                target.mkdir()
                source.rename(target / "00000.png")
    (tmp_path / "davis/ImageSets/2017").mkdir(parents=True)
    (tmp_path / "davis/ImageSets/2017/val.txt").write_text("dog\nswan")
    torch.save(small_network("vit").state_dict(), tmp_path / "net.pth")
    (tmp_path / "out/dog").mkdir(parents=True)
    command = ["bash", str(ROOT / "scripts/davis.sh"), arch, "davis", "net.pth", "out", "--image_size", "112"]
    command += [
        "--cfg",
        str(ROOT / "experiments/demo/vit_micro.yaml"),
        "--patch_size",
        str(patch_size),
        "--device",
        "cpu",
    ]
    environment = clean_environment() | {"PYTHON": sys.executable}
    done = subprocess.run([*command, "--", *overrides], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["dog", "swan"]
    assert not list((tmp_path / "out/dog").iterdir())
    assert sorted(path.name for path in (tmp_path / "out/swan").iterdir()) == ["8.png", "9.png"]
    wrong = subprocess.run([*command[:3], "nowhere", "a", "b"], env=environment, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "nowhere/ImageSets/2017/val.txt does not exist" in wrong.stderr
