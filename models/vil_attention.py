"""The two kinds of attention of ViL: over neighboring chunks with global tokens, and over everything.

Shapes: B images, N tokens (the g global ones first, then the regions row by row), C channels, H heads, D channels of a head,
Q queries, w x w regions of a chunk, K chunks of a neighborhood.
Origin: Vision Longformer (Zhang et al., ICCV 2021) section 3.2, conventions of EsViT (Li et al., ICLR 2022).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from models.resize import resize_grid
from models.vil_arch import StageSpec
from ops.attention import attend, join_heads, pairwise_bias, split_heads
from ops.linear import Linear
from ops.windows import (
    WindowPartition,
    cached_tensors,
    join_windows,
    neighbor_position_index,
    pad_to_windows,
    relative_position_index,
    window_partition,
    window_reverse,
)

# A chunk and its eight neighbors, row by row: how many chunks down and to the right each of them lies.
OFFSETS = tuple((down, right) for down in (-1, 0, 1) for right in (-1, 0, 1))
ALL = tuple(range(len(OFFSETS)))
OWN = OFFSETS.index((0, 0))


# --------------------------------------------------------------------------- chunks

Neighbors = tuple[int, ...] | Tensor  # numbers of OFFSETS: known ones, or (K,) on the device where one is drawn


def draw_neighbors(device: torch.device) -> Tensor:
    """The own chunk and one of the other eight, each as likely: (2,).

    It stays on the device, so that the host need not wait for it and torch.compile finds one graph for all that can be drawn. The
    device's generator draws, whose state a run saves and restores.
    """
    others = len(OFFSETS) - 1
    drawn = torch.randint(others, (1,), device=device)
    return F.pad(drawn + (drawn >= OWN), (1, 0), value=OWN)


def neighborhoods(chunks: Tensor, neighbors: Neighbors) -> list[Tensor]:
    """For each neighbor the chunks (B, rows, columns, ...) moved so that it lies where its chunk was; borders wrap around."""
    rows, columns = chunks.shape[1:3]
    if isinstance(neighbors, Tensor):  # the own chunk stays where it is
        down, right = neighbors[1] // 3 - 1, neighbors[1] % 3 - 1
        row = (torch.arange(rows, device=chunks.device) + down) % rows
        column = (torch.arange(columns, device=chunks.device) + right) % columns
        return [chunks, chunks.index_select(1, row).index_select(2, column)]
    wrapped = torch.cat([chunks[:, -1:], chunks, chunks[:, :1]], dim=1)
    wrapped = torch.cat([wrapped[:, :, -1:], wrapped, wrapped[:, :, :1]], dim=2)
    starts = [(1 + OFFSETS[i][0], 1 + OFFSETS[i][1]) for i in neighbors]
    return [wrapped[:, top : top + rows, left : left + columns] for top, left in starts]


def of_neighbors(keys: Tensor, neighbors: Neighbors) -> Tensor:
    """What belongs to the keys of `neighbors` (..., K * w * w), of what belongs to those of all nine (..., 9 * w * w)."""
    by_chunk = keys.unflatten(-1, (len(OFFSETS), -1))
    if isinstance(neighbors, Tensor):
        return by_chunk.index_select(-2, neighbors).flatten(-2)
    return keys if neighbors == ALL else torch.cat([by_chunk.select(-2, i) for i in neighbors], dim=-1)


@cached_tensors
def hidden_keys(grid: tuple[int, int], window: int, exact: int, device: torch.device) -> Tensor:
    """Which regions of all nine chunks a query must not see: (chunks, w * w or 1, 9 * w * w), True where hidden.

    Padding is always hidden. With `exact` 0 so is what lies outside the image, with 1 also what is more than `window` rows or
    columns away; with -1 the grid of chunks goes on at its other end.
    """
    position = torch.arange(window, device=device)
    inside, near = [], []
    for axis, side in enumerate(grid):
        chunks = -(-side // window)
        steps = torch.tensor([offset[axis] for offset in OFFSETS], device=device)
        key = (torch.arange(chunks, device=device)[:, None, None] + steps[:, None]) * window + position
        key = key % (chunks * window) if exact == -1 else key
        inside.append((key >= 0) & (key < side))  # (chunks of the axis, 9, w)
        distance = position[:, None, None] - (steps[:, None] * window + position)
        near.append(distance.abs() <= window)  # (w, 9, w)
    seen = (inside[0][:, None, :, :, None] & inside[1][None, :, :, None, :]).flatten(2).flatten(0, 1).unsqueeze(1)
    if exact == 1:
        seen = seen & (near[0][:, None, :, :, None] & near[1][None, :, :, None, :]).flatten(2).flatten(0, 1)
    return ~seen


# --------------------------------------------------------------------------- attention


def random_parameter(*shape: int) -> nn.Parameter:
    """From a truncated normal of deviation 0.02."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02))


