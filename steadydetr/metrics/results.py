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

from steadydetr.data.columns import Ids, id_array
from steadydetr.data.masks import EncodedMasks
from steadydetr.detectors.base import Prediction
from steadydetr.files import write_json


@dataclass(frozen=True)
class Results:
    """Detections of many images, flat."""

    image_ids: Ids  # [K]
    boxes_xyxy: NDArray[np.float32]  # [K, 4] pixels of the original image
    scores: NDArray[np.float32]  # [K]
    labels: NDArray[np.int64]  # [K] index into the classes
    masks: EncodedMasks | None = None  # of all K, of the original size of their images; None: there are none

    @staticmethod
    def of(image_ids: Sequence[int | str], predictions: Sequence[Prediction]) -> Results:
        """The predictions of several images, in the order of `image_ids`."""
        if not predictions:
            empty = np.zeros(0)
            return Results(empty.astype(np.int64), np.zeros((0, 4), np.float32), empty.astype(np.float32), empty.astype(np.int64))
        columns = ([getattr(one, name) for one in predictions] for name in ("boxes_xyxy", "scores", "labels"))
        boxes, scores, labels = (torch.cat(column).cpu().numpy() for column in columns)
        ids = id_array(image_ids)[np.repeat(np.arange(len(image_ids)), [len(one.scores) for one in predictions])]
        masks = _joined([one.masks for one in predictions])
        return Results(ids, boxes.astype(np.float32).reshape(-1, 4), scores.astype(np.float32), labels.astype(np.int64), masks)

    @staticmethod
    def cat(parts: Sequence[Results]) -> Results:
        """All detections of several `Results`, one after the other."""
        parts = [part for part in parts if len(part.scores)]
        if not parts:
            return Results.of([], [])
        names = ("image_ids", "boxes_xyxy", "scores", "labels")
        columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        return Results(**columns, masks=_joined([part.masks for part in parts]))

    def take(self, rows: NDArray[np.bool_]) -> Results:
        """Only the detections that `rows` [K] chooses."""
        masks = None if self.masks is None else self.masks.take(np.flatnonzero(rows))
        return Results(self.image_ids[rows], self.boxes_xyxy[rows], self.scores[rows], self.labels[rows], masks)

    @property
    def boxes_xywh(self) -> NDArray[np.float64]:
        """[K, 4]: x, y, width, height in pixels, as COCO writes boxes."""
        boxes = self.boxes_xyxy.astype(np.float64)
        return np.column_stack((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]))

    def coco_rows(self, category_ids: Sequence[int]) -> NDArray[np.float64]:
        """[K, 7]: image id, x, y, width, height, score, category id, as evaluators take them: of ids, numbers below 2^53."""
        categories = np.asarray(category_ids, dtype=np.int64)[self.labels]
        return np.column_stack((self.image_ids, self.boxes_xywh, self.scores.astype(np.float64), categories))


def _joined(parts: Sequence[EncodedMasks | None]) -> EncodedMasks | None:
    """None unless all parts have masks."""
    known = [part for part in parts if part is not None]
    return EncodedMasks.cat(known) if known and len(known) == len(parts) else None


def coco_results(results: Results, category_ids: Sequence[int]) -> Iterator[dict[str, object]]:
    """Detections as entries of a file of COCO results, as evaluation servers take it. Ids are those of the data set, to the last digit.

    Args:
        category_ids: those of the data set's own file, by label.
    """
    columns = results.image_ids.tolist(), results.labels.tolist(), results.boxes_xywh.tolist(), results.scores.astype(np.float64).tolist()
    masks = [{}] * len(results.scores) if results.masks is None else [{"segmentation": mask} for mask in results.masks.as_coco()]
    for image_id, label, box, score, mask in zip(*columns, masks, strict=True):
        yield {"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": score} | mask


def write_results(path: Path, results: Results, category_ids: Sequence[int]) -> None:
    """Write a file of COCO results. It is replaced as a whole or not at all."""
    write_json(path, list(coco_results(results, category_ids)))
