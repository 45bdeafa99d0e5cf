"""Image files and arrays, decoded to RGB in one way for all commands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Picture = str | Path | Image.Image | NDArray[np.uint8]


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
