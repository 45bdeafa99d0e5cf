"""Detections of many images in flat arrays, and as COCO results in a file.

Legend: K detections of all images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steadydetr.config import write_json

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


def coco_result(row: Sequence[float]) -> dict[str, object]:
    """A row of `Results.coco_rows` as an entry of a file of COCO results."""
    return {"image_id": int(row[0]), "category_id": int(row[6]), "bbox": row[1:5], "score": row[5]}


def write_results(path: Path, rows: NDArray[np.float64]) -> None:
    """Write the rows of `Results.coco_rows` as COCO results. The file is replaced as a whole or not at all."""
    write_json(path, [coco_result(row) for row in rows.tolist()])