class BiasedAttention(nn.Module):
    """What both kinds of attention share: learned biases between regions by offset, and between regions and global tokens.

    A stage with learned embeddings of row and column (a1) has none of them.
    """

    local_relative_position_bias_table: nn.Parameter
    g2l_relative_position_bias: nn.Parameter  # of (0) regions for global queries, (1) global tokens for region queries
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

    def bias_of_regions(self, bias_HQN: Tensor) -> Tensor:
        """The bias of region queries, (H, Q, g + N): that of the global tokens before that of the N regions given."""
        if not self.num_global:
            return bias_HQN
        of_globals = self.g2l_relative_position_bias[1].unsqueeze(1).expand(-1, bias_HQN.shape[1], -1)
        return torch.cat([of_globals, bias_HQN], dim=2)

    def bias_of_globals(self, num_regions: int) -> Tensor:
        """The bias of global queries to global tokens and all regions, (H, g, g + regions)."""
        of_regions = self.g2l_relative_position_bias[0].unsqueeze(2).expand(-1, -1, num_regions)
        return torch.cat([self.g2g_relative_position_bias, of_regions], dim=2)


class ChunkAttention(BiasedAttention):
    """Regions attend to the global tokens and to the 3 x 3 chunks around their own, global tokens to all tokens.

    Args:
        stage: of which stage.
        msvit: the keys of `config.SPECS["vision_longformer"]["MSVIT"]`. With SHARE_W the global projections are the local ones
            under a second name, as in the published state dicts.
        proj_drop: dropout of the output.

    Attributes:
        mode: -1 the own chunk only, 0 all nine, above 0 the own one and in each training call another that is drawn; evaluation
            sees all nine.
    """

    def __init__(self, stage: StageSpec, msvit: CfgNode, proj_drop: float) -> None:
        super().__init__(stage, neighbor_position_index(stage.window), (4 * stage.window - 1) ** 2)
        dim = stage.dim
        self.window = stage.window
        self.exact = msvit.SW_EXACT
        self.mode = msvit.MODE
        self.query, self.kv, self.proj = Linear(dim, dim), Linear(dim, 2 * dim), Linear(dim, dim)
        if stage.num_global and msvit.SHARE_W:
            self.query_global, self.kv_global, self.proj_global = self.query, self.kv, self.proj
        elif stage.num_global:
            self.query_global, self.kv_global = Linear(dim, dim), Linear(dim, 2 * dim)
            self.proj_global = Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x_BNC: Tensor, grid: tuple[int, int], attention: bool = False) -> tuple[Tensor, Tensor | None]:
        """(B, N, C) to the same shape, with the maps (B * chunks, H, w * w, g + K * w * w) of the regions if asked for.

        Queries of a map are those of its chunk, padding included; keys are the global tokens, then the chunks of the
        neighborhood in the order of `OFFSETS` (the own one first where one is drawn). The rows of global queries are left out.
        """
        x, maps = self._attend_from_regions(x_BNC, grid, attention)
        if self.num_global:
            x = torch.cat([self._attend_from_globals(x_BNC), x], dim=1)
        return self.proj_drop(x), maps

    def plane(self, maps: Tensor, grid: tuple[int, int], query_yx: tuple[int, int]) -> Tensor:
        """Attention (B, H, height, width) of one region, of the maps of a call in evaluation mode."""
        window = self.window
        rows, columns = (-(-side // window) for side in grid)
        (row, y), (column, x) = (divmod(at, window) for at in query_yx)
        of_query = maps.unflatten(0, (-1, rows, columns))[:, row, column, :, y * window + x, self.num_global :]
        plane = maps.new_zeros(len(of_query), rows, columns, window**2, self.num_heads)
        for (down, right), weights in zip((OFFSETS[i] for i in self._neighbors()), of_query.split(window**2, dim=-1)):
            plane[:, (row + down) % rows, (column + right) % columns] += weights.transpose(1, 2)
        return join_windows(plane.flatten(0, 2), WindowPartition(window), grid).permute(0, 3, 1, 2)

    def _attend_from_regions(
        self, x_BNC: Tensor, grid: tuple[int, int], attention: bool
    ) -> tuple[Tensor, Tensor | None]:
        g, heads, window = self.num_global, self.num_heads, self.window
        drawing = self.mode > 0 and self.training
        neighbors: Neighbors = draw_neighbors(x_BNC.device) if drawing else self._neighbors()
        kv = self.kv(x_BNC)
        (q,) = split_heads(self._cut(self.query(x_BNC[:, g:]), grid), 1, heads)  # (B, rows, columns, H, w * w, D)
        rows, columns = q.shape[1:3]
        keys_and_values = []
        for of_globals, of_chunks in zip(
            split_heads(kv[:, :g], 2, heads), split_heads(self._cut(kv[:, g:], grid), 2, heads)
        ):
            of_globals = of_globals[:, None, None].expand(-1, rows, columns, -1, -1, -1)
            gathered = torch.cat([of_globals, *neighborhoods(of_chunks, neighbors)], dim=-2)
            keys_and_values.append(gathered.flatten(1, 2))  # (B, chunks, H, g + K * w * w, D)
        bias = self._bias(grid, neighbors, x_BNC.device)
        x, maps = attend(q.flatten(1, 2), *keys_and_values, bias=bias, attention=attention)
        x = window_reverse(join_heads(x).flatten(0, 1), window, (rows * window, columns * window))
        x = self.proj(x[:, : grid[0], : grid[1]].flatten(1, 2))
        return x, None if maps is None else maps.flatten(0, 1)

    def _attend_from_globals(self, x_BNC: Tensor) -> Tensor:
        (q,) = split_heads(self.query_global(x_BNC[:, : self.num_global]), 1, self.num_heads)
        k, v = split_heads(self.kv_global(x_BNC), 2, self.num_heads)
        bias = self.bias_of_globals(x_BNC.shape[1] - self.num_global).unsqueeze(0) if self.relative else None
        x, _ = attend(q, k, v, bias=bias)
        return self.proj_global(join_heads(x))

    def _neighbors(self) -> tuple[int, ...]:
        """The chunks that regions see in calls that draw none."""
        return (OWN,) if self.mode < 0 else ALL

    def _cut(self, x_BNC: Tensor, grid: tuple[int, int]) -> Tensor:
        """Regions to chunks (B, rows, columns, w * w, C), padded at the bottom and at the right."""
        x_BHWC = pad_to_windows(x_BNC.unflatten(1, grid), self.window)
        rows, columns = x_BHWC.shape[1] // self.window, x_BHWC.shape[2] // self.window
        return window_partition(x_BHWC, self.window).unflatten(0, (-1, rows, columns))

    def _bias(self, grid: tuple[int, int], neighbors: Neighbors, device: torch.device) -> Tensor:
        """(chunks, H, w * w or 1, g + K * w * w): relative positions, and minus infinity at hidden keys."""
        hidden_regions = of_neighbors(hidden_keys(grid, self.window, self.exact, device), neighbors)
        hidden = F.pad(hidden_regions, (self.num_global, 0)).unsqueeze(1)
        if not self.relative:
            return torch.where(hidden, -torch.inf, 0.0).expand(-1, self.num_heads, -1, -1)
        index = of_neighbors(self.relative_position_index, neighbors)
        bias = self.bias_of_regions(pairwise_bias(self.local_relative_position_bias_table, index))
        return torch.where(hidden, -torch.inf, bias)


class FullAttention(BiasedAttention):
    """Every token attends to every token.

    Args:
        stage: of which stage.
        grid: the regions at MODEL.IMAGE_SIZE, for which the biases are learned.
        proj_drop: dropout of the output.
    """

    def __init__(self, stage: StageSpec, grid: tuple[int, int], proj_drop: float) -> None:
        super().__init__(stage, relative_position_index(grid), (2 * grid[0] - 1) * (2 * grid[1] - 1))
        self.grid = grid
        self.qkv = Linear(stage.dim, 3 * stage.dim)
        self.proj = Linear(stage.dim, stage.dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x_BNC: Tensor, grid: tuple[int, int], attention: bool = False) -> tuple[Tensor, Tensor | None]:
        """(B, N, C) to the same shape, with the maps (B, H, N, N) if asked for."""
        q, k, v = split_heads(self.qkv(x_BNC), 3, self.num_heads)
        x, maps = attend(q, k, v, bias=self._bias(grid), attention=attention)
        return self.proj_drop(self.proj(join_heads(x))), maps

    def fit_table(self, table: Tensor, grid: tuple[int, int]) -> Tensor | None:
        """A table made for another `grid` resized to this one's; None if it is not one of that grid."""
        sides, wanted = ((2 * height - 1, 2 * width - 1) for height, width in (grid, self.grid))
        return resize_grid(table, sides, wanted) if table.ndim == 2 and len(table) == math.prod(sides) else None

    def _bias(self, grid: tuple[int, int]) -> Tensor | None:
        """(1, H, N, N)."""
        if not self.relative:
            return None
        bias = self.bias_of_regions(self._bias_between_regions(grid))
        if self.num_global:
            bias = torch.cat([self.bias_of_globals(math.prod(grid)), bias], dim=1)
        return bias.unsqueeze(0)

    def _bias_between_regions(self, grid: tuple[int, int]) -> Tensor:
        """(H, regions, regions): as learned, or for another `grid`.

        In the published networks it is the matrix of all pairs that is resized, bicubically on both axes, and so it is here for
        grids of the learned shape. That rule counts tokens only; for other shapes the table of offsets is resized instead.
        """
        table, (height, width) = self.local_relative_position_bias_table, self.grid
        if grid[0] * width != grid[1] * height:
            sides = (2 * grid[0] - 1, 2 * grid[1] - 1)
            index = _full_index(grid, table.device)
            return pairwise_bias(resize_grid(table, (2 * height - 1, 2 * width - 1), sides), index)
        bias = pairwise_bias(table, self.relative_position_index)
        if grid == self.grid:
            return bias
        regions = math.prod(grid)
        return F.interpolate(bias.unsqueeze(0), size=(regions, regions), mode="bicubic", align_corners=False).squeeze(0)


@cached_tensors
def _full_index(grid: tuple[int, int], device: torch.device) -> Tensor:
    return relative_position_index(grid).to(device)
