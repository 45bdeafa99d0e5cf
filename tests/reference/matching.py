"""Slow, obvious counterparts of the matcher: one query against one target, every assignment tried."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from tests.reference.boxes import Box, iou_and_giou, l1
from tests.reference.detection import sigmoid


def focal_cost(logit: float) -> float:
    p = sigmoid(logit)
    return 0.25 * (1 - p) ** 2 * -math.log(p + 1e-8) - 0.75 * p**2 * -math.log(1 - p + 1e-8)


def matching_cost(logit: float, box: Box, target: Box) -> float:
    """2 focal + 5 L1 - 2 GIoU of Deformable DETR's matcher."""
    return 2 * focal_cost(logit) + 5 * l1(box, target) - 2 * iou_and_giou(box, target)[1]


def best_assignment(cost: Sequence[Sequence[float]]) -> tuple[int, ...]:
    """cost[target][query], no more targets than queries -> the query of every target, by trying all."""
    queries = range(len(cost[0])) if cost else range(0)
    return min(
        itertools.permutations(queries, len(cost)),
        key=lambda chosen: sum(cost[t][q] for t, q in enumerate(chosen)),
    )
