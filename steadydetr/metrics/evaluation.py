"""COCO and Pascal VOC metrics of a detector, on results held in flat arrays.

COCO's twelve numbers come from hotcoco, which agrees with pycocotools to the last digit (tests/test_evaluation.py).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from hotcoco import COCO, COCOeval
from numpy.typing import NDArray
from torch import Tensor

from steadydetr.data.index import AnnotationIndex
from steadydetr.detectors import Detector, postprocess
from steadydetr.structures import Batch

Prediction = tuple[Tensor, Tensor, Tensor]  # boxes_xyxy in pixels, scores, labels of one image
METRICS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large")


@dataclass(frozen=True)
class Results:
    """Detections of many images, flat."""

    image_ids: NDArray[np.int64]  # [K]
    boxes_xyxy: NDArray[np.float32]  # [K, 4] pixels of the original image
    scores: NDArray[np.float32]  # [K]
    labels: NDArray[np.int64]  # [K] index into the classes

    @staticmethod
    def of(image_ids: Sequence[int], predictions: Sequence[Prediction]) -> Results:
        boxes, scores, labels = (
            torch.cat([p[k] for p in predictions]).cpu().numpy() if predictions else np.zeros((0, 4)[: 2 - (k > 0)]) for k in range(3)
        )
        ids = np.repeat(np.asarray(image_ids, dtype=np.int64), [len(p[1]) for p in predictions])
        return Results(ids, boxes.astype(np.float32).reshape(-1, 4), scores.astype(np.float32), labels.astype(np.int64))

    @staticmethod
    def cat(parts: Sequence[Results]) -> Results:
        if not parts:
            return Results.of([], [])
        names = ("image_ids", "boxes_xyxy", "scores", "labels")
        return Results(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def coco_rows(self, category_ids: Sequence[int]) -> NDArray[np.float64]:
        """[K, 7]: image id, x, y, w, h, score, category id of the data set's own file."""
        boxes = self.boxes_xyxy.astype(np.float64)
        categories = np.asarray(category_ids, dtype=np.int64)[self.labels]
        return np.column_stack((self.image_ids, boxes[:, :2], boxes[:, 2:] - boxes[:, :2], self.scores.astype(np.float64), categories))


@dataclass(frozen=True)
class Evaluation:
    """COCO metrics in percent, -1 where no object is of that size; VOC's AP50 in both of its definitions."""

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar1: float
    ar10: float
    ar100: float
    ar_small: float
    ar_medium: float
    ar_large: float
    voc_ap50: float  # area under the precision envelope (VOC 2010 on); difficult objects do not count
    voc07_ap50: float  # mean over 11 recalls (VOC 2007)
    images: int
    per_class: dict[str, float] = field(default_factory=dict)  # AP
    per_class_ap50: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()  # why the numbers may be what they are

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def predictor(
    detector: Detector, device: torch.device | str, top: int = 300, nms: float | None = None
) -> Callable[[Batch], list[Prediction]]:
    """What turns a batch into detections in pixels of the original images."""

    @torch.no_grad()
    def predict(batch: Batch) -> list[Prediction]:
        stages = detector(batch.images.to(device), batch.padding.to(device))
        return postprocess(stages, batch.original_sizes, top, nms)

    return predict


def collect(predict: Callable[[Batch], list[Prediction]], loader: Iterable[Batch]) -> Results:
    """Run `predict` over every batch of `loader`."""
    return Results.cat([Results.of(batch.image_ids, predict(batch)) for batch in loader])


def evaluate(results: Results, index: AnnotationIndex) -> Evaluation:
    """All metrics of `results` against the annotations of `index`."""
    evaluation = _run_coco(results, index)
    metrics = {name: _percent(value) for name, value in zip(METRICS, evaluation.stats, strict=True)}
    precision = np.asarray((evaluation.eval or {})["precision"])  # [IoU, recall, class, area, detections]
    per_class = _per_class(precision[:, :, :, 0, -1], index.classes)
    per_class_ap50 = _per_class(precision[:1, :, :, 0, -1], index.classes)
    voc, voc07 = voc_ap50(results, index)
    return Evaluation(
        **metrics,
        voc_ap50=voc,
        voc07_ap50=voc07,
        images=len(index),
        per_class=per_class,
        per_class_ap50=per_class_ap50,
        warnings=explain(results, index) if metrics["ap50"] < 0.5 else (),
    )


