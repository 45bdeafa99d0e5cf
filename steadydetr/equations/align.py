"""Align-DETR (Cai et al. 2023): a class target of score and position, and how much each of several queries learns of one target.

Legend: P matched pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from steadydetr.equations.distill import quality_score
from steadydetr.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def aligned_quality(score: Tensor, iou: Tensor, alpha: float = 0.25, least: float = 0.01) -> Tensor:
    """t = p^alpha IoU^(1 - alpha), but at least `least`, elementwise."""
    return quality_score(score, iou, alpha).clamp(min=least)


def prime_weights(quality: Tensor, target: Tensor, tau: float) -> Tensor:
    """exp(-rank / tau) of every pair, [P]: the best of the pairs of a target has rank 0; of equal ones the first is the better.

    Args:
        quality: [P].
        target: [P] int64, whose numbers need not be in order.
        tau: from above 0 (the best alone counts) to infinity (all count alike).
    """
    order = quality.argsort(descending=True, stable=True)
    order = order[target[order].argsort(stable=True)]
    held = target[order].contiguous()
    rank = torch.arange(len(held), device=held.device) - torch.searchsorted(held, held)
    return torch.empty_like(quality).scatter(0, order, (-rank.to(quality.dtype) / tau).exp())
