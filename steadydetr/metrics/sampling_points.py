"""Where the deformable attention of a query samples the image (OD-DETR Fig. 7).

Legend: n sampling points of one query, over all heads, levels and points.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steadydetr.boxes import iou_giou, to_xyxy
from steadydetr.detectors import Detector
from steadydetr.detectors.deformable import DeformableDetector
from steadydetr.learning.criterion import Criterion
from steadydetr.learning.matching import solve
from steadydetr.structures import Batch, Group


@dataclass(frozen=True)
class SamplingPoints:
    """What one query samples in the last decoder stage, and what it predicts. Places are in 0..1 of the image."""

    points: Tensor  # [n, 2] x, y
    weights: Tensor  # [n] attention weights; those of a head sum to 1
    reference: Tensor  # [2] the point that the offsets start from
    box_xyxy: Tensor  # [4] predicted box
    score: float  # of the target's class
    iou: float  # of the predicted box with the target


@torch.no_grad()
def sampling_points_of(detector: Detector, criterion: Criterion, batch: Batch, target: int) -> SamplingPoints | None:
    """The sampling points of the query that is matched to an object of a batch of one image.

    Returns:
        None where the object is matched to no query, because the image has more objects than the detector has queries.

    Raises:
        ValueError: a detector without deformable attention, or an image without such an object.
    """
    if not isinstance(detector, DeformableDetector):
        raise ValueError(f"{type(detector).__name__} has no deformable attention, so no sampling points to draw")
    if not 0 <= target < len(batch.targets.labels):
        raise ValueError(f"the image has {len(batch.targets.labels)} objects; there is no number {target}")
    training = detector.training
    detector.eval()
    memory = detector.encode(batch.images, batch.padding)
    queries = detector.queries(memory)["main"]
    with _recorded_sampling(detector) as calls:
        stages = detector.decode(memory, [Group("main", queries)])["main"][-1:]
    detector.train(training)
    match = solve([criterion.problem(stages, batch.targets, "main")])[0].match
    matched = match.query[match.target == target].tolist()
    if not matched:
        return None
    query = matched[0]
    locations, weights = calls[-1]
    # locations are fractions of the padded map; the image fills its upper left part
    points = locations[0, query] / memory.valid_ratios[0][:, None].to(locations)
    logits, boxes = stages.flat
    box = to_xyxy(boxes[0, query])
    assert stages.reference is not None
    return SamplingPoints(
        points.reshape(-1, 2),
        weights[0, query].flatten(),
        stages.reference[0, 0, query, :2],
        box,
        float(logits[0, query, batch.targets.labels[target]].sigmoid()),
        float(iou_giou(box, to_xyxy(batch.targets.boxes[target]))[0]),
    )


@contextmanager
def _recorded_sampling(detector: DeformableDetector) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Locations and weights of the sampling points in every call of the decoder's cross-attention, in order."""
    calls: list[tuple[Tensor, Tensor]] = []

    def record(attention: Any, arguments: tuple[Any, ...]) -> None:
        query, reference, sized, _, levels = arguments
        calls.append(attention.sampling_points(query, reference, sized, levels))

    hooks = [layer.cross_attention.register_forward_pre_hook(record) for layer in detector.decoder.layers]  # type: ignore[union-attr]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
