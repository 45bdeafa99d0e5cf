"""Boxes as AdaMixer has them, where its queries look, and how what they see is mixed (Gao et al. 2022).

A box is xyzr here: its centre (x, y) in pixels, z = log2 of the square root of its area, r = log2 of its height over its width.
The z of a feature map is log2 of its stride, so that x, y, z is a place in the pyramid of maps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from steadydetr.boxes import area

SMALLEST = 2.0**-10  # pixels of a side: a box without any has no logarithm
TAU = 2.0  # how softly a place in the pyramid is spread over its maps


def to_xyzr(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Normalised cxcywh [B, N, 4] of images of these sizes, [B, 2] (w, h) in pixels -> xyzr [B, N, 4]."""
    centre, sides = boxes[..., :2] * sizes[:, None], boxes[..., 2:] * sizes[:, None]
    width, height = sides.clamp(min=SMALLEST).log2().unbind(-1)
    return torch.cat((centre, torch.stack(((width + height) / 2, height - width), -1)), -1)


def sides_of(xyzr: Tensor) -> Tensor:
    """Width and height in pixels, [..., 4] -> [..., 2]."""
    _, _, z, r = xyzr.unbind(-1)
    return torch.stack((z - r / 2, z + r / 2), -1).exp2()


def from_xyzr(xyzr: Tensor, sizes: Tensor) -> Tensor:
    """The inverse of `to_xyzr`. Boxes are not clipped."""
    return torch.cat((xyzr[..., :2], sides_of(xyzr)), -1) / sizes.repeat(1, 2)[:, None]


def refine(xyzr: Tensor, delta: Tensor) -> Tensor:
    """The box moved by `delta` [..., 4]: x and y in units of the old box's size 2^z, z and r by addition."""
    return torch.cat((xyzr[..., :2] + delta[..., :2] * xyzr[..., 2:3].exp2(), xyzr[..., 2:] + delta[..., 2:]), -1)


def intersection_over_foreground(own_xyxy: Tensor, other_xyxy: Tensor) -> Tensor:
    """Intersection over the area of the own box, of every pair: [B, N, 4] and [B, K, 4] -> [B, N, K]."""
    own, other = own_xyxy[:, :, None], other_xyxy[:, None]
    overlap = (torch.minimum(own[..., 2:], other[..., 2:]) - torch.maximum(own[..., :2], other[..., :2])).clamp(min=0)
    return overlap[..., 0] * overlap[..., 1] / area(own).clamp(min=1e-6)


def overlap_bias(iof: Tensor, tau: Tensor) -> Tensor:
    """What is added to attention scores, tau log(IoF + 1e-7): [B, N, K] and a tau for every head -> [B, heads, N, K]."""
    return tau[:, None, None] * (iof + 1e-7).log()[:, None]


def sample_places(xyzr: Tensor, offsets: Tensor) -> Tensor:
    """Where queries look: x and y in units of the box's sides from its centre, z by addition.

    [B, N, 4] and [B, N, ..., 3] -> [B, N, ..., 3].
    """
    base, scale = xyzr[..., :3], torch.cat((sides_of(xyzr), torch.ones_like(xyzr[..., :1])), -1)
    between = (slice(None), slice(None), *[None] * (offsets.dim() - 3))
    return base[between] + offsets * scale[between]


def level_weights(z: Tensor, strides: Sequence[int], tau: float = TAU) -> Tensor:
    """What each map counts at a place: softmax of -(z - log2 stride)^2 / tau. [...] -> [..., levels]."""
    grid = torch.tensor(strides, dtype=z.dtype, device=z.device).log2()
    return (-(z[..., None] - grid).square() / tau).softmax(-1)


def adaptive_mixing(sampled: Tensor, channels: Tensor, points: Tensor) -> Tensor:
    """Mix the channels of what was sampled, then its points, each followed by LayerNorm over both and ReLU.

    Args:
        sampled: [..., P, C].
        channels: [..., C, C].
        points: [..., P', P].

    Returns:
        [..., P', C].
    """
    for mixed in (lambda x: x @ channels, lambda x: points @ x):
        sampled = mixed(sampled)
        sampled = F.relu(F.layer_norm(sampled, sampled.shape[-2:]))
    return sampled
