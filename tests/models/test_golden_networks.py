"""Every architecture against the golden networks: keys, multi-crop outputs, probe features, attention."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from conftest import golden_arrays, golden_json, relative_error
from fill import crops

from benchmarks import golden
from benchmarks.golden import NETWORKS
from models import Backbone, MultiCropOutput

TOLERANCE = 1e-5  # the agreement asked for is 1e-4; float32 rounding leaves about 1e-6
WITH_ATTENTION = [name for name in NETWORKS if "attention_entropy_by_layer" in golden_arrays(name)]
WITH_PROBE = [name for name in NETWORKS if "n_last_blocks_4" in golden_arrays(name)]


@lru_cache(maxsize=2)  # the tests of a network follow each other
def golden_network(name: str, dense: bool) -> Backbone:
    return golden.golden_network(name, dense)


@pytest.mark.parametrize("name", NETWORKS)
def test_keys_and_shapes_are_the_golden_ones(name: str) -> None:
    ours = {key: list(value.shape) for key, value in golden_network(name, True).state_dict().items()}
    assert ours == golden_json(f"{name}.keys")


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_multi_crop_outputs(name: str) -> None:
    expected = golden_arrays(name)
    output = golden_network(name, True)(crops())
    assert isinstance(output, MultiCropOutput)
    assert relative_error(output.view_logits, expected["cls_logits"]) < TOLERANCE
    assert relative_error(output.region_logits[::37], expected["region_logits_every_37th_row"]) < TOLERANCE
    assert relative_error(output.region_features[::37], expected["region_features_every_37th_row"]) < TOLERANCE
    regions_224, regions_96 = expected["npatch"]
    assert output.regions_per_view == (regions_224, regions_224, regions_96, regions_96)


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_headless_features(name: str) -> None:
    expected, network, views = golden_arrays(name), golden_network(name, False), crops()
    assert relative_error(network(views[0]), expected["backbone_224"]) < TOLERANCE
    assert relative_error(network(views[2]), expected["backbone_96"]) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("name", WITH_PROBE)
def test_probe_features(name: str) -> None:
    expected, network, image = golden_arrays(name), golden_network(name, False), crops()[0]
    for key in (key for key in expected if key.startswith("n_last_blocks")):
        n, avgpool = int(key.split("_")[3]), key.endswith("avgpool")
        assert relative_error(network.forward_return_n_last_blocks(image, n, avgpool), expected[key]) < TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_attention_maps(name: str) -> None:
    expected, network = golden_arrays(name), golden_network(name, False)
    maps = network.forward_selfattention(crops()[0][:1], n=sum(network.stage_depths))
    assert relative_error(maps[-1][:, :, 9], expected["last_attention_query9"]) < TOLERANCE
    entropy = torch.stack([-(m * m.clamp_min(1e-12).log2()).sum(-1).mean() for m in maps])
    assert relative_error(entropy, expected["attention_entropy_by_layer"]) < TOLERANCE
