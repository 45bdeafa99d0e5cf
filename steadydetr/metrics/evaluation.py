"""All metrics of a detector on annotated images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from steadydetr.data.index import AnnotationIndex
from steadydetr.detectors import Detector, Prediction, postprocess
from steadydetr.finite import NotFiniteError, images_named
from steadydetr.metrics.base import Values
from steadydetr.metrics.coco import measure_at
from steadydetr.metrics.low_ap import explain_limit, explain_low_ap, explain_masks
from steadydetr.metrics.results import Results
from steadydetr.metrics.table import MEASURERS
from steadydetr.structures import Batch

LOW_AP50 = 0.5  # percent; below it the reasons are looked for


@dataclass(frozen=True)
class Evaluation:
    """Every metric of the table that the data has, in percent; -1 where it has no such objects.

    A metric is read by its name: `evaluation.ap`, `evaluation.voc_ap50`, `evaluation.per_class`.
    """

    values: Values  # by the names of metrics/table.py
    images: int
    warnings: tuple[str, ...] = ()  # why the numbers may be as low as they are

    def __getattr__(self, name: str) -> Any:
        """A metric of the table; called only for names that are no fields."""
        values = self.__dict__.get("values", {})
        if name not in values:
            raise AttributeError(f"an evaluation has no metric {name!r}; there are {', '.join(values)}")
        return values[name]

    def as_dict(self) -> dict[str, object]:
        """What is written as JSON: the numbers, the images, the numbers by class, the warnings."""
        by_class = {name: value for name, value in self.values.items() if isinstance(value, dict)}
        numbers = {name: value for name, value in self.values.items() if name not in by_class}
        return {**numbers, "images": self.images, **by_class, "warnings": self.warnings}


def prediction_function(
    detector: Detector, device: torch.device | str, top: int = 300, nms: float | None = None, masks: bool = False
) -> Callable[[Batch], list[Prediction]]:
    """A function that gives the detections of a batch, in pixels of the original images.

    Args:
        top: most detections of an image.
        nms: IoU above which overlapping detections of a class are suppressed; None: no suppression.
        masks: whether masks are wanted, of a detector that predicts them.
    """

    @torch.no_grad()
    def predict(batch: Batch) -> list[Prediction]:
        stages = detector(batch.images.to(device, non_blocking=True), batch.padding.to(device, non_blocking=True))
        return postprocess(stages, batch.original_sizes, top, nms, batch.padding, masks)

    return predict


def collect(predict: Callable[[Batch], list[Prediction]], loader: Iterable[Batch]) -> Results:
    """Run `predict` over every batch of `loader`; a NotFiniteError names the images whose detections are not finite."""
    return Results.cat([_finite(Results.of(batch.image_ids, predict(batch)), batch) for batch in loader])


def _finite(results: Results, batch: Batch) -> Results:
    """The results of the batch, if they are finite."""
    wrong = ~(np.isfinite(results.boxes_xyxy).all(1) & np.isfinite(results.scores))
    if wrong.any():
        raise NotFiniteError(f"detections of {images_named(set(results.image_ids[wrong].tolist()))} are not finite", batch)
    return results


def evaluate(results: Results, index: AnnotationIndex, ious: Sequence[float] = ()) -> Evaluation:
    """All metrics of `results` against the annotations of `index`.

    Args:
        ious: further IoUs between 0 and 1 at which AP is measured, over the classes and by class.
    """
    values = {name: value for measurer in MEASURERS for name, value in measurer.measure(results, index).items()}
    if ious:
        values = {**values, **{name: value for name, value in measure_at(results, index, ious).items() if name not in values}}
    evaluation = Evaluation(values, len(index))
    low = explain_low_ap(results, index) if evaluation.ap50 < LOW_AP50 else ()
    return replace(evaluation, warnings=(*low, *explain_limit(index), *explain_masks(results, index)))
