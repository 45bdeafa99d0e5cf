"""Classification and box terms that every detector of the family shares.

Everything is elementwise. Logits are before the sigmoid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from steadydetr.boxes import iou_giou, to_xyxy
from steadydetr.lazy import F, torch

if TYPE_CHECKING:
    from torch import Tensor


L1Format = Literal["cxcywh", "xyxy"]  # the four numbers of a box whose differences L1 sums


def classification_loss(
    logits: Tensor, target: Tensor, positive: Tensor, alpha: float | None = 0.25, gamma: float = 2.0, focal_positives: bool = True
) -> Tensor:
    """|t - p|^gamma BCE(p, t), elementwise over `logits`.

    With t = 1 at positives and 0 elsewhere it is the focal loss (Lin et al. 2017, Eq. 5); with t = IoU and alpha None the quality
    focal loss (Li et al. 2020, Eq. 4; OD-DETR Eq. 2); with the position target the loss of Stable-DINO Eq. 3.
    `positive` (bool) chooses alpha or 1 - alpha. The target is a constant; the p inside |t - p| is not.
    Without `focal_positives` the factor |t - p|^gamma is that of negatives alone: the IoU-aware BCE loss of Align-DETR.
    """
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    factor = (target - logits.sigmoid()).abs().pow(gamma)
    loss = loss * (factor if focal_positives else torch.where(positive, 1, factor))
    if alpha is None:
        return loss
    return loss * (1 - alpha + (2 * alpha - 1) * positive)


def focal_cost(score: Tensor, alpha: float | None = 0.25, gamma: float = 2.0, eps: float = 1e-8) -> Tensor:
    """Cost of giving a query to a target, from its score p at the target's class, elementwise (Deformable DETR's matcher).

    With p times a measure of position it is the position-modulated cost (Stable-DINO Eq. 4). alpha None: both terms weigh 1.
    """
    positive = (1 - score).pow(gamma) * -(score + eps).log()
    negative = score.pow(gamma) * -(1 - score + eps).log()
    return positive - negative if alpha is None else alpha * positive - (1 - alpha) * negative


def box_terms(predicted: Tensor, target: Tensor, giou_eps: float = 0.0, l1_format: L1Format = "cxcywh") -> tuple[Tensor, Tensor, Tensor]:
    """L1 (summed over the four coordinates), 1 - GIoU and IoU of boxes that broadcast against each other, [..., 4] -> [...]."""
    predicted_xyxy, target_xyxy = to_xyxy(predicted), to_xyxy(target)
    l1 = (predicted_xyxy - target_xyxy if l1_format == "xyxy" else predicted - target).abs().sum(-1)
    iou, giou = iou_giou(predicted_xyxy, target_xyxy, giou_eps)
    return l1, 1 - giou, iou
