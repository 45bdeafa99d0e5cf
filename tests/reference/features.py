"""Slow, obvious counterparts of feature distillation: one query, one token, one channel, one box at a time.

A level of one image is a list of its valid tokens, a token a list of channels; a query is a list of channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tests.reference.boxes import Box, corners, iou_and_giou

Vector = Sequence[float]
Tokens = Sequence[Vector]


def dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def unit(a: Vector) -> Vector:
    length = math.sqrt(dot(a, a))
    return [x / length for x in a]


def quality(score: float, iou: float, gamma: float = 0.5) -> float:
    return score**gamma * iou ** (1 - gamma)


def squared_distance(a: Vector, b: Vector) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def target_aware(teacher: Tokens, student: Tokens, queries: Tokens, weights: Vector, cosine: bool = False) -> float:
    """DETRDistill Eq. 8 of one image and level; `student` is phi(F_S) already."""
    total = 0.0
    for query, weight in zip(queries, weights, strict=True):
        for f, s in zip(teacher, student, strict=True):
            psi = dot(unit(f), unit(query)) if cosine else dot(f, query)
            total += weight * psi**2 * squared_distance(f, s)
    return total / (len(queries) * len(teacher[0]) * len(teacher))


def mean_mask(teacher: Tokens, student: Tokens, queries: Tokens) -> float:
    """Eq. 5 with the mask of Eq. 6."""
    total = 0.0
    for f, s in zip(teacher, student, strict=True):
        psi = sum(dot(f, query) for query in queries) / len(queries)
        total += psi**2 * squared_distance(f, s)
    return total / (len(teacher[0]) * len(teacher))


def fitnet(teacher: Tokens, student: Tokens) -> float:
    """Eq. 5 with a mask of ones."""
    return sum(squared_distance(f, s) for f, s in zip(teacher, student, strict=True)) / (len(teacher[0]) * len(teacher))


def softmax(values: Vector, temperature: float) -> Vector:
    powers = [math.exp((v - max(values)) / temperature) for v in values]
    return [p / sum(powers) for p in powers]


def spatial(tokens: Tokens) -> Vector:
    return [sum(abs(x) for x in token) / len(token) for token in tokens]


def channels(tokens: Tokens) -> Vector:
    return [sum(abs(token[c]) for token in tokens) / len(tokens) for c in range(len(tokens[0]))]


def foreground(boxes: Sequence[Box], size: tuple[int, int]) -> Vector:
    """FGD's mask, row by row; boxes are (x0, y0, x1, y1) in cells."""
    values = [0.0] * (size[0] * size[1])
    for x0, y0, x1, y1 in boxes:
        left, top, right, bottom = math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1)
        for y in range(size[0]):
            for x in range(size[1]):
                if left <= x <= right and top <= y <= bottom:
                    share = 1 / ((bottom + 1 - top) * (right + 1 - left))
                    values[y * size[1] + x] = max(values[y * size[1] + x], share)
    return values


def fgd(student: Tokens, teacher: Tokens, mask: Vector, temperature: float) -> tuple[float, float, float]:
    """Foreground, background and attention terms of one image whose tokens are all valid."""
    count, width = len(teacher), len(teacher[0])
    of_t, of_s = (softmax(spatial(tokens), temperature) for tokens in (teacher, student))
    ch_t, ch_s = (softmax(channels(tokens), temperature) for tokens in (teacher, student))
    free = sum(m == 0 for m in mask) or 1
    fore = back = 0.0
    for i in range(count):
        for c in range(width):
            value = count * of_t[i] * width * ch_t[c] * (teacher[i][c] - student[i][c]) ** 2
            fore += mask[i] * value
            back += (mask[i] == 0) / free * value
    attention = sum(abs(a - b) for a, b in zip(of_s, of_t, strict=True)) * count
    attention += sum(abs(a - b) for a, b in zip(ch_s, ch_t, strict=True)) * width
    return fore, back, attention


def fkd(student: Tokens, teacher: Tokens, temperature: float) -> tuple[float, float]:
    """Masked feature difference and attention transfer of one image whose tokens are all valid."""
    sp_s, sp_t, ch_s, ch_t = spatial(student), spatial(teacher), channels(student), channels(teacher)
    places = softmax([a + b for a, b in zip(sp_s, sp_t, strict=True)], temperature)
    kinds = softmax([a + b for a, b in zip(ch_s, ch_t, strict=True)], temperature)
    masked = 0.0
    for i in range(len(teacher)):
        for c in range(len(teacher[0])):
            masked += len(places) * places[i] * len(kinds) * kinds[c] * (teacher[i][c] - student[i][c]) ** 2
    return math.sqrt(masked), math.sqrt(squared_distance(sp_s, sp_t)) + math.sqrt(squared_distance(ch_s, ch_t))


def imitated(boxes: Sequence[Box], anchors: Sequence[Box], threshold: float = 0.5) -> list[bool]:
    """FGFI's region, by cell, each with one anchor."""
    near = [False] * len(anchors)
    for box in boxes:
        overlaps = [iou_and_giou(box, anchor)[0] for anchor in anchors]
        for i, overlap in enumerate(overlaps):
            near[i] = near[i] or overlap > threshold * max(overlaps)
    return near


def in_cells(box: Box, width: float, height: float) -> Box:
    x0, y0, x1, y1 = corners(box)
    return x0 * width, y0 * height, x1 * width, y1 * height
