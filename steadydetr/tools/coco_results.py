"""Detections as COCO results: a JSON list of {"image_id", "category_id", "bbox", "score"}, as evaluation servers take it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from steadydetr.config import write_json
from steadydetr.metrics.evaluation import Results
from steadydetr.tools.detections import Detections

Row = dict[str, object]


def coco_results(results: Results, category_ids: Sequence[int]) -> Iterator[Row]:
    """The entries of the list; `category_ids` are those of the data set's own file, by label."""
    for image_id, x, y, width, height, score, category_id in results.coco_rows(category_ids).tolist():
        yield {"image_id": int(image_id), "category_id": int(category_id), "bbox": [x, y, width, height], "score": score}


def results_of_image(image_id: int, found: Detections) -> Results:
    """The detections of one image as results."""
    return Results(np.full(len(found), image_id), found.boxes_xyxy.numpy(), found.scores.numpy(), found.labels.numpy())


def write_results(path: Path, results: Results, category_ids: Sequence[int]) -> None:
    """Write the list; the file is whole or not there."""
    write_json(path, list(coco_results(results, category_ids)))
