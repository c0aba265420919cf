"""ViT with one and two class tokens: what drops class tokens drops all of them."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from helpers.small_networks import small_network

from evaluation.linear import probe_width
from models.resize import resize_grid
from utils import UsageError

TWO = ("MODEL.SPEC.NUM_CLS_TOKENS", "2")


def test_udi_small_has_the_parameters_of_the_paper() -> None:
    network = small_network(
        "vit",
        *TWO,
        "MODEL.IMAGE_SIZE",
        "112",
        "MODEL.SPEC.DIM_EMBED",
        "384",
        "MODEL.SPEC.DEPTH",
        "12",
        "MODEL.SPEC.NUM_HEADS",
        "6",
    )
    kernel = 384 * 3 * (16**2 - 8**2)  # patches of 16 pixels instead of the small network's 8, over as many positions
    assert sum(p.numel() for p in network.parameters()) + kernel == 21_666_432


def test_regions_planes_and_probe_features_start_after_both_class_tokens() -> None:
    network = small_network("vit", *TWO).eval()
    images = torch.randn(2, 3, 48, 64)
    block = network.forward_blocks(images, 1, attention=True)[-1]
    tokens = network.norm(block.tokens_BNC)
    assert tokens.shape == (2, 2 + 6 * 8, 24)
    features = network.forward_features(images)
    torch.testing.assert_close(features.view_BC, tokens[:, 0])
    torch.testing.assert_close(features.regions_BTC, tokens[:, 2:])
    torch.testing.assert_close(network.forward_feature_maps(images).flatten(2).transpose(1, 2), tokens[:, 2:])
    probe = network.forward_return_n_last_blocks(images, 1, return_patch_avgpool=True)
    assert torch.allclose(probe[:, 24:], tokens[:, 2:].mean(dim=1), atol=1e-6)
    maps = block.attention
    assert maps is not None
    assert torch.equal(network.attention_plane(block, None), maps[:, :, 0, 2:].unflatten(-1, (6, 8)))
    assert torch.equal(network.attention_plane(block, (1, 3)), maps[:, :, 2 + 8 + 3, 2:].unflatten(-1, (6, 8)))


def test_the_scale_rule_is_the_published_interpolation() -> None:
    table = torch.randn(14 * 14, 4)
    plane = table.T.reshape(1, 4, 14, 14)
    factor = (6 + 0.1) / 14
    published = F.interpolate(plane, scale_factor=(factor, factor), mode="bicubic")[0].flatten(1).T
    assert torch.equal(resize_grid(table, (14, 14), (6, 6), "scale"), published)
    assert (resize_grid(table, (14, 14), (6, 6)) - published).norm() > 0.1 * published.norm()


def test_positions_of_another_image_size_keep_both_class_tokens() -> None:
    network = small_network("vit", *TWO)
    theirs = torch.randn(1, 2 + 16, 24)
    fitted = network.fit_tensor("pos_embed", theirs)
    assert fitted is not None
    assert fitted.shape == (1, 2 + 64, 24)
    assert torch.equal(fitted[:, :2], theirs[:, :2])


@pytest.mark.parametrize(("key", "value"), [("NUM_CLS_TOKENS", "3"), ("POS_RESIZE", "nearest")])
def test_other_values_are_rejected(key: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"{key} {value} must be"):
        small_network("vit", f"MODEL.SPEC.{key}", value)


@torch.no_grad()
def test_the_chosen_token_is_the_view_feature_in_every_block() -> None:
    network = small_network("vit", *TWO).eval()
    images = torch.randn(2, 3, 64, 64)
    blocks = network.forward_blocks(images, 2, attention=True)
    normed = [network.norm(block.tokens_BNC) for block in blocks]
    for token, places in {"cls": (0,), "cls+": (1,), "both": (0, 1)}.items():
        network.choose_token(token)
        view = network(images)
        assert view.shape == (2, network.view_width)
        torch.testing.assert_close(view, torch.cat([normed[1][:, place] for place in places], dim=1))
        probe = network.forward_return_n_last_blocks(images, 2, return_patch_avgpool=True)
        assert probe.shape[1] == probe_width(network, 2, True)
        expected = [tokens[:, place] for tokens in normed for place in places] + [normed[1][:, 2:].mean(dim=1)]
        torch.testing.assert_close(probe, torch.cat(expected, dim=1))
        maps = blocks[1].attention
        assert maps is not None
        assert torch.equal(network.attention_plane(blocks[1], None).flatten(2), maps[:, :, places[0], 2:])


@pytest.mark.parametrize("name", ["vit", "swin", "vil", "resnet"])
@pytest.mark.parametrize("token", ["cls+", "both"])
def test_networks_without_a_second_token_reject_it(name: str, token: str) -> None:
    network = small_network(name)
    network.choose_token("cls")
    with pytest.raises(UsageError, match=rf"--token {re.escape(token)} needs two class tokens"):
        network.choose_token(token)


@torch.no_grad()
@pytest.mark.parametrize("kept", [0, 1, 2])
def test_dropped_class_tokens_are_gone_with_their_positions(kept: int) -> None:
    """The network computes what its blocks make of the tokens that are left, which is not what it computed with all."""
    network = small_network("vit", *TWO).eval()
    images = torch.randn(2, 3, 64, 64)
    before = network.forward_features(images)
    entered = network.enter_stage(0, images)
    tokens = torch.cat([entered.tokens_BNC[:, :kept], entered.tokens_BNC[:, 2:]], dim=1)
    x = entered._replace(tokens_BNC=tokens, num_prefix_tokens=kept)
    for block in network.stage_blocks(0):
        x, _ = block(x)
    expected = network.norm(x.tokens_BNC)
    network.keep_class_tokens(kept)
    after = network.forward_features(images)
    assert torch.equal(after.regions_BTC, expected[:, kept:])
    assert torch.equal(after.view_BC, expected[:, 0] if kept else expected.mean(dim=1))
    assert torch.equal(after.regions_BTC, before.regions_BTC) == (kept == 2)


def test_missing_class_tokens_cannot_be_kept() -> None:
    with pytest.raises(UsageError, match="SwinTransformer has no class tokens"):
        small_network("swin").keep_class_tokens(0)
    with pytest.raises(UsageError, match="cannot keep 2 of 1 class tokens"):
        small_network("vit").keep_class_tokens(2)
