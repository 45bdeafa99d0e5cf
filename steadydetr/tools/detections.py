"""The detections of one image, to be filtered, drawn, written down or handed to another library."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from steadydetr.data.images import Picture, open_picture
from steadydetr.data.masks import EncodedMasks
from steadydetr.drawing.boxes import draw_boxes, draw_masks
from steadydetr.kinds import nearest

if TYPE_CHECKING:
    import supervision

THRESHOLD = 0.3  # the least score that is shown, and given by `predict`, unless another is asked for  # D-111
Index = slice | Tensor | NDArray[Any] | Sequence[int] | Sequence[bool]  # of several detections


@dataclass(frozen=True)
class Detection:
    """One box with its score and class, and its mask, if the detector predicts masks."""

    box_xyxy: tuple[float, float, float, float]  # pixels of the original image
    score: float
    label: int
    class_name: str
    encoded_mask: EncodedMasks | None = None  # one

    @property
    def mask(self) -> NDArray[np.bool_] | None:
        """[H, W] of the original image, decoded now."""
        return None if self.encoded_mask is None else next(iter(self.encoded_mask))


@dataclass(frozen=True, repr=False)
class Detections:
    """K boxes with their scores and classes, and masks, if the detector predicts them, the highest score first.

    Boxes may reach beyond the image; see `clipped`. Masks are run lengths, which are decoded when they are asked for.
    """

    boxes_xyxy: Tensor  # [K, 4] pixels of the original image
    scores: Tensor  # [K]
    labels: Tensor  # [K] int64
    names: tuple[str, ...]  # of all classes, by label
    size: tuple[int, int]  # height and width of the original image
    masks: EncodedMasks | None = None  # K

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[Detection]:
        for i, (box, score, label) in enumerate(zip(self.boxes_xyxy.tolist(), self.scores.tolist(), self.labels.tolist(), strict=True)):
            yield Detection(tuple(box), score, label, self.names[label], self.masks and self.masks.take(np.array([i])))

    @overload
    def __getitem__(self, index: int) -> Detection: ...
    @overload
    def __getitem__(self, index: Index) -> Detections: ...
    def __getitem__(self, index: int | Index) -> Detection | Detections:
        """One detection for a number; for a slice, a list of numbers or a mask the detections that it names."""
        if isinstance(index, int) or (not isinstance(index, slice) and np.ndim(index) == 0):
            return next(iter(self._taken([range(len(self))[int(index)]])))  # type: ignore[arg-type]
        return self._taken(index)

    def __repr__(self) -> str:
        if not len(self):
            return "Detections(none)"
        counts = ", ".join(f"{count} {name}" for name, count in Counter(self.class_names).most_common())
        return f"Detections({counts}; scores {self.scores.min():.2f} to {self.scores.max():.2f})"

    @property
    def class_names(self) -> list[str]:
        """The class of every detection."""
        return [self.names[label] for label in self.labels.tolist()]

    def above(self, threshold: float) -> Detections:
        """The detections with at least this score."""
        return self._taken(self.scores >= threshold)

    def of_classes(self, *names: str) -> Detections:
        """The detections of these classes; a ValueError for a name that the detector does not know."""
        for name in names:
            if name not in self.names:
                raise ValueError(f"there is no class {name!r}{nearest(name, self.names)}")
        return self._taken(torch.isin(self.labels, torch.tensor([self.names.index(name) for name in names], dtype=torch.int64)))

    def clipped(self) -> Detections:
        """The same with boxes that end where the image does."""
        height, width = self.size
        most = self.boxes_xyxy.new_tensor([width, height, width, height])
        return replace(self, boxes_xyxy=self.boxes_xyxy.clamp(min=0).minimum(most))

    def _taken(self, index: Index) -> Detections:
        if isinstance(index, (list, tuple)) and not index:
            index = slice(0)
        elif not isinstance(index, slice):
            index = torch.as_tensor(index, device=self.scores.device)
        masks = self.masks
        if masks is not None:
            masks = masks.take(torch.arange(len(self))[index if isinstance(index, slice) else index.cpu()].numpy())
        return replace(self, boxes_xyxy=self.boxes_xyxy[index], scores=self.scores[index], labels=self.labels[index], masks=masks)

    def decode_masks(self) -> NDArray[np.bool_]:
        """[K, H, W] all masks; a ValueError where the detector predicts none."""
        if self.masks is None:
            raise ValueError("these detections have no masks: the detector predicts boxes alone")
        return np.array([*self.masks], bool).reshape(-1, *self.size)

    def label_map(self) -> NDArray[np.uint16]:
        """[H, W] which detection each pixel belongs to: 1 for the first, 2 for the second, ..., and 0 for none. Where several overlap it is
        the one of the highest score. A ValueError where the detector predicts no masks.
        """
        if self.masks is None:
            raise ValueError("these detections have no masks: the detector predicts boxes alone")
        found = np.zeros(self.size, np.uint16)
        for number, mask in enumerate(self.masks, 1):
            found[mask & (found == 0)] = number
        return found

    def draw(self, image: Picture, threshold: float = THRESHOLD) -> Image.Image:
        """A copy of the image with boxes, classes, scores and masks of the detections at or above `threshold`."""
        shown = self.above(threshold)
        captions = [f"{name} {score:.2f}" for name, score in zip(shown.class_names, shown.scores.tolist(), strict=True)]
        picture = open_picture(image)
        if shown.masks is not None:
            picture = draw_masks(picture, shown.masks, shown.labels.tolist())
        return draw_boxes(picture, shown.boxes_xyxy.tolist(), shown.labels.tolist(), captions)

    def to_dicts(self) -> list[dict[str, Any]]:
        """A dictionary for every detection: its class, score, box and, as COCO writes it, its mask (`segmentation`) as plain values."""
        plain = replace(self, masks=None)
        found = [{"class_name": d.class_name, "label": d.label, "score": d.score, "box_xyxy": list(d.box_xyxy)} for d in plain]
        masks = [] if self.masks is None else self.masks.as_coco()
        return [one | {"segmentation": mask} for one, mask in zip(found, masks, strict=True)] if self.masks is not None else found

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(self.to_dicts())

    def to_columns(self) -> dict[str, list[Any]]:
        """A table by its columns, as `pandas.DataFrame`, `polars.DataFrame` and `pyarrow.table` take it; without masks."""
        sides = dict(zip(("x0", "y0", "x1", "y1"), self.boxes_xyxy.T.tolist(), strict=True))
        return {"class_name": self.class_names, "label": self.labels.tolist(), "score": self.scores.tolist(), **sides}

    def to_csv(self) -> str:
        """The same table as a text, with a line of headings."""
        columns, text = self.to_columns(), io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([columns, *zip(*columns.values(), strict=True)])
        return text.getvalue()

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
            mask=None if self.masks is None else self.decode_masks(),
            data={"class_name": np.array(self.class_names)},
        )
