"""Reasons why AP may be near 0, as far as they can be seen from the detections."""

from __future__ import annotations

import numpy as np

from steadydetr.data.columns import find_ids
from steadydetr.data.index import AnnotationIndex
from steadydetr.data.trainable import NORMALISED, look_normalised, most_of_a_class, say_elsewhere
from steadydetr.metrics.results import Results

COUNTED = 100  # detections of a class in an image that COCO's metrics count


def explain_limit(index: AnnotationIndex) -> tuple[str, ...]:
    """A sentence where images hold more objects of a class than COCO's metric counts detections."""
    most = most_of_a_class(index)
    if most <= COUNTED:
        return ()
    return (
        f"images hold up to {most} objects of one class, of which COCO's metrics count {COUNTED} detections: no detector reaches AP 100",
    )


def explain_masks(results: Results, index: AnnotationIndex) -> tuple[str, ...]:
    """Sentences where masks are measured against objects of which some have none, or one that is not where the object's box is."""
    if results.masks is None or index.masks is None:
        return ()
    without = int((index.without_mask & ~index.crowd).sum())
    if without and without == int((~index.crowd).sum()):
        return ("no annotation has a mask, so that masks are not measured",)
    lacking = f"{without} of {len(index.labels)} annotations have no mask: no detected mask can find them" if without else ""
    return tuple(filter(None, (lacking, say_elsewhere(index))))


def explain_low_ap(results: Results, index: AnnotationIndex) -> tuple[str, ...]:
    """Likely reasons why the detections match no object; empty where they look as they should."""
    if not (~index.crowd).any():
        what = "only crowd regions" if len(index.labels) else "no annotation"
        return (f"the data set has no object to find ({what}), so that AP is undefined (-1)",)
    if not len(results.scores):
        return ("there is not one detection",)
    notes = []
    if (find_ids(index.image_ids, results.image_ids) < 0).all():
        notes.append("no detection is on an image of this data set: the image ids belong to another one")
    if float(np.abs(results.boxes_xyxy).max()) <= 2 and int(index.sizes.max()) > 8:
        notes.append("all boxes lie within 0..2 pixels: they look normalised, pixels are expected")
    if look_normalised(index):
        notes.append(f"of the annotations {NORMALISED}")
    if not np.isin(np.unique(results.labels), np.unique(index.labels)).any():
        notes.append("no detected class occurs in the annotations: class indices are shifted or belong to another list")
    if float(results.scores.max()) < 0.05:
        notes.append("no score reaches 0.05: the detector has hardly been trained yet")
    return tuple(notes)
