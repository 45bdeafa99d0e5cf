"""COCO's twelve metrics of instance masks, and their AP by class; of LVIS LVIS's. All are named as those of boxes, after `segm_`.

They are there where the detector predicts masks and the data has them. They come from hotcoco, which agrees with pycocotools to the last
digit (tests/test_segm.py).
"""

from __future__ import annotations

from dataclasses import replace

from steadydetr.data.index import AnnotationIndex
from steadydetr.metrics.base import Measurer, Metric, Values
from steadydetr.metrics.coco import COCO_CLASS_METRICS, COCO_METRICS, LVIS_METRICS, evaluator_values, run_coco
from steadydetr.metrics.results import Results


def of_masks(metric: Metric) -> Metric:
    """The metric of masks that is like one of boxes. No record needs it, because most detectors have no masks."""
    column = f"segm {metric.report_column}" if metric.report_column else ""
    return replace(metric, name=f"segm_{metric.name}", label=f"segm {metric.label}", report_column=column, required=False)


def measure_segm(results: Results, index: AnnotationIndex) -> Values:
    """COCO's metrics of masks in percent, -1 where no object is of that size. Nothing where detections or annotations have no masks.

    An annotation without a mask is an object that no detection finds (D-203).
    """
    if results.masks is None or index.masks is None or not index.masks.present.any():
        return {}
    values = evaluator_values(run_coco(results, index, kind="segm"), index)
    return {f"segm_{name}": value for name, value in values.items()}


MEASURER = Measurer(measure_segm, tuple(map(of_masks, (*COCO_METRICS, *LVIS_METRICS))), tuple(map(of_masks, COCO_CLASS_METRICS)))
