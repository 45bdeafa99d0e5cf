"""The sampling points of queries, drawn on images (OD-DETR Fig. 7)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from steadydetr.boxes import to_xyxy
from steadydetr.data import DataConfig, Dataset
from steadydetr.data.images import as_picture
from steadydetr.detectors import Detector
from steadydetr.drawing.example_images import first_objects
from steadydetr.learning.criterion import Criterion
from steadydetr.metrics.sampling_points import SamplingPoints, sampling_points_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_sampling_points(
    models: Mapping[str, Detector], criterion: Criterion, dataset: Dataset, config: DataConfig, output: Path, objects: int = 3
) -> None:
    """One picture: a column a model, a row an image, and in it the sampling points of the query matched to the largest object.

    Args:
        models: by the titles of their columns.
        objects: rows, the first images that have an object. Without one, or without models, nothing is drawn.
    """
    from matplotlib.figure import Figure

    from steadydetr.drawing.plot import save_figure

    rows = list(first_objects(dataset, config, objects))
    if not rows or not models:
        return
    figure = Figure(figsize=(3.2 * len(models) + 0.6, 3.3 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(models), squeeze=False)
    for axes_row, (position, batch, target) in zip(grid, rows, strict=True):
        picture = np.asarray(as_picture(dataset.load_image(position)))
        for axes, (name, model) in zip(axes_row, models.items(), strict=True):
            device = next(model.parameters()).device
            sampled = sampling_points_of(model, criterion, batch.to(device), target)
            if sampled is None:
                axes.set_title(f"{name}\nmore objects than queries", fontsize=9)
                axes.set_axis_off()
            else:
                plot_sampling_points(axes, picture, sampled, to_xyxy(batch.targets.boxes[target]), name)
    figure.supxlabel(KEY, fontsize=8)
    save_figure(figure, output)


KEY = "dots: sampling points, brighter = more weight\nstar: reference point     green: true box\nwhite, dashed: predicted box"


def plot_sampling_points(axes: Axes, picture: np.ndarray, sampled: SamplingPoints, target_xyxy: Tensor, name: str) -> None:
    """The image, the points coloured by weight, the true box (green), the predicted box (white) and the reference point (star)."""
    from steadydetr.drawing.image_axes import outline_box

    height, width = picture.shape[:2]
    scale = torch.tensor((width, height))
    axes.imshow(picture, extent=(0, width, height, 0))  # boxes and points count pixels from the image's corner, not from a pixel's middle
    order = sampled.weights.cpu().argsort()  # the highest weights are drawn last, so that no other point covers them
    points, weights = sampled.points.cpu()[order] * scale, sampled.weights.cpu()[order]
    axes.scatter(points[:, 0], points[:, 1], c=weights, cmap="plasma", s=14, linewidths=0.3, edgecolors="black")
    outline_box(axes, picture, target_xyxy, "#19c37d", line_width=1.6)
    outline_box(axes, picture, sampled.box_xyxy, "#ffffff", "--", line_width=1.6)
    x, y = (sampled.reference.cpu() * scale).tolist()
    axes.plot(x, y, marker="*", markersize=11, color="#ff3b30", markeredgecolor="white", markeredgewidth=0.6)
    axes.set_title(f"{name}\nscore {sampled.score:.2f}, IoU {sampled.iou:.2f}", fontsize=9)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
