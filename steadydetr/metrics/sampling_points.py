"""Where the deformable attention of a query samples the image (OD-DETR Fig. 7).

Legend: n sampling points of one query, over all heads, levels and points.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steadydetr.boxes import iou_giou, to_xyxy
from steadydetr.detectors import Detector
from steadydetr.learning.criterion import Criterion
from steadydetr.learning.predictions import match_batch
from steadydetr.structures import Batch


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
    if not 0 <= target < len(batch.targets.labels):
        raise ValueError(f"the image has {len(batch.targets.labels)} objects; there is no number {target}")
    with detector.record_sampling_points() as calls:
        found = match_batch(detector, criterion, batch)
    query = int(found.matched_queries.query[-1, target])
    if query < 0:
        return None
    locations, weights = calls[-1]
    # locations are fractions of the padded map; the image fills its upper left part
    points = locations[0, query] / found.memory.valid_ratios[0][:, None].to(locations)
    stages = found.stages[-1:]
    logits, boxes = stages.flat
    box = to_xyxy(boxes[0, query])
    return SamplingPoints(
        points.reshape(-1, 2),
        weights[0, query].flatten(),
        stages.reference[0, 0, query, :2],
        box,
        float(logits[0, query, batch.targets.labels[target]].sigmoid()),
        float(iou_giou(box, to_xyxy(batch.targets.boxes[target]))[0]),
    )
