"""The KoLeo regularizer: spread the features of a batch by their nearest-neighbor distances.

    loss = - mean over images i of log min over j != i of || x_i - x_j ||        x of length 1

Shapes: V views, B images of this process, N images of all processes, C channels.
Origin: Sablayrolles et al., "Spreading vectors for similarity search" (ICLR 2019), after the entropy estimator of Kozachenko and
Leonenko (1987); for self-distillation in DINOv2 (Oquab et al., TMLR 2024), section 4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distributed.collectives import all_gather_rows, get_rank, get_world_size
from losses.distillation import at_least_float32

EPSILON = 1e-8  # added to each difference, so that the logarithm of equal features is finite


def koleo_loss(features_VBC: Tensor) -> Tensor:
    """Return the loss over the images of all processes, averaged over views; a collective operation.

    Neighbors are searched within a view, as the views of an image should be close. Every process computes the whole loss, of which
    its own images get gradients; they are multiplied by the number of processes, over which gradients are averaged.

    Raises:
        ValueError: fewer than two images.
    """
    with torch.autocast(features_VBC.device.type, enabled=False):
        own_BVC = F.normalize(at_least_float32(features_VBC), dim=-1).transpose(0, 1)
        parts = all_gather_rows(own_BVC.detach())
        parts[get_rank()] = own_BVC.detach() + get_world_size() * (own_BVC - own_BVC.detach())
        x_VNC = torch.cat(parts).transpose(0, 1)
        if x_VNC.shape[1] < 2:
            raise ValueError("the KoLeo loss needs two or more images")
        with torch.no_grad():
            similarity_VNN = x_VNC @ x_VNC.mT
            similarity_VNN.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
            nearest_VN = similarity_VNN.argmax(dim=-1)
        neighbors_VNC = x_VNC.gather(1, nearest_VN[..., None].expand_as(x_VNC))
        return -F.pairwise_distance(x_VNC, neighbors_VNC, eps=EPSILON).log().mean()
