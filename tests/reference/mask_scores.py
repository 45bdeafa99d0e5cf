"""Masks of detections, pixel by pixel."""

from __future__ import annotations

import math

Pixels = list[list[float]]


def quality(logits: Pixels) -> float:
    """The mean probability of the pixels whose logit is above 0."""
    inside = [value for row in logits for value in row if value > 0]
    return sum(1 / (1 + math.exp(-value)) for value in inside) / (len(inside) + 1e-6)


def resized(image: Pixels, height: int, width: int) -> Pixels:
    """Bilinear, where pixels are squares whose centres are compared: no corners are aligned."""
    rows, columns = len(image), len(image[0])

    def place(k: int, length: int, whole: int) -> tuple[int, int, float]:
        at = max((k + 0.5) * length / whole - 0.5, 0)
        return int(at), min(int(at) + 1, length - 1), at - int(at)

    found = []
    for y in range(height):
        y0, y1, down = place(y, rows, height)
        line = []
        for x in range(width):
            x0, x1, right = place(x, columns, width)
            upper = image[y0][x0] * (1 - right) + image[y0][x1] * right
            lower = image[y1][x0] * (1 - right) + image[y1][x1] * right
            line.append(upper * (1 - down) + lower * down)
        found.append(line)
    return found


def original(logits: Pixels, padded: tuple[int, int], seen: tuple[int, int], size: tuple[int, int]) -> Pixels:
    """A mask over a padded image, enlarged to it, cut to what the image is of it, and resized to what the image was."""
    whole = resized(logits, *padded)
    return resized([row[: seen[1]] for row in whole[: seen[0]]], *size)
