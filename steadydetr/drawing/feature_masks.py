"""What a teacher's features answer to: its queries' masks and its activation, drawn on the image (DETRDistill Fig. 2, 4, 6).

Legend: M queries, d channels, L tokens of all levels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from steadydetr.boxes import to_xyxy
from steadydetr.data import DataConfig, Dataset
from steadydetr.detectors import Detector
from steadydetr.drawing.sampling_points import first_objects
from steadydetr.equations.distill import query_masks, spatial_attention
from steadydetr.learning.criterion import Criterion
from steadydetr.learning.matching import solve
from steadydetr.objectives.feature_distillation import matched_quality
from steadydetr.structures import Batch, Memory, QueryGroup

GOOD, POOR = 3, 2  # queries that are drawn: the best by quality, the last by score


@dataclass(frozen=True)
class Answer:
    """One image as its teacher sees it."""

    memory: Memory
    queries: Tensor  # [M, d] output of the last decoder stage
    quality: Tensor  # [M] (Eq. 7)
    score: Tensor  # [M] of the best class
    boxes_xyxy: Tensor  # [M, 4] predicted, in 0..1

    @property
    def masks(self) -> Tensor:
        """psi of every query, [M, L] (Eq. 6)."""
        return query_masks(self.memory.tokens.float(), self.queries[None])[0]

    @property
    def weighted(self) -> Tensor:
        """sum_i q_i psi_i, [L] (Fig. 6)."""
        return self.quality @ self.masks

    def levels(self, values: Tensor) -> list[Tensor]:
        """[L] -> a map [h, w] of the image's part of every level."""
        parts = values.split([h * w for h, w in self.memory.levels])
        maps = []
        for part, (h, w), ratio in zip(parts, self.memory.levels, self.memory.valid_ratios[0].tolist(), strict=True):
            maps.append(part.view(h, w)[: round(h * ratio[1]), : round(w * ratio[0])])
        return maps

    def over_levels(self, values: Tensor) -> Tensor:
        """[L] -> the mean over the levels, at the size of the finest, [h, w]."""
        maps = self.levels(values)
        size = maps[0].shape
        grown = [F.interpolate(m[None, None], size=size, mode="bilinear", align_corners=False)[0, 0] for m in maps]
        return torch.stack(grown).mean(0)


@torch.no_grad()
def answer(teacher: Detector, criterion: Criterion, batch: Batch) -> Answer:
    """`batch` is one image."""
    training = teacher.training
    teacher.eval()
    memory = teacher.encode(batch.images, batch.padding)
    stages = teacher.decode(memory, [QueryGroup("main", teacher.queries(memory)["main"])])["main"][-1:].in_float32()
    teacher.train(training)
    match = solve([criterion.problem(stages, batch.targets, "main")])[0].match
    quality = matched_quality(stages, match, batch.targets, gamma=0.5)[0, 0]
    return Answer(memory, stages.content[0, 0], quality, stages.logits[0, 0].sigmoid().amax(-1), to_xyxy(stages.boxes[0, 0]))


def draw_masks(
    teacher: Detector, criterion: Criterion, dataset: Dataset, config: DataConfig, output: Path, suffix: str, objects: int = 3
) -> list[Path]:
    """query-masks, level-masks and activation in the folder `output`: a row for each of the first images with an object.

    Returns:
        The files; none where no image has an object.
    """
    device = next(teacher.parameters()).device
    rows = []
    for position, batch, _ in first_objects(dataset, config, objects):
        rows.append((dataset.load_image(position), batch, answer(teacher, criterion, batch.to(device))))
    if not rows:
        return []
    drawn = {
        "query-masks": [list(_by_query(found)) for _, _, found in rows],
        "level-masks": [list(_by_level(found, teacher.strides)) for _, _, found in rows],
        "activation": [list(_activation(found)) for _, _, found in rows],
    }
    files = []
    for name, panels in drawn.items():
        files.append(output / f"{name}.{suffix}")
        _save([(picture, batch, row) for (picture, batch, _), row in zip(rows, panels, strict=True)], files[-1])
    return files


@dataclass(frozen=True)
class Panel:
    title: str
    values: Tensor  # [h, w]
    box_xyxy: Tensor | None = None  # [4] in 0..1


def _by_query(found: Answer) -> Iterator[Panel]:
    """Fig. 4: the mean over the levels of psi, of the best and the poorest queries."""
    masks = found.masks
    good = found.quality.topk(min(GOOD, len(masks))).indices.tolist()
    poor = found.score.topk(min(POOR, len(masks)), largest=False).indices.tolist()
    for kind, queries in (("quality", good), ("poor, score", poor)):
        for query in queries:
            value = found.quality[query] if kind == "quality" else found.score[query]
            yield Panel(f"query {query}: {kind} {float(value):.2f}", found.over_levels(masks[query]), found.boxes_xyxy[query])


def _by_level(found: Answer, strides: Sequence[int]) -> Iterator[Panel]:
    for stride, values in zip(strides, found.levels(found.weighted), strict=True):
        yield Panel(f"all queries by quality, stride {stride}", values)


def _activation(found: Answer) -> Iterator[Panel]:
    """Fig. 2: the mean of |F| over channels and levels."""
    memory = found.memory
    for title, tokens in (("activation before the encoder", memory.inputs), ("activation after the encoder", memory.tokens)):
        yield Panel(title, found.over_levels(spatial_attention(tokens.float())[0]))


def _save(rows: Sequence[tuple[Any, Batch, Sequence[Panel]]], output: Path) -> None:
    columns = 1 + max(len(panels) for _, _, panels in rows)
    figure = Figure(figsize=(2.6 * columns, 2.8 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes_row, (picture, batch, panels) in zip(grid, rows, strict=True):
        _draw(axes_row[0], picture, None)
        for box in to_xyxy(batch.targets.boxes):
            _box(axes_row[0], picture, box, "#19c37d")
        axes_row[0].set_title("image", fontsize=8)
        for axes, panel in zip(axes_row[1:], panels, strict=True):
            _draw(axes, picture, panel)
    figure.savefig(output, dpi=110)


def _draw(axes: Axes, picture: np.ndarray, panel: Panel | None) -> None:
    """The image, under its mask in grey; the lowest value of a mask is blue, the highest red."""
    height, width = picture.shape[:2]
    edges = (-0.5, width - 0.5, height - 0.5, -0.5)
    axes.imshow(picture if panel is None else picture.mean(-1), cmap="gray", extent=edges)
    if panel is not None:
        axes.imshow(panel.values.cpu().numpy(), cmap="jet", alpha=0.55, extent=edges, interpolation="bilinear")
        axes.set_title(panel.title, fontsize=8)
        if panel.box_xyxy is not None:
            _box(axes, picture, panel.box_xyxy.cpu(), "#ffffff")
    axes.set_xlim(*edges[:2])
    axes.set_ylim(*edges[2:])
    axes.set_axis_off()


def _box(axes: Axes, picture: np.ndarray, box_xyxy: Tensor, colour: str) -> None:
    height, width = picture.shape[:2]
    left, top, right, bottom = (box_xyxy * torch.tensor((width, height, width, height))).tolist()
    axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1.4))
