"""Attention of Vision Longformer (Zhang et al., ICCV 2021, section 3.2): sliding chunks with global tokens, and full attention.

Outputs agree with microsoft/esvit.

Shapes: B images, N tokens (g global tokens first, then the regions row by row), C channels, H heads, D channels of a head,
Q queries, w x w regions of a chunk, K chunks of a neighborhood.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from models.resize import resize_grid
from models.vil_arch import StageSpec
from ops.attention import attend, join_heads, pad_keys, pairwise_bias, split_heads
from ops.windows import (
    WindowPartition,
    join_windows,
    neighbor_position_index,
    pad_to_windows,
    relative_position_index,
    window_partition,
    window_reverse,
)

# The 3 x 3 neighborhood of a chunk, row by row: offsets in chunks, down and to the right.
OFFSETS = tuple((down, right) for down in (-1, 0, 1) for right in (-1, 0, 1))
ALL = tuple(range(len(OFFSETS)))
CENTER = OFFSETS.index((0, 0))


# --------------------------------------------------------------------------- chunks

Neighbors = tuple[int, ...] | Tensor  # indices of OFFSETS; a tensor (K,) on the device if one is sampled


def sample_neighbors(device: torch.device) -> Tensor:
    """Return the indices of the center chunk and of one of the other eight, sampled uniformly: (2,).

    Sampling on the device avoids a synchronization and a recompilation of torch.compile for each value.
    """
    sampled = torch.randint(len(OFFSETS) - 1, (1,), device=device)
    return F.pad(sampled + (sampled >= CENTER), (1, 0), value=CENTER)


def neighborhoods(chunks: Tensor, neighbors: Neighbors) -> list[Tensor]:
    """Return for each neighbor the chunks (B, rows, columns, ...) rolled by its offset."""
    rows, columns = chunks.shape[1:3]
    if isinstance(neighbors, Tensor):  # the center chunk and a sampled one
        down, right = neighbors[1] // 3 - 1, neighbors[1] % 3 - 1
        row = (torch.arange(rows, device=chunks.device) + down) % rows
        column = (torch.arange(columns, device=chunks.device) + right) % columns
        return [chunks, chunks.index_select(1, row).index_select(2, column)]
    wrapped = torch.cat([chunks[:, -1:], chunks, chunks[:, :1]], dim=1)
    wrapped = torch.cat([wrapped[:, :, -1:], wrapped, wrapped[:, :, :1]], dim=2)
    starts = [(1 + OFFSETS[i][0], 1 + OFFSETS[i][1]) for i in neighbors]
    return [wrapped[:, top : top + rows, left : left + columns] for top, left in starts]


def select_neighbors(values: Tensor, neighbors: Neighbors) -> Tensor:
    """Select the values of the keys of `neighbors`, (..., 9 * w * w) to (..., K * w * w)."""
    by_chunk = values.unflatten(-1, (len(OFFSETS), -1))
    if isinstance(neighbors, Tensor):
        return by_chunk.index_select(-2, neighbors).flatten(-2)
    return values if neighbors == ALL else torch.cat([by_chunk.select(-2, i) for i in neighbors], dim=-1)


def chunk_mask(grid: tuple[int, int], window: int, exact: int, device: torch.device) -> Tensor:
    """Return which keys of the nine chunks are masked, (chunks, w * w or 1, 9 * w * w), True where masked.

    Args:
        exact: 0 masks padding and keys outside the image, 1 also keys more than `window` rows or columns away, -1 padding only:
            the grid of chunks is cyclic.
    """
    position, neighbor = torch.arange(window, device=device), torch.arange(len(OFFSETS), device=device)
    inside, near = [], []
    for axis, side in enumerate(grid):
        chunks = -(-side // window)
        steps = (neighbor % 3 if axis else neighbor // 3) - 1
        key = (torch.arange(chunks, device=device)[:, None, None] + steps[:, None]) * window + position
        key = key % (chunks * window) if exact == -1 else key
        inside.append((key >= 0) & (key < side))  # (chunks of the axis, 9, w)
        distance = position[:, None, None] - (steps[:, None] * window + position)
        near.append(distance.abs() <= window)  # (w, 9, w)
    visible = (inside[0][:, None, :, :, None] & inside[1][None, :, :, None, :]).flatten(2).flatten(0, 1).unsqueeze(1)
    if exact == 1:
        visible = visible & (near[0][:, None, :, :, None] & near[1][None, :, :, None, :]).flatten(2).flatten(0, 1)
    return ~visible


# --------------------------------------------------------------------------- attention


def random_parameter(*shape: int) -> nn.Parameter:
    """Return a parameter from a truncated normal of standard deviation 0.02."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02))


