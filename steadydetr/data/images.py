"""Image files and arrays, decoded to RGB in one way for all commands."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from steadydetr.data.picture_inputs import ArrayLike, Encoded, File, from_array, is_array, to_file
from steadydetr.data.reading import check_file
from steadydetr.files import printable
from steadydetr.limits import DEFAULT_LIMITS, Limits

Picture = File | Image.Image | ArrayLike
# What Pillow may open. It knows many more formats by content, whatever a file is called, and some run other programs: EPS Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_opening = threading.Lock()


def open_picture(image: Picture, limits: Limits = DEFAULT_LIMITS) -> Image.Image:
    """The RGB image in anything that `predict` takes: see `picture_inputs`.

    Raises:
        ValueError: it cannot be read, or an array or a tensor has another shape or type than images have; names it.
        TypeError: it is nothing that could be an image.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if is_array(image):
        return from_array(image)
    with _opened(to_file(image, limits), limits) as opened:
        return opened.convert("RGB")


def picture_size(path: Path, limits: Limits) -> tuple[int, int]:
    """Height and width of an image file, of which only the head is read; ValueError as `open_picture`."""
    with _opened(path, limits) as opened:
        return opened.height, opened.width


@contextmanager
def _opened(path: Path | Encoded, limits: Limits) -> Iterator[Image.Image]:
    """An image file of which only the head has been read. What is wrong with it, inside the block too, is a ValueError that names it."""
    try:
        if isinstance(path, Path):
            check_file(path, limits.max_file_mb, "max_file_mb")
    except FileNotFoundError:
        raise ValueError(f"there is no image {printable(path)}") from None
    try:
        with _open_any_size(path) as image:
            if image.width * image.height > limits.max_pixels:
                raise ValueError(f"it has {image.width} x {image.height} pixels, more than max_pixels = {limits.max_pixels} allows")
            yield image
    except UnidentifiedImageError:
        raise ValueError(f"cannot read the image {printable(path)}: it is damaged, or none of {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow's readers raise exceptions of nearly any class where a file is broken
        raise ValueError(f"cannot read the image {printable(path)}: {printable(error) or type(error).__name__}") from error


def _open_any_size(path: Path | Encoded) -> Image.Image:
    """The file as Pillow opens it, without its own limit of pixels, which is a global variable; `max_pixels` takes its place."""
    with _opening:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(path, formats=FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = before
