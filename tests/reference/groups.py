"""Slow, obvious counterparts of hybrid matching and of groups: one stage of one image at a time, every object written out."""

from __future__ import annotations

from collections.abc import Sequence

from tests.reference.boxes import Box
from tests.reference.detection import box_losses, class_loss
from tests.reference.matching import best_assignment, matching_cost


def repeated_losses(
    logits: Sequence[Sequence[float]], boxes: Sequence[Box], labels: Sequence[int], targets: Sequence[Box], repeats: int
) -> tuple[float, float, float]:
    """Class, L1 and GIoU sums of one image and stage, where every object stands `repeats` times in the list of targets."""
    labels, targets = list(labels) * repeats, list(targets) * repeats
    cost = [
        [matching_cost(row[label], box, target) for row, box in zip(logits, boxes, strict=True)]
        for label, target in zip(labels, targets, strict=True)
    ]
    query = best_assignment(cost) if cost else ()
    positives = {(q, labels[t]): 1.0 for t, q in enumerate(query)}
    l1, giou = box_losses(boxes, targets, {q: t for t, q in enumerate(query)})
    return class_loss(logits, positives), l1, giou
