"""COCO's twelve metrics and its AP by class.

They come from hotcoco, which agrees with pycocotools to the last digit (tests/test_evaluation.py).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

import hotcoco
import numpy as np
from numpy.typing import NDArray

from steadydetr.data.index import AnnotationIndex
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
        evaluator = hotcoco.COCOeval(truth, truth.load_res(results.coco_rows(index.category_ids)), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator


def ground_truth(index: AnnotationIndex) -> hotcoco.COCO:
    """The index as the evaluator's data set, crowd regions included."""
    boxes = index.boxes_xyxy.astype(np.float64)
    rows = index.image_of_row
    with contextlib.redirect_stdout(io.StringIO()):
        return hotcoco.COCO.from_arrays(
            images=[{"id": int(i), "height": int(h), "width": int(w)} for i, (h, w) in zip(index.image_ids, index.sizes, strict=True)],
            categories=[{"id": i, "name": name} for i, name in zip(index.category_ids, index.classes, strict=True)],
            image_ids=index.image_ids[rows],
            category_ids=np.asarray(index.category_ids, dtype=np.int64)[index.labels],
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
