"""Classification and box terms that every detector of the family shares.

Legend: R problem rows (one per stage and object), N queries, P matched pairs. Logits are before the sigmoid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from steadydetr.boxes import iou_giou, to_xyxy


def classification_loss(logits: Tensor, target: Tensor, positive: Tensor, alpha: float | None = 0.25, gamma: float = 2.0) -> Tensor:
    """|t - p|^gamma BCE(p, t), elementwise over `logits`.

    With t = 1 at positives and 0 elsewhere it is the focal loss (Lin et al. 2017, Eq. 5); with t = IoU and alpha None the quality
    focal loss (Li et al. 2020, Eq. 4; OD-DETR Eq. 2); with the position target the loss of Stable-DINO Eq. 3.
    `positive` (bool) chooses alpha or 1 - alpha. The target is a constant; the p inside |t - p| is not.
    """
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    loss = loss * (target - logits.sigmoid()).abs().pow(gamma)
    if alpha is None:
        return loss
    return loss * (1 - alpha + (2 * alpha - 1) * positive)


def focal_cost(logits: Tensor, giou: Tensor, alpha: float = 0.25, gamma: float = 2.0, eps: float = 1e-8) -> Tensor:
    """Cost of giving a query to a target, from its logit at the target's class (Deformable DETR, matcher). [R, N] -> [R, N].

    It does not look at `giou`; a cost that does takes its place (Stable-DINO Eq. 4).
    """
    p = logits.sigmoid()
    positive = alpha * (1 - p).pow(gamma) * -(p + eps).log()
    negative = (1 - alpha) * p.pow(gamma) * -(1 - p + eps).log()
    return positive - negative


@dataclass(frozen=True)
class Pairs:
    """What a class target may depend on: the predictions of matched pairs, detached."""

    score: Tensor  # [P] of the target's class
    iou: Tensor  # [P] of the prediction with its target
    image: Tensor  # [P] folded: stage * B + image
    largest_iou: Callable[[], Tensor]  # () -> [S * B] over every query and target of the image at that stage


def hard_target(pairs: Pairs) -> Tensor:
    """1: the focal loss."""
    return torch.ones_like(pairs.iou)


def iou_target(pairs: Pairs) -> Tensor:
    """The IoU itself: quality focal loss (OD-DETR Eq. 2, with alpha None)."""
    return pairs.iou


def box_terms(predicted: Tensor, target: Tensor, giou_eps: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """L1 (summed over the four coordinates), 1 - GIoU and IoU of boxes that broadcast against each other, [..., 4] -> [...]."""
    l1 = (predicted - target).abs().sum(-1)
    iou, giou = iou_giou(to_xyxy(predicted), to_xyxy(target), giou_eps)
    return l1, 1 - giou, iou
