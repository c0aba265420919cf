"""The contract of a backbone, shared by all architectures.

An architecture supplies the entry to each stage (`enter_stage`: patch embedding, merging, pooling), the blocks of a stage
(`stage_blocks`) and the tokens between blocks (`tokens`). The base class derives view and region features, features of a linear
probe, attention maps and multi-crop batching. Method names, and the attributes `head` and `head_dense` with their state-dict keys,
follow microsoft/esvit (EsViT, Li et al., ICLR 2022, sections 3.1-3.2).

Shapes: B images, V views, T regions of a view, S samples of a view, K prototypes, C channels, N tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import accumulate, groupby
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from yacs.config import CfgNode

from config.choices import TOKENS
from models.huggingface import HubModel, TimmModel
from models.interop import Converter, State
from models.outputs import LevelOutput, MultiCropOutput
from models.resize import resize_square_table
from ops.logits import split_rows
from ops.windows import WindowPartition, valid_tokens, window_attention_plane
from utils import UsageError

# Prefixes of the tensors that a method adds to a backbone: heads, and the sampling of UDI (models/srs.py).
HEAD_PREFIXES = ("head.", "head_dense.")
METHOD_PREFIXES = (*HEAD_PREFIXES, "srs.")


class Tokens(NamedTuple):
    """Tokens between two blocks."""

    tokens_BNC: Tensor  # prefix tokens (class or global) first, then the regions row by row
    num_prefix_tokens: int
    grid: tuple[int, int]  # height and width in regions


class BlockOutput(NamedTuple):
    """The output of a block."""

    tokens_BNC: Tensor
    num_prefix_tokens: int
    grid: tuple[int, int]
    attention: Tensor | None  # (B * windows, heads, queries, keys) if requested
    block: int  # counted from 0 through all stages


class Features(NamedTuple):
    """Normalized features of the last stage."""

    view_BC: Tensor
    regions_BTC: Tensor


class Backbone(nn.Module, ABC):
    """A vision backbone of one or more stages.

    Attributes:
        dense: return region outputs too, through `head_dense`.
        head, head_dense: `nn.Identity` until a method sets them; `head_dense` is None unless dense.
        srs: pooling of patch tokens at samples (models/srs.py); None until a method sets it.
        stage_dims, stage_depths: channels and number of blocks of each stage.
        patch_size: side in pixels of a token of the first stage; the minimum side of an image.
        image_size: (height, width) of MODEL.IMAGE_SIZE if learned tables depend on it, else None.
        norm: the norm of the last stage's tokens.
        num_cls_tokens: number of class tokens.
        view_tokens: indices of the class tokens that make the view feature, see `choose_token`.
        has_attention: whether blocks return attention maps.
        converters: functions that convert the state dict for another library, by its name.
        grad_checkpointing: recompute blocks in the backward instead of storing their activations.
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

    # ----------------------------------------------------------------- supplied by an architecture

    @abstractmethod
    def enter_stage(self, stage: int, x: Any) -> Any:
        """Return the input of the first block of `stage`, from images (B, C, H, W) for stage 0, else from the stage before."""

    @abstractmethod
    def stage_blocks(self, stage: int) -> Sequence[Any]:
        """Return the blocks of a stage, arguments of `call_block`."""

    @abstractmethod
    def tokens(self, x: Any) -> Tokens:
        """Return the output of a block, or of `enter_stage`, as tokens."""

    def call_block(self, block: Any, x: Any, attention: bool) -> tuple[Any, Tensor | None]:
        """Return the output of a block in the layout of its input, and the attention maps if requested."""
        return block(x, attention)

    def pool(self, tokens_BNC: Tensor, num_prefix_tokens: int) -> Tensor:
        """Return the view feature (B, C) of a block's tokens, by default their mean."""
        return tokens_BNC.mean(dim=1)

    def class_features(self, tokens_BNC: Tensor, num_prefix_tokens: int) -> Tensor:
        """Return the normalized class tokens (B, class tokens, C) of the last block, by default the view feature alone."""
        return self.pool(self.norm(tokens_BNC), num_prefix_tokens)[:, None]

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Prepare for an epoch of training, for attention that depends on the progress."""

    def fit_tensor(self, name: str, tensor: Tensor, image_size: tuple[int, int] | None = None) -> Tensor | None:
        """Resize a loaded table of positions to the size of parameter `name`; None if it has no such table's shape.

        Args:
            image_size: (height, width) for which the table was trained, if known.
        """
        if not name.endswith("relative_position_bias_table"):
            return None
        return resize_square_table(tensor, len(self.get_parameter(name)))

    def export_note(self, library: str) -> str | None:
        """Return what `library` computes differently with the exported weights, or None."""
        return None

    def adopt_pos_resize(self, rule: str | None) -> None:
        """Resize position embeddings by the rule of a loaded file (`models.resize.RULES`), unless the config sets one."""

    def resolve_config(self, config: CfgNode) -> CfgNode:
        """Return the config with automatic values replaced by those in use."""
        return config

    def timm_name(self, name: str) -> str:
        """Return the name of a tensor in timm (and torchvision)."""
        return name

    @property
    def any_grid(self) -> bool:
        """Whether a graph that is traced at one image size computes other sizes too."""
        return False

    def in_timm(self, config: CfgNode) -> TimmModel | None:
        """Return the call of `timm.create_model` that builds this network, or None if timm does not have it."""
        return None

    def to_transformers(self, state: State, config: CfgNode) -> HubModel:
        """Convert for `transformers.AutoModel.from_pretrained`.

        Args:
            state: tensors of this network without heads.

        Raises:
            UsageError: transformers does not have the network.
        """
        raise UsageError(
            f"--format transformers does not support {type(self).__name__}, which transformers does not have; choose one of "
            "backbone, safetensors, onnx, torchscript"
        )

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that fine-tuning excludes from weight decay: positions and class tokens."""
        names = (name for name, _ in self.named_parameters() if not name.startswith(HEAD_PREFIXES))
        return {name for name in names if any(part in name for part in ("relative_position", "pos_embed", "cls_token"))}

    # ----------------------------------------------------------------- class tokens

    def choose_token(self, token: str) -> None:
        """Make the view feature from the class tokens of `token`, a key of `TOKENS`.

        Raises:
            UsageError: a second class token of a network without one.
        """
        if token != "cls" and self.num_cls_tokens < 2:
            raise UsageError(
                f"--token {token} needs two class tokens, {type(self).__name__} has {self.num_cls_tokens}; omit --token"
            )
        self.view_tokens = TOKENS[token]

    def keep_class_tokens(self, kept: int) -> None:
        """Keep the first `kept` class tokens only, for programs that support fewer. This changes all features.

        Raises:
            UsageError: a network without class tokens.
        """
        raise UsageError(f"{type(self).__name__} has no class tokens to drop; keep all tokens")

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
        """Return the outputs of the last `n` blocks before the final norm, with attention maps if requested.

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
            raise ValueError(f"n = {n} is outside 1..{depth}, the number of blocks")
        outputs: list[BlockOutput] = []
        number, x = 0, x_BCHW
        for stage in range(len(self.stage_depths)):
            x = self.enter_stage(stage, x)
            for block in self.stage_blocks(stage):
                returned = number >= depth - n
                x, maps = self._run_block(block, x, attention and returned)
                if returned:
                    outputs.append(BlockOutput(*self.tokens(x), maps, number))
                number += 1
        return outputs

    def _run_block(self, block: Any, x: Any, attention: bool) -> tuple[Any, Tensor | None]:
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return self.call_block(block, x, attention)
        recomputation = _frozen_batch_norm_statistics(self)
        return checkpoint(
            self.call_block, block, x, attention, use_reentrant=False, context_fn=lambda: (nullcontext(), recomputation)
        )

    @torch.no_grad()
    def region_grid(self, x_BCHW: Tensor) -> tuple[int, int]:
        """Return the (height, width) in regions of images of this size."""
        modes = [(module, module.training) for module in self.modules()]
        self.eval()  # leaves running statistics and random states unchanged
        grid = self.forward_blocks(x_BCHW)[-1].grid
        for module, mode in modes:
            module.training = mode
        return grid

    def forward_features(self, x_BCHW: Tensor) -> Features:
        """Return view and region features of one batch of images."""
        last = self.forward_blocks(x_BCHW)[-1]
        tokens_BNC, prefix = self.norm(last.tokens_BNC), last.num_prefix_tokens
        return Features(self.pool(tokens_BNC, prefix), tokens_BNC[:, prefix:])

    def forward_feature_maps(self, x_BCHW: Tensor) -> Tensor:
        """Return the region features as maps (B, C, H', W')."""
        return self.forward_stage_maps(x_BCHW, [len(self.stage_depths) - 1])[0]

    def forward_stage_maps(self, x_BCHW: Tensor, stages: Sequence[int]) -> list[Tensor]:
        """Return the regions at the end of each of `stages`, counted from 0, as maps (B, C, H', W').

        The final norm is applied to the last stage only, which has its width.

        Raises:
            ValueError: no such stage.
        """
        last_blocks = [end - 1 for end in accumulate(self.stage_depths)]
        if not all(0 <= stage < len(last_blocks) for stage in stages):
            raise ValueError(f"stages {list(stages)} are not all in 0..{len(last_blocks) - 1}")
        outputs = {b.block: b for b in self.forward_blocks(x_BCHW, last_blocks[-1] + 1 - last_blocks[min(stages)])}
        maps = []
        for output in (outputs[last_blocks[stage]] for stage in stages):
            tokens_BNC = self.norm(output.tokens_BNC) if output.block == last_blocks[-1] else output.tokens_BNC
            maps.append(tokens_BNC[:, output.num_prefix_tokens :].transpose(1, 2).unflatten(2, output.grid))
        return maps

    def forward_return_n_last_blocks(self, x_BCHW: Tensor, n: int, return_patch_avgpool: bool = False) -> Tensor:
        """Return the features of the linear probe (EsViT section 4.1): pooled tokens of the last `n` blocks, concatenated.

        The final norm is applied to blocks of the last stage only, which have its width.

        Args:
            return_patch_avgpool: append the mean region of the last block; as published, only for networks with class tokens.

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
        """Return the attention maps (B * windows, heads, queries, keys) of the last block, or a list of those of the last `n`.

        Raises:
            ValueError: `n` outside 1 .. number of blocks, or a network without attention.
        """
        if not self.has_attention:
            raise ValueError(f"{type(self).__name__} has no attention maps")
        blocks = self.forward_blocks(x_BCHW, n, attention=True)
        maps = [block.attention for block in blocks if block.attention is not None]
        return maps[-1] if n == 1 else maps

    # ----------------------------------------------------------------- attention on the image plane

    def block_at(self, number: int) -> Any:
        """Return a block by its number, counted from 0 through all stages."""
        return [block for stage in range(len(self.stage_depths)) for block in self.stage_blocks(stage)][number]

    def partition_of(self, output: BlockOutput) -> WindowPartition | None:
        """Return the partition into windows behind the attention maps of a block; None for full attention."""
        return None

    def has_class_query(self, output: BlockOutput) -> bool:
        """Return whether the attention maps of a block have a row for a class or global token."""
        return output.num_prefix_tokens > 0 and self.partition_of(output) is None

    def valid_queries(self, output: BlockOutput) -> Tensor:
        """Return which rows of the attention maps belong to tokens, not to padding: (windows of an image, queries)."""
        partition = self.partition_of(output)
        if partition is None:
            return torch.ones(1, output.tokens_BNC.shape[1], dtype=torch.bool)
        return valid_tokens(partition, output.grid)

    def attention_plane(self, output: BlockOutput, query_yx: tuple[int, int] | None) -> Tensor:
        """Return the attention (B, heads, H', W') of one token to all regions of `output.grid`.

        The weights sum to 1 minus those of prefix tokens and padding; they are 0 outside the window of the token.

        Args:
            output: of `forward_blocks` with `attention`, in evaluation mode.
            query_yx: row and column of a region; None for the first class token of `view_tokens`.

        Raises:
            ValueError: no attention maps, a region outside the grid, or no class token where `has_class_query` is false.
        """
        if output.attention is None:
            raise ValueError(f"block {output.block} of {type(self).__name__} has no attention maps")
        if query_yx is None and not self.has_class_query(output):
            raise ValueError(f"block {output.block} has no attention of a class or global token; pass a region")
        if query_yx is not None and not all(0 <= index < side for index, side in zip(query_yx, output.grid)):
            raise ValueError(f"region {query_yx} is outside the grid {output.grid}")
        return self.query_plane(output.attention, output, query_yx)

    def query_plane(self, maps: Tensor, output: BlockOutput, query_yx: tuple[int, int] | None) -> Tensor:
        """Implement `attention_plane` for full attention and for windows."""
        partition = self.partition_of(output)
        if partition is not None and query_yx is not None:
            return window_attention_plane(maps, partition, output.grid, query_yx)
        prefix = output.num_prefix_tokens
        row = self.view_tokens[0] if query_yx is None else prefix + query_yx[0] * output.grid[1] + query_yx[1]
        return maps[:, :, row, prefix:].unflatten(-1, output.grid)

    # ----------------------------------------------------------------- multi-crop

    def forward(
        self, crops: Tensor | Sequence[Tensor], weights: Sequence[Tensor | None] | None = None, class_tokens: int = 1
    ) -> Tensor | MultiCropOutput | LevelOutput:
        """Return the outputs of one batch, or of a list of crops in its order.

        Args:
            crops: (B, C, H, W), or a list of such tensors; consecutive crops of one size are batched together.
            weights: for UDI, of each crop the pooling weights (B, S, N) of its samples, or None for a crop without samples.
            class_tokens: for UDI, number of class tokens that go through the head.

        Returns:
            `LevelOutput` if `weights` are given; `MultiCropOutput` for a list and a dense network; else `head(view features)`
            (V * B, K), which are the features (V * B, C) while the head is empty.

        Raises:
            UsageError: BatchNorm in training mode with one value per channel.
        """
        try:
            if isinstance(crops, Tensor):
                return self.head(self.forward_features(crops).view_BC)
            if weights is not None:
                return self._forward_levels(crops, weights, class_tokens)
            return self._forward_crops(crops)
        except ValueError as error:
            if "Expected more than 1 value per channel" not in str(error):
                raise
            raise UsageError(
                "BatchNorm cannot train on one value per channel, as from one image with a 1 x 1 feature map; "
                "raise --batch_size_per_gpu or enlarge the crops"
            ) from None

    def _forward_crops(self, crops: Sequence[Tensor]) -> Tensor | MultiCropOutput:
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
        tokens, samples, remaining_weights = [], [], iter(weights)
        for _, group in groupby(crops, key=lambda crop: crop.shape[-2:]):
            images = list(group)
            last = self.forward_blocks(torch.cat(images))[-1]
            tokens.append(self.class_features(last.tokens_BNC, last.num_prefix_tokens))
            patches = last.tokens_BNC[:, last.num_prefix_tokens :].split([len(crop) for crop in images])
            sampled = [(crop_BNC, w_BSN) for crop_BNC in patches if (w_BSN := next(remaining_weights)) is not None]
            for _, same_count in groupby(sampled, key=lambda pair: pair[1].shape[1]):
                assert self.srs is not None
                samples.append(self.srs(*map(torch.cat, zip(*same_count))).flatten(0, 1))
        token_features = torch.cat(tokens)
        levels = [*token_features[:, :class_tokens].unbind(1), *([torch.cat(samples)] if samples else [])]
        logits = self._level_logits(levels, class_tokens)
        return LevelOutput(
            tuple(logits[:class_tokens]),
            logits[-1] if samples else None,
            token_features.detach(),
            levels[-1].detach() if samples else None,
        )

    def _level_logits(self, levels: Sequence[Tensor], class_tokens: int) -> list[Any]:
        """Apply one head to all levels, or a list of heads: one for each class token, the last one for samples."""
        if isinstance(self.head, nn.ModuleList):
            return [self.head[i](level) for i, level in zip([*range(class_tokens), -1], levels)]
        sizes = [len(level) for level in levels]
        return split_rows(self.head(torch.cat(list(levels)), sizes), sizes)


