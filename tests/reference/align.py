"""Slow, obvious counterparts of Align-DETR: one image and stage, one pair at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from steadydetr.objectives.matching_distillation import JoinedMatches
from tests.reference.boxes import Box, iou_and_giou, l1
from tests.reference.detection import cross_entropy, sigmoid

Pair = tuple[int, int]  # a query and its target, or class
Learned = tuple[int, float, float]  # the target, the weight of the loss, the share of the target


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


def join(
    own: Sequence[Sequence[int]],
    taught: Sequence[int],
    labels: Sequence[int],
    cost: Sequence[Sequence[float]],
    iou: Sequence[Sequence[float]],
    share: Mapping[Pair, float],
    options: JoinedMatches,
) -> tuple[dict[Pair, Learned], dict[int, Learned]]:
    """Eq. 3 and 4 of OD-DETR where a target has several queries of its own: what each (query, class) and each query's box learns.

    `taught` is the teacher's query of every target (-1: none), cost and IoU are by [target][query]. The costliest of all queries of a
    target has the other weight; what the teacher's match holds learns all of its target, other queries their share.
    """
    classes: dict[Pair, Learned] = {}
    boxes: dict[int, Learned] = {}
    accepted = [
        options.classes == "union" or (options.classes == "conditional" and q >= 0 and iou[t][q] > 0.5) for t, q in enumerate(taught)
    ]
    for q in range(len(cost[0]) if cost else 0):
        mine = next((t for t, queries in enumerate(own) if q in queries), None)
        if mine is not None:
            other = taught[mine]
            added = other >= 0 and other not in own[mine]
            costliest = added and all(cost[mine][q] >= cost[mine][o] for o in own[mine]) and cost[mine][q] > cost[mine][other]
            idle = added and not any(other in queries for queries in own)
            weight = options.class_weight if costliest and accepted[mine] else 1.0
            classes[q, labels[mine]] = mine, weight, 1.0 if other == q and accepted[mine] else share[q, mine]
            weight = options.box_weight if costliest and idle and options.boxes else 1.0
            boxes[q] = mine, weight, 1.0 if other == q and options.boxes else share[q, mine]
        for theirs, query in enumerate(taught):
            if query != q or theirs == mine:
                continue
            costlier = len(own[theirs]) > 0 and all(cost[theirs][q] >= cost[theirs][o] for o in own[theirs])
            if accepted[theirs]:
                classes.setdefault((q, labels[theirs]), (theirs, options.class_weight if costlier else 1.0, 1.0))
            if mine is None and options.boxes:
                boxes[q] = theirs, options.box_weight if costlier else 1.0, 1.0
    return classes, boxes


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
