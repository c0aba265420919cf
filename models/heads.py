"""The projection head of self-distillation: an MLP to a bottleneck, L2 normalization, weight-normalized prototypes.

Origin: DINO (Caron et al., ICCV 2021) section 3.1 and appendix; state-dict keys are the published ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import init_linear_weights
from ops.linear import Linear
from ops.logits import FactoredLogits


class WeightNormLinear(nn.Module):
    """A linear layer without bias whose rows are gain times direction: `weight_g` (K, 1) and `weight_v` (K, C).

    Directions start as the weights of torch's own linear layer do, uniform in +-1 / sqrt(C).
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1))
        bound = in_dim**-0.5
        nn.init.uniform_(self.weight_v, -bound, bound)

    def weight(self) -> Tensor:
        """The prototypes (K, C)."""
        # One kernel; spelled out it writes (K, C) six times more.
        return torch._weight_norm(self.weight_v, self.weight_g, 0)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., K)."""
        return F.linear(x, self.weight())

    def factors(self, x: Tensor) -> FactoredLogits:
        """What `forward` would multiply; under autocast the bottleneck has its dtype, in which the product is computed.

        So have prototypes without gradient, which take half the memory then.
        """
        device, prototypes = x.device.type, self.weight()
        x = x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
        return FactoredLogits(x, prototypes if prototypes.requires_grad else prototypes.to(x.dtype))


class DINOHead(nn.Module):
    """Features (..., in_dim) to logits over `out_dim` prototypes.

    Args:
        in_dim: channels of the features.
        out_dim: number of prototypes K.
        use_bn: BatchNorm after each hidden layer.
        norm_last_layer: freeze the prototypes' gain at 1.
        nlayers: linear layers of the MLP, at least 1.
        hidden_dim, bottleneck_dim: widths inside the MLP and at its end.
        factored: give the logits as `FactoredLogits`.
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
            layers.append(Linear(width_in, width_out))
            if i < len(widths) - 2:
                layers += [nn.BatchNorm1d(width_out), nn.GELU()] if use_bn else [nn.GELU()]
        self.mlp = nn.Sequential(*layers) if len(layers) > 1 else layers[0]
        self.apply(init_linear_weights)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim)
        self.last_layer.weight_g.requires_grad_(not norm_last_layer)

    def forward(self, x: Tensor, parts: Sequence[int] | None = None) -> Tensor | FactoredLogits:
        """(rows, in_dim) to logits (rows, K), multiplied unless `factored`.

        `parts` are numbers of consecutive rows that BatchNorm normalizes apart: levels of features are no one distribution.
        """
        apart = self.use_bn and parts is not None
        hidden = torch.cat([self.mlp(part) for part in x.split(list(parts or ()))]) if apart else self.mlp(x)
        bottleneck = F.normalize(hidden, dim=-1)
        return self.last_layer.factors(bottleneck) if self.factored else self.last_layer(bottleneck)
