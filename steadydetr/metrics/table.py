"""The one table of all metrics.

A new metric is a file here with its own MEASURER, and its name in MEASURERS.
"""

from __future__ import annotations

from steadydetr.metrics import coco, segm, voc
from steadydetr.metrics.base import Measurer, Metric

MEASURERS: tuple[Measurer, ...] = (coco.MEASURER, voc.MEASURER, segm.MEASURER)  # in the order in which their metrics are written and shown

METRICS: tuple[Metric, ...] = tuple(metric for measurer in MEASURERS for metric in measurer.metrics)  # one number each
CLASS_METRICS: tuple[Metric, ...] = tuple(metric for measurer in MEASURERS for metric in measurer.by_class)  # a number for every class
LABELS = {metric.name: metric.label for metric in METRICS}
SUMMARY_NAMES = tuple(metric.name for metric in (*METRICS, *CLASS_METRICS) if metric.in_summary)
REQUIRED_NAMES = tuple(metric.name for metric in (*METRICS, *CLASS_METRICS) if metric.required)
AP_COLUMNS = {  # on the console; the last where there are masks
    "AP": "ap",
    "AP50": "ap50",
    "AP75": "ap75",
    "small": "ap_small",
    "medium": "ap_medium",
    "large": "ap_large",
    "segm AP": "segm_ap",
}


def percent(value: float, digits: int = 1) -> str:
    """A metric as people read it: a dash where the data has no such objects."""
    return f"{value:.{digits}f}" if value >= 0 else "-"
