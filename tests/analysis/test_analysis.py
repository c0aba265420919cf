"""What analysis computes, against loops and hand-made cases; what it draws, pixel by pixel where that is short."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.small_networks import small_network
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as TF

from analysis import attention, correspondence, draw, pictures, stereo
from analysis.correspondence import RegionFeatures
from analysis.images import (
    Scale,
    as_picture,
    flip_views,
    load_views,
    random_views,
    save_views,
    saved_views,
    scale_of,
    to_rgb,
    unique_names,
    views_of_size,
)
from analysis.output import save_image, save_json
from checkpoints.files import numbered, unused
from config.loading import load_config
from data.transforms.augment import MultiCrop
from models.base import BlockOutput
from utils import UsageError

# --------------------------------------------------------------------------- attention


def test_entropy_in_bits() -> None:
    weights = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.0] * 4, [3.0, 3.0, 0, 0]])
    torch.testing.assert_close(attention.entropy_bits(weights), torch.tensor([2.0, 0.0, 0.0, 1.0]))


@pytest.mark.parametrize("share", [0.1, 0.6, 0.95])
def test_the_mask_is_the_smallest_set_with_the_mass(share: float) -> None:
    weights = torch.rand(20, 7).square()
    for row, mask in zip(weights, attention.keep_top_mass(weights, share)):
        sizes = (
            n
            for n in range(1, 8)
            if any(row[list(s)].sum() >= share * row.sum() for s in itertools.combinations(range(7), n))
        )
        assert int(mask.sum()) == next(sizes)
        assert float(row[mask].sum()) >= share * float(row.sum()) - 1e-6
        assert not (~mask).any() or row[mask].min() >= row[~mask].max()


def test_masks_of_zero_and_of_all() -> None:
    assert not attention.keep_top_mass(torch.zeros(2, 5), 0.6).any()
    assert attention.keep_top_mass(torch.tensor([0.5, 0.0, 0.5]), 1.0).tolist() == [True, False, True]


def test_regions_of_points() -> None:
    assert attention.region_at((0, 0), (100, 200), (5, 10)) == (0, 0)
    assert attention.region_at((199.9, 99.9), (100, 200), (5, 10)) == (4, 9)
    assert attention.region_at((45, 70), (100, 200), (5, 10)) == (3, 2)
    with pytest.raises(UsageError, match="--query 200 10 is outside the image of 200 x 100 pixels"):
        attention.region_at((200, 10), (100, 200), (5, 10))


@torch.no_grad()
def test_heads_are_ranked_by_entropy_and_keep_their_numbers() -> None:
    network = small_network("swin").eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    image = torch.randn(1, 3, 64, 64)
    maps = attention.head_maps(network, image, 3, 0.6, (40.0, 20.0))
    assert maps.query_yx == (2, 5)
    output = network.forward_blocks(image, attention=True)[0]
    planes = network.attention_plane(output, (2, 5))[0]
    assert sorted(maps.heads) == [0, 1]
    torch.testing.assert_close(maps.planes_Hhw, planes[maps.heads])
    assert maps.entropies_H.tolist() == sorted(maps.entropies_H.tolist())
    assert attention.head_maps(network, image, 0, 0.6).query_yx == (8, 8)  # the center of 16 x 16


def test_padding_does_not_count_in_the_entropy() -> None:
    """Rows of tokens are uniform over 16, those of padding look at one token."""
    network, grid = small_network("swin"), (5, 6)  # in windows of 4: one and a half each way
    maps = F.one_hot(torch.zeros(2, 4, 16, dtype=torch.long), 16).float()  # images, windows, queries, keys
    real = [(4, 4), (4, 2), (1, 4), (1, 2)]  # height and width of what is no padding
    for window, (height, width) in enumerate(real):
        for position in range(16):
            if position // 4 < height and position % 4 < width:
                maps[:, window, position] = 1 / 16
    output = BlockOutput(torch.zeros(2, 30, 12), 0, grid, maps.flatten(0, 1).unsqueeze(1), 0)
    torch.testing.assert_close(attention.block_entropy(network, output), torch.full((2, 1), 4.0))


def test_networks_and_blocks_without_attention() -> None:
    with pytest.raises(UsageError, match="ResNet has no attention to show"):
        attention.find_block(small_network("resnet"), -1)
    swin = small_network("swin")
    assert [attention.find_block(swin, number) for number in (-1, 0, -4)] == [3, 0, 0]
    with pytest.raises(UsageError, match=r"--block 4 .*0\.\.3"):
        attention.find_block(swin, 4)


# --------------------------------------------------------------------------- correspondence


def features_of(regions_BTC: Tensor, grid: tuple[int, int]) -> RegionFeatures:
    regions_BTC = F.normalize(regions_BTC, dim=-1)
    return RegionFeatures(F.normalize(regions_BTC.mean(1), dim=-1), regions_BTC, grid)


def test_flip_measure_equals_a_loop() -> None:
    grid, size, count = (3, 5), (30, 100), 10
    first, second = (features_of(torch.randn(4, 15, 8), grid) for _ in range(2))
    hits, pixels = [], []
    for b in range(4):
        found = []
        for i in range(15):
            cosines = [float(first.regions_BTC[b, i] @ second.regions_BTC[b, j]) for j in range(15)]
            j = int(np.argmax(cosines))
            true = i // 5 * 5 + 4 - i % 5
            off = math.hypot((j // 5 - true // 5) * 10, (j % 5 - true % 5) * 20)
            found.append((-cosines[j], j == true, off))
        best = sorted(found)[:count]
        hits.append(sum(hit for _, hit, _ in best) / count)
        pixels.append(sum(off for _, _, off in best) / count)
    score = correspondence.flip_score(correspondence.flip_sums(first, second, size, count).tolist())
    assert score.images == 4
    assert score.accuracy == pytest.approx(100 * sum(hits) / 4)
    assert score.distance == pytest.approx(sum(pixels) / 4, rel=1e-5)


def test_a_perfect_flip_is_found() -> None:
    first = features_of(torch.randn(2, 12, 32), (3, 4))
    second = first._replace(regions_BTC=first.regions_BTC.unflatten(1, (3, 4)).flip(2).flatten(1, 2))
    score = correspondence.flip_score(correspondence.flip_sums(first, second, (30, 40), 10).tolist())
    assert (score.accuracy, score.distance) == (100.0, 0.0)


def test_top_pairs_are_the_most_similar_and_may_be_few() -> None:
    first, second = F.normalize(torch.randn(6, 8), dim=1), F.normalize(torch.randn(9, 8), dim=1)
    pairs = correspondence.nearest(first, second)
    top = correspondence.top_pairs(pairs, 4)
    assert top.similarity_K.tolist() == sorted(pairs.similarity_K.tolist(), reverse=True)[:4]
    torch.testing.assert_close((first[top.first_K] * second[top.second_K]).sum(1), top.similarity_K)
    assert len(correspondence.top_pairs(pairs, 99).first_K) == 6


def test_the_region_most_like_its_view() -> None:
    regions = torch.eye(4)[None]
    view = F.normalize(torch.tensor([[0.1, 0.2, 0.9, 0.3]]), dim=1)
    assert RegionFeatures(view, regions, (2, 2)).most_like_view.tolist() == [2]


def test_principal_colors_follow_the_strongest_directions() -> None:
    along = torch.linspace(-1, 1, 101)
    features = torch.stack([10 * along, torch.zeros(101), 3 * along.square()], dim=1)
    colors = correspondence.principal_colors(features)
    expected = ((along + 0.96) / 1.92).clamp(0, 1)  # two at each end of 101 are clipped
    torch.testing.assert_close(colors[:, 0] if colors[0, 0] < 0.5 else 1 - colors[:, 0], expected)
    assert colors.amin(0).tolist()[:2] == [0.0, 0.0]
    assert colors.amax(0).tolist()[:2] == [1.0, 1.0]
    assert (colors[:, 2] == 0.5).all()  # nothing is left for a third one
    assert (correspondence.principal_colors(torch.ones(5, 2)) == 0.5).all()


# --------------------------------------------------------------------------- stereo


def test_a_shifted_texture_is_found_where_the_disparity_says() -> None:
    torch.manual_seed(3)
    wide = torch.randn(1, 3, 64, 160)
    left, right = wide[..., :128], wide[..., 16:144]  # what is at x on the left is at x - 16 on the right
    grid, size = (4, 8), (64, 128)
    truth = stereo.true_positions(torch.full(size, 16.0), grid)
    assert truth.regions_K.tolist() == [i for i in range(32) if i % 8]  # the first column has left the picture
    score = stereo.stereo_score(stereo.pixel_regions(left, grid), stereo.pixel_regions(right, grid), truth, grid, size)
    assert score == stereo.StereoScore(28, 100.0, 0.0)
    wrong = stereo.stereo_score(stereo.pixel_regions(right, grid), stereo.pixel_regions(left, grid), truth, grid, size)
    assert wrong.within_one < 20
    chance = stereo.chance_score(truth, grid, size)
    assert chance.regions == 28
    assert 100 * 4 / 32 < chance.within_one < 100 * 9 / 32  # neighbors of a region: 4 in a corner, 9 inside


def test_regions_without_disparity_do_not_count() -> None:
    disparity = torch.full((20, 40), 3.0)
    disparity[:10, :6] = torch.inf  # 6 of 10 columns of the first region
    disparity[:10, 10:14] = 0  # 4 of 10 of the second
    disparity[10:, 30:] = torch.nan
    found = stereo.region_disparity(disparity, (2, 4))
    assert torch.isnan(found).tolist() == [True, False, False, False, False, False, False, True]
    assert found[1:7].tolist() == [3.0] * 6
    assert stereo.true_positions(disparity, (2, 4)).positions_K2[0].tolist() == [5.0, 12.0]


def test_the_motorcycle_pair_agrees_with_its_disparity() -> None:
    """What is at x on the left is at x - disparity on the right: warping by it makes the pictures alike, other warps do not."""
    pair = stereo.resized(stereo.load_stereo(), (256, 384))
    left, right = (TF.to_tensor(picture) for picture in (pair.left, pair.right))
    y, x = torch.meshgrid(torch.arange(256), torch.arange(384), indexing="ij")
    known = torch.isfinite(pair.disparity_HW) & (x > 40) & (x < 344)
    move = torch.where(known, pair.disparity_HW, 0.0).round().long()
    assert 0.6 < float(known.float().mean()) < 0.8
    assert 0 < float(pair.disparity_HW[known].min()) < float(pair.disparity_HW[known].max()) < 40
    ours, none, against = (
        float((left - right[:, y, (x - sign * move).clamp(0, 383)]).abs().mean(0)[known].mean()) for sign in (1, 0, -1)
    )
    assert ours < 0.5 * none < 0.5 * against
    grid, size = (16, 24), (256, 384)
    regions = [stereo.pixel_regions(picture[None], grid) for picture in (left, right)]
    score = stereo.stereo_score(regions[0], regions[1], stereo.true_positions(pair.disparity_HW, grid), grid, size)
    assert score.regions > 300
    assert score.within_one > 20


# --------------------------------------------------------------------------- images and files


SCALE = Scale(64, (8, 8), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def test_sizes_are_whole_regions_of_the_images_shape() -> None:
    assert SCALE.size_for(100, 200) == (64, 128)
    assert SCALE.size_for(300, 203) == (96, 64)
    assert SCALE.size_for(10, 10_000) == (64, 64_000)
    network = small_network("swin").eval()
    config = load_config(None, ["MODEL.IMAGE_SIZE", "[64, 128]"])
    assert scale_of(network, config, None, torch.device("cpu"))[:2] == (64, (8, 8))
    with pytest.raises(UsageError, match="--image_size 7 is less than 8"):
        scale_of(network, config, 7, torch.device("cpu"))


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_views_are_kept_and_depend_on_the_seed_alone(channels: int, tmp_path: Path) -> None:
    picture = as_picture("some", torch.rand(channels, 50, 90), SCALE)
    assert tuple(picture.pixels_CHW.shape) == (channels, 64, 112)
    views = random_views(picture, 1)
    save_views(views, tmp_path / "views.pth")
    again = load_views(tmp_path / "views.pth", channels)
    assert again.description == views.description
    torch.randn(5)
    for other in (again, random_views(picture, 1)):
        assert torch.equal(other.first_CHW, views.first_CHW)
        assert torch.equal(other.second_CHW, views.second_CHW)
    assert not torch.equal(random_views(picture, 2).first_CHW, views.first_CHW)
    assert views_of_size(views, SCALE).first_CHW is views.first_CHW
    assert views_of_size(views, SCALE._replace(shorter_side=32)).second_CHW.shape[1:] == (32, 56)
    assert to_rgb(picture.pixels_CHW).size == (112, 64)
    with pytest.raises(UsageError, match=f"have {channels} channels, this network takes 2"):
        load_views(tmp_path / "views.pth", 2)


def test_invalid_saved_views(tmp_path: Path) -> None:
    torch.save({"other": torch.zeros(2)}, tmp_path / "views.pth")
    with pytest.raises(UsageError, match="no saved views"):
        load_views(tmp_path / "views.pth", 3)
    (tmp_path / "views.pth").write_bytes(b"no file of torch")
    with pytest.raises(UsageError, match=r"damaged|not a torch"):
        load_views(tmp_path / "views.pth", 3)


def test_the_second_view_of_the_measure_is_the_flipped_first() -> None:
    pixels = np.zeros((60, 120, 3), dtype=np.uint8)
    pixels[:, :60] = 255
    views = flip_views((32, 48), 3, (0.0,) * 3, (1.0,) * 3)
    assert isinstance(views, MultiCrop)
    first, second = views(Image.fromarray(pixels))
    assert first.shape == second.shape == (3, 32, 48)
    assert float(first[:, :, :20].mean()) > 0.95
    assert float(second[:, :, 28:].mean()) > 4 * float(second[:, :, :20].mean())


def test_output_files_are_numbered(tmp_path: Path) -> None:
    path = tmp_path / "score.json"
    for number in range(3):
        save_json({"number": number}, path)
    found = numbered(path)
    assert [file.name for file in found] == ["score.json", "score_2.json", "score_3.json"]
    assert [json.loads(file.read_text())["number"] for file in found] == [0, 1, 2]
    assert unused(path).name == "score_4.json"
    found[1].unlink()
    assert (unused(path), numbered(path)) == (found[1], [path])
    save_image(Image.new("RGB", (2, 2)), tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size == (2, 2)


# --------------------------------------------------------------------------- drawing


def test_heat() -> None:
    image = Image.new("RGB", (8, 4), (200, 100, 50))
    gray = draw.darkened_gray(image, 0.6).getpixel((0, 0))
    assert isinstance(gray, tuple)
    assert gray[0] == gray[1] == gray[2] == round(0.6 * 124)  # 0.299 * 200 + 0.587 * 100 + 0.114 * 50
    plane = torch.zeros(2, 4)
    assert (np.asarray(draw.heat(image, plane, 0.0)) == gray).all()
    plane[1, 3], plane[1, 2] = 0.01, 0.0049
    for largest in (0.01, 0.05):  # of this plane, or of another one on the same scale
        colors = np.asarray(draw.heat(image, plane, largest, strength=1.0))
        assert (colors[:2] == gray).all()
        assert (colors[2:, :4] == gray).all()
        shares = [(weight / largest) ** 0.5 for weight in (0.0049, 0.01)]
        ends = [[round(255 * c) for c in matplotlib.colormaps["inferno"](share)[:3]] for share in shares]
        np.testing.assert_allclose(colors[2:, 4:6].astype(int), np.broadcast_to(ends[0], (2, 2, 3)), atol=1)
        np.testing.assert_allclose(colors[2:, 6:].astype(int), np.broadcast_to(ends[1], (2, 2, 3)), atol=1)


def test_color_bar_has_the_colors_of_the_heat() -> None:
    """At the place of each tick; a label that has no room is left out."""
    ticks = {0.0: "0", 0.08: "8 %", 0.02: "2 %", 0.0199: "too near"}
    bar = np.asarray(draw.color_bar(0.08, ticks, 400)).astype(int)
    for weight, x in ((0.0, 0), (0.02, 199), (0.08, 399)):
        plane = torch.full((1, 1), max(weight, 1e-9))
        heat = draw.heat(Image.new("RGB", (1, 1)), plane, 0.08, strength=1.0).getpixel((0, 0))
        np.testing.assert_allclose(bar[5, x], np.asarray(heat), atol=6)
    ink = (bar[draw.BAR + 2] == draw.INK).all(axis=1).nonzero()[0]
    assert ink.tolist() == pytest.approx([0, 199, 399], abs=1)


def test_uniform_heads() -> None:
    """By the number of regions that their entropy amounts to, of those that the query can see."""
    planes = torch.zeros(3, 4, 8)
    planes[0, :, :4] = 1 / 16  # uniform within a window of 16 regions
    for head, regions in ((1, 15), (2, 14)):
        planes[head, :, :4] = torch.cat([torch.full((regions,), 1 / regions), torch.zeros(16 - regions)]).view(4, 4)
    planes[:, 3, 7] = 1e-40  # masked
    maps = attention.HeadMaps(planes, planes > 0, attention.entropy_bits(planes.flatten(1)), [0, 1, 2], 0, (0, 0))
    assert maps.regions == 16
    assert maps.entropies_H.exp2().tolist() == pytest.approx([16, 15, 14])
    assert maps.uniform_H == [True, True, False]  # from 90 % on


def test_masks_and_frames() -> None:
    image = Image.new("RGB", (80, 40), (200, 100, 50))
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[1, 3] = True
    kept = np.asarray(draw.masked(image, mask))
    assert (kept[20:, 60:] == (200, 100, 50)).all()
    assert kept[:20].max() < 50
    framed = draw.boxed(image, (0, 1, 2, 3), (2, 4))
    assert [framed.getpixel((x, 20)) for x in (19, 20, 21, 40, 58, 59, 60)] == [
        (200, 100, 50), draw.PAPER, draw.RED, (200, 100, 50), draw.RED, draw.PAPER, (200, 100, 50)]  # fmt: skip
    assert draw.pixel_box((0, 1, 2, 3), (2, 4), (40, 81)) == (20, 0, 61, 40)


def test_lines_and_ranks_of_pairs() -> None:
    image = Image.new("RGB", (200, 100), (128, 128, 128))
    drawn = draw.paired((image, image), [((0.1, 0.9), (0.9, 0.9)), ((0.1, 0.2), (0.9, 0.2))], ((0.5, 0.5), (0.5, 0.0)))
    assert drawn.size == (416, 100)
    assert drawn.getpixel((100, 90)) == draw.rank_color(0, 2)
    assert drawn.getpixel((300, 20)) == draw.rank_color(1, 2)
    assert drawn.getpixel((100, 50)) == draw.YELLOW
    assert drawn.getpixel((316, 15)) == draw.YELLOW  # moved into the picture
    assert len({draw.rank_color(rank, 10) for rank in range(10)}) == 10


def test_point_of_several_pairs_has_all_their_ranks() -> None:
    image, apart = Image.new("RGB", (200, 100), (128, 128, 128)), ((0.5, 0.1), (0.5, 0.1))
    pairs = [((0.1, 0.5), (0.5, 0.8)), ((0.1, 0.2), (0.5, 0.8))]
    one, both = draw.paired((image, image), pairs[:1], apart), draw.paired((image, image), pairs, apart)
    row = [np.asarray(drawn)[86, 216:] for drawn in (one, both)]  # through the lower part of the badges
    widths = [int((pixels != 128).any(axis=1).sum()) for pixels in row]
    assert widths[1] > widths[0] > 0


def test_captions_take_the_lines_they_need_and_tiles_do_not_overlap() -> None:
    words = "a caption that is much too long for sixty pixels"
    lines = draw.wrapped(words, 60)
    assert " ".join(lines) == words
    assert len(lines) > 4
    assert all(draw.font(draw.FONT_SIZE).getlength(line) <= 60 for line in lines)
    assert draw.wrapped("unbreakable words", 10) == ["unbreakable", "words"]
    image = Image.new("RGB", (60, 40), (1, 2, 3))
    heights = [draw.captioned(image, text).height for text in ("a", words)]
    assert heights[1] - heights[0] >= (len(draw.wrapped(words, 58)) - 1) * draw.FONT_SIZE
    sheet = draw.tiled([image] * 5, columns=3, gap=4)
    assert sheet.size == (3 * 64 + 4, 2 * 44 + 4)
    assert (np.asarray(sheet) == (1, 2, 3)).all(axis=2).sum() == 5 * 60 * 40
    assert draw.stacked(image, image, gap=4).size == (60, 84)
    lengths = {(count, most): [len(row) for row in draw.even_rows(range(count), most)] for count, most in
               ((1, 5), (4, 3), (5, 4), (7, 3), (13, 5), (3, 2))}  # fmt: skip
    assert lengths == {
        (1, 5): [1], (4, 3): [2, 2], (5, 4): [3, 2], (7, 3): [3, 2, 2], (13, 5): [5, 4, 4], (3, 2): [2, 1]}  # fmt: skip
    assert [list(row) for row in draw.even_rows("abcdefg", 3)] == [["a", "b", "c"], ["d", "e"], ["f", "g"]]


# --------------------------------------------------------------------------- drawings of an image


@pytest.mark.parametrize(("size", "zoomed"), [((64, 64), False), ((128, 192), True)])
def test_a_small_window_is_shown_zoomed(size: tuple[int, int], zoomed: bool) -> None:
    network = small_network("swin").eval()  # the last block has windows of 4 x 4 regions of 8 pixels, shifted by 2
    scale = SCALE._replace(shorter_side=size[0])
    picture = as_picture("some", torch.rand(3, *size), scale)
    drawing, single = pictures.attention_drawing(network, picture, scale, 3, 0.6, (30.0, 30.0), torch.device("cpu"))
    assert ("zoomed" in drawing.about) == zoomed
    assert drawing.record["query_row_and_column"] == (3, 3)
    assert drawing.record["grid"] == (size[0] // 8, size[1] // 8)
    assert len(drawing.panels) == 1 + len(drawing.record["heads"]) == 1 + len(single) // 2
    assert {panel.image.size for panel in drawing.panels} == {(224, 2 * 224 + 4)}
    whole = next(iter(single.values()))
    assert whole.width / whole.height == size[1] / size[0]
    page = pictures.on_one_page(drawing)
    assert page.width == 3 * 232 + 8


def test_window_of_a_query() -> None:
    network = small_network("swin").eval()
    maps = attention.head_maps(network, torch.randn(1, 3, 128, 192), 3, 0.6, (60.0, 60.0))
    assert maps.grid == (16, 24)
    assert maps.window == (6, 6, 10, 10)  # windows of 4 begin at 2, 6, 10, ...
    assert maps._replace(planes_Hhw=torch.zeros(2, 16, 24)).window == (0, 0, 16, 24)


# --------------------------------------------------------------------------- what reviews found


@torch.no_grad()
def test_entropy_of_uniform_attention() -> None:
    """Swin's shifted windows of a 16 x 16 grid, window 4, shift 2: 9 inner windows see 16 keys, 6 on borders 8, one 4."""
    plain, shifted = attention.uniform_entropies(small_network("swin").eval(), torch.zeros(1, 3, 64, 64))[:2]
    assert plain == pytest.approx([4.0] * len(plain))
    assert shifted == pytest.approx([(9 * 4 + 6 * 3 + 2) / 16] * len(shifted))


def test_unique_names() -> None:
    assert unique_names(["d/a.jpg", "d/b.jpg"]) == ["a", "b"]
    assert unique_names(["x/0.png", "y/0.png"]) == ["x_0", "y_0"]
    assert unique_names(["x/c/0.png", "y/c/0.png"]) == ["x_c_0", "y_c_0"]
    assert len(set(unique_names(["d/a.jpg", "d/a.png"]))) == 2
    assert len(set(unique_names(["d/a.jpg", "d/a.jpg"]))) == 2


def test_saved_views_of_another_picture_are_refused(tmp_path: Path) -> None:
    first, second = (as_picture("a", torch.rand(3, 50, 90), SCALE) for _ in range(2))
    path = tmp_path / "views_a.pth"
    save_views(random_views(first, 1), path)
    with pytest.raises(UsageError, match="another picture than a"):
        saved_views(path, second, 3)
    save_views(random_views(second, 1), unused(path))
    for picture in (first, second):
        assert torch.equal(saved_views(path, picture, 3).first_CHW, random_views(picture, 1).first_CHW)
