"""ViL: the architecture string, both kinds of attention against slow loops, and what its keys do."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from config.loading import load_config
from models import Backbone, build_model
from models.vil import PatchEmbedding
from models.vil_arch import StageSpec, parse_arch
from models.vil_attention import ALL, CENTER, OFFSETS, ChunkAttention, FullAttention
from ops.windows import neighbor_position_index
from utils import UsageError

ARCH = "l1,h1,d12,n2,s1,g1,p4,f3,a0_l2,h2,d24,n2,s0,g0,p2,f3,a0"
MSVIT = "MODEL.SPEC.MSVIT."
PUBLISHED = "l1,h3,d96,n2,s1,g1,p4,f7,a0_l2,h6,d192,n2,s1,g1,p2,f7,a0_l3,h12,d384,n6,s0,g1,p2,f7,a0_l4,h24,d768,n2,s0,g0,p2,f7,a0"
# Of most tests.
STAGE = StageSpec(num_heads=2, dim=8, depth=1, sparse=True, num_global=1, patch_size=1, window=3, absolute=False)


def network_of(arch: str = ARCH, *overrides: str, spread: bool = False) -> Backbone:
    """A small network without stochastic depth; `spread` makes its weights large enough to matter."""
    values = ["MODEL.NAME", "vision_longformer", "MODEL.IMAGE_SIZE", "64", MSVIT + "ARCH", arch]
    network = build_model("vil", load_config(None, [*values, "MODEL.SPEC.DROP_PATH_RATE", "0", *overrides]))
    return spread_out(network) if spread else network


def spread_out(module: Any) -> Any:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module


def chunk_attention(stage: StageSpec = STAGE, *overrides: str) -> ChunkAttention:
    msvit = load_config(None, ["MODEL.NAME", "vision_longformer", *overrides]).MODEL.SPEC.MSVIT
    return spread_out(ChunkAttention(stage, msvit, 0.0)).eval()


# --------------------------------------------------------------------------- the architecture string


def test_published_string() -> None:
    assert parse_arch(PUBLISHED) == (
        StageSpec(3, 96, 2, True, 1, 4, 7, False),
        StageSpec(6, 192, 2, True, 1, 2, 7, False),
        StageSpec(12, 384, 6, False, 1, 2, 7, False),
        StageSpec(24, 768, 2, False, 0, 2, 7, False),
    )


def test_omitted_letters_and_any_order() -> None:
    assert parse_arch("n1,d6,h3") == (StageSpec(3, 6, 1, True, 1, 2, 7, True),)
    assert parse_arch("l1,h3,d6,n1,r1") == parse_arch("l1, h3, d6, n1, r0")


def test_stages_after_full_attention_have_it_too() -> None:
    stages = parse_arch("h1,d2,n1,s1_h1,d2,n1,s0_h1,d2,n1,s1")
    assert [stage.sparse for stage in stages] == [True, False, False]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "stage 1"),
        ("h3,d96,n2_", "stage 2"),
        ("h3,d96,n2_h3;d96", "stage 2 .* has 'h3;d96'"),
        ("h3,d96,n2,x1", "stage 1 .* has 'x1'"),
        ("h3,d96,n2,s", "has 's'"),
        ("h3,d96,n-2", "has 'n-2'"),
        ("h3,d9.6,n2", "has 'd9.6'"),
        ("h3,d96", "stage 1 .* lacks the letter n"),
        ("l1,h3,d96,n2_l3,h3,d96,n2", "stage 2 .* numbered l2"),
        ("h3,d96,n2,h3", "letter h twice"),
        ("h3,d96,n0", "has n0"),
        ("h3,d96,n2,p0", "has p0"),
        ("h3,d96,n2,f0", "has f0"),
        ("h3,d96,n2,s2", "has s2, only s0 and s1"),
        ("h3,d96,n2,a2", "has a2, only a0 and a1"),
        ("h3,d96,n2,r2", "has r2, only r0 and r1"),
        ("h3,d95,n2", "h3, which does not divide d95"),
        ("h3,d9,n2,a1", "odd d9; a1"),
    ],
)
def test_malformed_string(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_arch(text)


# --------------------------------------------------------------------------- chunks, one query at a time


def slow_chunk_attention(
    attn: ChunkAttention, x_NC: Tensor, grid: tuple[int, int], neighbors: tuple[int, ...]
) -> Tensor:
    """The definition, token by token, for one image."""
    g, heads, window, dim = attn.num_global, attn.num_heads, attn.window, x_NC.shape[1]
    height, width = grid
    padded = (math.ceil(height / window) * window, math.ceil(width / window) * window)
    q, kv = attn.query(x_NC).view(-1, heads, dim // heads), attn.kv(x_NC).view(-1, 2, heads, dim // heads)
    rows = []
    for row, column in itertools.product(range(height), range(width)):
        keys, biases = [], []
        for i in range(g):
            keys.append(i)
            biases.append(attn.g2l_relative_position_bias[1, :, i] if attn.relative else torch.zeros(heads))
        for n in neighbors:
            top = (row // window + OFFSETS[n][0]) * window
            left = (column // window + OFFSETS[n][1]) * window
            for r, c in itertools.product(range(top, top + window), range(left, left + window)):
                place = (r % padded[0], c % padded[1]) if attn.exact == -1 else (r, c)
                if not (0 <= place[0] < height and 0 <= place[1] < width):
                    continue
                if attn.exact == 1 and max(abs(row - r), abs(column - c)) > window:
                    continue
                keys.append(g + place[0] * width + place[1])
                entry = (row - r + 2 * window - 1) * (4 * window - 1) + column - c + 2 * window - 1
                biases.append(attn.local_relative_position_bias_table[entry] if attn.relative else torch.zeros(heads))
        rows.append(_attend(q[g + row * width + column], kv[keys, 0], kv[keys, 1], torch.stack(biases)))
    regions = attn.proj(torch.stack(rows))
    if not g:
        return regions
    q = attn.query_global(x_NC[:g]).view(g, heads, -1)
    kv = attn.kv_global(x_NC).view(-1, 2, heads, dim // heads)
    globals_ = []
    for i in range(g):
        bias = torch.zeros(len(x_NC), heads)
        if attn.relative:
            bias = attn.g2l_relative_position_bias[0, :, i].expand(len(x_NC), -1).clone()
            bias[:g] = attn.g2g_relative_position_bias[:, i].T
        globals_.append(_attend(q[i], kv[:, 0], kv[:, 1], bias))
    return torch.cat([attn.proj_global(torch.stack(globals_)), regions])


def _attend(q_HD: Tensor, k_NHD: Tensor, v_NHD: Tensor, bias_NH: Tensor) -> Tensor:
    """(H * D) of one query."""
    weights = ((k_NHD * q_HD).sum(-1) * q_HD.shape[-1] ** -0.5 + bias_NH).softmax(0)
    return (weights.unsqueeze(-1) * v_NHD).sum(0).flatten()


@torch.no_grad()
@pytest.mark.parametrize("exact", [0, 1, -1])
@pytest.mark.parametrize("grid", [(6, 9), (7, 5), (2, 4), (1, 1)])
@pytest.mark.parametrize("mode", [0, -1])
def test_chunk_attention_is_the_definition(mode: int, grid: tuple[int, int], exact: int) -> None:
    attn = chunk_attention(STAGE, MSVIT + "SW_EXACT", str(exact), MSVIT + "MODE", str(mode))
    x = torch.randn(2, 1 + math.prod(grid), 8)
    wanted = torch.stack([slow_chunk_attention(attn, image, grid, ALL if mode == 0 else (CENTER,)) for image in x])
    torch.testing.assert_close(attn(x, grid)[0], wanted)


@torch.no_grad()
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("num_global", [0, 1, 3])
def test_global_tokens_shared_weights_and_absolute_positions(num_global: int, absolute: bool, share: bool) -> None:
    stage = STAGE._replace(num_global=num_global, absolute=absolute)
    attn = chunk_attention(stage, MSVIT + "SHARE_W", str(share))
    x = torch.randn(1, num_global + 5 * 7, 8)
    torch.testing.assert_close(attn(x, (5, 7))[0][0], slow_chunk_attention(attn, x[0], (5, 7), ALL))
    own = {name for name, _ in attn.named_parameters() if "_global" in name}
    assert bool(own) == (num_global > 0 and not share)
    assert ("kv_global.weight" in attn.state_dict()) == (num_global > 0)
    assert ("local_relative_position_bias_table" in attn.state_dict()) == (not absolute)


@torch.no_grad()
def test_training_samples_each_neighbor_and_evaluation_attends_to_all() -> None:
    attn, grid = chunk_attention(STAGE, MSVIT + "MODE", "1"), (6, 9)
    x = torch.randn(1, 1 + math.prod(grid), 8)
    torch.testing.assert_close(attn(x, grid)[0][0], slow_chunk_attention(attn, x[0], grid, ALL))
    choices = {i: slow_chunk_attention(attn, x[0], grid, (CENTER, i)) for i in ALL if i != CENTER}
    attn.train()
    drawn = []
    for _ in range(60):
        found = attn(x, grid)[0][0]
        drawn.append(next(i for i, wanted in choices.items() if torch.allclose(found, wanted, atol=1e-5)))
    assert set(drawn) == set(choices)
    torch.manual_seed(5)
    first = [attn(x, grid)[0] for _ in range(4)]
    torch.manual_seed(5)
    assert all(torch.equal(a, attn(x, grid)[0]) for a in first)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_sampling_is_compiled_into_one_graph(backend: str) -> None:
    """One compiled graph serves every draw: the same seeds give what they give without it, gradients included."""
    attn, grid = chunk_attention(STAGE, MSVIT + "MODE", "1").train(), (6, 9)
    x = torch.randn(1, 1 + math.prod(grid), 8)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(attn, backend=counter, fullgraph=True)
    found: dict[Any, list[Tensor]] = {attn: [], compiled: []}
    for run, outputs in found.items():
        torch.manual_seed(1)
        for _ in range(24):
            outputs.append(run(x, grid)[0])
        attn.zero_grad()
        outputs[-1].square().sum().backward()
        outputs += [parameter.grad.clone() for parameter in attn.parameters() if parameter.grad is not None]
    torch.testing.assert_close(found[compiled], found[attn])
    distinct = {tuple(output.flatten()[:40].tolist()) for output in found[attn][:24]}
    assert len(distinct) > 4  # of the eight neighbors
    assert counter.frame_count == 1


def test_neighbor_position_index_counts_offsets() -> None:
    window = 2
    index = neighbor_position_index(window)
    for query, (n, (down, right)), key in itertools.product(range(4), enumerate(OFFSETS), range(4)):
        row = query // window - (down * window + key // window)
        column = query % window - (right * window + key % window)
        entry = (row + 2 * window - 1) * (4 * window - 1) + column + 2 * window - 1
        assert index[query, n * window**2 + key] == entry


# --------------------------------------------------------------------------- full attention


@torch.no_grad()
@pytest.mark.parametrize("num_global", [0, 2])
@pytest.mark.parametrize("absolute", [True, False])
def test_full_attention_is_the_definition(absolute: bool, num_global: int) -> None:
    grid, g = (3, 4), num_global
    attn = spread_out(FullAttention(STAGE._replace(num_global=g, absolute=absolute), grid, 0.0))
    x = torch.randn(1, g + 12, 8)
    q, k, v = attn.qkv(x[0]).view(-1, 3, 2, 4).unbind(1)
    rows = []
    for a in range(g + 12):
        bias = torch.zeros(g + 12, 2)
        for b in range(g + 12):
            if absolute:
                continue
            if a < g and b < g:
                bias[b] = attn.g2g_relative_position_bias[:, a, b]
            elif a < g:
                bias[b] = attn.g2l_relative_position_bias[0, :, a]
            elif b < g:
                bias[b] = attn.g2l_relative_position_bias[1, :, b]
            else:
                (r, c), (s, d) = divmod(a - g, 4), divmod(b - g, 4)
                bias[b] = attn.local_relative_position_bias_table[(r - s + 2) * 7 + c - d + 3]
        rows.append(_attend(q[a], k, v, bias))
    torch.testing.assert_close(attn(x, grid)[0][0], attn.proj(torch.stack(rows)))


@torch.no_grad()
def test_bias_of_another_grid() -> None:
    """The matrix of pairs is resized for grids of the same shape, the table of offsets for others."""
    attn = spread_out(FullAttention(STAGE, (4, 4), 0.0))
    learned = attn._bias_between_regions((4, 4))
    published = F.interpolate(learned.unsqueeze(0), scale_factor=9 / 16, mode="bicubic").squeeze(0)
    torch.testing.assert_close(attn._bias_between_regions((3, 3)), published)
    wide = attn._bias_between_regions((2, 8)).view(2, 2, 8, 2, 8)  # as many tokens as learned
    assert not torch.allclose(wide.flatten(1), learned.flatten(1))
    torch.testing.assert_close(wide[:, 0, :-1, 1, :-1], wide[:, 0, 1:, 1, 1:])  # only the offset counts
    torch.testing.assert_close(wide[:, 0, :, 0, :], wide[:, 1, :, 1, :])


# --------------------------------------------------------------------------- learned positions


@torch.no_grad()
def test_learned_positions_of_row_and_column() -> None:
    embed = patch_embedding((3, 5), num_global=0)
    added = added_positions(embed, (3, 5))
    for row, column in itertools.product(range(3), range(5)):
        wanted = torch.cat([embed.x_pos_embed[0, row], embed.y_pos_embed[0, column]])
        torch.testing.assert_close(added[row * 5 + column], wanted)


@torch.no_grad()
@pytest.mark.parametrize("side", [2, 6, 7, 13])
@pytest.mark.parametrize("num_global", [0, 1, 2])
def test_learned_positions_are_resized_with_the_global_tokens_counted(num_global: int, side: int) -> None:
    """As published: one table of both axes, by the root of tokens (global ones too) over learned regions; also at their number."""
    embed = patch_embedding((6, 6), num_global)
    rows, columns = embed.x_pos_embed[0], embed.y_pos_embed[0]
    table = torch.cat([rows[:, None].expand(6, 6, 4), columns[None].expand(6, 6, 4)], dim=2)
    scale = math.sqrt((side**2 + num_global) / 6**2)
    published = F.interpolate(table.permute(2, 0, 1)[None], scale_factor=scale, mode="bicubic")[0]
    assert published.shape == (8, side, side)
    added = added_positions(embed, (side, side))
    torch.testing.assert_close(added[:num_global], embed.cls_pos_embed[0])
    torch.testing.assert_close(added[num_global:], published.flatten(1).T)


@torch.no_grad()
@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (7, 2)])
def test_learned_positions_of_any_grid_and_many_global_tokens(grid: tuple[int, int]) -> None:
    assert added_positions(patch_embedding((3, 5), num_global=5), grid).shape == (5 + math.prod(grid), 8)


def patch_embedding(learned: tuple[int, int], num_global: int) -> PatchEmbedding:
    """Of patches of 4 pixels into 8 channels, with weights that matter."""
    stage = STAGE._replace(absolute=True, patch_size=4, num_global=num_global)
    return spread_out(PatchEmbedding(3, stage, learned, nn.LayerNorm(8), 0.0))


def added_positions(embed: PatchEmbedding, grid: tuple[int, int]) -> Tensor:
    """What the positions add to the tokens of an image with this grid, (g + regions, C)."""
    images = torch.randn(1, 3, 4 * grid[0], 4 * grid[1])
    with_positions = embed(images)
    assert (with_positions.num_prefix_tokens, with_positions.grid) == (embed.num_global, grid)
    embed.absolute = False
    added = with_positions.tokens_BNC - embed(images).tokens_BNC
    embed.absolute = True
    return added[0]


@torch.no_grad()
def test_network_with_learned_positions_has_no_tables() -> None:
    network = network_of(ARCH.replace("a0", "a1")).eval()
    assert not [name for name in network.state_dict() if "relative_position" in name]
    assert network.get_parameter("layer1.0.x_pos_embed").shape == (1, 16, 6)
    assert torch.isfinite(network(torch.randn(2, 3, 40, 72))).all()


# --------------------------------------------------------------------------- the network


@torch.no_grad()
def test_mode_switch_follows_the_epoch() -> None:
    """Drawing ends after VIL_MODE_SWITCH of the epochs, and a run that resumes at any epoch finds the same."""
    network = network_of(ARCH, MSVIT + "MODE", "1", MSVIT + "VIL_MODE_SWITCH", "0.75", spread=True)
    images = torch.randn(1, 3, 64, 64)
    all_nine = network.eval()(images)
    network.train()
    for epoch in (0, 2, 3, 1, 3):
        network.start_epoch(epoch, 4)
        outputs = [network(images) for _ in range(4)]
        assert all(torch.allclose(output, all_nine, atol=1e-5) for output in outputs) == (epoch == 3)


def test_blocks_that_are_recomputed_see_the_neighbor_that_was_drawn() -> None:
    network = network_of(ARCH, MSVIT + "MODE", "1", spread=True)
    images, gradients = torch.randn(1, 3, 64, 64), []
    for network.grad_checkpointing in (False, True):
        torch.manual_seed(2)
        network.zero_grad()
        network(images).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None])
    torch.testing.assert_close(*gradients)


@torch.no_grad()
def test_the_own_chunk_alone_is_never_switched() -> None:
    network = network_of(ARCH, MSVIT + "MODE", "-1", MSVIT + "VIL_MODE_SWITCH", "0", spread=True)
    images = torch.randn(1, 3, 64, 64)
    own = network.eval()(images)
    network.start_epoch(3, 4)
    torch.testing.assert_close(network.train()(images), own)
    nine = network_of(ARCH)
    nine.load_state_dict(network.state_dict())
    assert not torch.allclose(nine.eval()(images), own, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (40, 72), (30, 33), (12, 8), (4, 4)])
def test_any_image_size_with_and_without_maps(size: tuple[int, int]) -> None:
    network = network_of(spread=True).eval()
    images = torch.randn(2, 3, *size)
    with_maps, without = network.forward_blocks(images, 4, attention=True), network.forward_blocks(images, 4)
    for a, b in zip(with_maps, without):
        torch.testing.assert_close(a.tokens_BNC, b.tokens_BNC, atol=1e-5, rtol=1e-4)
        assert a.attention is not None
        torch.testing.assert_close(a.attention.sum(-1), torch.ones_like(a.attention[..., 0]))
    rows, columns = size[0] // 4, size[1] // 4
    chunks = math.ceil(rows / 3) * math.ceil(columns / 3)
    assert with_maps[0].attention is not None
    assert with_maps[0].attention.shape == (2 * chunks, 1, 9, 1 + 81)
    regions = max(1, rows // 2) * max(1, columns // 2)
    assert with_maps[3].attention is not None
    assert with_maps[3].attention.shape == (2, 2, regions, regions)
    torch.testing.assert_close(network(images[1:]), network(images)[1:], atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("num_global", "avg_pool"), [(0, False), (0, True), (2, False), (2, True)])
def test_view_feature(num_global: int, avg_pool: bool) -> None:
    network = network_of(ARCH.replace("g0", f"g{num_global}"), "MODEL.SPEC.AVG_POOL", str(avg_pool)).eval()
    images = torch.randn(2, 3, 64, 64)
    last = network.forward_blocks(images)[0]
    assert (last.num_prefix_tokens, last.grid) == (num_global, (8, 8))
    tokens = network.norm(last.tokens_BNC)
    view, regions = network.forward_features(images)
    torch.testing.assert_close(view, tokens[:, 0] if num_global and not avg_pool else tokens.mean(1))
    torch.testing.assert_close(regions, tokens[:, num_global:])


@pytest.mark.parametrize("letters", ["a0,g0", "a1,g0", "a0,g1"])
@pytest.mark.parametrize("share", [True, False])
def test_gradients_reach_what_can_matter(letters: str, share: bool) -> None:
    """Every parameter has a gradient; it is 0 only where the last block of a stage asks for global tokens that then end."""
    absolute, num_global = letters.split(",")
    network = network_of(ARCH.replace("a0", absolute).replace("g0", num_global), MSVIT + "SHARE_W", str(share))
    view, regions = network.forward_features(torch.randn(2, 3, 64, 64))
    (view.mul(torch.randn(24)).sum() + regions.mul(torch.randn(24)).sum()).backward()
    without_effect = {"g2g_relative_position_bias"} if absolute == "a0" else set()
    if not share:
        own = itertools.product(("query", "kv", "proj"), ("weight", "bias"))
        without_effect |= {f"{layer}_global.{kind}" for layer, kind in own}
    zero = set()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        if parameter.numel() and parameter.grad.abs().sum() == 0:
            zero.add(name)
    assert zero == {f"layer1.3.attn.{name}" for name in without_effect}


def test_norms_follow_the_config() -> None:
    network = network_of(ARCH, MSVIT + "LN_EPS", "1e-3", "MODEL.SPEC.NORM_EMBED", "False")
    assert {module.eps for module in network.modules() if isinstance(module, nn.LayerNorm)} == {1e-3}
    assert not [name for name in network.state_dict() if "norm_embed" in name]


def test_attention_type_full_makes_every_stage_full() -> None:
    network = network_of(ARCH, MSVIT + "ATTN_TYPE", "full")
    assert not [module for module in network.modules() if isinstance(module, ChunkAttention)]


def test_names_of_the_published_files() -> None:
    values = ["MODEL.NAME", "vision_longformer", "MODEL.SPEC.DROP", "0.1", "MODEL.SPEC.DROP_PATH", "0.3"]
    spec = load_config(None, values).MODEL.SPEC
    assert (spec.DROP_RATE, spec.DROP_PATH_RATE) == (0.1, 0.3)


def test_tables_of_another_size_are_resized() -> None:
    network = network_of(ARCH.replace("a0_", "a1_"))
    table = torch.ones(27**2, 2)
    fitted = network.fit_tensor("layer2.1.attn.local_relative_position_bias_table", table)
    assert fitted is not None
    torch.testing.assert_close(fitted, torch.ones(15**2, 2))
    positions = network.fit_tensor("layer1.0.x_pos_embed", torch.arange(6.0).expand(1, 7, 6))
    assert positions is not None
    torch.testing.assert_close(positions, torch.arange(6.0).expand(1, 16, 6))
    assert network.fit_tensor("norm.weight", torch.ones(5)) is None


def test_no_weight_decay() -> None:
    names = network_of(ARCH.replace("a0_", "a1_")).no_weight_decay()
    attn = {f"layer2.{i}.attn.local_relative_position_bias_table" for i in (1, 3)}
    assert names == attn | {f"layer1.0.{name}" for name in ("cls_token", "cls_pos_embed", "x_pos_embed", "y_pos_embed")}
    assert "layer1.1.attn.g2g_relative_position_bias" in network_of().no_weight_decay()


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (
            "ATTN_TYPE",
            "linformer",
            "ATTN_TYPE linformer is not supported; use longformerhand or longformerauto or full",
        ),
        ("ATTN_TYPE", "performer", "ATTN_TYPE performer"),
        ("SHARE_KV", "False", "SHARE_KV False is not supported"),
        ("ONLY_GLOBAL", "True", "ONLY_GLOBAL True is not supported"),
        ("SW_EXACT", "2", "SW_EXACT. takes .*, not 2"),
        ("MODE", "9", "MODE. takes .*, not 9"),
        ("MODE", "-2", "MODE. takes .*, not -2"),
        ("VIL_MODE_SWITCH", "1.5", "VIL_MODE_SWITCH. takes a number from 0 to 1,"),
        ("LN_EPS", "0", "LN_EPS. takes a number above 0"),
        ("POOL_METHOD", "avg", "POOL_METHOD'.*only 'None'"),
        ("WITH_SE", "SE", "WITH_SE'.*only 'None'"),
        ("SE_MLP_RATIO", "0.25", "SE_MLP_RATIO'.*only 0.0625"),
        ("SE_MLP_BALANCE", "True", "SE_MLP_BALANCE'.*only False"),
        ("ARCH", "h5,d12,n1", "stage 1 .* h5"),
    ],
)
def test_rejected_values(key: str, value: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        network_of(ARCH, MSVIT + key, value)


def test_image_too_small_for_the_stages() -> None:
    with pytest.raises(UsageError, match="at least 8 pixels"):
        network_of(ARCH, "MODEL.IMAGE_SIZE", "[7, 64]")