def batch_norms(network: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Return the BatchNorm layers of a network."""
    return [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


@contextmanager
def _frozen_batch_norm_statistics(network: nn.Module) -> Iterator[None]:
    """Keep running statistics unchanged while a block is recomputed, so that each batch counts once."""
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
    """The pre-norm transformer block with stochastic depth, for tokens (B, N, C) or (B, H, W, C)."""

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
        """Return the attention of normalized tokens, and its maps if requested."""
        return self.attn(x, attention=attention)

    def forward(self, x: Tensor, attention: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return tokens of the same shape, and the attention maps if requested."""
        attended, maps = self.attend(self.norm1(x), attention)
        x = x + self.drop_path(attended)
        return x + self.drop_path(self.mlp(self.norm2(x))), maps


def grid_tokens(x_BHWC: Tensor) -> Tokens:
    """Return the tokens of a grid without prefix tokens."""
    return Tokens(x_BHWC.flatten(1, 2), 0, (x_BHWC.shape[1], x_BHWC.shape[2]))


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Return rates of stochastic depth for the blocks of each stage, growing linearly from 0 to `rate`."""
    rates = iter(torch.linspace(0, rate, sum(depths), device="cpu").tolist())
    return [[next(rates) for _ in range(depth)] for depth in depths]


def init_linear_weights(module: nn.Module) -> None:
    """Initialize a linear layer from a truncated normal of standard deviation 0.02 with zero bias; for `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
