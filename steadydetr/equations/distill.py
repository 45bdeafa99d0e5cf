"""Offline distillation (Chang et al. 2023, DETRDistill): what a trained detector teaches another.

Legend: F folded images (stage * B + image), K teacher predictions of an image, N student queries, C classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from steadydetr.boxes import iou_giou, to_xyxy

# Hungarian-matching logits distillation, Eq. 2-4, and query-prior assignment distillation, Eq. 9


def teacher_stages(student: int, teacher: int) -> Tensor:
    """The teacher's stage that each stage of the student learns from: ceil((s + 1) T / S) - 1 (DETRDistill Fig. 5)."""
    return -(-(torch.arange(1, student + 1) * teacher) // student) - 1


def grouped_stages(student: int, teacher: int) -> list[tuple[int, int]]:
    """(student's stage, teacher's stage) wherever both cover the same part of their decoders: the groups of Fig. 5 in full."""
    last = teacher_stages(student, teacher).tolist()
    return [(s, t) for s in range(student) for t in range(s * teacher // student, last[s] + 1)]


def soft_label_cost(logits: Tensor, target: Tensor) -> Tensor:
    """BCE of every student's scores to every teacher's, summed over classes: the class term of L_match in Eq. 2.

    Args:
        logits: [F, N, C] of the student.
        target: [F, K, C] the teacher's sigmoid scores.

    Returns:
        [F, K, N].
    """
    # BCE(x, t) = softplus(x) - t x, so the sum over classes is a matrix product
    return F.softplus(logits).sum(-1)[:, None] - target @ logits.transpose(1, 2)


def soft_label_loss(logits: Tensor, target: Tensor) -> Tensor:
    """The same of matched pairs: [P, C] each -> [P]."""
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(-1)


def pairwise_boxes(predicted: Tensor, target: Tensor, giou_eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """L1 and GIoU of every target box with every predicted one (Eq. 2, 3): [F, N, 4] and [F, K, 4] -> [F, K, N] each."""
    _, giou = iou_giou(to_xyxy(predicted)[:, None], to_xyxy(target)[:, :, None], giou_eps)
    return torch.cdist(target, predicted, p=1), giou
