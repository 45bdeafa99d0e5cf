"""Where a query looks: the sampling points of its deformable attention, drawn on the image (OD-DETR Fig. 7)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from steadydetr.boxes import iou_giou, to_xyxy
from steadydetr.data import DataConfig, Dataset, EvalLoader, first_images, for_training
from steadydetr.detectors import Detector
from steadydetr.detectors.deformable import DeformableDetector
from steadydetr.learning.criterion import Criterion
from steadydetr.learning.matching import solve
from steadydetr.structures import Batch, QueryGroup


@dataclass(frozen=True)
class Look:
    """What one query looks at in the last decoder stage; places in 0..1 of the image."""

    points: Tensor  # [K, 2] x, y over all heads, levels and points
    weights: Tensor  # [K], 1 in sum over a head
    reference: Tensor  # [2] the point that the offsets start from
    box_xyxy: Tensor  # [4] what it predicts
    score: float  # of the target's class
    iou: float  # with the target


@torch.no_grad()
def look(detector: Detector, criterion: Criterion, batch: Batch, target: int) -> Look | None:
    """The look of the query that is matched to an object of a batch of one image; None where more objects than queries left it none.

    Raises:
        ValueError: a detector without deformable attention, or an image without such an object.
    """
    if not isinstance(detector, DeformableDetector):
        raise ValueError(f"{type(detector).__name__} has no deformable attention, so no sampling points to draw")
    if not 0 <= target < len(batch.targets.labels):
        raise ValueError(f"the image has {len(batch.targets.labels)} objects; there is no number {target}")
    training = detector.training
    detector.eval()
    memory = detector.encode(batch.images, batch.padding)
    queries = detector.queries(memory)["main"]
    with _calls(detector) as calls:
        stages = detector.decode(memory, [QueryGroup("main", queries)])["main"][-1:]
    detector.train(training)
    match = solve([criterion.problem(stages, batch.targets, "main")])[0].match
    matched = match.query[match.target == target].tolist()
    if not matched:
        return None
    query = matched[0]
    locations, weights = calls[-1]
    # locations are in the padded map, the image fills its first part
    points = locations[0, query] / memory.valid_ratios[0][:, None].to(locations)
    logits, boxes = stages.flat
    box = to_xyxy(boxes[0, query])
    return Look(
        points.reshape(-1, 2),
        weights[0, query].flatten(),
        stages.reference[0, 0, query, :2],
        box,
        float(logits[0, query, batch.targets.labels[target]].sigmoid()),
        float(iou_giou(box, to_xyxy(batch.targets.boxes[target]))[0]),
    )


@contextmanager
def _calls(detector: DeformableDetector) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Sampling points and weights of every call of the decoder's cross-attention, in order."""
    calls: list[tuple[Tensor, Tensor]] = []

    def note(attention: Any, arguments: tuple[Any, ...]) -> None:
        query, reference, sized, _, levels = arguments
        calls.append(attention.sampling_points(query, reference, sized, levels))

    hooks = [layer.cross_attention.register_forward_pre_hook(note) for layer in detector.decoder.layers]  # type: ignore[union-attr]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def draw_looks(
    models: Mapping[str, Detector], criterion: Criterion, dataset: Dataset, config: DataConfig, output: Path, objects: int = 3
) -> None:
    """One PNG: a column a model, a row an image; its largest object, and where the query that each model gives it looks.

    Args:
        models: by what their column is called.
        objects: rows, the first images that have an object; nothing is drawn where there is none.
    """
    rows = list(first_objects(dataset, config, objects))
    if not rows:
        return
    figure = Figure(figsize=(3.2 * len(models) + 0.6, 3.3 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(models), squeeze=False)
    for axes_row, (position, batch, target) in zip(grid, rows, strict=True):
        picture = dataset.load_image(position)
        for axes, (name, model) in zip(axes_row, models.items(), strict=True):
            device = next(model.parameters()).device
            seen = look(model, criterion, batch.to(device), target)
            if seen is None:
                axes.set_title(f"{name}\nmore objects than queries", fontsize=9)
                axes.set_axis_off()
            else:
                _draw(axes, picture, seen, to_xyxy(batch.targets.boxes[target]), name)
    figure.savefig(output, dpi=110)


def first_objects(dataset: Dataset, config: DataConfig, count: int) -> Iterator[tuple[int, Batch, int]]:
    """Position, batch and largest object of the first images with objects; every batch is one image."""
    few = first_images(for_training(dataset)[0], 10 * count)
    for position, batch in enumerate(EvalLoader(few, config, batch_size=1)):
        if count and len(batch.targets.labels):
            yield position, batch, int(batch.targets.boxes[:, 2:].prod(1).argmax())
            count -= 1


def _draw(axes: Axes, picture: Any, seen: Look, target_xyxy: Tensor, name: str) -> None:
    height, width = picture.shape[:2]
    scale = torch.tensor((width, height))
    axes.imshow(picture, extent=(0, width, height, 0))  # boxes and points count pixels from the image's corner, not from a pixel's middle
    order = seen.weights.cpu().argsort()
    points, weights = seen.points.cpu()[order] * scale, seen.weights.cpu()[order]
    axes.scatter(points[:, 0], points[:, 1], c=weights, cmap="plasma", s=14, linewidths=0.3, edgecolors="black")
    for box, colour, style in ((target_xyxy, "#19c37d", "-"), (seen.box_xyxy.cpu(), "#ffffff", "--")):
        left, top, right, bottom = (box * scale.repeat(2)).tolist()
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linestyle=style, linewidth=1.6))
    x, y = (seen.reference.cpu() * scale).tolist()
    axes.plot(x, y, marker="*", markersize=11, color="#ff3b30", markeredgecolor="white", markeredgewidth=0.6)
    axes.set_title(f"{name}\nscore {seen.score:.2f}, IoU {seen.iou:.2f}", fontsize=9)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
