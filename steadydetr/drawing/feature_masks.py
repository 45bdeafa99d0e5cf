"""The masks of a teacher's queries and the activation of its features, drawn on images (DETRDistill Fig. 2, 4, 6)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from steadydetr.boxes import to_xyxy
from steadydetr.data import DataConfig, Dataset
from steadydetr.data.images import as_picture
from steadydetr.detectors import Detector
from steadydetr.drawing.example_images import first_objects
from steadydetr.drawing.image_axes import outline_box
from steadydetr.drawing.plot import save_figure
from steadydetr.learning.criterion import Criterion
from steadydetr.metrics.feature_masks import TeacherView, view_of_teacher
from steadydetr.structures import Batch

BEST, POOREST = 3, 2  # queries that are drawn: the best by quality, the poorest by score


@dataclass(frozen=True)
class MaskImage:
    """One column: a map that is laid over the image."""

    title: str
    values: Tensor  # [h, w]
    box_xyxy: Tensor | None = None  # [4] in 0..1


@dataclass(frozen=True)
class MaskRow:
    """One row: an image, its objects, and the maps that are laid over it."""

    picture: np.ndarray
    batch: Batch
    masks: Sequence[MaskImage]


def query_mask_images(view: TeacherView, strides: Sequence[int]) -> Iterator[MaskImage]:
    """Fig. 4: the masks of the best and the poorest queries, as the mean over the levels."""
    masks = view.masks
    best = view.quality.topk(min(BEST, len(masks))).indices.tolist()
    poorest = view.score.topk(min(POOREST, len(masks)), largest=False).indices.tolist()
    for query in best:
        title = f"query {query}: quality {float(view.quality[query]):.2f}"
        yield MaskImage(title, view.over_levels(masks[query]), view.boxes_xyxy[query])
    for query in poorest:
        title = f"query {query}: poor, score {float(view.score[query]):.2f}"
        yield MaskImage(title, view.over_levels(masks[query]), view.boxes_xyxy[query])


def level_mask_images(view: TeacherView, strides: Sequence[int]) -> Iterator[MaskImage]:
    """Fig. 6: the masks of all queries together, weighted by their quality, at every level."""
    for stride, values in zip(strides, view.levels(view.weighted), strict=True):
        yield MaskImage(f"all queries by quality, stride {stride}", values)


def activation_images(view: TeacherView, strides: Sequence[int]) -> Iterator[MaskImage]:
    """Fig. 2: the mean of |F| over channels and levels, before and after the encoder."""
    yield MaskImage("activation before the encoder", view.over_levels(view.activation_before_encoder))
    yield MaskImage("activation after the encoder", view.over_levels(view.activation_after_encoder))


MASK_FIGURES = {"query-masks": query_mask_images, "level-masks": level_mask_images, "activation": activation_images}


def draw_feature_masks(
    teacher: Detector, criterion: Criterion, dataset: Dataset, config: DataConfig, output: Path, suffix: str, objects: int = 3
) -> list[Path]:
    """Every figure of MASK_FIGURES in the folder `output`: a row for each of the first images with an object.

    Returns:
        The files; none where no image has an object.
    """
    device = next(teacher.parameters()).device
    examples = [
        (np.asarray(as_picture(dataset.load_image(position))), batch) for position, batch, _ in first_objects(dataset, config, objects)
    ]
    if not examples:
        return []
    views = [view_of_teacher(teacher, criterion, batch.to(device)) for _, batch in examples]
    files = []
    for name, mask_images in MASK_FIGURES.items():
        masks = [list(mask_images(view, teacher.strides)) for view in views]
        files.append(output / f"{name}.{suffix}")
        _save_rows([MaskRow(*example, images) for example, images in zip(examples, masks, strict=True)], files[-1])
    return files


def _save_rows(rows: Sequence[MaskRow], output: Path) -> None:
    columns = 1 + max(len(row.masks) for row in rows)
    figure = Figure(figsize=(2.6 * columns, 2.8 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes_row, row in zip(grid, rows, strict=True):
        _plot_objects(axes_row[0], row)
        for axes, mask in zip(axes_row[1:], row.masks, strict=True):
            _plot_mask(axes, row.picture, mask)
    save_figure(figure, output)


def _plot_objects(axes: Axes, row: MaskRow) -> None:
    """The image with the boxes of its objects."""
    axes.imshow(row.picture, extent=_edges(row.picture))
    _fit(axes, row.picture)
    for box in to_xyxy(row.batch.targets.boxes):
        outline_box(axes, row.picture, box, "#19c37d")
    axes.set_title("image", fontsize=8)


def _plot_mask(axes: Axes, picture: np.ndarray, mask: MaskImage) -> None:
    """A mask over the image in grey; its lowest value is blue, its highest red."""
    edges = _edges(picture)
    axes.imshow(picture.mean(-1), cmap="gray", extent=edges)
    axes.imshow(mask.values.cpu().numpy(), cmap="jet", alpha=0.55, extent=edges, interpolation="bilinear")
    axes.set_title(mask.title, fontsize=8)
    if mask.box_xyxy is not None:
        outline_box(axes, picture, mask.box_xyxy, "#ffffff")
    _fit(axes, picture)


def _edges(picture: np.ndarray) -> tuple[float, float, float, float]:
    """Left, right, bottom and top of the image in pixels."""
    height, width = picture.shape[:2]
    return -0.5, width - 0.5, height - 0.5, -0.5


def _fit(axes: Axes, picture: np.ndarray) -> None:
    """The axes show the image and nothing beside it."""
    edges = _edges(picture)
    axes.set_xlim(*edges[:2])
    axes.set_ylim(*edges[2:])
    axes.set_axis_off()
