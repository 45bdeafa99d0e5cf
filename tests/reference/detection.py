"""Slow, obvious twins of the detection equations: one query, one class, one target at a time."""

from __future__ import annotations

import itertools
import math

from torch import Tensor


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def bce(p: float, t: float) -> float:
    return -(t * math.log(p) + (1 - t) * math.log(1 - p))


def classification(logit: float, target: float, positive: bool, alpha: float | None, gamma: float) -> float:
    p = sigmoid(logit)
    weight = 1.0 if alpha is None else alpha if positive else 1 - alpha
    return weight * abs(target - p) ** gamma * bce(p, target)


def iou_and_giou(a: list[float], b: list[float]) -> tuple[float, float]:
    """Of cxcywh boxes."""
    ax0, ay0, ax1, ay1 = a[0] - a[2] / 2, a[1] - a[3] / 2, a[0] + a[2] / 2, a[1] + a[3] / 2
    bx0, by0, bx1, by1 = b[0] - b[2] / 2, b[1] - b[3] / 2, b[0] + b[2] / 2, b[1] + b[3] / 2
    width, height = max(0.0, min(ax1, bx1) - max(ax0, bx0)), max(0.0, min(ay1, by1) - max(ay0, by0))
    union = a[2] * a[3] + b[2] * b[3] - width * height
    hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
    iou = width * height / union
    return iou, iou - (hull - union) / hull


def matching_cost(logit: float, box: list[float], target: list[float]) -> float:
    """2 focal + 5 L1 - 2 GIoU of Deformable DETR's matcher."""
    p = sigmoid(logit)
    focal = 0.25 * (1 - p) ** 2 * -math.log(p + 1e-8) - 0.75 * p**2 * -math.log(1 - p + 1e-8)
    l1 = sum(abs(x - y) for x, y in zip(box, target, strict=True))
    return 2 * focal + 5 * l1 - 2 * iou_and_giou(box, target)[1]


def best_assignment(cost: list[list[float]]) -> tuple[float, tuple[int, ...]]:
    """Every permutation tried: cost[target][query] -> the least total and the query of every target."""
    targets, queries = len(cost), len(cost[0])
    return min((sum(cost[t][q] for t, q in enumerate(chosen)), chosen) for chosen in itertools.permutations(range(queries), targets))


def detection_loss(
    logits: Tensor, boxes: Tensor, labels: list[int], targets: list[list[float]], pairs: dict[int, int], normaliser: float
) -> tuple[float, float, float]:
    """Focal, L1 and GIoU of one image and stage; `pairs` maps a query to its target."""
    label = l1 = giou = 0.0
    for q in range(logits.shape[0]):
        for c in range(logits.shape[1]):
            positive = q in pairs and labels[pairs[q]] == c
            label += classification(float(logits[q, c]), float(positive), positive, 0.25, 2.0)
        if q in pairs:
            box, target = boxes[q].tolist(), targets[pairs[q]]
            l1 += sum(abs(x - y) for x, y in zip(box, target, strict=True))
            giou += 1 - iou_and_giou(box, target)[1]
    return label / normaliser, l1 / normaliser, giou / normaliser
