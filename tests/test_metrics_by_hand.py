"""Metrics of a few boxes that can be worked out by hand, their edges, and every explanation of a low AP."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from steadydetr.data import AnnotationIndex
from steadydetr.detectors import Prediction
from steadydetr.metrics.coco import ground_truth
from steadydetr.metrics.evaluation import collect, evaluate, prediction_function
from steadydetr.metrics.low_ap import explain_low_ap
from steadydetr.metrics.results import Results
from steadydetr.metrics.voc import voc_ap50, voc_iou
from steadydetr.structures import Stages
from tests.conftest import make_batch

BOX = [10.0, 10.0, 50.0, 50.0]


def truth(rows: list[tuple[int, list[float], int]], images: int = 3, **more: list[bool]) -> AnnotationIndex:
    """Objects as (image, box, class) in images 1, 2, ... of 100 x 120; the classes are ape, bee and cat with ids 5, 7 and 9."""
    rows = sorted(rows, key=lambda row: row[0])
    return AnnotationIndex.build(
        image_ids=list(range(1, images + 1)),
        files=[str(i) for i in range(images)],
        sizes=[(100, 120)] * images,
        counts=[sum(row[0] == i for row in rows) for i in range(1, images + 1)],
        boxes_xyxy=[row[1] for row in rows],
        labels=[row[2] for row in rows],
        classes=("ape", "bee", "cat"),
        category_ids=(5, 7, 9),
        **more,
    )


def found(*rows: tuple[int, list[float], int, float]) -> Results:
    """Detections as (image, box, class, score)."""
    images, boxes, labels, scores = (list(part) for part in zip(*rows, strict=True))
    return Results(np.array(images), np.array(boxes, np.float32), np.array(scores, np.float32), np.array(labels))


def test_results_from_predictions() -> None:
    one = Prediction(torch.tensor([[1.0, 2, 3, 5]]), torch.tensor([0.5]), torch.tensor([2]))
    none = Prediction(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    two = Prediction(torch.tensor([[0.0, 0, 1, 1], [5, 5, 9, 7]]), torch.tensor([0.9, 0.1]), torch.tensor([0, 1]))
    for results in (Results.of([4, 6, 5], [one, none, two]), Results.cat([Results.of([4, 6], [one, none]), Results.of([5], [two])])):
        rows = results.coco_rows((5, 7, 9))
        expected = [[4, 1, 2, 2, 3, 0.5, 9], [5, 0, 0, 1, 1, 0.9, 5], [5, 5, 5, 4, 2, 0.1, 7]]
        assert rows.tolist() == [pytest.approx(row) for row in expected]
        assert (results.boxes_xyxy.dtype, results.scores.dtype, results.labels.dtype) == (np.float32, np.float32, np.int64)
    for empty in (Results.of([], []), Results.cat([]), Results.of([3], [none])):
        assert empty.boxes_xyxy.shape == (0, 4) and empty.coco_rows((5,)).shape == (0, 7) and len(empty.image_ids) == 0


def test_metrics_of_some_boxes() -> None:
    """Ape: found exactly. Bee: one of two, and one that is not there with a lower score. Cat: no object."""
    index = truth([(1, BOX, 0), (1, [60, 60, 90, 90], 1), (2, BOX, 1)])
    results = found((1, BOX, 0, 0.9), (2, BOX, 1, 0.8), (3, BOX, 1, 0.7))
    metrics = evaluate(results, index)
    half = 51 / 101 * 100  # precision 1 at recalls 0, 0.01, ..., 0.5
    assert metrics.per_class == {"ape": pytest.approx(100), "bee": pytest.approx(half)} == metrics.per_class_ap50
    assert metrics.ap == metrics.ap50 == metrics.ap75 == pytest.approx((100 + half) / 2)
    assert metrics.ap_large == metrics.ar_large == -1 and metrics.ap_small == pytest.approx(0) and metrics.ap_medium == pytest.approx(100)
    assert metrics.ar1 == metrics.ar100 == pytest.approx(75) and metrics.images == 3 and metrics.warnings == ()
    assert metrics.voc_ap50 == pytest.approx(75) and metrics.voc07_ap50 == pytest.approx((100 + 6 / 11 * 100) / 2)
    shifted = found((1, [10, 10, 50, 34], 0, 0.9))  # IoU 0.6
    metrics = evaluate(shifted, index)
    assert metrics.per_class_ap50["ape"] == pytest.approx(100) and metrics.per_class["ape"] == pytest.approx(100 * 3 / 10)


def test_numbers_by_class_take_a_hundred_detections_of_an_image() -> None:
    """The right one has the twelfth score."""
    results = found(*[(1, [60.0, 60, 70, 70 + k], 0, 0.9) for k in range(11)], (1, BOX, 0, 0.5))
    metrics = evaluate(results, truth([(1, BOX, 0)]))
    assert [metrics.ap50, metrics.per_class_ap50["ape"], metrics.per_class["ape"]] == pytest.approx([100 / 12] * 3)


def test_crowds_are_in_the_ground_truth_and_difficult_objects_too() -> None:
    index = truth([(1, BOX, 0), (2, [0, 0, 10, 30], 2)], crowd=[False, True], difficult=[True, False])
    rows = ground_truth(index).dataset["annotations"]  # classes and images are numbered from 1
    assert [(row["image_id"], row["category_id"], row["iscrowd"], row["area"]) for row in rows] == [(1, 1, 0, 1600.0), (2, 3, 1, 300.0)]
    assert [list(row["bbox"]) for row in rows] == [[10, 10, 40, 40], [0, 0, 10, 30]]


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([[10, 10, 50, 50]], [1.0]),
        ([[10, 10, 50, 30], [30, 10, 70, 50]], [0.5, 1 / 3]),
        ([[50, 50, 60, 60], [60, 10, 70, 50], [10, 60, 50, 70], [60, 60, 70, 70]], [0, 0, 0, 0]),
        ([[20, 20, 20, 20]], [0]),
    ],
)
def test_overlap(others: list[list[float]], expected: list[float]) -> None:
    assert voc_iou(np.array(BOX, np.float32), np.array(others, np.float32)).tolist() == pytest.approx(expected)
    nothing = np.zeros(4, np.float32)
    assert voc_iou(nothing, nothing[None]).tolist() == [0.0]


HALF = [10.0, 10.0, 50.0, 30.0]  # IoU 0.5 with BOX


@pytest.mark.parametrize(
    ("rows", "detections", "all_point", "eleven"),
    [
        ([(1, BOX, 0)], [(1, HALF, 0, 0.5)], 100, 100),  # 0.5 is enough
        ([(1, BOX, 0)], [(1, [10, 10, 50, 29], 0, 0.5)], 0, 0),
        ([(1, BOX, 0)], [(2, BOX, 0, 0.5)], 0, 0),  # in another image
        ([(1, BOX, 0)], [(1, BOX, 1, 0.5)], 0, 0),  # of another class
        ([(1, BOX, 0)], [(2, BOX, 0, 0.9), (1, BOX, 0, 0.5)], 50, 50),
        ([(1, BOX, 0)], [(1, BOX, 0, 0.5), (2, BOX, 0, 0.5)], 100, 100),  # of equal scores the one in the first image
        ([(1, BOX, 0)], [(2, BOX, 0, 0.5), (1, BOX, 0, 0.5)], 100, 100),  # whatever was loaded first
        ([(1, BOX, 0)], [(1, BOX, 0, 0.5), (1, [60, 60, 90, 90], 0, 0.5)], 100, 100),  # within an image the one that comes first
        ([(1, BOX, 0)], [(1, BOX, 0, 0.9), (1, HALF, 0, 0.8)], 100, 100),
        ([(1, BOX, 0), (1, HALF, 0)], [(1, BOX, 0, 0.9), (1, BOX, 0, 0.8), (1, HALF, 0, 0.7)], 50 + 50 * 2 / 3, (6 + 5 * 2 / 3) / 0.11),
        ([(1, BOX, 0), (1, BOX, 1)], [(1, BOX, 0, 0.9)], 50, 50),  # mean over the classes that have an object
        ([(1, BOX, 0), (1, BOX, 1)], [(1, BOX, 1, 0.9)], 50, 50),
        ([(i, BOX, 0) for i in (1, 2, 3)] + [(1, HALF, 0)], [(2, BOX, 0, 0.9)], 25, 3 / 0.11),
    ],
)
def test_voc(rows: list, detections: list, all_point: float, eleven: float) -> None:
    assert voc_ap50(found(*detections), truth(rows)) == pytest.approx((all_point, eleven))


def test_voc_without_objects_or_detections() -> None:
    assert voc_ap50(found((1, BOX, 0, 0.5)), truth([])) == (-1, -1)
    assert voc_ap50(Results.of([], []), truth([(1, BOX, 0)])) == (0, 0)
    both = truth([(1, BOX, 0), (2, BOX, 1)], crowd=[True, False], difficult=[False, True])
    assert voc_ap50(found((1, BOX, 0, 0.5), (2, BOX, 1, 0.5)), both) == (-1, -1)


def test_precision_is_its_envelope() -> None:
    """Hit, miss, hit, hit of three objects: precisions 1, 1/2, 2/3, 3/4, of which that at recall 2/3 counts as 3/4."""
    index = truth([(i, BOX, 0) for i in (1, 2, 3)], images=4)
    results = found(*((image, BOX, 0, 1 - place / 10) for place, image in enumerate((1, 4, 2, 3))))
    assert voc_ap50(results, index) == pytest.approx((100 * (1 + 0.75 + 0.75) / 3, 100 * (4 + 7 * 0.75) / 11))


def test_the_levels_of_recall_are_tenths() -> None:
    """Of twenty objects one is not found: all levels but 1.0 are reached."""
    results = found(*((image, BOX, 0, 0.9) for image in range(1, 20)))
    assert voc_ap50(results, truth([(image, BOX, 0) for image in range(1, 21)], images=20)) == pytest.approx((95, 10 / 0.11))


GOOD = found((1, BOX, 0, 0.9), (2, BOX, 2, 0.04))


@pytest.mark.parametrize(
    ("results", "said"),
    [
        (GOOD, []),
        (Results.of([], []), ["not one detection"]),
        (replace(GOOD, image_ids=np.array([7, 8])), ["no detection is on an image"]),
        (replace(GOOD, image_ids=np.array([1, 8])), []),
        (replace(GOOD, boxes_xyxy=np.array([[0, 0, 0.5, 2], [0, 0, 1, 1]], np.float32)), ["look normalised"]),
        (replace(GOOD, boxes_xyxy=np.array([[0, 0, 0.5, 2.1], [0, 0, 1, 1]], np.float32)), []),
        (replace(GOOD, boxes_xyxy=np.array([[-3, 0, 0.5, 2], [0, 0, 1, 1]], np.float32)), []),
        (replace(GOOD, labels=np.array([1, 1])), ["no detected class"]),
        (replace(GOOD, labels=np.array([1, 0])), []),
        (replace(GOOD, scores=np.array([0.049, 0.01], np.float32)), ["no score reaches 0.05"]),
        (replace(GOOD, scores=np.array([0.051, 0.01], np.float32)), []),
        (replace(GOOD, image_ids=np.array([8, 9]), scores=np.array([0.01, 0.01], np.float32)), ["no detection is on", "no score reaches"]),
    ],
)
def test_a_low_ap_is_explained_by_what_is_wrong_alone(results: Results, said: list[str]) -> None:
    notes = explain_low_ap(results, truth([(1, BOX, 0), (2, BOX, 2)]))
    assert len(notes) == len(said) and all(part in note for part, note in zip(said, notes, strict=True))


@pytest.mark.parametrize(("side", "explained"), [(8, False), (9, True)])
def test_tiny_images_may_have_tiny_boxes(side: int, explained: bool) -> None:
    index = truth([(1, [0, 0, 2, 2], 0)])
    index = replace(index, sizes=np.full_like(index.sizes, side))
    assert bool(explain_low_ap(found((1, [0, 0, 2, 2], 0, 0.9)), index)) == explained
    index.sizes[1:] = 4  # one that is larger is enough
    assert bool(explain_low_ap(found((1, [0, 0, 2, 2], 0, 0.9)), index)) == explained


def test_an_ap_that_is_not_low_needs_no_explanation() -> None:
    """AP50 of 0.5: one object of 200 is found, though with a score below 0.05."""
    rows = [(image, [10.0 * k, 0.0, 10.0 * k + 9, 9.0], 0) for image in range(1, 21) for k in range(10)]
    index = truth(rows, images=20)
    assert not evaluate(found((1, [0, 0, 9, 9], 0, 0.01)), index).warnings
    assert evaluate(found((1, [0, 0, 9, 9], 1, 0.01)), index).warnings


class Three(nn.Module):
    """Three boxes an image, two of them in one place; one class. It sees the padding."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, images: torch.Tensor, padding: torch.Tensor) -> Stages:
        assert images.shape[-2:] == padding.shape[-2:]
        logits = torch.tensor([3.0, 2.0, 1.0])[:, None] + self.bias
        boxes = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5], [0.2, 0.2, 0.1, 0.1]])
        return Stages(logits.expand(1, len(images), -1, -1), boxes.expand(1, len(images), -1, -1))


def test_predictions_of_batches() -> None:
    """In pixels of the original images, as many as asked for, suppressed where asked for, without gradients."""
    batch = make_batch((1, 2), size=32)
    batch = replace(batch, original_sizes=((100, 200), (10, 20)))
    for top, nms, count in ((2, None, 2), (300, None, 3), (300, 0.5, 2)):
        predict = prediction_function(Three(), "cpu", top, nms)  # type: ignore[arg-type]
        found = predict(batch)[0]
        boxes, scores = found.boxes_xyxy, found.scores
        assert len(boxes) == count and boxes[0].tolist() == pytest.approx([50, 25, 150, 75]) and not scores.requires_grad
    results = collect(prediction_function(Three(), "cpu"), [batch, replace(batch, image_ids=(5, 9))])  # type: ignore[arg-type]
    assert results.image_ids.tolist() == [0] * 3 + [1] * 3 + [5] * 3 + [9] * 3
