"""A checkpoint measured on a data set: its metrics, and how steadily it matches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.progress import track
from torch import Tensor

from steadydetr.checkpoints.card import DetectorCard, read_card
from steadydetr.checkpoints.finding import find_checkpoint
from steadydetr.data import DataConfig, EvalLoader, open_data
from steadydetr.data.dataset import Dataset, in_channels
from steadydetr.data.division import Division
from steadydetr.data.hold_out import HoldOut
from steadydetr.data.layouts import NoMasks
from steadydetr.files import refuse_existing, write_json
from steadydetr.finite import prefix_errors
from steadydetr.learning.criterion import Criterion
from steadydetr.limits import DEFAULT_LIMITS, Limits
from steadydetr.metrics.evaluation import Evaluation, collect, evaluate, prediction_function
from steadydetr.metrics.results import Results, write_results
from steadydetr.metrics.stability import Stability, held_out, measure_models
from steadydetr.runs.folder import BEST, LAST, run_criterion, run_divisions
from steadydetr.runs.models import load_models
from steadydetr.tools.predictor import load

RESULTS = ".results.json"  # how the name of the detections ends, beside that of the metrics


def evaluate_checkpoint(
    checkpoint: Path,
    data: str,
    split: str = "val",
    batch_size: int = 4,
    workers: int = 4,
    device: str = "auto",
    output: Path | None = None,
    nms: float | None = None,
    overwrite: bool = False,
    limits: Limits = DEFAULT_LIMITS,
    iou: Sequence[float] = (),
    say: Callable[[str], None] | None = None,
) -> Evaluation:
    """Metrics of a checkpoint on a split of a data set, whose classes must be the checkpoint's.

    Args:
        output: JSON file for the metrics; NAME.results.json beside it gets the detections as COCO results.
        nms: IoU of class-wise suppression instead of the checkpoint's own.
        overwrite: whether these files may be there already, and are replaced.
        limits: what may be read of the data set.
        iou: further IoUs at which AP is measured, over the classes and by class.
        say: is told what is remarkable about the annotations, and what of data without splits is evaluated on.
    """
    if output is not None:
        for path in (output, output.with_suffix(RESULTS)):
            refuse_existing(path, overwrite)
    refuse_below("--batch-size", batch_size, 1)
    refuse_below("--workers", workers, 0)
    if nms is not None and not 0 <= nms <= 1:
        raise ValueError(f"--nms {nms:g} must lie in 0 to 1: it is an IoU")
    for value in iou:
        if not 0 < value <= 1:
            raise ValueError(f"--iou {value:g} must lie above 0 and up to 1: it is an IoU")
    loaded = load(checkpoint, device)
    hold_out, divisions, _ = run_divisions(find_checkpoint(Path(checkpoint).expanduser()))
    opened = open_with_masks if loaded.detector.predicts_masks else open_data
    dataset = opened(data, split, limits, say, hold_out, divisions)
    index = align_classes(dataset.index.classes, loaded.card)
    config = DataConfig(resize=loaded.card.resize, workers=workers)
    images = in_channels(dataset, loaded.detector.image_channels)
    masks = dataset.index.masks is not None or output is not None
    predict = prediction_function(loaded.detector, loaded.device, loaded.card.top, loaded.card.nms if nms is None else nms, masks)
    with prefix_errors(checkpoint):
        results = collect(predict, track(EvalLoader(images, config, batch_size), description="evaluate"))
    results = relabel(results, index)
    evaluation = evaluate(results, dataset.index, iou)
    if output is not None:
        write_json(output, evaluation.as_dict())
        write_results(output.with_suffix(RESULTS), results, dataset.index.category_ids)
    return evaluation


def open_with_masks(
    data: str, split: str, limits: Limits, say: Callable[[str], None] | None, hold_out: HoldOut, divisions: Sequence[Division]
) -> Dataset:
    """The data set with its masks; without them, which is said, where its layout has none."""
    try:
        return open_data(data, split, limits, say, hold_out, divisions, masks=True)
    except NoMasks as error:
        if say:
            say(f"masks are not measured: {error}")
        return open_data(data, split, limits, say, hold_out, divisions)


def measure_checkpoint(
    checkpoint: Path,
    data: str,
    split: str = "val",
    images: int | None = None,
    against: Path | None = None,
    criterion: Criterion | None = None,
    batch_size: int = 4,
    workers: int = 4,
    device: str = "auto",
    limits: Limits = DEFAULT_LIMITS,
) -> dict[str, Stability]:
    """How steadily a checkpoint matches, of its trained weights ("model") and, where it has one, their average ("ema").

    Args:
        images: only the first images with objects; None: all.
        against: another checkpoint of the same detector, for the instability between the two.
        criterion: whose matcher is used; None: that of the checkpoint's run, or Deformable DETR's.
        limits: what may be read of the data set.
    """
    refuse_below("--images", images, 1)
    refuse_below("--batch-size", batch_size, 1)
    refuse_below("--workers", workers, 0)
    folder = find_checkpoint(Path(checkpoint).expanduser(), prefer=(LAST, BEST))
    card = read_card(folder)
    dataset = held_out(open_data(data, split, limits, None, *run_divisions(folder)), images)
    dataset = in_channels(dataset, card.detector.image_channels)
    if dataset.index.classes != card.classes:
        raise ValueError(f"the checkpoint knows the classes {list(card.classes)[:20]}, the data has {list(dataset.index.classes)[:20]}")
    config, matcher = DataConfig(resize=card.resize, workers=workers), criterion or run_criterion(folder)
    before: dict[str, Tensor] = {}
    if against is not None:
        earlier = find_checkpoint(Path(against).expanduser(), prefer=(LAST, BEST))
        if (known := read_card(earlier).classes) != card.classes:
            raise ValueError(f"--against {against} knows other classes, {list(known)[:20]}, than the checkpoint: {list(card.classes)[:20]}")
        other = load_models(earlier, device)
        with prefix_errors(against):
            _, before = measure_models(other, matcher, dataset, config, batch_size, {})
    with prefix_errors(checkpoint):
        return measure_models(load_models(folder, device), matcher, dataset, config, batch_size, before)[0]


def refuse_below(option: str, value: int | None, least: int) -> None:
    """Raise ValueError for a number that is too small; None is not looked at."""
    if value is not None and value < least:
        raise ValueError(f"{option} {value} must be at least {least}")


def align_classes(classes: Sequence[str], card: DetectorCard) -> list[int]:
    """For every class of the checkpoint its place in the data set's list, -1 where it has none.

    Raises ValueError where the two share no name, or the data set has a class that the checkpoint does not know.
    """
    unknown = [name for name in classes if name not in card.classes]
    if unknown:
        raise ValueError(
            f"the checkpoint knows the classes {list(card.classes)[:20]}, the data has others: {unknown[:20]}."
            " Evaluate on data with its classes"
        )
    return [classes.index(name) if name in classes else -1 for name in card.classes]


def relabel(results: Results, index: Sequence[int]) -> Results:
    """The results with the data set's labels; detections of classes that the data set has not are left out.

    Args:
        index: what `align_classes` gives.
    """
    labels = np.asarray(index, dtype=np.int64)[results.labels]
    return replace(results, labels=labels).take(labels >= 0)
