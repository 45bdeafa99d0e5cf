"""COCO's twelve metrics and its AP by class.

They come from hotcoco, which agrees with pycocotools to the last digit (tests/test_evaluation.py).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import replace

import hotcoco
import numpy as np
from numpy.typing import NDArray

from steadydetr.data.index import AnnotationIndex, find_ids
from steadydetr.metrics.base import Measurer, Metric, Values
from steadydetr.metrics.results import Results

COCO_METRICS = (  # in the order in which the evaluator gives them
    Metric("ap", "AP", "AP", drawn=True, in_summary=True, required=True),
    Metric("ap50", "AP50", "AP50", drawn=True, in_summary=True, required=True),
    Metric("ap75", "AP75", "AP75", drawn=True, in_summary=True, required=True),
    Metric("ap_small", "AP small", "small", required=True),
    Metric("ap_medium", "AP medium", "medium", required=True),
    Metric("ap_large", "AP large", "large", required=True),
    Metric("ar1", "AR1"),
    Metric("ar10", "AR10"),
    Metric("ar100", "AR100", "AR100", required=True),
    Metric("ar_small", "AR small"),
    Metric("ar_medium", "AR medium"),
    Metric("ar_large", "AR large"),
)
COCO_CLASS_METRICS = (Metric("per_class", "AP", in_summary=True, required=True), Metric("per_class_ap50", "AP50"))


def measure_coco(results: Results, index: AnnotationIndex) -> Values:
    """COCO's metrics in percent, -1 where no object is of that size; classes without an object are left out."""
    evaluator = run_coco(results, index)
    values = {metric.name: _percent(value) for metric, value in zip(COCO_METRICS, evaluator.stats, strict=True)}
    precision = np.asarray((evaluator.eval or {})["precision"])  # [IoU, recall, class, area, detections]
    return {
        **values,
        "per_class": _by_class(precision[:, :, :, 0, -1], index.classes),
        "per_class_ap50": _by_class(precision[:1, :, :, 0, -1], index.classes),
    }


MEASURER = Measurer(measure_coco, COCO_METRICS, COCO_CLASS_METRICS)


def run_coco(results: Results, index: AnnotationIndex) -> hotcoco.COCOeval:
    """The evaluator after its run; its `stats` are the twelve numbers between 0 and 1."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = ground_truth(index)
        evaluator = hotcoco.COCOeval(truth, truth.load_res(_rows(results, index)), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator


def _rows(results: Results, index: AnnotationIndex) -> NDArray[np.float64]:
    """[K, 7] as `Results.coco_rows`, with the evaluator's numbers; without detections on images of other data."""
    positions = find_ids(index.image_ids, results.image_ids)
    numbered = replace(results, image_ids=_image_numbers(index)[positions])
    return numbered.coco_rows(range(1, len(index.classes) + 1))[positions >= 0]


def _image_numbers(index: AnnotationIndex) -> NDArray[np.int64]:
    """[I] what the evaluator, which computes with float64, knows images by: their places in the order of their ids, from 1."""
    numbers = np.arange(1, len(index) + 1)
    if index.image_ids.dtype != object:
        numbers[np.argsort(index.image_ids)] = np.arange(1, len(index) + 1)  # the order decides between equal scores
    return numbers


def ground_truth(index: AnnotationIndex) -> hotcoco.COCO:
    """The index as the evaluator's data set, crowd regions included. Images and classes have numbers from 1 instead of their ids."""
    boxes = index.boxes_xyxy.astype(np.float64)
    numbers = _image_numbers(index)
    with contextlib.redirect_stdout(io.StringIO()):
        return hotcoco.COCO.from_arrays(
            images=[{"id": i, "height": h, "width": w} for i, (h, w) in zip(numbers.tolist(), index.sizes.tolist(), strict=True)],
            categories=[{"id": i, "name": name} for i, name in enumerate(index.classes, 1)],
            image_ids=numbers[index.image_of_row],
            category_ids=index.labels.astype(np.int64) + 1,
            boxes=np.column_stack((boxes[:, :2], boxes[:, 2:] - boxes[:, :2])),
            area=index.areas.astype(np.float64),
            iscrowd=index.crowd.astype(np.int64),
        )


def _percent(value: float) -> float:
    return float(value) * 100 if value >= 0 else -1.0


def _by_class(precision: NDArray[np.float64], classes: Sequence[str]) -> dict[str, float]:
    """[IoU, recall, class] -> mean by class in percent; classes without an object are left out."""
    means = {name: precision[:, :, k] for k, name in enumerate(classes)}
    return {name: float(values[values > -1].mean() * 100) for name, values in means.items() if (values > -1).any()}
