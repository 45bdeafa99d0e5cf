"""Slow, obvious counterparts of the equations of masks: one cell, one point, one pair at a time, plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

Numbers = Sequence[float]
Map = Sequence[Numbers]


def value_at(cells: Map, point: Numbers) -> float:
    """Between the centres of cells interpolated; cells outside count as 0."""
    height, width = len(cells), len(cells[0])
    x, y = point[0] * width - 0.5, point[1] * height - 0.5
    found = 0.0
    for row in range(height):
        for column in range(width):
            found += cells[row][column] * max(0.0, 1 - abs(x - column)) * max(0.0, 1 - abs(y - row))
    return found


def losses(logits: Numbers, labels: Numbers) -> tuple[float, float]:
    """Cross-entropy and dice of one mask at its points."""
    scores = [1 / (1 + math.exp(-x)) for x in logits]
    pairs = list(zip(scores, labels, strict=True))
    cross_entropy = sum(-t * math.log(p) - (1 - t) * math.log(1 - p) for p, t in pairs) / len(pairs)
    return cross_entropy, 1 - (2 * sum(p * t for p, t in pairs) + 1) / (sum(scores) + sum(labels) + 1)


def box(cells: Map, closed: bool) -> list[int]:
    taken = [(x, y) for y, row in enumerate(cells) for x, cell in enumerate(row) if cell]
    if not taken:
        return [len(cells[0]), len(cells), len(cells[0]), len(cells)] if closed else [0, 0, 0, 0]
    xs, ys = zip(*taken, strict=True)
    end = 0 if closed else 1
    return [min(xs), min(ys), max(xs) + end, max(ys) + end]
