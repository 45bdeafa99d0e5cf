"""Boxes with captions, and masks, drawn on an image."""

from __future__ import annotations

import colorsys

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from steadydetr.data.masks import EncodedMasks

Rectangle = tuple[float, float, float, float]  # left, top, right, bottom in pixels


COVER = 0.45  # share of a class's colour within its masks


def draw_masks(image: Image.Image, masks: EncodedMasks, labels: list[int]) -> Image.Image:
    """A copy of the image with a colour over every mask and a line along the inside of its edge, the first mask above the others.

    Args:
        masks: K, of the size of the image, or of the one that it was resized from.
        labels: K classes, which the colours are of.
    """
    pixels = np.array(image.convert("RGB"))
    width = max(1, round(max(image.size) / 400))
    for mask, label in zip(masks.take(np.arange(len(masks))[::-1]), reversed(labels), strict=True):
        if mask.shape != pixels.shape[:2]:
            mask = np.asarray(Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST))
        inner = np.pad(mask, width)
        for axis in (0, 1):
            inner = inner & np.roll(inner, width, axis) & np.roll(inner, -width, axis)
        colour = np.array(class_colour(label))
        pixels[mask] = (pixels[mask] * (1 - COVER) + colour * COVER).astype(np.uint8)
        pixels[mask & ~inner[width:-width, width:-width]] = colour
    return Image.fromarray(pixels)


def draw_boxes(image: Image.Image, boxes_xyxy: list[list[float]], labels: list[int], captions: list[str]) -> Image.Image:
    """A copy of the image with a box and a caption for each entry, one colour per class.

    The first entry is drawn last, above the others, and gets its caption first; one that finds no place beside its box that is free of
    other captions is left out.
    """
    image = image.copy()
    pen = ImageDraw.Draw(image)
    width = max(1, round(max(image.size) / 400))
    font = ImageFont.load_default(size=max(9, round(max(image.size) / 55)))
    for (x0, y0, x1, y1), label in reversed(list(zip(boxes_xyxy, labels, strict=True))):
        pen.rectangle((min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)), outline=class_colour(label), width=width)
    taken: list[Rectangle] = []
    for box, label, caption in zip(boxes_xyxy, labels, captions, strict=True):
        _left, _top, right, bottom = pen.textbbox((0, 0), caption, font=font)
        place = _free_place(box, right + 2, bottom + 2, image.size, taken) if caption else None
        if place is not None:
            taken.append(place)
            pen.rectangle(place, fill=class_colour(label))
            pen.text((place[0] + 1, place[1] + 1), caption, fill="black", font=font)
    return image


def _free_place(box: list[float], width: float, height: float, size: tuple[int, int], taken: list[Rectangle]) -> Rectangle | None:
    """Where a caption of this size fits: above the box, else within it at the top, below it, or within it at the bottom."""
    x0, y0, _, y1 = box
    left = min(max(x0, 0), max(size[0] - width, 0))
    for top in (max(y0 - height, 0), y0, y1, y1 - height):
        place = (left, top, left + width, top + height)
        if 0 <= top <= size[1] - height and not any(_overlap(place, other) for other in taken):
            return place
    return None


def _overlap(a: Rectangle, b: Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def class_colour(label: int) -> tuple[int, int, int]:
    """The colour of a class. Hues are a golden angle apart, so that classes with neighbouring labels look different."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.65, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)
