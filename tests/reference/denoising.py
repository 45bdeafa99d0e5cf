"""Slow, obvious counterpart of DINO's denoising queries: one copy of one object at a time."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from steadydetr.objectives.denoising import Draws
from tests.reference.boxes import Box, corners


@dataclass(frozen=True)
class Row:
    label: int
    box: Box
    target: int | None  # the object that a positive finds back to; None: background


def denoising_rows(
    counts: tuple[int, ...], labels: Tensor, boxes: Tensor, draws: Draws, label_noise: float, box_noise: float, most: int
) -> dict[tuple[int, int], Row]:
    """(image, row) -> what stands there; rows that are missing are padding. A group is `most` positives, then `most` negatives."""
    rows = {}
    for copy in range(len(draws.part)):
        negative = copy % 2 == 1
        thing = 0
        for image, count in enumerate(counts):
            for k in range(count):
                label = int(draws.new_label[copy, thing] if draws.keep_label[copy, thing] < label_noise / 2 else labels[thing])
                box = moved(boxes[thing].tolist(), draws.sign[copy, thing].tolist(), draws.part[copy, thing].tolist(), negative, box_noise)
                rows[image, copy * most + k] = Row(label, box, None if negative else thing)
                thing += 1
    return rows


def moved(box: Box, sign: list[float], part: list[float], negative: bool, scale: float) -> Box:
    half = (box[2] / 2, box[3] / 2)
    x0, y0, x1, y1 = (
        min(max(corner + s * (p + negative) * half[axis % 2] * scale, 0.0), 1.0)
        for axis, (corner, s, p) in enumerate(zip(corners(box), sign, part, strict=True))
    )
    return (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0


def dn_denoising_rows(
    counts: tuple[int, ...], labels: Tensor, boxes: Tensor, draws: Draws, label_noise: float, box_noise: float, most: int
) -> dict[tuple[int, int], Row]:
    """The same of DN-DETR, whose groups are `most` positives each."""
    rows = {}
    for group in range(len(draws.part)):
        thing = 0
        for image, count in enumerate(counts):
            for k in range(count):
                label = int(draws.new_label[group, thing] if draws.keep_label[group, thing] < label_noise else labels[thing])
                box = centre_and_sides_moved(
                    boxes[thing].tolist(), draws.sign[group, thing].tolist(), draws.part[group, thing].tolist(), box_noise
                )
                rows[image, group * most + k] = Row(label, box, thing)
                thing += 1
    return rows


def centre_and_sides_moved(box: Box, sign: list[float], part: list[float], scale: float) -> Box:
    x, y, w, h = (
        box[0] + sign[0] * part[0] * box[2] / 2 * scale,
        box[1] + sign[1] * part[1] * box[3] / 2 * scale,
        box[2] + sign[2] * part[2] * box[2] * scale,
        box[3] + sign[3] * part[3] * box[3] * scale,
    )
    return tuple(min(max(side, 0.0), 1.0) for side in (x, y, w, h))  # type: ignore[return-value]
