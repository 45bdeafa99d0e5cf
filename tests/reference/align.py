"""Slow, obvious counterparts of Align-DETR: one image and stage, one pair at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from tests.reference.boxes import Box, iou_and_giou, l1
from tests.reference.detection import cross_entropy, sigmoid

Pair = tuple[int, int]  # a query and its target


def queries_of_a_target(queries: int, targets: int, most: int) -> int:
    """The largest number, up to `most`, with which all targets together take no more than half of the queries; else 1."""
    return max([k for k in range(1, most + 1) if 2 * k * targets <= queries], default=1)


def best_pairs(cost: Sequence[Sequence[float]], most: int) -> list[Pair]:
    """cost[target][query] -> the cheapest choice of so many queries a target, no query twice, by trying all; by target, then query."""
    if not cost:
        return []
    queries, k = range(len(cost[0])), queries_of_a_target(len(cost[0]), len(cost), most)

    def choices(target: int, free: frozenset[int]) -> list[tuple[float, list[Pair]]]:
        if target == len(cost):
            return [(0.0, [])]
        found = []
        for chosen in itertools.combinations(sorted(free), k):
            own = sum(cost[target][q] for q in chosen)
            found += [(own + rest, [(q, target) for q in chosen] + pairs) for rest, pairs in choices(target + 1, free - set(chosen))]
        return found

    return min(choices(0, frozenset(queries)))[1]


def quality(score: float, iou: float, alpha: float = 0.25, least: float = 0.01) -> float:
    return max(score**alpha * iou ** (1 - alpha), least)


def shares(values: Mapping[Pair, float], tau: float) -> dict[Pair, float]:
    """exp(-rank / tau): the rank is the number of pairs of the same target that are better, or equal and earlier."""
    order = list(values)

    def rank(pair: Pair) -> int:
        others = [other for other in order if other[1] == pair[1]]
        return sum(values[o] > values[pair] or (values[o] == values[pair] and order.index(o) < order.index(pair)) for o in others)

    return {pair: math.exp(-rank(pair) / tau) for pair in order}


def losses(
    logits: Sequence[Sequence[float]],
    boxes: Sequence[Box],
    targets: Sequence[Box],
    labels: Sequence[int],
    pairs: Sequence[Pair],
    tau: float,
    gamma: float = 2.0,
) -> tuple[float, float, float]:
    """IoU-aware BCE, L1 and 1 - GIoU: positives learn t * share by BCE, all other scores p learn 0 by p^gamma BCE."""
    t = {(q, g): quality(sigmoid(logits[q][labels[g]]), iou_and_giou(boxes[q], targets[g])[0]) for q, g in pairs}
    share = shares(t, tau)
    learned = {(q, labels[g]): t[q, g] * share[q, g] for q, g in pairs}
    label = 0.0
    for q, row in enumerate(logits):
        for c, x in enumerate(row):
            p = sigmoid(x)
            label += cross_entropy(p, learned[q, c]) if (q, c) in learned else p**gamma * cross_entropy(p, 0.0)
    distance = sum(share[q, g] * l1(boxes[q], targets[g]) for q, g in pairs)
    return label, distance, sum(share[q, g] * (1 - iou_and_giou(boxes[q], targets[g])[1]) for q, g in pairs)
