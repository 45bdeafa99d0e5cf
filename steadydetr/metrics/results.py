"""Detections of many images in flat arrays, and as COCO results in a file.

Legend: K detections of all images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steadydetr.files import write_json

Prediction = tuple[Tensor, Tensor, Tensor]  # boxes_xyxy in pixels, scores, labels of one image


@dataclass(frozen=True)
class Results:
    """Detections of many images, flat."""

    image_ids: NDArray[np.int64]  # [K]
    boxes_xyxy: NDArray[np.float32]  # [K, 4] pixels of the original image
    scores: NDArray[np.float32]  # [K]
    labels: NDArray[np.int64]  # [K] index into the classes

    @staticmethod
    def of(image_ids: Sequence[int], predictions: Sequence[Prediction]) -> Results:
        """The predictions of several images, in the order of `image_ids`."""
        if not predictions:
            empty = np.zeros(0)
            return Results(empty.astype(np.int64), np.zeros((0, 4), np.float32), empty.astype(np.float32), empty.astype(np.int64))
        boxes, scores, labels = (torch.cat(parts).cpu().numpy() for parts in zip(*predictions, strict=True))
        ids = np.repeat(np.asarray(image_ids, dtype=np.int64), [len(scores) for _, scores, _ in predictions])
        return Results(ids, boxes.astype(np.float32).reshape(-1, 4), scores.astype(np.float32), labels.astype(np.int64))

    @staticmethod
    def cat(parts: Sequence[Results]) -> Results:
        """All detections of several `Results`, one after the other."""
        if not parts:
            return Results.of([], [])
        names = ("image_ids", "boxes_xyxy", "scores", "labels")
        return Results(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))

    def coco_rows(self, category_ids: Sequence[int]) -> NDArray[np.float64]:
        """[K, 7]: image id, x, y, width, height, score, category id of the data set's own file."""
        boxes = self.boxes_xyxy.astype(np.float64)
        categories = np.asarray(category_ids, dtype=np.int64)[self.labels]
        return np.column_stack((self.image_ids, boxes[:, :2], boxes[:, 2:] - boxes[:, :2], self.scores.astype(np.float64), categories))


def coco_results(results: Results, category_ids: Sequence[int]) -> Iterator[dict[str, object]]:
    """Detections as entries of a file of COCO results, as evaluation servers take it.

    Args:
        category_ids: those of the data set's own file, by label.
    """
    for image_id, x, y, width, height, score, category_id in results.coco_rows(category_ids).tolist():
        yield {"image_id": int(image_id), "category_id": int(category_id), "bbox": [x, y, width, height], "score": score}


def write_results(path: Path, results: Results, category_ids: Sequence[int]) -> None:
    """Write a file of COCO results. It is replaced as a whole or not at all."""
    write_json(path, list(coco_results(results, category_ids)))
