"""The contract of a backbone: what every architecture gives its callers, written once.

An architecture supplies three things: how a batch enters a stage (`enter_stage`: patch embedding, merging, pooling), the blocks
of a stage (`stage_blocks`) and its tokens between blocks (`tokens`). From these this class makes view and region features, the
features of a linear probe, attention maps and multi-crop batching. The heads are attributes `head` and `head_dense`, so
state-dict keys are the published ones.

Shapes: B images, V views, T regions of a view, K prototypes, C channels, N tokens.
Origin: EsViT (Li et al., ICLR 2022) sections 3.1-3.2; method names follow microsoft/esvit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import wraps
from itertools import groupby
from typing import Any, ClassVar, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from yacs.config import CfgNode

from config.choices import TOKENS
from models.interop import Converter
from models.outputs import LevelOutput, MultiCropOutput
from models.resize import resize_square_table
from ops.logits import split_rows
from ops.windows import WindowPartition, real_tokens, window_plane
from utils import UsageError

# What the names of tensors begin with that a method puts beside a backbone: heads, and what pools patches at samples.
HEADS = ("head.", "head_dense.")
BESIDE = (*HEADS, "srs.")


class Tokens(NamedTuple):
    """Tokens of one batch between two blocks."""

    tokens_BNC: Tensor  # prefix tokens (class, global) first, then the regions row by row
    num_prefix_tokens: int
    grid: tuple[int, int]  # height and width that the regions fill


class BlockOutput(NamedTuple):
    """What one block leaves behind: the fields of `Tokens`, and its attention."""

    tokens_BNC: Tensor
    num_prefix_tokens: int
    grid: tuple[int, int]
    attention: Tensor | None  # (B * windows, heads, queries, keys), when asked for
    block: int  # its number, the first block of the network being 0


class Features(NamedTuple):
    """Normalized features of the last stage."""

    view_BC: Tensor
    regions_BTC: Tensor


P = ParamSpec("P")
Result = TypeVar("Result")


def _say_what_batch_norm_lacks(forward: Callable[P, Result]) -> Callable[P, Result]:
    """BatchNorm has no deviation of one value: tell that as a mistake of the command line."""

    @wraps(forward)
    def told(*args: P.args, **kwargs: P.kwargs) -> Result:
        try:
            return forward(*args, **kwargs)
        except ValueError as error:
            if "Expected more than 1 value per channel" not in str(error):
                raise
            raise UsageError(
                "BatchNorm cannot train on one value per channel, as one image gives where its map is down to 1 x 1; "
                "raise --batch_size_per_gpu or enlarge the crops"
            ) from None

    return told


class Backbone(nn.Module, ABC):
    """A multi-stage (or plain) vision backbone under the common contract.

    Attributes:
        dense: whether region outputs are wanted, with `head_dense` beside `head`.
        head, head_dense: empty (`nn.Identity`) until a method sets them; `head_dense` is None unless dense.
        srs: pools patch tokens at samples (models/srs.py); None until a method sets it.
        stage_dims, stage_depths: channels and number of blocks of each stage.
        patch_size: pixels of a side that one token of the first stage covers; no image may be smaller.
        image_size: (height, width) of MODEL.IMAGE_SIZE, where learned tables depend on it; else None.
        norm: the norm of the last stage's tokens.
        num_cls_tokens: class tokens that can be told apart; fewer than two leave nothing to choose.
        view_tokens: which of them make the view feature, see `choose_token`.
        has_attention: whether blocks can give attention maps.
        converters: for each library that has this architecture, what makes its state dict of this one's.
        grad_checkpointing: recompute blocks in the backward instead of keeping their activations.
    """

    stage_dims: tuple[int, ...]
    stage_depths: tuple[int, ...]
    patch_size: int
    image_size: tuple[int, int] | None = None
    norm: nn.Module
    num_cls_tokens: int = 0
    view_tokens: tuple[int, ...] = TOKENS["cls"]
    has_attention: bool = True
    converters: ClassVar[Mapping[str, Converter]] = {}

    def __init__(self, dense: bool = False) -> None:
        super().__init__()
        self.dense = dense
        self.head: nn.Module = nn.Identity()
        self.head_dense: nn.Module | None = nn.Identity() if dense else None
        self.srs: nn.Module | None = None
        self.grad_checkpointing = False

    # ----------------------------------------------------------------- what an architecture supplies

    @abstractmethod
    def enter_stage(self, stage: int, x: Any) -> Any:
        """What the blocks of `stage` take, made of the images (B, C, H, W) for stage 0, else of the stage before."""

    @abstractmethod
    def stage_blocks(self, stage: int) -> Sequence[Any]:
        """The blocks of a stage, for `call_block`."""

    @abstractmethod
    def tokens(self, x: Any) -> Tokens:
        """The tokens of what travels between blocks."""

    def call_block(self, block: Any, x: Any, attention: bool) -> tuple[Any, Tensor | None]:
        """What comes out of a block, in the layout that went in, and its attention maps if asked for."""
        return block(x, attention)

    def pool(self, tokens_BNC: Tensor, num_prefix_tokens: int) -> Tensor:
        """The view feature (B, C) of a block's tokens: their mean, unless an architecture says otherwise."""
        return tokens_BNC.mean(dim=1)

    def summary_tokens(self, tokens_BNC: Tensor, num_prefix_tokens: int) -> Tensor:
        """The normalized tokens (B, 1, C) that stand for the view, of the last block's: the view feature, unless there are more."""
        return self.pool(self.norm(tokens_BNC), num_prefix_tokens)[:, None]

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Called before each epoch of training, for architectures whose attention depends on the progress."""

    def fit_tensor(self, name: str, tensor: Tensor, image_size: tuple[int, int] | None = None) -> Tensor | None:
        """A tensor of a file made for another image or window size, resized to fit parameter `name`; None if it cannot be.

        Tables of relative positions inside windows are resized for all architectures; `image_size` is that of the file, where
        it is known.
        """
        if not name.endswith("relative_position_bias_table"):
            return None
        return resize_square_table(tensor, len(self.get_parameter(name)))

    def follow(self, pos_resize: str | None) -> None:
        """Resize positions as the program of a loaded file does, by a rule of `models.resize`, where the config leaves it open."""

    def settled(self, config: CfgNode) -> CfgNode:
        """The network's config with what it left open, for files of this network."""
        return config

    def timm_name(self, name: str) -> str:
        """What timm (and torchvision) call this network's tensor `name`."""
        return name

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that supervised fine-tuning keeps out of weight decay: positions, and tokens of the network."""
        names = {name for name, _ in self.named_parameters() if not name.startswith(HEADS)}
        return {name for name in names if any(part in name for part in ("relative_position", "pos_embed", "cls_token"))}

    # ----------------------------------------------------------------- class tokens

    def choose_token(self, token: str) -> None:
        """Make the view feature of one or more class tokens, a key of `TOKENS`; attention maps are seen from the first of them.

        Raises:
            UsageError: another class token than the first, of a network that has no second one.
        """
        if token != "cls" and self.num_cls_tokens < 2:
            raise UsageError(
                f"--token {token} needs a network with two class tokens, {type(self).__name__} has {self.num_cls_tokens or 'none'} "
                "to choose from; leave --token out"
            )
        self.view_tokens = TOKENS[token]

    def keep_class_tokens(self, kept: int) -> None:
        """Drop all class tokens but the first `kept`, with their positions, for programs that know fewer.

        What is left is another function: in every block the other tokens attended to those that are dropped.

        Raises:
            UsageError: a network without class tokens to drop.
        """
        raise UsageError(f"{type(self).__name__} has no class tokens that could be dropped; keep all tokens")

    # ----------------------------------------------------------------- features

    @property
    def num_features(self) -> int:
        """Channels of the region features, and of the view feature of one token."""
        return self.stage_dims[-1]

    @property
    def view_width(self) -> int:
        """Channels of the view feature."""
        return self.num_features * max(len(self.view_tokens), 1)

    def forward_blocks(self, x_BCHW: Tensor, n: int = 1, attention: bool = False) -> list[BlockOutput]:
        """Outputs of the last `n` blocks in order, before the final norm, with attention maps if asked for.

        Raises:
            ValueError: `n` outside 1 .. number of blocks.
            UsageError: images smaller than a patch.
        """
        height, width = x_BCHW.shape[2:]
        if min(height, width) < self.patch_size:
            raise UsageError(
                f"images of {height} x {width} pixels are smaller than a patch of {self.patch_size}; enlarge the crops"
            )
        depth = sum(self.stage_depths)
        if not 1 <= n <= depth:
            raise ValueError(f"the last {n} blocks are outside 1..{depth}, the blocks of this network")
        outputs: list[BlockOutput] = []
        passed, x = 0, x_BCHW
        for stage in range(len(self.stage_depths)):
            x = self.enter_stage(stage, x)
            for block in self.stage_blocks(stage):
                passed += 1
                wanted = passed > depth - n
                x, maps = self._run_block(block, x, attention and wanted)
                if wanted:
                    outputs.append(BlockOutput(*self.tokens(x), maps, passed - 1))
        return outputs

    def _run_block(self, block: Any, x: Any, attention: bool) -> tuple[Any, Tensor | None]:
        """Call a block, through activation checkpointing when that is on and gradients are wanted."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            again = _statistics_kept(self)
            return checkpoint(
                self.call_block, block, x, attention, use_reentrant=False, context_fn=lambda: (nullcontext(), again)
            )
        return self.call_block(block, x, attention)

    def region_grid(self, x_BCHW: Tensor) -> tuple[int, int]:
        """Height and width of the grid that the regions of such images fill; one network, one size, one answer."""
        modes = [(module, module.training) for module in self.modules()]
        self.eval()  # neither statistics nor random numbers are touched
        with torch.no_grad():
            grid = self.forward_blocks(x_BCHW)[-1].grid
        for module, mode in modes:
            module.training = mode
        return grid

    def forward_features(self, x_BCHW: Tensor) -> Features:
        """View feature and region features of one batch of equally sized images."""
        last = self.forward_blocks(x_BCHW)[-1]
        tokens_BNC, prefix = self.norm(last.tokens_BNC), last.num_prefix_tokens
        return Features(self.pool(tokens_BNC, prefix), tokens_BNC[:, prefix:])

    def forward_feature_maps(self, x_BCHW: Tensor) -> Tensor:
        """Region features put back on the image plane: (B, C, H', W')."""
        last = self.forward_blocks(x_BCHW)[-1]
        return self.norm(last.tokens_BNC)[:, last.num_prefix_tokens :].transpose(1, 2).unflatten(2, last.grid)

    def forward_return_n_last_blocks(self, x_BCHW: Tensor, n: int, return_patch_avgpool: bool = False) -> Tensor:
        """Features of the linear probe (EsViT section 4.1): the pooled token of each of the last `n` blocks, concatenated.

        The final norm is applied to the blocks of the last stage only, whose width it has.
        `return_patch_avgpool` appends the mean region of the last block where class tokens are pooled; as published it changes
        nothing for networks without class tokens.

        Raises:
            ValueError: `n` outside 1 .. number of blocks.
        """
        blocks = self.forward_blocks(x_BCHW, n)
        first_of_last_stage = n - self.stage_depths[-1]
        tokens = [self.norm(b.tokens_BNC) if i >= first_of_last_stage else b.tokens_BNC for i, b in enumerate(blocks)]
        pooled = [self.pool(tokens_BNC, b.num_prefix_tokens) for tokens_BNC, b in zip(tokens, blocks)]
        if return_patch_avgpool and self.num_cls_tokens:
            pooled.append(tokens[-1][:, blocks[-1].num_prefix_tokens :].mean(dim=1))
        return torch.cat(pooled, dim=-1)

    def forward_selfattention(self, x_BCHW: Tensor, n: int = 1) -> Tensor | list[Tensor]:
        """Attention maps after the softmax, (B * windows, heads, queries, keys): of the last block, or a list of the last `n`.

        Raises:
            ValueError: `n` outside 1 .. number of blocks, or a network without attention.
        """
        if not self.has_attention:
            raise ValueError(f"{type(self).__name__} has no attention maps")
        maps = [block.attention for block in self.forward_blocks(x_BCHW, n, attention=True)]
        found = [m for m in maps if m is not None]
        return found[-1] if n == 1 else found

    # ----------------------------------------------------------------- attention on the image plane

    def block_at(self, number: int) -> Any:
        """The block of that number, the first one being 0."""
        return [block for stage in range(len(self.stage_depths)) for block in self.stage_blocks(stage)][number]

    def cut_of(self, output: BlockOutput) -> WindowPartition | None:
        """How the grid was cut for the maps of a block; None where every token attends to every token."""
        return None

    def has_summary_query(self, output: BlockOutput) -> bool:
        """Whether the maps of a block have a row for a class or global token."""
        return output.num_prefix_tokens > 0 and self.cut_of(output) is None

    def real_queries(self, output: BlockOutput) -> Tensor:
        """(windows of an image, queries): which rows of the maps belong to tokens, and not to padding."""
        cut = self.cut_of(output)
        return torch.ones(1, output.tokens_BNC.shape[1]) > 0 if cut is None else real_tokens(cut, output.grid)

    def attention_plane(self, output: BlockOutput, query_yx: tuple[int, int] | None) -> Tensor:
        """Where a token looks: its attention (B, heads, H', W') to the regions of `output.grid`, in their places.

        Weights sum to 1 less what the token gives to prefix tokens and to padding; outside its window they are 0.

        Args:
            output: of `forward_blocks` with `attention`, in evaluation mode.
            query_yx: row and column of the region that looks; None for the (first) class token of `view_tokens`.

        Raises:
            ValueError: no maps, a query outside the grid, or none where `has_summary_query` is false.
        """
        if output.attention is None:
            raise ValueError(f"block {output.block} of {type(self).__name__} has no attention maps")
        if query_yx is None and not self.has_summary_query(output):
            raise ValueError(f"no class or global token has attention maps in block {output.block}; name a region")
        if query_yx is not None and not all(0 <= at < side for at, side in zip(query_yx, output.grid)):
            raise ValueError(f"region {query_yx} is outside the grid {output.grid}")
        return self.plane_of_query(output.attention, output, query_yx)

    def plane_of_query(self, maps: Tensor, output: BlockOutput, query_yx: tuple[int, int] | None) -> Tensor:
        """What `attention_plane` returns, for full attention and for windows; its arguments are checked."""
        cut = self.cut_of(output)
        if cut is not None and query_yx is not None:
            return window_plane(maps, cut, output.grid, query_yx)
        prefix = output.num_prefix_tokens
        row = self.view_tokens[0] if query_yx is None else prefix + query_yx[0] * output.grid[1] + query_yx[1]
        return maps[:, :, row, prefix:].unflatten(-1, output.grid)

    # ----------------------------------------------------------------- multi-crop

    @_say_what_batch_norm_lacks
    def forward(
        self, crops: Tensor | Sequence[Tensor], weights: Sequence[Tensor | None] | None = None, class_tokens: int = 1
    ) -> Tensor | MultiCropOutput | LevelOutput:
        """View output of one batch, or of a list of crops in its order.

        Args:
            crops: (B, C, H, W), or a list of such tensors; neighbors of one size go through the stages together.
            weights: of each crop of a list, those of its samples over its patches (B, S, N), or None for none: asks for levels.
            class_tokens: how many of them go through the head then.

        Returns:
            `LevelOutput` where `weights` are given; else
            for a tensor, or a network that is not dense: `head(view features)`, (V * B, K), or (V * B, C) while the head is
            empty; for a list and a dense network: `MultiCropOutput`.

        Raises:
            UsageError: training BatchNorm, of the network or of its heads, with one value per channel.
        """
        if isinstance(crops, Tensor):
            return self.head(self.forward_features(crops).view_BC)
        if weights is not None:
            return self._forward_levels(crops, weights, class_tokens)
        groups = [list(group) for _, group in groupby(crops, key=lambda crop: crop.shape[-2:])]
        features = [self.forward_features(torch.cat(group)) for group in groups]
        view_logits = self.head(torch.cat([f.view_BC for f in features]))
        if self.head_dense is None:
            return view_logits
        region_features = torch.cat([f.regions_BTC.flatten(0, 1) for f in features])
        regions_per_view = tuple(f.regions_BTC.shape[1] for f, group in zip(features, groups) for _ in group)
        return MultiCropOutput(view_logits, self.head_dense(region_features), region_features, regions_per_view)

    def _forward_levels(
        self, crops: Sequence[Tensor], weights: Sequence[Tensor | None], class_tokens: int
    ) -> LevelOutput:
        tokens, samples, weights_of = [], [], iter(weights)
        for _, group in groupby(crops, key=lambda crop: crop.shape[-2:]):
            images = list(group)
            last = self.forward_blocks(torch.cat(images))[-1]
            tokens.append(self.summary_tokens(last.tokens_BNC, last.num_prefix_tokens))
            patches = last.tokens_BNC[:, last.num_prefix_tokens :].split([len(crop) for crop in images])
            wanted = [(crop_BNC, w_BSN) for crop_BNC in patches if (w_BSN := next(weights_of)) is not None]
            for _, alike in groupby(wanted, key=lambda pair: pair[1].shape[1]):
                assert self.srs is not None
                samples.append(self.srs(*map(torch.cat, zip(*alike))).flatten(0, 1))
        token_features = torch.cat(tokens)
        rows = [*token_features[:, :class_tokens].unbind(1), *([torch.cat(samples)] if samples else [])]
        logits = self._logits_of_levels(rows, class_tokens)
        return LevelOutput(
            tuple(logits[:class_tokens]),
            logits[-1] if samples else None,
            token_features.detach(),
            rows[-1].detach() if samples else None,
        )

    def _logits_of_levels(self, rows: Sequence[Tensor], class_tokens: int) -> list[Any]:
        """All levels through one head, or each through its own of a list: the class tokens' in order, last the samples'."""
        if isinstance(self.head, nn.ModuleList):
            own = [*range(class_tokens), -1]
            return [self.head[number](level) for number, level in zip(own, rows)]
        sizes = [len(level) for level in rows]
        return split_rows(self.head(torch.cat(list(rows)), sizes), sizes)


