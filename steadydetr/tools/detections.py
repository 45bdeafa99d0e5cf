"""The detections of one image, to be filtered, drawn or handed to another library."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

from steadydetr.data.images import Picture, open_picture
from steadydetr.drawing.boxes import draw_boxes

if TYPE_CHECKING:
    import supervision


@dataclass(frozen=True)
class Detections:
    """K boxes with their scores and classes, the highest score first."""

    boxes_xyxy: Tensor  # [K, 4] pixels of the original image
    scores: Tensor  # [K]
    labels: Tensor  # [K] int64
    names: tuple[str, ...]  # of all classes, by label

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def class_names(self) -> list[str]:
        """The class of every detection."""
        return [self.names[label] for label in self.labels.tolist()]

    def above(self, threshold: float) -> Detections:
        """The detections with at least this score."""
        keep = self.scores >= threshold
        return replace(self, boxes_xyxy=self.boxes_xyxy[keep], scores=self.scores[keep], labels=self.labels[keep])

    def draw(self, image: Picture, threshold: float = 0.3) -> Image.Image:
        """A copy of the image with boxes, classes and scores of the detections at or above `threshold`."""
        shown = self.above(threshold)
        captions = [f"{name} {score:.2f}" for name, score in zip(shown.class_names, shown.scores.tolist(), strict=True)]
        return draw_boxes(open_picture(image), shown.boxes_xyxy.tolist(), shown.labels.tolist(), captions)

    def to_supervision(self) -> supervision.Detections:
        """The same as `supervision.Detections`; needs the extra: pip install steadydetr[supervision]."""
        try:
            import supervision
        except ImportError as error:
            raise ImportError("to_supervision needs the package supervision: pip install 'steadydetr[supervision]'") from error
        return supervision.Detections(
            xyxy=self.boxes_xyxy.cpu().numpy().astype(np.float32).reshape(-1, 4),
            confidence=self.scores.cpu().numpy().astype(np.float32),
            class_id=self.labels.cpu().numpy().astype(int),
            data={"class_name": np.array(self.class_names)},
        )
