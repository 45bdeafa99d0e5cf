"""Slow, obvious counterparts of the detection losses: one query and one class at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tests.reference.boxes import Box, iou_and_giou, l1


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def cross_entropy(p: float, t: float) -> float:
    return -(t * math.log(p) + (1 - t) * math.log(1 - p))


def classification(logit: float, target: float, positive: bool, alpha: float | None, gamma: float) -> float:
    p = sigmoid(logit)
    weight = 1.0 if alpha is None else alpha if positive else 1 - alpha
    return weight * abs(target - p) ** gamma * cross_entropy(p, target)


def class_loss(
    logits: Sequence[Sequence[float]], positives: Mapping[tuple[int, int], float], alpha: float | None = 0.25, gamma: float = 2.0
) -> float:
    """Of one image and stage: logits by query and class; the target of every positive (query, class), 0 elsewhere."""
    total = 0.0
    for q, row in enumerate(logits):
        for c, logit in enumerate(row):
            total += classification(logit, positives.get((q, c), 0.0), (q, c) in positives, alpha, gamma)
    return total


def box_losses(boxes: Sequence[Box], targets: Sequence[Box], pairs: Mapping[int, int]) -> tuple[float, float]:
    """L1 and 1 - GIoU of one image and stage, summed over pairs of a query and its target."""
    distance = sum(l1(boxes[q], targets[t]) for q, t in pairs.items())
    return distance, sum(1 - iou_and_giou(boxes[q], targets[t])[1] for q, t in pairs.items())