def batch_norms(network: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The layers with running statistics, which images of one batch share: BatchNorm of any kind."""
    return [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


@contextmanager
def _statistics_kept(network: nn.Module) -> Iterator[None]:
    """Recomputing a block must not count its batch twice in the running statistics of BatchNorm."""
    norms = batch_norms(network)
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before):
            norm.momentum, norm.num_batches_tracked = momentum, batches


class ResidualBlock(nn.Module):
    """The pre-norm block: attention, then an MLP, each after a norm and on a residual path with stochastic depth.

    Tokens are channels-last: (B, N, C), or any leading grid such as (B, H, W, C) that `attend` understands.
    """

    def __init__(
        self, norm1: nn.Module, attn: nn.Module, norm2: nn.Module, mlp: nn.Module, drop_path: nn.Module
    ) -> None:
        super().__init__()
        self.norm1 = norm1
        self.attn = attn
        self.drop_path = drop_path
        self.norm2 = norm2
        self.mlp = mlp

    def attend(self, x: Tensor, attention: bool) -> tuple[Tensor, Tensor | None]:
        """Attention of normalized tokens, with the maps if asked for."""
        return self.attn(x, attention=attention)

    def forward(self, x: Tensor, attention: bool = False) -> tuple[Tensor, Tensor | None]:
        """x to the same shape, and the attention maps if asked for."""
        attended, maps = self.attend(self.norm1(x), attention)
        x = x + self.drop_path(attended)
        return x + self.drop_path(self.mlp(self.norm2(x))), maps


def grid_tokens(x_BHWC: Tensor) -> Tokens:
    """The tokens of a grid without prefix tokens."""
    return Tokens(x_BHWC.flatten(1, 2), 0, (x_BHWC.shape[1], x_BHWC.shape[2]))


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Stochastic depth that grows linearly with depth, from 0 to `rate` at the last block: a list for each stage."""
    rates = iter(torch.linspace(0, rate, sum(depths), device="cpu").tolist())
    return [[next(rates) for _ in range(depth)] for depth in depths]


def init_linear_weights(module: nn.Module) -> None:
    """Linear layers start from a truncated normal of deviation 0.02 with zero bias; for `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