class BiasedAttention(nn.Module):
    """Learned attention biases: by offset between regions, and between regions and global tokens.

    A stage with position embeddings (a1) has none of them.
    """

    local_relative_position_bias_table: nn.Parameter
    g2l_relative_position_bias: nn.Parameter  # 0: regions for global queries, 1: global tokens for region queries
    g2g_relative_position_bias: nn.Parameter
    relative_position_index: Tensor

    def __init__(self, stage: StageSpec, index_QN: Tensor, table_rows: int) -> None:
        super().__init__()
        self.num_heads = heads = stage.num_heads
        self.num_global = g = stage.num_global
        self.relative = not stage.absolute
        if not self.relative:
            return
        self.local_relative_position_bias_table = random_parameter(table_rows, heads)
        if g:
            self.g2l_relative_position_bias = random_parameter(2, heads, g)
            self.g2g_relative_position_bias = random_parameter(heads, g, g)
        self.register_buffer("relative_position_index", index_QN)

    def region_query_bias(self, bias_HQN: Tensor) -> Tensor:
        """Return the bias of region queries (H, Q, g + N): prepend that of the global tokens to that of the N regions."""
        if not self.num_global:
            return bias_HQN
        global_bias = self.g2l_relative_position_bias[1].unsqueeze(1).expand(-1, bias_HQN.shape[1], -1)
        return torch.cat([global_bias, bias_HQN], dim=2)

    def global_query_bias(self, num_regions: int) -> Tensor:
        """Return the bias of global queries (H, g, g + regions)."""
        region_bias = self.g2l_relative_position_bias[0].unsqueeze(2).expand(-1, -1, num_regions)
        return torch.cat([self.g2g_relative_position_bias, region_bias], dim=2)


