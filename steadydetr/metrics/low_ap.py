"""Reasons why AP may be near 0, as far as they can be seen from the detections."""

from __future__ import annotations

import numpy as np

from steadydetr.data.index import AnnotationIndex, find_ids
from steadydetr.metrics.results import Results


def explain_low_ap(results: Results, index: AnnotationIndex) -> tuple[str, ...]:
    """Likely reasons why the detections match no object; empty where they look as they should."""
    if not len(results.scores):
        return ("there is not one detection",)
    notes = []
    if (find_ids(index.image_ids, results.image_ids) < 0).all():
        notes.append("no detection is on an image of this data set: the image ids belong to another one")
    if float(np.abs(results.boxes_xyxy).max()) <= 2 and int(index.sizes.max()) > 8:
        notes.append("all boxes lie within 0..2 pixels: they look normalised, pixels are expected")
    if not np.isin(np.unique(results.labels), np.unique(index.labels)).any():
        notes.append("no detected class occurs in the annotations: class indices are shifted or belong to another list")
    if float(results.scores.max()) < 0.05:
        notes.append("no score reaches 0.05: the detector has hardly been trained yet")
    return tuple(notes)
