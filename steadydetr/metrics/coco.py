"""COCO's twelve metrics and its AP by class; of LVIS, where not every class was looked for in every image, LVIS's (D-131).

They come from hotcoco, which agrees with pycocotools to the last digit (tests/test_evaluation.py), and with LVIS's rules
(tests/test_lvis.py).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import hotcoco
import numpy as np
from numpy.typing import NDArray

from steadydetr.data.columns import find_ids
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


LVIS_METRICS = (  # of federated data alone
    Metric("ap_rare", "APr", "APr"),
    Metric("ap_common", "APc", "APc"),
    Metric("ap_frequent", "APf", "APf"),
    Metric("ar300", "AR300", "AR300"),
)
LVIS_NAMES = {  # what LVIS's evaluator calls its metrics
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "APs",
    "ap_medium": "APm",
    "ap_large": "APl",
    "ar_small": "ARs@300",
    "ar_medium": "ARm@300",
    "ar_large": "ARl@300",
    "ap_rare": "APr",
    "ap_common": "APc",
    "ap_frequent": "APf",
    "ar300": "AR@300",
}
IOU_DIGITS = 4


def measure_coco(results: Results, index: AnnotationIndex) -> Values:
    """COCO's metrics in percent, -1 where no object is of that size; classes without an object are left out.

    Of federated data they are LVIS's, which has no AR of less than 300 detections: -1.
    """
    return evaluator_values(run_coco(results, index), index)


def evaluator_values(evaluator: hotcoco.COCOeval, index: AnnotationIndex) -> Values:
    """The metrics of an evaluator after its run, by the names of those of boxes."""
    if index.federated is None:
        values = {metric.name: _percent(value) for metric, value in zip(COCO_METRICS, evaluator.stats, strict=True)}
    else:
        found = evaluator.get_results()
        names = [metric.name for metric in (*COCO_METRICS, *LVIS_METRICS)]
        values = {name: _percent(found[LVIS_NAMES[name]]) if name in LVIS_NAMES else -1.0 for name in names}
    precision = _precision(evaluator)
    return {**values, "per_class": _by_class(precision, index.classes), "per_class_ap50": _by_class(precision[:1], index.classes)}


MEASURER = Measurer(measure_coco, (*COCO_METRICS, *LVIS_METRICS), COCO_CLASS_METRICS)


def iou_metrics(iou: float) -> tuple[Metric, Metric]:
    """AP at one IoU: the mean over the classes, and by class. 0.625 is `ap62.5`, AP62.5."""
    name = f"{round(iou * 100, IOU_DIGITS):g}"
    return Metric(f"ap{name}", f"AP{name}"), Metric(f"per_class_ap{name}", f"AP{name}")


def measure_at(results: Results, index: AnnotationIndex, ious: Sequence[float]) -> Values:
    """AP in percent at each of these IoUs, over the classes and by class, under the names of `iou_metrics`."""
    wanted = sorted(set(ious))
    precision = _precision(run_coco(results, index, wanted))
    values: dict[str, float | dict[str, float]] = {}
    for row, iou in enumerate(wanted):
        overall, by_class = iou_metrics(iou)
        means = _by_class(precision[row : row + 1], index.classes)
        values |= {overall.name: float(np.mean(list(means.values()))) if means else -1.0, by_class.name: means}
    return values


def run_coco(
    results: Results, index: AnnotationIndex, ious: Sequence[float] = (), kind: Literal["bbox", "segm"] = "bbox"
) -> hotcoco.COCOeval:
    """The evaluator after its run; its `stats` are the twelve numbers between 0 and 1, of federated data LVIS's thirteen.

    Args:
        ious: at which IoUs detections are matched; COCO's ten if empty. Its `stats` are then missing.
        kind: whether by their boxes or by their masks, which both must have.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        truth = ground_truth(index, masks=kind == "segm")
        rows, masks = _rows(results, index, kind == "segm")
        found = truth.load_res(rows, segmentation=masks)
        evaluator = hotcoco.COCOeval(truth, found, kind, lvis_style=index.federated is not None)
        if ious:
            evaluator.params.iou_thrs = list(ious)
        evaluator.evaluate()
        evaluator.accumulate()
        if not ious:
            evaluator.summarize()
    return evaluator


