"""Stable matching (Liu et al. 2023, Stable-DINO): class targets and matching costs that depend on where the box is.

Legend: P matched pairs, R problem rows (one for every stage and object), N queries. Images are folded ones: stage * B + image.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from steadydetr.kinds import register
from steadydetr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@register("identity")
def identity(s: Tensor) -> Tensor:
    return s


@register("exponential")
def exponential(s: Tensor) -> Tensor:
    """e^s (Table 7). At least 1, so it only makes sense where targets are rescaled."""
    return s.exp()


@register("unit-exponential")
def unit_exponential(s: Tensor) -> Tensor:
    """(e^s - 1) / (e - 1) (Table 7), convex from 0 to 1."""
    return s.expm1() / math.expm1(1)


@register("half-sine")
def half_sine(s: Tensor) -> Tensor:
    """sin(s pi / 2) (Table 7), concave from 0 to 1."""
    return (s * (math.pi / 2)).sin()


def rescale_targets(target: Tensor, image: Tensor, top: Tensor) -> Tensor:
    """The transformation epsilon of Eq. 3: within an image, targets are stretched until the largest is `top`, never shrunk.

    Only targets above 1, which `exponential` makes, are shrunk. Where all targets of an image are 0 they stay 0.

    Args:
        target: [P] f1(s) of the matched pairs.
        image: [P] in 0..len(top).
        top: [images] 1, or the largest IoU of any query with any target of the image.
    """
    largest = torch.zeros_like(top).scatter_reduce(0, image, target, "amax")
    factor = torch.where(largest > 0, top / largest, 1)
    factor = torch.where(largest > 1, factor, factor.clamp(min=1))
    return target * factor[image]


def modulation(giou: Tensor, exponent: float = 0.5) -> Tensor:
    """f2(s') of Eq. 4: s'^exponent with s' = (GIoU + 1) / 2, elementwise."""
    return ((giou + 1) / 2).clamp(min=0).pow(exponent)


def rescale_modulation(values: Tensor, image: Tensor, images: int, valid: Tensor | None = None) -> Tensor:
    """f2 [R, N] stretched so that the best pair of every image has 1, as the released matcher does."""
    counted = values if valid is None else torch.where(valid, values, 0)
    best = values.new_zeros(images)
    if values.numel():
        best = best.scatter_reduce(0, image, counted.amax(1), "amax")
    return values * (1 / (best + 1e-8)).clamp(min=1)[image, None]
