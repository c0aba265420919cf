"""ViT with one and two class tokens: what drops class tokens drops all of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_networks import small_network

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
    assert torch.equal(features.view_BC, tokens[:, 0])
    assert torch.equal(features.regions_BTC, tokens[:, 2:])
    assert torch.equal(network.forward_feature_maps(images).flatten(2).transpose(1, 2), tokens[:, 2:])
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
def test_other_values_are_refused(key: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"{key} {value} must be"):
        small_network("vit", f"MODEL.SPEC.{key}", value)
