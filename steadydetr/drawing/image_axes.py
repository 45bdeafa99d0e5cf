"""Boxes on an image that matplotlib draws."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor


def outline_box(axes: Axes, picture: np.ndarray, box_xyxy: Tensor, colour: str, line_style: str = "-", line_width: float = 1.4) -> None:
    """The outline of a box in 0..1 of the picture, on axes that count the picture's pixels."""
    height, width = picture.shape[:2]
    left, top, right, bottom = (box_xyxy.cpu() * torch.tensor((width, height, width, height))).tolist()
    box = Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linestyle=line_style, linewidth=line_width)
    axes.add_patch(box)
