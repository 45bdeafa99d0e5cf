"""Slow, obvious counterparts of AdaMixer's equations: one box, one place, one head at a time, plain numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

Numbers = Sequence[float]


def xyzr(box: Numbers, image: Numbers) -> list[float]:
    """Of a normalised cxcywh box in an image of so many pixels (w, h)."""
    x, y, w, h = box[0] * image[0], box[1] * image[1], box[2] * image[0], box[3] * image[1]
    return [x, y, math.log2(math.sqrt(w * h)), math.log2(h / w)]


def box(xyzr: Numbers, image: Numbers) -> list[float]:
    """The inverse."""
    x, y, z, r = xyzr
    side, ratio = 2**z, math.sqrt(2**r)
    return [x / image[0], y / image[1], side / ratio / image[0], side * ratio / image[1]]


def refined(xyzr: Numbers, delta: Numbers) -> list[float]:
    side = 2 ** xyzr[2]
    return [xyzr[0] + delta[0] * side, xyzr[1] + delta[1] * side, xyzr[2] + delta[2], xyzr[3] + delta[3]]


def iof(own: Numbers, other: Numbers) -> float:
    """Corners in pixels."""
    width = max(0.0, min(own[2], other[2]) - max(own[0], other[0]))
    height = max(0.0, min(own[3], other[3]) - max(own[1], other[1]))
    return width * height / ((own[2] - own[0]) * (own[3] - own[1]))


def bias(own: Numbers, other: Numbers, tau: float) -> float:
    return tau * math.log(iof(own, other) + 1e-7)


def position(xyzr: Numbers, width: int) -> list[float]:
    found, features = [], width // 4
    for value, scale in zip(xyzr, (1000, 1000, 1, 1), strict=True):
        for pair in range(features // 2):
            angle = value / scale / 10000 ** (2 * pair / features)
            found += [math.sin(angle), math.cos(angle)]
    return found


def place(xyzr: Numbers, offset: Numbers) -> list[float]:
    w, h = box(xyzr, (1, 1))[2:]
    return [xyzr[0] + offset[0] * w, xyzr[1] + offset[1] * h, xyzr[2] + offset[2]]


def levels(z: float, strides: Sequence[int]) -> list[float]:
    weights = [math.exp(-((z - math.log2(stride)) ** 2) / 2) for stride in strides]
    return [weight / sum(weights) for weight in weights]


def mixed(sampled: Sequence[Numbers], channels: Sequence[Numbers], points: Sequence[Numbers]) -> list[list[float]]:
    """[P][C], [C][C] and [P'][P] -> [P'][C]."""
    by_channel = normed([[sum(row[k] * channels[k][c] for k in range(len(row))) for c in range(len(row))] for row in sampled])
    return normed(
        [[sum(weights[p] * by_channel[p][c] for p in range(len(by_channel))) for c in range(len(by_channel[0]))] for weights in points]
    )


def normed(rows: Sequence[Numbers]) -> list[list[float]]:
    """LayerNorm over all numbers together, then ReLU."""
    flat = [value for row in rows for value in row]
    mean = sum(flat) / len(flat)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in flat) / len(flat) + 1e-5)
    return [[max(0.0, (value - mean) / deviation) for value in row] for row in rows]
