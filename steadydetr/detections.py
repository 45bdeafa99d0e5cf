"""What a detector found in one image, ready to be drawn, filtered and handed on."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

if TYPE_CHECKING:
    import supervision

Picture = str | Path | Image.Image | NDArray[np.uint8]


@dataclass(frozen=True)
class Detections:
    boxes_xyxy: Tensor  # [K, 4] pixels of the original image
    scores: Tensor  # [K] descending
    labels: Tensor  # [K] int64
    names: tuple[str, ...]  # of all classes, by label

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def class_names(self) -> list[str]:
        """The class of every detection."""
        return [self.names[label] for label in self.labels.tolist()]

    def above(self, threshold: float) -> Detections:
        """Those with at least this score."""
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


def open_picture(image: Picture) -> Image.Image:
    """RGB image of a path, a Pillow image or an array [H, W, 3] uint8; an unreadable file is a ValueError that names it."""
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"an image array must be [H, W, 3] uint8 RGB, not {list(image.shape)} {image.dtype}")
        return Image.fromarray(image)
    try:
        with Image.open(image) as opened:
            return opened.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"there is no image {image}") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"cannot read the image {image}: {error}") from error


def draw_boxes(image: Image.Image, boxes_xyxy: list[list[float]], labels: list[int], captions: list[str]) -> Image.Image:
    """A copy of the image with a box and a caption for each entry, one colour per class."""
    image = image.copy()
    pen = ImageDraw.Draw(image)
    width = max(1, round(max(image.size) / 400))
    font = ImageFont.load_default(size=max(9, round(max(image.size) / 55)))
    for box, label, caption in zip(boxes_xyxy, labels, captions, strict=True):
        colour = class_colour(label)
        x0, y0, x1, y1 = box
        pen.rectangle((min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)), outline=colour, width=width)
        if caption:
            _left, _top, right, bottom = pen.textbbox((0, 0), caption, font=font)
            corner = (min(max(x0, 0), image.width - right), max(y0 - bottom - 2, 0))
            pen.rectangle((corner[0], corner[1], corner[0] + right + 2, corner[1] + bottom + 2), fill=colour)
            pen.text((corner[0] + 1, corner[1] + 1), caption, fill="black", font=font)
    return image


def class_colour(label: int) -> tuple[int, int, int]:
    """Hues a golden angle apart, so that neighbouring labels differ."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.65, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)