class ChunkAttention(BiasedAttention):
    """Sliding chunk attention: regions attend to global tokens and to 3 x 3 chunks, global tokens to all tokens.

    Args:
        stage: settings of the stage.
        msvit: MODEL.SPEC.MSVIT. With SHARE_W the global projections are second names of the local ones, as in the published state
            dicts.
        proj_drop: dropout of the output.

    Attributes:
        mode: -1 for the center chunk only, 0 for all nine, above 0 for the center and a random other one in each training step,
            and all nine in evaluation.
    """

    def __init__(self, stage: StageSpec, msvit: CfgNode, proj_drop: float) -> None:
        super().__init__(stage, neighbor_position_index(stage.window), (4 * stage.window - 1) ** 2)
        dim = stage.dim
        self.window = stage.window
        self.exact = msvit.SW_EXACT
        self.mode = msvit.MODE
        self.query, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        if stage.num_global and msvit.SHARE_W:
            self.query_global, self.kv_global, self.proj_global = self.query, self.kv, self.proj
        elif stage.num_global:
            self.query_global, self.kv_global = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
            self.proj_global = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x_BNC: Tensor, grid: tuple[int, int], attention: bool = False) -> tuple[Tensor, Tensor | None]:
        """Attend (B, N, C), and return the maps (B * chunks, H, w * w, g + K * w * w) of region queries if requested.

        Queries of a map are the regions of a chunk, including padding; keys are the global tokens, then the chunks in the order of
        `OFFSETS` (of a sampled neighborhood the center first).
        """
        x, maps = self._attend_from_regions(x_BNC, grid, attention)
        if self.num_global:
            x = torch.cat([self._attend_from_globals(x_BNC), x], dim=1)
        return self.proj_drop(x), maps

    def attention_plane(self, maps: Tensor, grid: tuple[int, int], query_yx: tuple[int, int]) -> Tensor:
        """Return the attention (B, H, height, width) of one region, from maps of evaluation mode."""
        window = self.window
        rows, columns = (-(-side // window) for side in grid)
        (row, y), (column, x) = (divmod(index, window) for index in query_yx)
        weights = maps.unflatten(0, (-1, rows, columns))[:, row, column, :, y * window + x, self.num_global :]
        plane = maps.new_zeros(len(weights), rows, columns, window**2, self.num_heads)
        for (down, right), chunk in zip((OFFSETS[i] for i in self._neighbors()), weights.split(window**2, dim=-1)):
            plane[:, (row + down) % rows, (column + right) % columns] += chunk.transpose(1, 2)
        return join_windows(plane.flatten(0, 2), WindowPartition(window), grid).permute(0, 3, 1, 2)

    def _attend_from_regions(
        self, x_BNC: Tensor, grid: tuple[int, int], attention: bool
    ) -> tuple[Tensor, Tensor | None]:
        g, heads, window = self.num_global, self.num_heads, self.window
        sampling = self.mode > 0 and self.training
        neighbors: Neighbors = sample_neighbors(x_BNC.device) if sampling else self._neighbors()
        kv = self.kv(x_BNC)
        (q,) = split_heads(self._to_chunks(self.query(x_BNC[:, g:]), grid), 1, heads)  # (B, rows, columns, H, w * w, D)
        rows, columns = q.shape[1:3]
        keys_and_values = []
        for global_tokens, chunks in zip(
            split_heads(kv[:, :g], 2, heads), split_heads(self._to_chunks(kv[:, g:], grid), 2, heads)
        ):
            global_tokens = global_tokens[:, None, None].expand(-1, rows, columns, -1, -1, -1)
            gathered = torch.cat([global_tokens, *neighborhoods(chunks, neighbors)], dim=-2)
            keys_and_values.append(gathered.flatten(1, 2))  # (B, chunks, H, g + K * w * w, D)
        bias = self._bias(grid, neighbors, x_BNC.device)
        x, maps = attend(q.flatten(1, 2), *keys_and_values, bias=bias, attention=attention)
        x = window_reverse(join_heads(x).flatten(0, 1), window, (rows * window, columns * window))
        x = self.proj(x[:, : grid[0], : grid[1]].flatten(1, 2))
        return x, None if maps is None else maps.flatten(0, 1)

    def _attend_from_globals(self, x_BNC: Tensor) -> Tensor:
        (q,) = split_heads(self.query_global(x_BNC[:, : self.num_global]), 1, self.num_heads)
        k, v = split_heads(self.kv_global(x_BNC), 2, self.num_heads)
        regions = x_BNC.shape[1] - self.num_global
        bias = pad_keys(self.global_query_bias(regions)).unsqueeze(0) if self.relative else None
        x, _ = attend(q, k, v, bias=bias)
        return self.proj_global(join_heads(x))

    def _neighbors(self) -> tuple[int, ...]:
        return (CENTER,) if self.mode < 0 else ALL

    def _to_chunks(self, x_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
        """Partition regions into chunks (B, rows, columns, w * w, C), padded at the bottom and right."""
        x_BHWC = pad_to_windows(x_BNC.unflatten(1, grid), self.window)
        rows, columns = x_BHWC.shape[1] // self.window, x_BHWC.shape[2] // self.window
        return window_partition(x_BHWC, self.window).unflatten(0, (-1, rows, columns))

    def _bias(self, grid: tuple[int, int], neighbors: Neighbors, device: torch.device) -> Tensor:
        """Return the bias (chunks, H, w * w or 1, padded g + K * w * w): by relative position, minus infinity at masked keys."""
        mask = select_neighbors(chunk_mask(grid, self.window, self.exact, device), neighbors)
        mask = pad_keys(F.pad(mask, (self.num_global, 0))).unsqueeze(1)
        if not self.relative:
            return torch.where(mask, -torch.inf, 0.0).expand(-1, self.num_heads, -1, -1)
        index = select_neighbors(self.relative_position_index, neighbors)
        bias = self.region_query_bias(pairwise_bias(self.local_relative_position_bias_table, index))
        return torch.where(mask, -torch.inf, pad_keys(bias))


class FullAttention(BiasedAttention):
    """Full attention.

    Args:
        stage: settings of the stage.
        grid: (height, width) in regions at MODEL.IMAGE_SIZE, for which the biases are learned.
        proj_drop: dropout of the output.
    """

    def __init__(self, stage: StageSpec, grid: tuple[int, int], proj_drop: float) -> None:
        super().__init__(stage, relative_position_index(grid), (2 * grid[0] - 1) * (2 * grid[1] - 1))
        self.grid = grid
        self.qkv = nn.Linear(stage.dim, 3 * stage.dim)
        self.proj = nn.Linear(stage.dim, stage.dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x_BNC: Tensor, grid: tuple[int, int], attention: bool = False) -> tuple[Tensor, Tensor | None]:
        """Attend (B, N, C), and return the maps (B, H, N, N) if requested."""
        q, k, v = split_heads(self.qkv(x_BNC), 3, self.num_heads)
        x, maps = attend(q, k, v, bias=self._bias(grid), attention=attention)
        return self.proj_drop(self.proj(join_heads(x))), maps

    def fit_table(self, table: Tensor, grid: tuple[int, int]) -> Tensor | None:
        """Resize a table learned for `grid` to the grid of this module; None if the shape of the table is another."""
        sides, target = ((2 * height - 1, 2 * width - 1) for height, width in (grid, self.grid))
        return resize_grid(table, sides, target) if table.ndim == 2 and len(table) == math.prod(sides) else None

    def _bias(self, grid: tuple[int, int]) -> Tensor | None:
        if not self.relative:
            return None
        bias = self.region_query_bias(self._bias_between_regions(grid))
        if self.num_global:
            bias = torch.cat([self.global_query_bias(math.prod(grid)), bias], dim=1)
        return pad_keys(bias).unsqueeze(0)

    def _bias_between_regions(self, grid: tuple[int, int]) -> Tensor:
        """Return the bias between regions (H, regions, regions), interpolated if `grid` is not the learned one.

        As published, the matrix of all pairs is interpolated for grids of the learned aspect ratio. That does not preserve
        positions for other aspect ratios, where the table of offsets is resized instead.
        """
        table, (height, width) = self.local_relative_position_bias_table, self.grid
        if grid[0] * width != grid[1] * height:
            sides = (2 * grid[0] - 1, 2 * grid[1] - 1)
            index = relative_position_index(grid, table.device)
            return pairwise_bias(resize_grid(table, (2 * height - 1, 2 * width - 1), sides), index)
        bias = pairwise_bias(table, self.relative_position_index)
        if grid == self.grid:
            return bias
        regions = math.prod(grid)
        return F.interpolate(bias.unsqueeze(0), size=(regions, regions), mode="bicubic", align_corners=False).squeeze(0)
