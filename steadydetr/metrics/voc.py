"""Pascal VOC's AP at IoU 0.5, in the definition of 2007 and in that of 2010 on."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from steadydetr.data.columns import find_ids
from steadydetr.data.index import AnnotationIndex
from steadydetr.metrics.base import Measurer, Metric, Values
from steadydetr.metrics.results import Results

VOC_METRICS = (
    Metric("voc_ap50", "VOC AP50", "VOC AP50", in_summary=True, required=True),  # area under the precision envelope (VOC 2010 on)
    Metric("voc07_ap50", "VOC07 AP50", "VOC07 AP50", in_summary=True, required=True),  # mean over 11 recalls (VOC 2007)
)


def measure_voc(results: Results, index: AnnotationIndex) -> Values:
    """AP50 in percent in both definitions, -1 where the data has no object, and of federated data, for which VOC has no rule."""
    if index.federated is not None:
        return dict.fromkeys((metric.name for metric in VOC_METRICS), -1.0)
    all_point, eleven_point = voc_ap50(results, index)
    return {"voc_ap50": all_point, "voc07_ap50": eleven_point}


MEASURER = Measurer(measure_voc, VOC_METRICS)


def voc_ap50(results: Results, index: AnnotationIndex) -> tuple[float, float]:
    """Pascal VOC's AP at IoU 0.5 in percent, all-point and 11-point, mean over the classes that have an object.

    A detection of a difficult object is neither true nor false; a second detection of an object is false (VOC 2007 development kit).
    """
    images = find_ids(index.image_ids, results.image_ids)
    averages = [_voc_class(results, images, index, label) for label in range(len(index.classes))]
    present = [average for average in averages if average is not None]
    if not present:
        return -1.0, -1.0
    all_point, eleven = np.mean(present, axis=0) * 100
    return float(all_point), float(eleven)


def _voc_class(results: Results, images: NDArray[np.int64], index: AnnotationIndex, label: int) -> tuple[float, float] | None:
    """All-point and 11-point AP of one class between 0 and 1; None where it has no object that counts.

    Args:
        images: [K] position in the index of the image of every detection.
    """
    truth = np.flatnonzero((index.labels == label) & ~index.crowd)
    objects = int((~index.difficult[truth]).sum())
    if not objects:
        return None
    rows_of: dict[int, NDArray[np.int64]] = {}
    image_of_truth = index.image_of_row[truth]
    for image in np.unique(image_of_truth).tolist():
        rows_of[image] = truth[image_of_truth == image]
    chosen = np.flatnonzero(results.labels == label)
    chosen = chosen[np.lexsort((images[chosen], -results.scores[chosen]))]  # equal scores by image, in whatever order these were loaded
    found: set[int] = set()
    hits: list[int] = []  # 1 true, 0 false, -1 does not count
    for row in chosen:
        rows = rows_of.get(int(images[row]))
        hits.append(0 if rows is None else _voc_hit(results.boxes_xyxy[row], index, rows, found))
    counted = np.array([hit for hit in hits if hit >= 0], dtype=np.float64)
    true = counted.cumsum()
    recall, precision = true / objects, true / np.arange(1, len(counted) + 1)
    return _all_point(recall, precision), _eleven_point(recall, precision)


def _voc_hit(box: NDArray[np.float32], index: AnnotationIndex, rows: NDArray[np.int64], found: set[int]) -> int:
    """1 for the first detection of an object, 0 for a false one, -1 for one that does not count; `found` gets the object's row."""
    overlap = voc_iou(box, index.boxes_xyxy[rows])
    best = int(overlap.argmax())
    row = int(rows[best])
    if overlap[best] < 0.5:
        return 0
    if index.difficult[row]:
        return -1
    if row in found:
        return 0
    found.add(row)
    return 1


def voc_iou(box: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float64]:
    """[4], [n, 4] -> [n].

    VOC counts the last pixel of a box as part of it; the index already holds the box's outer edges, so this is the same number.
    """
    sides = np.minimum(box[2:], others[:, 2:]).astype(np.float64) - np.maximum(box[:2], others[:, :2])
    overlap = sides.clip(min=0).prod(1)
    union = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1) - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)


def _all_point(recall: NDArray[np.float64], precision: NDArray[np.float64]) -> float:
    recall = np.concatenate(([0.0], recall, [1.0]))
    envelope = np.maximum.accumulate(np.concatenate(([0.0], precision, [0.0]))[::-1])[::-1]
    return float(((recall[1:] - recall[:-1]) * envelope[1:]).sum())


def _eleven_point(recall: NDArray[np.float64], precision: NDArray[np.float64]) -> float:
    return float(np.mean([precision[recall >= level].max(initial=0.0) for level in np.arange(11) / 10]))