def _precision(evaluator: hotcoco.COCOeval) -> NDArray[np.float64]:
    """[IoU, recall, class] of objects of all sizes, with the most detections of an image."""
    found: NDArray[np.float64] = np.asarray((evaluator.eval or {})["precision"])[:, :, :, 0, -1]
    return found


def _rows(results: Results, index: AnnotationIndex, masks: bool) -> tuple[NDArray[np.float64], list[Any] | None]:
    """[K, 7] as `Results.coco_rows`, with the evaluator's numbers, and the masks, if asked for; without detections on images of other data.

    Whether an object is small is told by the area of its mask, where masks are measured, as by pycocotools from results without boxes. The
    evaluator takes it from the box, so this has that area then.
    """
    positions = find_ids(index.image_ids, results.image_ids)
    numbered = replace(results, image_ids=_image_numbers(index)[positions]).take(positions >= 0)
    rows = numbered.coco_rows(range(1, len(index.classes) + 1))
    if not masks or numbered.masks is None:
        return rows, None
    rows[:, 1:5] = 0, 0, 0, 1
    rows[:, 3] = numbered.masks.areas
    return rows, numbered.masks.as_coco()


def _image_numbers(index: AnnotationIndex) -> NDArray[np.int64]:
    """[I] what the evaluator, which computes with float64, knows images by: their places in the order of their ids, from 1."""
    numbers = np.arange(1, len(index) + 1)
    if index.image_ids.dtype != object:
        numbers[np.argsort(index.image_ids)] = np.arange(1, len(index) + 1)  # the order decides between equal scores
    return numbers


def ground_truth(index: AnnotationIndex, masks: bool = False) -> hotcoco.COCO:
    """The index as the evaluator's data set, crowd regions included. Images and classes have numbers from 1 instead of their ids.

    Args:
        masks: with the masks of objects, which were read.
    """
    boxes = index.boxes_xyxy.astype(np.float64)
    numbers = _image_numbers(index)
    with contextlib.redirect_stdout(io.StringIO()):
        return hotcoco.COCO.from_arrays(
            images=_images(index, numbers),
            categories=_categories(index),
            image_ids=numbers[index.image_of_row],
            category_ids=index.labels.astype(np.int64) + 1,
            boxes=np.column_stack((boxes[:, :2], boxes[:, 2:] - boxes[:, :2])),
            area=index.areas.astype(np.float64),
            iscrowd=index.crowd.astype(np.int64),
            segmentation=_segmentations(index) if masks else None,
        )


def _segmentations(index: AnnotationIndex) -> list[Any]:
    """[A] the mask of every annotation as COCO writes it."""
    if index.masks is None:
        return []
    sizes = index.sizes[index.image_of_row].tolist()
    return [index.masks.as_coco(row, height, width) for row, (height, width) in enumerate(sizes)]


def _images(index: AnnotationIndex, numbers: NDArray[np.int64]) -> list[dict[str, object]]:
    images: list[dict[str, object]] = [
        {"id": i, "height": h, "width": w} for i, (h, w) in zip(numbers.tolist(), index.sizes.tolist(), strict=True)
    ]
    if index.federated is not None:
        for position, image in enumerate(images):
            image["neg_category_ids"] = (index.federated.absent.of_image(position) + 1).tolist()
            image["not_exhaustive_category_ids"] = (index.federated.incomplete.of_image(position) + 1).tolist()
    return images


def _categories(index: AnnotationIndex) -> list[dict[str, object]]:
    frequencies = index.federated.frequencies if index.federated else [""] * len(index.classes)
    named = zip(index.classes, frequencies, strict=True)
    return [{"id": i, "name": name} | ({"frequency": often} if often else {}) for i, (name, often) in enumerate(named, 1)]


def _percent(value: float) -> float:
    return float(value) * 100 if value >= 0 else -1.0


def _by_class(precision: NDArray[np.float64], classes: Sequence[str]) -> dict[str, float]:
    """[IoU, recall, class] -> mean by class in percent; classes without an object are left out."""
    means = {name: precision[:, :, k] for k, name in enumerate(classes)}
    return {name: float(values[values > -1].mean() * 100) for name, values in means.items() if (values > -1).any()}
