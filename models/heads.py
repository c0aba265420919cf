"""The projection head of DINO (Caron et al., ICCV 2021): an MLP to a bottleneck, L2 normalization, weight-normalized prototypes.

State-dict keys are those of facebookresearch/dino.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import init_linear_weights
from ops.logits import FactoredLogits


class WeightNormLinear(nn.Module):
    """A weight-normalized linear layer without bias: gains `weight_g` (K, 1) times directions `weight_v` (K, C).

    Directions are initialized like the weights of `nn.Linear`, uniformly in +-1 / sqrt(C).
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1))
        bound = in_dim**-0.5
        nn.init.uniform_(self.weight_v, -bound, bound)

    def weight(self) -> Tensor:
        """Return the prototypes (K, C)."""
        # A fused kernel: the explicit form writes six more tensors (K, C).
        return torch._weight_norm(self.weight_v, self.weight_g, 0)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (..., K) of bottleneck vectors (..., C)."""
        return F.linear(x, self.weight())

    def factors(self, x: Tensor) -> FactoredLogits:
        """Return the factors of the logits, under autocast in its dtype; prototypes that need a gradient keep theirs."""
        device, prototypes = x.device.type, self.weight()
        x = x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
        return FactoredLogits(x, prototypes if prototypes.requires_grad else prototypes.to(x.dtype))


class DINOHead(nn.Module):
    """The projection head, from features to logits over `out_dim` prototypes.

    Args:
        in_dim: channels of the features.
        out_dim: number of prototypes K.
        use_bn: BatchNorm after each hidden layer.
        norm_last_layer: fix the gains of the prototypes at 1.
        nlayers: linear layers of the MLP, at least 1.
        hidden_dim, bottleneck_dim: widths of the hidden layers and of the output of the MLP.
        factored: return `FactoredLogits`.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        factored: bool = False,
    ) -> None:
        super().__init__()
        self.factored = factored
        self.use_bn = use_bn
        widths = [in_dim] + [hidden_dim] * (max(nlayers, 1) - 1) + [bottleneck_dim]
        layers: list[nn.Module] = []
        for i, (width_in, width_out) in enumerate(itertools.pairwise(widths)):
            layers.append(nn.Linear(width_in, width_out))
            if i < len(widths) - 2:
                layers += [nn.BatchNorm1d(width_out), nn.GELU()] if use_bn else [nn.GELU()]
        self.mlp = nn.Sequential(*layers) if len(layers) > 1 else layers[0]
        self.apply(init_linear_weights)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)
        self.last_layer.weight_g.requires_grad_(not norm_last_layer)

    def forward(self, x: Tensor, parts: Sequence[int] | None = None) -> Tensor | FactoredLogits:
        """Return the logits (rows, K) of features (rows, in_dim).

        Args:
            parts: numbers of consecutive rows with separate BatchNorm statistics, as for levels of different distributions.
        """
        separate = self.use_bn and parts is not None
        hidden = torch.cat([self.mlp(part) for part in x.split(list(parts or ()))]) if separate else self.mlp(x)
        bottleneck = F.normalize(hidden, dim=-1)
        return self.last_layer.factors(bottleneck) if self.factored else self.last_layer(bottleneck)