def ground_truth(index: AnnotationIndex) -> COCO:
    """The index as the evaluator's data set, crowd regions included."""
    boxes = index.boxes_xyxy.astype(np.float64)
    rows = index.image_of_row
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO.from_arrays(
            images=[{"id": int(i), "height": int(h), "width": int(w)} for i, (h, w) in zip(index.image_ids, index.sizes, strict=True)],
            categories=[{"id": i, "name": name} for i, name in zip(index.category_ids, index.classes, strict=True)],
            image_ids=index.image_ids[rows],
            category_ids=np.asarray(index.category_ids, dtype=np.int64)[index.labels],
            boxes=np.column_stack((boxes[:, :2], boxes[:, 2:] - boxes[:, :2])),
            area=index.areas.astype(np.float64),
            iscrowd=index.crowd.astype(np.int64),
        )


def _run_coco(results: Results, index: AnnotationIndex) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = ground_truth(index)
        evaluation = COCOeval(truth, truth.load_res(results.coco_rows(index.category_ids)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def _percent(value: float) -> float:
    return float(value) * 100 if value >= 0 else -1.0


def _per_class(precision: NDArray[np.float64], classes: Sequence[str]) -> dict[str, float]:
    """[IoU, recall, class] -> mean by class in percent; classes without an object are left out."""
    means = {name: precision[:, :, k] for k, name in enumerate(classes)}
    return {name: float(values[values > -1].mean() * 100) for name, values in means.items() if (values > -1).any()}


def voc_ap50(results: Results, index: AnnotationIndex) -> tuple[float, float]:
    """Pascal VOC's AP at IoU 0.5 in percent, all-point and 11-point, mean over classes that have an object.

    A detection of a difficult object counts neither way; a second detection of an object is false (VOC 2007 development kit).
    """
    averages = [_voc_class(results, index, label) for label in range(len(index.classes))]
    present = [average for average in averages if average is not None]
    if not present:
        return -1.0, -1.0
    all_point, eleven = np.mean(present, axis=0) * 100
    return float(all_point), float(eleven)


def _voc_class(results: Results, index: AnnotationIndex, label: int) -> tuple[float, float] | None:
    truth = np.flatnonzero((index.labels == label) & ~index.crowd)
    objects = int((~index.difficult[truth]).sum())
    if not objects:
        return None
    rows_of: dict[int, NDArray[np.int64]] = {}
    image_ids = index.image_ids[index.image_of_row[truth]]
    for image_id in np.unique(image_ids):
        rows_of[int(image_id)] = truth[image_ids == image_id]
    chosen = np.flatnonzero(results.labels == label)
    chosen = chosen[np.argsort(-results.scores[chosen], kind="stable")]
    found: set[int] = set()
    hits: list[int] = []  # 1 true, 0 false, -1 does not count
    for row in chosen:
        rows = rows_of.get(int(results.image_ids[row]))
        hits.append(0 if rows is None else _voc_hit(results.boxes_xyxy[row], index, rows, found))
    counted = np.array([hit for hit in hits if hit >= 0], dtype=np.float64)
    true = counted.cumsum()
    recall, precision = true / objects, true / np.arange(1, len(counted) + 1)
    return _all_point(recall, precision), _eleven_point(recall, precision)


def _voc_hit(box: NDArray[np.float32], index: AnnotationIndex, rows: NDArray[np.int64], found: set[int]) -> int:
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
    """[4], [n, 4] -> [n]. Pixels counted inclusively by VOC are already half open here, so the plain IoU is the same number."""
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


def explain(results: Results, index: AnnotationIndex) -> tuple[str, ...]:
    """What can be seen from the results when AP is next to 0."""
    if not len(results.scores):
        return ("there is not one detection",)
    notes = []
    if not np.isin(results.image_ids, index.image_ids).any():
        notes.append("no detection is on an image of this data set: the image ids belong to another one")
    if float(np.abs(results.boxes_xyxy).max()) <= 2 and int(index.sizes.max()) > 8:
        notes.append("all boxes lie within 0..2 pixels: they look normalised, pixels are expected")
    if not np.isin(np.unique(results.labels), np.unique(index.labels)).any():
        notes.append("no detected class occurs in the annotations: class indices are shifted or belong to another list")
    if float(results.scores.max()) < 0.05:
        notes.append("no score reaches 0.05: the detector has hardly been trained yet")
    return tuple(notes)
