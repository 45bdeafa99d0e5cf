"""The pictures that a run leaves when it is finished: learning curves, and predictions below ground truth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw

from steadydetr.data import Dataset
from steadydetr.data.images import as_picture
from steadydetr.data.masks import EncodedMasks
from steadydetr.detectors import Prediction
from steadydetr.drawing.boxes import draw_boxes, draw_masks
from steadydetr.drawing.colours import COLOURS
from steadydetr.files import replacing
from steadydetr.metrics.table import LABELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STROKES = {"class": "-", "l1": "--", "giou": ":", "mask": "-.", "dice": (0, (5, 1, 1, 1, 1, 1))}
AP_COLOURS = {"ap50": "#e07a5f", "ap": "#3d405b", "ap75": "#81b29a", "segm_ap": "#b8860b"}


def draw_curves(metrics: Iterable[dict[str, Any]], output: Path) -> None:
    """Losses and AP over the steps of a run, as one PNG.

    Args:
        metrics: the records of its metrics.jsonl.
    """
    from matplotlib.figure import Figure

    from steadydetr.drawing.plot import save_figure

    records = list(metrics)
    training = [r for r in records if r["kind"] == "train"]
    evaluations = [r for r in records if r["kind"] == "eval"]
    figure = Figure(figsize=(14, 4), layout="constrained")
    total, ap, parts = figure.subplots(1, 3)
    steps = [r["step"] for r in training]
    total.plot(steps, [r["loss"] for r in training], color="#335c81", linewidth=0.8, marker=_marker(steps))
    total.set_title("loss")
    _plot_ap(ap, evaluations)
    _plot_parts(parts, training)
    if training:
        figure.legend(*parts.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    for axes in (total, ap, parts):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    save_figure(figure, output)


def _marker(values: Sequence[object]) -> str:
    """A line of one point would not be seen."""
    return "o" if len(values) == 1 else ""


def _plot_parts(axes: Axes, training: list[dict[str, Any]]) -> None:
    """A line for every loss: its colour is that of its objective, its stroke that of its term."""
    names = [name.partition("/")[::2] for name in training[-1]["losses"]] if training else []
    colours = {objective: COLOURS[i % len(COLOURS)] for i, objective in enumerate(dict.fromkeys(o for o, _ in names))}
    for objective, term in names:
        values = [r["losses"].get(f"{objective}/{term}" if term else objective, float("nan")) for r in training]
        label = f"{objective} {term}".strip()
        style: dict[str, Any] = {"linestyle": STROKES.get(term, "-"), "color": colours[objective], "marker": _marker(values)}
        axes.plot([r["step"] for r in training], values, linewidth=0.9, label=label, **style)
    axes.set_title("losses by term, summed over stages")
    axes.set_yscale("log")


def _plot_ap(axes: Axes, evaluations: list[dict[str, Any]]) -> None:
    for weights, style in (("model", "-"), ("ema", "--")):
        chosen = [r for r in evaluations if r["weights"] == weights]
        for metric, colour in AP_COLOURS.items():
            if measured := [r for r in chosen if metric in r]:
                label = f"{LABELS[metric]}{'' if weights == 'model' else ' (average)'}"
                values = [r[metric] for r in measured]
                axes.plot([r["step"] for r in measured], values, style, color=colour, marker="o", markersize=3, label=label)
    axes.set_title("AP on held-out images")
    axes.set_ylim(0, 100)
    if evaluations:
        axes.legend(fontsize=8)


def draw_predictions(
    data: Dataset,
    positions: Sequence[int],
    predictions: Sequence[Prediction],
    output: Path,
    threshold: float = 0.3,
    side: int = 320,
    whose: str = "detections",
) -> None:
    """One PNG: each column an image, ground truth above, detections at or above `threshold` below, with the name of what found them.

    Masks are drawn where there are any.
    """
    margin, title = 6, 18
    tallest = max((min(1.0, data.index.sizes[position][0] / data.index.sizes[position][1]) for position in positions), default=1.0)
    row = round(side * tallest) + title
    sheet = Image.new("RGB", (len(positions) * (side + margin) + margin, 2 * row + margin), "white")
    for column, (position, found) in enumerate(zip(positions, predictions, strict=True)):
        index = data.index
        image = as_picture(data.load_image(position))
        scale = side / max(image.size)
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BILINEAR)
        rows = index.rows(position)
        labels, boxes = index.labels[rows].tolist(), (index.boxes_xyxy[rows] * scale).tolist()
        masks = None if index.masks is None else EncodedMasks.of(index.decode_masks(position))
        truth = draw_boxes(_with_masks(image, masks, labels), boxes, labels, [index.classes[k] for k in labels])
        shown = found.take((found.scores >= threshold).nonzero()[:, 0])
        labels = shown.labels.tolist()
        captions = [f"{index.classes[k]} {s:.2f}" for k, s in zip(labels, shown.scores.tolist(), strict=True)]
        drawn = draw_boxes(_with_masks(image, shown.masks, labels), (shown.boxes_xyxy * scale).tolist(), labels, captions)
        left = margin + column * (side + margin)
        sheet.paste(_with_title(truth, "ground truth", side, title), (left, 0))
        sheet.paste(_with_title(drawn, f"{whose}, {len(labels)} of score {threshold:g} or more", side, title), (left, row))
    with replacing(output) as file:
        sheet.save(file, "PNG")


def _with_masks(image: Image.Image, masks: EncodedMasks | None, labels: list[int]) -> Image.Image:
    return image if masks is None else draw_masks(image, masks, labels)


def _with_title(image: Image.Image, text: str, side: int, height: int) -> Image.Image:
    """The image on white, below a line of text of this height."""
    sheet = Image.new("RGB", (side, side + height), "white")
    sheet.paste(image, (0, height))
    ImageDraw.Draw(sheet).text((2, 3), text, fill="black")
    return sheet
