"""Slow, obvious counterparts of the box functions: one pair at a time, plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

Box = Sequence[float]  # centre x, centre y, width, height


def corners(box: Box) -> tuple[float, float, float, float]:
    x, y, w, h = box
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


def iou_and_giou(a: Box, b: Box, eps: float = 0.0) -> tuple[float, float]:
    ax0, ay0, ax1, ay1 = corners(a)
    bx0, by0, bx1, by1 = corners(b)
    width, height = max(0.0, min(ax1, bx1) - max(ax0, bx0)), max(0.0, min(ay1, by1) - max(ay0, by0))
    union = a[2] * a[3] + b[2] * b[3] - width * height
    hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
    iou = width * height / (union + eps)
    return iou, iou - (hull - union) / (hull + eps)


def l1(a: Box, b: Box) -> float:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True))


def inverse_sigmoid(x: float, eps: float) -> float:
    x = min(max(x, 0.0), 1.0)
    return math.log(max(x, eps) / max(1 - x, eps))
