"""Slow, obvious counterparts of stable matching (Stable-DINO): one pair, one image, one layer at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from tests.reference.boxes import Box, iou_and_giou


def warped(s: float, warp: str) -> float:
    return {
        "identity": s,
        "exponential": math.exp(s),
        "unit_exponential": (math.exp(s) - 1) / (math.e - 1),
        "half_sine": math.sin(s * math.pi / 2),
    }[warp]


def position_targets(
    boxes: Sequence[Box],
    targets: Sequence[Box],
    pairs: Mapping[int, int],
    scores: Mapping[int, float],
    exponent: float = 2.0,
    score_exponent: float = 0.0,
    warp: str = "identity",
    rescale: str = "max",
) -> dict[int, float]:
    """Eq. 3, of one image and stage: pairs of a query and its target, the query's score of that class -> what the query learns."""
    iou = {q: iou_and_giou(boxes[q], targets[t])[0] for q, t in pairs.items()}
    value = {q: warped(scores[q] ** score_exponent * s**exponent, warp) for q, s in iou.items()}
    if rescale == "none":
        return value
    value = {q: v if iou[q] > 0 else 0.0 for q, v in value.items()}
    top = 1.0 if rescale == "one" else max((iou_and_giou(a, b)[0] for a in boxes for b in targets), default=0.0)
    return stretched(value, top)


def stretched(value: Mapping[int, float], top: float) -> dict[int, float]:
    """So that the largest is `top`; only what is above 1 may shrink."""
    largest = max(value.values(), default=0.0)
    if largest == 0 or (top < largest <= 1):
        return dict(value)
    return {q: v * top / largest for q, v in value.items()}


def modulated_cost(score: float, factor: float, alpha: float | None = 0.25, gamma: float = 2.0) -> float:
    """Eq. 4 of one pair, from the score of the target's class and f2."""
    m = score * factor
    positive, negative = (1 - m) ** gamma * -math.log(m + 1e-8), m**gamma * -math.log(1 - m + 1e-8)
    return positive - negative if alpha is None else alpha * positive - (1 - alpha) * negative


def modulations(boxes: Sequence[Box], targets: Sequence[Box], exponent: float, rescale: bool) -> list[list[float]]:
    """f2 [target][query] of one image and stage; rescaled, the best is 1 (but for an epsilon, which a hopeless image shows)."""
    table = [[((iou_and_giou(box, target)[1] + 1) / 2) ** exponent for box in boxes] for target in targets]
    best = max((value for row in table for value in row), default=1.0)
    return [[value * max(1 / (best + 1e-8), 1) for value in row] for row in table] if rescale else table


def released_modulations(
    boxes: Sequence[Box], targets: Sequence[Box], labels: Sequence[int], classes: int, exponent: float, eps: float = 1e-6
) -> list[list[float]]:
    """f2 [query][class] of one image as the released matcher has it: `targets` are those of the whole batch, put where their class is.

    A target overwrites what an earlier one of its class has written. The best entry of the image, whosever target it is, becomes 1.
    """
    table = [[0.0] * classes for _ in boxes]
    for row, box in zip(table, boxes, strict=True):
        for target, label in zip(targets, labels, strict=True):
            row[label] = (iou_and_giou(box, target, eps)[1] + 1) / 2
    best = max((value for row in table for value in row), default=0.0)
    return [[(value * max(1 / (best + 1e-8), 1)) ** exponent for value in row] for row in table]


def wiring(kind: str, depth: int) -> list[tuple[str, ...]]:
    """What goes into every layer and every fusion, in the order of the forward pass.

    x is the input, 3 what layer 3 gives, f1 what the first fusion gives.
    """
    steps: list[tuple[str, ...]] = []
    current, fused = "x", 0
    for layer in range(1, depth + 1):
        steps.append((current,))
        current, partner = str(layer), depth - layer
        if kind == "u_like" and partner < layer:
            steps.append((current, str(partner) if partner else "x"))
            current, fused = f"f{fused + 1}", fused + 1
    if kind == "simple":
        steps.append((current, "x"))
    if kind == "dense":
        steps.append(("x", *(str(layer) for layer in range(1, depth + 1))))
    return steps
