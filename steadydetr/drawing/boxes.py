"""Boxes with captions, drawn on an image by Pillow."""

from __future__ import annotations

import colorsys

from PIL import Image, ImageDraw, ImageFont


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
    """The colour of a class. Hues are a golden angle apart, so that classes with neighbouring labels look different."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.65, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)
