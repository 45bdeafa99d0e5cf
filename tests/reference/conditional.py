"""Conditional cross-attention with loops, head by head, query by query, token by token."""

from __future__ import annotations

import math
from collections.abc import Sequence

Vector = Sequence[float]


def cross_attention(
    content: Sequence[Vector],
    sine: Sequence[Vector],
    key_content: Sequence[Vector],
    key_position: Sequence[Vector],
    value: Sequence[Vector],
    padding: Sequence[bool],
    heads: int,
) -> list[list[float]]:
    """What every query gets, before the last projection. All vectors are projected; the weight of a token is softmax of Eq. 3."""
    size = len(value[0]) // heads
    mixed = []
    for query, place in zip(content, sine, strict=True):
        row: list[float] = []
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            scores = [
                (dot(query[part], token[part]) + dot(place[part], where[part])) / math.sqrt(2 * size)
                for token, where in zip(key_content, key_position, strict=True)
            ]
            shares = [0.0 if empty else math.exp(score) for score, empty in zip(scores, padding, strict=True)]
            row += [sum(s * v[part][i] for s, v in zip(shares, value, strict=True)) / sum(shares) for i in range(size)]
        mixed.append(row)
    return mixed


def dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))
